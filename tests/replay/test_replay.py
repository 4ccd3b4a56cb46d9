"""The replay dataset on disk: written whole or not at all, refused when torn, unfinished, foreign; and its stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from retain.files import append_jsonl, atomic_path, read_jsonl, write_json
from retain.models.description import tokenizer_fingerprint
from retain.replay.dataset import (
    MANIFEST,
    MANIFEST_SCHEMA,
    ReplayDataset,
    load_replay_dataset,
    load_self_generated,
    load_texts,
    read_manifest,
    replace_rows,
    replay_indices,
    shard_path,
    verify_replay,
    write_shard,
)

ROWS = np.arange(5 * 8, dtype=np.int32).reshape(5, 8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished dataset of five rows in shards of two."""
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "model": "tiny",
        "model_fingerprint": "m" * 16,
        "tokenizer_fingerprint": "t" * 16,
        "num_rows": 5,
        "rows_per_shard": 2,
        "batch_size": 2,
        "start_token": {"id": 3},
        "sampler": {"engine": "torch", "dtype": "float32"},
    }
    write_json(tmp_path / MANIFEST, manifest)
    for shard in range(3):
        rows = ROWS[2 * shard : 2 * shard + 2]
        write_shard(tmp_path, shard, 2 * shard, {"input_ids": rows, "prefix_length": np.ones(len(rows), np.int32)})
    return tmp_path


def change_manifest(folder: Path, **changes: object) -> None:
    write_json(folder / MANIFEST, json.loads((folder / MANIFEST).read_text()) | changes)


# Files


def test_rows_and_manifest_come_back_as_they_were_written(folder):
    data = load_self_generated(folder)
    assert len(data) == 5
    assert np.array_equal(np.stack([data[i] for i in range(5)]), ROWS)
    assert data.manifest == read_manifest(folder)
    assert data.num_predictions.tolist() == [7] * 5


def test_other_libraries_can_read_the_shards(folder):
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(folder / "shard-*.parquet"), split="train", cache_dir=folder / "c")
    assert data["row"] == list(range(5))
    assert data["input_ids"] == ROWS.tolist()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    (tmp_path / "a.json").write_text("old")

    def write_half() -> None:
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("half of the n")
            assert (tmp_path / "a.json").read_text() == "old"
            raise error

    with pytest.raises(error):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
    with atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "new"


def test_what_cannot_be_written_as_json_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_log_are_read_up_to_the_one_a_killed_process_was_writing(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_jsonl(path) == []
    append_jsonl(path, {"step": 1, "text": "a\u2028b"})
    append_jsonl(path, {"step": 2})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


def torn(folder: Path) -> None:
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-20])


DAMAGE = {
    "torn shard": (torn, "shard-00001.parquet' is damaged; delete it and run the same `retain sample`"),
    "missing shard": (lambda folder: shard_path(folder, 1).unlink(), "holds 3 of 5 rows; finish it with the same"),
    "no shards yet": (lambda folder: [path.unlink() for path in folder.glob("*.parquet")], "holds 0 of 5 rows"),
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json; create the rows with"),
    "torn manifest": (lambda folder: (folder / MANIFEST).write_text('{"sche'), "manifest.json' (not JSON: Unterm"),
    "binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json' (not JSON: 'utf"),
    "another schema": (lambda folder: change_manifest(folder, schema="retain.replay/9"), "schema 'retain.replay/9'"),
    "not an object": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        "is damaged: it is [], not an object; sample again",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_dataset_is_refused_in_one_line(case, folder, tokenizer):
    damage, expected = DAMAGE[case]
    damage(folder)
    with pytest.raises(ValueError, match="^replay_dataset: ") as caught:
        load_replay_dataset(str(folder), tokenizer, 3, 16)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shards_of_another_column_are_refused(folder, tokenizer):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(shard_path(folder, 0))
    with pytest.raises(ValueError, match="replay_dataset: .*shard-00000.* is damaged"):
        load_replay_dataset(str(folder), tokenizer, 3, 16)


# Real text


def test_real_text_is_cut_into_rows_that_begin_with_the_start_token(tmp_path, tokenizer):
    texts = make_texts(3)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    data = load_replay_dataset(str(tmp_path / "a.txt"), tokenizer, 3, 10)
    assert data.manifest is None
    assert all(row[0] == 3 and len(row) <= 10 for row in (data[i] for i in range(len(data))))
    ids = [token for i in range(len(data)) for token in data[i][1:].tolist()]
    assert ids == [token for text in texts for token in tokenizer(text)["input_ids"]]


def test_text_of_no_token_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="has no text; give rows with at least one token"):
        load_replay_dataset(str(tmp_path / "a.jsonl"), tokenizer, 3, 10)


def test_texts_are_no_rows_of_another_tokenizer(folder, tokenizer):
    """Their ids were measured as the other words that they are here."""
    with pytest.raises(ValueError, match="^retention: the rows of .* were written with another tokenizer .*; sample r"):
        load_texts(str(folder), tokenizer, field="retention")
    assert len(load_texts(str(folder), tokenizer, any_tokenizer=True)) == 5


def test_retention_texts_come_from_a_file_or_from_sampled_rows(folder, tokenizer, monkeypatch):
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, manifest | {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)})
    (folder / "a.txt").write_text("one\n\ntwo\n\nthree")
    assert [text.words for text in load_texts(str(folder / "a.txt"), tokenizer)] == ["one", "two", "three"]
    assert [text.words for text in load_texts(str(folder / "a.txt"), tokenizer, 2)] == ["one", "two"]
    documents = load_texts(str(folder), tokenizer, 2)
    assert [document.windows for document in documents] == [[ROWS[0].tolist()], [ROWS[1].tolist()]]
    assert len(load_texts(str(folder), tokenizer, 99)) == 5
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_texts(f"~/{folder.name}", tokenizer)) == 5


# Batches


def test_rows_of_one_length_need_no_mask():
    batch = ReplayDataset.from_rows(list(ROWS), "x").batch([4, 0])
    assert list(batch) == ["input_ids", "labels"]
    assert batch["labels"].tolist() == [[-100, *ROWS[4][1:].tolist()], [-100, *ROWS[0][1:].tolist()]]
    assert batch["input_ids"].tolist() == [ROWS[4].tolist(), ROWS[0].tolist()]
    assert batch["input_ids"].dtype == torch.long


def test_ragged_rows_are_padded_at_the_right_and_masked():
    batch = ReplayDataset.from_rows([[3, 7], [3, 5, 6, 8], [3, 9, 2]], "x").batch([0, 2, 0])
    assert batch["input_ids"].tolist() == [[3, 7, 0], [3, 9, 2], [3, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("width", [3, 5])
def test_replaced_rows_are_padded_and_their_padding_is_not_learned(width):
    new = {
        "input_ids": torch.arange(3 * width).reshape(3, width) + 10,
        "attention_mask": torch.ones(3, width, dtype=torch.long),
        "labels": torch.arange(3 * width).reshape(3, width) + 10,
    }
    replay = ReplayDataset.from_rows([[3, 7], [3, 5, 6, 8]], "x").batch([0, 1])
    batch, wide = replace_rows(new, replay), max(4, width)
    assert {value.shape for value in batch.values()} == {(3, wide)}
    assert batch["input_ids"][0, :width].tolist() == new["input_ids"][0].tolist()
    assert batch["labels"][0].tolist() == new["labels"][0].tolist() + [-100] * (wide - width)
    assert batch["labels"][1].tolist() == [-100, 7] + [-100] * (wide - 2)
    assert batch["attention_mask"].sum(-1).tolist() == [width, 2, 4]
    assert (batch["labels"][:, 1:] == -100).equal(batch["attention_mask"][:, 1:] == 0)


def test_given_tokens_are_context_and_not_predicted():
    replay = ReplayDataset.from_rows([[3, 7, 8, 9], [3, 5, 6, 8]], "x", prefix_lengths=[3, 1])
    assert replay.num_predictions.tolist() == [1, 3]
    assert replay.batch([0, 1])["labels"].tolist() == [[-100, -100, -100, 9], [-100, 5, 6, 8]]


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([], None, "'mine' has no rows"),
        ([[3, 4], []], None, "row 1 of 'mine' is not a list of token ids"),
        ([[3, 4], [3, -100]], None, "row 1 of 'mine' is not a list of token ids"),
        ([[3.7, 4.2]], None, "row 0 of 'mine' is not a list of token ids"),
        ([[[3, 4]]], None, "row 0 of 'mine' is not a list of token ids"),
        (["some text"], None, "row 0 of 'mine' is not a list of token ids"),
        ([[3, 4, 5], [3, 4]], [0, 1], "prefix_lengths: 'mine' needs one per row, from 1"),
        ([[3, 4, 5], [3, 4]], [1, 3], "prefix_lengths: 'mine' needs one per row, from 1"),
        ([[3, 4, 5], [3, 4]], [1], "prefix_lengths: 'mine' needs one per row, from 1"),
    ],
)
def test_rows_that_are_none_are_refused(rows, given, message):
    """Floats were cut off, and a wrong number of given tokens made the mean one over other tokens; in silence."""
    with pytest.raises(ValueError, match=message):
        ReplayDataset.from_rows(rows, "mine", prefix_lengths=given)


def test_packed_batches_cannot_take_replay_rows():
    with pytest.raises(ValueError, match="set packing to false"):
        replace_rows({"input_ids": torch.ones(2, 3), "position_ids": torch.ones(2, 3)}, {})


# The stream


@settings(max_examples=50, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40), st.integers(1, 4))
def test_every_row_comes_once_in_each_pass(num_rows, rows_per_step, seed, passes):
    steps = -(-num_rows * passes // rows_per_step)
    stream = np.concatenate([replay_indices(step, rows_per_step, num_rows, seed) for step in range(steps)])
    for at in range(passes):
        assert sorted(stream[at * num_rows : (at + 1) * num_rows]) == list(range(num_rows))


@settings(max_examples=50, deadline=None, database=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_the_stream_is_a_function_of_position_alone(num_rows, rows_per_step, factor, seed):
    """So steps split differently see the same rows, and a resumed run goes on where it stopped."""
    whole = replay_indices(3, rows_per_step * factor, num_rows, seed)
    parts = [replay_indices(3 * factor + part, rows_per_step, num_rows, seed) for part in range(factor)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_passes_and_seeds_differ():
    first, second = replay_indices(0, 50, 50, 0), replay_indices(1, 50, 50, 0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, replay_indices(0, 50, 50, 1))


# Whose rows they are

OWN = {"model": "tiny", "model_fingerprint": "aaaa", "tokenizer_fingerprint": "tttt"}


def verify(model: str = "aaaa", tokenizer: str = "tttt", allow: bool = False) -> str | None:
    return verify_replay(OWN, model_fingerprint=model, tokenizer_fingerprint=tokenizer, allow_off_policy=allow)


def test_the_models_own_rows_are_accepted():
    assert verify() is None
    assert verify(allow=True) is None


def test_rows_of_another_model_are_refused_unless_allowed():
    with pytest.raises(ValueError, match=r"sampled from 'tiny' \(weights aaaa\), not from this model \(weights bbbb\)"):
        verify(model="bbbb")
    with pytest.raises(ValueError, match="sample from this model, or set allow_off_policy_replay"):
        verify(model="bbbb")
    warning = verify(model="bbbb", allow=True)
    assert warning is not None
    assert warning.startswith("off-policy replay: it was sampled from 'tiny'")


def test_rows_of_another_tokenizer_are_refused_unless_allowed():
    with pytest.raises(ValueError, match=r"tokenizer of .*ttt.*uuuu.*allow_off_policy_replay"):
        verify(tokenizer="uuuu")
    warning = verify(tokenizer="uuuu", allow=True)
    assert warning is not None
    assert "the token ids may mean other text" in warning
