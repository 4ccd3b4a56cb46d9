"""Settings that must give one and the same trajectory, and protection that is never off in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_texts, sample_rows
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from training_runs import (
    LORA,
    ROWS,
    TOKENIZER,
    assert_kl_rises_from_zero,
    config,
    difference,
    logged,
    rows_of,
    train,
    weights,
)
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from retain import ReplayConfig, ReplaySFTTrainer, ReplayTrainer
from retain.files import read_jsonl
from retain.losses import kl_divergence
from retain.replay.dataset import ReplayDataset, load_self_generated, replace_rows, token_documents
from retain.sampling.write import sample_replay
from retain.training.coef_controller import OPENING_LENGTH


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


@pytest.fixture(scope="module")
def ragged() -> ReplayDataset:
    """Rows of very different lengths, as real text gives."""
    model = make_model()
    rows = sample_rows(model, 3, range(20), 24, seed=6).numpy()
    return ReplayDataset.from_rows([row[: 3 + at % 20] for at, row in enumerate(rows)], "ragged")


# One and the same trajectory


def adapter(lora: bool, **changes: Any) -> dict[str, Any]:
    return {"peft_config": LoraConfig(**LORA, **changes)} if lora else {}


@pytest.mark.parametrize("lora", [False, True])
def test_coefficient_zero_is_the_host_trainer_bit_for_bit(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    plain, dropout = ReplayConfig(replay_coef=0.0), {"lora_dropout": 0.1}
    ours = train(tmp_path / "a", replay, replay_config=plain, **adapter(lora, **dropout))
    rows: dict[str, Any] = {"train_dataset": ROWS, "processing_class": TOKENIZER}
    host = SFTTrainer(make_model(), config(tmp_path / "b"), **rows, **adapter(lora, **dropout))
    host.train()
    assert difference(weights(ours.model), weights(host.model)) == 0.0
    assert logged(ours, "loss") == logged(host, "loss")


def test_coefficient_zero_is_the_transformers_trainer_bit_for_bit(tmp_path: Path, replay: ReplayDataset) -> None:
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in [replay[i].tolist() for i in range(20)]])

    def run(cls: type, folder: Path, **kwargs: Any) -> Any:
        args = TrainingArguments(
            str(folder), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=3
        )
        trainer = cls(model=make_model(), args=args, train_dataset=rows, **kwargs)
        trainer.train()
        return weights(trainer.model)

    ours = run(ReplayTrainer, tmp_path / "a", replay_config=ReplayConfig(replay_coef=0.0))
    assert difference(ours, run(Trainer, tmp_path / "b")) == 0.0


def split(folder: Path, rows: ReplayDataset, splits: Any, objective: str = "kl", **more: Any) -> Any:
    """Trainers of one run, its steps split as (host, rows, micro-batches); logged at the first step and the third."""
    found, changes = [], {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, **more.pop("changes", {})}
    changes |= {"logging_first_step": True, "logging_steps": 3}
    for host, batch, steps in splits:
        each = {**changes, "per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        replay_config = ReplayConfig(replay_objective=objective, replay_coef=2.0, per_device_replay_batch_size=batch)
        found.append(train(folder, rows, trainer_class=host, replay_config=replay_config, changes=each, **more))
    return found


class Unscaled(ReplaySFTTrainer):
    """A host that leaves the division to `Trainer`: a GPT-2-like forward without loss kwargs."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, None)


def assert_same_steps(one: Any, *others: Any) -> None:
    for other in others:
        assert difference(weights(one.model), weights(other.model)) < 2e-6
        for name in ("loss", "replay/loss", "new_task/loss"):
            assert logged(other, name) == pytest.approx(logged(one, name), rel=1e-5, abs=1e-7)
    assert logged(one, "replay/loss")[-1] > 1e-3


@pytest.mark.parametrize("objective", ["kl", "ntp", "kl_new"])
def test_gradient_accumulation_changes_nothing(tmp_path: Path, ragged: ReplayDataset, objective: str) -> None:
    """1×4 = 2×2 = 4×1 where replay rows have different token counts, also where the host does not scale its loss.

    The new task's own part is the host's loss, and with the replay term the sum.
    """
    splits = ((ReplaySFTTrainer, 4, 1), (ReplaySFTTrainer, 1, 4), (Unscaled, 2, 2))
    found = split(tmp_path, ragged, splits, objective)
    assert_same_steps(*found)
    assert difference(weights(found[0].model), weights(make_model())) > 1e-2
    for trainer in found:
        own, terms, sums = (logged(trainer, name) for name in ("new_task/loss", "replay/loss", "loss"))
        assert [one + 2.0 * term for one, term in zip(own, terms, strict=True)] == pytest.approx(sums, rel=1e-5)
        assert len(own) == 2
        assert own[1] != pytest.approx(own[0], rel=1e-3)
    if objective == "kl":
        plain = SFTTrainer(make_model(), config(tmp_path), train_dataset=ROWS, processing_class=TOKENIZER)
        plain.train()
        assert logged(found[0], "new_task/loss")[0] == logged(plain, "loss")[0]


@pytest.mark.parametrize(
    "objective", ["kl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ntp", "kl_new"))]
)
def test_accumulation_changes_nothing_with_an_adapter(tmp_path: Path, ragged: ReplayDataset, objective: str) -> None:
    splits = ((ReplaySFTTrainer, 4, 1), (ReplaySFTTrainer, 1, 4), (Unscaled, 1, 4))
    changes = {"learning_rate": 0.6, "max_steps": 4}
    assert_same_steps(*split(tmp_path, ragged, splits, objective, changes=changes, **adapter(True)))


def test_the_new_tasks_part_is_logged_on_steps_without_replay(tmp_path: Path, replay: ReplayDataset) -> None:
    replay_config = ReplayConfig(replay_coef=2.0, replay_every=2, per_device_replay_batch_size=4)
    trainer = train(tmp_path, replay, replay_config=replay_config, changes={"max_steps": 5})
    both = zip(logged(trainer, "new_task/loss"), logged(trainer, "loss"), strict=True)
    assert [own == loss for own, loss in both] == [True, True, False, True, False], "KL is 0 at the first step"
    free = train(tmp_path, replay, replay_config=ReplayConfig(replay_coef=0.0))
    assert not logged(free, "new_task/loss"), "there the loss is the new task's"


# Resumed


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    def run(folder: Path, **kwargs: Any) -> Any:
        changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **kwargs.pop("changes", {})}
        retention = {"held-out": make_texts(6, seed=9)}
        kwargs |= adapter(lora, lora_dropout=0.2)
        return train(folder, replay, changes=changes, retention_datasets=retention, **kwargs)

    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", changes={"max_steps": 3})
    resumed = run(tmp_path / "broken", resume=str(tmp_path / "broken" / "checkpoint-2"))
    assert difference(weights(whole.model), weights(resumed.model)) == 0.0
    rows = [
        [{key: row[key] for key in ("step", "loss", "replay/kl") if key in row} for row in read_jsonl(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "broken" / "metrics.jsonl")
    ]
    assert [row for row in rows[0] if "loss" in row] == [row for row in rows[1] if "loss" in row]
    assert [row["step"] for row in rows[1] if "loss" in row] == [1, 2, 3, 4]


def test_ntp_replay_is_training_on_concatenated_rows(tmp_path: Path, replay: ReplayDataset) -> None:
    """With as many replay tokens as new ones and coefficient 1, the gradient is twice that of the joined batch."""
    new = [{"input_ids": replay[i].tolist()} for i in range(10)]
    old = ReplayDataset.from_rows([replay[i] for i in range(10, 14)], "old")
    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    ours = train(
        tmp_path / "a",
        old,
        train_dataset=Dataset.from_list(new[:4]),
        replay_config=ReplayConfig(replay_objective="ntp", replay_coef=1.0, per_device_replay_batch_size=4),
        changes={**settings, "learning_rate": 0.1},
    )
    joined = Dataset.from_list(new[:4] + [{"input_ids": old[i].tolist()} for i in range(4)])
    args = config(tmp_path / "b", **settings, learning_rate=0.2, per_device_train_batch_size=8)
    host = SFTTrainer(make_model(), args, train_dataset=joined, processing_class=TOKENIZER)
    host.train()
    assert difference(weights(ours.model), weights(host.model)) < 2e-7
    assert difference(weights(ours.model), weights(make_model())) > 1e-3


def test_kl_term_has_the_value_and_gradient_of_its_naive_twin(tmp_path: Path, ragged: ReplayDataset) -> None:
    """One step of SGD against the loss written out by hand in float64."""
    changes = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.2}
    replay_config = ReplayConfig(replay_coef=3.0, per_device_replay_batch_size=4)
    settings = {"changes": changes, "replay_config": replay_config, "train_dataset": ROWS.select(range(4))}
    trainer = train(tmp_path, ragged, **settings)
    base, model = make_model().double(), make_model().double()
    batches = [next(iter(trainer.get_train_dataloader()))] * 2  # four rows: every step sees them all
    from retain.replay.dataset import replay_indices

    for step in range(2):
        new, total, count, parts = batches[step], torch.zeros((), dtype=torch.float64), 0, ([], [])
        labels = new["labels"][:, 1:]
        logits = model(input_ids=new["input_ids"], attention_mask=new["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        for index in replay_indices(step, 4, len(ragged), 7):
            ids = torch.tensor(ragged[index].tolist())[None]
            log_p = torch.log_softmax(base(ids).logits[0, :-1], -1)
            log_q = torch.log_softmax(model(ids).logits[0, :-1], -1)
            values = (log_p.exp() * (log_p - log_q)).sum(-1)
            total, count = total + values.sum(), count + len(log_p)
            opening = min(OPENING_LENGTH, len(log_p) // 2)
            parts[0].extend(values[:opening].tolist())
            parts[1].extend(values[opening:].tolist())
        (loss + 3.0 * total / count).backward()
        assert logged(trainer, "replay/kl")[step] == pytest.approx(float(total.detach() / count), rel=1e-4, abs=1e-7)
        for name, part in zip(("opening", "rest"), parts, strict=True):
            assert logged(trainer, f"replay/kl_{name}")[step] == pytest.approx(np.mean(part), rel=1e-4, abs=1e-7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.2 * parameter.grad
                parameter.grad = None
    expected = {name: value.float() for name, value in weights(model).items()}
    assert difference(weights(trainer.model), expected) < 1e-5


@pytest.mark.parametrize("resume", [True, "checkpoint-2"])
def test_a_checkpoint_of_weights_alone_is_not_resumed(
    tmp_path: Path, replay: ReplayDataset, resume: bool | str
) -> None:
    """Adam and the schedule started anew, in silence; a run that has ended makes no step more."""
    changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "max_steps": 3}
    trainer = train(tmp_path, replay, changes=changes)
    trainer.args.max_steps = 4
    checkpoint = resume if resume is True else str(tmp_path / resume)
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: '.*checkpoint-[23]' holds no state of the optimizer"
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    """To the bit, an adapter's dropout included."""
    found = []
    for on in (False, True):
        trainer = train(tmp_path, replay, changes={"gradient_checkpointing": on}, **adapter(lora, lora_dropout=0.1))
        assert_kl_rises_from_zero(trainer)
        assert trainer.replay.reference.kind == ("adapter" if lora else "copy")
        found.append(weights(trainer.model))
    assert difference(*found) == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "weights"])
@pytest.mark.parametrize("lora", [False, True])
def test_mixed_precision_compares_like_with_like(tmp_path: Path, replay: ReplayDataset, dtype: str, lora: bool) -> None:
    """Under autocast, or with weights in bfloat16, the reference runs in the same dtype: the KL still begins at 0."""
    half = {"model": make_model().bfloat16()} if dtype == "weights" else {"changes": {dtype: True}}
    assert_kl_rises_from_zero(train(tmp_path, replay, **half, **adapter(lora)), zero=1e-6, risen=1e-6)


def test_replay_holds_the_model_to_its_base(tmp_path: Path, replay: ReplayDataset) -> None:
    """On held-out rows of its own, the protected model stays nearer to the base than the plain one."""
    held_out = [row.tolist() for row in sample_rows(make_model(), 3, range(100, 116), 24, seed=5).numpy()]
    retention = {"own": token_documents(held_out, TOKENIZER)}
    found = {}
    for coef in (0.0, 20.0):
        trainer = train(
            tmp_path / str(coef),
            replay,
            replay_config=ReplayConfig(replay_coef=coef, per_device_replay_batch_size=8),
            retention_datasets=retention,
            changes={"max_steps": 10},
        )
        found[coef] = trainer.evaluate_retention()["retention/own/ref_kl"]
    assert found[20.0] < 0.6 * found[0.0]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_trains(tmp_path: Path, architecture: str) -> None:
    model = make_model(
        architecture, **({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if "gpt2" in architecture else {})
    )
    rows = ReplayDataset.from_rows(list(sample_rows(model, 3, range(8), 16, seed=1).numpy()), "own")
    trainer = train(tmp_path, rows, model=model, changes={"max_steps": 3})
    assert_kl_rises_from_zero(trainer, zero=1e-6)


# Objectives


def test_replace_puts_replay_rows_into_the_batch(replay: ReplayDataset, tmp_path: Path) -> None:
    batch = replay.batch([0, 1])
    new = {"input_ids": torch.full((4, 10), 9), "attention_mask": torch.ones(4, 10), "labels": torch.full((4, 10), 9)}
    joined = replace_rows(new, batch)
    assert joined["input_ids"].shape == (4, 24)
    assert joined["input_ids"][:2, :10].eq(9).all()
    assert joined["attention_mask"][:2, 10:].eq(0).all()
    assert joined["labels"][:2, 10:].eq(-100).all()
    assert torch.equal(joined["labels"][2:, 1:], batch["input_ids"][:, 1:])
    trainer = train(tmp_path, replay, replay_config=ReplayConfig(replay_objective="replace", replay_share=0.5))
    assert trainer.replay.reference is None
    assert "replay/kl" not in trainer.state.log_history[0]
    assert trainer.replay_batch_size == 2


def test_replace_equals_the_host_on_the_same_rows(tmp_path: Path, replay: ReplayDataset) -> None:
    new = [{"input_ids": replay[i].tolist()} for i in range(4)]
    old = ReplayDataset.from_rows([replay[i] for i in (10, 11)], "old")
    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    share = ReplayConfig(replay_objective="replace", replay_share=0.5)
    ours = train(tmp_path / "a", old, train_dataset=Dataset.from_list(new), replay_config=share, changes=settings)
    kept = next(iter(ours.get_train_dataloader()))["input_ids"][:2].tolist()
    rows = [{"input_ids": row} for row in kept] + [{"input_ids": old[i].tolist()} for i in (0, 1)]
    args = config(tmp_path / "b", **settings)
    host = SFTTrainer(make_model(), args, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER)
    host.train()
    assert difference(weights(ours.model), weights(host.model)) < 2e-7


def test_kl_on_new_rows_needs_no_replay_rows(tmp_path: Path) -> None:
    trainer = train(tmp_path, None, replay_config=ReplayConfig(replay_objective="kl_new", replay_coef=1.0))
    assert_kl_rises_from_zero(trainer, risen=1e-6)


def test_kl_on_new_rows_counts_only_labelled_tokens(tmp_path: Path) -> None:
    """The first logged KL after one step equals the mean over completion tokens, by hand."""
    rows = Dataset.from_list([{"prompt": text[:40], "completion": text[40:70]} for text in make_texts(4, seed=2)])
    changes = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_length": 64}
    trainer = train(
        tmp_path,
        None,
        train_dataset=rows,
        replay_config=ReplayConfig(replay_objective="kl_new", replay_coef=0.5),
        changes=changes,
    )
    base, model = make_model(), make_model()
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model(**inputs).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[mask], batch["labels"][:, 1:][mask])
    loss.backward()  # the KL's own gradient is 0 at the base
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
        kl = kl_divergence(base(**inputs).logits[:, :-1], model(**inputs).logits[:, :-1])[mask].mean()
    assert logged(trainer, "replay/kl")[1] == pytest.approx(float(kl), rel=1e-4)


# Protection is never off in silence

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"replay": None}, "replay_dataset: missing.*replay_coef 0"),
    "rows too long": (
        {"replay": ReplayDataset.from_rows([[3] * 200], "odd")}, "rows of 200 tokens, but this model has 128",
    ),
    "unknown tokens": ({"replay": ReplayDataset.from_rows([[3, 999]], "odd")}, "token id 999, but"),
    "rows in another form": ({"replay": [[3, 5, 6]]}, "^replay_dataset: got a list; give a folder of"),
    "no adapter": (
        {"replay_config": ReplayConfig(replay_reference="adapter")},
        "replay_reference: 'adapter', but there is no adapter",
    ),
    "packed rows": (
        {"replay_config": ReplayConfig(replay_objective="replace"), "changes": {"packing": True}},
        "'replace' needs padded batches",
    ),
    "texts without names": (
        {"retention_datasets": make_texts(2)}, "^retention_datasets: a list names no texts; give a mapping such as",
    ),
    "a frozen model": ({"model": make_model().requires_grad_(False)}, "^model: all its parameters are frozen"),
    "replay on the first step alone": (
        {"replay_config": ReplayConfig(replay_every=3)}, "replay_every: 3 of 3 steps is the first one only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_protect_nothing_are_refused(tmp_path: Path, replay: ReplayDataset, name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **{"replay": replay, **settings})


def test_rows_of_another_model_are_refused_unless_allowed(tmp_path: Path, replay: ReplayDataset) -> None:
    with pytest.raises(ValueError, match="sampled from 'tiny'.*allow_off_policy_replay"):
        train(tmp_path, replay, model=make_model(seed=1))
    off_policy = ReplayConfig(allow_off_policy_replay=True)
    trainer = train(tmp_path, replay, model=make_model(seed=1), replay_config=off_policy)
    assert logged(trainer, "replay/kl")[-1] > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_rewrite_the_base_are_refused_with_a_remedy(
    tmp_path: Path, replay: ReplayDataset, init: str
) -> None:
    with pytest.raises(ValueError, match=f"replay_reference: 'adapter' is not the base.*{init}.*copy"):
        train(tmp_path, replay, peft_config=LoraConfig(**LORA, init_lora_weights=init))
    by_copy = ReplayConfig(replay_reference="copy")
    trainer = train(tmp_path, replay, peft_config=LoraConfig(**LORA, init_lora_weights=init), replay_config=by_copy)
    assert_kl_rises_from_zero(trainer, zero=1e-6)


def test_an_adapter_trained_before_is_refused_or_copied(tmp_path: Path, replay: ReplayDataset) -> None:
    def trained() -> Any:
        torch.manual_seed(0)
        model = get_peft_model(make_model(), LoraConfig(**LORA))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return model

    with pytest.raises(ValueError, match="the adapter already held something"):
        train(tmp_path, replay, model=trained())
    trainer = train(tmp_path, replay, model=trained(), replay_config=ReplayConfig(replay_reference="copy"))
    assert abs(logged(trainer, "replay/kl")[0]) < 1e-6


def test_rows_that_leave_no_room_for_a_prompt_are_refused(tmp_path: Path, replay: ReplayDataset) -> None:
    """Not an IndexError of the position embedding in the middle of training."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = make_model("gpt2", n_positions=int(np.diff(replay.offsets).max()) + 2)
    real = ReplayDataset.from_rows([replay[at] for at in range(len(replay))], "real")
    with pytest.raises(ValueError, match=r"replay_max_length: rows of 24 tokens, but .* has 23 positions for them"):
        train(tmp_path, real, model=model, peft_config=prompt)


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(**LORA, modules_to_save=["lm_head"]),
        LoraConfig(**LORA, use_dora=True),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["modules_to_save", "dora", "prompt_tuning"],
)
def test_adapters_that_keep_the_base_intact(tmp_path: Path, replay: ReplayDataset, peft_config: Any) -> None:
    trainer = train(tmp_path, replay, peft_config=peft_config, changes={"learning_rate": 1e-2})
    kl = logged(trainer, "replay/kl")
    assert kl[-1] > 1e-7
    batch = replay.batch([0, 1])
    with torch.no_grad():
        expected = make_model()(**batch).logits
        with trainer.replay.reference.base(trainer.model) as base:
            assert torch.allclose(base(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("store", ["hidden", "topk"])
def test_a_prompt_is_held_to_what_was_stored_of_its_base(tmp_path: Path, store: str) -> None:
    """It does not start at its base, so "these are not this model's; sample again" was said of the base's own rows."""
    stored = {"num_rows": 8, "max_length": 24, "seed": 5, "store_reference": store}
    rows = load_self_generated(sample_replay(make_model(), TOKENIZER, tmp_path / "rows", **stored))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    kl = {}
    for reference in ("auto", "adapter"):
        settings = ReplayConfig(replay_reference=reference)
        torch.manual_seed(0)
        trainer = train(tmp_path / reference, rows, replay_config=settings, peft_config=prompt)
        kl[reference] = logged(trainer, "replay/kl")
    assert kl["auto"][-1] > 1e-3
    if store == "hidden":
        assert kl["auto"] == pytest.approx(kl["adapter"], rel=1e-4)
    other = load_self_generated(sample_replay(make_model(seed=1), TOKENIZER, tmp_path / "others", **stored))
    other = replace(other, manifest=rows.manifest)
    with pytest.raises(ValueError, match="^replay_reference: the predictions stored in .* are not this model's"):
        train(tmp_path / "other", other, peft_config=prompt)


def test_what_the_user_froze_in_an_adapter_stays_frozen(tmp_path: Path, replay: ReplayDataset) -> None:
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    frozen = {name: value for name, value in model.named_parameters() if "lora_A" in name}
    for value in frozen.values():
        value.requires_grad_(False)
    before = {name: value.clone() for name, value in frozen.items()}
    train(tmp_path, replay, model=model)
    assert difference(before, frozen) == 0.0
    assert not any(value.requires_grad for value in frozen.values())


def test_a_model_is_needed(tmp_path: Path, replay: ReplayDataset) -> None:
    with pytest.raises(ValueError, match="model: missing; give a model or its name"):
        ReplaySFTTrainer(args=config(tmp_path), train_dataset=ROWS, replay_dataset=replay)


def test_retention_windows_are_no_longer_than_the_model_can_take(tmp_path: Path, replay: ReplayDataset) -> None:
    model, long = make_model("gpt2"), make_texts(1, words=400)
    replay = ReplayDataset.from_rows([replay[0]], "short")
    trainer = train(tmp_path, replay, model=model, retention_datasets={"long": long}, changes={"max_length": None})
    assert trainer.evaluate_retention()["retention/long/loss"] > 0  # gpt2 has no position beyond its last


@pytest.mark.parametrize(("optim", "rate"), [("sgd", 1e30), ("adamw_torch_fused", 1e38)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tmp_path: Path, replay: ReplayDataset, optim: str, rate: float, lora: bool
) -> None:
    """What is kept is finite: weights that no longer are are not written."""
    changes = {"learning_rate": rate, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.0, "optim": optim}
    says = r"loss: (nan|inf) at step [23]; lower learning_rate|model: some weights are not finite, so nothing was saved"
    with pytest.raises(ValueError, match=says):
        train(tmp_path, replay, changes=changes, **adapter(lora))
    kept = list(tmp_path.glob("checkpoint-*"))
    assert bool(kept) == (optim == "sgd")
    for checkpoint in kept:
        assert (checkpoint / "trainer_state.json").exists()
        held = load_file(checkpoint / ("adapter_model.safetensors" if lora else "model.safetensors"))
        assert all(bool(value.isfinite().all()) for value in held.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, replay: ReplayDataset) -> None:
    """The last step of all: no loss comes after it."""
    trainer = train(tmp_path, replay, changes={"max_steps": 1, "learning_rate": 1e38})
    with pytest.raises(ValueError, match="model: some weights are not finite, so nothing was saved to"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


# Hosts, and what a run leaves behind


@pytest.mark.parametrize("strategy", ["wrapped", "bfd"])
@pytest.mark.parametrize("objective", ["kl", "kl_new"])
def test_packed_new_rows(tmp_path: Path, replay: ReplayDataset, strategy: str, objective: str) -> None:
    """Packing is the host's; what it hands over (`bfd`: one long row with positions) is protected all the same."""
    changes = {"packing": True, "packing_strategy": strategy}
    trainer = train(tmp_path, replay, changes=changes, replay_config=ReplayConfig(replay_objective=objective))
    assert_kl_rises_from_zero(trainer)


def test_what_was_measured_before_training_is_measured_again_in_it(tmp_path: Path, replay: ReplayDataset) -> None:
    trainer = ReplaySFTTrainer(
        model=make_model(),
        args=config(tmp_path, eval_strategy="steps", eval_steps=3, eval_on_start=True),
        train_dataset=ROWS,
        eval_dataset={"one": ROWS.select(range(4)), "two": ROWS.select(range(4, 8))},
        processing_class=TOKENIZER,
        replay_dataset=replay,
        retention_datasets={"words": make_texts(6, seed=9)},
    )
    trainer.evaluate()
    trainer.train()
    assert [row["step"] for row in read_jsonl(tmp_path / "documents.jsonl")] == [0, 3]


def test_a_run_leaves_plain_files(tmp_path: Path, replay: ReplayDataset) -> None:
    trainer = train(
        tmp_path / "run",
        replay,
        eval_dataset=ROWS.select(range(8)),
        retention_datasets={"words": make_texts(6, seed=9)},
        changes={"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 4},
    )
    trainer.create_model_card(model_name="run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {row["step"] for row in rows if "retention/words/ref_kl" in row} == {0, 2, 4}
    first = next(row for row in rows if "retention/words/ref_kl" in row)
    assert first["retention/words/ref_kl"] == pytest.approx(0.0, abs=1e-7)
    assert first["retention/words/ref_agreement"] == 1.0
    documents = read_jsonl(tmp_path / "run" / "documents.jsonl")
    last = next(row for row in rows if row["step"] == 4 and "retention/words/ref_kl" in row)
    assert sum(documents[-1]["ref_kl"]) / sum(documents[-1]["num_tokens"]) == pytest.approx(
        last["retention/words/ref_kl"], abs=1e-6
    )
    settings = json.loads((tmp_path / "run" / "retain_config.json").read_text())
    assert settings["replay"]["replay_coef"] == 2.0
    assert settings["replay_dataset"]["num_rows"] == 20
    assert settings["training_arguments"]["max_steps"] == 4
    card = (tmp_path / "run" / "README.md").read_text()
    (index,) = ModelCard(card).data.to_dict()["model-index"]
    named = {metric["type"]: metric for result in index["results"] for metric in result["metrics"]}
    assert named["ref_kl"]["value"] == last["retention/words/ref_kl"]
    assert "Forgetting" in card
    assert "words" in card
    assert card.startswith("---\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's
@pytest.mark.parametrize("lora", [False, True])
def test_torch_compile_changes_nothing(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    settings, found = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 4}, []
    for on in (False, True):
        found.append(train(tmp_path / str(on), replay, changes={**settings, "torch_compile": on}, **adapter(lora)))
    plain, compiled = found
    assert logged(compiled, "replay/kl") == pytest.approx(logged(plain, "replay/kl"), rel=1e-4, abs=1e-6)
    assert difference(weights(plain.model), weights(compiled.model)) < 1e-6


# Replay on some steps only


@pytest.mark.parametrize("objective", ["kl", "ntp", "kl_new", "replace"])
def test_replay_every_k_steps(tmp_path: Path, replay: ReplayDataset, objective: str) -> None:
    """Rows resume where they stopped, the log is of the steps that had replay, and the term is weighted by k."""
    settings = {"replay_objective": objective, "replay_coef": 2.0, "per_device_replay_batch_size": 4}
    drawn: list[int] = []

    class Watching(ReplaySFTTrainer):
        def _draw(self, num_micro_batches: int) -> Any:
            drawn.append(self.state.global_step)
            return super()._draw(num_micro_batches)

    config = ReplayConfig(replay_every=3, **settings)
    trainer = train(tmp_path, replay, trainer_class=Watching, replay_config=config, changes={"max_steps": 7})
    assert drawn == ([] if objective == "kl_new" else [0, 3, 6])
    if objective != "replace":
        steps = [row["step"] for row in trainer.state.log_history if "replay/loss" in row]
        assert steps == [1, 4, 7]


def test_replay_every_k_steps_weighs_by_k(tmp_path: Path, replay: ReplayDataset) -> None:
    """One step of SGD: k steps' worth of the pull at once."""
    moved = []
    for every, coef in ((1, 6.0), (3, 2.0)):
        config = ReplayConfig(
            replay_objective="ntp", replay_coef=coef, per_device_replay_batch_size=4, replay_every=every
        )
        changes = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
        moved.append(weights(train(tmp_path / str(every), replay, replay_config=config, changes=changes).model))
    assert difference(*moved) == 0.0


# A budget instead of a coefficient


def budgeted(folder: Path, replay: ReplayDataset, budget: float, **changes: Any) -> ReplaySFTTrainer:
    config = ReplayConfig(max_ref_kl=budget, per_device_replay_batch_size=4, replay_coef=1.0)
    settings = {"max_steps": 30, **changes.pop("changes", {})}
    trainer: ReplaySFTTrainer = train(folder, replay, replay_config=config, changes=settings, **changes)
    return trainer


def test_a_budget_moves_the_coefficient(tmp_path: Path, replay: ReplayDataset) -> None:
    tight, loose = (budgeted(tmp_path / str(budget), replay, budget) for budget in (0.005, 10.0))
    assert logged(tight, "replay/coef")[-1] > 2.0 > 1.0 > logged(loose, "replay/coef")[-1]
    assert logged(tight, "replay/kl")[-1] < 0.5 * logged(loose, "replay/kl")[-1]


def test_a_budget_holds_the_kl_behind_the_openings(tmp_path: Path, ragged: ReplayDataset) -> None:
    """Over micro-batches, and rows of any length; the objective itself is the mean over all tokens."""
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 6}
        replay_config = ReplayConfig(max_ref_kl=0.01, per_device_replay_batch_size=batch)
        trainer = train(tmp_path / str(batch), ragged, replay_config=replay_config, changes=changes)
        rest = logged(trainer, "replay/kl_rest")
        assert sum(trainer.budget.state_dict()["sums"]) == pytest.approx(sum(rest), rel=1e-5)
        assert rest[-1] != pytest.approx(logged(trainer, "replay/kl")[-1], rel=0.02)
        found.append(rest)
    assert found[0] == pytest.approx(found[1], rel=1e-2)
    assert "behind the first" in str(trainer.budget.verdict())


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_budget_is_where_it_was(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    settings = {"changes": {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}}
    whole, resumed = (
        budgeted(tmp_path, replay, 0.01, **settings, **adapter(lora, lora_dropout=0.1), resume=checkpoint)
        for checkpoint in (None, str(tmp_path / "checkpoint-4"))
    )
    assert resumed.budget is not None
    assert whole.budget is not None
    assert resumed.budget.state_dict() == whole.budget.state_dict()
    assert difference(weights(whole.model), weights(resumed.model)) == 0.0
