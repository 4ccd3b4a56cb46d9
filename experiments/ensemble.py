"""Many tiny models trained in one loop: the steps of `retain pretrain` and `ReplayTrainer`, with torch.func.

A step of a tiny model costs more in Python than in arithmetic, so models of one shape are stacked and take every step
together. A member has the same model, rows, loss, clipping, schedule and AdamW as its run with `transformers.Trainer`;
`tests/experiments/test_rate_studies.py` and `test_capacity_study.py` compare them.
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

CHUNK = 8192  # rows drawn at once
SAVE_SECONDS = 60
Loss = Callable[..., Tensor]  # takes a member's vector, and its part of each tensor of a batch


@dataclass(frozen=True)
class Flat:
    """A model as a function of one vector, the concatenation of its parameters."""

    model: Any
    names: tuple[str, ...]

    @classmethod
    def of(cls, config: Any) -> Flat:
        model = make_model(config)
        model.set_attn_implementation("eager")  # the only one that vmap can batch
        return cls(model, tuple(name for name, _ in model.named_parameters()))

    def vector(self, model: Any) -> Tensor:
        """The parameters of a model of this shape, as a vector."""
        parameters = dict(model.named_parameters())
        return torch.cat([parameters[name].detach().flatten() for name in self.names])

    def model_of(self, vector: Tensor) -> Any:
        """A new model with these parameters."""
        model = make_model(self.model.config)
        vector_to_parameters(vector.clone(), model.parameters())
        return model

    def decayed(self) -> Tensor:
        """A vector with 1 where the trainer's weight decay applies, else 0."""
        names = set(Trainer.get_decay_parameter_names(None, self.model))  # type: ignore[arg-type]
        parts = [torch.full((p.numel(),), float(name in names)) for name, p in self.model.named_parameters()]
        return torch.cat(parts)

    def logits(self, vector: Tensor, tokens: Tensor) -> Tensor:
        """Logits of rows of one length (rows, length), without the last position; (rows, length - 1, vocabulary)."""
        shapes = [parameter.shape for _, parameter in self.model.named_parameters()]
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(self.names, parts, shapes, strict=True)}
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]  # transformers' mask would depend on data
        inputs = {
            "input_ids": tokens, "attention_mask": {"full_attention": mask}, "use_cache": False,
            "position_ids": torch.arange(length)[None],
        }  # fmt: skip
        return functional_call(self.model, weights, args=(), kwargs=inputs).logits[:, :-1].float()

    def loss(self, vector: Tensor, tokens: Tensor) -> Tensor:
        """Mean next-token loss of rows of one length, shape (rows, length); nats per token."""
        return next_token_loss(self.logits(vector, tokens), tokens)

    def protected_loss(self, vector: Tensor, new: Tensor, replay: Tensor, base: Tensor, coef: Tensor) -> Tensor:
        """The loss on new rows plus `coef` times the mean KL from the base's predictions on replay rows.

        Args:
            new, replay: tokens, shape (rows, length).
            base: log-probabilities, shape (rows, length - 1, vocabulary).
        """
        logits = self.logits(vector, torch.cat([new, replay]))
        log_probs = logits[len(new) :].log_softmax(-1)
        divergence = (base.exp() * (base - log_probs)).sum(-1).mean()
        return next_token_loss(logits[: len(new)], new) + coef * divergence


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss; `logits` have one position less than `tokens`."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Ensemble:
    """Models of one shape and one loss that train together, with torch's AdamW and the trainer's gradient clipping.

    Args:
        args: for beta1, epsilon, weight decay and the maximal norm of gradients.
        fast: compile the step if there is a C++ compiler, which halves the time.
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
        """Train on all batches; returns the weights, shape (members, parameters). Resumes from its checkpoint.

        Args:
            weights: initial weights.
            beta2: of each member, float64.
            rates: step, counted from 0 → learning rate of each member.
            batches: first step → the loss's tensors of each step from there on, with members as their first axis.
            checkpoint: written every minute, removed at the end.
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

    def _take_step(self, *inputs: Tensor) -> list[Tensor]:
        if self._step is None:
            step = make_fx(self._make_step())(*inputs)  # traced once, so later steps skip Python
            self._step = torch.compile(step) if self.fast else step
        return self._step(*inputs)

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
    """The rows of each step, those of each stream in the order of their numbers; shape (streams, rows, length)."""
    steps_at_once = max(1, CHUNK // rows)
    for first in range(steps.start, steps.stop, steps_at_once):
        numbers = np.arange(first * rows, min(first + steps_at_once, steps.stop) * rows)
        drawn = torch.from_numpy(np.stack([stream(numbers).astype(np.int64) for stream in streams]))
        yield from drawn.unflatten(1, (-1, rows)).transpose(0, 1)


def schedule(args: PretrainArguments) -> Callable[[int], float]:
    """The trainer's schedule: step → learning rate as a share of its peak."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = args.get_warmup_steps(args.max_steps)
    scheduler: Any = get_scheduler(args.lr_scheduler_type, optimizer, warmup, args.max_steps)
    return scheduler.lr_lambdas[0]


@torch.no_grad()
def evaluate(flat: Flat, weights: Tensor, held_out: Tensor, of_seed: Tensor, at_once: int = 64) -> Tensor:
    """Mean loss of every member on its seed's part of `held_out` (seeds, rows, length); `of_seed`: its seed's index."""
    parts = held_out.split(at_once, dim=1)
    losses = [vmap(flat.loss)(weights, part[of_seed]) * part.shape[1] for part in parts]
    return torch.stack(losses).double().sum(0) / held_out.shape[1]
