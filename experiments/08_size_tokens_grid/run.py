"""How does forgetting depend on size and tokens per parameter together, and how much pretraining does it undo?

python experiments/08_size_tokens_grid/run.py [--scale laptop|gpu|paper] [--report]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEVENTH = HERE.parent / "07_capacity"
sys.path[:0] = [str(HERE.parent), str(SEVENTH), str(HERE)]

import torch  # noqa: E402
from capacity_runs import World, at_length, bases, curve_row, tune_all  # noqa: E402
from capacity_scales import SCALES as CAPACITY  # noqa: E402
from grid_report import draw, report  # noqa: E402
from harness import Results  # noqa: E402
from pages import write_results  # noqa: E402

logger = logging.getLogger("experiments")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Tokens per parameter of the grid; sizes and how far each goes are the world's."""

    world: World
    lengths: tuple[float, ...]
    seeds: int = 3

    @property
    def cells(self) -> list[tuple[str, float]]:
        return [(size.name, at) for size in self.world.sizes for at in self.lengths if at <= size.most * 1.001]


TENS = (10, 31.6228, 100, 316.2278, 1000)
SCALES = {
    "laptop": Scale(world=CAPACITY["laptop"].world, lengths=(17.7828, 100, 562.3413)),
    "gpu": Scale(world=CAPACITY["gpu"].world, lengths=TENS),
    "paper": Scale(world=CAPACITY["paper"].world, lengths=(*TENS, 3162.2777, 10_000)),
}


def run_seed(scale: Scale, seed: int, results: Results, shared: Results) -> None:
    for size, length in scale.cells:
        found = bases(scale.world, size, seed)
        curve_row(scale.world, size, seed, results)
        tune_all(scale.world, at_length(found, length), size, seed, results, shared=shared)


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
    shared = Results(SEVENTH / "results.jsonl", asked.scale)
    seeds = range(scale.seeds) if asked.seeds is None else asked.seeds
    for seed in () if asked.report else seeds:
        run_seed(scale, seed, results, shared)
    rows = [row for row in results.rows.values() if row["bench"] == asked.scale]
    draw(rows, scale, HERE / ("figure.png" if asked.scale == "laptop" else f"figure-{asked.scale}.png"))
    told = report(rows, scale)
    if asked.scale == "laptop":
        write_results(HERE / "README.md", told)
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main()
