"""`retain sweep`: many runs of one verb, each made once, whatever kills it in between.

Every run is a process of its own and a folder of its own, named by a hash of its resolved configuration. A row is
appended to `results.jsonl` when a run has ended, so nothing is lost but the runs in flight; those are gone on with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from retain import versions
from retain.files import append_jsonl, exclusive, read_jsonl, write_text
from retain.lab.sweep_file import SweepRun, read_sweep
from retain.report.numbers import is_number

RESULTS = "results.jsonl"
GATED = (0, 2, 3)  # exit codes of `measure` that are results
MARGIN = 1.2  # times the memory that the largest run so far has taken, before another is begun beside it
SETTLED = 30.0  # seconds after which a run has shown what memory it takes
# What runs one verb on given cores; it dies with the process that began it.
CHILD = """
import os, signal, sys
cores, *arguments = sys.argv[1:]
if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, map(int, cores.split(",")))
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(os.environ["RETAIN_SWEEP"]):  # it died before it could be asked
        sys.exit(1)
from retain.cli.main import main
sys.exit(main(arguments))
"""


def collect(folder: Path) -> dict[str, float]:
    """The last value of everything a run logged, and of everything a report says of its texts."""
    found: dict[str, float] = {}
    for row in read_jsonl(folder / "metrics.jsonl"):
        found |= {name: value for name, value in row.items() if is_number(value)}
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for kind in ("new_task", "retention"):
            for text, metrics in (report.get(kind) or {}).items():
                found |= {f"{kind}/{text}/{name}": entry["value"] for name, entry in metrics.items()}
    return found


class Process:
    """A run as a process: its own cores, its output in a log of its own."""

    def __init__(self, run: SweepRun, root: Path, cores: Sequence[int], child: str, threads: int | None = None) -> None:
        self.run, self.folder, self.log = run, root / "runs" / run.key, root / "logs" / f"{run.key}.txt"
        for folder in (self.folder.parent, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        own = {"OMP_NUM_THREADS": str(threads or max(1, len(cores))), "RETAIN_SWEEP": str(os.getpid())}
        command = [sys.executable, "-c", child, ",".join(map(str, cores)), *run.arguments(self.folder)]
        self.began, self.peak = time.monotonic(), 0
        with open(self.log, "wb") as log:
            # In a group of its own: Ctrl-C reaches the sweep alone, which asks each run once to stop.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | own, process_group=0
            )

    def memory(self) -> int:
        """Bytes that the process and its children hold now."""
        try:
            process = psutil.Process(self.process.pid)
            now = sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
        except psutil.Error:
            now = 0
        self.peak = max(self.peak, now)
        return now

    def row(self) -> dict[str, Any]:
        """What `results.jsonl` keeps of a run that has ended."""
        code = self.process.returncode
        done = code == 0 or (self.run.verb == "measure" and code in GATED)
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return sweep_row(
            self.run, self.folder, None if done else (lines or [""])[-1], exit_code=code,
            seconds=round(time.monotonic() - self.began, 1), peak_bytes=self.peak,
            result=collect(self.folder) if done else {},
        )  # fmt: skip


def sweep_row(run: SweepRun, folder: Path, error: str | None, **facts: Any) -> dict[str, Any]:
    """A row of `results.jsonl`; without facts, of a run that nothing is known of but its error."""
    return {
        "key": run.key, "verb": run.verb, "flags": dict(run.flags), "status": "done" if error is None else "failed",
        "exit_code": None, "error": error, "seconds": 0.0, "peak_bytes": 0, "folder": str(folder), "result": {},
        "versions": versions(), **facts,
    }  # fmt: skip


def own_cores() -> list[int]:
    """The cores that this process may use; nothing where the system does not say (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_here(
    runs: Sequence[SweepRun],
    root: Path,
    *,
    num_workers: int,
    cores_per_run: int,
    record: Callable[[dict], object],
    most: int = 0,
) -> None:
    """Make the runs on this machine: so many at a time, each pinned to cores of its own, as memory allows.

    Args:
        most: bytes that a run has taken before; where nobody knows, the first runs alone until it has shown it.
    """
    cores = own_cores()
    slots = [cores[at * cores_per_run : (at + 1) * cores_per_run] for at in range(num_workers)]
    todo, running = list(runs), dict[int, Process]()
    with stopped_together(running):
        while todo or running:
            for slot in [at for at in range(num_workers) if at not in running]:
                if todo and _has_room(running.values(), most):
                    running[slot] = Process(todo.pop(0), root, slots[slot], CHILD)
            time.sleep(0.1)
            for slot, process in list(running.items()):
                process.memory()
                ended = process.process.poll() is not None
                if ended or time.monotonic() - process.began > SETTLED:
                    most = max(most, process.peak)
                if ended:
                    record(running.pop(slot).row())


def _has_room(running: Any, most: int) -> bool:
    """Whether another run may begin: alone always, beside others if what they and it may yet take is there."""
    processes = list(running)
    to_come = sum(max(0, most - process.memory()) for process in processes)
    return not processes or (most > 0 and psutil.virtual_memory().available > MARGIN * (most + to_come))


@contextmanager
def stopped_together(running: Mapping[int, Process]) -> Iterator[None]:
    """Whatever ends the sweep ends its processes: asked first, so that they may write a checkpoint."""
    try:
        yield
    finally:
        for process in running.values():
            process.process.send_signal(signal.SIGINT)
        for process in running.values():
            try:
                process.process.wait(30)
            except subprocess.TimeoutExpired:
                process.process.kill()


def run_sweep(
    path: str,
    output_dir: str,
    *,
    engine: str = "local",
    num_workers: int | None = None,
    cores_per_run: int = 1,
    check: Callable[[Sequence[SweepRun]], object] = lambda runs: None,
) -> list[dict[str, Any]]:
    """Make every run that is not done yet, and return the row of each.

    Args:
        check: looks at the runs before anything is written, and raises what is wrong with them.

    Raises:
        ValueError: for a sweep that cannot be read, and at the end if runs failed; the others are kept.
    """
    runs, root = read_sweep(path), Path(output_dir)
    check(runs)
    with exclusive(root):
        results = root / RESULTS
        rows = {row["key"]: row for row in read_jsonl(results) if row["status"] == "done"}
        whole = results.read_text(encoding="utf-8") if results.exists() else ""
        if whole and not whole.endswith("\n"):  # the line that a killed sweep was writing
            write_text(results, "".join(json.dumps(row) + "\n" for row in read_jsonl(results)))
        todo = [run for run in runs if run.key not in rows]
        with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", desc="sweep") as bar:

            def record(row: dict[str, Any]) -> None:
                append_jsonl(results, row)
                rows[row["key"]] = row
                bar.update()

            if engine == "ray":
                from retain.lab.ray_sweep import run_on_ray

                run_on_ray(todo, root.resolve(), num_workers=num_workers, cores_per_run=cores_per_run, record=record)
            else:
                count = num_workers or max(1, (len(own_cores()) or os.cpu_count() or 1) // cores_per_run)
                most = max((row["peak_bytes"] for row in rows.values()), default=0)
                run_here(todo, root, num_workers=count, cores_per_run=cores_per_run, record=record, most=most)
    failed = [rows[run.key] for run in runs if rows[run.key]["status"] == "failed"]
    if failed:
        first = failed[0]
        raise ValueError(
            f"sweep: {len(failed)} of {len(runs)} runs failed, the others are kept; the first ({first['key']}): "
            f"{first['error']}; mend it and run the sweep again"
        )
    return [rows[run.key] for run in runs]
