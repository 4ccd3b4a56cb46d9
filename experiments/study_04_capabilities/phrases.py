"""The phrase matcher on the labelled answers that `pyrit` ships, and on ordinary ones: halves read and not read.

python -m experiments.study_04_capabilities.phrases
"""

from __future__ import annotations

import logging
import random

from experiments.study_04_capabilities.data import download, instructions, labelled_answers
from retain.measuring.refusal_phrases import is_refusal
from retain.statistics import share_interval

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

    ordinary = [says for _, says in instructions(with_input=True)]
    order = list(range(len(ordinary)))
    random.Random(1).shuffle(order)
    half = len(order) // 2
    for name, places in (("read while mending it", order[:half]), ("held out", order[half:])):
        said = [ordinary[at] for at in places if is_refusal(ordinary[at])]
        found, low, high = share_interval(len(said), len(places))
        logger.info(f"ordinary answers, {name}: {len(said)} of {len(places)} said to refuse, {found:.1%} "
                    f"[{low:.1%}, {high:.1%}]; whether they decline is to be read:")  # fmt: skip
        for answer in said:
            logger.info(f"  {answer[:150]!r}")


if __name__ == "__main__":
    main()
