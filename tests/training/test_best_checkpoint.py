"""The checkpoint that forgot least: chosen, kept and stopped at by what transformers has for that, in any trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_texts, sample_rows, save_model
from training_runs import SETTINGS, TOKENIZER, TOKENS, points
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import default_compute_objective
from trl import SFTConfig, SFTTrainer

from retain import ForgettingCallback, ReplayConfig, ReplaySFTTrainer, ReplayTrainer
from retain.cli.main import main
from retain.files import read_jsonl
from retain.measuring.choices import Question
from retain.replay.dataset import ReplayDataset
from retain.training.retention import RetentionMeasurer
from retain.training.run_files import read_run

TEXTS = {"words": make_texts(6, seed=9)}
QUESTIONS = [
    Question(text, tuple(make_texts(3, seed=at, words=2)), 0) for at, text in enumerate(make_texts(4, words=3))
]
KL = "retention/words/ref_kl"
HOSTS = ("replay-sft", "replay", "sft", "plain")  # the last two with a ForgettingCallback


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return ReplayDataset.from_rows(list(sample_rows(make_model(), 3, range(8), 16, seed=5).numpy()), "own")


def build(host: str, folder: Path, replay: ReplayDataset, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any):
    settings: dict[str, Any] = {
        **SETTINGS, "output_dir": str(folder), "max_steps": 6, "per_device_eval_batch_size": 4, "learning_rate": 5e-3,
        "lr_scheduler_type": "linear", "logging_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": KL, "load_best_model_at_end": True,
    }  # fmt: skip
    evaluated = changes.pop("eval_dataset", TOKENS.select(range(4)))
    measured = {"retention": TEXTS} | changes.pop("measured", {})
    sft = host.endswith("sft")
    if sft:
        settings["max_length"] = 24
    given: dict[str, Any] = {"train_dataset": TOKENS, "eval_dataset": evaluated, "processing_class": TOKENIZER}
    args = (SFTConfig if sft else TrainingArguments)(**settings | changes)
    if host.startswith("replay"):
        given |= {"replay_dataset": replay, "retention_datasets": measured["retention"], "callbacks": list(callbacks)}
        given["replay_config"] = ReplayConfig(replay_coef=0.5, per_device_replay_batch_size=2)
        return (ReplaySFTTrainer if sft else ReplayTrainer)(model=make_model(), args=args, **given)
    found = ForgettingCallback(**measured, max_length=32)
    return (SFTTrainer if sft else Trainer)(make_model(), args, callbacks=[*callbacks, found], **given)


@pytest.mark.parametrize("host", HOSTS)
def test_the_checkpoint_that_forgot_least_is_kept(host: str, tmp_path: Path, replay: ReplayDataset) -> None:
    trainer = build(host, tmp_path, replay, metric_for_best_model=KL if "sft" in host else f"eval_{KL}")
    assert trainer.args.greater_is_better is False, "transformers takes the larger for better"
    trainer.train()
    found = points(tmp_path)
    assert list(found) == [2, 4, 6]
    assert found[2] < found[6], "the best is not the last"
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_metric == found[2]
    assert points(tmp_path, "kept_step") == {6: 2}
    metrics = trainer.evaluate()
    assert metrics[f"eval_{KL}"] == found[2], "of the weights that were restored"
    callbacks = trainer.callback_handler.callbacks
    measurer = next(one for one in callbacks if isinstance(one, RetentionMeasurer))
    table = measurer.tables[2]
    assert trainer.evaluate()[f"eval_{KL}"] == found[2]
    assert measurer.tables[2] is table, "measured already"
    measurer.tables.clear()
    trainer.evaluate()
    assert measurer.tables == {2: table}
    assert list(points(tmp_path)) == [2, 4, 6]


class Seen(TrainerCallback):
    """What a callback is given of the retention metrics."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.values += [value for name, value in metrics.items() if name == f"eval_{KL}"]


@pytest.mark.parametrize("host", ["replay-sft", "plain"])
def test_early_stopping_sees_what_was_forgotten(host: str, tmp_path: Path, replay: ReplayDataset) -> None:
    """The user's callback stands before ours."""
    seen = Seen()
    trainer = build(host, tmp_path, replay, (seen, EarlyStoppingCallback(1)), max_steps=20)
    trainer.train()
    assert trainer.state.global_step == 4
    assert points(tmp_path, "kept_step") == {4: 2}
    assert seen.values == list(points(tmp_path).values())
    assert len(seen.values) == 2


@pytest.mark.parametrize("host", ["replay-sft", "plain"])
def test_several_evaluation_sets_measure_once(host: str, tmp_path: Path, replay: ReplayDataset) -> None:
    sets = {"one": TOKENS.select(range(4)), "two": TOKENS.select(range(4, 8))}
    seen = Seen()
    trainer = build(host, tmp_path, replay, (seen, EarlyStoppingCallback(2)), max_steps=20, eval_dataset=sets)
    trainer.train()
    assert trainer.state.global_step == 6, "patience counts evaluations, not sets"
    assert seen.values == list(points(tmp_path).values())
    assert [row["step"] for row in read_jsonl(tmp_path / "documents.jsonl")] == [2, 4, 6]
    metrics = trainer.evaluate()
    assert metrics[f"eval_{KL}"] == seen.values[0]
    assert {"eval_one_loss", "eval_two_loss"} <= metrics.keys()
    assert not any(name.startswith("eval_one_retention") for name in metrics)


@pytest.mark.parametrize("host", ["replay", "plain"])
def test_the_best_alone_is_saved_and_the_rate_follows(host: str, tmp_path: Path, replay: ReplayDataset) -> None:
    changes = {"save_strategy": "best", "lr_scheduler_type": "reduce_lr_on_plateau", "logging_steps": 1}
    trainer = build(host, tmp_path, replay, **changes, lr_scheduler_kwargs={"patience": 0, "factor": 0.1})
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates[0] == 5e-3
    assert rates[-1] == pytest.approx(5e-4)


@pytest.mark.parametrize("host", ["replay", "plain"])
def test_the_prefix_is_the_hosts(host: str, tmp_path: Path, replay: ReplayDataset) -> None:
    trainer = build(host, tmp_path, replay)
    assert trainer.evaluate(metric_key_prefix="test")[f"test_{KL}"] == 0
    assert f"eval_{KL}" in trainer.evaluate()
    assert f"test_{KL}" not in trainer.predict(TOKENS.select(range(4))).metrics
    assert list(points(tmp_path)) == [0]


def test_agreement_is_better_when_higher(tmp_path: Path, replay: ReplayDataset) -> None:
    trainer = build("replay", tmp_path, replay, metric_for_best_model="retention/words/ref_agreement")
    assert trainer.args.greater_is_better is True
    with pytest.raises(ValueError, match=r"^lr_scheduler_kwargs: .* higher .*mode: max"):
        build(
            "replay", tmp_path, replay, metric_for_best_model="retention/words/ref_agreement",
            lr_scheduler_type="reduce_lr_on_plateau",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("host", "name"),
    [("replay-sft", "retention/wiki/ref_kl")]
    + [("plain", name) for name in ("retention/wiki/ref_kl", "eval_retention/words/refkl", "words/ref_kl",
        "retentoin/words/loss", "ref_kl", "retention/words", "eval_words_ref_kl")],
)  # fmt: skip
def test_a_metric_that_is_not_measured_is_named_before_training(
    host: str, name: str, tmp_path: Path, replay: ReplayDataset
) -> None:
    with pytest.raises(ValueError, match=rf"^metric_for_best_model: '{name}' .*; use one of .*{KL}") as error:
        build(host, tmp_path, replay, metric_for_best_model=name)
    assert "\n" not in str(error.value)


def test_what_is_not_ours_is_left_to_the_host(tmp_path: Path, replay: ReplayDataset) -> None:
    for name in ("eval_words_loss", "retention_words_loss", "loss", "eval_bleu"):
        build("replay", tmp_path, replay, metric_for_best_model=name)
    with pytest.raises(ValueError, match=r"^metric_for_best_model: .* nothing is measured; give retention texts$"):
        build("replay", tmp_path, replay, measured={"retention": {}})


def test_a_checkpoint_can_be_chosen_by_answers_at_every_evaluation(tmp_path: Path, replay: ReplayDataset) -> None:
    name, measured = "choices/arc/agreement", {"retention": {}, "choices": {"arc": QUESTIONS}}
    trainer = build("plain", tmp_path, replay, metric_for_best_model=name, measured=measured)
    trainer.train()
    assert trainer.state.best_metric == max(points(tmp_path, name).values())
    with pytest.raises(ValueError, match=r"^metric_for_best_model: 'choices/arc/agreement' .*choices_every"):
        build("plain", tmp_path, replay, metric_for_best_model=name, measured=measured | {"choices_every": 2})


def test_a_search_by_the_default_objective_is_still_one_by_the_loss(tmp_path: Path, replay: ReplayDataset) -> None:
    """It adds up all metrics but the loss: agreement and loss, of which one shall rise."""
    trainer = build("plain", tmp_path, replay)
    trainer.state = TrainerState(is_hyper_param_search=True)
    trainer.compute_objective = default_compute_objective
    metrics = trainer.evaluate()
    assert not any("retention" in name for name in metrics)
    trainer.compute_objective = lambda metrics: metrics[f"eval_{KL}"]
    found = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ForgettingCallback))
    found.trainer = trainer
    assert trainer.compute_objective(trainer.evaluate()) == 0


def test_retain_finetune_keeps_and_reports_the_checkpoint_that_forgot_least(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = save_model(tmp_path / "base"), tmp_path / "out"
    for name, seed in (("new", 1), ("held", 2), ("wiki", 9)):
        rows = [json.dumps({"text": text}) for text in make_texts(16, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = {
        "model_name_or_path": str(base), "dataset_name": f"{tmp_path}/new.jsonl", "output_dir": str(out),
        "eval_dataset_name": f"{tmp_path}/held.jsonl", "retention": [f"wiki={tmp_path}/wiki.jsonl"], "replay_coef": 0.0,
        "max_steps": 20, "max_length": 24, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "bf16": False,
        "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "load_best_model_at_end": True,
        "metric_for_best_model": "retention/wiki/ref_kl", "early_stopping_patience": 2,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["finetune", "--config", f"{tmp_path}/run.yaml"]) == 0
    found = points(out, "retention/wiki/ref_kl")
    assert list(found) == [2, 4, 6]
    assert read_run(out)["training"]["kept_step"] == 2
    assert f"ref_kl {found[2]:.3f}" in capsys.readouterr().out
    for change, message in (
        (["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"], "early_stopping_pa"),
        (["--metric_for_best_model", "retention/wiki/kl"], "metric_for_best_model: 'retention/wiki/kl' is not"),
    ):
        assert main(["finetune", "--config", f"{tmp_path}/run.yaml", *change, "--output_dir", f"{tmp_path}/no"]) == 1
        assert f"retain finetune: {message}" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
