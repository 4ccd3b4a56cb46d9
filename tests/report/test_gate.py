"""The gate: an interval decides, never a value alone; exit codes 0, 2, 3 and 1, and a last line that says why."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_texts, moved_model, save_model

from retain.cli.main import main
from retain.measuring.paired_answers import compare_answers
from retain.report.gate import BEYOND, UNDECIDED, WITHIN, Check, judge
from retain.report.numbers import Estimate
from retain.report.page import Page
from retain.report.report import ForgettingReport
from retain.report.results import Judgement
from retain.statistics import bootstrap_ratio


def text(value: float, low: float | None, high: float | None, agreement: float = 0.95, count: int = 40) -> dict:
    metric = {"num_documents": count, "num_tokens": 100 * count}
    return {
        "forgetting": {"value": value, "ci": [low, high], **metric},
        "ref_agreement": {"value": agreement, "ci": [agreement - 0.02, agreement + 0.02], **metric},
    }


def judged(texts: dict[str, dict], limit: float | None = 0.02, least: float | None = None, **more: Any) -> Judgement:
    report = ForgettingReport({"name": "x", "retention": texts, **more})
    return judge(report.results, max_forgetting=limit, min_agreement=least)


@pytest.mark.parametrize(
    ("measured", "code", "words"),
    [
        ((0.010, 0.005, 0.015), WITHIN, "the whole interval is within it"),
        ((-0.05, -0.06, -0.04), WITHIN, "[-0.060, -0.040]"),  # it got better, which is no forgetting
        ((0.010, 0.000, 0.020), WITHIN, "gate: within (exit code 0), decided by wiki, forgetting 0.010"),
        ((0.030, 0.025, 0.035), BEYOND, "the whole interval is beyond it"),
        ((0.010, 0.000, 0.021), UNDECIDED, "the interval does not decide; about "),
        ((0.030, 0.019, 0.040), UNDECIDED, "gate: not enough evidence (exit code 3)"),
        ((0.020, 0.010, 0.030), UNDECIDED, "so near the limit that more documents would hardly decide"),
        ((0.010, None, None), UNDECIDED, "(no interval)"),
    ],
)
def test_the_interval_decides(measured, code, words):
    found = judged({"wiki": text(*measured)})
    assert found.code == code
    assert words in found.verdict
    assert "against at most 0.02 nats per token" in found.verdict


def test_the_worst_text_decides():
    within, unsure, beyond = text(0.01, 0.0, 0.015), text(0.018, 0.01, 0.03), text(0.05, 0.04, 0.06)
    found = judged({"a": within, "b": text(0.012, 0.01, 0.015)})
    assert found.code == WITHIN
    assert "decided by b, " in found.verdict
    found = judged({"a": within, "b": unsure})
    assert found.code == UNDECIDED
    assert "decided by b, " in found.verdict
    found = judged({"a": within, "b": unsure, "c": beyond, "d": text(0.09, 0.08, 0.1)})
    assert found.code == BEYOND
    assert "decided by d, " in found.verdict
    assert found.verdict.endswith("(and 1 more check)")
    assert len(found.checks) == 4


def test_too_few_documents_decide_nothing():
    """A percentile interval over a handful of documents is far too narrow."""
    found = judged({"wiki": text(0.0, 0.0, 0.0, count=9)})
    assert found.code == UNDECIDED
    assert "at least 10 documents are needed for an interval that can decide, 9 were measured" in found.verdict
    lone = judged({"wiki": text(0.0, 0.0, 0.0, count=1)}).verdict
    assert "on 1 document, against" in lone
    assert lone.endswith("1 was measured")


@pytest.mark.parametrize(("value", "low", "high"), [(0.010, 0.000, 0.025), (0.030, 0.015, 0.045)])
def test_how_much_more_text_would_decide(value, low, high):
    """By hand: the side towards the budget is 0.015 wide and may be 0.010, so (1.5)² = 2.25 times as many."""
    check = Check("wiki", "forgetting", Estimate(value, (low, high), num_documents=40), 0.02)
    assert check.needed in (90, 91)
    assert f"about {check.needed} documents of this kind, {check.needed - 40} more, would decide" in check.advice


def test_so_much_text_does_decide():
    """The same documents so many times over: the value stays, and the interval no longer straddles the budget."""
    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(60):
        nats = rng.normal(0.012, 0.05, size=40)
        value, low, high = bootstrap_ratio(nats, np.ones(40), num_resamples=1000)
        entry = Estimate(value, (low, high), num_documents=40)
        check = Check("t", "forgetting", entry, 0.02)
        if check.code != UNDECIDED or check.needed is None or check.needed > 2000:
            continue
        tried += 1
        more = np.tile(nats, math.ceil(check.needed * 1.5 / 40))  # half more, for the chance in both resamplings
        value, low, high = bootstrap_ratio(more, np.ones(len(more)), num_resamples=1000)
        entry = Estimate(value, (low, high), num_documents=len(more))
        assert Check("t", "forgetting", entry, 0.02).code != UNDECIDED
        assert check.needed > 40
    assert tried > 10


def test_agreement_is_a_limit_of_its_own():
    found = judged({"wiki": text(0.01, 0.0, 0.015, agreement=0.95)}, least=0.9)
    assert found.code == WITHIN
    assert len(found.checks) == 2
    found = judged({"wiki": text(0.01, 0.0, 0.015, agreement=0.8)}, least=0.9)
    assert found.code == BEYOND
    assert "against at least 99.95%: " in judged({"wiki": text(0.0, 0.0, 0.0)}, None, 0.9995).verdict, "not 100.0%"
    assert "wiki, same top token 80.0% [78.0%, 82.0%] on 40 documents, against at least 90%" in found.verdict
    assert judged({"wiki": text(0.5, 0.4, 0.6, agreement=0.95)}, limit=None, least=0.9).code == WITHIN


def test_divergence_is_a_limit_of_its_own():
    """Of a text whose loss fell: forgetting is within its limit, ref_kl beyond it."""
    ref_kl = {"value": 0.3, "ci": [0.25, 0.35], "num_documents": 40}
    texts = {"wiki": text(-0.05, -0.06, -0.04) | {"ref_kl": ref_kl}}
    report = ForgettingReport({"name": "x", "retention": texts}).results
    assert judge(report, max_forgetting=0.02, max_ref_kl=0.4).code == WITHIN
    found = judge(report, max_forgetting=0.02, max_ref_kl=0.2)
    assert (found.code, found.max_ref_kl) == (BEYOND, 0.2)
    assert "wiki, ref_kl 0.300 [0.250, 0.350] on 40 documents, against at most 0.2 nats per token" in found.verdict


def test_answers_to_questions_are_held_to_it_too():
    def asked(same: int, total: int) -> dict:
        answers = [0] * total
        other = [0] * same + [1] * (total - same)
        rules = {"acc": compare_answers(answers, other, [True] * total, [answer == 0 for answer in other])}
        return {"arc": {"style": "letter", "chat_template": False, "num_questions": total, "notes": [], "rules": rules}}

    assert judged({}, None, 0.9, choices=asked(199, 200)).code == WITHIN
    found = judged({}, None, 0.9, choices=asked(120, 200))
    assert found.code == BEYOND
    assert "arc (acc), same answer 60.0% [" in found.verdict
    assert judged({}, None, 0.9, choices=asked(182, 200)).code == UNDECIDED
    assert judged({}, None, 0.9, choices=asked(20, 20)).code == UNDECIDED, "all alike, but few: Wilson's interval"


def test_the_report_shows_the_verdict_and_hostile_names_harm_nobody():
    data = {
        "schema": "retain.report/1",
        "name": "x",
        "base": {"model": "m"},
        "retention": {"</p><script>alert(1)</script>\x1b[31m\u202e": text(0.05, 0.04, 0.06)},
    }
    data["gate"] = asdict(judge(ForgettingReport(data).results, max_forgetting=0.02))
    run = ForgettingReport(data).results
    page = Page([run], "t").html()
    assert "gate: beyond (exit code 2)" in page
    assert '<p class="note gate-2">' in page
    assert "<script" not in page
    assert "> gate: beyond" in Page([run], "t").markdown()
    for shown in (page, Page([run], "t").markdown()):
        assert "\x1b" not in shown
        assert "\u202e" not in shown


# From the command line


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base, a copy of it, and a model that is a little way off; texts of twelve and of three documents."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("base", "copy", "off"):
        save_model(folder / name)
    moved_model().save_pretrained(folder / "off")
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(12, seed=3)))
    (folder / "few.txt").write_text("\n\n".join(make_texts(3, seed=3)))
    return folder


def gate(world: Path, out: Path, model: str, *arguments: str, texts: str = "wiki") -> int:
    given = ["--base", str(world / "base"), "--model", str(world / model), "--output_dir", str(out)]
    given += ["--retention", f"{texts}={world}/{texts}.txt", "--max_length", "24", "--max_new_tokens", "2"]
    return main(["measure", *given, "--num_resamples", "200", *arguments])


def test_exit_codes(world, tmp_path, capsys):
    def last() -> str:
        return capsys.readouterr().out.splitlines()[-1]

    assert gate(world, tmp_path / "0", "copy", "--max_forgetting", "0.02", "--min_agreement", "0.9") == 0
    assert last().startswith("gate: within (exit code 0), decided by wiki, forgetting 0.000 [0.000, 0.000] on 12 docu")
    assert gate(world, tmp_path / "2", "off", "--max_forgetting", "0.02") == 2
    assert last().startswith("gate: beyond (exit code 2), decided by wiki, forgetting ")
    data = json.loads((tmp_path / "2" / "report.json").read_text())
    assert (data["gate"]["code"], data["gate"]["max_forgetting"], data["gate"]["min_agreement"]) == (2, 0.02, None)
    assert "gate: beyond" in (tmp_path / "2" / "report.html").read_text()
    assert ForgettingReport(data).summary()
    forgetting = data["retention"]["wiki"]["forgetting"]["value"]
    assert gate(world, tmp_path / "3", "off", "--max_forgetting", str(forgetting * 1.001)) == 3
    assert "not enough evidence (exit code 3)" in last()
    assert gate(world, tmp_path / "few", "copy", "--max_forgetting", "0.02", texts="few") == 3
    assert "3 were measured" in last()
    assert gate(world, tmp_path / "none", "off") == 0
    assert "gate" not in json.loads((tmp_path / "none" / "report.json").read_text())


def test_the_gate_of_paired_files(tmp_path, capsys):
    def lines(answers: list[str]) -> str:
        rows = ({"doc_id": at, "target": "a", "filtered_resps": [answer], "exact_match": float(answer == "a")}
                for at, answer in enumerate(answers))  # fmt: skip
        return "".join(json.dumps(row) + "\n" for row in rows)

    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    Path(files[0]).write_text(lines(["a"] * 100))
    for changed, code in ((0, 0), (8, 3), (40, 2)):
        Path(files[1]).write_text(lines(["b"] * changed + ["a"] * (100 - changed)))
        arguments = ["--pair", *files, "--min_agreement", "0.9", "--output_dir", str(tmp_path / "out")]
        assert main(["measure", *arguments]) == code
        assert f"b (exact_match), same answer {100 - changed}.0%" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max_forgetting", "-1"], "max_forgetting: -1.0 does not fit; use a number of at least 0"),
        (["--max_forgetting", "nan"], "max_forgetting: nan does not fit; use a number of at least 0"),
        (["--min_agreement", "90"], "min_agreement: 90.0 does not fit; use a number from 0 to 1"),
    ],
)
def test_limits_that_do_not_fit_are_errors(arguments, expected, world, tmp_path, capsys):
    assert gate(world, tmp_path / "out", "copy", *arguments) == 1
    assert capsys.readouterr().err == f"retain measure: {expected}\n"


def test_a_budget_needs_a_text(tmp_path, capsys):
    (tmp_path / "a.jsonl").touch()
    arguments = ["--pair", str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main(["measure", *arguments, "--max_forgetting", "0.02"]) == 1
    assert "max_forgetting: 0.02 needs texts to judge; give --retention" in capsys.readouterr().err
