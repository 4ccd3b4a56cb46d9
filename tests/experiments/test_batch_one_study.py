"""Study 20 on made-up rows: its verdicts can go either way, and rounding is what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiments import SHORT, TINY, small_texts

from experiments import finetunes, small_base
from experiments.study_20_batch_one import run as study

WOBBLE = (0.0, 0.004, -0.004)


def rows(
    nearest: float = 0.5, stochastic: float = 0.01, lora: float = 0.3, kept: float = 0.001
) -> list[dict[str, Any]]:
    """Runs that end so much above float32, which ends lowest at 3e-4; `kept`: what more is forgotten with replay."""
    found = []
    for seed, wobble in enumerate(WOBBLE):
        above = {"float32": 0.0, "to the nearest": nearest, "stochastically": stochastic + wobble, "LoRA": lora}
        for arm, run in study.plan(seed):
            loss = 3.0 + above[arm] + (run.learning_rate not in (3e-4, 3e-3)) * 0.2
            lost = 0.1 + kept * (arm == "stochastically") + wobble / 4 * (arm == "float32")
            end = {"eval_loss": loss, "retention/prose/forgetting": lost}
            found.append({"settings": {"arm": arm, **run.settings()}, "trajectory": [{}, end]})
    return found


def test_verdicts_go_with_the_runs() -> None:
    text = study.text_of(study.ends_of(rows()))
    assert "to the nearest, learn less than in float32 at 3e-05: **yes** (3.700" in text
    assert "to the nearest, learn less than in float32 at 0.0003: **yes** (3.500" in text
    assert "stochastically, learn as much as in float32 at 0.0003: **reproduced**" in text
    assert "stochastically forget as much as in float32: **yes**" in text
    assert "LoRA learns less than weights rounded stochastically: **reproduced**" in text
    text = study.text_of(study.ends_of(rows(nearest=-0.1, stochastic=0.2, lora=-0.5, kept=0.1)))
    assert "to the nearest, learn less than in float32 at 3e-05: **no**" in text
    assert "stochastically, learn as much as in float32 at 0.0003: **not reproduced**" in text
    assert "stochastically forget as much as in float32: **no**" in text
    assert "LoRA learns less than weights rounded stochastically: **not reproduced**" in text
    assert "an end of its rates" not in text, "both are best in between"
    at_ends = rows()
    for row in at_ends:
        row["trajectory"][-1]["eval_loss"] -= 0.5 * (row["settings"]["learning_rate"] == 1e-3)
    text = study.text_of(study.ends_of(at_ends))
    assert "LoRA learns less than weights rounded stochastically: **reproduced, each at an end of its rates**" in text
    text = study.text_of(study.ends_of(rows(stochastic=0.05)))
    assert "stochastically, learn as much as in float32 at 0.0003: **cannot tell**" in text


def test_stochastic_rounding_is_right_on_average() -> None:
    weight, random = torch.full((40_000,), 1.0 + 2**-10), torch.Generator().manual_seed(0)  # a quarter of a step
    stochastic = study.rounded(weight, "stochastic", random)
    assert set(stochastic.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(stochastic.mean()) == pytest.approx(1 + 2**-10, abs=5e-5)
    assert (study.rounded(weight, "nearest", random) == 1).all()
    assert float(study.rounded(-weight, "stochastic", random).mean()) == pytest.approx(-1 - 2**-10, abs=5e-5)
    even = torch.tensor([0.5, -2.0, 0.0])
    assert torch.equal(study.rounded(even, "stochastic", random), even)


def test_weights_stay_in_bfloat16_and_the_figure_is_drawn(tmp_path: Path) -> None:
    texts = small_texts()
    bench = finetunes.open_bench(small_base.make_base(tmp_path / "tiny", texts, TINY), texts, SHORT)
    for arm, run in study.plan(0)[:3]:
        short = replace(run, max_steps=4, eval_steps=4, warmup_steps=0)
        row = study.finetune(short, study.ARMS[arm], bench)
        assert row["trajectory"][-1]["step"] == 4
    study.draw(study.ends_of(rows()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
