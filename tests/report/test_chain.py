"""A chain of finetunes: what each text lost since its loss was lowest, by numbers that are written down."""

from __future__ import annotations

import json
from typing import Any

import pytest

from retain.report.chain import ChainedText, chain_verdict, over_chain
from retain.report.page import Page
from retain.report.report import ForgettingReport, write_comparison

TOKENS = [100.0, 200.0, 100.0]
BASE = {"german": 4.0, "perl": 3.0, "prose": 2.0}
STAGES = {"one": {"german": 3.0, "perl": 3.2, "prose": 2.1}, "two": {"german": 3.4, "perl": 1.0, "prose": 2.3}}


def measured(value: float) -> dict[str, Any]:
    return {"value": value, "ci": [value, value], "num_documents": 3, "num_tokens": 400}


def stage(name: str, losses: dict[str, float], **changes: Any) -> dict[str, Any]:
    """A report in which all documents have the same loss per token."""
    texts = {
        text: {"loss": measured(loss), "base_loss": measured(BASE[text]), "forgetting": measured(loss - BASE[text])}
        for text, loss in losses.items()
    }
    sums = {
        text: {key: [each * size for size in TOKENS] for key, each in of.items()}
        for text, loss in losses.items()
        for of in [{"loss": loss, "base_loss": BASE[text], "ref_kl": 0.1, "num_tokens": 1.0}]
    }
    head = {"schema": "retain.report/1", "name": name, "base": {"fingerprint": "ab"}, "settings": {"max_length": 64}}
    return {**head, "retention": texts, "per_document": sums, **changes}


@pytest.fixture
def reports() -> list[ForgettingReport]:
    return [ForgettingReport(stage(name, losses)) for name, losses in STAGES.items()]


def chained(reports: list[ForgettingReport]) -> dict[str, ChainedText]:
    return {text.name: text for text in over_chain([report.results for report in reports])}


def test_what_is_lost_counts_from_the_lowest_loss(reports):
    found = chained(reports)
    assert list(found) == ["german", "prose", "perl"]  # what lost most first
    german, prose, perl = found.values()
    assert [change.value for change in german.changes] == pytest.approx([-1.0, -0.6])
    assert german.lowest == 1
    assert german.lost.value == pytest.approx(0.4)
    assert german.kept.value == pytest.approx(0.6)
    assert (prose.lowest, prose.kept) == (0, None)  # never learned: the base's is the lowest
    assert prose.lost.value == pytest.approx(0.3)
    assert (perl.lowest, perl.lost, perl.kept) == (2, None, None)


def test_differences_are_paired_over_documents(reports):
    for report in reports:  # documents differ much, and alike in both stages
        for sums in report.data["per_document"].values():
            for key in ("loss", "base_loss"):
                sums[key] = [value + extra for value, extra in zip(sums[key], (0.0, 300.0, 700.0), strict=True)]
    lost = chained(reports)["german"].lost
    assert lost.value == pytest.approx(0.4)
    assert lost.ci == pytest.approx((0.4, 0.4))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"base": {"fingerprint": "other"}}, "chain: the stages were measured against different bases"),
        ({"settings": {"max_length": 32}}, "chain: german of 'two' was measured with max_length 32, not 64"),
        ({"per_document": {}}, "chain: no text was measured on every stage"),
    ],
)
def test_stages_that_were_not_measured_alike_are_refused(reports, change, why):
    reports[1].data.update(change)
    with pytest.raises(ValueError, match=why):
        chained(reports)


def test_one_stage_is_no_chain(reports):
    with pytest.raises(ValueError, match="chain: true needs at least two stages"):
        chained(reports[:1])


def test_a_rise_within_chance_is_not_called_a_loss(reports):
    for text in ("german", "prose"):  # one document rises, one falls as much
        sums = reports[1].data["per_document"][text]
        sums["loss"] = [loss + extra for loss, extra in zip(sums["loss"], (400.0, 0.0, -400.0), strict=True)]
    runs = [report.results for report in reports]
    assert chain_verdict(runs, over_chain(runs)) == (
        "After 2 stages no text shows a loss: the intervals of the rise on german and prose include 0."
    )


def test_less_than_nothing_is_not_kept():
    """It said that -50.0% of what was learned is kept."""
    losses = {"one": {"german": 3.0}, "two": {"german": 4.5}}
    reports = [ForgettingReport(stage(name, of)).results for name, of in losses.items()]
    said = chain_verdict(reports, over_chain(reports))
    assert "(nothing of what was learned is kept, and the loss is above the base's)" in said
    assert "%" not in said


def test_the_page_draws_no_stage_against_its_own_task_and_base(reports):
    steps = [{"step": step, "eval_loss": 3.0 - step, "retention/german/ref_kl": 0.1 * step} for step in (0, 1)]
    for report in reports:
        report.data["trajectory"] = steps
    runs = [report.results for report in reports]
    assert "Over the steps" in Page(runs, "t").html()
    html = Page(runs, "t", chain=True).html()
    assert "Learning against forgetting" not in html
    assert "Over the steps" not in html


def test_the_pages_say_it_and_compare_no_rivals(reports, tmp_path):
    write_comparison(tmp_path, reports, "t", chain=True)
    said = "After 2 stages the loss is above its lowest by 0.400 [0.400, 0.400] nats per token on german "
    said += "(60.0% [60.0%, 60.0%] of what was learned is kept)"
    runs = [report.results for report in reports]
    summary = Page(runs, chain=True).summary()
    assert summary.startswith(said)
    html, markdown = Page(runs, "t", chain=True).html(), Page(runs, "t", chain=True).markdown()
    assert said in html
    assert "t, chain" not in html
    for text in (summary, html):
        assert "risen by 0.400 [0.400, 0.400] nats per token since; 60.0% [60.0%, 60.0%] of what was learned" in text
        assert "in the base, and has risen by 0.300" in text
    assert "risen by 0.400" in markdown
    assert "Loss against the base, after each stage" in html
    for text in (summary, html, markdown):
        assert "same new-task loss" not in text
    data = json.loads((tmp_path / "report.json").read_text())
    assert [text["name"] for text in data["chain"]] == ["german", "prose", "perl"]
    assert "comparison" not in data
    assert (tmp_path / "figure.png").stat().st_size > 5000
