"""Studies that share their finetunes, made whole at miniature scale; and that no study is without a test."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_experiments import PLAIN, SHORT, TINY, in_place, small_texts

from experiments import finetunes, small_base
from experiments.study_03_budget import run as budget
from experiments.study_14_anchor import run as anchor
from experiments.study_14_anchor import settings
from experiments.study_23_default import run as default
from experiments.study_23_default.report import CHOSEN
from experiments.study_24_noise import run as noise

STUDIES = sorted(Path(finetunes.__file__).parent.glob("study_*"))


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> finetunes.Bench:
    """The tiny bench, with Fisher information and predictions kept beside its rows."""
    folder = small_base.make_base(tmp_path_factory.mktemp("base") / "tiny", small_texts(), TINY)
    return finetunes.open_bench(folder, small_texts(), SHORT, for_anchors=True)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_has_a_test(study: Path) -> None:
    """Study 03 called a method that its trainer had lost, and its command failed for as long as nothing ran it."""
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_committed.py"]
    assert any(f"experiments.{study.name}" in text for text in tests)


@pytest.mark.program
def test_the_budget_study(anchored: finetunes.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch, budget, anchored, tmp_path)
    plain = replace(PLAIN, replay_rows=2)
    kinds = [plain, *(replace(plain, budget=one, coef=1.0) for one in (*budget.BUDGETS, budget.STRICT))]
    monkeypatch.setattr(budget, "runs", lambda: kinds)
    monkeypatch.setattr(budget, "STEPS", PLAIN.max_steps)
    budget.main(["--num_workers", "1"])
    rows = [row for row in budget.StudyResults(tmp_path / "results.jsonl", "").rows.values() if "steps" in row]
    assert len(rows) == 4
    for row in rows:
        kl, coefs = zip(*row["steps"], strict=True)
        assert len(kl) == PLAIN.max_steps
        assert kl[0] == pytest.approx(0, abs=1e-6), "the first step's model is the base"
        assert kl[-1] > 0
        assert coefs[-1] == pytest.approx(row["verdict"]["coef"], rel=1e-3)
    page = (tmp_path / "README.md").read_text()
    assert "of 3 runs within 20%" in page
    assert f"| {budget.STRICT:g} |" in page
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_anchor_study(anchored: finetunes.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch, anchor, anchored, tmp_path)
    monkeypatch.setattr(anchor, "bench", lambda base, task: anchored)
    monkeypatch.setitem(anchor.TIMED, "small", (2, 2))
    run = replace(PLAIN, schedule="linear")
    rates: dict[str, Any] = {"plain": {"full": (1e-3, 3e-3)}}
    monkeypatch.setitem(settings.BASES, "small", replace(settings.BASES["small"], run=run, **rates))
    alone = ["--num_workers", "1"]
    with pytest.raises(SystemExit, match="no cell of the last round has three seeds yet"):
        anchor.main([*alone, "--parts", "small-full-timing"])
    anchor.main([*alone, "--parts", "small-full-french"])
    page = (tmp_path / "README.md").read_text()
    (line,) = (line for line in page.splitlines() if "| French | anchor, coefficient 50 | 3 |" in line)
    assert re.search(r"\| \d\.\d\d \[.*\] \| (missed|reached|cannot tell) \|$", line)
    rows = list(anchor.StudyResults(tmp_path / "results.jsonl", "").rows.values())
    one = [row for row in rows if row["settings"].get("round") != 1]
    assert "| not measured | " in anchor.report_of(one), "one round of timing has no interval"
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.program
def test_the_study_of_the_default(anchored: finetunes.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch, default, anchored, tmp_path)
    monkeypatch.setattr(default, "bench", lambda setup, task: anchored)
    run = replace(PLAIN, schedule="linear", eval_steps=PLAIN.max_steps)
    assert default.COEFS[CHOSEN] == default.ANCHORED.anchor_coef, "another look, if the default changes"
    setup = replace(default.SETUPS["small-full"], bench=SHORT, run=run, plain=(1e-4, 3e-3), rounds=2, turns=2)
    monkeypatch.setattr(default, "SETUPS", {"small-full": setup})
    alone = ["--num_workers", "1"]
    with pytest.raises(SystemExit, match="no cell has all its seeds yet"):
        default.main([*alone, "--parts", "small-full-timing"])
    default.main([*alone, "--parts", "small-full-ruby"])
    rows = list(default.StudyResults(tmp_path / "results.jsonl", "").rows.values())
    arms = [row["settings"]["arm"] for row in rows if "trajectory" in row]
    assert sorted(arms) == sorted(["plain 0.0001", "plain 0.003", "protected"] * 3)
    (line,) = (line for line in (tmp_path / "README.md").read_text().splitlines() if "| Ruby |" in line)
    assert re.search(r"\| \d\.\d\d \[.*\] \| (missed|reached|cannot tell) \|$", line)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.program
def test_the_study_of_noise(anchored: finetunes.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place(monkeypatch, noise, anchored, tmp_path)
    monkeypatch.setattr(noise, "bench", lambda: anchored)
    monkeypatch.setattr(noise, "RUN", replace(PLAIN, schedule="linear", eval_steps=PLAIN.max_steps))
    monkeypatch.setattr(noise, "PLAIN", (1e-3, 3e-3))
    monkeypatch.setattr(noise, "WAYS", dict.fromkeys(noise.WAYS, (3.0,)))
    with pytest.raises(SystemExit, match="not every run of all seeds is made yet"):
        noise.main(["--num_workers", "1", "--seeds", "0"])
    noise.main(["--num_workers", "1"])
    page = (tmp_path / "README.md").read_text()
    ways = [line.split(" | ")[0][2:] for line in page.splitlines() if line.startswith("| ") and "%" in line]
    assert ways == list(noise.WAYS)
    assert len(set(re.findall(r"\*\*(.*?)\*\*", page)) - {"yes", "no", "cannot tell"}) == 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_gradients_are_combined_as_said(anchored: finetunes.Bench, tmp_path: Path) -> None:
    """Summed apart they are the trainer's own sum; clipped, replay's is as long as the new task's; averaged, a mean."""
    new, replay = [torch.tensor([3.0, 4.0])], [torch.tensor([60.0, 80.0])]
    assert noise.clipped(new, replay)[0].tolist() == pytest.approx([3.0, 4.0])
    assert noise.clipped(replay, new)[0].tolist() == [3.0, 4.0]
    mean = noise.Averaged(beta=0.5)
    assert mean(new, [torch.tensor([1.0])])[0].item() == pytest.approx(1.0)
    assert mean(new, [torch.tensor([4.0])])[0].item() == pytest.approx(3.0)  # (1/4 · 1 + 1/2 · 4) / (3/4)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad, weight.replay_grad = torch.tensor([2.0]), torch.tensor([4.0])
    noise.NewTaskAdam([weight], lr=0.1, eps=0.0).step()
    assert weight.item() == pytest.approx(-0.1 * (2 + 4) / 2)


def test_rows_drawn_by_their_kl_keep_the_mean_of_the_pool(anchored: finetunes.Bench, tmp_path: Path) -> None:
    kind = partial(
        noise.ApartTrainer, way="rows drawn by their last KL", coef=1.0, rows=anchored.replay, base=anchored.base()
    )
    trainer = finetunes.make_trainer(replace(PLAIN, eval_steps=0), anchored, tmp_path, kind=kind)
    trainer.last_kl[:] = np.arange(len(anchored.replay))
    draws = [trainer.drawn() for _ in range(3000)]
    mean = np.mean([(trainer.last_kl[rows] * counts).mean() for rows, counts in draws])
    assert mean == pytest.approx(trainer.last_kl.mean(), rel=0.03)
    often = np.bincount(np.concatenate([rows for rows, _ in draws]), minlength=len(anchored.replay))
    assert often[-1] > 2 * often[0]
