"""Sampling on a Ray cluster: `retain sample --engine ray`.

Workers hold the model and draw whole shards with the engine of a single process, in its batches: their rows are its
rows to the last bit on devices of one kind, so a dataset begun here may be finished there. Only the driver writes
files. A worker that is lost loses no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from retain.models.description import default_device
from retain.sampling.engine import DrawnRows, Engine, Progress, Shard, batch_engine, draw_rows
from retain.sampling.ray_workers import ray_workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
