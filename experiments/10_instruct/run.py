"""At the same Verilog loss, which replay keeps most of an instruction-tuned model? One command; finished runs stay.

python experiments/10_instruct/run.py [--scale laptop|gpu|paper] [--seeds 0 1] [--report]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "04_capabilities")]

import torch  # noqa: E402
from harness import Results  # noqa: E402
from instruct_report import draw, report  # noqa: E402
from instruct_runs import ARMS, SCALES, Workplace  # noqa: E402
from pages import write_results  # noqa: E402

logger = logging.getLogger("experiments")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these")
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    scale, results = SCALES[asked.scale], Results(HERE / "results.jsonl", asked.scale)
    rows = []
    for seed in range(scale.seeds) if asked.seeds is None else asked.seeds:
        place = Workplace(scale, seed)
        for name, arm in ARMS.items():
            settings = place.settings(name, arm)
            if not asked.report:
                results.make(settings, lambda arm=arm, place=place: place.run(arm))
            rows += [row for row in [results.get(settings)] if row is not None]
    told = report(rows, list(ARMS))
    draw(rows, HERE / ("figure.png" if asked.scale == "laptop" else f"figure-{asked.scale}.png"))
    if asked.scale == "laptop":
        write_results(HERE / "README.md", told)
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main()
