"""Ray workers that each prepare something once, e.g. load a model, and then process items; the engine on top of them.

The engine is that of `retain sample --engine ray`. Items go to free workers. If a worker is lost, alone or with its
machine, its item goes to the next free worker, and Ray restarts the lost one, here or on another machine.
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

MAX_RESTARTS = 50  # per worker: machines come and go, but a worker that always dies is given up
MAX_LOSSES = 5  # workers lost with the same item, after which the item is to blame
Job = TypeVar("Job")
Result = TypeVar("Result")


class Worker:
    """A process of the cluster."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self.make = make
        self.process: Callable[[Any], Any] | None = None

    def prepare(self) -> None:
        """Make the function that processes items, once; not in `__init__`, so that the driver sees why it failed."""
        self.process = self.process or self.make()

    def work(self, item: Any) -> Any:
        assert self.process is not None, "prepared first"
        return self.process(item)


@contextmanager
def cluster() -> Iterator[None]:
    """The connected cluster, that of RAY_ADDRESS, or a new one on this machine, which ends with the context."""
    is_new = not ray.is_initialized()
    if is_new:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a new cluster sends usage statistics
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        if is_new:
            ray.shutdown()


@contextmanager
def ray_workers(
    make: Callable[[], Callable[[Job], Result]], *, num_workers: int | None = None, num_cpus: int = 1
) -> Iterator[Callable[[Sequence[Job]], Iterator[tuple[Job, Result]]]]:
    """A function that yields items with their results as they finish; its workers end with the context.

    Args:
        make: runs in a worker and returns the function that processes items.
        num_workers: by default as many as the cluster has room for.
        num_cpus: CPUs per worker, which also gets a GPU if the cluster has any.

    Raises:
        ValueError: if the cluster has no room for `num_workers`.
    """
    workers: list[Any] = []
    with cluster():
        try:
            kind, count = _placement(num_workers, num_cpus)
            actor = ray.remote(Worker).options(num_cpus=num_cpus, num_gpus=kind == "GPU", max_restarts=MAX_RESTARTS)
            workers += [actor.remote(make) for _ in range(count)]
            yield partial(_process, workers)
        finally:
            for worker in workers:
                ray.kill(worker)


def _placement(num_workers: int | None, num_cpus: int) -> tuple[str, int]:
    """The resource that a worker occupies, and the number of workers."""
    resources = ray.cluster_resources()
    kind, per_worker = ("GPU", 1) if resources.get("GPU", 0) >= 1 else ("CPU", num_cpus)
    max_workers = int(resources.get(kind, 0)) // per_worker
    if max_workers < (num_workers or 1):
        needed = f"a {kind}" if per_worker == 1 else f"{per_worker} {kind}s"
        raise ValueError(
            f"num_workers: {num_workers or 1} need {needed} each and the cluster has {max_workers * per_worker}; use "
            "fewer"
        )
    return kind, num_workers or max_workers


def _process(workers: Sequence[Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Give each worker its next item when it is free, without waiting for workers that are still preparing.

    Raises:
        ValueError: if an item keeps losing workers, or all workers are lost.
    """
    todo, idle, num_left = deque(range(len(items))), list[Any](), len(items)
    losses = dict.fromkeys(todo, 0)
    running: dict[Any, tuple[Any, int | None]] = {_prepare(worker): (worker, None) for worker in workers}
    while num_left:
        while todo and idle:
            worker, number = idle.pop(), todo.popleft()
            running[worker.work.remote(items[number])] = worker, number
        if not running:
            raise ValueError("engine: every Ray worker was lost; finished work is kept, run the same command again")
        [task], _ = ray.wait(list(running))
        worker, item_number = running.pop(task)
        try:
            result = ray.get(task)
        except RayTaskError as error:
            raise error.cause from error  # the worker's own exception
        except RayError as error:
            if item_number is not None:  # else Ray could not restart it
                losses[item_number] += 1
                if losses[item_number] == MAX_LOSSES:
                    what = f"{MAX_LOSSES} Ray workers were lost with the same work"
                    raise ValueError(f"engine: {what} ({first_line(error)}); finished work is kept") from error
                todo.appendleft(item_number)
                running[_prepare(worker)] = worker, None
            continue
        idle.append(worker)
        if item_number is not None:
            num_left -= 1
            yield items[item_number], result


def _prepare(worker: Any) -> Any:
    """The task that prepares a worker; repeated if Ray restarts the worker."""
    return worker.prepare.options(max_task_retries=-1).remote()


@contextmanager
def ray_engine(
    load: Callable[[], PreTrainedModel],
    *,
    max_length: int,
    seed: int,
    store_reference: str | None = None,
    num_workers: int | None = None,
) -> Iterator[Engine]:
    """An engine for `sample_replay(..., engine=ray_engine(...))` on the cluster of RAY_ADDRESS, else on this machine.

    Workers draw whole shards like a single process, in the same batches: on devices of one kind the rows are the same
    to the last bit, so a dataset started with one engine can be finished with the other. Only the driver writes files.

    Args:
        load: loads the model in a worker, in the dtype of `sample_replay`'s model: e.g. a `functools.partial` of
            `load_model`. The name must mean the same model on every machine.
        max_length, seed, store_reference: as for `sample_replay`.
        num_workers: each has a GPU, or a CPU if the cluster has no GPUs; by default one for each of them.
    """

    def make_drawer() -> Callable[[tuple[Shard, int]], DrawnRows]:
        torch.set_num_threads(1)
        draw = partial(draw_rows, load().to(default_device()), max_length=max_length, seed=seed, store=store_reference)
        engine = batch_engine(draw)
        return lambda item: next(engine([item[0]], item[1], lambda rows: None))[1]

    with ray_workers(make_drawer, num_workers=num_workers) as process:

        def engine(shards: Sequence[Shard], batch_size: int, progress: Progress) -> Iterator[tuple[Shard, DrawnRows]]:
            for (shard, _), drawn in process([(shard, batch_size) for shard in shards]):
                progress(len(shard.rows))
                yield shard, drawn

        yield engine
