"""Replay rows for other trainers: text that reads the same, chats of whole turns, and the tokens as drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CHATML, make_tokenizer, save_model
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from retain.cli.export import chat_frame, read_chat
from retain.cli.main import main
from retain.files import write_json
from retain.models.description import tokenizer_fingerprint
from retain.replay.dataset import MANIFEST, MANIFEST_SCHEMA, load_self_generated, write_shard


def chat_tokenizer():
    tokenizer = make_tokenizer(bos=None)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_model(folder / "model")
    sample = f"sample --model {folder}/model --output_dir {folder}/replay --num_rows 5 --max_length 24"
    assert main([*sample.split(), "--per_device_batch_size", "5"]) == 0
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pool(folder: Path, texts: list[str]) -> Path:
    """A finished dataset of rows that a chat model might have written, each begun inside a user's turn."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text("{}")
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32) for text in texts]
    given = np.full(len(ids), len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]))
    data = folder / "chat"
    data.mkdir()
    write_json(data / MANIFEST, {
        "schema": MANIFEST_SCHEMA, "model": str(folder / "model"),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "start_token": {"id": 0}, "num_rows": len(ids), "rows_per_shard": 64, "store_reference": None,
        "batch_size": 4, "model_fingerprint": "m", "sampler": {"engine": "torch", "dtype": "float32"},
    })  # fmt: skip
    column = np.empty(len(ids), dtype=object)
    column[:] = ids
    write_shard(data, 0, 0, {"input_ids": column, "prefix_length": given})
    return data


def test_text_is_what_follows_the_start_token(world, tmp_path, capsys):
    assert main(["export", f"{world}/replay", "--output", str(tmp_path / "rows.jsonl")]) == 0
    output = capsys.readouterr().out
    rows, tokenizer = load_self_generated(world / "replay"), make_tokenizer()
    found = rows_of(tmp_path / "rows.jsonl")
    assert [row["text"] for row in found] == [tokenizer.decode(rows[index][1:]) for index in range(5)]
    same = sum(tokenizer(row["text"])["input_ids"] == rows[at][1:].tolist() for at, row in enumerate(found))
    assert output.startswith("5 of 5 rows as text in ")
    assert output.endswith(f"{same} of them give the same tokens again\n")
    assert load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")["text"][0] == found[0]["text"]


def test_tokens_are_the_very_tokens(world, tmp_path):
    assert main(["export", f"{world}/replay", "--output", str(tmp_path / "rows.jsonl"), "--format", "tokens"]) == 0
    rows = load_self_generated(world / "replay")
    for at, row in enumerate(rows_of(tmp_path / "rows.jsonl")):
        assert row["input_ids"] == rows[at].tolist()
        assert row["labels"] == [-100, *row["input_ids"][1:]]
        assert row["attention_mask"] == [1] * 24


def test_messages_are_whole_turns(tmp_path, capsys):
    chat = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\na dog<|im_end|>\n"
    data = pool(tmp_path, [
        chat,
        chat + "<|im_start|>user\nold stone<|im_end|>\n<|im_start|>assistant\nrain<|im_end|>\nand",
        chat + "<|im_start|>user\nold stone<|im_end|>\n<|im_start|>assistant\nrain",  # cut short: one turn stays
        "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\na do",  # never answered
        "<|im_start|>user\nthe fox jumps over",
        "<|im_start|>user\nthe fox<|im_end|>\n<|im_end|>\n<|im_start|>assistant\na dog<|im_end|>\n",
    ])  # fmt: skip
    assert main(["export", str(data), "--output", str(tmp_path / "rows.jsonl"), "--format", "messages"]) == 0
    output = capsys.readouterr().out
    one = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]
    two = [*one, {"role": "user", "content": "old stone"}, {"role": "assistant", "content": "rain"}]
    assert rows_of(tmp_path / "rows.jsonl") == [{"messages": one}, {"messages": two}, {"messages": one}]
    assert output.endswith("3 hold no question with a complete answer\n")
    assert output.startswith("3 of 6 rows as messages in ")


@given(st.lists(st.text(alphabet="ab c\n", min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_a_chat_comes_back_as_it_was_written(contents):
    contents = contents[: len(contents) // 2 * 2]
    roles = ["user", "assistant"] * (len(contents) // 2)
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    tokenizer = chat_tokenizer()
    assert read_chat(tokenizer.apply_chat_template(chat, tokenize=False), chat_frame(tokenizer)) == chat


def test_documents_are_no_chats(world, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["export", f"{world}/replay", "--output", str(out), "--format", "messages"]) == 1
    assert "needs a chat template, and this tokenizer has none; use text" in capsys.readouterr().err
    data = pool(tmp_path, ["<|im_start|>user\nthe fox"])
    assert main(["export", str(data), "--output", str(out), "--format", "messages"]) == 1
    assert "no row of" in capsys.readouterr().err
    assert not out.exists()
