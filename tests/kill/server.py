"""Processes of `retain` without the seconds that imports take: each is forked from one that has loaded everything.

Reads a JSON object a line: `argv`, `log`, `environment`, and `event`, `after`: the process kills itself so many seconds
after the event of that number, an opening for writing, a renaming or a removal within `folder`. Answers with its id,
then, when it has ended, with how, the events there were, and its seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def count_events(folder: str, kill_at: int | None, after: float, told: int) -> None:
    """Audit this process: how many events there were stands in the file behind the handle `told`, one byte each."""
    count = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        changes = name in CHANGES or (name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if not changes or not isinstance(arguments[0], str) or not arguments[0].startswith(folder):
            return
        count += 1
        os.write(told, b".")
        if count == kill_at and after:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(job: dict[str, Any], told: int) -> int:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("environment", {}))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    count_events(job["folder"], job.get("event"), job.get("after", 0.0), told)
    from retain.cli.main import main

    code = main(job["argv"])
    sys.stdout.flush()
    return code


def serve() -> None:
    """Everything is imported, nothing is computed: no thread has begun that a fork would lose."""
    import torch

    torch.set_num_threads(1)
    import retain.cli.finetune
    import retain.cli.measure
    import retain.cli.plan
    import retain.cli.sample  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        read, told = os.pipe()
        os.set_blocking(told, False)  # 64 KiB of events, and then no more are counted
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run(job, told)
            finally:
                os._exit(code)
        os.close(told)
        print(json.dumps({"pid": child}), flush=True)
        _, status = os.waitpid(child, 0)
        os.set_blocking(read, False)
        events = 0
        while data := _read(read):
            events += len(data)
        os.close(read)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "events": events, "seconds": time.monotonic() - began}), flush=True)


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 1 << 16)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    serve()
