"""The study of tasks in sequence: its runs, made at a toy size, and the size at which a GPU makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.study_06_continual_tasks import run as study
from experiments.study_06_continual_tasks.report import METHODS
from retain.lab.models import shape_of
from retain.lab.tasks import TASKS

TOY = {"model_size": "30k", "digits": 2, "batch_size": 4, "replay_rows": 2, "first_steps": 2, "steps": 2}


def test_every_method_learns_all_tasks_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = replace(study.SCALES["gpu"], **TOY, eval_steps=2, held_out_rows=4, seeds=1)  # type: ignore[arg-type]
    monkeypatch.setattr(study, "SCALES", {"toy": toy})
    monkeypatch.setattr(study, "HERE", tmp_path)
    study.make("toy", 0)
    rows = study.StudyResults(tmp_path / "results.jsonl", "toy").rows_with()
    assert {row["settings"]["method"] for row in rows} == set(METHODS)
    for row in rows:
        assert [at["step"] for at in row["trajectory"]] == [0, 2, 2, 4, 4, 6, 6, 8]
        assert all(0 <= at[task] <= 1 for at in row["trajectory"] for task in TASKS)
    text, _ = study.page("toy")
    assert "none yet" in text, "a seed decides nothing"


def test_a_gpu_makes_the_runs_at_the_size_of_the_paper():
    scale = study.SCALES["gpu"]
    assert shape_of(scale.model_size, 16).hidden_size == 256
    assert (scale.digits, scale.first_steps, scale.steps, scale.batch_size) == (3, 2000, 2000, 2048)
    assert (scale.learning_rate, scale.coef) == (1e-4, 10.0)
