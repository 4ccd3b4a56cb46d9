"""Replay rows on the Hub: what is put there, what comes back, and what is said where it does not."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import make_model, make_texts, make_tokenizer, save_model

from retain.cli import finetune
from retain.cli.main import main
from retain.replay.dataset import load_replay_dataset, load_self_generated, load_texts, read_manifest
from retain.replay.hub import push_pool
from retain.sampling.write import sample_replay

REVISION = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Stands in for the Hub: what is put into it lies in the Hub's local cache, from which its client reads offline."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.private = cache, False

    def create_repo(self, name: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
        assert repo_type == "dataset"
        assert exist_ok
        self.private = private
        place = self._place(name)
        (place / "snapshots" / REVISION).mkdir(parents=True, exist_ok=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(REVISION)
        return f"https://huggingface.co/datasets/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **_: Any) -> None:
        for file in Path(folder_path).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self._place(repo_id) / "snapshots" / REVISION)

    def _place(self, name: str) -> Path:
        return self.cache / f"datasets--{name.replace('/', '--')}"

    def files(self, name: str) -> dict[str, Path]:
        return {file.name: file for file in (self._place(name) / "snapshots" / REVISION).iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr("retain.replay.hub.HfApi", lambda: hub)
    return hub


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    model = make_model()
    model.name_or_path = "someone/llama"
    how = {"num_rows": 6, "max_length": 12, "rows_per_shard": 4, "store_reference": "hidden"}
    return sample_replay(model, make_tokenizer(), tmp_path / "pool", **how)


def test_rows_come_back_with_all_that_was_stored(hub, pool):
    (pool / "notes.txt").write_text("mine")
    assert push_pool(pool, "me/pool", private=True) == "https://huggingface.co/datasets/me/pool"
    assert hub.private
    assert {"manifest.json", "README.md", "shard-00000.parquet", "shard-00001.parquet"} <= hub.files("me/pool").keys()
    assert "notes.txt" not in hub.files("me/pool")
    own, theirs = load_self_generated(pool), load_replay_dataset("me/pool", make_tokenizer(), 3, 12)
    assert [row.tolist() for row in map(theirs.__getitem__, range(6))] == [own[at].tolist() for at in range(6)]
    assert theirs.cache is not None
    assert theirs.manifest == own.manifest
    assert len(load_texts("me/pool", make_tokenizer(), 4)) == 4


def test_the_card_says_which_model_wrote_them(hub, pool):
    push_pool(pool, "me/pool")
    card, manifest = hub.files("me/pool")["README.md"].read_text(), read_manifest(pool)
    head = yaml.safe_load(card.split("---")[1])
    assert "retain" in head["tags"]
    assert head["size_categories"] == ["n<1K"]
    for fact in (manifest["model_fingerprint"], manifest["tokenizer_fingerprint"], "6 rows that `someone/llama` wrote"):
        assert fact in card
    assert "--model someone/llama --dataset_name mine.jsonl --output_dir out --replay_dataset me/pool" in card


def test_what_is_unfinished_or_refused_is_said_in_one_line(hub, pool, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden: you need a token\nRequest ID: 1")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(ValueError, match=r"^push_to_hub: 'me/pool' was not written: 403 Forbidden[^\n]*to try again$"):
        push_pool(pool, "me/pool")
    (pool / "shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match="holds 4 of 6 rows"):
        push_pool(pool, "me/pool")


def test_a_name_without_such_rows_is_read_as_text(hub):
    with pytest.raises(ValueError, match="cannot load 'me/nothing' from the Hub"):
        load_replay_dataset("me/nothing", make_tokenizer(), 3, 12)


def test_a_name_that_is_none_is_refused_before_anything_is_drawn(tmp_path, capsys):
    flags = ["--model", "m", "--output_dir", str(tmp_path / "pool"), "--push_to_hub", "pool"]
    assert main(["sample", *flags]) == 1
    assert "push_to_hub: 'pool' is not the name of a dataset; give OWNER/NAME" in capsys.readouterr().err


def test_rows_on_the_hub_protect_as_those_in_a_folder_do(hub, tmp_path, monkeypatch):
    """With the Fisher information beside them a run has an anchor, which was chosen by a path on disk alone."""
    model = save_model(tmp_path / "model")
    flags = ["--num_rows", "8", "--max_length", "16", "--store_fisher", "true", "--push_to_hub", "me/pool"]
    assert main(["sample", "--model", str(model), "--output_dir", str(tmp_path / "pool"), *flags]) == 0
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": make_texts(1, seed=3)[0]}) + "\n")
    for source in (str(tmp_path / "pool"), "me/pool"):
        out = tmp_path / source.replace("/", "-").strip("-")
        given = ["--model", str(model), "--dataset_name", str(tmp_path / "new.jsonl"), "--output_dir", str(out)]
        given += ["--max_steps", "1", "--max_length", "16", "--use_peft", "true", "--report_to", "none"]
        given += ["--lora_r", "2"]  # of rank 16 an anchor's turns would cost more than a twentieth of 128 tokens
        assert main(["finetune", *given, "--replay_dataset", source]) == 0
        assert json.loads((out / "retain_config.json").read_text())["replay"]["anchor_coef"] == 100.0, source


def test_a_damaged_manifest_on_the_hub_ends_a_run_before_its_model_is_loaded(hub, pool, tmp_path, capsys, monkeypatch):
    push_pool(pool, "me/pool")
    hub.files("me/pool")["manifest.json"].write_text("{")
    monkeypatch.setattr(finetune, "load_for_training", None)
    given = ["--model", "m", "--dataset_name", "d", "--output_dir", str(tmp_path / "out"), "--replay_dataset"]
    assert main(["finetune", *given, "me/pool"]) == 1
    assert "replay_dataset: cannot read" in capsys.readouterr().err
