"""Studies of capacity (07, 08, 13): what they conclude from made-up rows, and each once at miniature scale."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import lab_bases
from experiments.finetunes import StudyResults
from experiments.study_07_capacity import cells
from experiments.study_07_capacity import report as capacity_report
from experiments.study_07_capacity import run as CAPACITY
from experiments.study_07_capacity import runs as capacity_runs
from experiments.study_07_capacity import settings as capacity_scales
from experiments.study_07_capacity.runs import Size, World
from experiments.study_08_size_tokens_grid import report as grid_report
from experiments.study_08_size_tokens_grid import run as GRID
from experiments.study_13_expansion import report as expansion_report
from experiments.study_13_expansion import run as EXPANSION
from retain.files import write_json

ROOT = Path(__file__).parents[2] / "experiments"
NAMES = ("study_07_capacity", "study_08_size_tokens_grid", "study_13_expansion")

TARGET = 2.0
Row = dict[str, Any]


WORLD = World(sizes=(Size("5e3", 1000.0, (1.0, 3.0)), Size("5e4", 10.0, (1.0,))), target=TARGET, max_steps=100)
SCALE = capacity_scales.Scale(
    world=WORLD, same_loss=1.2, lengths=(10, 100, 1000), shares=(0.2, 0.5), frontier_lengths=(1000,)
)  # fmt: skip


def made_tune(size: str, length: float, coef: float, seed: int, lost: float | None, **more: Any) -> Row:
    """A finetune that forgets `lost` where it reaches the target, half way between two evaluations; None never does."""
    end = [100, TARGET - 0.1, lost + 0.01] if lost is not None else [90, TARGET + 0.1, 0.0]
    settings = {"kind": "tune", "size": size, "tokens_per_param": length, "coef": coef, "seed": seed}
    grown = more.pop("grown", None)
    return {
        "settings": settings | ({"grown": grown} if grown else {}),
        "num_params": round(float(size)),
        "all_params": 2 * round(float(size)),
        "base_loss": 1.2,
        "trajectory": [[0, TARGET + 1, 0.0], [50, TARGET + 0.1, (lost or 0.0) - 0.01], end],
    } | more


def made_study(
    by_size: list[float], by_length: list[float], spread: float = 0.01, seeds: int = 3, fall: float = 0.05
) -> list[Row]:
    """Rows of study 07 with this forgetting at the better of two coefficients, and a frontier below it.

    `fall`: nats by which the longest base still improves for a tenfold of tokens.
    """
    rows: list[Row] = []
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        off = spread * rng.standard_normal(10)
        for at, (length, lost) in enumerate(zip(SCALE.lengths, by_length, strict=True)):
            loss = 3.0 - at  # 3, 2, 1: none the nearest to 1.2 but the last
            rows.append(made_tune("5e3", length, 1.0, seed, lost + off[at], base_loss=loss))
            rows.append(made_tune("5e3", length, 0.3, seed, lost + 0.5, base_loss=loss))
            rows.append(made_tune("5e3", length, 3.0, seed, None, base_loss=loss))
        rows.append(made_tune("5e4", 5.0, 1.0, seed, by_size[1] + off[5]))
        curve = [[tokens, 1.5 - fall * (math.log10(tokens) - 2)] for tokens in (500.0, 600.0, 800.0, 1000.0)]
        rows.append({"settings": {"kind": "base", "size": "5e3", "seed": seed}, "curve": curve})
        rows += [
            {"settings": {"kind": "mixture", "share": share, "seed": seed}, "new": new, "old": 1.05}
            for share, new in ((0.2, 2.5), (0.5, 1.5))
        ]
    return rows


def test_the_best_finetune_reaches_the_target_with_every_seed():
    rows = made_study([0.2, 0.01], [0.02, 0.1, 0.2])
    cell = cells.cell_of(capacity_report.of_length(rows, SCALE, 100), TARGET)
    assert cell.coef == 1.0
    assert cell.mean == pytest.approx(0.1, abs=0.02)
    assert set(cell.steps.values()) == {75.0}
    worse = [row for row in rows if row["settings"].get("coef") != 1.0 or row["settings"]["seed"]]
    mixed = cells.cell_of(capacity_report.of_length(worse, SCALE, 100), TARGET)
    assert mixed.forgetting[0] > 0.5 > mixed.forgetting[1]
    never = made_tune("5e3", 100, 1.0, 3, None)
    assert cells.cell_of([*capacity_report.of_length(rows, SCALE, 100), never], TARGET) is None


def test_between_two_coefficients_the_one_that_just_reaches_the_target_is_interpolated():
    low, high = (
        made_tune("5e3", 10, coef, 0, 0.0, trajectory=[[0, 3.0, 0.0], [50, 2.2, lost], [100, loss, lost]])
        for coef, loss, lost in ((1.0, 1.9, 0.3), (4.0, 2.1, 0.1))
    )
    lost, coef, step = cells.best_of([high, low], TARGET)
    assert (lost, coef, step) == pytest.approx((0.2, 2.0, 100))
    assert cells.best_of([low], TARGET) == pytest.approx((0.3, 1.0, 50 + 50 * 0.2 / 0.3))
    high["trajectory"].pop()  # ended early: no neighbour
    assert cells.best_of([high, low], TARGET)[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("by_size", "by_length", "spread", "answer"),
    [
        ([0.2, 0.01], [0.02, 0.1, 0.2], 0.01, "as in the paper within 100 steps"),
        ([0.2, 0.6], [0.02, 0.1, 0.2], 0.01, "not reproduced"),  # grows with size
        ([0.2, 0.01], [0.4, 0.3, 0.2], 0.01, "not reproduced"),  # falls with tokens
        ([0.0, 0.0], [0.0, 0.0, 0.0], 1e-4, "not reproduced"),  # nothing forgotten
        ([0.2, 0.15], [0.15, 0.1, 0.2], 0.3, "cannot tell at this size"),
    ],
)
def test_the_verdict_of_capacity_follows_its_intervals(by_size, by_length, spread, answer):
    rows = made_study(by_size, by_length, spread)
    assert capacity_report.verdict(rows, SCALE).startswith(f"Verdict: {answer}. ")
    assert "| 5000 | 1000 |" in capacity_report.tables(rows, SCALE)


def test_a_base_that_still_learns_is_not_called_saturated():
    rows = made_study([0.2, 0.01], [0.02, 0.1, 0.2], fall=0.3)
    said = capacity_report.verdict(rows, SCALE)
    assert "no test of capacity: the base is not saturated. With" in said
    assert "falls, by 0.30 to 0.30 for a tenfold of tokens at its end" in said
    assert "not saturated" not in capacity_report.verdict(made_study([0.2, 0.01], [0.02, 0.1, 0.2]), SCALE)


def test_no_verdict_from_one_seed_or_from_half_a_study():
    assert "one seed" in capacity_report.verdict(made_study([0.2, 0.01], [0.02, 0.1, 0.2], seeds=1), SCALE)
    assert "not finished" in capacity_report.verdict([], SCALE)
    assert "not finished" in grid_report.verdict([], GRID.SCALES["laptop"])
    assert "not finished" in expansion_report.verdict([], EXPANSION.SCALES["laptop"])


def test_a_model_below_the_frontier_breaks_it():
    rows = made_study([0.2, 0.01], [0.02, 0.1, 0.2])
    found, sentence = capacity_report.bounded(rows, SCALE)  # old loss 1 + .2 and 1 + .7, frontier 1.05
    assert found == 1
    assert "bounds" in sentence
    assert "2 of 2 settings surely above" in sentence
    above = [row | {"base_loss": 1.06} if row["settings"].get("tokens_per_param") == 1000 else row for row in rows]
    assert capacity_report.bounded(above, SCALE) == (0, "Where the finetuned models lie to the frontier is not known.")
    for row in rows:
        if row["settings"]["kind"] == "mixture":
            row["old"] = 2.0
    assert capacity_report.bounded(rows, SCALE)[0] == -1
    assert capacity_report.verdict(rows, SCALE).startswith("Verdict: not reproduced. ")


def test_the_compute_multiplier_on_a_known_curve():
    curve = [[10**k, 4.0 - k] for k in range(4)]  # a nat for every tenfold: 4, 3, 2, 1
    assert cells.compute_multiplier(curve, 1000, 1.0, 1.0) == pytest.approx(0.1)
    assert cells.compute_multiplier(curve, 1000, 1.0, 0.5) == pytest.approx(10**-0.5)
    assert cells.compute_multiplier(curve, 100, 2.0, 1.0) == pytest.approx(0.1)  # what comes later is not read
    assert [cells.compute_multiplier(curve, 1000, 1.0, lost) for lost in (-0.3, 0.0)] == pytest.approx([1, 1])
    assert cells.compute_multiplier(curve, 990, 1.0, 1.0) == pytest.approx(0.1)  # whole steps: not 990 but 1000
    assert cells.reached_at(curve, 9.0) == 1
    assert cells.reached_at(curve, 0.5) is None


def made_grid(slope: float, rise: float, spread: float = 0.003) -> tuple[Any, list[Row]]:
    world = replace(WORLD, sizes=(Size("5e3", 100.0, (1.0,)), Size("5e4", 100.0, (1.0,))))
    scale, rng = GRID.Scale(world=world, lengths=(10, 100)), np.random.default_rng(1)
    rows = [
        made_tune(size, length, 1.0, seed, 0.3 + slope * bool(size == "5e4") + rise * bool(length == 100)
                  + spread * float(rng.standard_normal()), base_loss=2.0)
        for size, length in scale.cells for seed in range(3)
    ]  # fmt: skip
    curve = [[1, 4.0], [10, 3.0], [100, 2.0]]
    rows += [{"settings": {"kind": "base", "size": size, "seed": seed}, "curve": curve}
             for size in ("5e3", "5e4") for seed in range(3)]  # fmt: skip
    return scale, rows


@pytest.mark.parametrize(
    ("slope", "rise", "spread", "answer"),
    [
        (-0.2, 0.1, 0.003, "falls with size, rises with tokens per parameter"),
        (0.2, 0.1, 0.003, "the other way than in 07"),
        (-0.2, 0.1, 0.5, "cannot tell at this size"),
    ],
)
def test_the_verdict_of_the_grid_follows_its_intervals(slope, rise, spread, answer):
    scale, rows = made_grid(slope, rise, spread)
    assert grid_report.verdict(rows, scale).startswith(f"Verdict: {answer}; not comparable with the paper")


def test_the_grid_says_what_a_share_of_the_known_was_lost():
    scale, rows = made_grid(0.0, 0.1, 0.0)
    known = math.log(scale.world.vocab_size) - 2.0
    first, second = (f"{lost / known:.0%} at {at} tokens per parameter" for lost, at in ((0.3, 10), (0.4, 100)))
    assert f"the smallest loses {first} and {second}" in grid_report.verdict(rows, scale)
    assert "0.100 [0.100, 0.100] with 5,000 parameters" in grid_report.rises_by_size(grid_report.cells(rows, scale))


def test_the_grid_reads_multipliers_by_seed():
    scale, rows = made_grid(0.0, 0.0, 0.0)
    cell = grid_report.cells(rows, scale)["5e3", 100]
    assert grid_report.multipliers(rows, ("5e3", 100), cell) == pytest.approx([10**-0.3] * 3)


def made_expansion(widened: float, deepened: float, spread: float) -> tuple[Any, list[Row]]:
    scale = EXPANSION.Scale(
        world=WORLD, small="5e3", tokens_per_param=100.0, control="5e4", control_tokens_per_param=10.0,
        widened={"hidden_size": 32}, deepened={"num_layers": 4},
    )  # fmt: skip
    rng, lost = np.random.default_rng(2), {"unexpanded": 0.3, "widened": widened, "deepened": deepened, "control": 0.1}
    rows = []
    for arm, (size, length, grown) in scale.arms.items():
        for seed in range(3):
            for coef, more in ((0.0, 1.0), (1.0, 0.0)):
                gap = {"function_gap": 1e-6} if grown else {}
                value = lost[arm] + more + spread * float(rng.standard_normal())
                rows.append(made_tune(size, length, coef, seed, value, grown=grown, **gap))
    return scale, rows


@pytest.mark.parametrize(
    ("widened", "deepened", "spread", "answer"),
    [
        (0.1, 0.1, 0.005, "yes, enlarging lowers forgetting with replay within 100 steps"),
        (0.1, 0.3, 0.02, "one way of enlarging"),
        (0.5, 0.5, 0.005, "no, forgetting"),
        (0.3, 0.3, 0.1, "cannot tell"),
    ],
)
def test_the_verdict_of_expansion_follows_its_intervals(widened, deepened, spread, answer):
    scale, rows = made_expansion(widened, deepened, spread)
    text = expansion_report.verdict(rows, scale)
    assert text.startswith(f"Verdict: {answer}")
    assert "are the same function" in text
    assert "| 10,000 |" in expansion_report.table_of_models(rows, scale)


def test_the_figures_are_drawn(tmp_path):
    capacity_report.draw(made_study([0.2, 0.01], [0.02, 0.1, 0.2]), SCALE, tmp_path / "7.png")
    for report, (scale, rows) in (
        (grid_report, made_grid(-0.2, 0.1)),
        (expansion_report, made_expansion(0.1, 0.1, 0.01)),
    ):
        report.draw(rows, scale, tmp_path / f"{report.__name__}.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_who_has_the_rows_pretrains_nothing(monkeypatch, tmp_path):
    def pretrain(*arguments: Any, **more: Any) -> None:
        pytest.fail("a base was asked for")

    monkeypatch.setattr(capacity_runs, "pretrain", pretrain)
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / name / "results.jsonl", tmp_path / name)
    for name, module in zip(NAMES, (CAPACITY, GRID, EXPANSION), strict=True):
        monkeypatch.setattr(module, "HERE", tmp_path / name)
        monkeypatch.setattr(module, "SEVENTH", tmp_path / "study_07_capacity", raising=False)
        for seed in range(module.SCALES["laptop"].seeds):
            module.make("laptop", seed)
        assert (tmp_path / name / "results.jsonl").read_bytes() == (ROOT / name / "results.jsonl").read_bytes()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(lab_bases, "LAB", tmp_path / "lab")
    capacity_runs.bench_of.cache_clear()
    return World(
        num_states=4, vocab_size=8, branching=2, max_length=16, batch_size=16, warmup_steps=2,
        sizes=(Size("6e3", 0.5623, (1.0,)),), target=1.0, tune_rows=8, replay_rows=4, replay_pool=64, max_steps=4,
        eval_steps=2,
    )  # fmt: skip


def test_a_base_that_several_ask_for_is_made_once(tiny, tmp_path, monkeypatch):
    def made(config: Any, wanted: list[float], seed: int, root: Path, *rest: Any) -> None:
        with open(tmp_path / "made.txt", "a") as file:
            file.write(f"{root.name}\n")
        time.sleep(0.5)
        root.mkdir()
        write_json(root / lab_bases.FACTS, {"bases": [{"tokens_per_param": wanted[0], "folder": "at"}], "curve": []})

    monkeypatch.setattr(lab_bases, "_pretrain", made)
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        asked = [pool.submit(lab_bases.pretrain, tiny.language("6e3", 0), [0.2]) for _ in range(2)]
        assert len({str(one.result()[0.2]["folder"]) for one in asked}) == 1
    assert len((tmp_path / "made.txt").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_studies_run_share_their_rows_and_make_each_once(tiny, tmp_path):
    seventh, grid, expansion = (StudyResults(tmp_path / f"{name}.jsonl", "tiny") for name in ("7", "8", "13"))
    scale = capacity_scales.Scale(
        world=tiny, same_loss=0.0, lengths=(0.5623,), shares=(0.5,), frontier_lengths=(0.5623,), frontier_coefs=(1.8,)
    )  # fmt: skip
    CAPACITY.run_seed(scale, 0, seventh)
    kinds = [row["settings"]["kind"] for row in seventh.rows.values()]
    assert sorted(kinds) == ["base", "mixture", "tune", "tune"]
    (mixed,) = (row for row in seventh.rows.values() if row["settings"]["kind"] == "mixture")
    own = next(row for row in seventh.rows.values() if row["settings"]["kind"] == "tune")
    assert mixed["new"] < own["trajectory"][0][1]  # it has seen the new language
    before = (tmp_path / "7.jsonl").read_bytes()
    CAPACITY.run_seed(scale, 0, seventh)
    assert (tmp_path / "7.jsonl").read_bytes() == before

    GRID.run_seed(GRID.Scale(world=tiny, lengths=(0.5623,)), 0, grid, seventh)
    shared = [row for key, row in grid.rows.items() if key in seventh.rows and row["settings"]["kind"] == "tune"]
    assert len(shared) == 1
    assert all(row["trajectory"] == seventh.rows[row["key"]]["trajectory"] for row in shared)

    deeper = EXPANSION.Scale(
        world=tiny, small="6e3", tokens_per_param=0.5623, control="6e3", control_tokens_per_param=0.5623,
        widened={"hidden_size": 32, "num_heads": 2}, deepened={"num_layers": 3}, coefs=(1.0,),
    )  # fmt: skip
    EXPANSION.run_seed(deeper, 0, expansion, seventh)
    grown = [row for row in expansion.rows.values() if "function_gap" in row]
    assert len(grown) == 4
    assert max(row["function_gap"] for row in grown) < 1e-4
    plain = [row for row in expansion.rows.values() if row["settings"]["coef"] == 0]
    assert len({row["trajectory"][0][1] for row in plain if row["settings"]["size"] == "6e3"}) == 1  # one start
