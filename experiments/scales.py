"""What every study of several scales does alike: its command line, and where its figure, table and verdict go."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from pages import write_results


def ask(told: str, scales: Iterable[str], arguments: Sequence[str] | None, only: str = "seeds") -> argparse.Namespace:
    """`--scale`, `--report`, and the part of the work that is asked for; one thread, and a log of what is made."""
    parser = argparse.ArgumentParser(description=told.splitlines()[0])
    parser.add_argument("--scale", choices=scales, default="laptop")
    parser.add_argument(f"--{only}", type=int, nargs="*", help="only these, e.g. one process each on several cores")
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("experiments").setLevel(logging.INFO)
    torch.set_num_threads(1)
    return parser.parse_args(arguments)


def seeds_of(asked: argparse.Namespace, number: int) -> Sequence[int]:
    """The seeds that were asked for, else all of the scale."""
    return range(number) if asked.seeds is None else asked.seeds


def show(folder: Path, scale: str, told: str, draw: Callable[[Path], object]) -> None:
    """Draw the figure and print the text; laptop scale is what the README shows."""
    draw(folder / ("figure.png" if scale == "laptop" else f"figure-{scale}.png"))
    if scale == "laptop":
        write_results(folder / "README.md", told)
    sys.stdout.write(told + "\n")


def device_name() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
