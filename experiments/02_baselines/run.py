"""Which way of preventing forgetting forgets least for as much learned? One command; finished runs are skipped.

python experiments/02_baselines/run.py
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from baselines_report import beside_paper, chosen, claims, draw, draw_sources, entries_of, table, verdict  # noqa: E402
from harness import Bench, BenchSettings, Results, Run, finetune, open_bench  # noqa: E402
from methods import REAL, SPECIAL, real_replay  # noqa: E402
from pages import write_results  # noqa: E402
from small_base import CACHE, BaseSettings, load_texts, make_base  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

logger = logging.getLogger("experiments")
RATE, STEPS = 1e-3, 90
SEEDS = (0, 1, 2)


def plan() -> dict[str, list[Run]]:
    """Runs by name of the method; the settings of a method differ in its knobs, seeds come later."""
    plain, lora = Run(learning_rate=RATE, max_steps=STEPS), Run(method="lora", max_steps=STEPS)
    replay = replace(plain, replay_rows=8)
    strengths, ranks, rates = (0.001, 0.01, 0.05, 0.1), (4, 16), (3 * RATE, 10 * RATE)
    return {
        "plain": [plain, replace(plain, learning_rate=RATE / 3), replace(plain, learning_rate=3 * RATE)],
        "kl": [replace(replay, coef=coef) for coef in (1.0, 3.0)],
        "ntp": [replace(replay, objective="ntp", coef=coef) for coef in (1.0, 3.0)],
        **{
            f"{objective} {source}": [replace(replay, objective=objective, coef=coef) for coef in (1.0, 3.0)]
            for source in REAL
            for objective in ("kl", "ntp")
        },
        "replace": [replace(plain, objective="replace", share=0.25)],
        "kl_new": [replace(plain, objective="kl_new", coef=coef) for coef in (0.1, 0.3)],
        "L2-SP": [replace(plain, method="l2_sp", strength=strength) for strength in strengths],
        "interpolation": [replace(plain, method="interpolation")],
        "LoRA": [replace(lora, lora_rank=rank, learning_rate=rate) for rank in ranks for rate in rates],
        "OSF": [replace(plain, method="osf", learning_rate=rate) for rate in (RATE, 3 * RATE)],
        "CorDA": [replace(lora, method="corda", lora_rank=16, learning_rate=rate) for rate in rates],
    }


def make(run: Run, bench: Bench, folder: Path, name: str) -> dict[str, Any]:
    """The run, with replay of the texts that the method is named after, if any; else of the base's own rows."""
    source = name.partition(" ")[2]
    bench = replace(bench, replay=real_replay(source, bench)) if source in REAL else bench
    return SPECIAL.get(run.method, finetune)(run, bench, folder)


def make_plan(bench: Bench, results: Results, scratch: Path) -> None:
    """Every setting with the first seed; each method's best one, and the first plain one, with the others."""
    runs = [(name, run) for name, runs in plan().items() for run in runs]
    make_seed(SEEDS[0], runs, bench, results, scratch)
    entries, _ = entries_of(list(results.rows.values()))
    wanted = [settings_of(replace(run, seed=0), name) for name, run in runs[:1]]
    wanted += [{"name": entry.method, **entry.settings, "seed": 0} for entry in chosen(entries)]
    for seed in SEEDS[1:]:
        make_seed(seed, [pair for pair in runs if settings_of(pair[1], pair[0]) in wanted], bench, results, scratch)


def settings_of(run: Run, name: str) -> dict[str, Any]:
    return {"name": name, **run.settings()}


def make_seed(seed: int, runs: Sequence[tuple[str, Run]], bench: Bench, results: Results, scratch: Path) -> None:
    for name, run in ((name, replace(run, seed=seed)) for name, run in runs):
        settings = settings_of(run, name)
        results.make(settings, lambda run=run, name=name: make(run, bench, scratch, name) | {"name": name})


def report(results: Results, folder: Path) -> str:
    """Table, verdict and figure from what there is; written into the folder, returned."""
    entries, target = entries_of(list(results.rows.values()))
    draw(entries, target, folder / "figure.png")
    draw_sources(entries, target, folder / "sources.png")
    head = f"Target: a new-task loss of {target:.3f} nats per token."
    parts = (head, table(entries), f"**Verdict.** {verdict(entries)}", claims(entries), beside_paper(entries))
    told = "\n\n".join(parts)
    write_results(folder / "README.md", told)
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    only_report = parser.parse_args(arguments).report
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    disable_progress_bar()
    results = Results(HERE / "results.jsonl", "")
    if not only_report:
        texts = load_texts()
        bench = open_bench(make_base(CACHE / "base", texts, BaseSettings()), texts, BenchSettings())
        results = Results(HERE / "results.jsonl", bench.fingerprint)
        make_plan(bench, results, CACHE / "scratch-02")
    sys.stdout.write(report(results, HERE) + "\n")


if __name__ == "__main__":
    main()
