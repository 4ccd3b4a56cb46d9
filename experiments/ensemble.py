"""Many tiny models trained in one loop: `retain pretrain`'s and `ReplayTrainer`'s own steps, by torch.func.

A step of a tiny model costs more in Python than in arithmetic, so models of one shape are stacked and take every step
together. What a member sees and does is what its run by `transformers.Trainer` sees and does: model, rows, loss,
clipping, schedule and AdamW; `tests/experiments/test_rate_studies.py` and `test_capacity_study.py` hold them together.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import vector_to_parameters
from transformers import Trainer, get_scheduler

from retain.files import atomic_path
from retain.lab.models import make_model
from retain.lab.pretrain import PretrainArguments
from retain.lab.streams import RowFunction

CHUNK = 8192  # rows that are drawn at once
SAVE_SECONDS = 60
Loss = Callable[..., Tensor]  # of a member's vector and its part of a batch, each tensor of it


@dataclass(frozen=True)
class Flat:
    """A model as a function of one vector, in which its parameters lie one after another."""

    model: Any
    names: tuple[str, ...]

    @classmethod
    def of(cls, config: Any) -> Flat:
        model = make_model(config)
        model.set_attn_implementation("eager")  # the only one that vmap takes whole
        return cls(model, tuple(name for name, _ in model.named_parameters()))

    def vector(self, model: Any) -> Tensor:
        """The parameters of a model of this shape."""
        found = dict(model.named_parameters())
        return torch.cat([found[name].detach().flatten() for name in self.names])

    def model_of(self, vector: Tensor) -> Any:
        """A model of its own with these parameters."""
        model = make_model(self.model.config)
        vector_to_parameters(vector.clone(), model.parameters())
        return model

    def decayed(self) -> Tensor:
        """1 where the trainer's weight decay applies, else 0."""
        chosen = set(Trainer.get_decay_parameter_names(None, self.model))  # type: ignore[arg-type]
        parts = [torch.full((p.numel(),), float(name in chosen)) for name, p in self.model.named_parameters()]
        return torch.cat(parts)

    def logits(self, vector: Tensor, tokens: Tensor) -> Tensor:
        """Of rows of one length, shape (rows, length), all next tokens but that of the last: one position less."""
        shapes = [parameter.shape for _, parameter in self.model.named_parameters()]
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(self.names, parts, shapes, strict=True)}
        length = tokens.shape[1]
        masked = torch.full((length, length), -torch.inf).triu(1)[None, None]  # made here: else it depends on data
        inputs = {
            "input_ids": tokens, "attention_mask": {"full_attention": masked}, "use_cache": False,
            "position_ids": torch.arange(length)[None],
        }  # fmt: skip
        return functional_call(self.model, weights, args=(), kwargs=inputs).logits[:, :-1].float()

    def loss(self, vector: Tensor, tokens: Tensor) -> Tensor:
        """Mean next-token loss of rows of one length, shape (rows, length); nats per token."""
        return next_token_loss(self.logits(vector, tokens), tokens)

    def protected_loss(self, vector: Tensor, new: Tensor, replay: Tensor, base: Tensor, coef: Tensor) -> Tensor:
        """The loss on new rows plus `coef` times the mean KL from the base's predictions on replay rows.

        Args:
            new, replay: tokens, shape (rows, length). base: log-probabilities, shape (rows, length - 1, vocabulary).
        """
        logits = self.logits(vector, torch.cat([new, replay]))
        ours = logits[len(new) :].log_softmax(-1)
        divergence = (base.exp() * (base - ours)).sum(-1).mean()
        return next_token_loss(logits[: len(new)], new) + coef * divergence


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over all tokens but each row's first; `logits` have one position less than `tokens`."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Ensemble:
    """Models of one shape and one loss that take AdamW's steps together: torch's AdamW, with the trainer's clipping.

    Args:
        args: beta1, epsilon, weight decay and the norm to which gradients are clipped.
        fast: compile the step where there is a C++ compiler: half the time.
    """

    def __init__(self, flat: Flat, loss: Loss, args: PretrainArguments, fast: bool = True) -> None:
        self.flat, self.loss, self.args = flat, loss, args
        self.fast = fast and shutil.which(os.environ.get("CXX", "g++")) is not None
        self._step: Callable[..., list[Tensor]] | None = None

    def train(
        self,
        weights: Tensor,
        beta2: Tensor,
        rates: Callable[[int], Tensor],
        batches: Callable[[int], Iterable[Sequence[Tensor]]],
        checkpoint: Path,
    ) -> Tensor:
        """The weights after the last batch, shape (members, parameters); a killed call goes on from its checkpoint.

        Args:
            weights: of the start. beta2: of each member, float64.
            rates: of a step, counted from 0, each member's learning rate.
            batches: from a step on, what the loss takes of each step; every tensor has a member's part in a row.
            checkpoint: saved every minute, and removed at the end.
        """
        state, done = [weights, torch.zeros_like(weights), torch.zeros_like(weights)], 0
        if checkpoint.is_file():
            with safe_open(checkpoint, "pt") as file:
                state, done = [file.get_tensor(name) for name in "pmv"], int(file.metadata()["step"])
        saved = time.monotonic()
        for at, batch in enumerate(batches(done), done):
            first = torch.full((len(weights), 1), 1 - self.args.adam_beta1 ** (at + 1))
            second = (1 - beta2 ** (at + 1)).float()[:, None]
            state = self._take_step(*state, beta2.float()[:, None], rates(at)[:, None], first, second, *batch)
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(checkpoint, state, at + 1)
                saved = time.monotonic()
        checkpoint.unlink(missing_ok=True)
        return state[0]

    def _take_step(self, *given: Tensor) -> list[Tensor]:
        if self._step is None:
            step = make_fx(self._make_step())(*given)  # once through Python, not every time
            self._step = torch.compile(step) if self.fast else step
        return self._step(*given)

    def _make_step(self) -> Callable[..., list[Tensor]]:
        args, gradients = self.args, vmap(grad_and_value(self.loss))
        decay, beta1 = args.weight_decay * self.flat.decayed(), args.adam_beta1

        def step(
            p: Tensor, m: Tensor, v: Tensor, beta2: Tensor, rate: Tensor, first: Tensor, second: Tensor, *batch: Tensor
        ) -> list[Tensor]:
            g, _ = gradients(p, *batch)
            norm = g.square().sum(1, keepdim=True).sqrt()
            g = g * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            m = m + (1 - beta1) * (g - m)
            v = beta2 * v + (1 - beta2) * g * g
            p = p * (1 - rate * decay) - rate / first * m / (v.sqrt() / second.sqrt() + args.adam_epsilon)
            return [p, m, v]

        return step


def _save(path: Path, state: Sequence[Tensor], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(dict(zip("pmv", state, strict=True)), temporary, {"step": str(step)})


def step_rows(streams: Sequence[RowFunction], rows: int, steps: range) -> Iterator[Tensor]:
    """The rows of each step of each stream, in the order of their numbers: shape (streams, rows, length)."""
    at_once = max(1, CHUNK // rows)
    for begin in range(steps.start, steps.stop, at_once):
        numbers = np.arange(begin * rows, min(begin + at_once, steps.stop) * rows)
        drawn = torch.from_numpy(np.stack([stream(numbers).astype(np.int64) for stream in streams]))
        yield from drawn.unflatten(1, (-1, rows)).transpose(0, 1)


def schedule(args: PretrainArguments) -> Callable[[int], float]:
    """The trainer's learning rate at a step, as a share of its peak."""
    idle = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = args.get_warmup_steps(args.max_steps)
    made: Any = get_scheduler(args.lr_scheduler_type, idle, warmup, args.max_steps)
    return made.lr_lambdas[0]


@torch.no_grad()
def evaluate(flat: Flat, weights: Tensor, held_out: Tensor, of_seed: Tensor, at_once: int = 64) -> Tensor:
    """Mean loss of every member on its seed's held-out rows."""
    parts = held_out.split(at_once, dim=1)
    losses = [vmap(flat.loss)(weights, part[of_seed]) * part.shape[1] for part in parts]
    return torch.stack(losses).double().sum(0) / held_out.shape[1]
