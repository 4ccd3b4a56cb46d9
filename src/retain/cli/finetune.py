"""`retain finetune`: `trl sft` with replay. A config written for `trl sft` works unchanged."""

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
    unused_settings,
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
from retain.replay.stored_fisher import FISHER, holds_fisher
from retain.report.outcome import cost_line, outcome_lines
from retain.report.report import ForgettingReport, write_comparison
from retain.training.beta2_half_life import apply_half_life, mean_row_length
from retain.training.config import ReplayConfig, check_arguments
from retain.training.protection import check_replay_every
from retain.training.protection_choice import FOLLOWING, PROTECTING, UNSET, choose_protection, new_tokens_per_step
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

COMPARED_EVALUATIONS = 8  # evaluations of each of two compared runs, if eval_strategy is unset
# Folders in output_dir: the page, the unprotected run, and the merged model if the model to finetune is an adapter.
PAGE, PLAIN, MERGED = "report", "plain", "base"

Say = Callable[[object], None]


@dataclass
class FinishedRun:
    """The results of a run.

    Attributes:
        report: None if no text was measured.
        texts: the measured texts.
        step_seconds: seconds per step; None if no step was timed.
        other_costs: what else took time, as (name, seconds).
        lines: what to print about early stops and limits.
    """

    report: ForgettingReport | None
    texts: dict[str, list[Document]]
    step_seconds: float | None
    other_costs: list[tuple[str, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def set_defaults(parser: Any) -> None:
    """Mark settings that `retain` chooses if they are unset; TRL's defaults are for a GPU and 1024 positions."""
    parser.set_defaults(
        max_length=Unchosen(parser.get_default("max_length")), **dict.fromkeys((*PROTECTING, *FOLLOWING), UNSET)
    )
    if default_device() == "cpu":
        parser.set_defaults(use_cpu=True, bf16=False)


def run_finetune(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, config: FinetuneConfig
) -> None:
    """Finetune, save and measure, with the folder locked."""
    folder, is_main = Path(training_args.output_dir), training_args.process_index == 0
    say: Say = (lambda line: print(visible(str(line)), flush=True)) if is_main else lambda line: None
    trl_args = TrlArguments(script_args, training_args, model_args, dataset_args)
    if not model_args.model_name_or_path:
        raise ValueError("model: missing; give --model")
    check_arguments(training_args, config.replay_objective)
    if config.replay_dataset not in (None, "self"):
        config.replay_dataset = local_source(config.replay_dataset)
    if config.chosen is not None and (config.replay_dataset == "self" or holds_fisher(config.replay_dataset)):
        config.choose(choose_protection(training_args, model_args), training_args.train_batch_size, steps=0)
    if unused := unused_settings(trl_args, config):
        say(unused)
    if config.dry_run:
        check_output_dir(folder, "a training run")
        name, revision = trl_args.model.model_name_or_path, trl_args.model.model_revision
        # The base of an adapter is as large as the merged model, which a dry run must not write.
        trl_args.model.model_name_or_path = adapted_model(name, revision=revision) or name
        make_trainer = partial(make_sft_trainer, say=lambda line: None, other_costs=[])
        return dry_run(trl_args, config, make_trainer, partial(rows_to_sample, folder, training_args, config), say)
    shown = is_main and not training_args.disable_tqdm
    with exclusive(folder, "a training run") if is_main else nullcontext(), progress_line(shown=shown):
        merge_adapter_of_model(trl_args, folder / MERGED, say)
        plain_args = trl_args._replace(training=copy.deepcopy(training_args))
        run = finetuned(trl_args, config, say)
        plain = plain_run(plain_args, config, run, say) if config.compare_plain else None
        for line in (f"model: {folder}", *run.lines):
            say(line)
        if run.report is not None and is_main:
            write_page(folder / PAGE, run, plain, say)


def merge_adapter_of_model(trl_args: TrlArguments, folder: Path, say: Say) -> None:
    """If the model to finetune is an adapter, merge it into its base, in `folder`, and finetune the result."""
    name, options = trl_args.model.model_name_or_path, trl_args.checkpoint
    if (base := adapted_model(name, revision=options["revision"])) is None:
        return
    with trl_args.training.main_process_first(local=False, desc="merging the adapter"):
        merged_base(name, folder, **options)
    trl_args.model.model_name_or_path, trl_args.model.model_revision = str(folder), "main"
    say(f"base: {folder}, the adapter {name} merged into {base}")


def finetuned(
    trl_args: TrlArguments,
    config: FinetuneConfig,
    say: Say,
    *,
    texts: dict[str, list[Document]] | None = None,
    keep: bool = True,
) -> FinishedRun:
    """Train, resuming if asked to, save and measure.

    Args:
        texts: the texts of the protected run, if this is the unprotected run to compare it with.
        keep: whether to save the model and its checkpoints.
    """
    training_args = trl_args.training
    checkpoint, other_costs = checkpoint_to_resume(training_args), []  # type: ignore[var-annotated]
    if checkpoint is not None:
        check_same_run(checkpoint, training_args)  # before the model is loaded
    created = None if checkpoint is None else read_settings(Path(checkpoint).resolve().parent).get("created")
    trainer = make_sft_trainer(trl_args, config, say, other_costs, texts, created)
    if checkpoint is not None:
        check_same_run(checkpoint, training_args, settings_of_training(trainer, config.given))
    if trainer.eval_dataset is not None and (config.compare_plain or texts):
        training_args.eval_on_start = checkpoint is None  # before the first step both runs are the same
        evaluate_during_training(training_args, expected_steps(training_args, trainer.train_dataset))
    stop_at_loss = None if config.stop_at_loss is None else StopAtLoss(config.stop_at_loss)
    timer = StepTimer()
    for callback in filter(None, (timer, stop_at_loss)):
        trainer.add_callback(callback)
    may_stop = config.stop_at_loss is not None or config.early_stopping_patience is not None
    StepLine(partial(rows_trained_on, config, training_args), at_most=may_stop).take_over(trainer)
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if config.adam_beta2_half_life_tokens is not None:  # before training creates the optimizer
        length = mean_row_length(trainer.train_dataset, training_args.max_length)
        say(apply_half_life(training_args, config.adam_beta2_half_life_tokens, length))
    for line in trainer.protection():
        say(line)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    elif training_args.resume_from_checkpoint:
        say(f"no whole checkpoint in {training_args.output_dir}: starting from step 0")
    train(trainer, checkpoint, keep=keep)
    trainer.evaluate_retention()
    report = trainer.report("protected" if config.protects else PLAIN) if trainer.replay.documents else None
    if report is not None and training_args.process_index == 0:
        report.data |= {**read_run(Path(training_args.output_dir)), "cost": {"seconds": timer.mean}}
    if keep:
        save_card(trainer, trl_args.script.dataset_name)
    if trainer.replay.anchor is not None:
        other_costs.append(("Fisher information", trainer.replay.anchor.seconds))
    lines = [str(line) for line in (stop_at_loss, trainer.budget and trainer.budget.verdict()) if line]
    trainer.end()
    return FinishedRun(report, trainer.replay.documents, timer.mean, other_costs, lines)


def plain_run(trl_args: TrlArguments, config: FinetuneConfig, protected: FinishedRun, say: Say) -> FinishedRun:
    """The unprotected run to compare with `protected`; on resuming, its report is read if it exists."""
    args = trl_args.training
    release_memory()  # of the protected run
    folder, report_folder = Path(args.output_dir) / PLAIN, Path(args.output_dir) / PAGE / PLAIN
    is_resumed = str(args.resume_from_checkpoint or "").lower() not in ("", "false")
    args.output_dir, args.push_to_hub, args.report_to = str(folder), False, []
    args.resume_from_checkpoint = "true" if is_resumed else None
    is_main = args.process_index == 0
    run = read_plain(report_folder, args, protected) if is_resumed else None
    if run is None:
        say(f"unprotected run, to compare: {folder}")
        with exclusive(folder, "a training run") if is_main else nullcontext():
            run = finetuned(trl_args, config.unprotected(), say, texts=protected.texts, keep=config.keep_plain)
        if is_main and run.report is not None:
            with exclusive(report_folder, "a report"):
                run.report.write(report_folder)
    for checkpoint in folder.glob("checkpoint-*") if is_main and not config.keep_plain else ():
        shutil.rmtree(checkpoint)
    return run


def read_plain(folder: Path, args: Any, protected: FinishedRun) -> FinishedRun | None:
    """The unprotected run whose report is in `folder`, or None if its settings or texts differ."""
    if not (folder / "report.json").exists() or protected.report is None:
        return None
    report = ForgettingReport.from_json(folder / "report.json")
    settings, texts = {name: getattr(args, name) for name in REPORTED_ARGUMENTS}, protected.report.results.texts
    if settings.items() <= report.data["training"].items() and report.results.texts.keys() == texts.keys():
        return FinishedRun(report, protected.texts, report.data["cost"]["seconds"])
    return None


def write_page(folder: Path, run: FinishedRun, plain: FinishedRun | None, say: Say) -> None:
    """Write the page of a run, or of both runs, and print the outcome."""
    assert run.report is not None
    plain_report, plain_step_seconds = (plain.report, plain.step_seconds) if plain else (None, None)
    with exclusive(folder, "a report"):
        if plain_report is None:
            run.report.write(folder)
        else:
            run.report.write(folder / run.report.data["name"])
            write_comparison(folder, [plain_report, run.report], title="Forgetting report")
    for line in outcome_lines(run.report.results, plain_report.results if plain_report else None):
        say(line)
    say(cost_line(run.step_seconds, plain_step_seconds, run.other_costs))
    say(f"page: {folder / 'report.html'}")


def make_sft_trainer(
    trl_args: TrlArguments,
    config: FinetuneConfig,
    say: Say,
    other_costs: list[tuple[str, float]],
    texts: dict[str, list[Document]] | None = None,
    created: str | None = None,
) -> ReplaySFTTrainer:
    """Read the data, load the model, sample replay rows if asked to, and make the trainer.

    Args:
        other_costs: the seconds of sampling are appended to it.
        texts: the texts of the protected run, if this is the unprotected run to compare it with.
        created: when a resumed run was first started.
    """
    training_args = trl_args.training
    train_dataset, eval_dataset, tokenizer, retention = read_data(trl_args, config, texts, created)
    steps = expected_steps(training_args, train_dataset)
    by_training_loss = config.measures and eval_dataset is None
    if by_training_loss:
        log_training_loss(training_args, steps)
    if texts is None:  # else the protected run has printed it
        if by_training_loss:
            ends = ", and the two runs are compared at their ends, not at the same loss" * config.compare_plain
            held_out = f"no rows are held out, so its training loss is reported{ends}"
            say(f"new task: {held_out}; give some as --eval_dataset_name FILE")
        if default_device() == "cpu":
            say(f"no accelerator: training on the CPU in {'bfloat16' if training_args.bf16 else 'float32'}")
        say(f"document start: {choose_start_token(tokenizer, config.start_token)}")
    check_replay_every(config, steps)  # before rows are sampled
    model, adapter = base_to_train(trl_args, tokenizer)
    if config.chosen is not None and config.replay_dataset is not None:
        tokens = new_tokens_per_step(train_dataset, tokenizer, training_args) if config.anchor_coef else math.inf
        choice = config.chosen.for_model(model, adapter, tokens, config.anchor_rank)
        config.choose(choice, training_args.train_batch_size, steps)
        say(config.chosen.line())
    if texts is None and ProgressLine.current is not None:
        ProgressLine.current.plan = planned_stages(training_args, config, steps, retention, eval_dataset)
    replay = None if texts else config.replay_dataset
    if replay == "self":
        start = time.monotonic()
        with training_args.main_process_first(local=False, desc="sampling replay"):
            replay, retention[OWN_TEXT] = sample_own_rows(model, tokenizer, training_args, config, steps)
        other_costs.append(("sampling", time.monotonic() - start))
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
    check_replay_every(config, expected_steps(training_args, trainer.train_dataset))  # packing changes the steps
    return trainer


def base_to_train(trl_args: TrlArguments, tokenizer: Any) -> tuple[Any, Any]:
    """The model and the configuration of its adapter, or None; lowers a default max_length to the model's positions."""
    training_args = trl_args.training
    quantization, adapter = get_quantization_config(trl_args.model), get_peft_config(trl_args.model)
    options = {**trl_args.checkpoint, "attn_implementation": trl_args.model.attn_implementation}
    options |= {"dtype": trl_args.model.dtype, **(training_args.model_init_kwargs or {})}
    training_args.model_init_kwargs = options
    parts = {"quantization_config": quantization, "processing_class": tokenizer}
    model = load_for_training(trl_args.model.model_name_or_path, training_args, parts)
    check_unsharded(model)  # before rows are sampled
    if isinstance(training_args.max_length, Unchosen):  # TRL's default
        training_args.max_length = length_that_fits(model, training_args.max_length)
    if adapter is not None:
        check_lora_targets(model, adapter)
    return model, adapter


def log_training_loss(training_args: Any, steps: int) -> None:
    """Log at least ten times, because the training loss has to show what was learned."""
    if training_args.logging_steps >= 1 and steps > 0:
        training_args.logging_steps = min(training_args.logging_steps, max(1, steps // 10))


def evaluate_during_training(training_args: Any, steps: int) -> None:
    """Evaluate during training unless eval_strategy is set: runs are compared at the same loss."""
    if training_args.eval_strategy == IntervalStrategy.NO and steps > 0:
        training_args.eval_strategy, training_args.do_eval = IntervalStrategy.STEPS, True
        training_args.eval_steps = max(1, steps // COMPARED_EVALUATIONS)


def settings_of_training(trainer: ReplaySFTTrainer, given: Iterable[str]) -> dict[str, Any]:
    """The parts of `retain_config.json` that determine the steps of a run; causes stand before what follows from them.

    Args:
        given: the settings of protection that the user gave, from which the others may follow.
    """
    settings, config = trainer.replay.settings(trainer), trainer.replay.config
    ignored = {field.name for field in fields(FinetuneConfig)} - {field.name for field in fields(ReplayConfig)}
    if config.per_device_replay_batch_size is None:  # it follows the batch size, which may change
        ignored.add("per_device_replay_batch_size")
    if rows := settings["replay_dataset"]:
        manifest = rows["manifest"] or {}
        manifest = {name: manifest[name] for name in ("model_fingerprint", "seed") if name in manifest}
        rows = {"num_rows": rows["num_rows"], "manifest": manifest}
    names = dict.fromkeys(("max_ref_kl", *given, *settings["replay"]))
    return {
        "num_params": settings["num_params"],
        "new_rows": settings["new_rows"],
        "replay_dataset": rows,
        "replay": {name: settings["replay"][name] for name in names if name not in ignored},
    }


def save_card(trainer: ReplaySFTTrainer, dataset_name: str | None) -> None:
    """Write the model card, and push to the Hub if asked to; local files have no page on the Hub to name."""
    hub_name = None if is_local_file(dataset_name or "") else dataset_name
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).name, dataset_name=hub_name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_name)


def planned_stages(
    training_args: Any, config: FinetuneConfig, steps: int, texts: Iterable[str], eval_dataset: Any
) -> list[PlannedStage]:
    """The stages of a run, and of the unprotected run if there is one, in order."""
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
    """Rows, replay rows included, of the first `step` of `steps` steps, per process and micro-batch."""
    size, objective = training_args.train_batch_size, config.objective
    replay_rows = objective.batch_rows(config, size) if objective.draws_rows and objective.adds_term else 0
    return step * size + replay_rows * max(0.0, step - config.replay_start * steps) / config.replay_every


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
