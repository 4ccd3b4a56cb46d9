"""What every study of several scales does alike: its command line, its parts on several cores, and where results go."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from experiments.matched import NoReport
from experiments.pages import write_results

PROCESSES = {"laptop": 2, "gpu": 3}  # small models leave most of a GPU idle; else 1
Told = tuple[str, Callable[[Path], object]]  # the text for the README, and what draws the figure


def conduct(
    told: str,
    folder: Path,
    scales: Mapping[str, Any],
    *,
    parts: Callable[[Any], Sequence[int]],
    make: Callable[[str, int], object],
    report: Callable[[str], Told],
    only: str = "seeds",
    prepare: Callable[[str], object] = lambda name: None,
    then: Sequence[Callable[[str], Sequence[int]]] = (),
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
        then: more parts, of the name of the scale, each that can be named or made when those before it are made.
    """
    asked = ask(told, scales, arguments, only)
    name, chosen = asked.scale, getattr(asked, only)
    workers = asked.num_workers or PROCESSES.get(name, 1)
    try:
        if not asked.report:
            prepare(name)
            spread(make, name, list(parts(scales[name]) if chosen is None else chosen), workers)
            for more in then if chosen is None else ():
                spread(make, name, list(more(name)), workers)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    try:
        text, draw = report(name)
    except NoReport as error:
        raise SystemExit(f"{folder.name}, scale {name}: {error}") from error
    show(folder, name, text, draw)


def seeds_of(scale: Any) -> Sequence[int]:
    return range(scale.seeds)


def ask(told: str, scales: Iterable[str], arguments: Sequence[str] | None, only: str = "seeds") -> argparse.Namespace:
    """`--scale`, `--report`, and the part of the work that is asked for; one thread, and a log of what is made."""
    parser = argparse.ArgumentParser(description=told.splitlines()[0])
    parser.add_argument(
        "--scale",
        choices=scales,
        default="laptop",
        help="laptop is what the README shows; the others: sketches",
    )
    parser.add_argument(f"--{only}", type=int, nargs="*", help="only these")
    parser.add_argument("--num_workers", type=int, help="processes (laptop 2, gpu 3, paper 1)")
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    begin()
    asked = parser.parse_args(arguments)
    if asked.scale != "laptop":
        logging.getLogger("experiments").warning("scale %s is a sketch: nobody has run these settings", asked.scale)
    return asked


def spread(make: Callable[[str, int], object], name: str, parts: Sequence[int], workers: int) -> None:
    """Make the parts in so many processes, each the next one as it is free; the first that fails ends them all.

    Processes are forks where there is no GPU, so that what is open is opened once.
    """
    if min(workers, len(parts)) < 2:
        for part in parts:
            make(name, part)
        return
    how = get_context("spawn" if torch.cuda.is_available() else "fork")
    pool = ProcessPoolExecutor(min(workers, len(parts)), mp_context=how, initializer=begin, initargs=(os.getpid(),))
    try:
        for made in as_completed([pool.submit(make, name, part) for part in parts]):
            made.result()
    except BrokenProcessPool as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise SystemExit(f"a process was killed{cause}; finished runs are kept: run it again") from error
    finally:
        for process in active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


def begin(parent: int | None = None) -> None:
    """A process of a study: one thread, a log, memory that is kept; of a pool it ends with the one that began it."""
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            raise SystemExit(1)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, a trainer would share rows out among them
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("experiments").setLevel(logging.INFO)
    torch.set_num_threads(1)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc keeps what large tensors leave free, and needs no new pages for the next: 10% of a big model's step.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, an int


def show(folder: Path, scale: str, told: str, draw: Callable[[Path], object]) -> None:
    """Draw the figure and print the text; laptop scale is what the README shows."""
    draw(folder / ("figure.png" if scale == "laptop" else f"figure-{scale}.png"))
    if scale == "laptop":
        write_results(folder / "README.md", told)
    sys.stdout.write(told + "\n")


def device_name() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
