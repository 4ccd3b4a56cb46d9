"""Many tiny models trained in one loop: `retain pretrain`'s own steps, by torch.func.

A step of a tiny model costs more in Python than in arithmetic, so models that differ in learning rate, beta2 and seed
alone are stacked and take every step together. What a member sees and does is what its run by `transformers.Trainer`
sees and does: model, rows, loss, clipping, schedule and AdamW; `tests/experiments/test_rate_studies.py` holds the two
together.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
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
from transformers import Trainer, get_scheduler

from retain.files import atomic_path
from retain.lab.models import make_config, make_model
from retain.lab.pretrain import Corpus, PretrainArguments
from retain.training.beta2_half_life import beta2_of_half_life

CHUNK = 8192  # rows that are drawn at once
SAVE_SECONDS = 60
Step = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Member:
    """In what the models of an ensemble differ."""

    half_life: float
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Flat:
    """A model as a function of one vector, in which its parameters lie one after another."""

    model: Any
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: Any) -> Flat:
        model.set_attn_implementation("eager")  # the only one that vmap takes whole
        return cls(model, tuple(name for name, _ in model.named_parameters()))

    def vector(self, model: Any) -> Tensor:
        """The parameters of a model of this shape."""
        found = dict(model.named_parameters())
        return torch.cat([found[name].detach().flatten() for name in self.names])

    def decayed(self) -> Tensor:
        """1 where the trainer's weight decay applies, else 0."""
        chosen = set(Trainer.get_decay_parameter_names(None, self.model))  # type: ignore[arg-type]
        parts = [torch.full((p.numel(),), float(name in chosen)) for name, p in self.model.named_parameters()]
        return torch.cat(parts)

    def loss(self, vector: Tensor, tokens: Tensor) -> Tensor:
        """Mean next-token loss of rows of one length, shape (rows, length); nats per token."""
        shapes = [parameter.shape for _, parameter in self.model.named_parameters()]
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(self.names, parts, shapes, strict=True)}
        length = tokens.shape[1]
        masked = torch.full((length, length), -torch.inf).triu(1)[None, None]  # made here: else it depends on data
        inputs = {
            "input_ids": tokens, "attention_mask": {"full_attention": masked}, "use_cache": False,
            "position_ids": torch.arange(length)[None],
        }  # fmt: skip
        logits = functional_call(self.model, weights, args=(), kwargs=inputs).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Trained:
    """What came of the members: held-out losses, and weights of shape (members, parameters)."""

    flat: Flat
    weights: Tensor
    losses: list[float]


def make_step(flat: Flat, args: PretrainArguments, beta2: Tensor) -> Step:
    """A step of AdamW for all members, as torch's and with the trainer's clipping.

    Takes weights, first and second moments of shape (members, parameters), tokens of shape (members, rows, length), and
    the step's rates and bias corrections of shape (members, 1); gives weights and moments.
    """
    gradients, decay = vmap(grad_and_value(flat.loss)), args.weight_decay * flat.decayed()
    beta1, beta2 = args.adam_beta1, beta2[:, None]

    def step(p: Tensor, m: Tensor, v: Tensor, tokens: Tensor, rate: Tensor, first: Tensor, second: Tensor) -> Any:
        g, _ = gradients(p, tokens)
        norm = g.square().sum(1, keepdim=True).sqrt()
        g = g * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p = p * (1 - rate * decay) - rate / first * m / (v.sqrt() / second.sqrt() + args.adam_epsilon)
        return [p, m, v]

    return step


def batches(corpora: Sequence[Corpus], seeds: Sequence[int], rows: int, steps: range) -> Iterator[Tensor]:
    """The rows of each step for each seed, in the order of their numbers: shape (seeds, rows, length)."""
    total, at_once = rows * steps.stop, max(1, CHUNK // rows)
    streams = [corpus.stream(total, seed) for corpus, seed in zip(corpora, seeds, strict=True)]
    for begin in range(steps.start, steps.stop, at_once):
        numbers = np.arange(begin * rows, min(begin + at_once, steps.stop) * rows)
        drawn = torch.from_numpy(np.stack([stream(numbers).astype(np.int64) for stream in streams]))
        yield from drawn.unflatten(1, (-1, rows)).transpose(0, 1)


def train_together(
    members: Sequence[Member], corpora: dict[int, Corpus], args: PretrainArguments, size: str, folder: Path,
    fast: bool = True,
) -> Trained:  # fmt: skip
    """The members after `args.max_steps` steps.

    Args:
        corpora: by seed. folder: holds the checkpoint of a killed call of the same members, and is emptied of it.
        fast: compile the step where there is a C++ compiler: half the time.
    """
    fast = fast and shutil.which(os.environ.get("CXX", "g++")) is not None
    seeds, any_corpus = list(corpora), next(iter(corpora.values()))
    shape = make_config(size, vocab_size=len(any_corpus.tokenizer), max_length=any_corpus.length)
    flat, of_seed = Flat.of(make_model(shape, 0)), torch.tensor([seeds.index(member.seed) for member in members])
    weights = torch.stack([flat.vector(make_model(shape, seed)) for seed in seeds])[of_seed]
    weights = _train(flat, weights, of_seed, members, corpora, args, folder / "ensemble.safetensors", fast)
    held_out = torch.from_numpy(np.stack([corpora[seed].held_out for seed in seeds]).astype(np.int64))
    return Trained(flat, weights, evaluate(flat, weights, held_out, of_seed).tolist())


def _train(
    flat: Flat, weights: Tensor, of_seed: Tensor, members: Sequence[Member], corpora: dict[int, Corpus],
    args: PretrainArguments, checkpoint: Path, fast: bool,
) -> Tensor:  # fmt: skip
    """The steps that are left, with a checkpoint every minute."""
    step_tokens = args.train_batch_size * next(iter(corpora.values())).length
    beta2 = torch.tensor([beta2_of_half_life(member.half_life, step_tokens) for member in members], dtype=torch.float64)
    peak = torch.tensor([member.learning_rate for member in members])[:, None]
    share, done = schedule(args), 0
    state = [weights, torch.zeros_like(weights), torch.zeros_like(weights)]
    if checkpoint.is_file():
        with safe_open(checkpoint, "pt") as file:
            state, done = [file.get_tensor(name) for name in "pmv"], int(file.metadata()["step"])
    step, saved = make_step(flat, args, beta2.float()), time.monotonic()
    rows = batches(list(corpora.values()), list(corpora), args.train_batch_size, range(done, args.max_steps))
    for at, drawn in enumerate(rows, done):
        first = torch.full_like(peak, 1 - args.adam_beta1 ** (at + 1))
        second = (1 - beta2 ** (at + 1)).float()[:, None]
        given = (*state, drawn[of_seed], peak * share(at), first, second)
        if at == done:
            step = make_fx(step)(*given)  # once through Python, not every time
            step = torch.compile(step) if fast else step
        state = step(*given)
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(checkpoint, state, at + 1)
            saved = time.monotonic()
    checkpoint.unlink(missing_ok=True)
    return state[0]


def _save(path: Path, state: Sequence[Tensor], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(dict(zip("pmv", state, strict=True)), temporary, {"step": str(step)})


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
