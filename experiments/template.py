"""Does replay lower forgetting of prose? A template: copy it to study_NN_name/run.py, with a README.

Rule, fixed before the runs: forgetting with replay minus without, paired by seed, lies below 0 with its whole 95%
interval; differences of 0.01 nats or less do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.claim import Claim, over_seeds
from experiments.finetunes import BenchSettings, Run, StudyResults, finetune, small_bench
from experiments.pages import NoReport, dots, findings, panels, table
from experiments.program import Report, conduct, seeds_of

HERE = Path(__file__).parent
ARMS = {"plain": 0.0, "replay": 1.0}  # replay coefficients
FINDING = "Replay lowers forgetting"


@dataclass(frozen=True)
class Scale:
    max_steps: int = 60
    seeds: int = 3


SCALES = {"laptop": Scale()}


def make(name: str, seed: int) -> None:
    """The small base, which knows prose, finetuned on Verilog without replay and with it."""
    scale, bench = SCALES[name], small_bench(BenchSettings(seed=seed))
    results = StudyResults(HERE / "results.jsonl", bench.fingerprint)
    for arm, coef in ARMS.items():
        run = Run(coef=coef, max_steps=scale.max_steps, replay_rows=8, seed=seed)
        settings = {"arm": arm, **run.settings()}
        results.make(settings, lambda run=run: finetune(run, bench))


def report(name: str) -> Report:
    """Forgetting at the end of each run, nats per token, and the claim on its difference."""
    every = StudyResults(HERE / "results.jsonl", "").rows.values()
    rows = sorted(every, key=lambda row: row["settings"]["seed"])
    ends = [(row["settings"]["arm"], row["trajectory"][-1]["retention/prose/forgetting"]) for row in rows]
    lost = {arm: [value for one, value in ends if one == arm] for arm in ARMS}
    if min(map(len, lost.values())) < 2 or len(set(map(len, lost.values()))) > 1:
        raise NoReport("fewer than two seeds, or not every arm of each, are made yet")
    claim = Claim([a - b for a, b in zip(lost["replay"], lost["plain"], strict=True)], direction=-1, margin=0.01)
    found = {arm: over_seeds(values) for arm, values in lost.items()}

    def draw(path: Path) -> None:
        with panels(path, 1, (5.0, 1.8)) as (axes,):
            dots(axes, found)
            axes.set_xlabel("forgetting, nats per token")

    answer = findings({FINDING: (claim.verdict, f"{claim.interval} nats per token, {len(lost['plain'])} seeds")})
    return f"{table(('arm', 'forgetting'), found.items())}\n\n{answer}", draw


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=seeds_of, make=make, report=report, prepare=lambda name: small_bench(),
        arguments=arguments,
    )  # fmt: skip
