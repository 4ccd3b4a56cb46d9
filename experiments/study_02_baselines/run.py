"""Which way of preventing forgetting forgets least for as much learned? One command; finished runs are skipped.

python -m experiments 02 [--runs 0 1] [--report]

Rule. Plain finetuning at 1e-3 runs to its end with three seeds; the target is the new-task loss at which it has made
75% of its gain. Every other run is read where it crosses the target, linear between evaluations, or has not reached it
in its steps. `settings.plan` lists the settings of every method; all run with seed 0. Two more seeds go to every rate
of plain's, and to each method's setting with the least ref_kl on prose at the target, at any rate and at plain's. A
method counts with its best setting on the measure that is asked. A verdict is the sign of the 95% interval of what one
method has less than another, paired by seed: the wider of Student's t over seeds and the bootstrap over documents.

Added on 2026-11-29, before its runs: EWC, EAFT, STM, a tenth of plain's rate, the anchor alone and with KL (from a
fifth of the 90 steps on, or from the start); and the question why OSF and LoRA forget more than plain finetuning. They
leave the embeddings, which are the output head, too, frozen. So plain finetuning with frozen embeddings and of nothing
but them, and OSF and LoRA that train them, too, run at plain's rate (up to 270 steps) and at three times it. Frozen
embeddings are the reason if, all at plain's rate, OSF (LoRA) forgets less with trained ones and then not more than
plain finetuning; in part, if then still more; not the reason, if it does not forget less. `report.AT_PLAINS_RATE` and
`report.AT_BEST` are the other claims. The base of the first runs is gone, and one that is made on other hardware
differs in rounding: runs of different bases are never compared. Plain finetuning, KL, L2-SP, LoRA and OSF run again on
the new one. Claims are made of settings with several seeds.

Changed once seed 0 of EWC up to 100 and of the anchor up to 20 was seen: EWC was best at the largest strength, and the
anchor was at the target in 14 steps, before late replay would have begun. So EWC of 300, EWC of 100 at three times the
rate, and anchors of 100 and 200, were added, and KL beside an anchor of 100.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from experiments.corpora import CACHE, Texts
from experiments.finetunes import Bench, Run, StudyResults, finetune, open_bench
from experiments.matched_loss import target_loss
from experiments.pages import NoReport
from experiments.program import Report, conduct
from experiments.small_base import BaseSettings, make_base
from experiments.study_02_baselines.methods import REAL, SPECIAL, real_replay
from experiments.study_02_baselines.report import (
    GAIN,
    chosen,
    draw,
    draw_sources,
    entries_of,
    text_of,
)
from experiments.study_02_baselines.settings import SCALES, Scale, plan
from retain.replay.stored_fisher import FISHER_FILE, store_fisher

HERE = Path(__file__).parent


def settings_of(name: str, run: Run) -> dict[str, Any]:
    return {"name": name, **run.settings()}


def runs_of(scale: Scale) -> list[tuple[str, Run]]:
    """Every setting of every method, with its name, at every seed; those of a seed lie together."""
    runs = [(name, run) for name, found in plan(scale).items() for run in found]
    return [(name, replace(run, seed=seed)) for seed in range(scale.seeds) for name, run in runs]


def references(scale: Scale) -> range:
    """The first plain run at every seed: they say at which new-task loss all are compared, and where the others end."""
    return range(0, len(runs_of(scale)), len(runs_of(scale)) // scale.seeds)


def first_seed(name: str) -> range:
    """Every setting once."""
    return range(references(SCALES[name]).step)


def other_seeds(name: str) -> list[int]:
    """Each method's best setting, as it shows by then."""
    entries, _ = entries_of(rows_of(name, bench_of(name).fingerprint))
    wanted = [{"name": entry.method, **entry.settings, "seed": 0} for entry in chosen(entries)]
    found = enumerate(runs_of(SCALES[name]))
    return [at for at, (method, run) in found if run.seed and settings_of(method, replace(run, seed=0)) in wanted]


def rows_of(name: str, bench: str) -> list[dict[str, Any]]:
    """What there is of a base, in the order of the plan: the study's plain run comes first."""
    places = {as_key(settings_of(method, run)): at for at, (method, run) in enumerate(runs_of(SCALES[name]))}
    rows = StudyResults(HERE / "results.jsonl", bench).rows_with()
    return sorted(rows, key=lambda row: places.get(as_key(row["settings"]), len(places)))


def as_key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


@cache
def texts_of(name: str) -> Texts:
    return SCALES[name].texts()


@cache
def bench_of(name: str) -> Bench:
    """The small base, made on first use, with the scale's data."""
    texts = texts_of(name)
    bench = open_bench(make_base(CACHE / "base", texts, BaseSettings()), texts, SCALES[name].bench)
    if not (Path(bench.replay.source) / FISHER_FILE).exists():
        store_fisher(bench.base(), bench.replay)  # of all anchors
    return bench


def make(name: str, place: int) -> dict[str, Any]:
    """A run, with replay of the texts that its method is named after, if any; else of the base's own rows.

    It ends at the first evaluation at which it has learned enough; a reference, or a walk back from the end of
    one, goes all the way.
    """
    method, run = runs_of(SCALES[name])[place]
    bench, source, plain = bench_of(name), method.partition(" ")[2], references(SCALES[name])

    def compute() -> dict[str, Any]:
        own = replace(bench, replay=real_replay(source, bench, texts_of(name))) if source in REAL else bench
        end = None if place in plain else target_loss([make(name, one) for one in plain], GAIN)
        return SPECIAL.get(run.method, finetune)(run, own, end) | {"name": method}

    return StudyResults(HERE / "results.jsonl", bench.fingerprint).make(settings_of(method, run), compute)


def report(name: str) -> Report:
    """Table, verdict and figures from what there is, of each base apart."""
    rows = StudyResults(HERE / "results.jsonl", "").rows.values()
    bases = [entries_of(rows_of(name, bench)) for bench in dict.fromkeys(row["bench"] for row in rows)]
    if not bases:
        raise NoReport("no run is made yet")

    def all_figures(path: Path) -> None:
        draw_sources(*bases[0], path.with_name(path.name.replace("figure", "sources")))
        for number, found in enumerate(bases, 1):
            draw(*found, path if number == 1 else path.with_name(path.name.replace("figure", f"figure-{number}")))

    return "\n\n".join(f"### Base {number}\n\n{text_of(*found)}" for number, found in enumerate(bases, 1)), all_figures


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=references, then=(first_seed, other_seeds), make=make, report=report,
        only="runs", prepare=bench_of, arguments=arguments,
    )  # fmt: skip
