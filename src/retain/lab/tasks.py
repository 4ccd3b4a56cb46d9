"""The digit tasks of Marek et al. (arXiv 2605.26097, continual tasks): add, reversal, sort, modadd.

A row of n-digit numbers has 3n + 5 tokens, with loss on all but the first, from which replay is sampled:

    <add>      a a a + b b b = s s s s <eos>      the sum, n + 1 digits
    <modadd>   a a a + b b b = 0 s s s <eos>      the sum modulo 10^n
    <reversal> a a a + _ _ _ = 0 r r r <eos>      the digits of a from last to first
    <sort>     a a a + _ _ _ = 0 r r r <eos>      the digits of a from smallest to largest

A share of each task's items (numbers or pairs of numbers) is held out and never drawn for training. In the paper,
validation rows are drawn like training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retain.sampling.engine import row_uniforms

TASKS = ("add", "reversal", "sort", "modadd")
SPECIAL = ("<pad>", *(f"<{task}>" for task in TASKS), "+", "=", "_", "<eos>")
VOCABULARY = (*SPECIAL, *"0123456789")  # 19 tokens
PAD, PLUS, EQUALS, BLANK, EOS, ZERO = 0, 5, 6, 7, 8, 9  # ids
PAIRS = ("add", "modadd")


@dataclass(frozen=True)
class DigitTask:
    """One task on n-digit numbers; training never draws the share `held_out` of its items, chosen by `seed`.

    >>> task = DigitTask("add", digits=1)
    >>> digit_tokenizer("add").decode(task.rows(np.array([34]))[0])
    '<add> 3 + 4 = 0 7 <eos>'
    """

    name: str
    digits: int = 3
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"task: {self.name!r} is not known; use one of {', '.join(TASKS)}")
        if not 1 <= self.digits <= 4:
            raise ValueError(f"digits: {self.digits!r} does not fit; use a whole number from 1 to 4")
        if not 0 < self.held_out < 1 or not 0 < len(self.held_out_items) < self.num_items:
            raise ValueError(f"held_out: {self.held_out!r} of {self.num_items} items leaves none on one side; use 0.1")

    @property
    def start_id(self) -> int:
        """The task's start token."""
        return 1 + TASKS.index(self.name)

    @property
    def length(self) -> int:
        """Tokens per row."""
        return 3 * self.digits + 5

    @property
    def answer_length(self) -> int:
        """Tokens of the answer: n + 1 digits and the end."""
        return self.digits + 2

    @property
    def num_items(self) -> int:
        """Number of different questions: 10^n, or 10^2n for tasks with two numbers."""
        return 10 ** (self.digits * (2 if self.name in PAIRS else 1))

    @cached_property
    def held_out_items(self) -> np.ndarray:
        """Items kept from training, sorted."""
        count = max(1, round(self.held_out * self.num_items))
        rng = np.random.default_rng([self.seed, TASKS.index(self.name)])
        return np.sort(rng.choice(self.num_items, size=count, replace=False))

    def training_items(self, rows: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
        """Items of the training rows with these numbers, uniform over those not held out, shape (rows,)."""
        uniforms = np.array([row_uniforms(seed, int(row), 1)[0] for row in rows])
        return self._not_held_out((uniforms * (self.num_items - len(self.held_out_items))).astype(np.int64))

    def _not_held_out(self, indices: np.ndarray) -> np.ndarray:
        """Items by their index among those that may be drawn."""
        num_before = self.held_out_items - np.arange(len(self.held_out_items))  # items before each that may be drawn
        return indices + np.searchsorted(num_before, indices, side="right")

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Token ids of these items, shape (items, length)."""
        n, base = self.digits, 10**self.digits
        first, second = (items // base, items % base) if self.name in PAIRS else (items, None)
        digits = _digits(first, n)
        if self.name == "reversal":
            answer = np.pad(digits[:, ::-1], ((0, 0), (1, 0)))
        elif self.name == "sort":
            answer = np.pad(np.sort(digits, axis=1), ((0, 0), (1, 0)))
        else:
            assert second is not None
            total = first + second
            answer = _digits(total if self.name == "add" else total % base, n + 1)
        other = np.full_like(digits, BLANK) if second is None else ZERO + _digits(second, n)
        column = np.ones((len(items), 1), dtype=np.int64)
        parts = (self.start_id * column, ZERO + digits, PLUS * column, other, EQUALS * column, ZERO + answer)
        return np.concatenate([*parts, EOS * column], axis=1)

    def training_rows(self, rows: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
        """Training rows with these numbers, shape (rows, length); a pure function of number and seed."""
        return self.rows(self.training_items(rows, seed))

    def held_out_rows(self, max_rows: int | None = None) -> np.ndarray:
        """Rows of the held-out items, or of `max_rows` of them, always the same ones."""
        items = self.held_out_items
        if max_rows is not None and max_rows < len(items):
            items = np.random.default_rng(self.seed).choice(items, max_rows, replace=False)
        return self.rows(items)


def _digits(values: np.ndarray, width: int) -> np.ndarray:
    return values[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10


@torch.inference_mode()
def exact_match(model: Any, rows: np.ndarray, answer_length: int, batch_size: int = 1024) -> np.ndarray:
    """Whether greedy decoding writes the whole answer and the end, shape (rows,) of bool.

    One forward pass over the right answer decides: greedy decoding is right if every arg-max of that pass is.
    """
    was_training, matches = model.training, []
    model.eval()
    for at in range(0, len(rows), batch_size):
        batch = torch.from_numpy(rows[at : at + batch_size]).to(model.device)
        logits = model(input_ids=batch[:, :-1], logits_to_keep=answer_length).logits
        matches.append((logits.argmax(-1) == batch[:, -answer_length:]).all(-1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(matches)


def digit_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the 19 tokens, digits and signs one character each; its BOS is the start token of `task`."""
    raw = Tokenizer(models.WordLevel({token: at for at, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.add_special_tokens([token for token in SPECIAL if len(token) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=f"<{task}>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
