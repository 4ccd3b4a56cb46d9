"""The runs of one batch size as an ensemble: models that differ in learning rate, beta2 and seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.ensemble import Ensemble, Flat, evaluate, schedule, step_rows
from retain.lab.models import make_config, make_model
from retain.lab.pretrain import Corpus, PretrainArguments
from retain.training.beta2_half_life import beta2_of_half_life


@dataclass(frozen=True)
class Member:
    """In what the models of an ensemble differ."""

    half_life: float
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """What came of the members: held-out losses, and weights of shape (members, parameters)."""

    flat: Flat
    weights: Tensor
    losses: list[float]


def train_together(
    members: Sequence[Member], corpora: dict[int, Corpus], args: PretrainArguments, size: str, folder: Path,
    fast: bool = True,
) -> Trained:  # fmt: skip
    """The members after `args.max_steps` steps.

    Args:
        corpora: by seed. folder: holds the checkpoint of a killed call of the same members, and is emptied of it.
    """
    seeds, any_corpus = list(corpora), next(iter(corpora.values()))
    shape = make_config(size, vocab_size=len(any_corpus.tokenizer), max_length=any_corpus.length)
    flat, of_seed = Flat.of(shape), torch.tensor([seeds.index(member.seed) for member in members])
    weights = torch.stack([flat.vector(make_model(shape, seed)) for seed in seeds])[of_seed]
    rows, share = args.train_batch_size, schedule(args)
    beta2 = [beta2_of_half_life(member.half_life, rows * any_corpus.length) for member in members]
    peak = torch.tensor([member.learning_rate for member in members])
    streams = [corpus.stream(rows * args.max_steps, seed) for seed, corpus in corpora.items()]

    def batches(done: int) -> Iterator[tuple[Tensor]]:
        return ((drawn[of_seed],) for drawn in step_rows(streams, rows, range(done, args.max_steps)))

    weights = Ensemble(flat, flat.loss, args, fast).train(
        weights, torch.tensor(beta2, dtype=torch.float64), lambda at: peak * share(at), batches,
        folder / "ensemble.safetensors",
    )  # fmt: skip
    held_out = torch.from_numpy(np.stack([corpora[seed].held_out for seed in seeds]).astype(np.int64))
    return Trained(flat, weights, evaluate(flat, weights, held_out, of_seed).tolist())
