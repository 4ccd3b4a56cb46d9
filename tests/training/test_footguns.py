"""How protection goes wrong: what is refused, stopped or shown, beyond what each module's own tests do.

docs/footguns.md names every one of them.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import CHATML, make_model, make_texts, make_tokenizer, sample_rows, save_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model, preprocess_loraga
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from test_cli import write_rows
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
from transformers import Trainer
from trl import SFTTrainer

from retain import ReplayConfig, ReplaySFTTrainer, load_model, measure
from retain.cli.main import main
from retain.data.rows import row_text, tokenize_documents
from retain.losses import kl_divergence
from retain.models.reference import Reference, probe
from retain.replay.dataset import ReplayDataset, load_self_generated, replay_indices, token_documents
from retain.sampling.write import sample_replay
from retain.training.trainer_checks import check_base_is_frozen

IDS = torch.arange(5, 25).reshape(2, 10)
QV = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


# The base that isn't (pitfalls 1 and 2)


def corda(base: Any) -> Any:
    settings = LoraConfig(**QV, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    forward = lambda: [base(input_ids=row[None]) for row in IDS]  # noqa: E731
    preprocess_corda(base, settings, run_model=forward)
    return get_peft_model(base, settings)


def lora_ga(base: Any) -> Any:
    settings = LoraConfig(**QV, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, settings, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    return get_peft_model(base, settings)


def by_hand(base: Any, split: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A LoRA that begins with `split` of each weight, which the base then lacks: together they are the base."""
    model = get_peft_model(base, LoraConfig(**QV))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            whole = module.base_layer.weight.data
            u, s, v = torch.linalg.svd(split(whole), full_matrices=False)
            module.lora_A["default"].weight.data.copy_(s[:4].sqrt()[:, None] * v[:4])
            module.lora_B["default"].weight.data.copy_(u[:, :4] * s[:4].sqrt())
            whole.sub_(split(whole))
    return model


def minor_part(weight: torch.Tensor) -> torch.Tensor:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, -4:] * s[-4:] @ v[-4:]


def lost_by_8_bits(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return weight - (weight / scale).round() * scale


def milora(base: Any) -> Any:
    return by_hand(base, minor_part)


def loftq(base: Any) -> Any:
    return by_hand(base, lost_by_8_bits)


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")  # PEFT's LoRA-GA hooks the embedding
@pytest.mark.parametrize("make", [corda, lora_ga, milora, loftq], ids=lambda make: make.__name__)
def test_more_initialisations_that_rewrite_the_base_are_refused(
    tmp_path: Path, replay: ReplayDataset, make: Callable[[Any], Any]
) -> None:
    """CorDA and LoRA-GA are PEFT's; MiLoRA and LoftQ (which needs bitsandbytes and a GPU) are done by hand."""
    base = make_model()
    says, wrapped = probe(base), make(base)
    if make is not loftq:  # which keeps of the loss what fits into its rank
        assert float((probe(wrapped) - says).abs().max()) < 1e-4, "together they are the base"
    with pytest.raises(ValueError, match=r"replay_reference: 'adapter' is not the base .* use replay_reference copy"):
        Reference().prove(wrapped, says)
    off_policy = {"allow_off_policy_replay": True}  # the weights in memory are no longer those of the base
    with pytest.raises(ValueError, match=r"replay_reference: 'adapter' is not the base"):
        train(tmp_path / "a", replay, model=wrapped, replay_config=ReplayConfig(**off_policy))
    if make is lora_ga:  # whose hooks stay on the model; test_trainer.py has plainer ones
        by_copy = ReplayConfig(replay_reference="copy", **off_policy)
        trainer = train(tmp_path / "b", replay, model=make(make_model()), replay_config=by_copy)
        assert_kl_rises_from_zero(trainer, zero=1e-6)


ADAPTERS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"total_step": 10}, "BOFTConfig": {}, "DeloraConfig": {}, "GraloraConfig": {"r": 4},
    "HRAConfig": {}, "LNTuningConfig": {"target_modules": ["input_layernorm"]}, "LoHaConfig": {}, "LoKrConfig": {},
    "MissConfig": {"r": 4}, "OFTConfig": {}, "OSFConfig": {}, "PrefixTuningConfig": {}, "RandLoraConfig": {},
    "ShiraConfig": {"r": 4}, "TrainableTokensConfig": {}, "VeraConfig": {},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of what each thinks of a tiny model
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_every_kind_switched_off_are_the_base_while_they_move(name: str) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], **ADAPTERS[name]}
    if name == "PrefixTuningConfig":
        settings = {"num_virtual_tokens": 3}
    if name == "TrainableTokensConfig":
        settings = {"token_indices": [7, 9]}
    base = make_model()
    says, before = probe(base), base(input_ids=IDS).logits
    model = get_peft_model(base, getattr(peft, name)(task_type="CAUSAL_LM", **settings))
    check_base_is_frozen(model)
    Reference().prove(model, says)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=10.0)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((model.eval()(input_ids=IDS).logits - before).abs().max()) > 1e-3
    Reference().prove(model, says)


def test_a_finetuned_model_cannot_pass_for_its_base(tmp_path: Path, replay: ReplayDataset) -> None:
    """A checkpoint given by its name would pass for the base, and hide what was already forgotten."""
    save_model(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    rows = rows_of(model)
    train(tmp_path / "run", rows, model=model, changes={"max_steps": 2}).save_model(str(tmp_path / "tuned"))
    with pytest.raises(ValueError, match="sampled from 'tiny'.*allow_off_policy_replay"):
        train(tmp_path / "more", rows, model=load_model(str(tmp_path / "tuned")))


def test_a_loss_that_patches_the_forward_keeps_the_protection(tmp_path: Path, replay: ReplayDataset) -> None:
    """Pitfall 2: TRL's loss without logits does; the reference was taken before."""
    for adapter in (None, LoraConfig(**LORA)):
        trainer = train(tmp_path, replay, peft_config=adapter, changes={"max_steps": 2})
        assert "forward" in vars(trainer.model.get_base_model() if adapter else trainer.model)
        assert_kl_rises_from_zero(trainer)


# Replay that does not act


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_weights_that_do_not_move_stop_the_run(tmp_path: Path, replay: ReplayDataset, adapter: bool) -> None:
    """bf16 weights swallow the steps of a low rate; a KL of 0 would look like perfect protection."""
    lora = LoraConfig(**LORA, lora_dropout=0.1) if adapter else None
    changes = {"learning_rate": 1e-9 if not adapter else 1e-30, "max_steps": 4}
    with pytest.raises(ValueError, match="4 steps.*: either its weights do not move at this learning_rate and dtype"):
        train(tmp_path, replay, model=make_model().bfloat16(), peft_config=lora, changes=changes)


@pytest.mark.parametrize("noise", ["stored", "stored-lora", "dropout"])
def test_noise_does_not_hide_weights_that_do_not_move(tmp_path: Path, noise: str) -> None:
    """The KL of training was rounding of what was stored, or dropout's, never 0, and the run looked protected."""
    lora = LoraConfig(**LORA) if noise == "stored-lora" else None
    if noise == "dropout":
        base = make_model("gpt2").bfloat16()  # its configuration's own dropout of a tenth
        rows = rows_of(base)
    else:
        base = make_model().bfloat16()
        stored = {"num_rows": 8, "max_length": 24, "store_reference": "hidden"}
        rows = load_self_generated(sample_replay(base, TOKENIZER, tmp_path / "rows", **stored))
    changes = {"learning_rate": 1e-30, "max_steps": 4}
    with pytest.raises(ValueError, match="4 steps.*: either its weights do not move at this learning_rate and dtype"):
        train(tmp_path / "run", rows, base, peft_config=lora, changes=changes)


def test_a_learning_rate_too_high_for_any_replay_breaks_its_budget(tmp_path: Path, replay: ReplayDataset) -> None:
    settings = ReplayConfig(max_ref_kl=0.001, replay_coef=500.0, per_device_replay_batch_size=4)
    changes = {"max_steps": 15, "learning_rate": 0.3}
    trainer = train(tmp_path, replay, replay_config=settings, changes=changes)
    verdict = trainer.budget.verdict()
    assert not verdict.kept
    assert "its upper bound: this model has no room for both; raise the budget, lower the learning rate" in str(verdict)


@pytest.mark.parametrize("noise", ["dropout", "NEFTune"])
def test_a_budget_is_not_held_against_noise_of_the_forward_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, noise: str
) -> None:
    """A coefficient of a thousand came of it, and "no room for both"; without the noise the budget was kept."""
    drop = 0.1 if noise == "dropout" else 0.0
    dropout = {"attn_pdrop": drop, "resid_pdrop": drop, "embd_pdrop": drop}
    changes = {} if drop else {"neftune_noise_alpha": 15.0}
    rows = rows_of(make_model("gpt2").eval())
    settings = ReplayConfig(max_ref_kl=0.002, per_device_replay_batch_size=4)
    with pytest.raises(ValueError, match="max_ref_kl: 0.002, but before the first step the KL is 0.*remove the cause"):
        train(tmp_path, rows, make_model("gpt2", **dropout), replay_config=settings, changes=changes)
    train(tmp_path, rows, make_model("gpt2", **dropout), changes=changes)
    assert "replay/kl: before the first step the KL is 0." in caplog.text
    if not drop:
        caplog.clear()
        train(tmp_path, rows, make_model("gpt2", **dropout), replay_config=settings)
        assert "before the first step" not in caplog.text


def out_of_memory_above(rows: int, after: int, trainer: Any) -> None:
    """Let losses of larger batches fail, `after` this many."""
    ours, losses = trainer.compute_loss, []

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        losses.append(len(inputs["input_ids"]))
        if losses[-1] > rows and len(losses) > after:
            raise RuntimeError("CUDA out of memory.")
        return ours(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("objective", ["kl", "replace"])
def test_a_batch_that_is_made_smaller_on_the_way_is_protected_as_a_smaller_one(
    tmp_path: Path, replay: ReplayDataset, objective: str
) -> None:
    """`auto_find_batch_size`: the share was of the batch that did not fit, and a budget went on from the failed try."""
    budget = {"max_ref_kl": 0.02} if objective == "kl" else {"replay_share": 0.5}
    trainer = ReplaySFTTrainer(
        model=make_model(),
        args=config(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, max_steps=5),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        replay_dataset=replay,
        replay_config=ReplayConfig(replay_objective=objective, **budget),  # type: ignore[arg-type]
    )
    before = trainer.replay_batch_size
    out_of_memory_above(15, 2, trainer)
    trainer.train()
    assert trainer._train_batch_size == 14
    assert (before, trainer.replay_batch_size) == ((8, 7) if objective == "replace" else (2, 1))
    if objective == "kl":
        assert trainer.budget.step == trainer.budget.num_steps == 5


def protection(folder: Path, replay: ReplayDataset, max_steps: int = 3, **kwargs: Any) -> list[str]:
    """What is said before a run."""
    rows = {"train_dataset": ROWS, "replay_dataset": replay, "processing_class": TOKENIZER} | kwargs
    return ReplaySFTTrainer(model=make_model(), args=config(folder, max_steps=max_steps), **rows).protection()


@pytest.mark.parametrize("start", ["", "<s>"])
def test_training_rows_without_the_document_start_are_said(tmp_path: Path, replay: ReplayDataset, start: str) -> None:
    rows = Dataset.from_dict({"text": [start + text for text in make_texts(8, seed=4)]})
    lines = [
        line
        for line in protection(tmp_path, replay, train_dataset=rows)
        if "do not open with the document start" in line
    ]
    assert bool(lines) == (not start)


def test_rows_of_the_new_task_as_replay_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """KL on them is `kl_new` at best: it holds back what is to be learned, and was called protection."""
    texts, other = make_texts(8, seed=4, words=8), make_texts(8, seed=14, words=8)
    for given, shown in (
        ([*texts, *other[:4]], ["replay_dataset: 8 of 12 rows are rows of the new task"]),
        (other, []),
    ):
        caplog.clear()
        (file := tmp_path / "replay.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
        with caplog.at_level("WARNING", "retain"):
            train(
                tmp_path, str(file), train_dataset=Dataset.from_dict({"text": texts}), replay_config=ReplayConfig(),
                changes={"max_steps": 2},
            )  # fmt: skip
        assert [line.split(": they")[0] for line in caplog.messages if "new task" in line] == shown


def test_a_pool_that_is_far_too_small_shows_on_other_text(tmp_path: Path, replay: ReplayDataset) -> None:
    """Two rows are learned by heart: their KL is low, and that of other rows of the same base is not."""
    held_out = [row.tolist() for row in sample_rows(make_model(), 3, range(100, 108), 24, seed=5).numpy()]
    trainer = train(
        tmp_path,
        ReplayDataset.from_rows([replay[0], replay[1]], "two"),
        replay_config=ReplayConfig(replay_coef=20.0, per_device_replay_batch_size=2),
        retention_datasets={"own": token_documents(held_out, TOKENIZER)},
        changes={"max_steps": 12},
    )
    elsewhere = trainer.evaluate_retention()["retention/own/ref_kl"]
    assert elsewhere > 3 * logged(trainer, "replay/kl")[-1]


def test_a_coefficient_means_something_else_with_another_estimator() -> None:
    """Pitfall 8: the same two models, the same rows, three terms that are all called KL: their gradients."""
    base, ids = make_model(), torch.tensor(sample_rows(make_model(), 3, range(8), 24, seed=5).numpy()).long()
    with torch.no_grad():
        ref_logits = base(ids).logits[:, :-1]
    moved = make_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in moved.parameters():
            value += 0.05 * value.std() * torch.randn_like(value) if value.ndim == 2 else 0.0

    def k1(logits: torch.Tensor) -> torch.Tensor:
        """−log p_θ(drawn token): what sampled estimators of the forward KL come to; its gradient is that of NTP."""
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    terms = {
        "ours": lambda logits: kl_divergence(ref_logits, logits).mean(),
        "summed over tokens": lambda logits: kl_divergence(ref_logits, logits).sum(),
        "sampled": lambda logits: k1(logits).mean(),
    }
    size = {}
    for name, term in terms.items():
        moved.zero_grad()
        term(moved(ids).logits[:, :-1]).backward()
        size[name] = float(torch.cat([value.grad.flatten() for value in moved.parameters()]).norm())
    assert size["summed over tokens"] == pytest.approx(8 * 23 * size["ours"], rel=1e-4)
    assert size["sampled"] > 1.5 * size["ours"]


# Rows and seeds


def test_packed_documents_do_not_see_each_other(tmp_path: Path) -> None:
    """Pitfall 16: TRL's best-fit packing, as the trainer calls the model: each document's predictions are its own."""
    settings = config(tmp_path, packing=True, packing_strategy="bfd", max_length=64)
    host = SFTTrainer(make_model(), settings, train_dataset=ROWS, processing_class=TOKENIZER)
    batch = next(iter(host.get_train_dataloader()))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 3
    model = make_model()
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits
        for start, end in itertools.pairwise(starts):
            alone = model(input_ids=batch["input_ids"][:, start:end]).logits
            torch.testing.assert_close(whole[:, start:end], alone, rtol=0, atol=1e-4)


def test_the_adapter_begins_with_the_seed_of_the_run(tmp_path: Path, replay: ReplayDataset) -> None:
    """Pitfall 21: not with the random state that it finds."""
    rows: dict[str, Any] = {"train_dataset": ROWS, "processing_class": TOKENIZER, "replay_dataset": replay}

    def begun(ambient: int) -> dict[str, torch.Tensor]:
        model = make_model()
        torch.manual_seed(ambient)
        return weights(ReplaySFTTrainer(model, config(tmp_path, seed=7), peft_config=LoraConfig(**LORA), **rows).model)

    assert difference(begun(1), begun(99)) == 0.0


# Stopped


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """A job that a shell starts in the background ignores SIGINT, and so would this test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("budget", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_full_finetuning_stops_at_ctrl_c_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: bool
) -> None:
    """As tests/kill/test_stop.py does it with an adapter."""
    save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "new.jsonl", seed=1)
    command = f"finetune --model {tmp_path}/model --dataset_name {rows} --replay_dataset {tmp_path}/replay"
    command += " --max_steps 5 --save_steps 2 --save_total_limit 1 --per_device_train_batch_size 2 --max_length 24"
    command += " --use_cpu true --bf16 false --report_to none --gradient_checkpointing false --eval_strategy no"
    command += " --max_ref_kl 0.01" if budget else ""
    sample = f"sample --model {tmp_path}/model --output_dir {tmp_path}/replay --num_rows 6 --max_length 16"
    assert main(sample.split()) == 0
    assert main([*command.split(), "--output_dir", str(tmp_path / "whole")]) == 0
    training_step = ReplaySFTTrainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return loss

    broken = [*command.split(), "--output_dir", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        patch.setattr(ReplaySFTTrainer, "training_step", stop)
        assert main(broken) == 130
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    assert main([*broken, "--resume_from_checkpoint", "true"]) == 0
    for name in ("model.safetensors", *(["budget.json"] if budget else [])):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# A model that a trainer had before: TRL patches its forward, and a deep copy would still run the model itself


def trained_before(folder: Path) -> Any:
    host = SFTTrainer(make_model(), config(folder, max_steps=1), train_dataset=ROWS, processing_class=TOKENIZER)
    host.train()
    assert "forward" in vars(host.model)
    return host.model


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_model_that_was_in_a_trainer_before_has_a_copy_of_its_own(
    tmp_path: Path, replay: ReplayDataset, adapter: bool
) -> None:
    settings = ReplayConfig(replay_coef=2.0, replay_reference="copy", allow_off_policy_replay=True)
    peft: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    peft["changes"] = {"max_steps": 2}
    trainer = train(tmp_path, replay, model=trained_before(tmp_path), replay_config=settings, **peft)
    assert_kl_rises_from_zero(trainer)


def test_forgetting_of_a_model_that_was_in_a_trainer_before_is_measured(tmp_path: Path) -> None:
    """It was exactly 0."""
    texts, model = {"words": make_texts(4, seed=9)}, trained_before(tmp_path)
    plain = ReplayConfig(replay_coef=0.0)
    trainer = train(tmp_path, None, model=model, replay_config=plain, retention_datasets=texts)
    assert trainer.evaluate_retention()["retention/words/ref_kl"] > 1e-4
    with pytest.raises(ValueError, match="base: its forward pass runs the tuned model"):
        measure(copy.deepcopy(model), model, texts, tokenizer=TOKENIZER, max_length=20)


@pytest.mark.parametrize("how", ["full", "merged"])
def test_a_model_that_was_trained_in_place_is_not_its_own_base(tmp_path: Path, how: str) -> None:
    """`measure(model, trainer.model)` compared an object with itself: no change was shown."""
    texts, model = {"words": make_texts(4, seed=9)}, make_model()
    peft: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if how == "merged" else {}
    tuned = train(tmp_path, None, model=model, replay_config=ReplayConfig(replay_coef=0.0), **peft).model
    tuned = tuned.merge_and_unload() if how == "merged" else tuned
    with pytest.raises(ValueError, match="base: its forward pass runs the tuned model.*load the base again"):
        measure(model, tuned, texts, tokenizer=TOKENIZER, max_length=20)
    report = measure(make_model(), tuned, texts, tokenizer=TOKENIZER, max_length=20)
    assert report.data["retention"]["words"]["ref_kl"]["value"] > 1e-5


def test_a_copy_that_still_runs_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retain.models.reference.runs_through", lambda copied, model: True)
    with pytest.raises(ValueError, match="a copy of this model still runs the model itself; load it again"):
        Reference.copy_of(make_model())


# Hosts that pass by


def host(kind: str) -> type:
    class Quiet(ReplaySFTTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            model.eval()  # to be rid of dropout, say
            return super().compute_loss(model, *args, **kwargs)

    class Past(ReplaySFTTrainer):
        def get_batch_samples(self, *args: Any) -> Any:
            return Trainer.get_batch_samples(self, *args)

    class Own(ReplaySFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Alone(Past, Own):
        pass

    return {"quiet": Quiet, "past": Past, "own": Own, "alone": Alone}[kind]


PASSED_BY = [
    ("quiet", "kl"),
    ("quiet", "ntp"),
    ("past", "kl"),
    ("past", "replace"),
    ("own", "kl"),
    ("own", "ntp"),
    ("alone", "replace"),
]


@pytest.mark.parametrize(("kind", "objective"), PASSED_BY)
def test_a_host_that_makes_its_step_without_replay_stops(
    tmp_path: Path, replay: ReplayDataset, kind: str, objective: str
) -> None:
    settings = ReplayConfig(replay_objective=objective, replay_share=0.5)
    with pytest.raises(ValueError, match="made step 1 without it, so nothing protects the|no rows were drawn; nothing"):
        train(tmp_path, replay, trainer_class=host(kind), replay_config=settings)


@pytest.mark.parametrize("objective", ["kl", "ntp"])
def test_a_step_whose_rows_predict_nothing_adds_nothing(tmp_path: Path, replay: ReplayDataset, objective: str) -> None:
    """Rows of one token (an own row that ended at once) beside others."""
    cut = [replay[at][:1] if at % 2 else replay[at] for at in range(len(replay))]
    rows = ReplayDataset.from_rows(cut, "own", replay.manifest)
    settings = ReplayConfig(replay_objective=objective, per_device_replay_batch_size=1)
    trainer = train(tmp_path, rows, replay_config=settings, changes={"max_steps": 8, "logging_steps": 1})
    losses = logged(trainer, "replay/loss")
    drawn = [len(rows[int(replay_indices(step, 1, len(rows), trainer.args.seed)[0])]) for step in range(8)]
    assert {length == 1 for length in drawn} == {True, False}
    assert [loss == 0 for loss in losses[1:]] == [length == 1 for length in drawn[1:]]


def test_a_reference_that_moves_is_seen_through_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout makes the KL to a reference that moves along positive; without it, they say the same."""
    noisy = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    rows = rows_of(make_model("gpt2", **noisy))
    honest = train(tmp_path, rows, model=make_model("gpt2", **noisy))
    assert logged(honest, "replay/kl")[0] > 1e-3
    monkeypatch.setattr(Reference, "copy_of", classmethod(lambda cls, model: cls(model)))
    with pytest.raises(ValueError, match="the reference changes with the model"):
        train(tmp_path, rows, model=make_model("gpt2", **noisy))


def test_one_step_is_not_called_protected(tmp_path: Path, replay: ReplayDataset) -> None:
    """As above: KL has no gradient there; that of the next token has."""
    for objective, says in (("kl", "protection: none (a run of one step"), ("ntp", "protection: ntp, coefficient 1")):
        settings = ReplayConfig(replay_objective=objective)  # type: ignore[arg-type]
        assert protection(tmp_path, replay, max_steps=1, replay_config=settings)[0].startswith(says)


def test_settings_that_are_not_used_are_said(tmp_path: Path, replay: ReplayDataset) -> None:
    def lines(**settings: Any) -> list[str]:
        return protection(tmp_path, replay, replay_config=ReplayConfig(**settings))

    line, rows, *_ = lines(replay_objective="replace", replay_share=0.5, per_device_replay_batch_size=7)
    assert line.startswith("protection: replace, share 0.5 of each batch (per_device_replay_batch_size 7 is not used")
    assert "coefficient" not in line
    assert "2 per device" in rows
    assert lines(replay_objective="kl_new")[1] == "replay: 20 rows given, and not used by replay_objective kl_new"
    assert lines(replay_coef=0.0) == ["protection: none (replay_coef 0)", "replay: 20 rows given, and not used"]


@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_trained_tokens_that_no_replay_row_holds_are_named(tmp_path: Path, replay: ReplayDataset, stored: bool) -> None:
    if stored:
        made = {"num_rows": 4, "max_length": 12, "store_reference": "hidden"}
        replay = load_self_generated(sample_replay(make_model(), TOKENIZER, tmp_path / "rows", **made))
    absent = sorted(set(range(10, 60)) - set(replay.tokens.tolist()))[:2] or [5]
    rows = ReplayDataset.from_rows([[3, 6, 7]] * 4, "few") if absent == [5] else replay
    tokens = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=absent)
    with pytest.raises(
        ValueError,
        match="0 up to rounding and dropout after 4 steps.*or only tokens that no replay row holds are trained",
    ):
        train(
            tmp_path / "run", rows, make_model(tie_word_embeddings=False), peft_config=tokens, changes={"max_steps": 4}
        )


def test_one_row_that_holds_a_trained_token_is_enough(tmp_path: Path) -> None:
    """The rows by which stored predictions are proven hold none, and the KL is noise in all steps but a few."""
    made = {"num_rows": 12, "max_length": 12, "store_reference": "hidden"}
    rows = load_self_generated(sample_replay(make_model(), TOKENIZER, tmp_path / "rows", **made))
    few = set(rows[11][1:-1].tolist()) - {token for at in range(11) for token in rows[at].tolist()}
    assert few
    tokens = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=sorted(few))
    data = Dataset.from_list([{"input_ids": [*few, *few]}] * 16)
    model = make_model(tie_word_embeddings=False)
    train(tmp_path / "run", rows, model, peft_config=tokens, train_dataset=data, changes={"max_steps": 4})


# Flags on which torch, TRL or PEFT would stumble, late or not at all


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_model(folder / "model")
    write_rows(folder / "new.jsonl", seed=1)
    sample = f"sample --model {folder}/model --output_dir {folder}/replay --num_rows 6 --max_length 16"
    assert main(sample.split()) == 0
    return folder


BAD_FLAGS = {
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps: 0 does not fit",
    "--per_device_train_batch_size 0": "per_device_train_batch_size: 0 does not fit",
    "--max_length 1": "max_length: 1 does not fit; use a whole number of at least 2",
    "--neftune_noise_alpha -1": "neftune_noise_alpha: -1.0 does not fit",
    "--weight_decay nan": "weight_decay: nan does not fit",
    "--learning_rate -1": "learning_rate: -1.0 does not fit",
    "--replay_dataset self --seed -1": "seed: -1 does not fit; use a whole number from 0",
    "--replay_dataset self --use_peft --lora_r 0": "lora_r: 0 does not fit; use a whole number of at least 1",
    "--replay_dataset self --replay_objective replace --packing": "replay_objective: 'replace' needs padded batches",
    "--replay_every 99 --replay_dataset self": "replay_every: 99 of 3 steps is the first one only",
    "--replay_dataset self --use_peft --lora_target_modules a b": "lora_target_modules: 'a, b' is no module",
    "--replay_dataset self --use_peft --lora_target_modules q_proj": "'q_proj' is no module of this model; use '.*q",
}


def finetune(small: Path, output: Path, *more: str) -> list[str]:
    command = f"finetune --model {small}/model --dataset_name {small}/new.jsonl --output_dir {output}"
    command += f" --replay_dataset {small}/replay --max_steps 3 --max_length 24 --use_cpu true --bf16 false"
    command += " --report_to none --gradient_checkpointing false --per_device_train_batch_size 2 --logging_steps 1"
    return [*command.split(), *more]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_flag_that_cannot_work_is_named_before_anything_is_written(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    assert main(finetune(small, tmp_path / "out", *flags.split())) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD_FLAGS[flags] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("--max_steps", "1")], ids=["checkpoint", "end"])
def test_a_model_of_nan_is_never_written(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    flags = ["--learning_rate", "1e38", "--lr_scheduler_type", "constant", "--save_steps", "1"]
    flags += ["--optim", "adamw_torch_fused"]
    assert main(finetune(small, tmp_path / "out", *flags, *more)) == 1
    assert "model: some weights are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_manifest_cannot_write_to_the_terminal(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small / "replay", tmp_path / "replay")
    manifest = tmp_path / "replay" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": "tiny\x1b]0;owned\x07\nforged"}))
    assert main(finetune(small, tmp_path / "out", "--replay_dataset", str(tmp_path / "replay"))) == 0
    output = capsys.readouterr().out
    assert "self-generated by tiny\\x1b]0;owned\\x07\\nforged" in output
    assert "\x1b" not in output


def test_a_template_that_writes_the_start_token_does_not_double_it() -> None:
    """Pitfall 15: as the templates of Llama 3 and Gemma do."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    text = row_text({"messages": messages}, tokenizer)
    (document,) = tokenize_documents([text], tokenizer, 3, 64)
    assert document.windows[0] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert document.windows[0][:2] == [3, 1]
