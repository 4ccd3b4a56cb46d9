"""The base's predictions, stored with the replay rows that it drew, so that training needs no reference forward pass.

`hidden`: the last hidden state, which with the base's output head gives its whole distribution.
`topk`: the log-probabilities of its most likely tokens, which also give the mass of the rest.
One memory-mapped safetensors file per shard holds the drawn tokens of its rows, one row after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retain.files import atomic_path
from retain.models.fisher import rows_per_batch
from retain.models.head import seen_by_head
from retain.models.reference import evaluation_mode
from retain.progress import StageProgress

if TYPE_CHECKING:
    from retain.replay.dataset import ReplayDataset

TOP_K = 64  # tokens that a store of kind "topk" keeps of each prediction
STORING = "storing predictions"  # stage name of the progress bar
NAMES = {"hidden": ("hidden",), "topk": ("log_probs", "tokens")}


def cache_path(folder: Path, shard: int) -> Path:
    """The file of a shard's predictions; a sampler that stores them writes it before the shard."""
    return folder / f"reference-{shard:05d}.safetensors"


def to_stored(
    kind: str, states: Float[Tensor, "predictions size"], log_probs: Float[Tensor, "predictions vocabulary"]
) -> dict[str, Tensor]:
    """Predictions in the form that a store of this kind keeps, on the CPU."""
    if kind == "hidden":
        return {"hidden": states.cpu()}
    top = log_probs.topk(min(TOP_K, log_probs.shape[-1]), dim=-1)
    return {"log_probs": top.values.cpu(), "tokens": top.indices.to(torch.int32).cpu()}


@torch.no_grad()
def predict_rows(model: Any, rows: ReplayDataset, kind: str, shards: Sequence[int]) -> None:
    """Store the predictions of the model that drew these rows, with full forward passes, next to their shards.

    Shards that already have predictions of this kind are skipped, so a killed pass can be run again.

    Args:
        shards: numbers of the shards to do; processes may split them.
    """
    folder, per_shard = Path(rows.source), rows.manifest["rows_per_shard"]  # type: ignore[index]
    todo = [shard for shard in shards if not holds_predictions(cache_path(folder, shard), kind)]
    size = rows_per_batch(model.config.get_text_config().vocab_size, int(rows.num_predictions.max()))
    with evaluation_mode(model), seen_by_head(model) as hidden, StageProgress(STORING, len(todo), "shards") as stage:
        for shard in todo:
            parts, end = [], min((shard + 1) * per_shard, len(rows))
            for first in range(shard * per_shard, end, size):
                inputs = rows.batch(range(first, min(first + size, end)))
                batch = {name: value.to(model.device) for name, value in inputs.items()}
                drawn = batch.pop("labels")[:, 1:] != -100
                logits = model(**batch).logits
                if kind != "hidden":  # "hidden" ignores the logits, which are large
                    logits = logits[:, :-1][drawn].float().log_softmax(-1)
                parts.append(to_stored(kind, hidden[-1][:, :-1][drawn], logits))
                hidden.clear()
            write_predictions(folder, shard, {name: torch.cat([part[name] for part in parts]) for name in NAMES[kind]})
            stage.update(1)


def holds_predictions(path: Path, kind: str) -> bool:
    """Whether a file is whole and of this kind; a killed pass may have left one of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == set(NAMES[kind])
    except (OSError, SafetensorError):
        return False


def write_predictions(folder: Path, shard: int, predictions: dict[str, Tensor]) -> None:
    """Write the predictions of a shard's rows, tensors of shape (drawn tokens, size)."""
    with atomic_path(cache_path(folder, shard)) as temporary:
        save_file({name: value.clone() for name, value in predictions.items()}, temporary)


@dataclass(frozen=True)
class ReferenceCache:
    """Stored predictions of a finished replay dataset.

    Args:
        kind: "hidden" or "topk".
        num_predictions: number of drawn tokens of each row, shape (rows,).
    """

    folder: Path
    kind: str
    rows_per_shard: int
    num_predictions: np.ndarray

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where each row starts in its shard's file, shape (rows,)."""
        before = np.concatenate([[0], np.cumsum(self.num_predictions)])
        first = np.arange(len(self.num_predictions)) // self.rows_per_shard * self.rows_per_shard
        return before[:-1] - before[first]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The base's predictions at the drawn tokens of these rows, one row after the other; (drawn tokens, size)."""
        parts = [self._row(int(index)) for index in indices]
        return {name: torch.cat([part[name] for part in parts]) for name in NAMES[self.kind]}

    def check_whole(self) -> None:
        """Refuse a store in which a shard has no file or one with other rows; reads only the headers."""
        for first in range(0, len(self.num_predictions), self.rows_per_shard):
            count = int(self.num_predictions[first : first + self.rows_per_shard].sum())
            with self._opened(first) as file:
                if any(file.get_slice(name).get_shape()[0] != count for name in NAMES[self.kind]):
                    raise OSError("it holds other rows")

    def _row(self, index: int) -> dict[str, Tensor]:
        begin, count = int(self._begins[index]), int(self.num_predictions[index])
        with self._opened(index) as file:
            row = {name: file.get_slice(name)[begin : begin + count] for name in NAMES[self.kind]}
            if any(len(value) != count for value in row.values()):
                raise OSError("it holds fewer rows")
        return row

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        """Open the file that holds a row."""
        path = cache_path(self.folder, index // self.rows_per_shard)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"replay_dataset: {str(path)!r} is missing or damaged ({error}); delete it and run the same `retain "
                "sample` command, or set replay_reference to adapter or copy"
            ) from error


def open_cache(folder: Path, manifest: dict[str, Any], num_predictions: np.ndarray) -> ReferenceCache | None:
    """The stored predictions of a dataset; None if it was sampled without."""
    kind = manifest.get("store_reference")
    if kind is None:
        return None
    if kind not in NAMES:
        where = f"replay_dataset: {str(folder / 'manifest.json')!r} is damaged"
        raise ValueError(f"{where}: 'store_reference' is {kind!r}, not one of {', '.join(NAMES)}; sample again")
    return ReferenceCache(folder, kind, manifest["rows_per_shard"], num_predictions)
