"""The report: hostile strings stay harmless, comparisons agree with numbers worked out by hand, files are whole."""

from __future__ import annotations

import html.parser
import json
import math
import re
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from retain import files
from retain.cli.main import main
from retain.files import visible, visible_text
from retain.measuring.paired_answers import compare_answers, share_entry
from retain.report import page, style, tables
from retain.report.comparison import Comparison, compare_at_matched_loss, dominators, first_crossing, frontier
from retain.report.figures import Panel, PlotLine, learned_and_forgotten, panels
from retain.report.model_card import card_with_forgetting
from retain.report.numbers import Cell, cell
from retain.report.page import differences, worst_documents
from retain.report.report import ForgettingReport, write_comparison
from retain.report.results import RunResults
from retain.report.sentences import budget_sentence, comparison_verdict, frontier_sentences, opening, text_verdict
from retain.training.run_files import RunFilesCallback, read_run

TOKENS = [100, 200, 100, 200]


def measured(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "ci": [low, high], "num_documents": 4, "num_tokens": 600}


def run(name: str, losses: list[float], kls: list[float], weights: tuple[float, ...] = (1, 1, 1, 1)) -> dict[str, Any]:
    """Evaluations at steps 0, 10, 20 ...; document d has `weights[d]` times the mean divergence per token."""
    tokens, share = np.array(TOKENS), np.array(weights) / np.average(weights, weights=TOKENS)
    trajectory: list[dict[str, Any]] = [{"step": 5, "loss": 3.0, "replay/kl": 0.01, "replay/coef": 1.0}]
    documents = []
    for step, (loss, kl) in enumerate(zip(losses, kls, strict=True)):
        keys = {"retention/wiki/ref_kl": kl, "retention/wiki/forgetting": kl / 2, "retention/wiki/loss": 3 + kl / 2}
        trajectory.append({"step": 10 * step, "eval_loss": loss, **keys})
        sums = kl * share * tokens
        row = {"ref_kl": sums, "loss": 3 * tokens + sums / 2, "base_loss": 3 * tokens, "num_tokens": tokens}
        documents.append({"step": 10 * step, "name": "wiki", **{key: value.tolist() for key, value in row.items()}})
    return {
        "schema": "retain.report/1",
        "name": name,
        "base": {"model": "tiny", "fingerprint": "ab12", "num_params": 1000},
        "tuned": {"model": f"out/{name}", "fingerprint": name, "num_params": 1000},
        "settings": {"max_length": 64, "seed": 0},
        "versions": {"retain": "0.1.0"},
        "created": "2026-11-21T10:00:00Z",
        "retention": {
            "wiki": {
                "base_loss": measured(3.0, 2.9, 3.1),
                "loss": measured(3.061, 2.95, 3.15),
                "forgetting": measured(0.061, 0.052, 0.073),
                "ref_kl": measured(0.123, 0.101, 0.147),
                "ref_agreement": measured(0.913, 0.884, 0.937),
            }
        },
        "new_task": {"verilog": {"loss": measured(2.777, 2.7, 2.8), "gain": measured(0.743, 0.711, 0.789)}},
        "noise_floor": {"wiki": {"ref_kl": measured(0.0, 0.0, 0.0), "forgetting": measured(0.0, 0.0, 0.0)}},
        "generations": [{"prompt": "Say hi", "base": "Hello there, friend.", "tuned": "Hello there, module."}],
        "training": {"replay_coef": 10},
        "trajectory": trajectory,
        "documents": documents,
    }


def typed(runs: list[dict]) -> list[RunResults]:
    return [ForgettingReport(run).results for run in runs]


def compare(runs: list[dict]) -> Comparison:
    return compare_at_matched_loss(typed(runs))


def panels_of(runs: list[dict]) -> list[Panel]:
    return panels(typed(runs), compare(runs) if len(runs) > 1 else None)


def html_of(runs: list[dict], **options: Any) -> str:
    return page.Page(typed(runs), **{"title": "t"} | options).html()


def markdown_of(runs: list[dict], **options: Any) -> str:
    return page.Page(typed(runs), **{"title": "t"} | options).markdown()


def summary_of(runs: list[dict]) -> str:
    return page.Page(typed(runs)).summary()


def card_of(run: dict) -> str:
    return page.Page([ForgettingReport(run).results], "Forgetting").model_card()


def parsed_card(run: dict) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(card_with_forgetting("", ForgettingReport(run).results))


def verdict_of(run: dict) -> str:
    return text_verdict(ForgettingReport(run).results)


def budget_of(run: dict, first: dict | None = None) -> str:
    return budget_sentence(ForgettingReport(run).results, ForgettingReport(first).results if first else None)


def followed(of: dict) -> dict[str, Any]:
    """The same run with nothing but its trajectory."""
    return of | {"retention": {}, "new_task": {}}


@pytest.fixture
def plain() -> dict[str, Any]:
    return run("plain", [4.0, 3.0, 2.0], [0.0, 0.2, 0.6])


@pytest.fixture
def replay() -> dict[str, Any]:
    return run("replay", [4.0, 3.5, 2.5], [0.0, 0.02, 0.04])


def test_sums_of_fewer_documents_are_a_damaged_file(plain: dict, tmp_path: Path) -> None:
    """It was an AssertionError where two runs are compared."""
    sums = {"ref_kl": [0.1], "loss": [1.0, 2.0], "base_loss": [1.0, 2.0], "num_tokens": [1, 2]}
    for name, part in (("per_document", {"wiki": sums}), ("documents", [sums | {"step": 0, "name": "wiki"}])):
        (tmp_path / "report.json").write_text(json.dumps(plain | {name: part}))
        with pytest.raises(ValueError, match="^runs: .* is damaged: its columns differ in their number of documents"):
            ForgettingReport.from_json(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (
            ("retention", "wiki", "ref_kl", "ci"),
            [0.7, 0.5],
            r"'retention.wiki.ref_kl' is 0.123, outside its interval \[",
        ),
        (
            ("retention", "wiki", "ref_kl", "ci"),
            [0.2, 0.3],
            r"'retention.wiki.ref_kl' is 0.123, outside its interval \[",
        ),
        (
            ("noise_floor", "wiki"),
            {"ref_kl": {"value": 1, "ci": [0, 0.5]}},
            "'noise_floor.wiki.ref_kl' is 1, outside its",
        ),
        (
            ("retention", "wiki", "ref_kl", "num_documents"),
            -3,
            "'retention.wiki.ref_kl.num_documents' is -3, a negative",
        ),
        (
            ("choices", "arc"),
            {"num_questions": 2, "style": "letters", "notes": [], "rules": {"acc": {"counts": {"lost": -1}}}},
            "'choices.arc.rules.acc.counts.lost' is -1, a negative number",
        ),
        (
            ("per_document", "wiki"),
            {"ref_kl": [0.1], "loss": [1.0], "base_loss": [1.0], "num_tokens": [-1]},
            "'per_document.wiki.num_tokens.0' is -1, a negative number",
        ),
    ],
)
def test_what_no_measurement_gives_is_a_damaged_file(
    plain: dict, tmp_path: Path, place: tuple[str, ...], value: Any, error: str
) -> None:
    """An interval whose ends were swapped by hand was shown as it is."""
    changed = json.loads(json.dumps(plain))
    part = changed
    for name in place[:-1]:
        part = part.setdefault(name, {})
    part[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(plain))
    ForgettingReport.from_json(tmp_path / "report.json")
    (tmp_path / "report.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"^runs: .* is damaged: {error}"):
        ForgettingReport.from_json(tmp_path / "report.json")


def test_a_text_may_be_called_as_a_count_is(plain: dict, tmp_path: Path) -> None:
    changed = json.loads(json.dumps(plain))
    (first, *_) = changed["retention"]
    text = changed["retention"]["num_facts"] = changed["retention"].pop(first)
    text["forgetting"] = {"value": -0.2, "ci": [-0.3, -0.1]}
    (tmp_path / "report.json").write_text(json.dumps(changed))
    report = ForgettingReport.from_json(tmp_path / "report.json")
    assert report.results.retention["num_facts"].estimates["forgetting"].value == -0.2


def test_a_folder_with_report_json_holds_the_whole_report(plain: dict, tmp_path: Path, monkeypatch: Any) -> None:
    """A run that resumes takes an unprotected run with one as done: after a full disk its page was never written."""
    from retain.report import report as module

    write = module.write_text
    for name in ("report.md", "report.html", "report.json"):

        def fails(path: Path, text: str, name: str = name) -> None:
            if path.name == name:
                raise OSError(28, "No space left on device", str(path))
            write(path, text)

        monkeypatch.setattr(module, "write_text", fails)
        with pytest.raises(OSError, match="No space left"):
            ForgettingReport(plain).write(tmp_path)
        assert not (tmp_path / "report.json").exists(), name
    monkeypatch.setattr(module, "write_text", write)
    ForgettingReport(plain).write(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


# --- comparison at matched new-task loss -----------------------------------------------------------------------


def test_matched_loss_by_hand(plain: dict, replay: dict) -> None:
    """`replay` gets to 2.5 only; `plain` crosses 2.5 halfway between steps 10 and 20, at ref_kl (.2 + .6) / 2."""
    compared = compare([plain, replay])
    assert compared.matched_loss == 2.5
    assert [entry.matched_step for entry in compared.runs] == [15.0, 20.0]
    first, second = compared.matched["wiki"]
    assert first.ref_kl == pytest.approx(0.4)
    assert first.forgetting == pytest.approx(0.2)
    assert (first.prevented, first.note) == (None, None)
    assert second.ref_kl == pytest.approx(0.04)
    assert second.prevented == pytest.approx(0.9)
    compared = compare([followed(plain), followed(replay)])
    end = compared.end["wiki"]
    assert [entry.ref_kl for entry in end] == pytest.approx([0.6, 0.04])
    assert end[1].prevented == pytest.approx(1 - 0.04 / 0.6)
    assert compared.runs[1].relative_loss_difference == pytest.approx(2.5 / 2.0 - 1)


def test_paired_interval_has_no_width_where_every_document_agrees(plain: dict, replay: dict) -> None:
    """Documents differ among themselves, but each loses nine tenths: resampling them cannot change the share."""
    weights = (1.0, 5.0, 2.0, 9.0)
    runs = [run("plain", [4, 3, 2], [0, 0.2, 0.6], weights), run("replay", [4, 3.5, 2.5], [0, 0.02, 0.04], weights)]
    first, second = compare(runs).matched["wiki"]
    assert second.prevented_ci == pytest.approx([0.9, 0.9])
    assert first.ref_kl_ci[0] < 0.39 < 0.41 < first.ref_kl_ci[1]


@pytest.mark.parametrize("loss", [1.9, 2.1, 2.3, 2.7, 2.9, 3.1])
def test_rounding_of_the_place_between_two_evaluations_costs_no_interval(loss: float) -> None:
    runs = [run("plain", [4.0, 3.3, 1.7], [0.0, 0.2, 0.6]), run("replay", [4.0, 3.7, loss], [0.0, 0.02, 0.04])]
    assert compare(runs).matched["wiki"][1].prevented_ci is not None


def test_interval_is_seeded_contains_the_value_and_keeps_to_what_a_share_can_be(plain: dict) -> None:
    other = run("replay", [4.0, 3.5, 2.5], [0.0, 0.02, 0.04], (1.0, 2.0, 3.0, 4.0))
    entry = compare([plain, other]).matched["wiki"][1]
    low, high = entry.prevented_ci
    assert low < entry.prevented < high
    shares = np.array([1.0, 2.0, 3.0, 4.0]) / np.average([1, 2, 3, 4], weights=TOKENS) * 0.1
    assert low < 1 - shares.max() < 1 - shares.min() < high <= 1  # four documents are no bound for those to come
    assert compare([plain, other]).matched["wiki"][1].prevented_ci == [low, high]


def test_crossing() -> None:
    assert first_crossing([0, 10], [4.0, 2.0], 3.5) == 2.5
    assert first_crossing([0, 10, 20, 30], [4, 2, 4, 2], 3) == 5.0, "the first of several crossings"
    assert first_crossing([0, 10], [4.0, 3.0], 2.0) is None, "never came down"
    assert first_crossing([10, 20], [2.0, 1.0], 3.0) is None, "nobody saw it come down"
    assert first_crossing([0, 10], [4.0, 3.0], 4.0) == 0.0
    assert first_crossing([], [], 4.0) is None


def test_without_trajectory_only_the_ends_are_compared_and_it_says_so(plain: dict, replay: dict) -> None:
    replay["trajectory"] = []
    compared = compare([plain, replay])
    assert compared.matched_loss is None
    assert compared.matched == {}
    assert "replay" in compared.reason
    assert compared.end["wiki"][1].ref_kl == 0.123, "falls back to what `retain measure` found"
    assert compared.end["wiki"][1].ref_kl_ci == [0.101, 0.147]
    assert compared.runs[1].final_loss == 2.777
    assert "No comparison at the same new-task loss" in summary_of([plain, replay])
    assert "No comparison at the same new-task loss" in html_of([plain, replay])


@pytest.mark.parametrize(
    ("losses", "why"),
    [([4.0, 4.2, 4.1], "other did not learn"), ([1.9, 1.8, 1.7], "other was already below the common loss 2.000")],
)
def test_no_matched_loss_where_a_run_gives_none(plain: dict, losses: list[float], why: str) -> None:
    compared = compare([followed(plain), followed(run("other", losses, [0.0, 0.1, 0.2]))])
    assert compared.matched_loss is None
    assert compared.matched == {}
    assert why in compared.reason
    assert compared.end["wiki"][1].prevented == pytest.approx(1 - 0.2 / 0.6)


def test_prevented_is_undefined_where_the_plain_run_did_not_move(replay: dict) -> None:
    still = run("plain", [4.0, 3.0, 2.0], [0.0, 0.0, 0.0])
    entry = compare([still, replay]).matched["wiki"][1]
    assert (entry.prevented, entry.prevented_ci) == (None, None)
    assert "noise floor" in entry.note
    assert "cannot be judged on wiki" in summary_of([still, replay])


def test_prevented_is_undefined_below_a_measured_noise_floor(plain: dict, replay: dict) -> None:
    plain["noise_floor"]["wiki"]["ref_kl"] = measured(0.4, 0.3, 0.5)
    assert compare([plain, replay]).matched["wiki"][1].prevented is None


@pytest.mark.parametrize("changed", [{"num_tokens": [50, 250, 100, 200]}, {"base_loss": [300, 540, 360, 600]}])
def test_nothing_is_prevented_on_other_documents(plain: dict, replay: dict, changed: dict) -> None:
    """Told by their lengths and, where they are all as long, by the base's own loss on each."""
    for row in replay["documents"]:
        row |= changed
    entry = compare([plain, replay]).matched["wiki"][1]
    assert (entry.prevented, entry.prevented_ci) == (None, None)
    assert entry.note == "not compared with “plain”: measured on other documents"
    assert frontier_sentences(compare([followed(plain), followed(replay)])) == []


def test_no_interval_without_values_per_document(plain: dict, replay: dict) -> None:
    replay["documents"] = []
    entry = compare([plain, replay]).matched["wiki"][1]
    assert (entry.prevented_ci, entry.ref_kl_ci) == (None, None)
    assert "no values per document" in entry.note


def summed(ref_kl: list[float], tokens: list[int]) -> dict[str, list[float]]:
    losses = [3 * n for n in tokens]
    return {"ref_kl": ref_kl, "loss": losses, "base_loss": losses, "num_tokens": tokens}


def at_its_end(of: dict, kl: float, loss: float, sums: list[float]) -> dict:
    """The same run as `retain measure` alone leaves it: end values and sums per document, no trajectory."""
    of = {key: value for key, value in of.items() if key not in ("trajectory", "documents")}
    of["retention"] = {"wiki": of["retention"]["wiki"] | {"ref_kl": {"value": kl, "ci": [None, None]}}}
    of["new_task"] = {"verilog": {"loss": measured(loss, loss, loss)}}
    return of | {"per_document": {"wiki": summed(sums, TOKENS)}}


def test_ends_without_trajectory_are_compared_document_by_document(plain: dict, replay: dict) -> None:
    """Each document of `replay` moved by a tenth of what it did in `plain`: the paired interval has no width."""
    sums = [10.0, 30.0, 5.0, 60.0]
    runs = [at_its_end(plain, 0.175, 2.0, sums), at_its_end(replay, 0.0175, 2.5, [x / 10 for x in sums])]
    first, second = compare(runs).end["wiki"]
    assert second.prevented == pytest.approx(0.9)
    assert second.prevented_ci == pytest.approx([0.9, 0.9])
    assert first.ref_kl_ci[0] < 0.175 < first.ref_kl_ci[1], "from the documents, where the report gives none"
    assert (first.num_documents, first.forgetting_ci) == (4, [0.052, 0.073])
    del runs[1]["per_document"]
    entry = compare(runs).end["wiki"][1]
    assert (entry.prevented_ci, entry.note) == (None, "no interval: no values per document")


# --- what is not alike -----------------------------------------------------------------------------------------


def shown_in(runs: list[dict]) -> list[str]:
    return [summary_of(runs), html_of(runs), markdown_of(runs)]


def ended(of: dict, kl: float, loss: float, **settings: Any) -> dict:
    return at_its_end(of, kl, loss, [kl * n for n in TOKENS]) | {"settings": of["settings"] | settings}


@pytest.mark.parametrize(
    ("setting", "other", "told"),
    [
        ("max_length", 8, "max_length 8, not 64"),
        ("max_windows", 1, "max_windows 1, not None"),
        ("dtype", "bfloat16", "dtype bfloat16, not float32"),
        ("start_token", "'<b>' (id 1): given as start_token", "start_token '<b>' (id 1), not '<s>' (id 3)"),
        ("attn_implementation", "eager", "attn_implementation eager, not sdpa"),
    ],
)
def test_other_settings_are_said_and_not_compared(
    plain: dict, replay: dict, setting: str, other: Any, told: str
) -> None:
    settings = {"max_windows": None, "dtype": "float32", "start_token": "'<s>' (id 3): the tokenizer's bos_token"}
    settings |= {"attn_implementation": "sdpa"}
    first = ended(plain, 0.6, 2.0, **settings)
    runs = [first, ended(replay, 0.1, 2.0, **settings), ended(run("odd", [4], [0]), 0.01, 1.9, **settings)]
    runs[2]["settings"][setting] = other
    compared = compare(runs)
    _, alike, odd = compared.end["wiki"]
    assert alike.prevented == pytest.approx(1 - 0.1 / 0.6)
    assert (odd.ref_kl, odd.prevented, odd.prevented_ci) == (0.01, None, None)
    assert [entry.relative_loss_difference for entry in compared.runs] == [None, 0.0, None]
    sentences = ["On the frontier of new-task loss against ref_kl: “replay”.", "Dominated: “plain” by “replay”."]
    assert frontier_sentences(compared) == sentences, "the other run is no point among them"
    for shown in (html.unescape(text).replace("\\", "") for text in shown_in(runs)):
        assert f"“odd” is not compared with “plain” on verilog and wiki: measured with {told}" in shown
        assert (
            "“odd” moved away from the base by an amount that cannot be judged on wiki (measured differently)" in shown
        )
        assert "wiki: the column base is from “plain”; measured differently: “odd”" in shown
        assert "98%" not in shown


def test_losses_over_other_tokens_are_on_no_common_axis(plain: dict, replay: dict) -> None:
    """A run trained on completions and one trained on all tokens: neither their measured nor their evaluated losses."""
    runs = [
        one | {"settings": {"loss_tokens": {"verilog": tokens, "wiki": "all"}}, "training": {"loss_tokens": tokens}}
        for one, tokens in ((plain, "completions"), (replay, "all"))
    ]
    compared = compare(runs)
    assert compared.runs[1].relative_loss_difference is None
    assert (compared.matched_loss, compared.matched) == (None, {})
    assert compared.end["wiki"][1].unlike is None, "the retention text counts the same tokens in both"
    assert frontier_sentences(compared) == []
    figures = panels_of(runs)
    assert [figure.kind for figure in figures if len(figure.lines) > 1 and "loss" in figure.title] == []
    titles = {figure.title: [line.name for line in figure.lines] for figure in figures}
    assert titles["New-task loss (completions)"] == ["plain"]
    assert titles["New-task loss (all)"] == ["replay"]
    for shown in (html.unescape(text).replace("\\", "") for text in shown_in(runs)):
        assert "“replay” is not compared with “plain” on verilog: measured on all, not on completions" in shown
        assert "replay: its loss counts all, not completions as plain's does" in shown
    trained = [followed(one) for one in runs]
    (alone,) = [figure for figure in panels_of(trained) if figure.kind == "frontier"]
    assert [line.name for line in alone.lines] == ["plain"]
    told = "not compared with “plain” on the new-task loss (eval_loss): its loss counts all, not completions"
    assert all(told in html.unescape(text).replace("\\", "") for text in shown_in(trained))
    old = [one | {"settings": {}, "training": {}} for one in runs]
    assert compare(old).matched_loss is not None, "older reports do not say"


def test_settings_that_move_no_number_or_that_an_old_report_lacks_are_alike(plain: dict, replay: dict) -> None:
    first = ended(plain, 0.6, 2.0, start_token="'<s>' (id 3): the tokenizer's bos_token", seed=0, batch_tokens=2048)
    second = ended(replay, 0.1, 2.0, start_token="'<s>' (id 3): given as start_token", seed=1, batch_tokens=64)
    for runs in ([first, second], [first | {"settings": {}}, second]):
        assert compare(runs).end["wiki"][1].prevented == pytest.approx(1 - 0.1 / 0.6)
        assert not any("not compared" in shown for shown in shown_in(runs))


def test_other_documents_under_one_name_are_said_and_not_compared(plain: dict, replay: dict) -> None:
    sized = {"num_documents": 9, "num_tokens": 700}
    told = "“replay” is not compared with “plain” on wiki: measured on other documents"
    for by_sums in (True, False):
        runs = [ended(plain, 0.6, 2.0), ended(replay, 0.1, 2.5)]
        if by_sums:
            runs[1]["per_document"]["wiki"]["base_loss"] = [400, 500, 350, 650]
        else:
            runs = [{key: value for key, value in one.items() if key != "per_document"} for one in runs]
            runs[1]["retention"]["wiki"]["loss"] |= sized
        compared = compare(runs)
        assert compared.end["wiki"][1].prevented is None
        assert compared.runs[1].relative_loss_difference == 0.25, "the new task is the same one"
        assert frontier_sentences(compared) == []
        assert all(
            told + ((by_sums and ".") or " (9 documents, 700 tokens; not 4 documents, 600 tokens).") in shown
            for shown in shown_in(runs)
        )


def test_rounding_of_the_base_does_not_make_other_documents(plain: dict, replay: dict) -> None:
    runs = [ended(plain, 0.6, 2.0), ended(replay, 0.1, 2.5)]
    runs[1]["per_document"]["wiki"]["base_loss"] = [3 * n + 0.1 * n**0.5 for n in TOKENS]
    assert compare(runs).end["wiki"][1].prevented == pytest.approx(1 - 0.1 / 0.6)


def test_a_text_that_the_first_run_lacks_is_held_against_the_next(plain: dict, replay: dict) -> None:
    odd = ended(run("odd", [4], [0]), 0.01, 1.9, max_length=8)
    runs = [ended(plain, 0.6, 2.0) | {"retention": {}}, ended(replay, 0.1, 2.5), odd]
    entries = compare(runs).end["wiki"]
    assert entries[2].note == "not compared with “replay”: measured with max_length 8, not 64"


def test_a_price_is_told_for_like_with_like_only(plain: dict, replay: dict) -> None:
    kept = ended(replay, 0.1, 2.5) | {"training": {"budget": "budget 0.02 kept"}}
    assert "more than “plain”" in budget_of(kept, ended(plain, 0.6, 2.0))
    assert budget_of(kept, ended(plain, 0.6, 2.0, max_length=8)) == "budget 0.02 kept."


# --- the end is the saved model --------------------------------------------------------------------------------


def overfitted(name: str, kls: list[float], losses: list[float], kept: int) -> dict:
    """A run whose last weights are not those that it left: `load_best_model_at_end` took those of step `kept`."""
    return run(name, losses, kls) | {"training": {"kept_step": kept}}


def test_the_end_is_the_step_that_was_kept() -> None:
    """By the last evaluations `kl` would dominate; of the models that were saved neither does."""
    runs = [overfitted("plain", [0, 0.4, 0.8], [4, 2, 4.5], 10), overfitted("kl", [0, 0.2, 0.1], [4, 3, 4.4], 10)]
    runs = [followed(one) for one in runs]
    compared = compare(runs)
    assert [(entry.final_step, entry.final_loss) for entry in compared.runs] == [(10, 2), (10, 3)]
    assert [entry.ref_kl for entry in compared.end["wiki"]] == pytest.approx([0.4, 0.2])
    assert compared.end["wiki"][1].prevented_ci == pytest.approx([0.5, 0.5])
    assert frontier_sentences(compared)[1] == "No run dominates another."
    panel = next(panel for panel in panels_of(runs) if panel.kind == "frontier")
    assert [(line.x[-1], line.end) for line in panel.lines] == [(2, 10), (3, 10)], "as far as the model"
    assert panel.ends == [(3, pytest.approx(0.2)), (2, pytest.approx(0.4))]
    for shown in shown_in(runs)[1:]:
        assert (
            "during training, at step 10 of “plain” and step 10 of “kl”: the new-task loss (eval_loss) and wiki."
            in shown
        )
        assert "load_best_model_at_end kept step 10 of “plain” and step 10 of “kl”." in shown


def test_the_end_is_what_was_measured_of_the_saved_model() -> None:
    runs = [overfitted("plain", [0, 0.4, 0.8], [4, 2, 4.5], 10), overfitted("kl", [0, 0.2, 0.1], [4, 3, 4.4], 10)]
    for one, kl, loss in zip(runs, (0.41, 0.21), (2.1, 3.1), strict=True):
        one |= {key: ended(one, kl, loss)[key] for key in ("retention", "new_task", "per_document")}
    compared = compare(runs)
    assert [entry.final_loss for entry in compared.runs] == [2.1, 3.1]
    assert [entry.ref_kl for entry in compared.end["wiki"]] == [0.41, 0.21]
    assert frontier_sentences(compared)[1] == "No run dominates another."
    page = html_of(runs)
    assert page.index("load_best_model_at_end kept") < page.index("The same at the end of each run"), "in plain sight"
    for shown in shown_in(runs)[1:]:
        assert "Measured on the saved models: the new-task loss (verilog) and wiki." in shown
        assert "load_best_model_at_end kept step 10 of “plain” and step 10 of “kl”." in shown


def test_a_run_tells_which_step_it_kept(tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, save_steps=8,
        use_cpu=True, report_to=[],
    )  # fmt: skip
    state, control, callback = TrainerState(is_world_process_zero=True), TrainerControl(), RunFilesCallback({})
    callback.on_train_begin(args, state, control)
    for step, loss in ((8, 2.0), (12, 1.9), (16, 3.0)):
        state.global_step = step
        callback.on_log(args, state, control, {"eval_loss": loss})
    state.best_global_step = 12  # was never saved, so step 8 was the best to go back to
    state.best_model_checkpoint = str(tmp_path / "checkpoint-8")
    callback.on_train_end(args, state, control)
    callback.on_log(args, state, control, {"eval_loss": 2.01})  # `trainer.evaluate()` of what was restored
    found = read_run(tmp_path)
    assert found["training"]["kept_step"] == 8
    losses = {row["step"]: row["eval_loss"] for row in found["trajectory"]}
    assert losses == {8: 2.01, 12: 1.9, 16: 3.0}


def test_a_run_that_restored_nothing_kept_its_last_step(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    state, control, callback = TrainerState(is_world_process_zero=True), TrainerControl(), RunFilesCallback({})
    callback.on_train_begin(args, state, control)
    state.global_step = 16
    state.best_global_step, state.best_model_checkpoint = 8, str(tmp_path / "checkpoint-8")
    callback.on_train_end(args, state, control)
    assert "kept_step" not in read_run(tmp_path)["training"]


# --- one new-task loss for all ---------------------------------------------------------------------------------


def test_a_model_beside_itself_is_no_better_and_no_worse(plain: dict) -> None:
    """With its trajectory and without: one loss for both, so neither has learned less."""
    twin = {**plain, "name": "twin", "trajectory": [], "documents": []}
    compared = compare([plain, twin])
    assert [entry.final_loss for entry in compared.runs] == [2.777, 2.777]
    assert compared.runs[1].relative_loss_difference == 0.0
    assert frontier_sentences(compared)[1] == "No run dominates another."
    panel = next(panel for panel in panels_of([plain, twin]) if panel.kind == "frontier")
    assert [(line.x, line.y) for line in panel.lines] == [([2.777], [0.123])] * 2, "one loss on one axis"


def test_without_a_loss_in_common_there_is_no_frontier(plain: dict) -> None:
    twin = {**plain, "name": "twin", "trajectory": [], "documents": []}
    other = {"other": twin["new_task"]["verilog"]}
    compared = compare([plain, twin | {"new_task": other}])
    assert [entry.final_loss for entry in compared.runs] == [None, None]
    assert frontier_sentences(compared) == []
    page = markdown_of([plain, twin | {"new_task": other}])
    assert "The runs have no new-task loss in common" in page
    both = compare([plain, {**plain, "name": "twin", "new_task": other}])
    assert [entry.final_loss for entry in both.runs] == [2.0, 2.0], "eval_loss, which both have"


# --- the frontier ----------------------------------------------------------------------------------------------


def test_who_dominates_whom() -> None:
    points = [(2.0, 0.6), (2.5, 0.04), (2.6, 0.05), None, (2.0, 0.6), (2.5, 0.03), (1.0, 0.6)]
    assert dominators(points) == [[6], [5], [1, 5], [], [6], [], []]
    assert frontier(points) == [5, 6], "the one that learned least first"
    assert frontier([(2.0, 0.6), (2.0, 0.6)]) == [0, 1], "twins do not dominate each other"
    assert frontier([None, None]) == []


def test_the_frontier_is_named_and_drawn_with_and_without_trajectories(plain: dict, replay: dict) -> None:
    worse = run("worse", [4.0, 3.5, 2.6], [0.0, 0.1, 0.3])
    ends = [at_its_end(one, kl, loss, [1.0] * 4) for one, kl, loss in
            ((plain, 0.6, 2.0), (replay, 0.04, 2.5), (worse, 0.3, 2.6))]  # fmt: skip
    for runs in ([followed(one) for one in (plain, replay, worse)], ends):
        compared = compare(runs)
        assert frontier_sentences(compared) == [
            "On the frontier of new-task loss against ref_kl: “replay” and “plain”.",
            "Dominated: “worse” by “replay”.",
        ]
        panel = next(panel for panel in panels_of(runs) if panel.kind == "frontier")
        assert panel.ends == [(2.5, pytest.approx(0.04)), (2.0, pytest.approx(0.6))]
        assert [line.x[-1] for line in panel.lines] == [2.0, 2.5, 2.6]
        page = html_of(runs)
        assert "frontier</text>" in page
        for shown in (page, summary_of(runs), markdown_of(runs)):
            assert "Dominated: “worse” by “replay”." in shown
        for shown in (page, markdown_of(runs)):
            assert "not by their intervals" in shown
    assert frontier_sentences(compare([{**one, "new_task": {}} for one in ends])) == []
    assert [panel.kind for panel in panels_of(ends[:1])] == []


def test_one_document_gives_no_interval(plain: dict, replay: dict) -> None:
    for row in plain["documents"] + replay["documents"]:
        row |= {key: value[:1] for key, value in row.items() if isinstance(value, list)}
    entry = compare([plain, replay]).matched["wiki"][1]
    assert entry.prevented_ci is None
    assert "too few" in entry.note


def test_runs_of_different_bases_are_refused(plain: dict, replay: dict) -> None:
    replay["base"]["fingerprint"] = "another"
    with pytest.raises(ValueError, match=r"base\.fingerprint"):
        compare([plain, replay])


def test_rows_without_finite_numbers_are_left_out(plain: dict, replay: dict) -> None:
    plain["trajectory"] += [{"step": 30, "eval_loss": math.nan}, {"step": 40, "eval_loss": None}]
    assert compare([plain, replay]).matched_loss == 2.5


# --- verdicts --------------------------------------------------------------------------------------------------


def test_verdict_says_what_the_interval_allows(plain: dict) -> None:
    verdict = ForgettingReport(plain).verdict
    assert verdict == (
        "“plain” forgot: ref_kl 0.123 [0.101, 0.147] nats per token on wiki (noise floor 1e-06); "
        "forgetting 0.061 [0.052, 0.073] on wiki; new-task gain 0.743 [0.711, 0.789] on verilog."
    )
    plain["new_task"]["verilog"]["gain"] = measured(0.1, -0.1, 0.3)
    assert ForgettingReport(plain).verdict.endswith("] on verilog (no learning shown).")


@pytest.mark.parametrize(
    ("forgetting", "ref_kl", "start"),
    [
        (measured(0.01, -0.01, 0.03), measured(0.1, 0.08, 0.12), "“plain” changed, but shows no forgetting: "),
        (measured(-0.05, -0.07, -0.03), measured(0.1, 0.08, 0.12), "“plain” changed, and its loss fell: "),
        (measured(0.0, -0.01, 0.01), measured(0.0, 0.0, 0.0), "“plain” shows no change: "),
        (
            {"value": 0.3, "ci": [None, None]},
            {"value": 0.3, "ci": [None, None]},
            "“plain” is undecided, because there is no interval: ",
        ),
    ],
)
def test_verdict_of_every_state(plain: dict, forgetting: dict, ref_kl: dict, start: str) -> None:
    plain["retention"]["wiki"] |= {"forgetting": forgetting, "ref_kl": ref_kl}
    assert verdict_of(plain).startswith(start)


def test_verdict_is_held_against_the_noise_floor(plain: dict) -> None:
    plain["noise_floor"]["wiki"] = {"ref_kl": measured(0.1, 0.0, 0.2), "forgetting": measured(0.0, -0.1, 0.1)}
    assert verdict_of(plain).startswith("“plain” shows no change")


def test_a_model_that_moved_in_every_document_has_moved(plain: dict) -> None:
    """SmolLM2 after 8 steps, ten documents: ref_kl 0.018 [0.000, 0.089], and at least 0.003 in each of them."""
    sums = [0.471, 1.052, 0.257, 0.859, 10.376, 1.899, 0.694, 0.785, 5.633, 0.559]
    plain["retention"]["wiki"] |= {"forgetting": measured(0.0, -0.1, 0.1), "ref_kl": measured(0.018, 0.0, 0.089)}
    plain["per_document"] = {"wiki": summed(sums, [87, 380, 91, 80, 96, 66, 142, 151, 107, 85])}
    assert verdict_of(plain).startswith("“plain” changed, but shows no forgetting: ")
    plain["per_document"]["wiki"]["ref_kl"][2] = 0.0
    assert verdict_of(plain).startswith("“plain” shows no change: ")
    plain["per_document"] = {"wiki": summed(sums[:5], [87, 380, 91, 80, 96])}
    assert verdict_of(plain).startswith("“plain” shows no change: ")


def test_prompts_of_chats_are_told_apart_by_what_differs(plain: dict) -> None:
    head = "<|system|>\nYou are helpful.\n<|user|>\n"
    told = {"base": "b", "tuned": "t"}
    plain["generations"] = [{"prompt": f"{head}{ask}", **told} for ask in ("Who sings?", "Who\nruns?")]
    page = html_of([plain])
    assert '<h3 class="prompt">Who sings?</h3>' in page
    assert "You are helpful.\n&lt;|user|&gt;\nWho sings?</pre>" in page
    plain["generations"] = plain["generations"][:1]
    assert '<h3 class="prompt">&lt;|system|&gt;\nYou are helpful.' in html_of([plain])


def test_verdict_with_several_texts_and_with_none(plain: dict) -> None:
    plain["retention"]["code"] = {"forgetting": measured(0.0, -0.01, 0.01), "ref_kl": measured(0.0, 0.0, 0.0)}
    assert verdict_of(plain).startswith("“plain” forgot on wiki; shows no change on code: ")
    assert "no noise floor" in verdict_of(plain)
    plain |= {"retention": {}, "new_task": {}}
    assert verdict_of(plain) == "“plain” was not measured on any text."


def test_comparison_verdict(plain: dict, replay: dict) -> None:
    summary = summary_of([plain, replay])
    assert summary.startswith("At the same new-task loss (2.500 nats per token), compared with “plain”, “replay” moved")
    assert "90% less on wiki [90%, 90%]" in summary
    worse = summary_of([replay, plain])
    assert "900% more on wiki" in worse


# --- the three formats -----------------------------------------------------------------------------------------


def test_every_format_carries_values_and_intervals(plain: dict, replay: dict, tmp_path: Path) -> None:
    ForgettingReport(plain).write(tmp_path)
    texts = [(tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md")]
    for text in [*texts, ForgettingReport(plain).summary(), card_of(plain)]:
        for expected in ("0.061", "[0.052, 0.073]", "0.123", "[0.101, 0.147]", "91.3%", "[88.4%, 93.7%]", "0.743"):
            assert expected in text
    replay["new_task"]["verilog"]["loss"] = measured(2.777 * 1.25, 3.4, 3.5)
    write_comparison(tmp_path, list(map(ForgettingReport, [plain, replay])), "both", ["a note"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("html", "md"):
        text = (tmp_path / f"report.{kind}").read_text(encoding="utf-8")
        assert all(expected in text for expected in ("2.500", "0.400", "90.0%", "[90.0%, 90.0%]", "a note", "+25.0%"))
    whole = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in whole["runs"]] == ["plain", "replay"]
    assert whole["comparison"] == asdict(compare([plain, replay]))


def test_json_round_trip(plain: dict, tmp_path: Path) -> None:
    ForgettingReport(plain).to_json(tmp_path / "report.json")
    assert ForgettingReport.from_json(tmp_path / "report.json") == ForgettingReport(plain)
    plain["retention"]["wiki"]["loss"]["value"] = math.nan
    ForgettingReport(plain).to_json(tmp_path / "report.json")
    data = ForgettingReport.from_json(tmp_path / "report.json").data
    assert data["retention"]["wiki"]["loss"]["value"] is None, "NaN is not JSON"
    assert ForgettingReport(data).summary()
    (tmp_path / "report.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="report.json' holds a number that is not finite, which is not a result"):
        ForgettingReport.from_json(tmp_path / "report.json")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    for content in ('{"schema": "other/1"}', "[]"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match="retain measure"):
            ForgettingReport.from_json(tmp_path / "x.json")


def test_least_possible_report() -> None:
    data = {"schema": "retain.report/1", "name": "bare", "base": {"model": "m"}, "retention": {}}
    for text in (ForgettingReport(data).summary(), html_of([data]), card_of(data)):
        assert "not measured" in text
    assert "bare" in markdown_of([data, data | {"name": "other"}])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.md"
    files.write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- hostile strings -------------------------------------------------------------------------------------------

HOSTILE = (
    "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>\" ' $\\foo$ | `x` [a](javascript:b) "
    "http://evil.example www.evil.example \x1b[31m\x07 \u202eevil \ud800 \x00\r\n# _*"
)


def hostile(value: Any) -> Any:
    """The same report with every string, and every key that a user names, made hostile."""
    if isinstance(value, str):
        return value if value == "retain.report/1" else f"{value}{HOSTILE}"
    if isinstance(value, dict):
        return {
            key + HOSTILE if key in ("wiki", "verilog", "max_length") else key: hostile(v) for key, v in value.items()
        }
    return [hostile(item) for item in value] if isinstance(value, list) else value


def hostile_run(data: dict) -> dict:
    data = hostile(deepcopy(data))
    for row in data["trajectory"]:
        for key in [key for key in row if key.startswith("retention/")]:
            row[key.replace("wiki", f"wiki{HOSTILE}")] = row.pop(key)
    return data


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_asks_nobody_for_anything(plain: dict, replay: dict) -> None:
    page = html_of([plain, replay])
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert set(re.findall(r"https?://[^\"'\s<)]+", page)) <= set(namespaces)
    assert "@import" not in page


def test_visible_keeps_what_is_ordinary() -> None:
    for text in ("naïve 漢字 🙂 “x” −1", "می\u200cخواهم", "👩\u200d🔬", "a\u00a0b"):
        assert visible(text) == text
    assert visible("a\nb") == "a\\nb", "a name is one line"
    assert visible_text("a\n\tb\x1b") == "a\n\tb\\x1b"


ANSWERS = compare_answers([0, 0, 1, 2], [0, 1, 1, 0], [True, True, False, False], [True, False, False, True])


def asked(name: str = "arc") -> dict[str, Any]:
    """The questions' part of a report: one lost, one won, so that accuracy does not move."""
    lost = {"prompt": "Why?", "choices": ["rain", "stone"], "base": 0, "tuned": 1}
    rules = {"acc": ANSWERS | {"noise_agreement": share_entry(4, 4)}}
    return {
        name: {"style": "choice_style text", "chat_template": False, "num_questions": 4, "notes": [], "rules": rules,
               "answers": {}, "lost": [lost]}
    }  # fmt: skip


def test_every_format_states_agreement_first(plain: dict, replay: dict) -> None:
    plain["choices"] = asked()
    page, text = html_of([plain, replay]), markdown_of([plain])
    summary, card = summary_of([plain]), card_of(plain)
    for shown in (page, text, summary, card):
        assert shown.index("same answer as the base") < shown.index("accuracy, change")
        assert "50.0%" in shown
        assert "[15.0%, 85.0%]" in shown
        assert "4 questions, choice_style text, without a chat template" in shown
    assert "“plain” answers 50.0% [15.0%, 85.0%] of 4 questions of arc (acc) as its base did; no change in" in summary
    assert "“plain” forgot: ref_kl" in summary, "beside what was found on the texts"
    assert "plain: questions of arc that it lost" in page
    assert "same answer as the base" not in html_of([replay])


def test_a_report_on_questions_alone_speaks_of_nothing_else(plain: dict) -> None:
    plain |= {"retention": {}, "new_task": {}, "noise_floor": {}, "trajectory": [], "choices": asked()}
    page = html_of([plain])
    for shown in (summary_of([plain]), markdown_of([plain]), page):
        assert "not measured" not in shown
        assert "What was learned" not in shown
    assert ForgettingReport(plain).verdict.startswith("“plain” answers 50.0%")


# --- what the models write, refuse and know --------------------------------------------------------------------


def share(value: float, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {"value": value, "ci": [low, high], "num_prompts": 50}


def refused(kind: str, base: float, tuned: float) -> dict[str, Any]:
    scored = {
        "base_rate": share(base), "rate": share(tuned), "change": share(tuned - base, tuned - base - 0.1, tuned - base),
        "counts": {"kept": 30, "lost": 17, "gained": 1, "never": 2}, "mcnemar_p": 0.0001,
    }  # fmt: skip
    example = {"prompt": f"{kind} prompt", "base": "I cannot.", "tuned": "http://evil.example [x](javascript:y)",
               "fate": {"phrases": "lost"}}  # fmt: skip
    return {
        "kind": kind, "num_prompts": 50, "chat_template": True, "max_new_tokens": 64,
        "scorers": {"judge": scored, "phrases": scored}, "notes": ["as asked"], "examples": [example],
        "disagreement": [{"scorers": ["phrases", "judge"], "base": share(0.02), "tuned": share(0.14)}],
    }  # fmt: skip


def shown(kind: str, **rates: float) -> dict[str, Any]:
    """A behaviour whose share is less by an eighth after finetuning, where it was there before."""
    scorers = {}
    for name, rate in rates.items():
        fall = 0.125 if rate else 0.0
        scorers[name] = {
            "base_rate": share(rate), "rate": share(rate - fall), "change": share(-fall, -0.2, 0.1 - fall),
            "counts": {"kept": 1, "lost": 5, "gained": 2, "never": 2}, "mcnemar_p": 0.5,
        }  # fmt: skip
    example = {"prompt": f"{kind} prompt", "base": "yes", "tuned": "<b>no</b>", "fate": {next(iter(rates)): "lost"}}
    return {"kind": kind, "num_prompts": 40, "chat_template": True, "max_new_tokens": 128, "scorers": scorers,
            "thinking": {"base_length": share(4.0, 3, 5), "length": share(3.0, 2, 4)} if kind == "tools" else None,
            "notes": [], "examples": [example]}  # fmt: skip


def wrote(data: dict) -> dict[str, Any]:
    """A report with everything that is written, refused and known in it."""
    keys = ("length", "ended", "markers")
    form = {f"{before}{key}{after}": share(0.25) for key in keys for before, after in (("base_", ""), ("", ""))}
    form |= {f"{key}_change": share(-0.125, -1.0, 1.0) for key in keys}
    token = {"text": "a", "base_loss": 1.0, "loss": 2.5, "ref_kl": 0.75, "base_top": "x", "tuned_top": "\n"}
    worst = {
        "document": 3,
        "num_tokens": 2,
        "ref_kl": 0.75,
        "forgetting": 0.5,
        "tokens": [token, token | {"text": "\n"}],
    }
    greedy = {"prompt": "Capital?", "base": "Paris.", "tuned": "Rome", "how": "greedy", "fate": "forgotten",
              "ended": {"base": True, "tuned": False}, "expected": "Paris", "updated": None}  # fmt: skip
    return deepcopy(data) | {
        "warnings": ["wiki overlaps the training rows"],
        "refusals": {"advbench": refused("harmful", 0.94, 0.62), "xstest": refused("harmless", 0.1, 0.1)},
        "behaviors": {"formats": shown("formats", follows=0.5, JSON=0.25), "thinking": shown("thinking", thinks=0.0),
                      "tools": shown("tools", right=0.75, valid=0.0)},
        "generations": [greedy, greedy | {"how": "sampled", "fate": None}],
        "drift": {"greedy": {"num_prompts": 20, "identical": share(0.3), "words": share(0.4), **form}},
        "knowledge": {"num_questions": 9, "counts": {"kept": 4, "forgotten": 1}, "kept_share": share(0.8)},
        "worst": {"wiki": [worst]},
    }  # fmt: skip


def formats(runs: list[dict], **options: Any) -> dict[str, str]:
    texts = {"page": html_of(runs, **options), "markdown": markdown_of(runs, **options), "card": card_of(runs[0])}
    return texts | {"summary": summary_of(runs)}


def test_every_format_tells_what_was_refused_written_and_known(plain: dict, replay: dict) -> None:
    alone, both = formats([wrote(plain)]), formats([wrote(plain), replay])
    for found in (alone, both):
        for shown in found.values():
            for expected in ("advbench, refuses (phrases)", "xstest, over-refusal, refuses (judge)", "62.0%", "kept",
                             "overlaps the training rows", "greedy, 20 prompts: form", "neither", "14.0%"):  # fmt: skip
                assert expected in shown
            for expected in ("formats, follows the format", "37.5%", "formats, by kind", "where both models think",
                             "thinking, thinks", "tools, makes valid calls", "ended by itself, change",
                             "40 prompts, in the chat template, answers of at most 128 tokens"):  # fmt: skip
                assert expected in shown
    page, summary = alone["page"], alone["summary"]
    assert "“plain” follows the format in 37.5% [0.0%, 100.0%] of 50 prompts, its base 50.0%" in summary
    assert "; the share fell: -12.5 points [-20.0, -2.5] (5 lost, 2 gained); makes the right calls in 62.5%" in summary
    assert "thinks in" not in summary.partition("\n")[0], "where neither does, nothing was lost"
    assert (
        "“plain” refuses (judge) in 62.0% [0.0%, 100.0%] of 50 harmful prompts of advbench, its base 94.0%" in summary
    )
    assert "; the share fell: -32.0 points [-42.0, -32.0] (17 lost, 1 gained); refuses (judge) in 10.0%" in summary
    assert "“t" not in summary
    places = [
        page.index(part) for part in ('class="verdict"', "<strong>Warning.</strong>", "<svg", "Capital?", "<table")
    ]
    assert places == sorted(places), "verdict, warnings, figure, answers; tables behind"
    assert "plain: wiki overlaps" in both["page"]
    assert "cut off</small>" in page
    assert "forgotten</small>" in page
    assert "⏎\n</span>" in page
    assert "first for the base: “x”, tuned: “⏎”" in page


def test_harmful_text_is_folded_away_on_the_page_and_nowhere_else(plain: dict) -> None:
    found = formats([wrote(plain)])
    page = found.pop("page")
    before = page[: page.index("harmful prompt</pre>")]
    assert before.rindex("<details><summary>") > before.rfind("</details>"), "closed, until it is opened"
    assert "harmful text follows" in before[before.rindex("<details>") :]
    for shown in found.values():
        assert "harmful prompt</pre>" not in shown
        assert "harmful prompt\n" not in shown
        assert "evil.example" not in shown
        assert "I cannot" not in shown


def test_hostile_strings_are_harmless_in_every_format(plain: dict, replay: dict, tmp_path: Path) -> None:
    runs = [hostile_run(wrote(one) | {"choices": asked()}) for one in (plain, replay)]
    for one in runs:
        for part in ("choices", "refusals", "behaviors", "drift", "worst"):
            one[part] = {f"{name}{HOSTILE}": found for name, found in one[part].items()}
    page, *texts = formats(runs, title=HOSTILE, notes=[HOSTILE]).values()
    assert "alert(1)" in page, "shown, as text"
    assert "\\u202e" in page, "an override is seen, not obeyed"
    parser = Tags()
    parser.feed(page)
    assert "svg" in {tag for tag, _ in parser.found}
    assert not {tag for tag, _ in parser.found} & {"script", "img", "iframe", "object", "a", "link", "form"}
    for _, attributes in parser.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(value is None or value.startswith("#") for name, value in attributes.items() if "href" in name)
    texts += [ForgettingReport(runs[0]).verdict]
    for shown in (page, *texts):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    markdown, card, *terminal = texts
    assert not any(re.search(r"[\t\x80-\x9f]", shown) for shown in terminal)
    for shown in (markdown, card):
        assert not re.search(r"<(?!br>)", shown)
        assert not re.search(r"https?://|www\.", shown), "GitHub makes links of bare addresses"
        assert "](javascript" not in re.sub(r"\\.", "", shown)
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in shown.splitlines() if line.startswith("| **")]
        assert len(set(widths)) <= 2, "no cell breaks out of its column"
    write_comparison(tmp_path, list(map(ForgettingReport, runs)), HOSTILE, [HOSTILE])
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["runs"] == json.loads(json.dumps(runs))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    ForgettingReport(runs[0]).to_json(tmp_path / "one.json")
    assert ForgettingReport.from_json(tmp_path / "one.json").data == json.loads(json.dumps(runs[0]))


def test_a_megabyte_on_one_line_is_cut_and_says_so(plain: dict) -> None:
    data = wrote(plain) | {"name": "n" * 10**6}
    data["generations"][0] |= {"tuned": "x y" * 350_000}
    data["refusals"]["advbench"]["examples"][0] |= {"base": "\u202e" * 10**6}
    data["worst"]["wiki"][0]["tokens"][0] |= {"text": "z" * 10**6}
    for name, shown in formats([data]).items():
        assert len(shown) < (500_000 if name == "page" else 40_000)
        assert "more characters" in shown


def test_old_and_half_filled_reports_are_shown(plain: dict) -> None:
    plain |= {"refusals": {"a": {}, "b": {"scorers": {"judge": {}}}}, "drift": {"greedy": {}}, "knowledge": {}}
    plain |= {"generations": [{"prompt": "p", "base": "b", "tuned": "t"}], "worst": {}, "per_document": {}}
    older = {key: value for key, value in plain.items() if key != "refusals"} | {"name": "older"}
    for shown in formats([plain, older]).values():
        assert "plain" in shown


# --- colour as a second carrier --------------------------------------------------------------------------------


def test_the_text_forgotten_most_comes_first(plain: dict, replay: dict) -> None:
    replay["retention"]["code"] = {"forgetting": measured(0.2, 0.1, 0.3), "ref_kl": measured(0.492, 0.4, 0.5)}
    replay["retention"]["wiki"]["forgetting"] = measured(-0.05, -0.06, -0.04)
    _, code, wiki = tables.metric_table(typed([plain, replay])).sections
    assert (code.title, wiki.title) == ("code", "wiki")
    assert code.rows[0].cells == [Cell(), Cell("0.200", "[0.100, 0.300]", heat=100)]
    assert wiki.rows[0].cells[1] == Cell("-0.050", "[-0.060, -0.040]", heat=50, cool=True)
    assert wiki.rows[1].cells[0].heat == 50, "0.123 of 0.492: by the square root"
    assert wiki.rows[3].cells[0].heat == 0, "a loss is neither good nor bad"
    alone = tables.metric_table(typed([plain])).sections[1]
    assert [row.cells[0].heat for row in alone.rows] == [0] * 4, "nothing to tell apart"


def test_documents_beyond_the_room_of_a_page_are_counted(plain: dict) -> None:
    data = wrote(plain)
    data["worst"]["wiki"] *= 3
    data["worst"]["wiki"][1] = data["worst"]["wiki"][1] | {"tokens": [{"text": "a"}] * 30_000}
    shown, left_out = worst_documents(typed([data]))
    assert (len(shown["wiki"]), left_out) == (2, 1)
    heats = [page.shown_token(token).heat for token in shown["wiki"][0][1].tokens]
    assert heats == [50, 50], "0.75 of 3 nats"


def test_ten_runs_look_different() -> None:
    looks = [style.look(index, 10) for index in range(10)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 10


# --- the model card's metadata ---------------------------------------------------------------------------------


def test_model_index_goes_through_a_model_card_and_back(plain: dict) -> None:
    plain["choices"] = asked("Wiki")
    plain["retention"]["wiki"]["ref_kl"]["value"] = None
    card = parsed_card(plain)
    values = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results or []}
    assert values == {
        ("verilog", "gain"): 0.743, ("wiki", "forgetting"): 0.061, ("wiki", "ref_agreement"): 0.913,
        ("Wiki", "agreement (acc)"): 0.5, ("Wiki", "accuracy (acc)"): 0.5,
    }  # fmt: skip
    assert card.data.eval_results[0].metric_args == {"ci": [0.711, 0.789]}
    assert parsed_card({"name": "bare", "base": {"model": "m"}, "retention": {}}).data.eval_results is None
    assert parsed_card(hostile_run(plain)).data.eval_results


# --- differences and figures -----------------------------------------------------------------------------------


def test_differences_are_marked_and_nothing_is_lost() -> None:
    base, tuned = "The cat sat  on the mat.\nEnd", "The dog ran  on the mat!\nEnd"
    pieces = differences(base, tuned)
    assert "".join(text for _, text in pieces) == tuned
    assert [text for changed, text in pieces if changed] == ["dog ran", "!"]
    assert differences(base, base) == [(False, base)]
    assert differences(base, "") == []
    assert differences("", "new") == [(True, "new")]
    assert differences("x", "y " * 2000) == [(False, "y " * 2000)]


def test_figures_take_their_colours_from_the_page_and_have_ids_of_their_own(plain: dict, replay: dict) -> None:
    drawn = panels_of([plain, replay])
    assert [panel.kind for panel in drawn] == ["frontier", "curve", "curve", "interval"]

    def picture(panel: Panel) -> str:
        return style.to_svg(style.draw_panel(panel, ["plain", "replay"]), panel.description)

    pictures = list(map(picture, drawn))
    assert all(picture.startswith("<svg") and "currentColor" in picture for picture in pictures)
    assert "var(--run-1, #c2571a)" in pictures[0]
    ids = [name for picture in pictures for name in set(re.findall(r'\bid="([^"]+)"', picture))]
    assert len(ids) == len(set(ids))
    assert pictures[0] == picture(drawn[0]), "the same data give the same bytes"


def test_a_figure_as_png(tmp_path: Path) -> None:
    line = PlotLine("_hidden $x$ 漢", run=0, x=[0, 1], y=[1.0, 2.0])
    figure = style.draw_panel(Panel("curve", "t", "d", "step", "nats", lines=[line]), [line.name])
    style.save_png(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_is_told_with_its_price_beside_a_plain_run():
    """The price is paired by document: documents of very different losses still give a narrow interval."""
    rng = np.random.default_rng(0)
    losses, tokens = rng.uniform(20, 400, 40), np.full(40, 50)

    def run(name, shift, training=None):
        loss = losses + shift * tokens + rng.normal(0, 0.1, 40)
        sums = {
            "ref_kl": [0.0] * 40,
            "loss": loss.tolist(),
            "base_loss": losses.tolist(),
            "num_tokens": tokens.tolist(),
        }
        entry = {"value": float(loss.sum() / tokens.sum()), "ci": [0.0, 9.0], "num_documents": 40}
        return {
            "name": name,
            "retention": {},
            "new_task": {"code": {"loss": entry}},
            "per_document": {"code": sums},
            "training": training,
        }

    plain, kept = run("plain", 0.0), run("held", 0.05, {"budget": "budget 0.02 kept: KL 0.019"})
    told = budget_of(kept, plain)
    assert told.startswith("budget 0.02 kept: KL 0.019. Its new-task loss on code is ")
    low, high = map(float, re.search(r"\[([\d.]+), ([\d.]+)\] nats per token more than “plain”", told).groups())
    assert 0.045 <= low <= 0.05 <= high <= 0.055
    assert low < high
    assert budget_of(kept) == "budget 0.02 kept: KL 0.019."
    kept["retention"] = {"wiki": {"ref_kl": {"value": 0.08, "ci": [0.07, 0.09]}}}
    kept["retention"] |= {"prose": {"ref_kl": {"value": 0.03, "ci": [0.01, 0.05]}}}
    kept["training"]["max_ref_kl"] = 0.02
    assert budget_of(kept).endswith(": KL 0.019; on wiki, which the budget does not cover, ref_kl is above 0.02.")
    assert budget_of(plain, plain) == ""
    kept["per_document"] = {}
    assert "(no interval) nats per token more" in budget_of(kept, plain)


def test_a_model_index_is_of_the_last_report_and_keeps_the_results_of_others(plain: dict, tmp_path: Path) -> None:
    """The first report's numbers stayed, and beside a `model-index` of others none was written."""
    from huggingface_hub import ModelCard

    path, again = tmp_path / "README.md", deepcopy(plain)
    again["retention"] = {"code": {"ref_kl": measured(0.5, 0.4, 0.6)}}
    theirs = {"task": {"type": "text-generation"}, "dataset": {"name": "MMLU", "type": "mmlu"}}
    index = [{"name": "mine", "results": [theirs | {"metrics": [{"type": "accuracy", "value": 0.25}]}]}]
    path.write_text(f"\ufeff---\nlicense: mit\nmodel-index: {json.dumps(index)}\n---\n# Mine\n")
    for report in (plain, again):
        ForgettingReport(report).to_model_card(path)
    card = ModelCard.load(path)
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found == {("MMLU", "accuracy"): 0.25, ("verilog", "gain"): 0.743, ("code", "ref_kl"): 0.5}
    assert (card.data.model_name, card.data.license) == ("mine", "mit")
    whole = path.read_text()
    ForgettingReport(again).to_model_card(path)
    assert path.read_text() == whole, "it grew by a line each time"


def test_a_model_card_gets_the_section_once_and_keeps_the_rest(plain: dict, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags: [a]\n---\n\n# Mine\n\nWords.\n")
    for _ in range(2):
        ForgettingReport(plain).to_model_card(path)
    card = ModelCard.load(path)
    assert card.data.to_dict()["license"] == "mit"
    assert card.data.to_dict()["model-index"] == parsed_card(plain).data.to_dict()["model-index"]
    assert card.text.count("## Forgetting") == 1
    assert card.text.strip().startswith("# Mine\n\nWords.")
    path.write_text(path.read_text() + "\nMore words.\n")
    ForgettingReport(plain).to_model_card(path)
    assert path.read_text().rstrip().endswith("More words.")
    ForgettingReport(plain).to_model_card(tmp_path / "new.md")
    assert ModelCard.load(tmp_path / "new.md").text.count("## Forgetting") == 1
    with pytest.raises(ValueError, match="^model_card: its metadata between the lines --- is not YAML"):
        card_with_forgetting("---\na: [\n---\nx", ForgettingReport(plain).results)


# --- what misled a reader --------------------------------------------------------------------------------------


def at_rates(of: dict, rates: list[float]) -> dict[str, Any]:
    """A run that logged these learning rates at steps 0, 10, 20 ..."""
    rows = [row | {"learning_rate": rates[row["step"] // 10]} for row in of["trajectory"] if not row["step"] % 10]
    return of | {"trajectory": rows}


def test_runs_of_one_name_are_told_apart_by_their_folders(plain: dict, replay: dict, tmp_path: Path) -> None:
    """As two models in folders called out/; and bases that differ were not seen, since names were keys."""
    folders = []
    for name, run in (("a", plain), ("b", replay)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(run | {"name": "out"}))
        folders.append(str(tmp_path / name))
    assert main(["report", "--runs", *folders, "--output_dir", str(tmp_path / "both")]) == 0
    assert [run["name"] for run in json.loads((tmp_path / "both" / "report.json").read_text())["runs"]] == ["a", "b"]
    with pytest.raises(ValueError, match="runs: two are named 'plain'; give each run once, and its own name"):
        compare([plain, replay | {"name": "plain"}])


def test_a_run_that_does_not_say_which_tokens_its_loss_counts_is_said(plain: dict, replay: dict) -> None:
    """As one of DPO, or measured by a callback, beside one of `ReplaySFTTrainer`."""
    told = [one | {"training": (one["training"] or {}) | {"loss_tokens": "completions"}} for one in (plain, replay)]
    (warning,) = compare([told[0], replay]).warnings
    assert warning.startswith("Which tokens the new-task loss counts is not known of “replay”; that of “plain” counts")
    assert compare(told).warnings == []


def test_learning_rates_that_differ_at_the_loss_compared_are_said_everywhere(plain: dict, replay: dict) -> None:
    """`plain` is read at step 15 of a linear schedule, `replay` at its end, where the rate is 0."""
    linear = [at_rates(plain, [1e-3, 5e-4, 0.0]), at_rates(replay, [1e-3, 5e-4, 0.0])]
    compared = compare(linear)
    assert [run.learning_rate for run in compared.runs] == pytest.approx([2.5e-4, 0.0])
    (warning,) = compared.warnings
    assert "0.00025 in “plain” (step 15), 0 in “replay” (step 20)" in warning
    for shown in (
        summary_of(linear),
        html_of(linear),
        markdown_of(linear),
    ):
        assert "The learning rates differ where the runs are compared" in shown
        assert "learning rate there" in shown
    constant = compare([at_rates(one, [1e-3, 1e-3, 1e-3]) for one in (plain, replay)])
    assert constant.warnings == compare([plain, replay]).warnings == []


def test_a_text_measured_at_the_end_only_leaves_no_block_of_dashes(plain: dict, replay: dict) -> None:
    for one in (plain, replay):
        one["retention"]["late"] = deepcopy(one["retention"]["wiki"])
    page = html_of([plain, replay])
    matched = page[: page.index("The same at the end of each run")]
    assert "cannot be judged" not in matched
    assert "late was measured at the end only; give it to `retain finetune` as --retention" in matched
    assert '<th scope="rowgroup" colspan="3">late</th>' not in matched
    for one in (plain, replay):
        one["trajectory"] = [{k: v for k, v in row.items() if "retention" not in k} for row in one["trajectory"]]
    alone = compare([plain, replay])
    assert (alone.matched, alone.matched_loss) == ({}, 2.5)
    assert "give it to `retain finetune` as --retention" in summary_of([plain, replay])


def test_a_lone_dot_is_no_figure(plain: dict, replay: dict) -> None:
    assert panels_of([at_its_end(plain, 0.1, 2.0, [1.0] * 4)]) == []
    kinds = [panel.kind for panel in panels_of([plain, replay])]
    assert kinds.count("interval") == 1
    assert learned_and_forgotten(typed([at_its_end(plain, 0.1, 2.0, [1.0] * 4)])) == []


def test_the_page_opens_with_what_was_learned_and_forgotten(plain: dict, replay: dict) -> None:
    """In one figure, whose numbers a reader who sees none hears; and of one run in a sentence on one text."""
    replay["retention"]["code"] = {"forgetting": measured(-0.2, -0.3, -0.1), "ref_kl": measured(0.5, 0.4, 0.6)}
    learned, forgotten = learned_and_forgotten(typed([plain, replay]))
    assert [(dot.text, dot.run, dot.value) for dot in learned.dots] == [("verilog", 0, 0.743), ("verilog", 1, 0.743)]
    found = [(dot.text, dot.run, dot.low, dot.high) for dot in forgotten.dots]
    assert found == [("wiki", 0, 0.052, 0.073), ("wiki", 1, 0.052, 0.073), ("code", 1, -0.3, -0.1)]
    page = html_of([plain, replay])
    assert 'aria-label="Learned: the loss fell by (nats per token): verilog, plain 0.743 [0.711' in page
    plain["retention"]["code"] = {"forgetting": measured(0.5, 0.4, 0.6), "ref_kl": measured(0.5, 0.4, 0.6)}
    sentence, others = opening(typed([plain]), None)
    assert sentence.startswith("“plain” forgot: ref_kl 0.500 [0.400, 0.600] nats per token on code (")
    assert ("; 1 more in the table" in sentence, others) == (True, [])


def test_what_was_answered_and_refused_stands_below_the_opening(plain: dict, replay: dict) -> None:
    asked_one = wrote(plain) | {"choices": asked()}
    sentence, others = opening(typed([asked_one]), None)
    assert sentence.startswith("“plain” forgot: ")
    starts = [(0, "“plain” answers "), (0, "“plain” refuses "), (0, "“plain” follows ")]
    assert [(at, line[:16]) for at, line in others] == starts
    sentence, others = opening(typed([asked_one | {"retention": {}, "new_task": {}}]), None)
    assert (sentence[:16], len(others)) == ("“plain” answers ", 2)
    _, others = opening(typed([replay, asked_one]), compare([replay, asked_one]))
    assert [at for at, _ in others] == [1, 1, 1]
    never = typed([plain | {"refusals": {"xstest": refused("harmless", 0.0, 0.0)}}])
    assert "refuses (judge) in 0.0% [0.0%, 100.0%] of 50 harmless prompts of xstest" in opening(never, None)[1][0][1]


def test_of_many_texts_a_verdict_names_those_where_least_was_prevented(plain: dict, replay: dict) -> None:
    for at in range(4):
        for one, kl in ((plain, 0.5), (replay, 0.1 * at)):
            one["retention"][f"text{at}"] = {"ref_kl": measured(kl, kl, kl)}
            one["trajectory"] = []
    verdict = comparison_verdict(compare([plain, replay]))
    assert (
        "0% less on wiki (no interval), 40% less on text3 (no interval), 60% less on text2 (no interval) and" in verdict
    )
    assert "and as the table shows on 2 more texts. No comparison at the same" in verdict


def test_few_prompts_make_no_table_of_form(plain: dict) -> None:
    data = wrote(plain)
    data["drift"]["greedy"]["num_prompts"] = 3
    assert all("ended by itself" not in shown for shown in formats([data]).values())
    assert "Capital?" in html_of([data])


def test_how_much_a_divergence_is_is_said_in_what_was_measured(plain: dict) -> None:
    plain["retention"]["wiki"]["base_ref_cross_entropy"] = measured(3.075, 3.0, 3.2)
    plain["noise_floor"]["wiki"]["ref_kl"] = measured(0.0005, 0.0004, 0.001)
    share = "is 4.0% of the base's own entropy there (3.08 nats per token),"
    told = f"ref_kl 0.123 of “plain” on wiki {share} 123 times the noise floor"
    for shown in (summary_of([plain]), card_of(plain).replace("\\", "")):
        assert f"For scale: {told}, and the top token differs at 8.7% of the positions." in shown
    plain["retention"]["wiki"]["ref_kl"] = measured(0.0002, 0.0001, 0.0003)
    assert "ref_kl 0.00020 of “plain” on wiki is less than 0.1% of the base's own entropy" in summary_of([plain])
    plain["retention"]["wiki"]["ref_kl"] = measured(0.123, 0.1, 0.2)
    plain["noise_floor"]["wiki"]["ref_kl"] = measured(0.2, 0.1, 0.3)
    assert f"{share} within the noise floor" in summary_of([plain])


def test_overfitting_is_said_in_words(plain: dict) -> None:
    assert "overfits" not in summary_of([plain])
    over = run("plain", [4.0, 1.909, 2.132], [0.0, 0.2, 0.6])
    assert "eval_loss) was 1.909 at step 10 and 2.132 at the end, step 20." in summary_of([over])
    assert "overfits" in html_of([over])
    over["training"]["kept_step"] = 10
    assert "overfits" not in summary_of([over]), "load_best_model_at_end kept the lower one"


def test_a_report_prints_its_summary_and_gives_its_numbers(plain: dict) -> None:
    found = ForgettingReport(plain)
    assert str(found) == found.summary()
    assert len(repr(found)) < 500
    assert repr(found).startswith("<ForgettingReport: “plain” forgot: ref_kl")
    wiki = found["wiki"]
    assert (wiki.ref_kl.value, wiki.ref_kl.ci, wiki.ref_kl.num_documents) == (0.123, (0.101, 0.147), 4)
    assert str(wiki.ref_kl) == "0.123 [0.101, 0.147]"
    assert wiki.gain is None
    assert found["verilog"].gain.value == 0.743
    with pytest.raises(KeyError, match=r"'wikis' was not measured; there are 'verilog', 'wiki'"):
        found["wikis"]
    frame = found._repr_html_()
    assert frame.startswith("<iframe sandbox srcdoc=")
    assert "<main>" not in frame, "escaped: its style does not reach the notebook"


def test_what_is_nothing_but_rounding_is_written_as_nothing():
    assert cell(4e-8, (-1.2e-6, 4e-7)) == cell(1e-8) == Cell("≈ 0")
    assert cell(2e-6, (1e-6, 3e-6)).value == "0.000002"
    assert cell(1e-7, (-3e-5, 3e-5)) == Cell("0.000000", "[-0.000030, 0.000030]")
