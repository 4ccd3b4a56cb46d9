"""`retain finetune --dry_run`: describe a run and estimate its time and memory from a few steps; nothing is kept."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import release_memory
from transformers import PrinterCallback

from retain.cli.finetune_data import POOL, TrlArguments
from retain.progress import duration, progress_line
from retain.replay.stored_fisher import FISHER, FISHER_TOKENS
from retain.report.numbers import quantity
from retain.sampling.engine import choose_batch_size, draw_rows
from retain.training.anchor import Anchor
from retain.training.protection import ONE_STEP, check_replay_every
from retain.training.protection_choice import rows_drawn
from retain.training.step_line import StepTimer
from retain.training.trainer_checks import expected_steps

TRIED_STEPS = 3  # steps of each run; all but the first are timed
TRIED_DOCUMENTS = 2  # measured of each text
DRAWN_TOKENS = 16  # sampled of each row of a batch, to time sampling
SCRATCH: dict[str, Any] = {
    "max_steps": TRIED_STEPS, "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no",
    "eval_on_start": False, "report_to": [], "push_to_hub": False, "load_best_model_at_end": False,
    "metric_for_best_model": None, "resume_from_checkpoint": None, "disable_tqdm": True,
}  # fmt: skip


@dataclass
class Cost:
    """Cost of a run: seconds per step, seconds to measure, seconds of the Fisher information, bytes of memory."""

    step: float
    measuring: float
    fisher: float
    memory: int


def dry_run(
    trl_args: TrlArguments,
    config: Any,
    make_trainer: Callable[[Any, Any], Any],
    rows_to_sample: Callable[[int], dict[str, int]],
    say: Callable[[object], None],
) -> None:
    """Print what a run consists of, and how long it would take.

    Args:
        trl_args: the arguments of the run, which are not changed.
        config: the settings that protect and measure it.
        make_trainer: (arguments, config) -> trainer.
        rows_to_sample: number of steps -> number of rows that the run samples first, by folder.
        say: prints a line.
    """
    small = {"retention_max_documents": TRIED_DOCUMENTS, "compare_plain": False, "replay_start": 0.0, "replay_every": 1}
    num_rows = max(1, rows_drawn(replace(config, **small), trl_args.training, TRIED_STEPS))
    tried = {}
    if config.protects:
        tried["protected"] = replace(config, **small, replay_num_rows=num_rows)
        tried["protected"].chosen = config.chosen
    tried["unprotected"] = replace(config, **small).unprotected()
    costs: dict[str, Cost] = {}
    for name, settings in tried.items():
        if costs:
            say(f"{TRIED_STEPS} steps without protection, to compare")
        with tempfile.TemporaryDirectory(prefix="retain-dry-run-") as folder, progress_line(shown=False) as timed:
            trainer = make_trainer(scratch_arguments(trl_args, folder), settings)
            if not costs:
                steps = expected_steps(trl_args.training, trainer.train_dataset)
                if settings.chosen is not None:  # it depends on the model
                    config.choose(settings.chosen, trl_args.training.train_batch_size, steps)
                check_replay_every(config, steps)  # the tried steps replay every step
                rows = rows_to_sample(steps)
                for line in (*device_lines(trainer), *row_lines(trainer)):
                    say(line)
                if config.objective.uses_reference and steps == 1:
                    say(ONE_STEP)
                elif config.chosen is not None and config.protects:
                    say(config.chosen.line())
                length = config.replay_max_length or trainer.args.max_length
                sampling_seconds = sum(seconds_to_draw(trainer.model, number, length) for number in rows.values())
                pool_tokens = rows[POOL] * (length - 1) if POOL in rows else None
            fisher = seconds_of_fisher(trainer.replay.anchor, timed.pace.get(FISHER, 0.0), pool_tokens)
            costs[name] = measured_cost(trainer, fisher)
            del trainer
            release_memory()
    if draws := rows_drawn(config, trl_args.training, steps):
        pool = f", of a pool of {rows[POOL]:,}" if POOL in rows else ""
        say(f"replay: the run draws {quantity(draws, 'row')}{pool}")
    for line in cost_lines(trl_args.training, config, costs, steps, sampling_seconds):
        say(line)


def scratch_arguments(trl_args: TrlArguments, folder: str) -> TrlArguments:
    """A copy of the arguments for a few steps in `folder`."""
    scratch = trl_args._replace(training=copy.deepcopy(trl_args.training), script=copy.deepcopy(trl_args.script))
    for name, value in {**SCRATCH, "output_dir": folder}.items():
        setattr(scratch.training, name, value)
    return scratch


def device_lines(trainer: Any) -> Iterator[str]:
    """The device and precision of a run."""
    device, precision = trainer.args.device, trainer.accelerator.mixed_precision
    name = "" if device.type == "cpu" else f" ({torch.get_device_module(device).get_device_name(device)})"
    mixed = "" if precision == "no" else f", computing in {precision}"
    yield f"device: {device}{name}, weights in {str(trainer.model.dtype).removeprefix('torch.')}{mixed}"


def row_lines(trainer: Any) -> Iterator[str]:
    """The lengths of the new rows, and the share of their tokens that is predicted."""
    dataset, limit = trainer.train_dataset, trainer.args.max_length
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        yield "new rows: a stream, or not tokenised before training"
        return
    lengths = np.array([len(row) for row in dataset["input_ids"]])
    labels = dataset["labels" if "labels" in dataset.column_names else "input_ids"]
    predicted = sum(label != -100 for row in labels for label in row[1:]) / max(1, lengths.sum() - len(lengths))
    cut = f", {np.mean(lengths >= limit):.0%} as long as max_length {limit:,} or cut there" if limit else ""
    yield (
        f"new rows: {quantity(len(lengths), 'row')} of {lengths.min():,} to {lengths.max():,} tokens (median "
        f"{np.median(lengths):,.0f}){cut}; {predicted:.0%} of their tokens are predicted"
    )
    held_out = "none; what is learned is read from the training loss" if trainer.eval_dataset is None else "given"
    yield f"held-out rows of the new task: {held_out}"


def seconds_to_draw(model: Any, num_rows: int, length: int) -> float:
    """Estimated time to sample rows, from the first tokens of one batch."""
    batch = min(num_rows, choose_batch_size(model, length))
    positions = min(DRAWN_TOKENS, length)
    for tokens in (2, positions):  # the first call also proves the cache, once
        began = time.monotonic()
        draw_rows(model, [[0]] * batch, range(batch), tokens, 0)
    return (time.monotonic() - began) / (positions - 1) * (length - 1) * math.ceil(num_rows / batch)


def seconds_of_fisher(anchor: Anchor | None, reading: float, pool_tokens: int | None) -> float:
    """Estimated seconds of the Fisher information: reading rows scales with their number, the eigenvectors do not.

    Args:
        anchor: the anchor of the tried rows.
        reading: the part of `anchor.seconds` spent reading rows.
        pool_tokens: predictions in the run's pool; None if the tried rows are that pool.
    """
    if anchor is None:
        return 0.0
    tokens = anchor.num_tokens if pool_tokens is None else min(FISHER_TOKENS, pool_tokens)
    return anchor.seconds + reading * (tokens / anchor.num_tokens - 1)


def measured_cost(trainer: Any, fisher: float) -> Cost:
    """Train and measure a few steps; return their cost."""
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries
    device = trainer.args.device
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    if accelerator:
        accelerator.reset_peak_memory_stats(device)
    trainer.train()
    memory = accelerator.max_memory_allocated(device) if accelerator else psutil.Process().memory_info().rss
    began = time.monotonic()
    if trainer.replay.documents:
        trainer.evaluate_retention()
        trainer.report("")
    return Cost(timer.mean or 0.0, time.monotonic() - began, fisher, memory)


def cost_lines(args: Any, config: Any, costs: dict[str, Cost], steps: int, sampling_seconds: float) -> Iterator[str]:
    """Memory, time per step, and the estimated time of the whole run."""
    cost = costs.get("protected", costs["unprotected"])
    yield f"memory: {cost.memory / 1e9:.1f} GB in training, by {TRIED_STEPS} steps (longer rows may need more)"
    plain = costs["unprotected"].step
    if "protected" in costs and plain:
        yield f"a step: {cost.step:.3g} s with replay, {cost.step / plain:.2f} times an unprotected one's {plain:.3g} s"
    elif plain:
        yield f"a step: {plain:.3g} s"
    # without replay an anchored step still has the anchor: it is priced as one with replay, at most that much too high
    only_some = config.objective.draws_rows and not config.anchor_coef
    share = (1 - config.replay_start) / config.replay_every if only_some else 1.0
    training = steps * (share * cost.step + (1 - share) * plain)
    measuring = cost.measuring / TRIED_DOCUMENTS * config.retention_max_documents
    parts = {
        "sampling": sampling_seconds,
        "Fisher information": cost.fisher,
        "training": training,
        "measuring": measuring,
    }
    if config.compare_plain:
        parts["the unprotected run"] = steps * plain + measuring
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    evaluations = "" if args.eval_strategy == "no" else ", without evaluations on the way"
    yield f"the run: about {duration(sum(parts.values()))} for {quantity(steps, 'step')}{evaluations} ({listed})"
