"""What every study of several scales does alike: its command line, its parts on several cores, and where results go."""

from __future__ import annotations

import argparse
import ctypes
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pages import write_results

LAPTOP_CORES = 2
Told = tuple[str, Callable[[Path], object]]  # the text for the README, and what draws the figure


def conduct(
    told: str,
    folder: Path,
    scales: Mapping[str, Any],
    *,
    parts: Callable[[Any], Sequence[int]],
    make: Callable[[str, int], None],
    report: Callable[[str], Told],
    only: str = "seeds",
    prepare: Callable[[str], object] = lambda name: None,
    then: Callable[[str], Sequence[int]] = lambda name: (),
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a study from its command line: what it is made of, each part once, then its text and figure.

    Args:
        told: the docstring of the study's file; its first line is the help.
        parts: of a scale, what can be made apart from each other, e.g. its seeds.
        make: makes the runs of one part, by name of the scale; finished ones are skipped.
        report: of the name of the scale.
        only: what the parts are called on the command line.
        prepare: what all parts need, made before they are spread.
        then: more parts, that can be named when the first are made.
    """
    asked = ask(told, scales, arguments, only)
    name, chosen = asked.scale, getattr(asked, only)
    workers = asked.num_workers or (LAPTOP_CORES if name == "laptop" else 1)

    def make_all(todo: Sequence[int]) -> None:
        if min(workers, len(todo)) > 1 and not asked.part:
            command = [sys.executable, str(folder / "run.py"), "--scale", name, "--part", f"--{only}"]
            spread([[*command, *map(str, todo[at::workers])] for at in range(min(workers, len(todo)))])
        else:
            for part in todo:
                make(name, part)

    try:
        if not asked.report:
            if not asked.part:
                prepare(name)
            make_all(list(parts(scales[name]) if chosen is None else chosen))
            if chosen is None:
                make_all(list(then(name)))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if not asked.part:
        text, draw = report(name)
        show(folder, name, text, draw)


def seeds_of(scale: Any) -> Sequence[int]:
    return range(scale.seeds)


def ask(told: str, scales: Iterable[str], arguments: Sequence[str] | None, only: str = "seeds") -> argparse.Namespace:
    """`--scale`, `--report`, and the part of the work that is asked for; one thread, and a log of what is made."""
    parser = argparse.ArgumentParser(description=told.splitlines()[0])
    parser.add_argument("--scale", choices=scales, default="laptop")
    parser.add_argument(f"--{only}", type=int, nargs="*", help="only these")
    parser.add_argument("--num_workers", type=int, help=f"processes (laptop: {LAPTOP_CORES}, else 1)")
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # begun by another, which reports
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("experiments").setLevel(logging.INFO)
    torch.set_num_threads(1)
    asked = parser.parse_args(arguments)
    if asked.part and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it dies with the process that began it
    return asked


def spread(commands: Sequence[Sequence[str]]) -> None:
    """Run commands side by side; the first that fails ends them all."""
    running = [subprocess.Popen(command) for command in commands]
    try:
        while running:
            for process in [one for one in running if one.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    raise SystemExit(f"a part failed with exit code {process.returncode}; finished runs are kept")
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()


def show(folder: Path, scale: str, told: str, draw: Callable[[Path], object]) -> None:
    """Draw the figure and print the text; laptop scale is what the README shows."""
    draw(folder / ("figure.png" if scale == "laptop" else f"figure-{scale}.png"))
    if scale == "laptop":
        write_results(folder / "README.md", told)
    sys.stdout.write(told + "\n")


def device_name() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
