"""Runs studies by their numbers.

python -m experiments                  lists them
python -m experiments 07 --help        what study 07 takes
python -m experiments 07               makes its missing runs, then its figure, table and verdict
python -m experiments all --report     remakes those of every study from committed results; trains nothing
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
        listed = [f"  {one}  {folder.name[9:]}" for one, folder in STUDIES.items()]
        sys.stdout.write("\n".join([__doc__ or "", *listed, ""]))
        return
    if number not in (*STUDIES, "all"):
        raise SystemExit(f"study: {number!r} is none of {', '.join(STUDIES)}, all")
    for one in STUDIES if number == "all" else [number]:
        import_module(f"experiments.{STUDIES[one].name}.run").main(words)


if __name__ == "__main__":
    main(sys.argv[1:])
