"""At the same Verilog loss, which replay keeps most of an instruction-tuned model? One command; finished runs stay.

python experiments/10_instruct/run.py [--scale laptop|gpu|paper] [--seeds 0 1] [--report]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "04_capabilities")]

from harness import Results  # noqa: E402
from instruct_report import draw, report  # noqa: E402
from instruct_runs import ARMS, SCALES, Workplace  # noqa: E402
from scales import ask, seeds_of, show  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> None:
    asked = ask(__doc__, SCALES, arguments)
    scale, results = SCALES[asked.scale], Results(HERE / "results.jsonl", asked.scale)
    rows = []
    for seed in seeds_of(asked, scale.seeds):
        place = Workplace(scale, seed)
        for name, arm in ARMS.items():
            settings = place.settings(name, arm)
            if not asked.report:
                results.make(settings, lambda arm=arm, place=place: place.run(arm))
            rows += [row for row in [results.get(settings)] if row is not None]
    show(HERE, asked.scale, report(rows, list(ARMS)), lambda path: draw(rows, path))


if __name__ == "__main__":
    main()
