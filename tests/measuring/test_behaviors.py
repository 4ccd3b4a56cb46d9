"""Behaviours: calls, formats, thinking and turn ends of hand-made answers, and what cannot be measured says so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import CHATML, make_model, make_tokenizer

from retain import measure
from retain.checks import Unchosen
from retain.cli.main import main
from retain.measuring.behaviors import (
    BEHAVIORS,
    PROMPT_SETS,
    behavior_prompts,
    behavior_sources,
    load_behavior,
    measure_behavior,
)
from retain.measuring.format_checks import CHECKS, kept_checks
from retain.measuring.generations import Written
from retain.measuring.thinking import reasoning_of
from retain.measuring.tokens import Options
from retain.measuring.tool_calls import Call, are_wanted_calls, fits_tools, tool_calls, written_calls
from retain.report.tables import BEHAVIOR_SCORERS

TOOLS_LINE = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
PLAIN = make_tokenizer()
CHAT = make_tokenizer()
CHAT.chat_template = CHATML
WITH_TOOLS = make_tokenizer()
WITH_TOOLS.chat_template = TOOLS_LINE + CHATML


def tool(name: str, *required: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY, DAYS = {"type": "string"}, {"type": "integer", "default": 1}
TOOLS = [tool("weather", "city", city=CITY, days=DAYS), tool("clock"), tool("lamp", "on", on={"type": "boolean"})]
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
WEATHER = Call("weather", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{OSLO}\n</tool_call>", [WEATHER]),
        (f"<tool_call>{OSLO}", [WEATHER]),
        (f"I look it up. <tool_call>{OSLO}</tool_call> One moment.", [WEATHER]),
        (f'<tool_call>{OSLO}</tool_call>\n<tool_call>{{"name": "clock", "arguments": {{}}}}</tool_call>',
         [WEATHER, Call("clock", {})]),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', [WEATHER]),
        ('<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}', [WEATHER]),
        (f"[TOOL_CALLS] [{OSLO}, {OSLO}]", [WEATHER, WEATHER]),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}', [WEATHER]),
        ('[TOOL_CALLS]weather[CALL_ID]a1B2[ARGS]{"city": "Oslo"}', [WEATHER]),
        (f"```json\n{OSLO}\n```", [WEATHER]),
        ('{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}', [WEATHER]),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Os', [None]),
        (f'<tool_call>{OSLO}</tool_call><tool_call>{{"name": "weather", "argum', [WEATHER, None]),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Os', [None]),
        ("<tool_call>weather(city='Oslo')</tool_call>", [None]),
        ('<tool_call>{"name": "weather"}</tool_call>', [None]),
        ('<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>', [None]),
        ("It is cold in Oslo.", []),
        ('In JSON: {"name": "Oslo", "degrees": 3} {', []),
        ("", []),
    ],
)  # fmt: skip
def test_the_calls_in_an_answer(text, calls):
    assert written_calls(text) == calls


def test_a_call_that_was_only_thought_of_is_none():
    assert tool_calls(f"<think>{OSLO}?</think>It is cold.", "", TOOLS, PLAIN) == []
    assert tool_calls(f"<think>So.</think>{OSLO}", "", TOOLS, PLAIN) == [WEATHER]


def test_a_tokenizer_that_says_how_its_model_calls_is_asked():
    own = make_tokenizer()
    own.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {"open_pattern": r"\s*CALL:(?P<name>\w+)", "close": ";", "repeats": True, "content": "json",
                           "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}},
            "content": {"content": "text"},
        },
    }  # fmt: skip
    start = "<|im_start|>assistant\n"
    assert tool_calls('Well. CALL:weather{"city": "Oslo"};', start, TOOLS, own) == [WEATHER]
    assert tool_calls(OSLO, start, TOOLS, own) == [], "its model does not call so"
    assert tool_calls('CALL:weather{"city": "Os', start, TOOLS, own) == [None]


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        (WEATHER, True),
        (Call("weather", {"city": "Oslo", "days": 3}), True),
        (Call("clock", {}), True),
        (Call("forecast", {"city": "Oslo"}), False),
        (Call("weather", {"city": 7}), False),
        (Call("weather", {"city": "Oslo", "days": "3"}), False),
        (Call("weather", {"days": 3}), False),
        (Call("weather", {"city": "Oslo", "wind": True}), False),
        (Call("lamp", {"on": "true"}), False),
        (None, False),
    ],
)
def test_a_valid_call_names_a_tool_and_keeps_its_schema(call, fits):
    assert fits_tools(call, TOOLS) == fits


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([WEATHER, Call("clock", {})], True),
        ([Call("clock", {}), Call("weather", {"city": " oslo", "days": 1.0})], True),
        ([WEATHER], False),
        ([WEATHER, Call("clock", {}), Call("clock", {})], False),
        ([Call("weather", {"city": "Rome"}), Call("clock", {})], False),
        ([Call("weather", {"city": "Oslo", "days": 2}), Call("clock", {})], False),
        ([WEATHER, None], False),
        ([], False),
    ],
)
def test_the_right_calls_are_those_wanted_in_any_order(calls, right):
    wanted = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "clock", "arguments": {}}]
    assert are_wanted_calls(calls, wanted, TOOLS) == right


YES_AND_NO = {
    "min_words": (3, "one two three", "one two"),
    "max_words": (2, "one two.", "one two three"),
    "paragraphs": (2, "A.\nB.\n\nC.", "A.\nB."),
    "bullets": (2, "Well:\n- a\n* b", "- a\n- b\n- c"),
    "numbered": (2, "1. a\n2) b", "1. a\n2 b"),
    "json": ({"type": "object", "required": ["a"]}, '```json\n{"a": 1}\n```', '{"b": 1}'),
    "script": ("cyrillic", "Привет, мир!", "Привет, world"),
    "keywords": (["rain", "snow"], "Rain, then snow.", "Rainy snow"),
    "forbidden": (["rain"], "A brainy rainbow.", "It is rain."),
    "without": (",!", "No more.", "No, more."),
    "case": ("lower", "all of 3 dogs.", "all of Them"),
    "starts_with": ("Dear", "dear you", "My dear"),
    "ends_with": ("The end", "This is the end", "the end."),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_says_yes_and_no(check):
    value, good, bad = YES_AND_NO[check]
    kind = CHECKS[check].kind
    assert CHECKS[check].takes(value)
    assert kept_checks(f" {good}\n", {check: value}) == {kind: True}
    assert kept_checks(bad, {check: value}) == {kind: False}
    assert kept_checks(" ", {check: value}) == {kind: False}, "an empty answer has no form"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 2]", True),
        ("```\n{}\n```", True),
        ("Here: {}", False),
        ('{"a": 1', False),
        ('{"a": NaN}', False),  # which Python reads
        ("-Infinity", False),
        ("", False),
        ("[" * 10**5, False),
    ],
)
def test_json_is_the_whole_answer(text, found):
    assert kept_checks(text, {"json": True}) == {"JSON": found}


@pytest.mark.parametrize(
    ("text", "prompt", "thought"),
    [
        ("It rains.", "", ""),
        ("<think>Hm.</think>It rains.", "", "Hm."),
        ("<think>\n\n</think>\n\nIt rains.", "", ""),
        ("Hm. It rains.</think>It rains.", "assistant\n<think>\n", "Hm. It rains."),
        ("</think>It rains.", "assistant\n<think>\n", ""),
        ("<think>Hm, I", "", "Hm, I"),
        ("Hm, I", "assistant\n<think>\n", "Hm, I"),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It rains.", "", "Hm."),
    ],
)
def test_what_was_thought(text, prompt, thought):
    assert reasoning_of(text, prompt) == thought


def written(*answers: str, ended: bool = True) -> list[Written]:
    return [Written(text, len(text), ended, False, text.rpartition("</think>")[2], text) for text in answers]


def measured(monkeypatch: pytest.MonkeyPatch, name: str, rows: list[dict], base: Any, tuned: Any) -> dict[str, Any]:
    """A behaviour of two models that answer so."""
    monkeypatch.setattr("retain.measuring.behaviors.both_texts", lambda *given: (base, tuned))
    (given,), notes = behavior_prompts({name: rows}, Options(WITH_TOOLS, 3, num_resamples=50))
    assert notes == []
    return measure_behavior(None, None, given)  # type: ignore[arg-type]


def shares(found: dict[str, Any]) -> dict[str, tuple[float, float, int, int]]:
    """By scorer the shares of base and tuned, and how many answers lost and gained it."""
    return {
        name: (of["base_rate"]["value"], of["rate"]["value"], of["counts"]["lost"], of["counts"]["gained"])
        for name, of in found["scorers"].items()
    }


def test_calls_are_paired_prompt_by_prompt(monkeypatch):
    wanted = [{"name": "weather", "arguments": {"city": "Oslo"}}]
    rows = [{"prompt": f"Cold in Oslo? {at}", "tools": TOOLS, "calls": wanted} for at in range(3)]
    rows.append({"prompt": "Who are you?", "tools": TOOLS, "calls": []})
    rome = OSLO.replace("Oslo", "Rome")
    base, tuned = written(OSLO, OSLO, rome, "I."), written(OSLO, rome, "module fox;", OSLO)
    found = measured(monkeypatch, "tools", rows, base, tuned)
    assert shares(found) == {
        "right": (2 / 3, 1 / 3, 1, 0), "valid": (1, 2 / 3, 1, 0), "abstains": (1, 0, 1, 0)
    }  # fmt: skip
    assert found["scorers"]["right"]["rate"]["num_prompts"] == 3, "where calls are wanted"
    assert found["scorers"]["abstains"]["rate"]["num_prompts"] == 1
    assert found["scorers"]["valid"]["mcnemar_p"] == 1.0
    fates = [one["fate"] for one in found["examples"]]
    assert fates[0] == {"abstains": "lost"}
    assert fates[1] == {"right": "lost", "valid": "kept"}


def test_formats_are_counted_by_kind_too(monkeypatch):
    rows = [{"prompt": "A", "checks": {"case": "upper", "max_words": 2}}, {"prompt": "B", "checks": {"max_words": 1}}]
    found = measured(monkeypatch, "formats", rows, written("GO ON", "Go"), written("go on", "Go on"))
    assert shares(found) == {
        "follows": (1, 0, 2, 0), "length": (1, 0.5, 1, 0), "case": (1, 0, 1, 0)
    }  # fmt: skip


def test_thinking_is_measured_where_both_think(monkeypatch):
    rows = [{"prompt": prompt} for prompt in "ABC"]
    base = written("<think>abc abc</think>A", "<think>abc</think>B", "<think>ab")
    base[2] = replace(base[2], answer="")
    tuned = written("<think>abc abc abc abc</think>A", "B", "C")
    found = measured(monkeypatch, "thinking", rows, base, tuned)
    assert shares(found) == {"thinks": (1, 1 / 3, 2, 0), "concludes": (2 / 3, 1 / 3, 1, 0)}
    cut = [len(PLAIN(text, add_special_tokens=False)["input_ids"]) for text in ("abc abc", "abc abc abc abc")]
    lengths = found["thinking"]
    assert [lengths[name]["value"] for name in ("base_length", "length", "length_change")] == [*cut, cut[1] - cut[0]]
    assert lengths["length"]["num_prompts"] == 1
    assert "1 of 3 texts of the base are reasoning that did not end" in found["notes"][0]
    assert measured(monkeypatch, "thinking", rows, tuned, written("A", "B", "C"))["thinking"] is None


def test_a_turn_ends_by_itself_and_not_in_silence(monkeypatch):
    rows = [{"prompt": prompt} for prompt in "ABC"]
    base = [*written("A", "B"), *written("C", ended=False)]
    found = measured(monkeypatch, "turn_ends", rows, base, [*written("A", ""), *written("C", ended=False)])
    assert shares(found) == {"ends": (2 / 3, 1 / 3, 1, 0)}


def test_what_a_template_cannot_put_is_left_out_and_said():
    given = {"tools": load_behavior("tools", max_prompts=2), "turn_ends": [{"prompt": "A"}]}
    options = Options(CHAT, 3)
    found, notes = behavior_prompts(given, options)
    assert [one.name for one in found] == ["turn_ends"]
    assert notes == ["tools is not measured: the chat template of this tokenizer does not support tools"]
    found, notes = behavior_prompts(given, replace(options, tokenizer=PLAIN))
    assert found == []
    assert notes == [f"{name} is not measured: this tokenizer has no chat template" for name in given]
    raises = make_tokenizer()
    raises.chat_template = "{{ raise_exception('no system here') }}"
    _, (note,) = behavior_prompts({"turn_ends": [{"prompt": "A"}]}, replace(options, tokenizer=raises))
    assert note == "turn_ends is not measured: no system here"


def test_prompts_come_with_retain():
    for name in BEHAVIORS:
        rows = load_behavior(name)
        assert len({json.dumps(row) for row in rows}) == len(rows) >= 40
        assert rows == [json.loads(line) for line in (PROMPT_SETS / f"{name}.jsonl").read_text("utf-8").splitlines()]
    for row in load_behavior("tools"):
        for call in row["calls"]:
            assert fits_tools(Call(**call), row["tools"]), row
    kinds = [{CHECKS[name].kind for name in row["checks"]} for row in load_behavior("formats")]
    assert all(sum(check.kind in of_row for of_row in kinds) >= 10 for check in CHECKS.values())
    assert BEHAVIOR_SCORERS.keys().isdisjoint(check.kind for check in CHECKS.values()), "else a kind is taken for one"
    drawn = load_behavior("formats", max_prompts=3, seed=1)
    assert len(drawn) == 3
    assert drawn == load_behavior("formats", max_prompts=3, seed=1)
    assert behavior_sources(["tools"]) == {"tools": str(PROMPT_SETS / "tools.jsonl")}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("formats", {"prompt": "A"}, "'checks' is missing; choose checks from min_words, "),
        ("formats", {"prompt": "A", "checks": {"rhymes": 2}}, "has the check 'rhymes' with 2; choose checks from"),
        ("formats", {"prompt": "A", "checks": {"max_words": "2"}}, "has the check 'max_words' with '2'"),
        ("formats", {"prompt": "A", "checks": {"script": "runic"}}, "has the check 'script' with 'runic'"),
        ("formats", {"prompt": "A", "checks": {"json": {"type": 7}}}, "has an invalid JSON schema: 7 is not"),
        ("formats", {"prompt": "A", "checks": {"forbidden": ["!"]}}, "has the check 'forbidden' with ['!']; choose"),
        ("formats", {"prompt": "A", "checks": {}}, "has no checks; choose checks from"),
        ("formats", {"prompt": " ", "checks": {"max_words": 2}}, "has no prompt; give prompt, a text"),
        ("tools", {"prompt": "A", "tools": "x", "calls": []}, "'tools' is \"x\", not a list; give tools as"),
        ("tools", {"prompt": "A", "tools": TOOLS, "calls": [{"name": "x", "arguments": {}}]}, "a call of 'x', which"),
    ],
)
def test_a_bad_row_is_refused_in_one_line(tmp_path, name, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="behaviors: row 1 of") as error:
        load_behavior(name, str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"behaviors: row 1 of {name}"):
        behavior_prompts({name: [row]}, Options(WITH_TOOLS, 3))


@pytest.mark.parametrize(
    ("specs", "message"),
    [(["poems"], "'poems' is not known; use tools, formats, thinking, turn_ends, or one of them as name=file"),
     (["formats="], "'formats=' is not known"), (["formats", "formats=x"], "'formats' is given twice")],
)  # fmt: skip
def test_other_behaviours_are_not_known(specs, message):
    with pytest.raises(ValueError, match="behaviors: ") as error:
        behavior_sources(specs)
    assert message in str(error.value)


def test_a_report_of_nothing_is_refused():
    rows = {"formats": [{"prompt": "fox", "checks": {"max_words": 9}}]}
    with pytest.raises(ValueError, match=r"^behaviors: formats is not measured: .* no chat template, and there is"):
        measure(make_model(), make_model(seed=1), {}, tokenizer=make_tokenizer(), behaviors=rows)


def test_the_command_line_measures_and_every_format_shows_it(tmp_path, capsys):
    for name, model in (("base", make_model()), ("tuned", make_model(seed=1))):
        model.save_pretrained(tmp_path / name)
        CHAT.save_pretrained(tmp_path / name)
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"prompt": f"<b>fox</b> {at}", "checks": {"max_words": 9}}) + "\n" for at in range(3))
    )
    arguments = ["--base", str(tmp_path / "base"), "--model", str(tmp_path / "tuned"), "--max_new_tokens", "4"]
    arguments += ["--behaviors", "tools", f"formats={tmp_path}/mine.jsonl", "--behaviors", "turn_ends"]
    assert main(["measure", *arguments, "--output_dir", str(tmp_path / "out"), "--max_prompts", "2"]) == 0
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: one["num_prompts"] for name, one in data["behaviors"].items()} == {"formats": 2, "turn_ends": 2}
    assert "tools is not measured: the chat template of this tokenizer does not support tools" in data["warnings"]
    page, markdown = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    for shown in (page, markdown, capsys.readouterr().out):
        for expected in ("formats, follows the format", "formats, by kind", "tools is not measured"):
            assert expected in shown
    assert "<b>fox" not in page


def test_answers_of_a_behaviour_are_longer_unless_their_length_was_chosen():
    base, tuned = make_model().eval(), make_model(seed=1).eval()
    rows = {"turn_ends": [{"prompt": "the fox"}]}
    report = measure(base, tuned, {}, tokenizer=CHAT, behaviors=rows, max_new_tokens=5)
    assert report.results.behaviors["turn_ends"].max_new_tokens == 5
    for chosen, expected in ((Unchosen(5), BEHAVIORS["turn_ends"].max_new_tokens), (5, 5)):
        (given,), _ = behavior_prompts(rows, Options(CHAT, 3, max_new_tokens=chosen))
        assert given.options.max_new_tokens == expected
    rows = {"formats": [{"prompt": "the fox", "checks": {"json": True}}]}  # by default twice as long as these models
    report = measure(base, tuned, {}, tokenizer=CHAT, behaviors=rows)
    (given,), _ = behavior_prompts(rows, Options(CHAT, 3))
    assert report.results.behaviors["formats"].max_new_tokens == 128 - len(given.prompts[0].tokens(CHAT, 3))
