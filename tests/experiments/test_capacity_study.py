"""Study 07: its loop against ReplayTrainer, and its verdicts on made-up rows that go either way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from experiments.ensemble import Ensemble
from experiments.pages import BEGIN, END, NoReport
from experiments.study_07_capacity import report, runs
from experiments.study_07_capacity import run as study
from experiments.study_07_capacity.settings import Arm, Scale, Start
from retain import ReplayConfig, ReplayDataset, ReplayTrainer
from retain.lab.models import make_model
from retain.lab.pretrain import PretrainArguments
from retain.lab.streams import Stream
from retain.replay.dataset import replay_indices

TINY, STEPS = Scale(held_out=32, tune_rows=2, seeds=1), 8


def tuned(model: Any, streams: Any, arm: Arm, args: PretrainArguments) -> Any:
    """The same finetune by the trainer; the pool lies so that its order is that of the stream."""
    numbers = np.arange(STEPS * TINY.tune_rows)
    order = np.concatenate([replay_indices(step, TINY.tune_rows, len(numbers), args.seed) for step in range(STEPS)])
    pool = streams[arm.rows][0](numbers)[np.argsort(order)]
    args.per_device_train_batch_size, args.learning_rate = TINY.tune_rows, TINY.tune_learning_rate
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.train_sampling_strategy = "sequential"
    trainer = ReplayTrainer(
        model=model, args=args, train_dataset=Stream(streams["new"][0], len(numbers)),
        data_collator=default_data_collator, processing_class=runs.corpora(TINY, 0)[0].tokenizer,
        replay_dataset=ReplayDataset.from_rows(list(pool.astype(np.int64)), "test"),
        replay_config=ReplayConfig(replay_coef=arm.coef, per_device_replay_batch_size=TINY.tune_rows),
    )  # fmt: skip
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("arm", [Arm("self", 0.0), Arm("real", 3.0)])
def test_a_member_is_a_run_of_replay_trainer(arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after eight steps beside another member, which goes elsewhere."""
    monkeypatch.setattr(runs, "folder_of", lambda scale: tmp_path)
    flat = runs.Flat.of(TINY.shape("6400"))
    base = flat.vector(make_model(flat.model.config, 5))
    streams = runs._streams(TINY, "tiny", flat, base[None], STEPS * TINY.tune_rows)
    members = [(arm, 0), (Arm("self", 30.0), 0)]
    args = runs.arguments(TINY, STEPS, weight_decay=0.0)
    weights, other = Ensemble(flat, flat.protected_loss, args, fast=False).train(
        base.repeat(2, 1), torch.full((2,), runs.BETA2, dtype=torch.float64),
        runs._rates(args, TINY.tune_learning_rate, members),
        lambda done: runs._batches(TINY, flat, base[None], streams, members, range(done, STEPS)), tmp_path / "tuning",
    )  # fmt: skip
    args.output_dir = str(tmp_path / "alone")
    alone = flat.vector(tuned(flat.model_of(base), streams, arm, args))
    moved = (alone - base).norm()
    assert (weights - alone).norm() < 1e-3 * moved  # Adam enlarges a rounding where a gradient is next to 0
    assert (weights - other).norm() > 0.05 * moved


FAST = replace(
    Scale(), lengths=(20, 2000, 6000), shares=(0.0, 0.5), seeds=2,
    starts=(("saturated", Start("6400", (6000,), (100, 1000))), ("20 tokens", Start("6400", (20,), (100, 1000))),
            ("widened", Start("6400", (6000,), (100,))), ("larger", Start("26e3", (20,), (100,)))),
)  # fmt: skip


def made_up(forgotten: Mapping[str, Mapping[int, float]], mixture: float = 1.0) -> list[dict[str, Any]]:
    """Rows of which a start forgets so much at the first target after so many steps, with coefficient 1 and above."""
    rows = []
    for seed in range(FAST.seeds):
        near = 1e-4 * seed
        for length in FAST.lengths:
            for share in FAST.shares_at(FAST.small, length):
                old, new = (mixture, 1.5) if share else (1.1 + 3 / length, 4.0)
                of = {"kind": "base", "size": "6400", "tokens_per_param": length, "share": share, "seed": seed}
                rows.append({"settings": of, "old": old + near, "new": new + near})
        for start, by_steps in forgotten.items():
            for steps, value in by_steps.items():
                for arm in FAST.arms:
                    of = {"kind": "tune", "start": start, "steps": steps, "seed": seed, **asdict(arm)}
                    old = value + (0.5 if arm.coef == 0 else 0.0)
                    new = 1.9 if arm.coef == 0 else 2.05
                    rows.append({"settings": of, "base_old": 1.1, "old": 1.1 + old + near, "new": new + near})
    return rows


def verdicts(forgotten: Mapping[str, Mapping[int, float]], **more: float) -> list[str]:
    return [verdict for verdict, _ in report.found(report.Runs(made_up(forgotten, **more), FAST)).values()]


def test_a_floor_is_claimed_only_where_more_steps_do_not_help() -> None:
    def floor(short: float, long: float) -> str:
        return verdicts({"saturated": {100: short, 1000: long}})[0]

    assert floor(0.3, 0.3) == "yes"
    assert floor(0.3, 0.1) == "cannot tell: it still falls"
    assert floor(0.1, 0.3) == "yes, and more in more steps"
    assert floor(0.3, 0.001) == "no: next to nothing is left"


def test_findings_go_with_the_rows() -> None:
    kept, gone = {100: 0.001, 1000: 0.001}, {100: 0.3, 1000: 0.3}
    names = ("saturated", "20 tokens", "widened", "larger")
    less = verdicts(dict(zip(names, (gone, kept, kept, kept), strict=True)))
    assert less == [
        "yes",
        "reproduced",
        "equivalent",
        "reproduced",
        "not reproduced",
        "not reproduced",
        "yes",
        "reproduced",
    ]
    more = verdicts(dict(zip(names, (kept, gone, gone, gone), strict=True)), mixture=1.6)
    assert more[1] == "not reproduced", "finetunes lie below the mixtures"
    assert more[3:] == ["not reproduced", "reproduced", "not reproduced", "no", "not reproduced"]
    assert verdicts({"saturated": {100: 0.3}}) == [], "without the longest runs nothing is said"


def test_what_rests_on_the_largest_coefficient_is_an_upper_bound() -> None:
    rows = made_up({"saturated": {100: 0.3, 1000: 0.3}, "20 tokens": {100: 0.1, 1000: 0.1}})
    assert "| saturated | 1,000 | 0.300 [" in report.text_of(rows, FAST)
    for row in rows:
        if row["settings"].get("start") == "20 tokens" and row["settings"]["coef"] > 0:
            row["new"] -= 0.2
    text = report.text_of(rows, FAST)
    assert "| saturated | 1,000 | 0.300 [" in text
    assert "| 20 tokens | 1,000 | ≤ 0.100 [" in text


def test_real_rows_are_read_at_their_new_task_loss_too() -> None:
    """As much forgotten after as many steps, but more learned: at one loss self-generated rows forget more."""
    rows = made_up({"saturated": {100: 0.3, 1000: 0.3}, "20 tokens": {100: 0.1, 1000: 0.1}})
    for row in rows:
        if row["settings"].get("start") == "saturated" and row["settings"]["rows"] == "real":
            row["new"] -= 0.075  # half the way to the plain run, which forgets 0.5 more
    text = report.text_of(rows, FAST)
    assert "more than real ones: **equivalent** (" in text
    assert "self-generated ones forget +0.250 [" in text


def test_no_verdict_from_one_seed() -> None:
    rows = made_up({"saturated": {100: 0.3, 1000: 0.3}})
    assert report.found(report.Runs(rows, FAST))
    one = [row for row in rows if row["settings"]["kind"] == "base" or row["settings"]["seed"] == 0]
    assert report.found(report.Runs(one, FAST)) == {}


def test_a_report_of_what_is_there(tmp_path: Path) -> None:
    rows = made_up({"saturated": {100: 0.3, 1000: 0.3}, "20 tokens": {100: 0.1}})
    text = report.text_of(rows, FAST)
    assert "| saturated | 1,000 | 0.300 [" in text
    assert "| 20 tokens | 100 |" in text
    assert "| 0% | 0.002 [0.002, 0.002] | yes |" in text
    report.draw(rows, FAST, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    with pytest.raises(NoReport, match="bases"):
        report.text_of(rows[1:], FAST)


@pytest.mark.slow
def test_the_study_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All starts of one and two steps; what is made once is not made again."""
    arms, grown = (Arm("self", 0.0), Arm("self", 10.0), Arm("real", 10.0)), {"hidden_size": 32, "num_heads": 2}
    tiny = replace(
        Scale(), lengths=(1, 2, 4), shares=(0.0, 0.5), held_out=16, tune_rows=2, seeds=2, arms=arms,
        starts=(("saturated", Start("6400", (4,), (1, 2))), ("20 tokens", Start("6400", (1,), (1, 2))),
                ("widened", Start("6400", (4,), (1,), tuple(grown.items()))), ("larger", Start("26e3", (1, 2), (1,)))),
    )  # fmt: skip
    monkeypatch.setattr(study, "SCALES", {"laptop": tiny})
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(runs, "CACHE", tmp_path)
    monkeypatch.setattr(runs, "Ensemble", partial(Ensemble, fast=False))
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    study.main(["--num_workers", "1"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sum(row["settings"]["kind"] == "tune" for row in rows) == 2 * len(arms) * (2 + 2 + 1 + 1)
    widened = next(row for row in rows if row["settings"].get("start") == "widened")
    same = next(row for row in rows if row["settings"].get("start") == "saturated")
    assert widened["base_old"] == pytest.approx(same["base_old"], abs=1e-4), "it computes the same at first"
    monkeypatch.setattr(runs, "Ensemble", None)
    study.main(["--num_workers", "1"])
    assert "| larger | 1 |" in (tmp_path / "README.md").read_text()
