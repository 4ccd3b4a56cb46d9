"""`retain finetune`: what `trl sft` does, with replay. A config written for `trl sft` works unchanged."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import release_memory
from transformers import EarlyStoppingCallback, IntervalStrategy
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from retain.checks import Unchosen
from retain.cli.dry_run import dry_run
from retain.cli.finetune_config import FinetuneConfig
from retain.cli.finetune_data import (
    OWN_TEXT,
    SAMPLING_TITLE,
    TrlArguments,
    read_data,
    rows_to_sample,
    sample_own_rows,
)
from retain.cli.flags import Verb
from retain.cli.sample import SAMPLING_STAGE
from retain.data.rows import Document, is_local_file
from retain.files import check_output_dir, exclusive, read_settings, visible
from retain.measuring.tokens import MEASURING, measuring_title
from retain.models.adapters import adapted_model, merged_base
from retain.models.description import choose_start_token, default_device, length_that_fits
from retain.progress import PlannedStage, ProgressLine, progress_line
from retain.replay.dataset import local_source
from retain.replay.fisher import FISHER, holds_fisher
from retain.report.outcome import cost_line, outcome_lines
from retain.report.report import ForgettingReport, write_comparison
from retain.training.beta2_half_life import apply_half_life, mean_row_length
from retain.training.config import ReplayConfig, check_arguments
from retain.training.protection import check_replay_every
from retain.training.protection_choice import PROTECTING, UNSET, choose_protection, new_tokens_per_step
from retain.training.retention import NEW_TASK_TEXT
from retain.training.row_checks import check_new_rows
from retain.training.run_files import REPORTED_ARGUMENTS, read_run
from retain.training.step_line import TRAINING, StepLine, StepTimer
from retain.training.stopping import (
    StopAtLoss,
    check_same_run,
    checkpoint_to_resume,
    how_to_resume,
    train,
)
from retain.training.trainer import ReplaySFTTrainer
from retain.training.trainer_checks import check_lora_targets, check_unsharded, expected_steps, load_for_training

COMPARED_EVALUATIONS = 8  # of each run that is compared, where no eval_strategy says when
# Folders in output_dir: of the page, of the unprotected run, and of the model to finetune where that was an adapter.
PAGE, PLAIN, WHOLE = "report", "plain", "base"

Say = Callable[[object], None]


@dataclass
class FinishedRun:
    """What is left to say of a run.

    Attributes:
        report: None where no text was measured.
        texts: that were measured.
        step_seconds: a step's, None where none was timed.
        others: what else took time, in seconds by name.
        lines: of its stops and limits.
    """

    report: ForgettingReport | None
    texts: dict[str, list[Document]]
    step_seconds: float | None
    others: list[tuple[str, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def set_defaults(parser: Any) -> None:
    """TRL's defaults are for a GPU and for models with room for 1024 tokens; what protects is chosen where unset."""
    parser.set_defaults(max_length=Unchosen(parser.get_default("max_length")), **dict.fromkeys(PROTECTING, UNSET))
    if default_device() == "cpu":
        parser.set_defaults(use_cpu=True, bf16=False)


def run_finetune(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, config: FinetuneConfig
) -> None:
    """Finetune and save, alone in the folder; the dataclasses are TRL's, and `config` is ours."""
    folder, speaks = Path(training_args.output_dir), training_args.process_index == 0
    say: Say = (lambda line: print(visible(str(line)), flush=True)) if speaks else lambda line: None
    given = TrlArguments(script_args, training_args, model_args, dataset_args)
    if not model_args.model_name_or_path:
        raise ValueError("model: missing; give --model")
    check_arguments(training_args, config.replay_objective)
    if config.replay_dataset not in (None, "self"):
        config.replay_dataset = local_source(config.replay_dataset)
    if config.chosen is not None and (config.replay_dataset == "self" or holds_fisher(config.replay_dataset)):
        config.choose(choose_protection(training_args, model_args), training_args.train_batch_size, steps=0)
    if config.dry_run:
        check_output_dir(folder, "a training run")
        name, revision = given.model.model_name_or_path, given.model.model_revision
        # The base of an adapter is as large as the two merged, and nothing is written.
        given.model.model_name_or_path = adapted_model(name, revision=revision) or name
        make_trainer = partial(make_sft_trainer, say=lambda line: None, others=[])
        return dry_run(given, config, make_trainer, partial(rows_to_sample, folder, training_args, config), say)
    shown = speaks and not training_args.disable_tqdm
    with exclusive(folder, "a training run") if speaks else nullcontext(), progress_line(shown=shown):
        merge_its_adapter(given, folder / WHOLE, say)
        of_plain = given._replace(training=copy.deepcopy(training_args))
        run = finetuned(given, config, say)
        plain = plain_run(of_plain, config, run, say) if config.compare_plain else None
        for line in (f"model: {folder}", *run.lines):
            say(line)
        if run.report is not None and speaks:
            write_page(folder / PAGE, run, plain, say)


def merge_its_adapter(given: TrlArguments, folder: Path, say: Say) -> None:
    """Of a model with an adapter, as an earlier run left it, train the whole: written once, its adapter merged in."""
    name, options = given.model.model_name_or_path, given.checkpoint
    if (base := adapted_model(name, revision=options["revision"])) is None:
        return
    with given.training.main_process_first(local=False, desc="merging the adapter"):
        merged_base(name, folder, **options)
    given.model.model_name_or_path, given.model.model_revision = str(folder), "main"
    say(f"base: {folder}, the adapter {name} merged into {base}")


def finetuned(
    given: TrlArguments,
    config: FinetuneConfig,
    say: Say,
    *,
    texts: dict[str, list[Document]] | None = None,
    keep: bool = True,
) -> FinishedRun:
    """Train, from the last checkpoint where that is asked for, save unless not to `keep`, and measure.

    Args:
        texts: of the protected run, beside which this is the unprotected one.
    """
    training_args = given.training
    checkpoint, others = checkpoint_to_resume(training_args), []  # type: ignore[var-annotated]
    if checkpoint is not None:
        check_same_run(checkpoint, training_args)  # before the model is loaded
    began = None if checkpoint is None else read_settings(Path(checkpoint).resolve().parent).get("created")
    trainer = make_sft_trainer(given, config, say, others, texts, began)
    if checkpoint is not None:
        check_same_run(checkpoint, training_args, settings_of_training(trainer))
    if trainer.eval_dataset is not None and (config.compare_plain or texts):
        training_args.eval_on_start = checkpoint is None  # where the two runs are one
        evaluate_on_the_way(training_args, expected_steps(training_args, trainer.train_dataset))
    watch = None if config.stop_at_loss is None else StopAtLoss(config.stop_at_loss)
    timer = StepTimer()
    for callback in filter(None, (timer, watch)):
        trainer.add_callback(callback)
    may_stop = config.stop_at_loss is not None or config.early_stopping_patience is not None
    StepLine(partial(rows_trained_on, config, training_args), at_most=may_stop).take_over(trainer)
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if config.adam_beta2_half_life_tokens is not None:  # the optimizer is made when training begins
        length = mean_row_length(trainer.train_dataset, training_args.max_length)
        say(apply_half_life(training_args, config.adam_beta2_half_life_tokens, length))
    for line in trainer.protection():
        say(line)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    elif training_args.resume_from_checkpoint:
        say(f"no whole checkpoint in {training_args.output_dir}: beginning anew")
    train(trainer, checkpoint, keep=keep)
    trainer.evaluate_retention()
    report = trainer.report("protected" if config.protects else PLAIN) if trainer.replay.documents else None
    if report is not None and training_args.process_index == 0:
        report.data |= {**read_run(Path(training_args.output_dir)), "cost": {"seconds": timer.mean}}
    if keep:
        save_card(trainer, given.script.dataset_name)
    if trainer.replay.anchor is not None:
        others.append(("Fisher information", trainer.replay.anchor.seconds))
    lines = [str(line) for line in (watch, trainer.budget and trainer.budget.verdict()) if line]
    trainer.end()
    return FinishedRun(report, trainer.replay.documents, timer.mean, others, lines)


def plain_run(given: TrlArguments, config: FinetuneConfig, protected: FinishedRun, say: Say) -> FinishedRun:
    """The unprotected run beside `protected`, of which the report stays; one that was made before is read."""
    args = given.training
    release_memory()  # of the other run
    folder, place = Path(args.output_dir) / PLAIN, Path(args.output_dir) / PAGE / PLAIN
    resumes = str(args.resume_from_checkpoint or "").lower() not in ("", "false")
    args.output_dir, args.push_to_hub, args.report_to = str(folder), False, []
    args.resume_from_checkpoint = "true" if resumes else None
    main = args.process_index == 0
    run = read_plain(place, args, protected) if resumes else None
    if run is None:
        say(f"unprotected run, to compare: {folder}")
        with exclusive(folder, "a training run") if main else nullcontext():
            run = finetuned(given, config.unprotected(), say, texts=protected.texts, keep=config.keep_plain)
        if main and run.report is not None:
            with exclusive(place, "a report"):
                run.report.write(place)
    for checkpoint in folder.glob("checkpoint-*") if main and not config.keep_plain else ():
        shutil.rmtree(checkpoint)
    return run


def read_plain(place: Path, args: Any, protected: FinishedRun) -> FinishedRun | None:
    """The unprotected run whose report is in a folder, if it has these settings and texts."""
    if not (place / "report.json").exists() or protected.report is None:
        return None
    report = ForgettingReport.from_json(place / "report.json")
    settings, texts = {name: getattr(args, name) for name in REPORTED_ARGUMENTS}, protected.report.results.texts
    if settings.items() <= report.data["training"].items() and report.results.texts.keys() == texts.keys():
        return FinishedRun(report, protected.texts, report.data["cost"]["seconds"])
    return None


def write_page(folder: Path, run: FinishedRun, plain: FinishedRun | None, say: Say) -> None:
    """The page of a run, or of both, and its outcome in four lines."""
    assert run.report is not None
    of_plain, step_of_plain = (plain.report, plain.step_seconds) if plain else (None, None)
    with exclusive(folder, "a report"):
        if of_plain is None:
            run.report.write(folder)
        else:
            run.report.write(folder / run.report.data["name"])
            write_comparison(folder, [of_plain, run.report], title="Forgetting report")
    for line in outcome_lines(run.report.results, of_plain.results if of_plain else None):
        say(line)
    say(cost_line(run.step_seconds, step_of_plain, run.others))
    say(f"page: {folder / 'report.html'}")


def make_sft_trainer(
    given: TrlArguments,
    config: FinetuneConfig,
    say: Say,
    others: list[tuple[str, float]],
    texts: dict[str, list[Document]] | None = None,
    began: str | None = None,
) -> ReplaySFTTrainer:
    """The trainer with model, rows and texts.

    Args:
        others: gets the seconds that sampling took.
        texts: of the protected run, beside which this is the unprotected one.
        began: when the run began that is resumed.
    """
    training_args = given.training
    train_dataset, eval_dataset, tokenizer, retention = read_data(given, config, texts, began)
    steps = expected_steps(training_args, train_dataset)
    by_training_loss = config.measures and eval_dataset is None
    if by_training_loss:
        log_training_loss(training_args, steps)
    if texts is None:  # else it was said of the protected run
        if by_training_loss:
            ends = ", and the two runs are compared at their ends, not at the same loss" * config.compare_plain
            held_out = f"no rows are held out, so its training loss is reported{ends}"
            say(f"new task: {held_out}; give some as --eval_dataset_name FILE")
        if default_device() == "cpu":
            say(f"no accelerator: training on the CPU in {'bfloat16' if training_args.bf16 else 'float32'}")
        say(f"document start: {choose_start_token(tokenizer, config.start_token)}")
    check_replay_every(config, steps)  # before rows are drawn for it
    model, adapter = base_to_train(given, tokenizer)
    if config.chosen is not None and config.replay_dataset is not None:
        tokens = new_tokens_per_step(train_dataset, tokenizer, training_args) if config.anchor_coef else math.inf
        choice = config.chosen.for_model(model, adapter, tokens)
        if choice is not config.chosen or choice.share_of_batch:
            config.choose(choice, training_args.train_batch_size, steps)
        say(config.chosen.line())
    if texts is None and ProgressLine.current is not None:
        ProgressLine.current.plan = planned_stages(training_args, config, steps, retention, eval_dataset)
    replay = None if texts else config.replay_dataset
    if replay == "self":
        start = time.monotonic()
        with training_args.main_process_first(local=False, desc="sampling replay"):
            replay, retention[OWN_TEXT] = sample_own_rows(model, tokenizer, training_args, config, steps)
        others.append(("sampling", time.monotonic() - start))
    trainer = ReplaySFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=adapter,
        replay_config=config,
        replay_dataset=replay,
        retention_datasets=retention,
        start_token=config.start_token,
        new_task_rows=config.retention_max_documents,
    )
    check_new_rows(trainer.train_dataset, trainer.model, packed=training_args.packing or training_args.padding_free)
    check_replay_every(config, expected_steps(training_args, trainer.train_dataset))  # packed
    return trainer


def base_to_train(given: TrlArguments, tokenizer: Any) -> tuple[Any, Any]:
    """The model, and the adapter that it gets, or None; rows are no longer than it has room for."""
    training_args = given.training
    quantization, adapter = get_quantization_config(given.model), get_peft_config(given.model)
    options = {**given.checkpoint, "attn_implementation": given.model.attn_implementation}
    options |= {"dtype": given.model.dtype, **(training_args.model_init_kwargs or {})}
    training_args.model_init_kwargs = options
    parts = {"quantization_config": quantization, "processing_class": tokenizer}
    model = load_for_training(given.model.model_name_or_path, training_args, parts)
    check_unsharded(model)  # before rows are drawn
    if isinstance(training_args.max_length, Unchosen):  # TRL's default, which the model may have no room for
        training_args.max_length = length_that_fits(model, training_args.max_length)
    if adapter is not None:
        check_lora_targets(model, adapter)
    return model, adapter


def log_training_loss(training_args: Any, steps: int) -> None:
    """Log ten parts of the run at least, where its training loss has to show what was learned."""
    if training_args.logging_steps >= 1 and steps > 0:
        training_args.logging_steps = min(training_args.logging_steps, max(1, steps // 10))


def evaluate_on_the_way(training_args: Any, steps: int) -> None:
    """Evaluate some times where nobody says when: runs are compared at the same loss."""
    if training_args.eval_strategy == IntervalStrategy.NO and steps > 0:
        training_args.eval_strategy, training_args.do_eval = IntervalStrategy.STEPS, True
        training_args.eval_steps = max(1, steps // COMPARED_EVALUATIONS)


def settings_of_training(trainer: ReplaySFTTrainer) -> dict[str, Any]:
    """The parts of `retain_config.json` on which the steps of a run depend."""
    found, config = trainer.replay.settings(trainer), trainer.replay.config
    free = {field.name for field in fields(FinetuneConfig)} - {field.name for field in fields(ReplayConfig)}
    if config.per_device_replay_batch_size is None:  # it follows the batch, which may have been made smaller
        free.add("per_device_replay_batch_size")
    if rows := found["replay_dataset"]:
        drawn = rows["manifest"] or {}
        drawn = {name: drawn[name] for name in ("model_fingerprint", "seed") if name in drawn}
        rows = {"num_rows": rows["num_rows"], "manifest": drawn}
    return {
        "replay": {name: value for name, value in found["replay"].items() if name not in free},
        "replay_dataset": rows,
        "num_params": found["num_params"],
        "new_rows": found["new_rows"],
    }


def save_card(trainer: ReplaySFTTrainer, dataset_name: str | None) -> None:
    """Write the model card, and push to the Hub where the arguments say so; a file has no page on the Hub to name."""
    named = {"dataset_name": None if is_local_file(dataset_name or "") else dataset_name}
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).name, **named)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**named)


def planned_stages(
    training_args: Any, config: FinetuneConfig, steps: int, texts: Iterable[str], eval_dataset: Any
) -> list[PlannedStage]:
    """The stages of a run and of the unprotected one that is compared, in their order."""
    rows = rows_to_sample(Path(training_args.output_dir), training_args, config, steps)
    stages = [PlannedStage(SAMPLING_TITLE.format(folder), SAMPLING_STAGE, number) for folder, number in rows.items()]
    if config.anchor_coef:
        stages.append(PlannedStage(FISHER, FISHER))
    measured = [*texts, *[OWN_TEXT] * (config.replay_dataset == "self")]
    measured += [NEW_TASK_TEXT] * bool(measured and eval_dataset is not None)
    for run in (config, config.unprotected()) if config.compare_plain else (config,):
        stages.append(
            PlannedStage(TRAINING, TRAINING, rows_trained_on(run, training_args, max(1, steps), max(1, steps)))
        )
        stages += [PlannedStage(measuring_title(text), MEASURING) for text in measured]
    return stages


def rows_trained_on(config: FinetuneConfig, training_args: Any, step: int, steps: int) -> float:
    """Rows in the steps up to `step` of `steps`, with those that are replayed; of a process and micro-batch."""
    size, objective = training_args.train_batch_size, config.objective
    beside = objective.batch_rows(config, size) if objective.draws_rows and objective.adds_term else 0
    return step * size + beside * max(0.0, step - config.replay_start * steps) / config.replay_every


VERB = Verb(
    name="finetune",
    example="retain finetune --config sft.yaml --replay_dataset replay/",
    settings=(ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, FinetuneConfig),
    run=run_finetune,
    resume=lambda script, training, *rest: how_to_resume(Path(training.output_dir)),
    groups={
        "eval_dataset_name": "What is measured, and when the run stops",
        "replay_objective": "How replay protects (chosen unless you set replay_objective, replay_coef or anchor_coef)",
        "adam_beta2_half_life_tokens": "Further settings",
    },
    borrowed={
        "model": "Hub id or folder of the model to finetune; TRL's --model_name_or_path. [required]",
        "dataset_name": "Rows of the new task: a file or Hub id. [required]",
        "output_dir": "Folder for the model or adapter, metrics.jsonl and retain_config.json.",
        "use_peft": "Train a LoRA (true) instead of all weights; --lora_r sets its rank.",
        "learning_rate": "Peak learning rate.",
        "max_steps": "Optimizer steps; --num_train_epochs counts passes over the rows instead.",
    },
    aliases={"model": "model_name_or_path"},
    set_defaults=set_defaults,
)
