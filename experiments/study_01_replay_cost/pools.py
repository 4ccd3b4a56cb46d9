"""How many distinct replay rows does a long run need? `python -m experiments 01 --parts pools`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.claim import Interval
from experiments.finetunes import BenchSettings, Run, StudyResults, make_all, small_bench
from experiments.matched_loss import Reading, mean_of, prevented, read_at, target_loss
from experiments.pages import dress, panels, table
from experiments.program import Report
from retain.report.results import series
from retain.report.style import MARKS, PALETTE

HERE = Path(__file__).parent

STEPS, ROWS, LENGTH, GAIN = 1024, 32, 32, 0.95
DRAWN = STEPS * ROWS
POOLS = (64, 512, 4096, DRAWN)
PLAIN = Run(learning_rate=1e-3, max_steps=STEPS, batch_size=16, eval_steps=64)
REPLAY = replace(PLAIN, coef=1.0, replay_rows=ROWS, replay_length=LENGTH)
TEXTS = {"prose": "held-out prose", "self-generated": "held-out own rows"}


def runs(seed: int) -> list[Run]:
    """A plain run and one for every size of the pool; the last draws no row twice."""
    return [replace(PLAIN, seed=seed), *(replace(REPLAY, pool=pool, seed=seed) for pool in POOLS)]


def last(row: dict[str, Any]) -> Reading:
    """A run at its last step."""
    found = read_at(row, series(row["trajectory"], "eval_loss")[1][-1])
    assert found is not None
    return found


def by_pool(rows: Sequence[dict[str, Any]]) -> dict[int, dict[int, dict[str, Any]]]:
    """Rows by pool (0: plain) and seed."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["settings"].get("pool", 0), {})[row["settings"].get("seed", 0)] = row
    return dict(sorted(found.items()))


def readings(rows: Sequence[dict[str, Any]]) -> tuple[float, dict[int, list[tuple[Reading, Reading]]]]:
    """The target loss, and every pool's runs (at the target, at the end), over the seeds that all have."""
    groups = by_pool(rows)
    seeds = sorted(set.intersection(*(set(group) for group in groups.values())))
    target = target_loss([groups[0][seed] for seed in seeds], GAIN)
    found = {}
    for pool, group in groups.items():
        pairs = [(read_at(group[seed], target), last(group[seed])) for seed in seeds]
        found[pool] = [(at, end) for at, end in pairs if at is not None]
        if len(found[pool]) < len(pairs):
            raise ValueError(f"pool {pool}: the target loss was not reached; take a lower GAIN")
    return target, found


def kept(found: dict[int, list[tuple[Reading, Reading]]], pool: int, when: int, text: str) -> Interval:
    """The share of the plain runs' ref_kl that a pool prevented, at the target (0) or at the end (1)."""
    return prevented([pair[when] for pair in found[pool]], [pair[when] for pair in found[0]], text, "ref_kl")


HEAD = (
    "rows in the pool", "each drawn", "at the same loss: ref_kl prose", "prevented", "steps",
    "at the end: ref_kl prose", "prevented", "prevented, own rows",
)  # fmt: skip


def table_of_pools(found: dict[int, list[tuple[Reading, Reading]]]) -> str:
    lines = []
    for pool, pairs in found.items():
        starts, ends = ([pair[when] for pair in pairs] for when in (0, 1))
        steps = sum(reading.step for reading in starts) / len(starts)
        cells = [str(mean_of(starts, "prose", "ref_kl")), "–", f"{steps:.0f}", str(mean_of(ends, "prose", "ref_kl"))]
        if pool:
            cells[1] = kept(found, pool, 0, "prose").percent()
        more = [kept(found, pool, 1, text).percent() for text in TEXTS] if pool else ["–", "–"]
        name = [pool, f"{DRAWN / pool:g} times"] if pool else ["none (plain)", ""]
        lines.append([*name, *cells, *more])
    return table(HEAD, lines, "---")


def verdict(found: dict[int, list[tuple[Reading, Reading]]]) -> str:
    """The smallest pool whose share prevented at the end is no more than two points below that of fresh rows."""
    sentences = []
    fresh = max(found)
    for when, words in ((0, "at the same new-task loss"), (1, f"after {STEPS} steps")):
        best = kept(found, fresh, when, "prose").value
        enough = [pool for pool in found if pool and best - kept(found, pool, when, "prose").value <= 0.02]
        lost = best - kept(found, min(pool for pool in found if pool), when, "prose").value
        sentences.append(
            f"{words} {min(enough)} rows prevent as much as {fresh} drawn once ({best:.1%}) to within two points, and "
            f"{min(pool for pool in found if pool)} rows lose {100 * lost:.1f} points"
        )
    return f"**Verdict: {'; '.join(sentences)}. Seeds: {len(found[fresh])}.**"


def draw(found: dict[int, list[tuple[Reading, Reading]]], path: Path) -> None:
    pools = [pool for pool in found if pool]
    with panels(path, 2, (9.6, 4.0)) as both:
        for axes, (when, words) in zip(
            both, enumerate(("at the same new-task loss", f"after {STEPS} steps")), strict=True
        ):
            for at, (text, name) in enumerate(TEXTS.items()):
                values = [kept(found, pool, when, text) for pool in pools]
                arms = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
                axes.errorbar(
                    pools, [v.value for v in values], yerr=arms, color=PALETTE[at], marker=MARKS[at], label=name
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(pools, [f"{pool:,}" for pool in pools])
            axes.tick_params(axis="x", labelsize=8)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            dress(
                axes,
                words.capitalize(),
                "distinct replay rows (the last: none twice)",
                "ref_kl prevented" if not when else "",
            )
        both[0].legend(loc="lower right")


def make_runs(seeds: Sequence[int] = (0,)) -> None:
    bench = small_bench(BenchSettings(replay_rows=DRAWN))
    results = StudyResults(HERE / "results-pools.jsonl", bench.fingerprint)
    make_all([run for seed in seeds for run in runs(seed)], bench, results)


def report() -> Report:
    """Table, verdict and figure from what there is."""
    target, found = readings(list(StudyResults(HERE / "results-pools.jsonl", "").rows.values()))
    head = f"Target new-task loss: {target:.3f} nats per token."
    return f"{head}\n\n{table_of_pools(found)}\n\n{verdict(found)}", lambda path: draw(found, path)
