"""Settings of the laboratory that need a GPU, end to end on a CPU: their models, texts and rates, for a few rows.

Nothing is learned. What is shown is that sizes, vocabularies, lengths, enlargements and files fit together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import lab_bases
from experiments.study_07_capacity import runs as capacity_runs
from experiments.study_07_capacity.runs import World
from retain.lab.languages import Language
from retain.lab.models import counted_size_of, make_config
from retain.lab.pretrain import PretrainConfig

ROWS = 2


def small_world(world: World, *names: str) -> World:
    """Two of its models, the smallest ones unless they are named, pretrained as briefly as a base can be."""
    sizes = []
    for size in [world.size(name) for name in names] or world.sizes[:2]:
        shape = make_config(size.name, vocab_size=world.vocab_size, max_length=world.max_length)
        least = capacity_runs.FIRST_STEPS * ROWS * world.max_length / counted_size_of(shape)
        sizes.append(replace(size, most=1.4 * least, coefs=size.coefs[:1]))
    return replace(
        world, sizes=tuple(sizes), batch_size=ROWS, tune_rows=ROWS, replay_rows=ROWS, replay_pool=64, max_steps=4,
        eval_steps=2, warmup_steps=1,
    )  # fmt: skip


def small_capacity(scale: Any) -> Any:
    return replace(scale, world=small_world(scale.world), shares=scale.shares[:1], seeds=1)


SMALLER: dict[str, Callable[[Any], Any]] = {
    "06_continual_tasks": lambda scale: replace(
        scale, batch_size=ROWS, replay_rows=ROWS, first_steps=2, steps=2, eval_steps=2, held_out_rows=4, seeds=1
    ),
    "07_capacity": small_capacity,
    "08_size_tokens_grid": lambda scale: replace(
        scale, world=small_world(scale.world), lengths=(small_world(scale.world).sizes[1].most,), seeds=1
    ),
    "09_learning_rate": lambda scale: replace(
        scale, pretrain_batch=ROWS, tokens_per_param=(1e-4, 2e-3), pretrain_rates=scale.pretrain_rates[:2],
        rates=scale.rates[:1], replay_rates=scale.replay_rates[:1], batch_size=ROWS, replay_rows=ROWS, replay_pool=8,
        steps_times_rate=1e-9, least_steps=6, seeds=1,
    ),
    "11_batch_size": lambda scale: replace(
        scale, tokens=2 * ROWS * scale.max_length, batch_sizes=(1, ROWS), half_lives=2, rates=scale.rates[:1],
        eval_rows=ROWS, seeds=1,
    ),
    "13_expansion": lambda scale: replace(
        scale, world=small_world(scale.world, scale.small, scale.control), coefs=scale.coefs[:1], seeds=1
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["gpu", "paper"])
@pytest.mark.parametrize("name", SMALLER)
def test_the_settings_of_a_larger_scale_fit_together(
    name: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(f"experiments.study_{name}.run")
    capacity_runs.bench_of.cache_clear()
    monkeypatch.setattr(capacity_runs, "HELD_OUT", ROWS)
    monkeypatch.setattr(lab_bases, "LAB", tmp_path / "lab")
    monkeypatch.setattr(Language, "stationary", property(lambda self: np.full(self.num_states, 1 / self.num_states)))
    for place in (capacity_runs, module):  # few held-out rows
        monkeypatch.setattr(place, "PretrainConfig", functools.partial(PretrainConfig, eval_rows=ROWS), raising=False)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "SEVENTH", tmp_path / "07", raising=False)
    (tmp_path / "07").mkdir()
    monkeypatch.setattr(module, "CACHE", tmp_path, raising=False)
    monkeypatch.setattr(module, "SCALES", {scale: SMALLER[name](module.SCALES[scale])})
    # Study 09 reads runs where they have learned something, and says so of one that has not.
    refused = pytest.raises(SystemExit, match="give it more steps") if name.startswith("09") else nullcontext()
    with refused:
        module.main(["--scale", scale, "--num_workers", "2"])
    rows = (tmp_path / "results.jsonl").read_text()
    assert len(rows.splitlines()) >= 3
    assert (tmp_path / f"figure-{scale}.png").is_file() != name.startswith("09")
