"""The settings of study 07 that need a GPU, end to end on a CPU: their models, texts and rates, for a few rows.

Nothing is learned. What is shown is that sizes, vocabularies, lengths and files fit together.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import lab_bases
from experiments.study_07_capacity import run as study
from experiments.study_07_capacity import runs
from retain.lab.languages import Language
from retain.lab.models import counted_size_of, make_config
from retain.lab.pretrain import PretrainConfig

ROWS = 2


@pytest.mark.slow
def test_the_settings_of_the_larger_scale_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two smallest models, pretrained as briefly as a base can be."""
    scale, sizes = study.SCALES["gpu"], []
    for size in scale.world.sizes[:2]:
        shape = make_config(size.name, vocab_size=scale.world.vocab_size, max_length=scale.world.max_length)
        least = runs.FIRST_STEPS * ROWS * scale.world.max_length / counted_size_of(shape)
        sizes.append(replace(size, most=1.4 * least, coefs=size.coefs[:1]))
    world = replace(
        scale.world, sizes=tuple(sizes), batch_size=ROWS, tune_rows=ROWS, replay_rows=ROWS, replay_pool=64, max_steps=4,
        eval_steps=2, warmup_steps=1,
    )  # fmt: skip
    monkeypatch.setattr(study, "SCALES", {"gpu": replace(scale, world=world, shares=scale.shares[:1], seeds=1)})
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(runs, "HELD_OUT", ROWS)
    monkeypatch.setattr(runs, "PretrainConfig", functools.partial(PretrainConfig, eval_rows=ROWS))
    monkeypatch.setattr(lab_bases, "LAB", tmp_path / "lab")
    monkeypatch.setattr(Language, "stationary", property(lambda self: np.full(self.num_states, 1 / self.num_states)))
    runs.bench_of.cache_clear()
    study.main(["--scale", "gpu", "--num_workers", "2"])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) >= 3
    assert (tmp_path / "figure-gpu.png").is_file()
