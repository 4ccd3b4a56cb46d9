"""Predictions stored while sampling: what they keep, and training from them instead of from a second model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_texts, save_model
from peft import LoraConfig
from test_cli import TRAIN, write_rows
from test_trainer import Unscaled, budgeted
from training_runs import (
    LORA,
    ROWS,
    TOKENIZER,
    assert_kl_rises_from_zero,
    config,
    difference,
    logged,
    train,
    weights,
)

from retain import ReplayConfig, ReplaySFTTrainer
from retain.cli.main import main
from retain.measuring.tokens import logits_at
from retain.models.reference import Reference
from retain.replay.dataset import ReplayDataset, load_self_generated, shard_path
from retain.replay.stored_predictions import TOP_K, cache_path
from retain.sampling import write
from retain.sampling.engine import draw_rows
from retain.sampling.starts import Mode, Starts
from retain.sampling.write import default_store, sample_replay

KINDS = ("hidden", "topk")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReplayDataset]:
    """The same twenty rows, with each kind of predictions stored."""
    folder = tmp_path_factory.mktemp("stored")
    for kind in KINDS:
        sample(folder / kind, kind)
    return {kind: load_self_generated(folder / kind) for kind in KINDS}


def sample(folder: Path, kind: str | None, **changes: Any) -> Path:
    settings: dict[str, Any] = {"num_rows": 20, "max_length": 24, "seed": 5, "rows_per_shard": 8, "batch_size": 4}
    return sample_replay(make_model(), TOKENIZER, folder, store_reference=kind, **{**settings, **changes})


def exact(rows: ReplayDataset, indices: list[int], model: Any = None) -> torch.Tensor:
    """log p of the model on the drawn tokens of these rows, by one full forward."""
    batch = rows.batch(indices)
    mask = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        return torch.log_softmax(logits_at(model or make_model(), batch)[:, :-1][mask], -1)


def test_stored_hidden_states_give_the_whole_distribution(datasets: dict[str, ReplayDataset]) -> None:
    rows, indices = datasets["hidden"], [11, 3, 19]  # of three shards, out of order
    assert rows.cache is not None
    stored = rows.cache.batch(indices)["hidden"]
    found = torch.log_softmax(stored @ make_model().get_output_embeddings().weight.T, -1)
    torch.testing.assert_close(found, exact(rows, indices), rtol=0, atol=2e-5)


def test_stored_topk_is_the_head_of_the_distribution(datasets: dict[str, ReplayDataset]) -> None:
    rows, indices = datasets["topk"], [0, 8, 9]
    assert rows.cache is not None
    stored = rows.cache.batch(indices)
    wanted = exact(rows, indices).topk(TOP_K)
    torch.testing.assert_close(stored["log_probs"], wanted.values, rtol=0, atol=2e-5)
    assert float((stored["tokens"] == wanted.indices).float().mean()) > 0.99  # all but ties


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beginnings_of_different_lengths_keep_their_predictions_apart(architecture: str) -> None:
    model = make_model(architecture)
    prefixes = [[3], [3, 9, 10, 11], [3, 7]]
    drawn = draw_rows(model, prefixes, range(3), 12, 0, store="hidden")
    rows = ReplayDataset.from_rows(list(drawn.tokens), "x", None, drawn.prefix_lengths)
    assert len(drawn.reference["hidden"]) == rows.num_predictions.sum() == 11 + 8 + 10
    with torch.no_grad():
        found = torch.log_softmax(model.get_output_embeddings()(drawn.reference["hidden"]), -1)
    torch.testing.assert_close(found, exact(rows, [0, 1, 2], model), rtol=0, atol=5e-5)


def test_storing_does_not_change_the_rows(datasets: dict[str, ReplayDataset], tmp_path: Path) -> None:
    plain = load_self_generated(sample(tmp_path / "plain", None))
    assert plain.cache is None
    for kind in KINDS:
        np.testing.assert_array_equal(plain.tokens, datasets[kind].tokens)


def test_a_resumed_job_stores_what_a_single_one_does(datasets: dict[str, ReplayDataset], tmp_path: Path) -> None:
    folder = sample(tmp_path / "resumed", "hidden")
    (folder / "shard-00001.parquet").unlink()
    cache_path(folder, 1).write_bytes(b"torn")  # written before its shard, and the shard never was
    sample(folder, "hidden")
    for shard in range(3):
        assert cache_path(folder, shard).read_bytes() == cache_path(Path(datasets["hidden"].source), shard).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_finished_rows_get_predictions_later(datasets: dict[str, ReplayDataset], tmp_path: Path, kind: str) -> None:
    folder = sample(tmp_path / "rows", None)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sampler"]["engine"] = "vllm"  # which hands out none
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "shard-00001.parquet").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=f"holds rows with .* not '{kind}'|holds rows with sampler"):
        sample(folder, kind)  # unfinished
    (tmp_path / "away").rename(folder / "shard-00001.parquet")
    cache_path(folder, 1).write_bytes(cache_path(Path(datasets[kind].source), 1).read_bytes())
    before = cache_path(folder, 1).stat().st_mtime_ns  # of a pass that was killed
    other = next(one for one in KINDS if one != kind)
    cache_path(folder, 2).write_bytes(cache_path(Path(datasets[other].source), 2).read_bytes())  # of one before it
    sample(folder, kind, batch_size=None)
    assert cache_path(folder, 1).stat().st_mtime_ns == before
    rows = load_self_generated(folder)
    assert rows.cache is not None
    assert rows.manifest is not None
    assert rows.manifest == manifest | {"store_reference": kind, "created": rows.manifest["created"]}
    for name, stored in datasets[kind].cache.batch(range(20)).items():  # type: ignore[union-attr]
        found = rows.cache.batch(range(20))[name]
        if name == "tokens":
            assert float((found == stored).float().mean()) > 0.99  # all but ties
        else:
            torch.testing.assert_close(found, stored, rtol=0, atol=2e-5)
    sample(folder, kind)  # again: nothing is left to do
    with pytest.raises(ValueError, match=f"store_reference '{kind}', not '{other}'"):
        sample(folder, other)


def test_predictions_come_later_behind_beginnings_of_any_length(tmp_path: Path) -> None:
    starts = Starts((Mode("document", 1.0, [[3], [3, 9, 10, 11]]),))
    drawn = load_self_generated(sample(tmp_path / "drawn", "hidden", starts=starts))
    later = sample(tmp_path / "later", None, starts=starts)
    rows = load_self_generated(sample(later, "hidden", starts=starts))
    assert len(set(rows.prefix_lengths.tolist())) == 2
    found, stored = (one.cache.batch(range(20))["hidden"] for one in (rows, drawn))  # type: ignore[union-attr]
    torch.testing.assert_close(found, stored, rtol=0, atol=2e-5)


def test_another_kind_of_storage_is_another_dataset(tmp_path: Path) -> None:
    folder = sample(tmp_path / "rows", "topk")
    with pytest.raises(ValueError, match="store_reference 'topk', not 'hidden'"):
        sample(folder, "hidden")


# Where nobody says what to store


def test_hidden_states_are_stored_by_default_where_they_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, pool = make_model(), {"num_rows": 20, "max_length": 24}
    assert default_store(model, tmp_path, **pool) == "hidden"
    assert default_store(model, tmp_path, **pool, wanted=False) is None
    monkeypatch.setattr(write, "MAX_STORE_BYTES", 20 * 24 * 32 * 4)
    assert default_store(model, tmp_path, **pool) == "hidden"
    assert not caplog.records
    assert default_store(model, tmp_path, num_rows=21, max_length=24) is None
    assert "they would take 0.0 GB; use --store_reference hidden to store them anyway" in caplog.text


def test_no_default_store_where_hidden_states_do_not_give_the_predictions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits**3)
    assert default_store(model, tmp_path, num_rows=2, max_length=16) is None
    assert "output head is not plain" in caplog.text


@pytest.mark.parametrize("kind", [None, "topk"])
def test_a_dataset_is_finished_with_the_store_that_began_it(tmp_path: Path, kind: str | None) -> None:
    """As those are that were begun when nothing was stored by default."""
    folder = sample(tmp_path / "rows", kind)
    pool = {"num_rows": 20, "max_length": 24}
    assert default_store(make_model(), folder, **pool) == default_store(None, folder, **pool, wanted=False) == kind


# Training from it


SGD = {"optim": "sgd", "learning_rate": 0.3}  # Adam makes whole steps of rounding where a gradient is nothing else


def run(folder: Path, rows: ReplayDataset, reference: str, **changes: Any) -> ReplaySFTTrainer:
    settings = ReplayConfig(replay_coef=2.0, per_device_replay_batch_size=4, replay_reference=reference)  # type: ignore[arg-type]
    trainer: ReplaySFTTrainer = train(folder, rows, replay_config=settings, **changes)
    return trainer


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_training_from_hidden_states_is_training_with_the_base(
    datasets: dict[str, ReplayDataset], tmp_path: Path, adapter: bool
) -> None:
    peft = {"peft_config": LoraConfig(**LORA, exclude_modules=["lm_head"])} if adapter else {}
    live = run(tmp_path / "a", datasets["hidden"], "adapter" if adapter else "copy", changes=SGD, **peft)
    stored = run(tmp_path / "b", datasets["hidden"], "auto", changes=SGD, **peft)
    assert stored.replay.reference_kind == "cache (hidden)"
    assert logged(stored, "replay/kl") == pytest.approx(logged(live, "replay/kl"), rel=1e-3, abs=1e-6)
    assert logged(stored, "replay/kl")[-1] > 1e-3
    assert difference(weights(live.model), weights(stored.model)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_retention_beside_stored_predictions_is_measured_in_mixed_precision(
    datasets: dict[str, ReplayDataset], tmp_path: Path, kind: str
) -> None:
    """The states were made in autocast and held against a probe in float32: refused as not the base."""
    texts = {"words": make_texts(3, seed=9)}
    trainer = run(tmp_path, datasets[kind], "auto", changes={"bf16": True}, retention_datasets=texts)
    assert trainer.replay.reference_kind == f"cache ({kind})"
    assert trainer.evaluate_retention()["retention/words/ref_kl"] > 1e-3


def test_training_from_topk_is_near_training_with_the_base(datasets: dict[str, ReplayDataset], tmp_path: Path) -> None:
    live, stored = (run(tmp_path / name, datasets["topk"], name, changes=SGD) for name in ("copy", "cache"))
    kl, of_topk = (logged(trainer, "replay/kl")[-1] for trainer in (live, stored))
    assert 0 < of_topk < kl  # the shape of the rest is lost, never gained
    plain = train(tmp_path / "plain", None, replay_config=ReplayConfig(replay_coef=0.0), changes=SGD)
    of_reference, of_protection = (difference(weights(live.model), weights(other.model)) for other in (stored, plain))
    assert of_reference < 0.8 * of_protection  # a random model's 64 likeliest of 320 tokens are not much of it


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("scaled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing_with_stored_predictions(
    datasets: dict[str, ReplayDataset], tmp_path: Path, adapter: bool, scaled: bool
) -> None:
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        settings: dict[str, Any] = {"trainer_class": ReplaySFTTrainer if scaled else Unscaled, **of_lora(adapter, 0.0)}
        settings["replay_config"] = ReplayConfig(replay_coef=2.0, per_device_replay_batch_size=batch)
        trainer = train(tmp_path, datasets["hidden"], changes={**SGD, **changes}, **settings)
        assert trainer.replay.reference_kind == "cache (hidden)"
        found.append(weights(trainer.model))
    assert difference(*found) < 2e-6


def of_lora(adapter: bool, dropout: float = 0.1) -> dict[str, Any]:
    return {"peft_config": LoraConfig(**LORA, lora_dropout=dropout)} if adapter else {}


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_checkpointing_changes_nothing_with_stored_predictions(
    datasets: dict[str, ReplayDataset], tmp_path: Path, adapter: bool
) -> None:
    found = []
    for on in (False, True):
        changes = {"gradient_checkpointing": on, "max_steps": 3}
        found.append(run(tmp_path, datasets["hidden"], "cache", changes=changes, **of_lora(adapter)))
    assert logged(found[0], "replay/kl")[-1] > 1e-4
    assert difference(*(weights(trainer.model) for trainer in found)) == 0.0


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [("bf16", False), *(pytest.param(*more, marks=pytest.mark.slow)
                        for more in (("bf16", True), ("fp16", False), ("fp16", True)))],
)  # fmt: skip
def test_half_precision_from_stored_predictions_is_near_training_with_the_base(
    datasets: dict[str, ReplayDataset], tmp_path: Path, dtype: str, adapter: bool
) -> None:
    """Stored in float32, compared with predictions under autocast: off by the noise of bf16, and no more."""
    changes = {dtype: True, **SGD}
    live_kind = "adapter" if adapter else "copy"
    live = run(tmp_path, datasets["hidden"], live_kind, changes=changes, **of_lora(adapter, 0.0))
    stored = run(tmp_path, datasets["hidden"], "cache", changes=changes, **of_lora(adapter, 0.0))
    plain = train(tmp_path, None, replay_config=ReplayConfig(replay_coef=0.0), changes=changes, **of_lora(adapter, 0.0))
    assert logged(stored, "replay/kl")[0] < 1e-4
    assert logged(stored, "replay/kl")[-1] == pytest.approx(logged(live, "replay/kl")[-1], rel=0.1)
    of_reference, of_protection = (difference(weights(live.model), weights(other.model)) for other in (stored, plain))
    assert of_reference < 0.1 * of_protection


@pytest.mark.parametrize("kind", KINDS)
def test_stored_predictions_in_bfloat16_weights(datasets: dict[str, ReplayDataset], tmp_path: Path, kind: str) -> None:
    trainer = run(tmp_path, datasets[kind], "cache", model=make_model().bfloat16(), changes={"max_steps": 3})
    kl = logged(trainer, "replay/kl")
    assert kl[0] < 1e-4
    assert kl[-1] > 10 * kl[0]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_resumed_budget_with_stored_predictions_goes_on_where_it_was(
    datasets: dict[str, ReplayDataset], tmp_path: Path, adapter: bool
) -> None:
    settings = {"changes": {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}, **of_lora(adapter)}
    whole = budgeted(tmp_path, datasets["hidden"], 0.01, **settings)
    resumed = budgeted(tmp_path, datasets["hidden"], 0.01, **settings, resume=str(tmp_path / "checkpoint-5"))
    assert resumed.replay.reference_kind == "cache (hidden)"
    assert resumed.budget.state_dict() == whole.budget.state_dict()  # type: ignore[union-attr]
    assert difference(weights(whole.model), weights(resumed.model)) == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's
@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_changes_nothing_with_stored_predictions(
    datasets: dict[str, ReplayDataset], tmp_path: Path, kind: str
) -> None:
    plain, compiled = (
        run(tmp_path, datasets[kind], "cache", changes={**SGD, "max_steps": 4, "torch_compile": on})
        for on in (False, True)
    )
    assert logged(compiled, "replay/kl") == pytest.approx(logged(plain, "replay/kl"), rel=1e-4, abs=1e-6)
    assert difference(weights(plain.model), weights(compiled.model)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_full_finetuning_keeps_no_second_model_and_asks_no_base(
    datasets: dict[str, ReplayDataset], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reference, "copy_of", lambda model: pytest.fail("a copy was made"))
    model, passes = make_model(), []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    trainer = run(tmp_path, datasets[kind], "cache", model=model, changes={"max_steps": 3})
    assert trainer.replay.reference is None
    # Sees it ahead; as it came and as it is trained, finding the head, proving the three shards, one pass against two.
    before = 1 + 2 + 1 + 3 + 3
    assert len(passes) == before + 2 + 1 + 1  # the first step's rows apart, then together


@pytest.mark.parametrize("kind", KINDS)
def test_retention_is_measured_without_a_second_model(
    datasets: dict[str, ReplayDataset], tmp_path: Path, kind: str
) -> None:
    texts = {"old": make_texts(5, seed=9)}
    changes = {"retention_datasets": texts, "changes": {"max_steps": 3}}
    live = run(tmp_path / "live", datasets[kind], "copy", **changes)
    stored = run(tmp_path / "stored", datasets[kind], "cache", **changes)
    assert stored.replay.reference is not None
    memory = sum(value.numel() for value in stored.replay.reference.ref_model.buffers())  # type: ignore[union-attr]
    assert memory == stored.model.get_output_embeddings().weight.numel()
    # The same model against the copy and against what is remembered of the base:
    live.model.load_state_dict(stored.model.state_dict())
    live.measurer.tables, stored.measurer.tables = {}, {}
    found, wanted = stored.evaluate_retention(), live.evaluate_retention()
    assert wanted["retention/old/ref_kl"] > 1e-3
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


# What is refused


def test_a_store_that_is_not_there_or_of_no_use_is_refused(datasets: dict[str, ReplayDataset], tmp_path: Path) -> None:
    plain = load_self_generated(sample(tmp_path / "plain", None))
    with pytest.raises(ValueError, match="replay_reference: 'cache', but no usable predictions are stored"):
        run(tmp_path / "a", plain, "cache")
    settings = ReplayConfig(replay_objective="kl_new", replay_reference="cache")
    with pytest.raises(ValueError, match="'kl_new' reads none stored"):
        train(tmp_path / "b", datasets["hidden"], replay_config=settings)


def test_another_models_predictions_are_not_the_base(datasets: dict[str, ReplayDataset], tmp_path: Path) -> None:
    other = make_model(seed=1)
    settings = ReplayConfig(replay_reference="cache", allow_off_policy_replay=True)
    with pytest.raises(ValueError, match="no usable predictions are stored"):
        train(tmp_path, datasets["hidden"], other, replay_config=settings)
    settings = ReplayConfig(allow_off_policy_replay=True)
    assert train(tmp_path, datasets["hidden"], other, replay_config=settings).replay.reference_kind == "copy"


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_that_are_not_the_models_stop_the_run(tmp_path: Path, kind: str, shard: int) -> None:
    folder = sample(tmp_path / "rows", kind, seed=6)
    shutil.copy(cache_path(sample(tmp_path / "other", kind, seed=7), shard), cache_path(folder, shard))
    with pytest.raises(ValueError, match="are not this model's"):
        run(tmp_path / "run", load_self_generated(folder), "cache")


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    rows = load_self_generated(sample(tmp_path / "rows", "hidden"))
    path = cache_path(tmp_path / "rows", 1)
    path.write_bytes(path.read_bytes()[:500])
    assert rows.cache is not None
    with pytest.raises(ValueError, match="reference-00001.safetensors' is missing or damaged"):
        rows.cache.batch([9])
    path.unlink()
    with pytest.raises(ValueError, match="reference-00001.safetensors' is missing or damaged"):
        rows.cache.batch([9])


def test_a_store_that_is_not_whole_is_named_before_training(tmp_path: Path) -> None:
    """The run ended at the first step that drew such a row, or trained towards other predictions."""
    folder = sample(tmp_path / "rows", "hidden")
    shutil.copy(cache_path(folder, 1), cache_path(folder, 2))  # of eight rows, not four
    with pytest.raises(ValueError, match="reference-00002.safetensors' is missing or damaged.*it holds other rows"):
        ReplaySFTTrainer(model=make_model(), args=config(tmp_path), replay_dataset=folder, processing_class=TOKENIZER)
    cache_path(folder, 2).unlink()
    with pytest.raises(ValueError, match="reference-00002.safetensors' is missing or damaged"):
        ReplaySFTTrainer(model=make_model(), args=config(tmp_path), replay_dataset=folder, processing_class=TOKENIZER)
    settings = ReplayConfig(replay_reference="copy")
    train(tmp_path / "run", load_self_generated(folder), replay_config=settings)


def test_a_shard_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    folder = sample(tmp_path / "rows", "hidden")
    shutil.copy(shard_path(folder, 0), shard_path(folder, 1))
    with pytest.raises(ValueError, match="do not hold the rows of their numbers"):
        load_self_generated(folder)


def test_hidden_states_under_an_adapted_head_are_refused_and_topk_is_not(
    datasets: dict[str, ReplayDataset], tmp_path: Path
) -> None:
    """Pitfall 3."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="stored predictions need a plain output head"):
        run(tmp_path / "a", datasets["hidden"], "cache", peft_config=lora)
    trainer = run(tmp_path / "a", datasets["hidden"], "auto", peft_config=lora)
    assert trainer.replay.reference_kind == "adapter", "nobody asked for what is stored"
    assert_kl_rises_from_zero(trainer)
    trainer = run(tmp_path / "b", datasets["topk"], "cache", peft_config=lora)
    assert logged(trainer, "replay/kl")[-1] > 0


def test_mixed_starts_train_from_their_store(tmp_path: Path) -> None:
    starts = Starts((Mode("document", 0.5, [[3]]), Mode("prompts", 0.5, [[3, 20, 21, 22], [3, 30]])))
    rows = load_self_generated(sample(tmp_path / "rows", "hidden", starts=starts))
    live, stored = (run(tmp_path / name, rows, name, changes=SGD) for name in ("copy", "cache"))
    assert difference(weights(live.model), weights(stored.model)) < 1e-5


def test_a_base_that_is_trained_beside_its_adapter_is_no_reference(
    datasets: dict[str, ReplayDataset], tmp_path: Path
) -> None:
    from peft import get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="the base's own .*lm_head.weight' is trained too"):
        ReplaySFTTrainer(
            model=model,
            args=config(tmp_path),
            train_dataset=ROWS,
            processing_class=TOKENIZER,
            replay_dataset=datasets["hidden"],
            replay_config=ReplayConfig(replay_reference="adapter"),
        )


def test_stored_predictions_and_a_budget_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sample with predictions, finetune from them under a budget, and read what every step left behind."""
    model, replay, out = (str(tmp_path / name) for name in ("base", "replay", "out"))
    save_model(tmp_path / "base")
    new, old = write_rows(tmp_path / "new.jsonl", seed=1), write_rows(tmp_path / "old.jsonl", seed=3)
    arguments = ["--num_rows", "6", "--max_length", "24", "--store_reference", "hidden"]
    assert main(["sample", "--model", model, "--output_dir", replay, *arguments]) == 0

    arguments = ["--model", model, "--dataset_name", new, "--output_dir", out, "--replay_dataset", replay]
    arguments += ["--max_ref_kl", "0.01", "--retention", f"old={old}"]
    assert main(["finetune", *arguments, *TRAIN]) == 0
    output = capsys.readouterr().out
    wanted = "protection: kl, budget 0.01 nats per token (coefficient from 1), reference cache (hidden)"
    assert wanted in output
    assert "forgotten: ref_kl " in output
    verdict = json.loads((tmp_path / "out" / "budget.json").read_text())
    assert verdict["budget"] == 0.01
    assert verdict["text"] in output
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len({row["replay/coef"] for row in rows if "replay/coef" in row}) == 3


def test_a_budget_that_cannot_be_followed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = write_rows(tmp_path / "new.jsonl", seed=1)
    base = ["finetune", "--model", "x", "--dataset_name", new, "--output_dir", str(tmp_path / "out")]
    base += TRAIN
    for more, line in (
        (["--max_ref_kl", "0"], "max_ref_kl: 0.0 does not fit"),
        (
            ["--max_ref_kl", "0.1", "--replay_objective", "ntp"],
            "max_ref_kl: 0.1 needs replay_objective kl",
        ),
        (["--max_ref_kl", "0.1", "--replay_coef", "0"], "max_ref_kl: 0.1 needs replay_objective kl"),
        (["--max_ref_kl", "0.1", "--replay_coef", "2000"], "replay_coef: 2000.0 does not fit"),
        (["--replay_every", "0"], "replay_every: 0 does not fit"),
    ):
        assert main([*base, *more]) == 1
        assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
