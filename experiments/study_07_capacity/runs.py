"""Bases of several sizes and lengths on one synthetic language, and their finetunes on another: rows of results.

Studies 07, 08 and 13 share them. A row is a finetune of a fixed number of steps; one with a coefficient below 1 ends
where its new-task loss comes down to the target.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.finetunes import Bench, Run, StudyResults, finetune
from experiments.lab_bases import open_lab_bench, pretrain
from retain import load_model
from retain.lab.models import counted_size_of, expand, make_config
from retain.lab.pretrain import PretrainConfig, open_corpus

logger = logging.getLogger("experiments")
A_DECADE = 16  # checkpoints for each tenfold of pretraining
FIRST_STEPS = 8
HELD_OUT = 128  # rows of each language on which finetunes are measured
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A model size, its most tokens per parameter, and coefficients about the one that just reaches the target."""

    name: str
    most: float
    coefs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """Two languages, how models are pretrained on one and finetuned on the other, and how far."""

    num_states: int = 64
    vocab_size: int = 32
    branching: int = 4
    max_length: int = 64
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    sizes: tuple[Size, ...] = (
        Size("6400", 562.3413, (1.0, 3.0)),
        Size("26e3", 133.3521, (10.0, 30.0)),
        Size("57e3", 17.7828, (10.0, 30.0)),
    )
    target: float = 2.05
    tune_learning_rate: float = 2e-3
    tune_rows: int = 16
    replay_rows: int = 16
    replay_pool: int = 4096
    max_steps: int = 300
    eval_steps: int = 25

    def facts(self) -> Row:
        """What decides a finetune, beside its base and coefficient."""
        return {name: value for name, value in asdict(self).items() if name != "sizes"}

    def size(self, name: str) -> Size:
        return next(size for size in self.sizes if size.name == name)

    def language(self, size: str, seed: int) -> PretrainConfig:
        """The old language (0) or the new one (1)."""
        return PretrainConfig(
            corpus="synthetic", model_size=size, num_states=self.num_states, vocab_size=self.vocab_size,
            branching=self.branching, max_length=self.max_length, language_seed=seed,
        )  # fmt: skip

    def lengths(self, size: str) -> list[float]:
        """Tokens per parameter at which the base is kept: even on a log scale, up to the size's most."""
        num_params = counted_size_of(make_config(size, vocab_size=self.vocab_size, max_length=self.max_length))
        least = FIRST_STEPS * self.batch_size * self.max_length / num_params
        first, last = math.ceil(A_DECADE * math.log10(least)), round(A_DECADE * math.log10(self.size(size).most))
        return [round(10 ** (at / A_DECADE), 4) for at in range(first, last + 1)]

    def pretraining(self) -> Row:
        return {
            "per_device_train_batch_size": self.batch_size, "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps, "eval_strategy": "no", "logging_strategy": "no",
        }  # fmt: skip


def bases(world: World, size: str, seed: int) -> dict[float, Row]:
    """A size's base at every length, from one run at a constant learning rate."""
    return pretrain(world.language(size, 0), world.lengths(size), seed=seed, **world.pretraining())


def at_length(world: World, size: str, tokens_per_param: float) -> float:
    """The length at which a base is kept that comes nearest."""
    return min(world.lengths(size), key=lambda one: abs(math.log(one / tokens_per_param)))


def at_loss(world: World, size: str, curve: Row, loss: float) -> float:
    """The length whose base comes nearest to a held-out loss: first on its curve where several do.

    Args:
        curve: the row of `curve_row`.
    """
    found = {length: min(curve["curve"], key=lambda at: abs(at[0] - length))[1] for length in world.lengths(size)}
    return min(found, key=lambda length: abs(found[length] - loss))


def curve_row(world: World, size: str, seed: int, results: StudyResults) -> Row:
    """Tokens per parameter and held-out loss along a base's pretraining, as a row."""
    settings = {"kind": "base", "size": size, "seed": seed, "most": world.size(size).most,
                **{name: value for name, value in world.facts().items() if name in world.language(size, 0).__dict__},
                **world.pretraining()}  # fmt: skip

    def compute() -> Row:
        found = bases(world, size, seed)
        last = found[max(found)]
        curve = [[round(at, 3), round(loss, 4)] for at, loss in last["curve"]]
        return {"num_params": last["num_params"], "curve": curve, "ideal_loss": round(last["ideal_loss"], 5)}

    return results.make(settings, compute)


@functools.lru_cache(maxsize=2)
def bench_of(world: World, folder: Path, size: str, seed: int) -> Bench:
    """Rows of the new language, held-out rows of the old one, and replay that the base writes."""
    old, new = (open_corpus(world.language(size, which), seed) for which in (0, 1))
    num_train = world.max_steps * world.tune_rows
    return open_lab_bench(
        folder, new, old, num_train=num_train, num_replay=world.replay_pool, held_out=HELD_OUT, seed=seed
    )


def tune(
    world: World, size: str, length: float, coef: float, seed: int, results: StudyResults,
    shared: StudyResults | None = None, grown: Row | None = None,
) -> Row:  # fmt: skip
    """One finetune as a row, made once; taken from another study's results where it is there.

    Args:
        length: tokens per parameter at which the base is kept; bases are pretrained when a row is missing.
        grown: arguments of `expand`, for a model that is enlarged first.
    """
    settings = {"kind": "tune", "size": size, "tokens_per_param": length, "coef": coef, "seed": seed, **world.facts()}
    if grown is not None:
        settings["grown"] = grown

    def compute() -> Row:
        taken = shared.get(settings) if shared is not None else None
        if taken is not None:
            return {name: value for name, value in taken.items() if name in _KEPT}
        return tune_now(world, bases(world, size, seed)[length], size, coef, seed, grown)

    return results.make(settings, compute)


_KEPT = ("num_params", "all_params", "base_loss", "trajectory", "function_gap")


def tune_now(world: World, base: Row, size: str, coef: float, seed: int, grown: Row | None) -> Row:
    bench = bench_of(world, base["folder"], size, seed)
    run = Run(
        learning_rate=world.tune_learning_rate, max_steps=world.max_steps, batch_size=world.tune_rows,
        replay_rows=world.replay_rows, coef=coef, eval_steps=world.eval_steps, seed=seed,
    )  # fmt: skip
    model, gap = bench.base(), {}
    if grown is not None:
        larger = expand(model, seed=seed, **grown)
        gap, model = {"function_gap": function_gap(model, larger, bench)}, larger
    stop = world.target if coef < 1 else None
    found = finetune(run, bench, stop, model=model)
    trajectory = [
        [row["step"], *(round(row[name], 4) for name in ("eval_loss", "retention/old/forgetting"))]
        for row in found["trajectory"]
    ]
    return {
        "num_params": counted_size_of(model.config),
        "all_params": sum(parameter.numel() for parameter in model.parameters()),
        "base_loss": base["loss"],
        "trajectory": trajectory,
        **gap,
    }


def function_gap(model: Any, larger: Any, bench: Bench, rows: int = 64) -> float:
    """Largest difference of log-probabilities on the replay rows: 0 to rounding where the function is the same."""
    tokens = torch.tensor([bench.replay[at].tolist() for at in range(rows)])
    with torch.no_grad():
        log_probs = [one.eval()(input_ids=tokens).logits.log_softmax(-1) for one in (model, larger)]
    return float((log_probs[0] - log_probs[1]).abs().max())


def tune_all(
    world: World,
    size: str,
    length: float,
    seed: int,
    results: StudyResults,
    coefs: tuple[float, ...] | None = None,
    **how: Any,
) -> list[Row]:
    """Finetunes of one base with every coefficient: of the size, unless others are given."""
    return [tune(world, size, length, coef, seed, results, **how) for coef in coefs or world.size(size).coefs]


def mixed_base(world: World, size: str, share: float, seed: int) -> Row:
    """A model pretrained on both languages, as long as the size's longest base: its loss on each."""
    most = max(world.lengths(size))
    found = pretrain(
        world.language(size, 0), [most], seed=seed, mixed_with=(share, world.language(size, 1)), **world.pretraining()
    )[most]
    return {"old": found["loss"], "new": loss_on(found["folder"], world, size, seed), "num_params": found["num_params"]}


def loss_on(folder: Path, world: World, size: str, seed: int) -> float:
    """Held-out loss on the new language, nats per token."""
    tokens = torch.from_numpy(open_corpus(world.language(size, 1), seed).held_out[:HELD_OUT])
    with torch.no_grad():
        return float(load_model(str(folder), dtype="float32").eval()(input_ids=tokens, labels=tokens).loss)


def mixture_row(world: World, size: str, share: float, seed: int, results: StudyResults) -> Row:
    """A point of the two-language frontier as a row."""
    settings = {"kind": "mixture", "size": size, "share": share, "seed": seed, "most": world.size(size).most,
                **world.facts()}  # fmt: skip

    def compute() -> Row:
        return {name: round(value, 4) for name, value in mixed_base(world, size, share, seed).items()}

    return results.make(settings, compute)
