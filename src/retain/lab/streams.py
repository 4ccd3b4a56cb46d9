"""Training rows by number: each is a pure function of its number and a seed, so a resumed run sees the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from retain.replay.dataset import replay_indices

RowFunction = Callable[[np.ndarray], np.ndarray]  # row numbers -> token ids, shape (rows, length)


class Stream(Dataset):
    """Rows by number as a torch data set, drawn a batch at a time; loss on every token but the first."""

    def __init__(self, rows: RowFunction, num_rows: int) -> None:
        self.rows, self.num_rows = rows, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        tokens = torch.from_numpy(self.rows(np.asarray(indices)).astype(np.int64))
        return [{"input_ids": row, "labels": row} for row in tokens]


def shuffled(rows: np.ndarray, seed: int) -> RowFunction:
    """A stream of real rows, shape (rows, length): every row once per pass, in a new order each pass.

    >>> shuffled(np.array([[1], [2], [3]]), seed=1)(np.arange(6)).ravel().tolist()
    [1, 2, 3, 3, 1, 2]
    """
    return lambda numbers: rows[[int(replay_indices(int(at), 1, len(rows), seed)[0]) for at in numbers]]


def mixture(parts: Sequence[tuple[float, RowFunction]], num_rows: int, seed: int) -> RowFunction:
    """Rows of several streams, mixed at random by their shares; each stream is read in its own order."""
    shares = np.array([share for share, _ in parts])
    rng = np.random.default_rng([seed, len(parts)])
    choice = rng.choice(len(parts), size=num_rows, p=shares / shares.sum())
    number_in_part = np.zeros(num_rows, dtype=np.int64)
    for part in range(len(parts)):
        mask = choice == part
        number_in_part[mask] = np.arange(mask.sum())

    def rows(numbers: np.ndarray) -> np.ndarray:
        mixed: list[Any] = [None] * len(numbers)
        for part, (_, source) in enumerate(parts):
            at = np.flatnonzero(choice[numbers] == part)
            for index, row in zip(at, source(number_in_part[numbers[at]]) if len(at) else (), strict=True):
                mixed[index] = row
        return np.stack(mixed)

    return rows
