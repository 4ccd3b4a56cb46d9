"""Studies 09 and 11: verdicts on made-up rows that go either way, and one small run of each."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import ensemble
from experiments.matched_loss import GRAIN
from experiments.pages import NoReport
from experiments.study_09_learning_rate import report as rate_report
from experiments.study_09_learning_rate import run as rates
from experiments.study_11_batch_size import report as batch_report
from experiments.study_11_batch_size import run as batches
from retain.lab.models import make_config, make_model
from retain.lab.pretrain import make_trainer
from retain.training.beta2_half_life import apply_half_life

ROOT = Path(__file__).parents[2] / "experiments"

README = "before\n<!-- results: written by run.py -->\n<!-- end of results -->\nafter\n"
WOBBLE = (0.0, 0.01, -0.01)  # of the seeds


# Study 09


def rate_row(
    before: float, rate: float, rows: int, seed: int, steps: float, lost: float, second: float = 0.1
) -> dict[str, Any]:
    """A run whose loss falls evenly and crosses the target after so many steps, with so much forgotten there."""
    target = rate_report.TARGET
    losses = [(0.0, target + 2, 0.0), (steps, target, lost), (1.5 * steps, target - 1, 1.5 * lost)]
    documents = [
        {"step": at, "name": name, "ref_kl": [round(gone * GRAIN)] * 4, "forgetting": [round(gone * GRAIN)] * 4}
        for at, _, gone in losses
        for name in ("prose", "self-generated")
    ]
    settings = {"pretrain_rate": before, "learning_rate": rate, "seed": seed}
    return {
        "settings": settings | ({"replay_rows": rows} if rows else {}),
        "trajectory": [{"step": at, "eval_loss": loss} for at, loss, _ in losses],
        "documents": documents,
        "step_seconds": second,
    }


def rate_rows(
    slow: float = 0.2,
    fast: float = 1.0,
    high: float = 0.5,
    kept: float = 0.1,
    noise: float = 1.0,
    slow_steps: int = 3000,
    slower: float = 1.0,
) -> list[dict[str, Any]]:
    """Forgetting of slow and fast runs, times `high` at the high pretraining rate, where they take `slower` times the
    steps; `kept` with the most replay."""
    made = []
    for seed, wobble in enumerate(WOBBLE):
        for before, factor in ((3e-3, 1.0), (1e-2, high)):
            factor += noise * wobble
            times = 1.0 if before == 3e-3 else slower
            for rate, steps, lost in ((1e-4, slow_steps, slow), (3e-4, 1000, slow), (3e-3, 50, fast)):
                if before == 3e-3 or rate > 1e-4:
                    made.append(rate_row(before, rate, 0, seed, times * (steps + seed), lost * factor))
            for rows in (1, 2) if before == 3e-3 else (2,):
                steps = times * (200 + seed)
                made.append(rate_row(before, 3e-3, rows, seed, steps, kept * factor * 2 / rows, second=0.2))
            made.append(rate_row(before, 3e-4, 2, seed, times * 1500, kept * factor))
        for before in (3e-3, 1e-2):
            base = {"kind": "base", "pretrain_rate": before, "base_seed": seed}
            made.append({"settings": base, "held_out_loss": [4.0, 3.3 + wobble], "tokens_per_param": 9.0})
    return made


def test_claims_on_learning_rates_reproduced() -> None:
    text = rate_report.text_of(rate_rows())
    assert "forgets less and takes more steps: **reproduced**" in text
    assert "go with the inverse of the rate: **reproduced**" in text
    assert "each doubling of replay lowers forgetting: **reproduced** (-0.100" in text
    assert "in fewer steps and less time: **reproduced**" in text
    factors = [float(one) for one in re.findall(r"([\d.]+) \[[\d., ]+\] against", text)][1:]
    assert factors[:3] == pytest.approx([14.93, 4.98, 0.25], abs=0.01), "the factor is the comparator's"
    assert factors[3] == pytest.approx(14.93 / 2, abs=0.01), "a step with replay takes twice the time"
    assert "reduces forgetting, without replay: **reproduced**" in text
    assert "reduces forgetting, with replay: **reproduced**" in text


def test_pretraining_rates_are_read_at_equal_steps_too() -> None:
    text = rate_report.text_of(rate_rows(high=0.5))
    assert "bases of 0.01 take 1.0 to 1.0 times the steps of those of 0.003" in text
    high, low = map(float, re.search(r"without replay they forget ([\d.]+) .*? and ([\d.]+) ", text).groups())
    assert high == pytest.approx(low / 2, abs=0.01)
    text = rate_report.text_of(rate_rows(high=1.0, slower=2.0))
    assert "bases of 0.01 take 2.0 to 2.0 times the steps" in text
    text = rate_report.text_of(rate_rows(slower=100.0))
    assert text.count("no number of steps is common to both") == 2
    assert "at equal forgetting, linear between numbers of rows, the factor is" in rate_report.text_of(
        rate_rows(kept=0.15)
    )
    assert "no factor at equal forgetting in some seed" in rate_report.text_of(rate_rows(kept=0.01))


def test_claims_on_learning_rates_refuted() -> None:
    text = rate_report.text_of(rate_rows(slow=1.0, fast=0.5, high=2.0, kept=1.5, slow_steps=1500))
    assert "forgets less and takes more steps: **forgetting not reproduced, steps reproduced**" in text
    assert "go with the inverse of the rate: **not reproduced**" in text
    assert "in fewer steps and less time: **not reproduced** (a seed has no run with replay" in text
    assert "reduces forgetting, without replay: **not reproduced**" in text


def test_claims_on_learning_rates_left_open() -> None:
    text = rate_report.text_of(rate_rows(high=1.0, noise=20.0))
    assert "reduces forgetting, without replay: **cannot tell**" in text
    with pytest.raises(NoReport, match="not every run"):
        rate_report.text_of([row for row in rate_rows() if row["settings"].get("seed") != 0][:-4])
    with pytest.raises(NoReport, match="no run is made yet"):
        rate_report.text_of([])


def test_a_run_that_learned_nothing_is_named() -> None:
    rows = rate_rows()
    for point in rows[0]["trajectory"]:
        point["eval_loss"] = 4.5
    with pytest.raises(NoReport, match=r"a run did not come down to 3.1 nats per token: .*0.0001"):
        rate_report.text_of(rows)


def test_rate_study_draws(tmp_path: Path) -> None:
    rate_report.draw(rate_rows(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_rate_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = rates
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(module, "PRETRAIN_RATES", (3e-3, 1e-2))
    monkeypatch.setattr(module, "SEEDS", (0, 1))
    monkeypatch.setattr(module, "BASE_LOSS", 6.5)
    monkeypatch.setattr(module, "RATES", (1e-2, 3e-2))
    monkeypatch.setattr(module, "FEW_RATES", (1e-2, 3e-2))
    monkeypatch.setattr(module, "HIGH", 3e-2)
    monkeypatch.setattr(module, "ROWS", (2, 4))
    monkeypatch.setattr(module, "FEW_ROWS", 2)
    for part in (module, rate_report):
        monkeypatch.setattr(part, "TARGET", 6.0)
    (tmp_path / "README.md").write_text(README)
    module.main(["--num_workers", "1"])
    found = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len([row for row in found if row["settings"].get("kind") == "base"]) == 4
    assert all(row["held_out_loss"][-1] <= 6.5 for row in found if "held_out_loss" in row)
    assert "Replay at a high rate" in (tmp_path / "README.md").read_text()


# Study 11


def batch_rows(power: float, noise: float = 0.0, shift: int = 0, places: int = 7) -> list[dict[str, Any]]:
    """Losses that are least at a half-life which goes with the batch size to a power."""
    rows = []
    for batch in (1, 4, 16):
        for place in range(places):
            half_life = 1000.0 * 4**place
            best = math.log(1000 * 4 ** (places // 2 - power + shift)) + power * math.log(batch)
            away = [math.log(half_life) - best - noise * wobble * (batch > 4) for wobble in WOBBLE]
            for rate in (1e-3, 1e-2, 1e-1):
                settings = {"batch_size": batch, "half_life": half_life, "learning_rate": rate, "seeds": [0, 1, 2]}
                losses = [2 + 0.01 * one**2 + (rate != 1e-2) for one in away]
                rows.append({"settings": settings, "losses": losses, "beta2": 0.5 ** (64 * batch / half_life)})
    return rows


@pytest.mark.parametrize(
    ("rows", "said", "costs"),
    [
        (batch_rows(0.0, noise=1.0), "Verdict: reproduced.", "costs less"),
        (batch_rows(1.0, noise=1.0), "Verdict: not reproduced.", "costs more"),
        (batch_rows(0.3), "Verdict: in between: nearer to constant", "costs less"),
        (batch_rows(0.5, noise=200.0), "Verdict: cannot tell", "does not cost clearly"),
        (batch_rows(0.0, shift=4), "Verdict: cannot tell", "some seed is best at the end"),
    ],
)
def test_verdict_on_batch_sizes_goes_with_the_results(rows: list[dict[str, Any]], said: str, costs: str) -> None:
    text = batch_report.verdict(rows)
    assert said in text
    assert costs in text


def test_best_half_life_is_read_between_the_grid() -> None:
    cells = batch_report.cells_of(batch_rows(0.5))
    assert [cell.learning_rate for cell in cells] == [1e-2] * len(cells)
    found = [batch_report.best_half_life(cells, batch, 0) for batch in (1, 4, 16)]
    assert found == pytest.approx([1000 * 4**place for place in (2.5, 3, 3.5)])
    assert batch_report.slopes(cells) == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(("power", "said"), [(0.0, "in part"), (1.0, "cannot tell")])
def test_flat_curves_are_read_at_their_short_end(power: float, said: str) -> None:
    """Their least is anywhere, which must not count as constant in tokens."""
    rows = batch_rows(power)
    for row in rows:
        best = 1000 * 4 ** (3 - power) * row["settings"]["batch_size"] ** power
        if row["settings"]["half_life"] >= best:
            at = math.log(row["settings"]["half_life"])
            wobbles = [0.001 * math.sin(row["settings"]["batch_size"] * at * (seed + 1)) for seed in range(3)]
            row["losses"] = [loss // 1 + wobble for loss, wobble in zip(row["losses"], wobbles, strict=True)]
    assert f"Verdict: {said}" in batch_report.verdict(rows)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_shortest_good_half_life_goes_with_the_best(power: float) -> None:
    cells = batch_report.cells_of(batch_rows(power))
    assert batch_report.slopes(cells, batch_report.shortest) == pytest.approx([power] * 3)
    best, found = (read(cells, 4, 0) for read in (batch_report.best_half_life, batch_report.shortest))
    assert found == pytest.approx(best * math.exp(-1 / math.log(4)))  # on a line from .01 ln(4)² nats to none


def test_one_beta2_is_known_by_more_than_its_nines() -> None:
    value, costs = batch_report.regrets(batch_report.cells_of(batch_rows(1.0)), "beta2")
    assert value == pytest.approx(0.5 ** (64 / (1000 * 4**2)))
    assert costs == pytest.approx([0.0] * 3)
    assert batch_report.regrets(batch_report.cells_of(batch_rows(0.0)), "half_life")[0] == 1000.0 * 4**3


def test_a_diverged_run_is_no_optimum() -> None:
    rows = batch_rows(0.0)
    for row in rows:
        if row["settings"]["half_life"] == 1000.0 * 4**2:
            row["losses"] = [None] * 3
    cells = batch_report.cells_of(rows)
    assert batch_report.best_half_life(cells, 1, 0) == 1000.0 * 4**3
    assert "none yet" in batch_report.verdict(rows[:7])


def test_a_row_may_hold_one_seed_or_several() -> None:
    rows = batch_rows(0.0, noise=1.0)
    apart = [
        {**row, "settings": {**row["settings"], "seeds": [seed]}, "losses": [loss]}
        for row in rows
        for seed, loss in zip(row["settings"]["seeds"], row["losses"], strict=True)
    ]
    assert batch_report.cells_of(apart[::-1]) == batch_report.cells_of(rows)


def test_a_batch_size_that_is_not_finished_is_left_out() -> None:
    rows = batch_rows(0.0, noise=1.0)
    part = [row for row in rows if row["settings"]["batch_size"] > 1 or row["settings"]["half_life"] < 5000]
    assert "From 4 to 16 rows" in batch_report.verdict(part)
    assert "From 1 to 16 rows" in batch_report.verdict(rows)


def small_scale(module: Any, **how: Any) -> Any:
    given = {"model_size": "5000", "num_states": 8, "vocab_size": 128, "branching": 3, "max_length": 16,
             "eval_rows": 32, "compiled": False}  # fmt: skip
    return module.Scale(**given | how)


def pretrained(scale: Any, batch_size: int, member: Any, folder: Path) -> tuple[float, Any]:
    """One model by `retain pretrain`'s own parts: the held-out loss at the end, and the model."""
    corpus, args = batches.open_corpus(scale.config(), member.seed), batches.arguments(scale, batch_size, folder)
    args.learning_rate, args.seed = member.learning_rate, member.seed
    apply_half_life(args, member.half_life, scale.max_length)
    shape = make_config(scale.model_size, vocab_size=len(corpus.tokenizer), max_length=corpus.length)
    trainer = make_trainer(args, scale.config(), corpus, make_model(shape, member.seed), member.seed)
    trainer.train()
    return trainer.evaluate()["eval_loss"], trainer.model


@pytest.mark.slow
def test_a_member_of_the_ensemble_is_a_run_of_pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and loss after 36 steps; at rates at which a rounding does not grow."""
    module = batches
    monkeypatch.setattr(module, "CACHE", tmp_path)
    scale = small_scale(module, tokens=16 * 4 * 36)
    members = [module.Member(200.0, 3e-3, 0), module.Member(1e4, 2e-3, 1), module.Member(1e4, 3e-3, 1)]
    corpora = {seed: module.open_corpus(scale.config(), seed) for seed in (0, 1)}
    together = module.train_together(
        members, corpora, module.arguments(scale, 4, tmp_path), scale.model_size, tmp_path, fast=False
    )
    for member, weights, loss in zip(members[:2], together.weights, together.losses, strict=False):
        alone, model = pretrained(scale, 4, member, tmp_path)
        assert loss == pytest.approx(alone, abs=1e-5)
        torch.testing.assert_close(weights, together.flat.vector(model), rtol=0, atol=1e-5)
    assert together.losses[1] != pytest.approx(together.losses[2], abs=1e-2)


@pytest.mark.slow
def test_a_killed_ensemble_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = batches
    scale = small_scale(module, tokens=16 * 2 * 12)
    members, corpora = [module.Member(500.0, 1e-2, 0)], {0: module.open_corpus(scale.config(), 0)}

    def losses(folder: Path) -> list[float]:
        args = module.arguments(scale, 2, folder)
        return module.train_together(members, corpora, args, scale.model_size, folder, fast=False).losses

    whole = losses(tmp_path / "whole")
    monkeypatch.setattr(ensemble, "SAVE_SECONDS", -1)
    save = ensemble._save

    def killed(path: Path, state: Any, step: int) -> None:
        save(path, state, step)
        if step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(ensemble, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        losses(tmp_path / "killed")
    monkeypatch.setattr(ensemble, "_save", save)
    assert losses(tmp_path / "killed") == whole
    assert not list((tmp_path / "killed").iterdir())


@pytest.mark.slow
def test_batch_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = batches
    scale = small_scale(module, tokens=256, batch_sizes=(1, 4), half_lives=3, rates=(1e-2,), seeds=2)
    monkeypatch.setattr(module, "SCALES", {"laptop": scale})
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "CACHE", tmp_path)
    (tmp_path / "README.md").write_text(README)
    module.main(["--num_workers", "1"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3
    assert {row["num_steps"] for row in rows} == {16, 4}
    first = min(rows, key=lambda row: (row["settings"]["batch_size"], row["settings"]["half_life"]))
    assert first["beta2"] == pytest.approx(scale.first_beta2)
    monkeypatch.setattr(module, "train_together", None)  # finished runs are not made again
    module.main(["--num_workers", "1"])
    assert "Verdict" in (tmp_path / "README.md").read_text()
