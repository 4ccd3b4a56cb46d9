"""Studies 09 and 11: verdicts on made-up rows that go either way, and one small run of each."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1] / "experiments"
for folder in (ROOT, ROOT / "09_learning_rate", ROOT / "11_batch_size"):
    sys.path.insert(0, str(folder))

import batch_report  # noqa: E402
import rate_report  # noqa: E402

README = "before\n<!-- results: written by run.py -->\n<!-- end of results -->\nafter\n"
WOBBLE = (0.0, 0.01, -0.01)  # of the seeds


def study(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"study_{name}", ROOT / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# Study 09


def rate_row(
    before: float, rate: float, coef: float, seed: int, steps: float, lost: float, control: bool = False,
    base: float = 1.2,
) -> dict[str, Any]:  # fmt: skip
    """A run whose loss falls evenly from 4 and crosses 2 after so many steps, with so much forgotten there."""
    points = [(0.0, 4.0, 0.0), (steps, 2.0, lost), (1.5 * steps, 1.0, 1.2 * lost)]
    trajectory = [{"step": at, "eval_loss": loss, "retention/old/forgetting": gone} for at, loss, gone in points]
    trajectory[-1]["eval_loss"] = 2.0  # the target of all is 2
    settings = {"pretrain_rate": before, "learning_rate": rate, "coef": coef, "seed": seed, "control": control}
    return {"settings": settings, "base": {"loss": base}, "trajectory": trajectory}


def rate_rows(
    slow: float = 0.2, fast: float = 1.0, high: float = 0.5, kept: float = 0.1, noise: float = 1.0
) -> list[dict[str, Any]]:
    """Forgetting of a slow and a fast run, times `high` at the high pretraining rate; `kept` with replay."""
    rows = []
    for seed, wobble in enumerate(WOBBLE):
        for before, factor in ((1e-3, 1.0), (1e-2, high)):
            factor += noise * wobble
            rows.append(rate_row(before, 1e-4, 0.0, seed, 1000 + seed, slow * factor))
            rows.append(rate_row(before, 1e-2, 0.0, seed, 50 + seed, fast * factor))
            rows.append(rate_row(before, 1e-2, 3.0, seed, 100 + seed, kept * factor))
    return rows


def test_claims_on_learning_rates_reproduced() -> None:
    told = rate_report.verdict(rate_rows())
    assert "need more steps: reproduced." in told
    assert "reduces forgetting: reproduced." in told
    assert "Replay breaks the trade-off: reproduced." in told
    assert "fewer steps by a factor of 9.9 [9.7, 10.1]" in told


def test_claims_on_learning_rates_refuted() -> None:
    told = rate_report.verdict(rate_rows(slow=1.0, fast=0.5, high=2.0, kept=1.5))
    assert "less forgetting not reproduced, more steps reproduced" in told
    assert "reduces forgetting: not reproduced." in told
    assert "Replay breaks the trade-off: not reproduced." in told


def test_claims_on_learning_rates_left_open() -> None:
    rows = rate_rows(high=1.0, noise=60.0)
    rows[2] = rate_row(1e-3, 1e-2, 3.0, 0, 100, 2.0)  # one case of six without a protected run
    told = rate_report.verdict(rows)
    assert "Replay breaks the trade-off: cannot tell at this size." in told
    assert "In 1 of 6 cases" in told
    assert "none yet" in rate_report.verdict([row for row in rows if row["settings"]["seed"] == 0])
    assert "none yet" in rate_report.verdict([])


def test_bases_of_the_same_loss_may_say_otherwise() -> None:
    rows = rate_rows()
    for seed, wobble in enumerate(WOBBLE):
        rows.append(rate_row(1e-2, 1e-2, 0.0, seed, 50, 1.4 + wobble, control=True, base=1.21))
    told = rate_report.verdict(rows)
    assert "reproduced at the same tokens, not reproduced at the same loss of the base" in told
    assert "apart by 0.010 [0.010, 0.010]" in told


def test_rate_study_draws(tmp_path: Path) -> None:
    rate_report.draw(rate_rows(kept=-0.1), tmp_path / "figure.png")  # negative forgetting has a place, too
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert rate_report.table(rate_rows()).count("KL, coefficient 3") == 2


@pytest.mark.slow
def test_rate_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = study("09_learning_rate")
    scale = module.Scale(
        model_size="6200", num_states=4, vocab_size=8, max_length=16, tokens_per_param=(1, 2), pretrain_batch=16,
        pretrain_rates=(1e-3, 1e-2), rates=(3e-2,), replay_rates=(3e-2,), control_rate=3e-2, batch_size=8,
        replay_rows=2, replay_pool=16, steps_times_rate=1e-6, least_steps=12, stop_loss=0.1, seeds=1,
    )  # fmt: skip
    monkeypatch.setattr(module, "SCALES", {"laptop": scale})
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr("lab_bases.LAB", tmp_path / "lab")
    (tmp_path / "README.md").write_text(README)
    module.main([])
    rows = (tmp_path / "results.jsonl").read_text()
    assert len(rows.splitlines()) >= 2 * 2
    monkeypatch.setattr(module, "finetune", None)  # finished runs are not made again
    module.main([])
    assert (tmp_path / "results.jsonl").read_text() == rows
    page = (tmp_path / "README.md").read_text()
    assert "not finished" in page
    assert page.endswith("after\n")
    assert all(json.loads(row)["base"]["num_params"] < 7000 for row in rows.splitlines())


# Study 11


def batch_rows(power: float, noise: float = 0.0, shift: int = 0, places: int = 7) -> list[dict[str, Any]]:
    """Losses that are least at a half-life which goes with the batch size to a power."""
    rows = []
    for batch in (1, 4, 16):
        for place in range(places):
            half_life = 1000.0 * 4**place
            for seed, wobble in enumerate(WOBBLE):
                best = math.log(1000 * 4 ** (places // 2 - power + shift)) + power * math.log(batch)
                loss = 2 + 0.01 * (math.log(half_life) - best - noise * wobble * (batch > 4)) ** 2
                for rate in (1e-3, 1e-2, 1e-1):
                    settings = {"batch_size": batch, "half_life": half_life, "learning_rate": rate, "seed": seed}
                    beta2 = 0.5 ** (64 * batch / half_life)
                    rows.append({"settings": settings, "loss": loss + (rate != 1e-2), "beta2": beta2})
    return rows


@pytest.mark.parametrize(
    ("rows", "said", "costs"),
    [
        (batch_rows(0.0, noise=1.0), "Verdict: reproduced.", "costs less"),
        (batch_rows(1.0, noise=1.0), "Verdict: not reproduced.", "costs more"),
        (batch_rows(0.3), "Verdict: in between: nearer to constant", "costs less"),
        (batch_rows(0.5, noise=100.0), "Verdict: cannot tell", "does not cost clearly"),
        (batch_rows(0.0, shift=4), "Verdict: cannot tell", "some seed is best at the end"),
    ],
)
def test_verdict_on_batch_sizes_goes_with_the_results(rows: list[dict[str, Any]], said: str, costs: str) -> None:
    told = batch_report.verdict(rows)
    assert said in told
    assert costs in told


def test_best_half_life_is_read_between_the_grid() -> None:
    cells = batch_report.cells_of(batch_rows(0.5))
    assert [cell.learning_rate for cell in cells] == [1e-2] * len(cells)
    found = [batch_report.best_half_life(cells, batch, 0) for batch in (1, 4, 16)]
    assert found == pytest.approx([1000 * 4**place for place in (2.5, 3, 3.5)])
    assert batch_report.slopes(cells) == pytest.approx([0.5] * 3)


def test_a_diverged_run_is_no_optimum() -> None:
    rows = batch_rows(0.0)
    for row in rows:
        if row["settings"]["half_life"] == 1000.0 * 4**2:
            row["loss"] = None
    cells = batch_report.cells_of(rows)
    assert batch_report.best_half_life(cells, 1, 0) == 1000.0 * 4**3
    assert "none yet" in batch_report.verdict(rows[:20])


def test_a_batch_size_that_is_not_finished_is_left_out() -> None:
    rows = batch_rows(0.0, noise=1.0)
    part = [row for row in rows if row["settings"]["batch_size"] > 1 or row["settings"]["half_life"] < 5000]
    assert "From 4 to 16 rows" in batch_report.verdict(part)
    assert "From 1 to 16 rows" in batch_report.verdict(rows)


@pytest.mark.slow
def test_batch_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = study("11_batch_size")
    scale = module.Scale(
        model_size="6200", num_states=4, vocab_size=8, max_length=16, tokens=256, batch_sizes=(1, 4), half_lives=3,
        rates=(1e-2,), seeds=1,
    )  # fmt: skip
    monkeypatch.setattr(module, "SCALES", {"laptop": scale})
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "CACHE", tmp_path)
    (tmp_path / "README.md").write_text(README)
    module.main([])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3
    assert {row["num_steps"] for row in rows} == {16, 4}
    first = min(rows, key=lambda row: (row["settings"]["batch_size"], row["settings"]["half_life"]))
    assert first["beta2"] == pytest.approx(0.95)
    monkeypatch.setattr(module, "train", None)  # finished runs are not made again
    module.main([])
    assert "Verdict" in (tmp_path / "README.md").read_text()
