"""A sweep on a Ray cluster: every run a task, which Ray begins again on another worker if its own is lost.

The folder of results must be one that all machines of the cluster share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from retain.lab import sweep
from retain.lab.sweep import Process
from retain.lab.sweep_file import SweepRun
from retain.sampling.ray_engine import cluster
from retain.text import first_line

RETRIES = 10  # of one run whose worker was lost


def make_run(run: SweepRun, root: Path, child: str, threads: int) -> dict[str, Any]:
    """In a worker: the run as a process of its own, which dies with the worker; Ray has given it its cores."""
    process = Process(run, root, [], child, threads)
    while process.process.poll() is None:
        process.memory()
        time.sleep(0.1)
    return process.row()


def run_on_ray(
    runs: Sequence[SweepRun],
    root: Path,
    *,
    num_workers: int | None,
    cores_per_run: int,
    record: Callable[[dict[str, Any]], object],
) -> None:
    """Make the runs on the cluster of RAY_ADDRESS, or one begun on this machine; a lost worker loses its run only."""
    waiting, todo = dict[Any, SweepRun](), list(runs)
    with cluster():
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0))
        task = ray.remote(make_run).options(num_cpus=cores_per_run, num_gpus=gpus, max_retries=RETRIES)
        try:
            while todo or waiting:
                while todo and (num_workers is None or len(waiting) < num_workers):
                    run = todo.pop(0)
                    waiting[task.remote(run, root, sweep.CHILD, cores_per_run)] = run
                [done], _ = ray.wait(list(waiting))
                run = waiting.pop(done)
                try:
                    record(ray.get(done))
                except ray.exceptions.RayError as error:  # lost too often, or no machine can begin it
                    record(sweep.sweep_row(run, root / "runs" / run.key, first_line(error)))
        finally:
            for left in waiting:
                ray.cancel(left, force=True)
