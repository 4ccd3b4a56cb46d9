"""The report: hostile strings stay harmless, comparisons agree with numbers worked out by hand, files are whole."""

from __future__ import annotations

import html.parser
import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retain import files, plots, report
from retain.capabilities.answers import compare_answers, share_entry
from retain.comparison import compare_at_matched_loss, crossing, run_verdict
from retain.report import ForgettingReport, comparison_html, comparison_markdown, comparison_summary
from retain.text import visible

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


@pytest.fixture
def plain() -> dict[str, Any]:
    return run("plain", [4.0, 3.0, 2.0], [0.0, 0.2, 0.6])


@pytest.fixture
def replay() -> dict[str, Any]:
    return run("replay", [4.0, 3.5, 2.5], [0.0, 0.02, 0.04])


# --- comparison at matched new-task loss -----------------------------------------------------------------------


def test_matched_loss_by_hand(plain: dict, replay: dict) -> None:
    """`replay` gets to 2.5 only; `plain` crosses 2.5 halfway between steps 10 and 20, at ref_kl (.2 + .6) / 2."""
    compared = compare_at_matched_loss([plain, replay])
    assert compared["matched_loss"] == 2.5
    assert [entry["matched_step"] for entry in compared["runs"]] == [15.0, 20.0]
    first, second = compared["matched"]["wiki"]
    assert first["ref_kl"] == pytest.approx(0.4)
    assert first["forgetting"] == pytest.approx(0.2)
    assert (first["prevented"], first["note"]) == (None, None)
    assert second["ref_kl"] == pytest.approx(0.04)
    assert second["prevented"] == pytest.approx(0.9)
    end = compared["end"]["wiki"]
    assert [entry["ref_kl"] for entry in end] == pytest.approx([0.6, 0.04])
    assert end[1]["prevented"] == pytest.approx(1 - 0.04 / 0.6)
    assert compared["runs"][1]["relative_loss_difference"] == pytest.approx(2.5 / 2.0 - 1)


def test_paired_interval_has_no_width_where_every_document_agrees(plain: dict, replay: dict) -> None:
    """Documents differ among themselves, but each loses nine tenths: resampling them cannot change the share."""
    weights = (1.0, 5.0, 2.0, 9.0)
    runs = [run("plain", [4, 3, 2], [0, 0.2, 0.6], weights), run("replay", [4, 3.5, 2.5], [0, 0.02, 0.04], weights)]
    first, second = compare_at_matched_loss(runs)["matched"]["wiki"]
    assert second["prevented_ci"] == pytest.approx([0.9, 0.9])
    assert first["ref_kl_ci"][0] < 0.39 < 0.41 < first["ref_kl_ci"][1]


@pytest.mark.parametrize("loss", [1.9, 2.1, 2.3, 2.7, 2.9, 3.1])
def test_rounding_of_the_place_between_two_evaluations_costs_no_interval(loss: float) -> None:
    runs = [run("plain", [4.0, 3.3, 1.7], [0.0, 0.2, 0.6]), run("replay", [4.0, 3.7, loss], [0.0, 0.02, 0.04])]
    assert compare_at_matched_loss(runs)["matched"]["wiki"][1]["prevented_ci"] is not None


def test_interval_is_seeded_contains_the_value_and_stays_between_the_documents(plain: dict) -> None:
    other = run("replay", [4.0, 3.5, 2.5], [0.0, 0.02, 0.04], (1.0, 2.0, 3.0, 4.0))
    entry = compare_at_matched_loss([plain, other], seed=3)["matched"]["wiki"][1]
    low, high = entry["prevented_ci"]
    assert low < entry["prevented"] < high
    shares = np.array([1.0, 2.0, 3.0, 4.0]) / np.average([1, 2, 3, 4], weights=TOKENS) * 0.1
    assert 1 - shares.max() <= low < high <= 1 - shares.min()
    assert compare_at_matched_loss([plain, other], seed=3)["matched"]["wiki"][1]["prevented_ci"] == [low, high]


def test_crossing() -> None:
    assert crossing([0, 10], [4.0, 2.0], 3.5) == 2.5
    assert crossing([0, 10, 20, 30], [4, 2, 4, 2], 3) == 5.0, "the first of several crossings"
    assert crossing([0, 10], [4.0, 3.0], 2.0) is None, "never came down"
    assert crossing([10, 20], [2.0, 1.0], 3.0) is None, "nobody saw it come down"
    assert crossing([0, 10], [4.0, 3.0], 4.0) == 0.0
    assert crossing([], [], 4.0) is None


def test_without_trajectory_only_the_ends_are_compared_and_it_says_so(plain: dict, replay: dict) -> None:
    replay["trajectory"] = []
    compared = compare_at_matched_loss([plain, replay])
    assert compared["matched_loss"] is None
    assert compared["matched"] == {}
    assert "replay" in compared["reason"]
    assert compared["end"]["wiki"][1]["ref_kl"] == 0.123, "falls back to what `retain measure` found"
    assert compared["end"]["wiki"][1]["ref_kl_ci"] == [0.101, 0.147]
    assert compared["runs"][1]["final_loss"] == 2.777
    assert "No comparison at the same new-task loss" in comparison_summary([plain, replay])
    assert "No comparison at the same new-task loss" in comparison_html([plain, replay], title="t")


@pytest.mark.parametrize(
    ("losses", "why"),
    [([4.0, 4.2, 4.1], "other did not learn"), ([1.9, 1.8, 1.7], "other was already below the common loss 2.000")],
)
def test_no_matched_loss_where_a_run_gives_none(plain: dict, losses: list[float], why: str) -> None:
    compared = compare_at_matched_loss([plain, run("other", losses, [0.0, 0.1, 0.2])])
    assert compared["matched_loss"] is None
    assert compared["matched"] == {}
    assert why in compared["reason"]
    assert compared["end"]["wiki"][1]["prevented"] == pytest.approx(1 - 0.2 / 0.6)


def test_prevented_is_undefined_where_the_plain_run_did_not_move(replay: dict) -> None:
    still = run("plain", [4.0, 3.0, 2.0], [0.0, 0.0, 0.0])
    entry = compare_at_matched_loss([still, replay])["matched"]["wiki"][1]
    assert (entry["prevented"], entry["prevented_ci"]) == (None, None)
    assert "noise floor" in entry["note"]
    assert "cannot be judged on wiki" in comparison_summary([still, replay])


def test_prevented_is_undefined_below_a_measured_noise_floor(plain: dict, replay: dict) -> None:
    plain["noise_floor"]["wiki"]["ref_kl"] = measured(0.4, 0.3, 0.5)
    assert compare_at_matched_loss([plain, replay])["matched"]["wiki"][1]["prevented"] is None


def test_no_interval_without_the_same_documents(plain: dict, replay: dict) -> None:
    for row in replay["documents"]:
        row["num_tokens"] = [50, 250, 100, 200]
    entry = compare_at_matched_loss([plain, replay])["matched"]["wiki"][1]
    assert entry["prevented"] == pytest.approx(0.9)
    assert entry["prevented_ci"] is None
    assert "different documents" in entry["note"]
    replay["documents"] = []
    entry = compare_at_matched_loss([plain, replay])["matched"]["wiki"][1]
    assert (entry["prevented_ci"], entry["ref_kl_ci"]) == (None, None)
    assert "no values per document" in entry["note"]


def test_one_document_gives_no_interval(plain: dict, replay: dict) -> None:
    for row in plain["documents"] + replay["documents"]:
        row |= {key: value[:1] for key, value in row.items() if isinstance(value, list)}
    entry = compare_at_matched_loss([plain, replay])["matched"]["wiki"][1]
    assert entry["prevented_ci"] is None
    assert "too few" in entry["note"]


def test_runs_of_different_bases_are_refused(plain: dict, replay: dict) -> None:
    replay["base"]["fingerprint"] = "another"
    with pytest.raises(ValueError, match=r"base\.fingerprint"):
        compare_at_matched_loss([plain, replay])


def test_rows_without_finite_numbers_are_left_out(plain: dict, replay: dict) -> None:
    plain["trajectory"] += [{"step": 30, "eval_loss": math.nan}, {"step": 40, "eval_loss": None}]
    assert compare_at_matched_loss([plain, replay])["matched_loss"] == 2.5


# --- verdicts --------------------------------------------------------------------------------------------------


def test_verdict_says_what_the_interval_allows(plain: dict) -> None:
    verdict = ForgettingReport(plain).verdict
    assert verdict.startswith("Forgetting shown: “plain” moved from its base by 0.123 [0.101, 0.147] nats/token")
    assert "its loss rose by 0.061 [0.052, 0.073] nats/token on wiki" in verdict
    assert "it learned 0.743 [0.711, 0.789] nats/token on verilog." in verdict
    assert "noise floor 0.000" in verdict


@pytest.mark.parametrize(
    ("forgetting", "ref_kl", "start"),
    [
        (measured(0.01, -0.01, 0.03), measured(0.1, 0.08, 0.12), "Changed, but no forgetting shown: "),
        (measured(-0.05, -0.07, -0.03), measured(0.1, 0.08, 0.12), "Changed, and the loss fell: "),
        (measured(0.0, -0.01, 0.01), measured(0.0, 0.0, 0.0), "No change shown: "),
        ({"value": 0.3, "ci": [None, None]}, {"value": 0.3, "ci": [None, None]}, "Not decided, for lack of"),
    ],
)
def test_verdict_of_every_state(plain: dict, forgetting: dict, ref_kl: dict, start: str) -> None:
    plain["retention"]["wiki"] |= {"forgetting": forgetting, "ref_kl": ref_kl}
    assert run_verdict(plain).startswith(start)


def test_verdict_is_held_against_the_noise_floor(plain: dict) -> None:
    plain["noise_floor"]["wiki"] = {"ref_kl": measured(0.1, 0.0, 0.2), "forgetting": measured(0.0, -0.1, 0.1)}
    assert run_verdict(plain).startswith("No change shown")


def test_verdict_with_several_texts_and_with_none(plain: dict) -> None:
    plain["retention"]["code"] = {"forgetting": measured(0.0, -0.01, 0.01), "ref_kl": measured(0.0, 0.0, 0.0)}
    assert run_verdict(plain).startswith("Forgetting shown on wiki; no change shown on code: ")
    assert "no noise floor" in run_verdict(plain)
    plain |= {"retention": {}, "new_task": {}}
    assert run_verdict(plain) == "Forgetting was not measured: “plain”."


def test_comparison_verdict(plain: dict, replay: dict) -> None:
    summary = comparison_summary([plain, replay])
    assert summary.startswith("At the same new-task loss (2.500 nats/token), compared with “plain”, “replay” moved")
    assert "90% less on wiki (95% interval 90% to 90%; ref_kl 0.040 against 0.400)" in summary
    worse = comparison_summary([replay, plain])
    assert "900% more on wiki" in worse


# --- the three formats -----------------------------------------------------------------------------------------


def test_every_format_carries_values_and_intervals(plain: dict, replay: dict, tmp_path: Path) -> None:
    ForgettingReport(plain).write(tmp_path)
    texts = [(tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md")]
    for text in [*texts, ForgettingReport(plain).summary(), report.model_card_section(plain)]:
        for expected in ("0.061", "[0.052, 0.073]", "0.123", "[0.101, 0.147]", "91.3%", "[88.4%, 93.7%]", "0.743"):
            assert expected in text
    report.write_comparison(tmp_path, [plain, replay], "both", ["a note"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("html", "md"):
        text = (tmp_path / f"report.{kind}").read_text(encoding="utf-8")
        assert all(expected in text for expected in ("2.500", "0.400", "90.0%", "[90.0%, 90.0%]", "a note", "+25.0%"))
    whole = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in whole["runs"]] == ["plain", "replay"]
    assert whole["comparison"] == compare_at_matched_loss([plain, replay])


def test_json_round_trip(plain: dict, tmp_path: Path) -> None:
    ForgettingReport(plain).to_json(tmp_path / "report.json")
    assert ForgettingReport.from_json(tmp_path / "report.json") == ForgettingReport(plain)
    plain["retention"]["wiki"]["loss"]["value"] = math.nan
    ForgettingReport(plain).to_json(tmp_path / "report.json")
    data = ForgettingReport.from_json(tmp_path / "report.json").data
    assert data["retention"]["wiki"]["loss"]["value"] is None, "NaN is not JSON"
    assert ForgettingReport(data).summary()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    for content in ('{"schema": "other/1"}', "[]"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match="retain measure"):
            ForgettingReport.from_json(tmp_path / "x.json")


def test_least_possible_report() -> None:
    data = {"schema": "retain.report/1", "name": "bare", "base": {"model": "m"}, "retention": {}}
    for text in (ForgettingReport(data).summary(), comparison_html([data], title="t"), report.model_card_section(data)):
        assert "not measured" in text
    assert "bare" in comparison_markdown([data, data | {"name": "other"}], title="t")


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
    "\x1b[31m\x07 \u202eevil \ud800 \x00\r\n# _*"
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


def test_hostile_strings_are_harmless_in_html(plain: dict, replay: dict) -> None:
    runs = [hostile_run(plain), hostile_run(replay)]
    page = comparison_html(runs, title=HOSTILE, notes=[HOSTILE])
    assert "alert(1)" in page, "shown, as text"
    parser = Tags()
    parser.feed(page)
    tags = {tag for tag, _ in parser.found}
    assert "svg" in tags
    assert not tags & {"script", "img", "iframe", "object", "a", "link", "form"}
    for _, attributes in parser.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(value is None or value.startswith("#") for name, value in attributes.items() if "href" in name)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert "\\u202e" in page, "an override is seen, not obeyed"


def test_page_asks_nobody_for_anything(plain: dict, replay: dict) -> None:
    page = comparison_html([plain, replay], title="t")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert set(re.findall(r"https?://[^\"'\s<)]+", page)) <= set(namespaces)
    assert "@import" not in page


def test_hostile_strings_are_harmless_in_terminal_and_markdown(plain: dict, replay: dict, tmp_path: Path) -> None:
    runs = [hostile_run(plain), hostile_run(replay)]
    for text in (comparison_summary(runs), ForgettingReport(runs[0]).summary(), ForgettingReport(runs[0]).verdict):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    for text in (comparison_markdown(runs, title=HOSTILE, notes=[HOSTILE]), report.model_card_section(runs[0])):
        assert not re.search(r"<(?!br>)", text)
        assert "\x1b" not in text
        assert "](javascript" not in re.sub(r"\\.", "", text)
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| **")]
        assert len(set(widths)) <= 2, "no cell breaks out of its column"
    report.write_comparison(tmp_path, runs, HOSTILE, [HOSTILE])
    ForgettingReport(runs[0]).write(tmp_path / "one")
    assert ForgettingReport.from_json(tmp_path / "one" / "report.json").data == json.loads(json.dumps(runs[0]))


def test_visible_keeps_what_is_ordinary() -> None:
    for text in ("naïve 漢字 🙂 “x” −1", "می\u200cخواهم", "👩\u200d🔬", "a\u00a0b"):
        assert visible(text) == text
    assert visible("a\nb") == "a\\nb", "a name is one line"
    assert visible({"prompt": "a\n\tb\x1b"}) == {"prompt": "a\n\tb\\x1b"}


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
    page, text = comparison_html([plain, replay], title="t"), comparison_markdown([plain], title="t")
    summary, card = comparison_summary([plain]), report.model_card_section(plain)
    for shown in (page, text, summary, card):
        assert shown.index("same answer as the base") < shown.index("accuracy, change")
        assert "50.0%" in shown
        assert "[15.0%, 85.0%]" in shown
        assert "4 questions, choice_style text, without a chat template" in shown
    assert "“plain” answers 50.0% [15.0%, 85.0%] of 4 questions of arc (acc) as its base did; no change of" in summary
    assert "Forgetting shown: “plain” moved" in summary, "beside what was found on the texts"
    assert "plain: questions of arc that it lost" in page
    assert "same answer as the base" not in comparison_html([replay], title="t")


def test_a_report_on_questions_alone_speaks_of_nothing_else(plain: dict) -> None:
    plain |= {"retention": {}, "new_task": {}, "noise_floor": {}, "trajectory": [], "choices": asked()}
    page = comparison_html([plain], title="t")
    for shown in (comparison_summary([plain]), comparison_markdown([plain], title="t"), page):
        assert "not measured" not in shown
        assert "What was learned" not in shown
    assert ForgettingReport(plain).verdict.startswith("“plain” answers 50.0%")


def test_hostile_questions_are_harmless(plain: dict, replay: dict) -> None:
    runs = [hostile_run(run | {"choices": asked()}) for run in (plain, replay)]
    for run in runs:
        run["choices"][f"arc{HOSTILE}"] = run["choices"].pop("arc") | {"notes": [HOSTILE]}
    page = comparison_html(runs, title="t")
    assert "Why?" in page
    parser = Tags()
    parser.feed(page)
    assert not {tag for tag, _ in parser.found} & {"script", "img", "iframe", "object", "a", "link", "form"}
    for shown in (
        page,
        comparison_markdown(runs, title="t"),
        comparison_summary(runs),
        ForgettingReport(runs[0]).verdict,
    ):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    text = comparison_markdown(runs, title="t")
    assert not re.search(r"<(?!br>)", text)


# --- differences and figures -----------------------------------------------------------------------------------


def test_differences_are_marked_and_nothing_is_lost() -> None:
    base, tuned = "The cat sat  on the mat.\nEnd", "The dog ran  on the mat!\nEnd"
    pieces = report.differences(base, tuned)
    assert "".join(text for _, text in pieces) == tuned
    assert [text for changed, text in pieces if changed] == ["dog ran", "!"]
    assert report.differences(base, base) == [(False, base)]
    assert report.differences(base, "") == []
    assert report.differences("", "new") == [(True, "new")]
    assert report.differences("x", "y " * 2000) == [(False, "y " * 2000)]


def test_figures_take_their_colours_from_the_page_and_have_ids_of_their_own(plain: dict, replay: dict) -> None:
    drawn = plots.report_figures([plain, replay], 2.5)
    assert [kind for kind, _, _ in drawn] == ["frontier", "interval", "interval", "curve", "curve"]
    pictures = [plots.to_svg(figure, words) for _, words, figure in drawn]
    assert all(picture.startswith("<svg") and "currentColor" in picture for picture in pictures)
    assert "var(--run-1, #c2571a)" in pictures[0]
    ids = [name for picture in pictures for name in set(re.findall(r'\bid="([^"]+)"', picture))]
    assert len(ids) == len(set(ids))
    assert pictures[0] == plots.to_svg(drawn[0][2], drawn[0][1]), "the same data give the same bytes"


def test_a_figure_as_png(plain: dict, tmp_path: Path) -> None:
    figure = plots.curves([{"name": "_hidden $x$ 漢", "x": [0, 1], "y": [1.0, 2.0]}], title="t", ylabel="nats")
    plots.save_png(figure, tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
