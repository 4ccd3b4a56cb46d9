"""Run studies by their numbers.

python -m experiments                  list the studies
python -m experiments 07 --help        show the options of study 07
python -m experiments 07               make its missing runs, then its figure, table and verdict
python -m experiments all --report     remake the reports of all studies from committed results, without training
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

STUDIES = {path.parent.name.split("_")[1]: path.parent for path in sorted(Path(__file__).parent.glob("study_*/run.py"))}


def main(arguments: Sequence[str]) -> None:
    number, *words = arguments or ["list"]
    if number in ("list", "-h", "--help"):
        lines = [f"  {study}  {folder.name[9:]}" for study, folder in STUDIES.items()]
        sys.stdout.write("\n".join([__doc__ or "", *lines, ""]))
        return
    if number not in (*STUDIES, "all"):
        raise SystemExit(f"study: {number!r} is not known; use one of {', '.join(STUDIES)}, all")
    for study in STUDIES if number == "all" else [number]:
        import_module(f"experiments.{STUDIES[study].name}.run").main(words)


if __name__ == "__main__":
    main(sys.argv[1:])
