"""Workers of a Ray cluster that each make something once, a loaded model say, and call it item by item; and the engine
of `retain sample --engine ray` on them.

Items go to whoever is free. A worker that is lost, with its machine or alone, costs the item that it had: that goes to
the next free worker, and Ray starts the lost one again, here or on another machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

if find_spec("ray") is None:
    raise ValueError("engine: 'ray' needs the extra; pip install 'retain-llm[ray]'")
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from transformers import PreTrainedModel

from retain.files import first_line
from retain.models.description import default_device
from retain.sampling.engine import DrawnRows, Engine, Progress, Shard, batch_engine, draw_rows

MAX_RESTARTS = 50  # of one worker: machines come and go, but one that dies each time is given up
MAX_LOSSES = 5  # of workers by one item, which then is what kills them
Job = TypeVar("Job")
Found = TypeVar("Found")


class Worker:
    """A process of the cluster."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self.make = make
        self.call: Callable[[Any], Any] | None = None

    def begin(self) -> None:
        """Make what is called, unless it is there; apart from `__init__`, so that the driver sees why it failed."""
        self.call = self.call or self.make()

    def work(self, item: Any) -> Any:
        assert self.call is not None, "begun first"
        return self.call(item)


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that is there, that of RAY_ADDRESS, or one of this machine, which ends with the context."""
    begun = not ray.is_initialized()
    if begun:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a cluster begun here tells Ray's makers of itself
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        if begun:
            ray.shutdown()


@contextmanager
def ray_workers(
    make: Callable[[], Callable[[Job], Found]], *, num_workers: int | None = None, num_cpus: int = 1
) -> Iterator[Callable[[Sequence[Job]], Iterator[tuple[Job, Found]]]]:
    """A function that yields items with their results, as they come; its workers end with the context.

    Args:
        make: runs in a worker and gives what is called with each item.
        num_workers: by default as many as the cluster has room for.
        num_cpus: of a worker, which also has a GPU where the cluster has one.

    Raises:
        ValueError: if the cluster has room for fewer than `num_workers`.
    """
    workers: list[Any] = []
    with cluster():
        try:
            kind, count = _placement(num_workers, num_cpus)
            actor = ray.remote(Worker).options(num_cpus=num_cpus, num_gpus=kind == "GPU", max_restarts=MAX_RESTARTS)
            workers += [actor.remote(make) for _ in range(count)]
            yield partial(_spread, workers)
        finally:
            for worker in workers:
                ray.kill(worker)


def _placement(num_workers: int | None, num_cpus: int) -> tuple[str, int]:
    """What a worker occupies, and the number of workers."""
    resources = ray.cluster_resources()
    kind, each = ("GPU", 1) if resources.get("GPU", 0) >= 1 else ("CPU", num_cpus)
    most = int(resources.get(kind, 0)) // each
    if most < (num_workers or 1):
        needed = f"a {kind}" if each == 1 else f"{each} {kind}s"
        raise ValueError(
            f"num_workers: {num_workers or 1} need {needed} each and the cluster has {most * each}; use fewer"
        )
    return kind, num_workers or most


def _spread(workers: Sequence[Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each worker gets its next item when it is done with the last, without waiting for workers that still begin.

    Raises:
        ValueError: if an item loses worker after worker, or all are lost.
    """
    todo, idle, left = deque(range(len(items))), list[Any](), len(items)
    losses = dict.fromkeys(todo, 0)
    running: dict[Any, tuple[Any, int | None]] = {_begun(worker): (worker, None) for worker in workers}
    while left:
        while todo and idle:
            worker, at = idle.pop(), todo.popleft()
            running[worker.work.remote(items[at])] = worker, at
        if not running:
            raise ValueError("engine: every Ray worker was lost; what is finished is kept, run the same again")
        [done], _ = ray.wait(list(running))
        worker, number = running.pop(done)
        try:
            found = ray.get(done)
        except RayTaskError as error:
            raise error.cause from error  # what was raised in the worker
        except RayError as error:
            if number is not None:  # else it could not be started again
                losses[number] += 1
                if losses[number] == MAX_LOSSES:
                    what = f"{MAX_LOSSES} Ray workers were lost with the same work"
                    raise ValueError(f"engine: {what} ({first_line(error)}); what is finished is kept") from error
                todo.appendleft(number)
                running[_begun(worker)] = worker, None
            continue
        idle.append(worker)
        if number is not None:
            left -= 1
            yield items[number], found


def _begun(worker: Any) -> Any:
    """The task of beginning; a worker that Ray starts again begins again."""
    return worker.begin.options(max_task_retries=-1).remote()


@contextmanager
def ray_engine(
    load: Callable[[], PreTrainedModel],
    *,
    max_length: int,
    seed: int,
    store_reference: str | None = None,
    num_workers: int | None = None,
) -> Iterator[Engine]:
    """An engine for `sample_replay(..., engine=ray_engine(...))`: the cluster of RAY_ADDRESS, else one of this machine.

    Workers draw whole shards with the engine of a single process, in its batches: their rows are its rows to the last
    bit on devices of one kind, so a dataset begun here may be finished there. Only the driver writes files.

    Args:
        load: loads the model in a worker, in the dtype that `sample_replay` gets: say, a `functools.partial` of
            `load_model`. The name must mean the same model on every machine.
        max_length, seed, store_reference: as for `sample_replay`.
        num_workers: each has a GPU, or a CPU where the cluster has no GPUs; by default one for each of them.
    """

    def drawer() -> Callable[[tuple[Shard, int]], DrawnRows]:
        torch.set_num_threads(1)
        draw = partial(draw_rows, load().to(default_device()), max_length=max_length, seed=seed, store=store_reference)
        engine = batch_engine(draw)
        return lambda asked: next(engine([asked[0]], asked[1], lambda rows: None))[1]

    with ray_workers(drawer, num_workers=num_workers) as spread:

        def engine(shards: Sequence[Shard], batch_size: int, progress: Progress) -> Iterator[tuple[Shard, DrawnRows]]:
            for (shard, _), drawn in spread([(shard, batch_size) for shard in shards]):
                progress(len(shard.rows))
                yield shard, drawn

        yield engine
