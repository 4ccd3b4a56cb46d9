"""`retain finetune --dry_run`: what a run is made of and what it would take, by a few steps of it; nothing is kept."""

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

from retain.cli.finetune_data import POOL
from retain.progress import duration, progress_line
from retain.replay.fisher import FISHER, FISHER_TOKENS
from retain.report.numbers import quantity
from retain.sampling.engine import choose_batch_size, draw_rows
from retain.training.anchor import Anchor
from retain.training.protection import ONE_STEP, check_replay_every
from retain.training.protection_choice import rows_drawn
from retain.training.step_line import StepTimer
from retain.training.trainer_checks import expected_steps

TRIED_STEPS = 3  # that are made of each run; all but the first are timed
TRIED_DOCUMENTS = 2  # of each text that are measured
DRAWN_TOKENS = 16  # of each row of a batch that is drawn to time it
SCRATCH: dict[str, Any] = {
    "max_steps": TRIED_STEPS, "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no",
    "eval_on_start": False, "report_to": [], "push_to_hub": False, "load_best_model_at_end": False,
    "metric_for_best_model": None, "resume_from_checkpoint": None, "disable_tqdm": True,
}  # fmt: skip


@dataclass
class Cost:
    """By a few steps: seconds of one, seconds to measure, those of the whole pool's Fisher information, and bytes."""

    step: float
    measuring: float
    fisher: float
    memory: int


def dry_run(
    given: Any,
    config: Any,
    make_trainer: Callable[[Any, Any], Any],
    to_sample: Callable[[int], dict[str, int]],
    say: Callable[[object], None],
) -> None:
    """Say what a run is made of, and how long it would take.

    Args:
        given: the arguments of the run, which stay as they are.
        config: what protects and measures it.
        make_trainer: makes the trainer of arguments and config.
        to_sample: takes the number of steps; rows that the run samples first, by folder.
    """
    few = {"retention_max_documents": TRIED_DOCUMENTS, "compare_plain": False, "replay_start": 0.0, "replay_every": 1}
    in_steps = max(1, rows_drawn(replace(config, **few), given.training, TRIED_STEPS))
    tried = {}
    if config.protects:
        tried["protected"] = replace(config, **few, replay_num_rows=in_steps)
        tried["protected"].chosen = config.chosen
    tried["unprotected"] = replace(config, **few).unprotected()
    costs: dict[str, Cost] = {}
    for name, settings in tried.items():
        if costs:
            say(f"{TRIED_STEPS} steps without protection, to compare")
        with tempfile.TemporaryDirectory(prefix="retain-dry-run-") as folder, progress_line(shown=False) as timed:
            trainer = make_trainer(scratch_arguments(given, folder), settings)
            if not costs:
                steps = expected_steps(given.training, trainer.train_dataset)
                if settings.chosen is not None:  # by what the model is
                    config.choose(settings.chosen, given.training.train_batch_size, steps)
                check_replay_every(config, steps)  # the few steps have replay each
                rows = to_sample(steps)
                for line in (*device_lines(trainer), *row_lines(trainer)):
                    say(line)
                if config.objective.uses_reference and steps == 1:
                    say(ONE_STEP)
                elif config.chosen is not None and config.protects:
                    say(config.chosen.line())
                length = config.replay_max_length or trainer.args.max_length
                drawing = sum(seconds_to_draw(trainer.model, number, length) for number in rows.values())
                pool_tokens = rows[POOL] * (length - 1) if POOL in rows else None
            fisher = seconds_of_fisher(trainer.replay.anchor, timed.pace.get(FISHER, 0.0), pool_tokens)
            costs[name] = cost_of(trainer, fisher)
            del trainer
            release_memory()
    if draws := rows_drawn(config, given.training, steps):
        pool = f", of a pool of {rows['replay']:,}" if "replay" in rows else ""
        say(f"replay: the run draws {quantity(draws, 'row')}{pool}")
    for line in cost_lines(given.training, config, costs, steps, drawing):
        say(line)


def scratch_arguments(given: Any, folder: str) -> Any:
    """The same arguments for a few steps in another folder."""
    found = given._replace(training=copy.deepcopy(given.training), script=copy.deepcopy(given.script))
    for name, value in {**SCRATCH, "output_dir": folder}.items():
        setattr(found.training, name, value)
    return found


def device_lines(trainer: Any) -> Iterator[str]:
    """Where and in which precision a run computes."""
    device, precision = trainer.args.device, trainer.accelerator.mixed_precision
    name = "" if device.type == "cpu" else f" ({torch.get_device_module(device).get_device_name(device)})"
    mixed = "" if precision == "no" else f", computing in {precision}"
    yield f"device: {device}{name}, weights in {str(trainer.model.dtype).removeprefix('torch.')}{mixed}"


def row_lines(trainer: Any) -> Iterator[str]:
    """How long the new rows are, and how much of them is predicted."""
    dataset, limit = trainer.train_dataset, trainer.args.max_length
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        yield "new rows: a stream, or not tokenised before training"
        return
    lengths = np.array([len(row) for row in dataset["input_ids"]])
    labels = dataset["labels" if "labels" in dataset.column_names else "input_ids"]
    counted = sum(label != -100 for row in labels for label in row[1:]) / max(1, lengths.sum() - len(lengths))
    cut = f", {np.mean(lengths >= limit):.0%} as long as max_length {limit:,} or cut there" if limit else ""
    yield (
        f"new rows: {quantity(len(lengths), 'row')} of {lengths.min():,} to {lengths.max():,} tokens (median "
        f"{np.median(lengths):,.0f}){cut}; {counted:.0%} of their tokens are predicted"
    )
    held_out = "none; what is learned is read from the training loss" if trainer.eval_dataset is None else "given"
    yield f"held-out rows of the new task: {held_out}"


def seconds_to_draw(model: Any, num_rows: int, length: int) -> float:
    """Time to sample rows, by the first tokens of a batch."""
    batch = min(num_rows, choose_batch_size(model, length))
    positions = min(DRAWN_TOKENS, length)
    for tokens in (2, positions):  # the first proves the cache, once
        began = time.monotonic()
        draw_rows(model, [[0]] * batch, range(batch), tokens, 0)
    return (time.monotonic() - began) / (positions - 1) * (length - 1) * math.ceil(num_rows / batch)


def seconds_of_fisher(anchor: Anchor | None, reading: float, pool_tokens: int | None) -> float:
    """Seconds of the Fisher information: reading rows takes longer the more there are, the eigenvectors do not.

    Args:
        anchor: of the few rows that were tried.
        reading: seconds of `anchor.seconds` in which these were read.
        pool_tokens: predictions in the run's pool; None where the rows that were tried are that pool.
    """
    if anchor is None:
        return 0.0
    tokens = anchor.num_tokens if pool_tokens is None else min(FISHER_TOKENS, pool_tokens)
    return anchor.seconds + reading * (tokens / anchor.num_tokens - 1)


def cost_of(trainer: Any, fisher: float) -> Cost:
    """Make a few steps."""
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.remove_callback(PrinterCallback)  # of dictionaries
    device = trainer.args.device
    on_it = None if device.type == "cpu" else torch.get_device_module(device)
    if on_it:
        on_it.reset_peak_memory_stats(device)
    trainer.train()
    memory = on_it.max_memory_allocated(device) if on_it else psutil.Process().memory_info().rss
    began = time.monotonic()
    if trainer.replay.documents:
        trainer.evaluate_retention()
        trainer.report("")
    return Cost(timer.mean or 0.0, time.monotonic() - began, fisher, memory)


def cost_lines(args: Any, config: Any, costs: dict[str, Cost], steps: int, drawing: float) -> Iterator[str]:
    """Memory, the price of a step, and how long the whole would take."""
    last = costs.get("protected", costs["unprotected"])
    yield f"memory: {last.memory / 1e9:.1f} GB in training, by {TRIED_STEPS} steps (longer rows may need more)"
    plain = costs["unprotected"].step
    if "protected" in costs and plain:
        yield f"a step: {last.step:.3g} s with replay, {last.step / plain:.2f} times an unprotected one's {plain:.3g} s"
    elif plain:
        yield f"a step: {plain:.3g} s"
    share = (1 - config.replay_start) / config.replay_every if config.objective.draws_rows else 1.0
    training = steps * (share * last.step + (1 - share) * plain)
    measuring = last.measuring / TRIED_DOCUMENTS * config.retention_max_documents
    parts = {
        "sampling": drawing,
        "Fisher information": last.fisher,
        "training": training,
        "measuring": measuring,
    }
    if config.compare_plain:
        parts["the unprotected run"] = steps * plain + measuring
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    evaluated = "" if args.eval_strategy == "no" else ", without evaluations on the way"
    yield f"the run: about {duration(sum(parts.values()))} for {quantity(steps, 'step')}{evaluated} ({listed})"
