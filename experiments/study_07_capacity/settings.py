"""What the study trains: two languages, a small model at several lengths of pretraining, and its finetunes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from retain.lab.models import counted_size_of, make_config
from retain.lab.pretrain import PretrainConfig

MARGIN = 0.02  # nats per token; what is smaller does not matter


@dataclass(frozen=True)
class Start:
    """A base to be finetuned.

    Args:
        tokens_per_param: of its pretraining; of several, that which has the longest small base's loss.
        widened: arguments of `retain.lab.models.expand`, for a base that is enlarged first.
    """

    size: str
    tokens_per_param: tuple[float, ...]
    steps: tuple[int, ...]
    widened: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Arm:
    """How a finetune is protected: by KL on rows that the base wrote (self) or that the old language is (real)."""

    rows: str
    coef: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that decides a run; seeds draw weights and rows, the two languages stay."""

    num_states: int = 64
    vocab_size: int = 32
    branching: int = 4
    max_length: int = 64
    small: str = "6400"
    held_out: int = 512
    batch_size: int = 32  # pretraining, in which the rate falls to 0 in a straight line
    learning_rate: float = 3e-3
    lengths: tuple[float, ...] = (20, 100, 2000, 6000)  # tokens per parameter
    shares: tuple[float, ...] = (0.0, 0.05, 0.2, 0.5)  # of rows of the new language, in the two longest
    tune_rows: int = 8  # and as many of replay; the rate falls to 0 in a straight line
    tune_learning_rate: float = 2e-3
    arms: tuple[Arm, ...] = (
        Arm("self", 0.0), Arm("self", 1.0), Arm("self", 3.0), Arm("self", 10.0), Arm("self", 30.0), Arm("real", 10.0),
    )  # fmt: skip
    starts: tuple[tuple[str, Start], ...] = (
        ("saturated", Start("6400", (6000,), (300, 1000, 3000, 10_000))),
        ("20 tokens", Start("6400", (20,), (300, 1000, 3000, 10_000))),
        ("widened", Start("6400", (6000,), (300, 1000, 3000),
                          (("hidden_size", 32), ("intermediate_size", 88), ("num_heads", 2)))),
        ("larger", Start("26e3", (20, 35, 60, 100), (300, 1000, 3000))),
        ("100 tokens", Start("6400", (100,), (300, 1000, 3000, 10_000))),
    )  # fmt: skip
    targets: tuple[float, ...] = (2.05, 1.75)  # new-task loss at which finetunes are compared; the first one decides
    seeds: int = 3

    def language(self, which: int) -> PretrainConfig:
        """The old language (0) or the new one (1)."""
        return PretrainConfig(
            corpus="synthetic", model_size=self.small, num_states=self.num_states, vocab_size=self.vocab_size,
            branching=self.branching, max_length=self.max_length, language_seed=which, eval_rows=self.held_out,
        )  # fmt: skip

    def shape(self, size: str) -> object:
        return make_config(size, vocab_size=self.vocab_size, max_length=self.max_length)

    def pretrain_steps(self, size: str, tokens_per_param: float) -> int:
        tokens = tokens_per_param * counted_size_of(self.shape(size))
        return max(1, round(tokens / self.batch_size / self.max_length))

    def shares_at(self, size: str, tokens_per_param: float) -> tuple[float, ...]:
        """Mixtures are trained as long as the two longest bases, which say whether they have converged."""
        return self.shares if size == self.small and tokens_per_param in self.lengths[-2:] else (0.0,)

    @property
    def ignorance(self) -> float:
        """The loss of a uniform guess among all tokens but the document start, nats per token."""
        return math.log(self.vocab_size - 1)


SCALES = {"laptop": Scale()}
