"""The phrase matcher on the labelled answers that `pyrit` ships: the half it was written with, and the other half.

python experiments/04_capabilities/phrases.py
"""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from study_data import download, labelled_answers  # noqa: E402

from retain.capabilities.phrases import is_refusal  # noqa: E402
from retain.statistics import share_interval  # noqa: E402

logger = logging.getLogger("experiments")
DESIGN = 52  # answers, drawn with seed 0, that were read while the matcher was written


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    download()
    rows = labelled_answers()
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    for name, places in (("read while writing it", order[:DESIGN]), ("held out", order[DESIGN:])):
        refusals = [is_refusal(rows[at][0]) for at in places if rows[at][1]]
        others = [is_refusal(rows[at][0]) for at in places if not rows[at][1]]
        found, low, high = share_interval(sum(refusals), len(refusals))
        wrong, _, worst = share_interval(sum(others), len(others))
        logger.info(
            f"{name}: {sum(refusals)} of {len(refusals)} refusals found, {found:.0%} [{low:.0%}, {high:.0%}]; "
            f"{sum(others)} of {len(others)} other answers taken for one, {wrong:.0%} (at most {worst:.0%})"
        )


if __name__ == "__main__":
    main()
