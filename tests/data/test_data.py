"""Rows in, token windows out: every form of input, and one line for every form of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CHATML, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retain.data.rows import (
    Document,
    check_chats,
    named_sources,
    prompt_text,
    read_rows,
    row_text,
    token_documents,
    tokenize_documents,
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, *rows: object) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_tokenizer(template=CHATML)


TURNS = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "old towns"}]


def tool_chat(name: str, **arguments: object) -> dict[str, object]:
    """A chat that calls a tool, with the tool's description."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    properties = {argument: {"type": type(value).__name__} for argument, value in arguments.items()}
    tool = {"name": name, "parameters": {"type": "object", "properties": properties, "required": [*arguments]}}
    turns = [TURNS[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": name, "content": "rain"}]
    return {"messages": [*turns, TURNS[1]], "tools": [{"type": "function", "function": tool}]}


# Rows


ONE_AND_TWO = "\n".join(json.dumps({"text": text}, indent=2) for text in ("one", "two"))
FILES = {
    "order.jsonl": ('\ufeff{"text": "one"}\r\n\r\n{"text": "two \u2028 lines"}', ["one", "two \u2028 lines"]),
    "list.json": ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
    "printed.json": (json.dumps({"text": "one", "more": {"a": [1, 2]}}, indent=2), ["one"]),
    "several.jsonl": (ONE_AND_TWO, ["one", "two"]),
    "several.json": (ONE_AND_TWO + "\n", ["one", "two"]),
    "blank lines.txt": (
        "\n\n  first line\nsecond\n \t\n\nthird\u2028still third\fand here\n",
        ["  first line\nsecond", "third\u2028still third\fand here"],
    ),
    "windows.txt": ("one\r\ntwo\r\n\r\nthree", ["one\ntwo", "three"]),
    "numbers.csv": ("text,label\n04,04\n05,05\n", ["04", "05"]),
    "choice.csv": ("text\ntrue\n", ["true"]),
}


@pytest.mark.parametrize("name", FILES)
def test_texts_are_read_as_they_stand_and_in_order(tmp_path, name):
    """Numbers of a CSV lost their zeros, and "true" became a choice."""
    content, texts = FILES[name]
    assert read_rows(write(tmp_path / name, content), "data")["text"] == texts


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.TXT", "a.CSV", "a.Parquet"])
def test_endings_may_be_in_capitals(tmp_path, name):
    from datasets import Dataset

    content = {".jsonl": '{"text": "one"}', ".json": '[{"text": "one"}]', ".txt": "one", ".csv": "text\none\n"}
    path = tmp_path / name
    if name == "a.Parquet":
        Dataset.from_dict({"text": ["one"]}).to_parquet(path)
    else:
        write(path, content[path.suffix.lower()])
    assert read_rows(str(path), "data")["text"] == ["one"]
    with pytest.raises(ValueError, match="no file"):
        read_rows(str(Path("nowhere") / name), "data")


def test_a_configuration_of_a_data_set_is_named_behind_a_colon(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)))
    read_rows("owner/name:wikitext-2-raw-v1", "data")
    read_rows("owner/name", "data", split="test")
    assert asked == [
        (("owner/name", "wikitext-2-raw-v1"), {"split": "train"}),
        (("owner/name", None), {"split": "test"}),
    ]


def test_texts_of_a_csv_may_be_quoted_and_long(tmp_path):
    """Line breaks in quotes were cut where a block of a megabyte ended."""
    source = write(tmp_path / "rows.csv", 'prompt,completion\n"1, 2",3\n')
    assert dict(read_rows(source, "data")[0]) == {"prompt": "1, 2", "completion": "3"}
    texts = [f"first line of {at}\n{'word ' * 90}\nlast line of {at}" for at in range(4000)]
    source = write(tmp_path / "long.csv", "text\n" + "".join(f'"{text}"\n' for text in texts))
    assert (tmp_path / "long.csv").stat().st_size > 1 << 20
    assert read_rows(source, "data")["text"] == texts


def test_a_column_that_the_first_row_lacks_is_not_dropped(tmp_path, tokenizer):
    """`Dataset.from_list` keeps only the first row's columns: completions would vanish in silence."""
    rows = read_rows(jsonl(tmp_path / "a.jsonl", {"prompt": "p "}, {"prompt": "q ", "completion": "answer"}), "data")
    assert row_text(rows[1], tokenizer) == "q answer"


def test_what_a_row_holds_does_not_depend_on_its_neighbours(tmp_path):
    """Arrow gives all rows the keys of all others, as nulls: the tools that one row calls stood in every text."""
    rows = [tool_chat("weather", city="Paris"), tool_chat("time", zone=3, exact=True), {"messages": TURNS}]
    found = read_rows(jsonl(tmp_path / "calls.jsonl", *rows), "data")
    assert [{name: value for name, value in row.items() if value is not None} for row in found] == rows


BAD_FILES = {
    "malformed.jsonl": ('{"text": "a"}\n\n{"text": \n', r"line 3 is not JSON \(.*\); correct or delete it"),
    "number.jsonl": ('{"text": "a"}\n3\n', "line 2 is not an object"),
    "torn.json": ('{\n"text": "one"\n}\n{\n"text": }', r"line 4 is not JSON \(Expecting value: line 5"),
    "deep.jsonl": ("[" * 100_000, "line 1 is not JSON"),
    "deep.json": ("[" * 100_000, "is not JSON"),
    "list.json": ("[1, 2]", "is not an object"),
    "list.jsonl": ('[{"text": "a"}]', "line 1 is not an object; .* or end the file's name in .json"),
    "broken.json": ('[{"text": "a"}', "is not JSON"),
    "empty.jsonl": ("", "is empty"),
    "blank.txt": ("\n \n\n", "is empty"),
    "header.csv": ("text\n", "is empty"),
    "mixed.jsonl": ('{"text": "a"}\n{"text": {"b": 1}}\n', r"one schema \(.*\); give each column values of one type"),
    "latin.txt": ("café".encode("latin-1"), "not UTF-8 at byte 3"),
    "latin.jsonl": ('{"text": "café"}'.encode("latin-1"), "not UTF-8 at byte 13"),
    "torn.parquet": (b"PAR1 and no more", r"cannot read .* \(.*\); write it again"),
    "ragged.csv": ("a,b\n1\n", "cannot read"),
    "rows.xlsx": ("x", "unknown ending"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(name, tmp_path):
    content, expected = BAD_FILES[name]
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_rows(source, "data")
    assert str(caught.value).startswith("data: ")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/nowhere/else", "~/missing.txt"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(ValueError, match="no file .*check the path"):
        read_rows(source, "data")


# Text of a row


def test_row_text_of_every_form(chat_tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert row_text({"text": "as it is"}, chat_tokenizer) == "as it is"
    assert row_text({"messages": messages}, chat_tokenizer) == chat
    assert row_text({"prompt": messages[:1], "completion": messages[1:]}, chat_tokenizer) == chat
    assert row_text({"prompt": "1 + 1 =", "completion": " 2"}, chat_tokenizer) == "1 + 1 = 2"
    assert row_text({"prompt": "only"}, chat_tokenizer) == "only"
    assert row_text({"text": "a", "prompt": "b"}, chat_tokenizer) == "a"


@pytest.mark.parametrize(
    "row",
    [{"content": "a"}, {"text": 3}, {"text": None}, {"prompt": "a", "completion": 2}, {"prompt": [], "completion": ""}],
)
def test_a_row_without_text_is_refused(row, tokenizer):
    with pytest.raises(ValueError, match="it needs text, messages, or prompt and completion"):
        row_text(row, tokenizer)


def test_messages_need_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="need a chat template"):
        row_text({"messages": [{"role": "user", "content": "hi"}]}, tokenizer)


STRICT = "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('who?') }}{% endif %}"
STRICT += "{{ m.content }}{% endfor %}"


def chats(*orders: str) -> list[dict[str, object]]:
    """A chat for each order of roles."""
    return [{"messages": [{"role": role, "content": "the fox"} for role in order.split()]} for order in orders]


def test_a_chat_that_the_template_refuses_is_named_with_its_row(monkeypatch):
    """`retain finetune: who?` was all that it said, after the replay rows had been sampled."""
    strict = make_tokenizer(template=STRICT)
    check_chats(chats("user assistant", "user assistant user"), strict, "rows")
    with pytest.raises(ValueError, match=r"row 2 of the rows: .* refuses a chat of user, bot \(who\?\);"):
        check_chats(chats("user assistant", "user bot"), strict, "rows")
    with pytest.raises(ValueError, match=r"row 1 of the rows: messages \[\] are not turns"):
        check_chats(chats("", "user bot"), strict, "rows")  # as if it held no chats, it ended the check
    check_chats([{"text": "as it is"}], strict, "rows")
    monkeypatch.setattr("retain.data.rows.CHECKED_CHATS", 1)
    check_chats(chats("user assistant", "user bot"), strict, "rows")  # of millions only the first are read


def test_a_role_that_a_template_writes_but_does_not_name_is_warned_of(chat_tokenizer, caplog):
    check_chats(chats("system user assistant", "user bot", "user bot bot"), chat_tokenizer, "rows")
    assert [record.getMessage().split(", which")[0] for record in caplog.records] == [
        "data: row 2 of the rows has the role 'bot'"
    ]
    caplog.clear()
    check_chats(chats("user bot"), make_tokenizer(template=CHATML + "{# bot #}"), "rows")
    assert not caplog.records


# Windows


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=60), max_size=4), max_length=st.integers(2, 20))
def test_windows_hold_the_whole_text_and_begin_with_the_start_token(tokenizer, texts, max_length):
    documents = tokenize_documents(texts, tokenizer, start_id=3, max_length=max_length)
    kept = [text for text in texts if text]
    assert len(documents) == len(kept)
    for document, text in zip(documents, kept, strict=True):
        assert all(window[0] == 3 and 2 <= len(window) <= max_length for window in document.windows)
        assert all(len(window) == max_length for window in document.windows[:-1])
        ids = [token for window in document.windows for token in window[1:]]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert document.num_tokens == len(ids)
        assert document.num_bytes == len(text.encode())


def test_only_so_many_windows_are_kept_and_their_bytes_counted(tokenizer):
    text = "the quick brown fox jumps over a lazy dog"
    ids = tokenizer(text)["input_ids"]
    (document,) = tokenize_documents([text], tokenizer, start_id=3, max_length=4, max_windows=2)
    assert document.windows == [[3, *ids[:3]], [3, *ids[3:6]]]
    assert document.num_bytes == len(tokenizer.decode(ids[:6]))


def test_rows_of_tokens_are_documents_as_they_are(tokenizer):
    ids = tokenizer("seven bright birds")["input_ids"]
    assert token_documents([[3, *ids]], tokenizer) == [Document([[3, *ids]], len("seven bright birds"))]
    (opened,) = token_documents([[3, *ids]], tokenizer, np.array([2]))
    rest = len(tokenizer.decode(ids[1:]))
    mask = [False, False, *[True] * (len(ids) - 1)]
    assert (opened.masks, opened.num_tokens, opened.num_bytes) == ([mask], len(ids) - 1, rest)


# Names


def test_a_path_may_hold_an_equals_sign():
    assert named_sources(["code=b=c.txt"], "retention") == {"code": "b=c.txt"}


@pytest.mark.parametrize("spec", ["wiki.txt", "=wiki.txt", "wiki=", " = "])
def test_a_source_without_name_or_file_is_refused(spec):
    with pytest.raises(
        ValueError, match=r"retention: .* is not name=file; write e\.g\. --retention wiki=wiki(\.txt)?$"
    ):
        named_sources([spec], "retention")


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValueError, match="'wiki' is given twice"):
        named_sources(["wiki=a", "wiki=b"], "retention")


def test_a_prompt_stops_where_the_answer_begins(chat_tokenizer):
    tokenizer = chat_tokenizer
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    opened = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text({"messages": [question]}, tokenizer) == opened
    assert prompt_text({"messages": [question, answer]}, tokenizer) == opened
    assert prompt_text({"prompt": [question], "completion": [answer]}, tokenizer) == opened
    assert prompt_text({"prompt": "x = ", "completion": "1"}, tokenizer) == "x = "
    assert prompt_text({"text": "once upon"}, tokenizer) == "once upon"
    with pytest.raises(ValueError, match="it needs text, messages"):
        prompt_text({"question": "?"}, tokenizer)
