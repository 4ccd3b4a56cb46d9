"""New and replay rows in one forward pass: what two passes give, to rounding, and two passes where one would not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_texts
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig
from training_runs import LORA, ROWS, TOKENIZER, config, difference, logged, rows_of, train, weights
from transformers import TrainingArguments, default_data_collator
from trl import DPOConfig, DPOTrainer

from retain import ReplayConfig, ReplayMixin, ReplaySFTTrainer, ReplayTrainer
from retain.replay.dataset import ReplayDataset, load_self_generated
from retain.sampling.write import sample_replay
from retain.training.joint_forward import JointForward, can_join, joint_inputs

SGD = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
UNEVEN = Dataset.from_list([{"text": text[: 30 + 40 * (at % 3)]} for at, text in enumerate(make_texts(48, seed=1))])
ONE = ReplayConfig(replay_coef=2.0, per_device_replay_batch_size=1)


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


class Watched:
    """Counts the forward passes with gradient of a run, and may keep the rows of each apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
        self.passes, original = 0, JointForward.of

        def of(trainer: Any) -> JointForward | None:
            found = original(trainer)
            trainer.model.get_input_embeddings().register_forward_hook(self.count)
            return None if apart else found

        monkeypatch.setattr(JointForward, "of", of)

    def count(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.passes += torch.is_grad_enabled() and module.training


def passes(run: Any, apart: bool = False) -> tuple[Any, int]:
    """The trainer of a run, and the forward passes with gradient that it made in training."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        watched = Watched(monkeypatch, apart)
        return run(), watched.passes


def assert_joint_is_apart(run: Any, joined: int) -> Any:
    """One pass in place of two, `joined` times, and the same losses and weights."""
    joint, number = passes(run)
    apart, more = passes(run, apart=True)
    assert more - number == joined
    for name in ("loss", "new_task/loss", "replay/loss", "grad_norm"):
        assert logged(joint, name) == pytest.approx(logged(apart, name), rel=1e-6, abs=1e-6)
    assert logged(joint, "replay/loss")[-1] > 1e-3
    assert difference(weights(joint.model), weights(apart.model)) < 1e-6
    return joint


NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"architecture": "gpt2"},
    "gemma": {"architecture": "gemma3_text"},
    "tied": {"architecture": "qwen3"},
    "lora": {"peft_config": LoraConfig(**LORA)},
    "ntp": {"replay_config": ReplayConfig(replay_objective="ntp", per_device_replay_batch_size=4)},
    "rows with padding": {"train_dataset": UNEVEN, "replay_config": ONE},
    "accumulated": {"changes": {"gradient_accumulation_steps": 2}},
    "checkpointed": {"changes": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("name", CASES)
def test_one_pass_gives_what_two_give(tmp_path: Path, name: str) -> None:
    case = {**CASES[name]}
    architecture = case.pop("architecture", "llama")
    rows = rows_of(make_model(architecture))
    changes = {**SGD, **case.pop("changes", {})}

    def run() -> Any:
        model = make_model(architecture, **(NO_DROPOUT if architecture == "gpt2" else {}))
        return train(tmp_path, rows, model=model, changes=changes, **case)

    # Two steps show that the KL is 0 at the base and rises; `ntp` has none to show.
    joined = {"accumulated": 2, "ntp": 2}.get(name, 1)
    assert_joint_is_apart(run, joined)


def test_one_pass_takes_stored_predictions(tmp_path: Path) -> None:
    stored = {"num_rows": 8, "max_length": 24, "seed": 5, "store_reference": "hidden"}
    rows = load_self_generated(sample_replay(make_model(), TOKENIZER, tmp_path / "rows", **stored))
    trainer = assert_joint_is_apart(lambda: train(tmp_path, rows, changes=SGD), joined=2)
    assert trainer.replay.reference_kind == "cache (hidden)"


@pytest.mark.parametrize("lora", [False, True])
def test_one_pass_in_bf16_is_two_but_for_its_rounding(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    peft = {"peft_config": LoraConfig(**LORA)} if lora else {}
    run = lambda: train(tmp_path, replay, changes={**SGD, "bf16": True}, **peft)  # noqa: E731
    (joint, number), (apart, more) = passes(run), passes(run, apart=True)
    assert more > number
    assert logged(joint, "replay/kl") == pytest.approx(logged(apart, "replay/kl"), rel=2e-2, abs=1e-5)


def test_one_pass_under_logits(tmp_path: Path, replay: ReplayDataset) -> None:
    """Trainer's own loss, which makes the logits of the new rows."""
    tokens = [replay[at].tolist() for at in range(16)]
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens])

    def run() -> Any:
        args = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", **SGD}
        arguments = TrainingArguments(str(tmp_path), logging_steps=1, save_strategy="no", disable_tqdm=True, **args)
        trainer = ReplayTrainer(
            model=make_model(), args=arguments, train_dataset=rows, processing_class=TOKENIZER, replay_dataset=replay,
            data_collator=default_data_collator, replay_config=ReplayConfig(replay_coef=2.0),
        )  # fmt: skip
        trainer.train()
        return trainer

    assert_joint_is_apart(run, joined=1)


class ReplayDPOTrainer(ReplayMixin, DPOTrainer):
    """Replay inside DPO: its own reference passes stay as they are."""


def test_one_pass_in_dpo(tmp_path: Path) -> None:
    texts = make_texts(24, seed=1)
    rows = Dataset.from_list([{"prompt": a[:20], "chosen": a[20:80], "rejected": a[::-1][:60]} for a in texts])
    length = 40
    replay = ReplayDataset.from_rows(list(torch.randint(5, 300, (8, length)).numpy()), "rows")

    def run() -> Any:
        args = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", **SGD}
        args |= {"max_length": length, "bf16": False, "logging_steps": 1, "seed": 7, "gradient_checkpointing": False}
        trainer = ReplayDPOTrainer(
            model=make_model(), args=DPOConfig(str(tmp_path), save_strategy="no", disable_tqdm=True, **args),
            train_dataset=rows, processing_class=TOKENIZER, replay_dataset=replay, replay_config=ONE,
            peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        trainer.train()
        return trainer

    assert_joint_is_apart(run, joined=1)


# Where two passes are left


APART: dict[str, dict[str, Any]] = {
    "packed": {"changes": {"packing": True, "packing_strategy": "bfd"}},
    "neftune": {"changes": {"neftune_noise_alpha": 1.0}},
    "prompt": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
    "ia3": {"peft_config": IA3Config(task_type="CAUSAL_LM")},
    "adapted head": {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])},
    "short new rows": {"train_dataset": UNEVEN.map(lambda row: {"text": row["text"][:24]})},
}


@pytest.mark.parametrize("name", APART)
def test_rows_stay_apart(tmp_path: Path, replay: ReplayDataset, name: str) -> None:
    trainer, number = passes(lambda: train(tmp_path, replay, **APART[name]))
    assert trainer.replay.joint is None or number == 2 * trainer.state.global_step
    assert logged(trainer, "replay/kl")[-1] > 0


def test_a_model_that_mixes_rows_is_given_none(tmp_path: Path, replay: ReplayDataset) -> None:
    """Whether one pass is two is tried on the model itself."""

    class Mixing(ReplaySFTTrainer):
        def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
            def mix(module: Any, args: Any, output: Any) -> Any:
                output.last_hidden_state = output.last_hidden_state - output.last_hidden_state.mean(0, keepdim=True)

            model.model.register_forward_hook(mix)
            super().__init__(*args, model=model, **kwargs)

    settings: dict[str, Any] = {"processing_class": TOKENIZER, "train_dataset": ROWS, "replay_dataset": replay}
    found = [kind(model=make_model(), args=config(tmp_path), **settings) for kind in (ReplaySFTTrainer, Mixing)]
    assert found[0].replay.joint is not None
    assert found[1].replay.joint is None


WHOLE = {"input_ids": torch.ones(4, 20, dtype=torch.long)}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (WHOLE, True),
        ({**WHOLE, "attention_mask": torch.ones(4, 20), "use_cache": True, "num_items_in_batch": 3}, True),
        ({**WHOLE, "position_ids": None, "output_router_logits": False}, True),
        ({**WHOLE, "position_ids": torch.arange(20)[None]}, False),
        ({**WHOLE, "output_router_logits": True}, False),
        ({**WHOLE, "attention_mask": torch.ones(4, 1, 20, 20)}, False),
        ({"input_ids": None, "inputs_embeds": torch.ones(4, 20, 8)}, False),
        ({"input_ids": torch.ones(4, 10, dtype=torch.long)}, False),
    ],
)
def test_only_whole_rows_of_like_length_are_joined(inputs: dict[str, Any], expected: bool) -> None:
    assert can_join(inputs, {"input_ids": torch.ones(1, 20, dtype=torch.long)}) is expected


def test_rows_are_padded_to_one_length() -> None:
    new, old = {"input_ids": torch.full((2, 3), 7)}, {"input_ids": torch.full((1, 4), 8)}
    joined = joint_inputs(new, old)
    assert joined["input_ids"].tolist() == [[7, 7, 7, 0], [7, 7, 7, 0], [8, 8, 8, 8]]  # type: ignore[union-attr]
    assert joined["attention_mask"] is None
    joined = joint_inputs(new | {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, old)
    assert joined["attention_mask"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]  # type: ignore[union-attr]
