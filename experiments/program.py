"""The program of a study: its command line, its parts in several processes, its text and figure."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from experiments.pages import NoReport, write_results

logger = logging.getLogger("experiments")
LAPTOP: dict[str, Any] = {"laptop": None}  # the scales of a study with only one
WORKERS = 2
Part = int | str
Report = tuple[str, Callable[[Path], object]]  # the text for the README, and a function that draws the figure


def conduct(
    doc: str,
    folder: Path,
    scales: Mapping[str, Any],
    *,
    parts: Callable[[Any], Sequence[Part]],
    make: Callable[[str, Any], object],
    report: Callable[[str], Report],
    only: str = "seeds",
    prepare: Callable[[str], object] = lambda name: None,
    then: Sequence[Callable[[str], Sequence[Part]]] = (),
    arguments: Sequence[str] | None = None,
) -> None:
    """Run a study from its command line: make each of its parts once, then its text and figure.

    Args:
        doc: the docstring of the study's module; its first line is the help.
        parts: scale → independent parts, such as its seeds.
        make: (name of the scale, part) makes the runs of a part, except finished ones.
        report: name of the scale → text and figure.
        only: name of the command-line option that selects parts.
        prepare: called with the name of the scale before parts are spread over processes.
        then: later parts, each a function of the scale's name that may read the results of earlier ones.
    """
    options = parse_arguments(doc, scales, arguments, only)
    name, chosen = options.scale, getattr(options, only)
    workers = options.num_workers or WORKERS
    try:
        if not options.report:
            prepare(name)
            make_all_of = partial(make_on_ray if options.engine == "ray" else make_parts, make, name, workers=workers)
            make_all_of(parts(scales[name]) if chosen is None else chosen)
            for later in then if chosen is None else ():
                make_all_of(later(name))
        results = report(name)
    except NoReport as error:
        raise SystemExit(f"{folder.name}, scale {name}: {error}") from error
    except ValueError as error:
        raise SystemExit(str(error)) from error
    write_report(folder, name, results)


def seeds_of(scale: Any) -> Sequence[int]:
    return range(scale.seeds)


def parse_arguments(doc: str, scales: Mapping[str, Any], arguments: Sequence[str] | None, only: str) -> Any:
    """Parse the options of a study, and set up its process."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.set_defaults(scale="laptop")
    if set(scales) != set(LAPTOP):
        parser.add_argument("--scale", choices=scales, help="laptop is what the README shows")
    parser.add_argument(f"--{only}", type=lambda word: int(word) if word.isdigit() else word, nargs="*",
                        help="only these")  # fmt: skip
    parser.add_argument("--num_workers", type=int, help=f"processes; by default {WORKERS}")
    parser.add_argument("--engine", choices=("local", "ray"), default="local",
                        help="ray: on the cluster of RAY_ADDRESS, in a checkout that its machines share")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    start_process()
    options = parser.parse_args(arguments)
    if options.scale != "laptop":
        logger.warning("scale %s: these settings have not been run yet", options.scale)
    return options


def make_on_ray(make: Callable[[str, Any], object], name: str, parts: Sequence[Part], workers: int) -> None:
    """Make the parts on a Ray cluster; losing a machine loses only its unfinished runs."""
    if not parts:  # 0 workers would mean as many as fit
        return
    from retain.sampling.ray_workers import ray_workers

    def worker() -> Callable[[Part], object]:
        start_process()
        return partial(make, name)

    with ray_workers(worker, num_workers=min(workers, len(parts))) as make_all_of:
        for part, _ in make_all_of(parts):
            logger.info("made: %s", part)


def make_parts(make: Callable[[str, Any], object], name: str, parts: Sequence[Part], workers: int) -> None:
    """Make the parts in a pool of processes; the first failure ends them all.

    Without a GPU, processes are forks, which share what `prepare` has loaded.
    """
    if min(workers, len(parts)) < 2:
        for part in parts:
            make(name, part)
        return
    context = get_context("spawn" if torch.cuda.is_available() else "fork")
    pool = ProcessPoolExecutor(min(workers, len(parts)), mp_context=context, initializer=start_worker)
    try:
        for future in as_completed([pool.submit(make, name, part) for part in parts]):
            future.result()
    except BrokenProcessPool as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise SystemExit(f"a process was killed{cause}; finished runs are kept: run the command again") from error
    finally:
        for process in active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)


def start_process() -> None:
    """Set up a process of a study: one thread, one GPU, a log."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, a trainer would split batches between them
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    disable_progress_bar()
    torch.set_num_threads(1)


def start_worker() -> None:
    """Set up a process of the pool: it ignores Ctrl-C and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_process()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_report(folder: Path, scale: str, report: Report, page: str = "README.md", figure: str = "figure") -> None:
    """Draw the figure and print the text, which laptop scale also writes into the page."""
    text, draw = report
    draw(folder / (f"{figure}.png" if scale == "laptop" else f"{figure}-{scale}.png"))
    if scale == "laptop":
        write_results(folder / page, text)
    sys.stdout.write(text + "\n")


def device_name() -> str:
    """The GPU, or the CPU's number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
