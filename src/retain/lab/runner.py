"""Runs, each made once and named by a hash of its settings; a kill loses only the runs in progress.

`RunRows` keeps one row per run in a file: for a study, a plan's pilots, a sweep. `run_here` runs a verb many times,
each in its own process and folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from retain.files import append_jsonl, read_jsonl

RESUMABLE = ("finetune", "pretrain")  # resume with a flag; other verbs resume or restart by themselves
SECONDS_TO_STOP = 30.0  # for a run to write a checkpoint
# The program of a run. It ends with the process that started it, however that ends, because the other end of its
# standard input is then closed.
PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
from retain.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run_key(*settings: Any) -> str:
    """The name of a run: a hash of its settings as JSON; the order of keys does not matter.

    >>> run_key("finetune", {"seed": 0, "lora_r": 4}) == run_key("finetune", {"lora_r": 4, "seed": 0})
    True
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a path; other processes wait. The lock is released when the process ends, however it ends."""
    lock = path.parent / f".{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove open files
                lock.unlink()


class RunRows:
    """Rows by key in an append-only JSON Lines file that several processes may share.

    A row whose `status` is "failed" records an error; its run counts as not made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Read the file again, with rows that other processes have appended."""
        self.rows = {row["key"]: row for row in read_jsonl(self.path) if row.get("status") != "failed"}

    def append(self, row: dict[str, Any]) -> None:
        """Append a row with a `key`, after removing a half-written last line of a killed process."""
        with locked(self.path):
            if self.path.exists():
                with open(self.path, "rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            append_jsonl(self.path, row)
        if row.get("status") != "failed":
            self.rows[row["key"]] = row

    def make(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this key, computed and appended if missing; only one of several processes computes it."""
        if key not in self.rows:
            with locked(self.path.with_name(f"{self.path.name}.{key}")):
                self.read()
                if key not in self.rows:
                    self.append({"key": key, **compute()})
        return self.rows[key]


@dataclass(frozen=True)
class VerbRun:
    """A run of one of retain's verbs: its resolved flags, without `output_dir`."""

    verb: str
    flags: Mapping[str, Any]

    @property
    def key(self) -> str:
        return run_key(self.verb, self.flags)

    def arguments(self, folder: Path) -> list[str]:
        """The command line of this run, writing into `folder`.

        >>> VerbRun("report", {"runs": ["a", "b"], "all": True}).arguments(Path("out"))
        ['report', '--runs', 'a', 'b', '--all', 'true', '--output_dir', 'out']
        """
        words = [self.verb]
        for name, value in {**self.flags, "output_dir": str(folder)}.items():
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
        if self.verb in RESUMABLE and list(folder.glob("checkpoint-*")):
            words += ["--resume_from_checkpoint", "true"]
        return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


class VerbProcess:
    """A run in its own process, with its output in `logs/KEY.txt` and its results in `runs/KEY`."""

    def __init__(self, run: VerbRun, root: Path, threads: int) -> None:
        self.run, self.folder, self.log = run, root / "runs" / run.key, root / "logs" / f"{run.key}.txt"
        for folder in (self.folder.parent, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", PROGRAM, *run.arguments(self.folder)]
        self.start_time = time.monotonic()
        with open(self.log, "wb") as log:
            # In its own process group: Ctrl-C reaches only the sweep, which stops each run once.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip

    def outcome(self) -> dict[str, Any]:
        """Exit code, seconds and last line of output of a process that has ended."""
        self.process.communicate()
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return {
            "exit_code": self.process.returncode,
            "seconds": round(time.monotonic() - self.start_time, 1),
            "last_line": (lines or [""])[-1],
        }


Record = Callable[[VerbRun, dict[str, Any]], object]  # called with each run and its outcome


def run_here(runs: Sequence[VerbRun], root: Path, record: Record, *, num_workers: int, threads: int) -> None:
    """Make the runs on this machine, `num_workers` at a time; an exception, such as Ctrl-C, stops those in progress."""
    todo, running = deque(runs), list[VerbProcess]()
    try:
        while todo or running:
            while todo and len(running) < num_workers:
                running.append(VerbProcess(todo.popleft(), root, threads))
            time.sleep(0.1)
            for ended in [job for job in running if job.process.poll() is not None]:
                running.remove(ended)
                record(ended.run, ended.outcome())
    finally:
        for job in running:
            job.process.terminate()  # it may write a checkpoint
        for job in running:
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(SECONDS_TO_STOP)
            job.process.kill()
            job.process.communicate()
