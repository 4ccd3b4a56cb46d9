"""Is the best half-life of Adam's second moment constant in tokens over batch sizes? One command; finished runs stay.

python -m experiments 11 [--report]
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.corpora import CACHE
from experiments.finetunes import StudyResults
from experiments.program import Report, conduct
from experiments.study_11_batch_size.cells import Member, train_together
from experiments.study_11_batch_size.report import draw, text_of
from retain.lab.pretrain import PretrainArguments, PretrainConfig, open_corpus
from retain.lab.runner import run_key
from retain.training.beta2_half_life import beta2_of_half_life

HERE = Path(__file__).parent

SEEDS_TOGETHER = 3
LONGEST_STEP = 8  # half-lives: beta2 is .004 there


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the study takes.

    Half-lives go up from that of `first_beta2` at one row a step by the factor between batch sizes, so that a fixed
    beta2 is a diagonal of the same grid. The rates are of one row a step; others have them times √rows.
    """

    corpus: str = "synthetic"
    model_size: str = "5000"
    num_states: int = 32
    vocab_size: int = 128
    branching: int = 4
    max_length: int = 16
    tokens: float = 2**19
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    factor: int = 4
    first_beta2: float = 0.9576
    half_lives: int = 7
    rates: tuple[float, ...] = (5.5e-4, 1.5e-3, 4e-3, 1e-2, 2.7e-2)
    seeds: int = 5
    eval_rows: int = 2048
    compiled: bool = True

    def config(self) -> PretrainConfig:
        return PretrainConfig(
            corpus=self.corpus, model_size=self.model_size, num_states=self.num_states, vocab_size=self.vocab_size,
            branching=self.branching, max_length=self.max_length, eval_rows=self.eval_rows,
        )  # fmt: skip

    def half_lives_at(self, batch_size: int) -> list[float]:
        """Tokens, the same at every batch size but for those far below a step, at which nothing is remembered."""
        least = min(self.batch_sizes) * self.max_length * math.log(0.5) / math.log(self.first_beta2)
        every = [round(least * self.factor**place, 3) for place in range(self.half_lives)]
        return [one for one in every if batch_size * self.max_length <= LONGEST_STEP * one]


SCALES = {"laptop": Scale()}


def arguments(scale: Scale, batch_size: int, folder: Path) -> PretrainArguments:
    """Those of `retain pretrain`: AdamW, cosine after warm-up, clipping; rate, beta2 and seed are the cell's."""
    return PretrainArguments(
        output_dir=str(folder), max_steps=round(scale.tokens / batch_size / scale.max_length),
        per_device_train_batch_size=batch_size, eval_strategy="no", logging_strategy="no", save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip


def facts(scale: Scale, batch_size: int, half_life: float, losses: Sequence[float]) -> dict[str, Any]:
    """What a row says: held-out losses in the order of its seeds, None where one diverged."""
    step = batch_size * scale.max_length
    found = [round(loss, 5) if math.isfinite(loss) else None for loss in losses]
    return {"losses": found, "beta2": beta2_of_half_life(half_life, step), "num_steps": round(scale.tokens / step),
            "device": f"CPU, {torch.get_num_threads()} threads"}  # fmt: skip


def make_rows(scale: Scale, rows: Sequence[dict[str, Any]], fixed: dict[str, Any], results: StudyResults) -> None:
    """Rows of one batch size and the same seeds, by one ensemble."""
    batch_size, seeds = rows[0]["batch_size"], rows[0]["seeds"]
    members = [Member(row["half_life"], row["learning_rate"], seed) for row in rows for seed in seeds]
    corpora = {seed: open_corpus(scale.config(), seed) for seed in seeds}
    name = run_key({"members": [asdict(member) for member in members], **fixed}, str(batch_size))
    args, began = arguments(scale, batch_size, CACHE / f"ensemble-{name}"), time.process_time()
    trained = train_together(members, corpora, args, scale.model_size, Path(args.output_dir), scale.compiled)
    spent = {"processor_seconds": round((time.process_time() - began) / len(rows), 2)}  # an equal part
    for at, row in enumerate(rows):
        mine = trained.losses[at * len(seeds) : (at + 1) * len(seeds)]
        results.make(row, lambda row=row, mine=mine: facts(scale, batch_size, row["half_life"], mine) | spent)


def cells(scale: Scale, batch_size: int) -> list[dict[str, Any]]:
    """Every half-life with every rate."""
    rates = [round(rate * math.sqrt(batch_size), 6) for rate in scale.rates]
    return [
        {"batch_size": batch_size, "half_life": half_life, "learning_rate": rate}
        for half_life in scale.half_lives_at(batch_size)
        for rate in rates
    ]


def fixed_of(scale: Scale) -> dict[str, Any]:
    """What all rows of a scale have in common."""
    own = ("seeds", "batch_sizes", "factor", "first_beta2", "half_lives", "rates", "compiled")
    return {name: value for name, value in asdict(scale).items() if name not in own}


def make(name: str, batch_size: int) -> None:
    """All runs of a batch size, with some seeds as one ensemble: a row for each half-life and rate."""
    scale, results = SCALES[name], StudyResults(HERE / "results.jsonl", name)
    fixed = fixed_of(scale)
    for first in range(0, scale.seeds, SEEDS_TOGETHER):
        seeds = list(range(first, min(first + SEEDS_TOGETHER, scale.seeds)))
        rows = [cell | {"seeds": seeds} | fixed for cell in cells(scale, batch_size)]
        if todo := [row for row in rows if results.get(row) is None]:
            make_rows(scale, todo, fixed, results)


def report(name: str) -> Report:
    rows = StudyResults(HERE / "results.jsonl", name).rows_with(fixed_of(SCALES[name]))
    return text_of(rows), lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=lambda scale: scale.batch_sizes, make=make, report=report, only="batch_sizes",
        arguments=arguments,
    )  # fmt: skip
