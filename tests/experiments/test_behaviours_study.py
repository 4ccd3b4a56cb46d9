"""The study of formats and turn ends: its verdict goes with its answers, a seed at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_model, make_tokenizer

from experiments.pages import NoReport
from experiments.study_15_behaviours import run as study


def row(kept: int, ended: int, loss: float = 2.0, start: float = 4.0, total: int = 40) -> dict[str, Any]:
    shown = {"formats": ("follows", kept), "turn_ends": ("ends", ended)}
    answers = {name: [{scorer: at < count} for at in range(total)] for name, (scorer, count) in shown.items()}
    return {"answers": answers, "losses": [start, loss]}


def verdicts(base: Any, *pairs: tuple[Any, Any]) -> list[str]:
    return [verdict for verdict, _ in study.findings_of(base, pairs).values()]


def test_the_verdict_is_what_every_seed_says():
    base = row(30, 20)
    lost, kept = row(10, 20), row(28, 21)
    assert verdicts(base, (lost, kept), (lost, kept)) == ["lost", "yes", "cannot tell", "cannot tell"]
    assert verdicts(base, (lost, kept), (kept, lost))[:2] == ["cannot tell", "cannot tell"], "seeds disagree"
    assert verdicts(base, (kept, lost))[1] == "no, less"
    assert verdicts(base, (row(30, 39), row(30, 39)))[2] == "gained"


def test_what_is_rare_or_less_learned_decides_nothing():
    assert verdicts(row(3, 20), (row(0, 5), row(3, 20))) == ["too rare in the base"] * 2 + ["lost", "yes"]
    assert verdicts(row(30, 20), (row(10, 5), row(28, 20, loss=2.3)))[1::2] == ["cannot tell"] * 2
    (_, numbers), *_ = study.findings_of(row(30, 20), [(row(10, 5), row(28, 20))]).values()
    assert numbers.startswith("-50.0 [-64.")
    assert "points, 40 prompts, seed by seed; the base 75.0%" in numbers


def test_a_report_has_every_seed_that_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)
    results = study.results_of("laptop")
    results.make({"arm": "base"}, lambda: row(30, 20))
    results.make({"arm": "plain", "seed": 0}, lambda: row(10, 5))
    with pytest.raises(NoReport):
        study.report("laptop")
    results.make({"arm": "replay", "seed": 0}, lambda: row(28, 20))
    results.make({"arm": "plain", "seed": 1}, lambda: row(10, 5))
    text, draw = study.report("laptop")
    assert "| formats | 30 of 40 | 10 of 40 | 28 of 40 |" in text
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 2_000


def test_prompts_of_one_length_are_answered_together() -> None:
    tokenizer, model = make_tokenizer(), make_model().eval()
    tokenizer.chat_template = CHATML
    scale = study.Scale(formats=2, turn_ends=2, same_length=2)
    found = study.answers_of(model, tokenizer, model, scale)["answers"]
    assert 0 < len(found["formats"]) < 77
    assert all(set(one) == {"ends"} for one in found["turn_ends"])
