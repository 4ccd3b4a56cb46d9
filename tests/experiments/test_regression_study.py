"""Study 18: one seed of it in miniature, and its verdicts on made-up rows that go either way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.pages import NoReport
from experiments.study_18_regression import run as study


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)


def test_a_seed_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(study.Scale(), base_steps=300, tune_steps=100, width=16)
    monkeypatch.setattr(study, "SCALES", {"laptop": small})
    for seed in (0, 1):
        study.make("laptop", seed)
    rows = {row["settings"]["arm"]: row for row in study.StudyResults(tmp_path / "results.jsonl", "laptop").rows_with()}
    assert rows["base"]["forgotten"] == 0
    assert rows["KL, self"]["forgotten"] < rows["KL, other"]["forgotten"], "other rows cover a third of the left"
    assert rows["KL, self"]["forgotten"] < rows["plain"]["forgotten"] / 2
    text, draw = study.report("laptop")
    assert "| NTP, other |" in text
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_the_verdicts_go_with_the_rows(tmp_path: Path) -> None:
    results = study.StudyResults(tmp_path / "results.jsonl", "laptop")
    with pytest.raises(NoReport):
        study.report("laptop")
    lost = dict(zip(study.ARMS, (0.5, 0.02, 0.3, 0.3, 0.02), strict=True)) | {"base": 0.0}
    for seed in range(3):
        for arm, value in lost.items():
            found = {"forgotten": value + 0.001 * seed, "new_task": 0.0, "curve": [0.0] * study.CURVE}
            results.make({"arm": arm, "seed": seed}, lambda found=found: found)
    lines = [line for line in study.report("laptop")[0].splitlines() if line.startswith("- ")]
    verdicts = [line.split("**")[1] for line in lines]
    assert verdicts == ["reproduced", "reproduced", "not reproduced", "not reproduced"]
