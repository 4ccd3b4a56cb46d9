"""Sampling on a Ray cluster: `retain sample --engine ray`.

Workers hold the model and draw whole shards with the engine of a single process, in its batches: their rows are its
rows to the last bit on devices of one kind, so a dataset begun here may be finished there. Only the driver writes
files. A worker that is lost loses no rows: its shard goes to the next worker that is free, and Ray starts it again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from retain.models.description import default_device
from retain.sampling.engine import DrawnRows, Engine, Progress, Shard, batch_engine, draw_rows

if find_spec("ray") is None:
    raise ValueError("engine: 'ray' needs the extra; pip install 'retain-llm[ray]'")
import ray
from ray.exceptions import RayError, RayTaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_RESTARTS = 10  # of one worker: machines come and go, but one that dies each time is given up


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


class Worker:
    """A process of the cluster that holds the model."""

    def __init__(self, load: Callable[[], PreTrainedModel], max_length: int, seed: int, store: str | None) -> None:
        self.load_model = load
        self.settings: dict[str, Any] = {"max_length": max_length, "seed": seed, "store": store}
        self.engine: Engine | None = None

    def load(self) -> None:
        """Load the model, unless it is there; apart from `__init__`, so that the driver sees why it failed."""
        if self.engine is None:
            torch.set_num_threads(1)
            model = self.load_model()
            self.engine = batch_engine(partial(draw_rows, model.to(default_device()), **self.settings))

    def draw(self, shard: Shard, batch_size: int) -> DrawnRows:
        """The rows of one shard."""
        assert self.engine is not None, "loaded first"
        [(_, drawn)] = self.engine([shard], batch_size, lambda rows: None)
        return drawn


@contextmanager
def ray_engine(
    load: Callable[[], PreTrainedModel],
    *,
    max_length: int,
    seed: int,
    store_reference: str | None = None,
    num_workers: int | None = None,
) -> Iterator[Engine]:
    """An engine for `sample_replay(..., engine=engine)`: the cluster of RAY_ADDRESS, else one of this machine.

    Args:
        load: loads the model in a worker, in the dtype that `sample_replay` gets: say, a `functools.partial` of
            `load_model`. The name must mean the same model on every machine.
        max_length, seed, store_reference: as for `sample_replay`.
        num_workers: each has a GPU, or a CPU where the cluster has no GPUs; by default one for each of them.
    """
    workers: list[Any] = []
    with cluster():
        try:
            kind, count = _placement(num_workers)
            actor = ray.remote(Worker).options(num_cpus=1, num_gpus=int(kind == "GPU"), max_restarts=MAX_RESTARTS)
            workers += [actor.remote(load, max_length, seed, store_reference) for _ in range(count)]
            yield partial(_draw, workers)
        finally:
            for worker in workers:
                ray.kill(worker)


def _placement(num_workers: int | None) -> tuple[str, int]:
    """What a worker occupies, and the number of workers."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
    most = int(resources.get(kind, 0))
    if most < (num_workers or 1):
        raise ValueError(f"num_workers: {num_workers or 1} need a {kind} each and the cluster has {most}; use fewer")
    return kind, num_workers or most


def _draw(
    workers: Sequence[Any], shards: Sequence[Shard], batch_size: int, progress: Progress
) -> Iterator[tuple[Shard, DrawnRows]]:
    """Each worker gets its next shard when it is done with the last, without waiting for workers that still load."""
    todo, idle, left = deque(shards), list[Any](), len(shards)
    running: dict[Any, tuple[Any, Shard | None]] = {_loading(worker): (worker, None) for worker in workers}
    while left:
        while todo and idle:
            worker, next_shard = idle.pop(), todo.popleft()
            running[worker.draw.remote(next_shard, batch_size)] = worker, next_shard
        if not running:
            raise RuntimeError("engine: every Ray worker was lost; finished shards are kept, run the same again")
        [done], _ = ray.wait(list(running))
        worker, shard = running.pop(done)
        try:
            drawn = ray.get(done)
        except RayTaskError as error:
            raise error.cause from error  # what was raised in the worker
        except RayError:
            if shard is not None:  # else it could not be started again
                todo.appendleft(shard)
                running[_loading(worker)] = worker, None
            continue
        idle.append(worker)
        if shard is not None:
            left -= 1
            progress(len(shard.rows))
            yield shard, drawn


def _loading(worker: Any) -> Any:
    """The task of loading the model; a worker that Ray starts again loads again."""
    return worker.load.options(max_task_retries=-1).remote()
