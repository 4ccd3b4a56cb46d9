"""Do small models trained to saturation forget even with replay? One command; finished runs stay.

python experiments/07_capacity/run.py [--scale laptop|gpu|paper] [--report]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from capacity_report import draw, report  # noqa: E402
from capacity_runs import at_length, at_loss, bases, curve_row, mixture_row, tune, tune_all  # noqa: E402
from capacity_scales import SCALES, Scale  # noqa: E402
from harness import Results  # noqa: E402
from pages import write_results  # noqa: E402

logger = logging.getLogger("experiments")


def run_seed(scale: Scale, seed: int, results: Results) -> None:
    """Lengths of the smallest, then the other sizes, then the frontier."""
    world, smallest = scale.world, scale.smallest
    found = {size: bases(world, size, seed) for size in (smallest,)}
    curve_row(world, smallest, seed, results)
    for length in scale.lengths:
        tune_all(world, at_length(found[smallest], length), smallest, seed, results)
    for size in (one.name for one in world.sizes):
        found[size] = bases(world, size, seed)
        curve_row(world, size, seed, results)
        tune_all(world, at_loss(found[size], scale.same_loss), size, seed, results)
    for length in scale.frontier_lengths:
        for coef in scale.frontier_coefs:
            tune(world, at_length(found[smallest], length), smallest, coef, seed, results)
    for share in scale.shares:
        mixture_row(world, smallest, share, seed, results)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these, e.g. one process each on several cores")
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    scale, results = SCALES[asked.scale], Results(HERE / "results.jsonl", asked.scale)
    seeds = range(scale.seeds) if asked.seeds is None else asked.seeds
    for seed in () if asked.report else seeds:
        run_seed(scale, seed, results)
    rows = [row for row in results.rows.values() if row["bench"] == asked.scale]
    draw(rows, scale, HERE / ("figure.png" if asked.scale == "laptop" else f"figure-{asked.scale}.png"))
    told = report(rows, scale)
    if asked.scale == "laptop":
        write_results(HERE / "README.md", told)
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main()
