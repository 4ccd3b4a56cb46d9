"""The study of refusals, answers and knowledge: its verdict goes with its counts, and its data are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.study_04_capabilities import report as study


def run(lost: int, kept: int, same: int = 200) -> dict[str, Any]:
    counts = {"kept": kept, "lost": lost, "gained": 0, "never": 4}
    return {
        "new_task": "Verilog", "new_task_loss": 3.0,
        "ref_kl": {"prose": 0.2, "code": 0.1}, "forgetting": {"prose": 0.1, "code": 0.0},
        "refusals": {"phrases": counts}, "over_refusals": {"phrases": counts},
        "num_prompts": lost + kept + 4, "num_harmless": lost + kept + 4, "same_answers": same, "num_questions": 240,
        "accuracy": 0.4, "base_accuracy": 0.41,
        "knowledge": {"kept": 8, "updated": 0, "forgotten": 2, "learned": 1, "unknown": 9},
        "drift": {"words": 0.5, "length": 20.0, "base_length": 25.0, "ended": 0.5},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "word"), [(2, "fewer than plain"), (19, "not clearly fewer or more than plain"), (50, "more than plain")]
)
def test_the_verdict_goes_with_the_counts(lost: int, word: str) -> None:
    rows = {"plain": [run(20, 30), run(18, 32)], "replay": [run(lost, 50 - lost), run(lost, 50 - lost)]}
    text = study.verdict(rows)
    assert "Plain finetuning lost 20 of 50: 40% [28%, 54%]; 18 of 50: 36% [24%, 50%] of the refusals" in text
    assert f"replay: {lost} of 50: " in text, "a seed at a time: requests of two seeds are no independent draws"
    assert word in text


def test_the_table_and_the_figure(tmp_path: Path) -> None:
    rows = {"plain": [run(20, 30), run(18, 32)], "replay": [run(1, 49), run(0, 50)]}
    text = study.table_of_arms(rows)
    assert "| facts still known, of those known before | 8 of 10: 80% [49%, 94%]; 8 of 10: 80% [49%, 94%] |" in text
    study.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_nothing_to_lose_is_no_share() -> None:
    assert "lost – of the refusals" in study.verdict({"plain": [run(0, 0)], "replay": [run(0, 0)]})


def test_equal_accuracy_hides_what_it_cannot_have_shown() -> None:
    """One changed answer of many is no finding, and one seed no verdict."""

    def said(same: int, lost: int, seeds: int = 1) -> str:
        rows = {arm: [run(1, 49, same)] * seeds for arm in ("plain", "KL replay, instructions")}
        return study.claim(rows | {"plain, instructions": [run(lost, 50 - lost)] * seeds})

    assert "hides forgetting: **seen in one seed** (" in said(200, 40)
    assert "Refusals are lost: **seen in one seed** (" in said(200, 40)
    assert "-1.0 [-6.0, +4.0] points at the widest" in said(202, 40)
    assert "hides forgetting: **cannot tell** (" in said(239, 40)
    assert "Refusals are lost: **cannot tell** (" in said(200, 2)
    assert said(200, 40, seeds=2).count("**reproduced**") == 2
