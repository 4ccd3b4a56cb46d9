"""Planning: which pilots, what they predict, and a recommendation that keeps its budget under the true law."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_texts, save_model

from retain.cli import plan as plan_verb
from retain.cli.config import PlanConfig
from retain.cli.main import main
from retain.laws.forms import joint_forgetting, shifted_power
from retain.laws.law import ForgettingLaw
from retain.laws.plan import (
    Pilot,
    _doubts,
    design,
    distrust,
    eval_steps,
    first_step,
    fit_pilots,
    predicted,
    recommend,
)
from retain.laws.plan_page import draw, told_of, verdict

PER_RANK = 5472  # a LoRA on the small base of the experiments
SIZES = {rank: PER_RANK * rank for rank in (1, 2, 4, 8, 16, 32)}
PILOTS = design(list(SIZES), [0.0, 1.0, 10.0], 60)


LAW = {"rho": 1.5, "c": 3.2, "s": 2.0}


def truth(P, N, coef):
    """The joint law, with c and s as a model of half a million parameters might have them; replay changes both losses.

    New-task loss and forgetting (KL to the base), nats per token.
    """
    learned = shifted_power(P, N, a=2e3, alpha=0.25, b=4.0, beta=0.4, **LAW)
    lost = joint_forgetting(P, N, c_fft=0.25, s_fft=2.3, a=2e3, alpha=0.2, b=6.0, beta=0.45, **LAW)
    held = (1 + 1.5 * np.sqrt(coef)) ** -2 * (N / 60) ** (-0.2 * (coef > 0))
    return learned + 0.1 * np.log1p(coef) * (N / 30) ** -0.3, lost * held


def measured(seed: int, pilots=PILOTS, noise: float = 0.04):
    """Pilots as `retain plan` reads them: noise of which half is constant within a run, the rest moves slowly."""
    rng, rows = np.random.default_rng(seed), []
    for pilot in pilots:
        steps = np.arange(first_step(pilot.steps), pilot.steps + 1, eval_steps(pilot.steps))
        values = truth(SIZES[pilot.rank], steps, pilot.coef)
        for at, value in enumerate(values):
            slow = np.zeros(len(steps))
            for step in range(len(steps)):
                slow[step] = 0.8 * slow[step - 1] + 0.6 * rng.normal()
            values[at][:] = value * np.exp((noise if at else noise / 4) * np.sqrt(0.5) * (slow + rng.normal()))
        rows += [
            {"run": pilot.name, "num_params": SIZES[pilot.rank], "num_steps": int(step), "replay_coef": pilot.coef,
             "finetuning_loss": learned, "forgetting_loss": lost}
            for step, learned, lost in zip(steps, *values, strict=True)
        ]  # fmt: skip
    return rows


def planned(seed: int, budget: float, coefs=(0.0, 1.0, 10.0), **how):
    laws = fit_pilots(measured(seed), num_resamples=100)
    return recommend(laws, SIZES, budget=budget, coefs=coefs, **how)


def test_pilots_span_ranks_and_coefficients():
    assert len(PILOTS) == 12
    assert [pilot.rank for pilot in PILOTS if not pilot.coef] == [1, 2, 4, 8, 16, 32]
    assert [pilot.rank for pilot in PILOTS if pilot.coef == 10] == [1, 8, 32]
    assert design([4, 2, 2, 8], [0.0], 24) == [Pilot(2, 0.0, 24), Pilot(4, 0.0, 24), Pilot(8, 0.0, 24)]
    assert (eval_steps(60), first_step(60), eval_steps(12)) == (5, 10, 1)


def kept(seeds, budget: float, coefs) -> float:
    """The share of draws whose recommendation stays within the budget under the true law."""
    plans = [planned(seed, budget, coefs) for seed in seeds]
    assert all(plan.chosen for plan in plans)
    lost = [truth(one.num_params, one.num_steps, one.replay_coef)[1] for one in (plan.chosen for plan in plans)]
    return float(np.mean(np.array(lost) <= budget))


CASES = [(0.3, (0.0, 1.0, 10.0)), (0.6, (0.0,))]


@pytest.mark.parametrize(("budget", "coefs"), CASES)
def test_the_recommendation_keeps_the_budget(budget, coefs):
    assert kept(range(4), budget, coefs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "coefs"), CASES)
def test_the_recommendation_keeps_the_budget_under_the_true_law_in_most_of_100_draws(budget, coefs):
    assert kept(range(100), budget, coefs) >= 0.85


def test_a_smaller_budget_asks_for_replay_and_learns_less():
    laws = fit_pilots(measured(1), num_resamples=100)
    plans = [recommend(laws, SIZES, budget=budget, coefs=(0.0, 1.0, 10.0)) for budget in (0.07, 0.7, 2.0)]
    coefs = [plan.chosen.replay_coef for plan in plans]
    losses = [plan.chosen.finetuning_loss.value for plan in plans]
    assert coefs == [10, 1, 0], coefs
    assert losses == sorted(losses, reverse=True)
    assert all(one is None or one.forgetting_loss.high <= 0.07 for one in plans[0].best.values())
    assert plans[0].best[0.0] is None  # plain runs have forgotten more before the first measurement


def test_a_budget_that_no_setting_keeps_is_called_so():
    plan = planned(0, 1e-4)
    assert plan.chosen is None
    assert set(plan.best.values()) == {None}
    assert (plan.fallback.replay_coef, plan.fallback.num_steps) == (10, 60)
    assert plan.to_dict()["feasible"] is False


def test_what_the_pilots_cannot_say_is_said():
    laws = fit_pilots([row for row in measured(0) if not row["replay_coef"]], num_resamples=100)
    plan = recommend(laws, SIZES, budget=3.0, max_steps=120)
    said = " ".join(plan.doubts)
    assert plan.chosen.num_steps == 120
    for words in ("no pilot had any", "120 is beyond the pilots", "rank: 32 is at the edge", "recipe: learning rate"):
        assert words in said
    with pytest.raises(ValueError, match="has forgotten nothing; raise learning_rate"):
        fit_pilots([{**row, "forgetting_loss": 0.0} for row in measured(0)])


def overfitted(seed: int = 0):
    """Short pilots of few rows: the new-task loss falls and rises again, early or late as chance has it. What no law of
    P and N says."""
    rng, rows = np.random.default_rng(seed), []
    for pilot in design([1, 2, 4, 8], [0.0], 12):
        lowest = {1: 9, 2: 4, 4: 3, 8: 7}[pilot.rank]
        for step in range(first_step(12), 13):
            learned = 1.33 + 0.004 * (step - lowest) ** 2 + 0.01 * rng.normal()
            lost = 0.002 * step * (1 + 0.2 * rng.normal()) * {1: 1, 2: 3, 4: 2, 8: 5}[pilot.rank]
            rows.append({"run": pilot.name, "num_params": SIZES[pilot.rank], "num_steps": step, "replay_coef": 0.0,
                         "finetuning_loss": learned, "forgetting_loss": abs(lost) + 1e-4})  # fmt: skip
    return rows


def test_where_the_law_is_worse_than_its_pilots_the_best_measured_setting_is_recommended(tmp_path):
    """It recommended a setting at which its own pilot had measured 1.439, where another had 1.335 within the budget."""
    rows = overfitted()
    laws = fit_pilots(rows, num_resamples=100)
    plan = recommend(laws, {rank: SIZES[rank] for rank in (1, 2, 4, 8)}, budget=0.02)
    within = [row["finetuning_loss"] for row in rows if row["forgetting_loss"] <= 0.02]
    assert plan.chosen.measured[0] == min(within)
    assert plan.chosen.measured[1] <= 0.02
    assert "the best that a pilot measured; the law is not followed, since it" in verdict(plan)
    assert any(text.startswith("no replay: the law is not followed; it") for text in plan.doubts)
    assert f"its pilot measured {min(within):.4g}" in told_of(plan.chosen, 0.9)[0]
    assert plan.to_dict()["law_not_followed"][0]["replay_coef"] == 0
    draw(rows, laws, plan, tmp_path / "plan.png")


def test_a_setting_that_its_own_pilot_contradicts_is_not_recommended():
    rows = measured(2)
    before = recommend(fit_pilots(rows, num_resamples=100), SIZES, budget=0.3, coefs=(0.0, 1.0, 10.0)).chosen
    assert not before.contradicted
    for column, value in (("finetuning_loss", 4.9), ("forgetting_loss", 0.29)):
        changed = [
            {**row, column: value}
            if (row["num_params"], row["num_steps"], row["replay_coef"])
            == (before.num_params, before.num_steps, before.replay_coef)
            else row
            for row in rows
        ]
        laws = fit_pilots(changed, num_resamples=100)
        after = recommend(laws, SIZES, budget=0.3, coefs=(0.0, 1.0, 10.0)).chosen
        assert after.words != before.words
        assert not after.contradicted


@pytest.fixture(scope="module")
def laws():
    return fit_pilots(measured(3), num_resamples=100)


@pytest.mark.parametrize("budget", [0.07, 0.3, 2.0])
def test_no_pilot_measured_better_within_what_the_law_allows(laws, budget):
    plan = recommend(laws, SIZES, budget=budget, coefs=(0.0, 1.0, 10.0))
    within = [learned for learned, lost in laws.measured.values() if lost <= budget]
    assert (min(within) < plan.chosen.learned) == plan.doubts[0].startswith("measured: rank ")
    for coef in (0.0, 1.0, 10.0):
        for one in predicted(laws, SIZES, coef, range(10, 61, 5), 0.9):
            if one.measured and one.forgetting_loss.high <= budget and not one.contradicted:
                assert plan.chosen.learned <= one.measured[0]


def test_an_interval_wider_than_all_gains_and_steps_at_the_edge_are_said(laws):
    settings = predicted(laws, SIZES, 0.0, range(10, 61, 5), 0.9)
    assert distrust(laws, settings) is None
    vague = [replace(one, finetuning_loss=replace(one.finetuning_loss, high=20.0)) for one in settings]
    assert "are wider than all gains: pilots measured 3.77 to 8.029" in distrust(laws, vague)
    plan = recommend(laws, SIZES, budget=2.0, coefs=(0.0,))
    plan.chosen = replace(plan.chosen, num_steps=10)
    assert any(
        text.startswith("steps: 10 is the first measurement of the pilots") for text in _doubts(laws, plan, SIZES)
    )


# The verb

FLAGS = [
    *("--lora_ranks", "1", "2", "4", "8", "--replay_coefs", "0", "1", "--pilot_steps", "12", "--learning_rate", "1e-2"),
    *("--max_length", "16", "--per_device_train_batch_size", "2", "--replay_num_rows", "8", "--num_resamples", "100"),
    *("--eval_rows", "2", "--retention_max_documents", "1", "--lora_target_modules", "q_proj", "v_proj"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, rows of a new task, a retention text, and a plan that was made of them."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "llama")
    for name, seed, count in (("new", 1, 12), ("held", 2, 4)):
        rows = [json.dumps({"text": text}) + "\n" for text in make_texts(count, seed=seed, words=12)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(4, seed=3)))
    return folder


def arguments(world: Path, *more: str) -> list[str]:
    return [
        "plan", "--model", f"{world}/llama", "--dataset_name", f"{world}/new.jsonl", "--output_dir", f"{world}/plan",
        "--eval_dataset_name", f"{world}/held.jsonl", "--retention", f"wiki={world}/wiki.txt", *FLAGS, *more,
    ]  # fmt: skip


def test_rows_are_no_longer_than_the_model_takes(world, monkeypatch, capsys):
    """A model of 128 positions: 256 tokens that nobody chose become 128, and 200 that somebody chose are refused."""
    seen = []
    monkeypatch.setattr(plan_verb, "prepare_rows", lambda config, folder: seen.append(int(config.max_length)) or 1 / 0)
    at, asked = FLAGS.index("--max_length"), arguments(world, "--budget", "5")
    begin = asked.index(FLAGS[at])
    assert main(asked[:begin] + asked[begin + 2 :]) == 1
    assert seen == [128]
    capsys.readouterr()
    assert main([*asked, "--max_length", "200"]) == 1
    assert "max_length: 200 is more than this model's 128 positions; use at most 128" in capsys.readouterr().err


@pytest.mark.program
def test_plan_on_the_command_line(world, capsys, monkeypatch):
    """Stopped in the middle, taken up, and asked again with a budget that nothing keeps."""
    made, make = [], plan_verb.make_pilot

    def stopped(pilot, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(pilot)
        return make(pilot, *rest)

    monkeypatch.setattr(plan_verb, "make_pilot", stopped)
    assert main(arguments(world, "--budget", "5")) == 130
    assert "finished pilots are kept" in capsys.readouterr().err
    monkeypatch.setattr(plan_verb, "make_pilot", make)
    assert main(arguments(world, "--budget", "5")) == 0
    out = capsys.readouterr().out
    assert out.count("(found)") == 3
    told = json.loads((world / "plan" / "plan.json").read_text())
    command = out.strip().splitlines()[-1]
    assert command == told["command"]
    flags = shlex.split(command)
    assert flags[:2] == ["retain", "finetune"]
    chosen = told["recommendation"]
    assert flags[flags.index("--lora_r") + 1] == str(chosen["rank"])
    assert chosen["forgetting_loss"]["high"] <= 5
    assert told["cost"]["pilots"] == 7
    assert told["cost"]["steps"] == 84
    assert told["cost"]["tokens"] > 84 * 2 * 2
    assert ForgettingLaw.from_json(world / "plan" / "law.json").form.name == "joint"
    assert (world / "plan" / "plan.png").stat().st_size > 10_000
    assert "What the pilots cannot say" in (world / "plan" / "plan.md").read_text()
    assert main(arguments(world, "--budget", "1e-7")) == 0
    out = capsys.readouterr().out
    assert out.count("(found)") == 7
    assert "No setting keeps forgetting within 1e-07" in out
    assert "--max_ref_kl 1e-07" in out.strip().splitlines()[-1]


def test_held_out_rows_are_kept_apart_where_none_are_given(world, tmp_path):
    given = {"model": "M", "retention": ["wiki=wiki.txt"], "budget": 1.0, "output_dir": str(tmp_path)}
    rows = make_texts(40, seed=5, words=12)
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    config = PlanConfig(dataset_name=str(tmp_path / "many.jsonl"), **given)
    training, held_out = (
        {json.loads(line)["text"] for line in Path(path).read_text().splitlines()}
        for path in plan_verb.prepare_rows(config, tmp_path)
    )
    assert (len(training), len(held_out)) == (36, 4)
    assert training | held_out == set(rows)
    with pytest.raises(ValueError, match="dataset_name: 12 rows are too few to keep some apart; give --eval_dataset"):
        plan_verb.prepare_rows(PlanConfig(dataset_name=f"{world}/new.jsonl", **given), tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "0"], "budget: 0.0 does not fit; use a number of at least 1e-09"),
        ([], "budget: missing; give --budget"),
        (["--budget", "1", "--lora_ranks", "1", "2", "4"], "lora_ranks: [1, 2, 4] cannot tell what the rank does"),
        (["--budget", "1", "--replay_coefs", "1"], "replay_coefs: [1.0] has no 0"),
        (["--budget", "1", "--retention", "a=b"], "retention: no file 'b'; check the path"),
        (["--budget", "1", "--retention", f"a={__file__}"], "retention_name: choose one of wiki, a"),
        (["--budget", "1", "--retention_name", "b"], "retention_name: choose one of wiki"),
        (["--budget", "1", "--dataset_name", "no.jsonl"], "data: no file 'no.jsonl'; check the path"),
        (["--budget", "1", "--model", "./nothing"], "model: no folder or file"),
        (["--budget", "1", "--unknown", "1"], "--unknown: not known here"),
        (["--budget", "1", "--finetune_config", "no.yaml"], "finetune_config: no file 'no.yaml'; check the path"),
        (["--budget", "1", "--replay_dataset", "nofolder/"], "data: no file 'nofolder/'; check the path"),
        (["--budget", "1", "--replay_dataset", str(Path(__file__).parent)], "replay_dataset: "),
    ],
)
def test_bad_input_ends_in_one_line(world, capsys, more, message):
    capsys.readouterr()
    assert main(arguments(world, *more)) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"retain plan: {message}")
    assert told.count("\n") == 1
