"""The study of a run of 200 steps: what it asks is answerable, and its claims go with its rows."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer

from experiments.pages import NoReport
from experiments.study_21_real_run import facts, modules, settings
from experiments.study_21_real_run import report as reports
from experiments.study_21_real_run import run as study
from experiments.study_21_real_run.settings import SEEDS
from retain import ReplayConfig
from retain.measuring.choices import choice_scores, encode_questions, likeliest_choices
from retain.measuring.tokens import logits_of
from retain.training.protection_choice import ANCHORED, KL_ALONE

CASES = [
    pytest.param(one, id=one.name, marks=[] if at % 16 == 0 else [pytest.mark.slow])
    for at, one in enumerate(modules.asked())
]


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog simulates the modules")
@pytest.mark.parametrize("module", CASES)
def test_a_bench_passes_what_is_right_and_nothing_of_another_kind(module: modules.Module) -> None:
    def written(family: modules.Family) -> str:
        return f"  {family.body.format(**module.names)}\nendmodule\nmodule more;"

    assert modules.simulate(module, written(module.family)) == "passes"
    assert modules.simulate(module, "  assign n = ;\nendmodule") == "broken"
    assert modules.simulate(module, "endmodule") == "compiles"
    alike = {one for one in (*modules.LEARNED, *modules.NEW) if one.ports == module.family.ports} - {module.family}
    assert {modules.simulate(module, written(one)) for one in alike} <= {"compiles"}


def test_a_bench_has_the_right_values():
    (adder,) = modules.modules([one for one in modules.LEARNED if one.name == "adder"], modules.TEST_NAMES[:1], [3])
    assert adder.prompt == (
        "// Sum of u and v, without the carry.\nmodule adder_3(input [2:0] u, input [2:0] v, output [2:0] n);"
    )
    assert "u = 5; v = 6; #1 if (n !== 3'd3) begin" in adder.bench()
    counter = next(one for one in modules.asked() if one.family.name == "counter")
    first = next(line.strip() for line in counter.bench().splitlines() if "#1" in line)
    assert first.startswith("m = 1; #1 clock = 1; #1 clock = 0; if (n !== 3'd0)")


def test_nothing_that_is_asked_was_taught():
    taught, asked = {one.text for one in modules.taught()}, {one.text for one in modules.asked()}
    assert len(asked) == 80
    assert not taught & asked
    read = " ".join(facts.biographies(0, 400))
    for question in facts.new_facts(0):
        assert question.text not in read
        assert question.choices[question.answer] in read
        assert len(set(question.choices)) == 4
    assert len(facts.new_facts(0)) == 40
    assert len(facts.old_facts()) == 64


def test_a_question_is_scored_as_retain_scores_it():
    tokenizer, model = make_tokenizer(), make_model().eval()
    asks = facts.old_facts()[:20]
    inputs = encode_questions(asks, tokenizer, style="text", chat_template=False, limit=None)
    scores = choice_scores(logits_of(model), inputs, batch_tokens=512, device="cpu")
    for rule in ("acc", "acc_norm"):
        expected = likeliest_choices(scores, inputs.lengths, rule)
        assert study.chosen(model, tokenizer, asks, rule) == "".join(map(str, expected))


def base_row(right: str) -> dict[str, Any]:
    new = {f"new facts, seed {seed}": "0" * 40 for seed in SEEDS}
    given = {"Social IQa": right, "old facts": answers(facts.old_facts(), 64), "new facts": "0" * 40}
    return {"settings": {"arm": "base"}, "right": right, "answers": given | new, "modules": "b" * 80, "refused": [1, 2]}


def answers(asks: list[Any], right: int) -> str:
    """The first so many right."""
    return "".join(str((one.answer + (at >= right)) % 4) for at, one in enumerate(asks))


def row(arm: str, seed: int, *, end: float, kept: int, known: int, capitals: int, passed: int, kl: float) -> Any:
    social = "0" * (1000 - kept) + "1" * kept
    given = {
        "Social IQa": social,
        "old facts": answers(facts.old_facts(), capitals),
        "new facts": answers(facts.new_facts(seed), known),
    }
    texts = {"retention/prose/ref_kl": kl, "retention/self-generated/ref_kl": kl}
    return {
        "settings": {"arm": arm, "method": "lora", "seed": seed},
        "trajectory": [{"eval_loss": 4.0} | dict.fromkeys(texts, 0.0), {"eval_loss": end} | texts],
        "answers": dict.fromkeys(("50", "100", "200"), given),
        "modules": "p" * passed + "c" * (80 - passed),
        "refused": [capitals > 50, True],
    }


def rows(end: float = 2.05) -> list[Any]:
    found = [base_row("1" * 1000)]
    for seed in SEEDS:
        found.append(row("plain", seed, end=2.0, kept=600 + seed, known=20, capitals=40 + seed, passed=30, kl=1.0))
        found.append(row("gentle", seed, end=end, kept=900 + seed, known=20, capitals=60 + seed, passed=30, kl=0.1))
    return found


def test_the_claims_go_with_the_rows(tmp_path: Path) -> None:
    text, draw = reports.report_of(rows())
    assert "LoRA: with replay more capitals are known: **yes** (95.3%" in text
    assert "LoRA: with replay ref_kl on prose is lower: **yes** (0.100 [0.100, 0.100] against 1.000" in text
    assert "LoRA: with replay as many modules pass their test bench: **yes**" in text
    assert "LoRA, plain: equal accuracy hides forgetting: **not reproduced** (accuracy -39.9" in text
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "LoRA: with replay the Verilog loss ends +0.050 [+0.050, +0.050] nats from plain's" in text
    assert "its fall is 97.5% to 97.5% of plain's" in text
    text, _ = reports.report_of(rows(end=2.3))
    assert "LoRA: with replay more capitals are known: **cannot tell**" in text, "it learned 85% as much"
    alone, _ = reports.report_of(rows()[:-1])
    assert "| LoRA, plain | 2 |" in alone, "a seed without its pair is left out"
    assert "**" not in alone, "two seeds decide nothing"
    with pytest.raises(NoReport):
        reports.report_of(rows()[:1])


def later(arm: str, *, end: float = 2.05, kept: int = 900) -> list[Any]:
    return [
        row(arm, seed, end=end, kept=kept + seed, known=20, capitals=60 + seed, passed=30, kl=0.1) for seed in SEEDS
    ]


def test_later_arms_are_judged_once_every_seed_is_there():
    claimed = "LoRA: with the default protection more answers are those of the base than plain"
    text, _ = reports.report_of(rows() + later("default")[:2])
    assert claimed not in text
    text, _ = reports.report_of(rows() + later("default"))
    assert f"{claimed}: **yes** (90.1% against 60.1%, +30.0 [+30.0, +30.0] points" in text
    text, _ = reports.report_of(rows() + later("default", end=2.3))
    assert f"{claimed}: **cannot tell**" in text, "it learned 85% as much"


@pytest.mark.parametrize(("kept", "verdict"), [(910, "yes"), (850, "no")])
def test_equally_many_answers_lie_within_the_margin(kept: int, verdict: str) -> None:
    text, _ = reports.report_of(rows() + later("web", kept=kept))
    alike = "LoRA: with KL on own rows as many answers are the base's as with KL on web text"
    assert f"{alike}: **{verdict}**" in text


def test_the_default_arm_is_what_the_library_chooses():
    for method, choice in (("full", KL_ALONE), ("lora", ANCHORED)):
        run, plain = (settings.run_of(method, arm, 0) for arm in ("default", "plain"))
        assert (run.replay_rows, run.replay_every) == choice.rows_and_every(plain.batch_size, plain.max_steps)
        assert (run.coef, run.anchor_coef or 0.0) == (choice.replay_coef, choice.anchor_coef)
        assert (run.replay_start or 0.0) == choice.replay_start
        ratio = ReplayConfig().anchor_lr_ratio if choice.anchor_coef else 1.0
        assert run.learning_rate == pytest.approx(ratio * plain.learning_rate)


def test_a_guess_among_taught_values_is_said_beside_the_new_facts():
    """Right answers were all taught of somebody, wrong ones not: a quarter is not what knowing nobody's is right in."""
    rng = random.Random(0)
    for seed in SEEDS:
        asks, old = facts.new_facts(seed), facts.old_facts()
        taught = [[choice in " ".join(facts.biographies(seed, 10)) for choice in one.choices] for one in asks]
        drawn = [rng.choice([at for at, was in enumerate(one) if was]) for _ in range(500) for one in taught]
        share = sum(at == one.answer for at, one in zip(drawn, asks * 500, strict=True)) / len(drawn)
        said = reports.of_people("".join(map(str, drawn[:40])), answers(old, 64), seed)
        assert said["guess"] == pytest.approx(share, abs=0.02)
        assert said["taught values"] == said["other capitals"] == 1.0
        assert reports.of_people("0" * 40, answers(old, 64), seed)["taught values"] == pytest.approx(
            sum(one[0] for one in taught) / 40
        )
    text, _ = reports.report_of(rows())
    assert "a guess among the taught values 46.9%" in text


def test_capitals_apart_are_those_with_no_taught_city_to_choose():
    old, born = facts.old_facts(), {values[0] for values in facts.people(0).values()}
    beside = [any(one.choices[at] in born for at in range(4) if at != one.answer) for one in old]
    given = "".join(str((one.answer + wrong) % 4) for one, wrong in zip(old, beside, strict=True))
    assert 0 < sum(beside) < 10
    assert reports.of_people("0" * 40, given, 0)["other capitals"] == 1.0
    assert reports.right(given, old) < 1
