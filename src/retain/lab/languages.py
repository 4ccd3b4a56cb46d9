"""Synthetic languages of known entropy: endless text whose best possible loss is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from retain.sampling.engine import row_uniforms


@dataclass(frozen=True)
class Language:
    """A hidden-state source: each state emits one of a few tokens, and state and token determine the next state.

    A reader who knows the first state knows every later one (the source is unifilar), so the entropy of its text is
    that of its choices, and the entropy rate is exact: h = Σ_s π(s) H(tokens | s), with π the stationary distribution
    of the states (Shannon 1948, theorem 7). A model has to learn the table: num_states · branching choices.

    Args:
        num_states: hidden states; a document starts in the first.
        vocab_size: tokens; id 0 is the document start and is never emitted.
        branching: tokens that a state may emit.
        concentration: of the Dirichlet distribution of their probabilities; a small one makes text predictable.
        seed: each seed gives another language.

    >>> language = Language(num_states=16, vocab_size=16, branching=3)
    >>> round(language.entropy_rate, 4), round(language.ideal_loss(length=128), 4)
    (0.7662, 0.7664)
    >>> language.rows([1000, 1001], length=8, seed=0).shape
    (2, 8)
    """

    num_states: int = 256
    vocab_size: int = 64
    branching: int = 4
    concentration: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_states < 2:
            raise ValueError(f"num_states: {self.num_states} does not fit; use 2 or more")
        if not 2 <= self.branching < self.vocab_size - 1:
            raise ValueError(
                f"branching: {self.branching} does not fit; use 2 to {self.vocab_size - 2} (vocab_size − 2)"
            )
        if self.concentration <= 0:
            raise ValueError(f"concentration: {self.concentration} does not fit; use a number above 0")

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, their probabilities and the next states, each of shape (states, branching)."""
        rng, shape = np.random.default_rng(self.seed), (self.num_states, self.branching)
        tokens = np.empty(shape, dtype=np.int64)
        for first in range(0, self.num_states, 1024):  # the same draws in less memory
            part = tokens[first : first + 1024]
            part[:] = 1 + rng.random((len(part), self.vocab_size - 1)).argpartition(self.branching)[:, : self.branching]
        gammas = np.maximum(rng.gamma(self.concentration, size=shape), 1e-6)
        following = rng.integers(self.num_states, size=shape)
        ring = rng.permutation(self.num_states)
        following[ring, 0] = np.roll(ring, 1)  # every state leads to every other
        return tokens, gammas / gammas.sum(1, keepdims=True), following

    @cached_property
    def entropies(self) -> np.ndarray:
        """Entropy of the next token in each state, nats, shape (states,)."""
        probabilities = self.table[1]
        return -(probabilities * np.log(probabilities)).sum(1)

    def _step(self, shares: np.ndarray) -> np.ndarray:
        _, probabilities, following = self.table
        return np.bincount(following.ravel(), (shares[:, None] * probabilities).ravel(), minlength=self.num_states)

    @cached_property
    def stationary(self) -> np.ndarray:
        """Share of time in each state, shape (states,): the limit of the lazy chain, to 1e-13."""
        shares = np.full(self.num_states, 1 / self.num_states)
        for _ in range(1_000_000):
            after = (shares + self._step(shares)) / 2
            if np.abs(after - shares).sum() < 1e-13:
                return after
            shares = after
        raise AssertionError("the chain does not mix")

    @property
    def entropy_rate(self) -> float:
        """The lowest long-run loss of any model, nats per token."""
        return float(self.stationary @ self.entropies)

    def ideal_loss(self, length: int) -> float:
        """Mean loss, nats per token, of a model that knows the language, on rows of `length` tokens with the start.

        Exact for rows, which begin in the first state; tends to the entropy rate for long ones.
        """
        shares, total = (np.arange(self.num_states) == 0).astype(float), 0.0
        for _ in range(length - 1):
            total += float(shares @ self.entropies)
            shares = self._step(shares)
        return total / (length - 1)

    def rows(self, numbers: np.ndarray | Sequence[int], length: int, seed: int) -> np.ndarray:
        """Rows with these numbers, start included, shape (rows, length); a pure function of number and seed."""
        tokens, probabilities, following = self.table
        bounds = probabilities.cumsum(1)[:, :-1]
        uniforms = np.stack([row_uniforms(seed, int(number), length) for number in numbers])
        state, rows = np.zeros(len(uniforms), dtype=np.int64), np.zeros((len(uniforms), length), dtype=np.int64)
        for at in range(1, length):
            chosen = (uniforms[:, at, None] >= bounds[state]).sum(1)
            rows[:, at], state = tokens[state, chosen], following[state, chosen]
        return rows
