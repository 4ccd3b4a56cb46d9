"""The base's predictions, kept beside the replay rows that it drew: training then needs no reference forward pass.

`hidden`: the last hidden state, from which the base's whole distribution follows given its output head.
`topk`: the log-probabilities of its likeliest tokens; the mass of the rest follows from them.
One safetensors file per shard, row after row over the drawn tokens, memory-mapped when it is read.
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

TOP_K = 64  # likeliest tokens that a store of kind "topk" keeps of each prediction
STORING = "storing predictions"  # its stage of progress
NAMES = {"hidden": ("hidden",), "topk": ("log_probs", "tokens")}


def cache_path(folder: Path, shard: int) -> Path:
    """The file beside a shard; it is written first, so a shard that is there has its predictions."""
    return folder / f"reference-{shard:05d}.safetensors"


def kept_of(
    kind: str, states: Float[Tensor, "predictions size"], log_probs: Float[Tensor, "predictions vocabulary"]
) -> dict[str, Tensor]:
    """What a store of this kind keeps of predictions, on the CPU."""
    if kind == "hidden":
        return {"hidden": states.cpu()}
    found = log_probs.topk(min(TOP_K, log_probs.shape[-1]), dim=-1)
    return {"log_probs": found.values.cpu(), "tokens": found.indices.to(torch.int32).cpu()}


@torch.no_grad()
def predict_rows(model: Any, rows: ReplayDataset, kind: str, shards: Sequence[int]) -> None:
    """Write what the model that drew finished rows predicts on them, by whole rows, beside their shards.

    Shards that have predictions of this kind are left alone, so a killed pass can be run again.

    Args:
        shards: their numbers; processes may share them out.
    """
    folder, per_shard = Path(rows.source), rows.manifest["rows_per_shard"]  # type: ignore[index]
    todo = [shard for shard in shards if not holds_predictions(cache_path(folder, shard), kind)]
    size = rows_per_batch(model.config.get_text_config().vocab_size, int(rows.num_predictions.max()))
    with evaluation_mode(model), seen_by_head(model) as hidden, StageProgress(STORING, len(todo), "shards") as stage:
        for shard in todo:
            found, end = [], min((shard + 1) * per_shard, len(rows))
            for first in range(shard * per_shard, end, size):
                given = rows.batch(range(first, min(first + size, end)))
                batch = {name: value.to(model.device) for name, value in given.items()}
                drawn = batch.pop("labels")[:, 1:] != -100
                logits = model(**batch).logits
                if kind != "hidden":  # which needs none: they are large
                    logits = logits[:, :-1][drawn].float().log_softmax(-1)
                found.append(kept_of(kind, hidden[-1][:, :-1][drawn], logits))
                hidden.clear()
            write_predictions(folder, shard, {name: torch.cat([part[name] for part in found]) for name in NAMES[kind]})
            stage.update(1)


def holds_predictions(path: Path, kind: str) -> bool:
    """Whether a file is whole and of this kind; one of another may be left of a killed pass."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == set(NAMES[kind])
    except (OSError, SafetensorError):
        return False


def write_predictions(folder: Path, shard: int, predictions: dict[str, Tensor]) -> None:
    """Write the predictions of a shard's rows, each of shape (drawn tokens, size)."""
    with atomic_path(cache_path(folder, shard)) as temporary:
        save_file({name: value.clone() for name, value in predictions.items()}, temporary)


def bytes_per_token(folder: Path, num_tokens: int) -> float:
    """Size of the stored predictions on disk, per drawn token."""
    return sum(path.stat().st_size for path in folder.glob("reference-*.safetensors")) / num_tokens


@dataclass(frozen=True)
class ReferenceCache:
    """Stored predictions of a finished replay dataset.

    Args:
        kind: "hidden" or "topk".
        num_predictions: drawn tokens of each row, shape (rows,).
    """

    folder: Path
    kind: str
    rows_per_shard: int
    num_predictions: np.ndarray

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where each row begins in its shard's file, shape (rows,)."""
        before = np.concatenate([[0], np.cumsum(self.num_predictions)])
        first = np.arange(len(self.num_predictions)) // self.rows_per_shard * self.rows_per_shard
        return before[:-1] - before[first]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What the base predicted at the drawn tokens of these rows, one row after the other; (drawn tokens, size)."""
        parts = [self._row(int(index)) for index in indices]
        return {name: torch.cat([part[name] for part in parts]) for name in NAMES[self.kind]}

    def check_whole(self) -> None:
        """Refuse a store in which a shard has no file, or one of other rows: only their headers are read."""
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
        """The file that holds a row."""
        path = cache_path(self.folder, index // self.rows_per_shard)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"replay_dataset: {str(path)!r} is missing or damaged; delete it and run the same `retain "
                f"sample`, or set replay_reference to adapter or copy: {error}"
            ) from error


def open_cache(folder: Path, manifest: dict[str, Any], num_predictions: np.ndarray) -> ReferenceCache | None:
    """The stored predictions of a dataset, or None where it was sampled without."""
    kind = manifest.get("store_reference")
    if kind is None:
        return None
    if kind not in NAMES:
        where = f"replay_dataset: {str(folder / 'manifest.json')!r} is damaged"
        raise ValueError(f"{where}: 'store_reference' is {kind!r}, not one of {', '.join(NAMES)}; sample again")
    return ReferenceCache(folder, kind, manifest["rows_per_shard"], num_predictions)
