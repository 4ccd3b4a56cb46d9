"""Two files of an evaluation program on one task, the base's and the tuned model's, become a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retain.measuring.inspect_log import read_log
from retain.measuring.lm_eval import read_samples
from retain.measuring.paired_answers import pair_answers
from retain.report.report import ForgettingReport

INSPECT_SUFFIXES = (".eval", ".json")  # of its logs; a file with another ending is lm-eval's


def paired_report(paths: Sequence[str]) -> ForgettingReport:
    """A report on two files of one program, the base's first."""
    files = list(map(Path, paths))
    base, tuned = (read_log(path) if path.suffix.lower() in INSPECT_SUFFIXES else read_samples(path) for path in files)
    if base.program != tuned.program:
        raise ValueError(f"pair: {base.program} and {tuned.program} wrote these files; give two of one program")
    sides = {"base": {"model": base.model}, "tuned": {"model": tuned.model}}
    return ForgettingReport.new(tuned.name, **sides, choices={tuned.task: pair_answers(base, tuned)})
