"""The command line: bad input ends in one line, and good input goes all the way, for every architecture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, CHATML, make_texts, make_tokenizer, save_model

from retain.cli import main
from retain.models import load_model, model_fingerprint
from retain.replay import MANIFEST, load_self_generated

TRAIN = [
    *("--max_steps", "3", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--max_length", "24"),
    *("--use_cpu", "--bf16", "False", "--report_to", "none", "--save_strategy", "no", "--logging_steps", "1"),
    *("--lr_scheduler_type", "constant", "--gradient_checkpointing", "False"),
]


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    """`main` changes the environment and the libraries' verbosity."""
    from transformers.utils import logging

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, seed: int, count: int = 12) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(count, seed=seed)))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, new-task rows, a retention text, and replay rows that the model wrote."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "llama")
    write_rows(folder / "new.jsonl", seed=1)
    write_rows(folder / "held.jsonl", seed=2, count=6)
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(6, seed=3)))
    arguments = ["--model_name_or_path", str(folder / "llama"), "--output_dir", str(folder / "replay")]
    assert main(["sample", *arguments, "--num_rows", "8", "--max_length", "24"]) == 0
    return folder


# Bad input: (verb, arguments with {w} for the world and {t} for a scratch folder, what the line must say)

SAMPLE = "sample --model_name_or_path {w}/llama --output_dir {t}/out --num_rows 2 --max_length 8"
FINETUNE = "finetune --model_name_or_path {w}/llama --dataset_name {w}/new.jsonl --output_dir {t}/out"
REPLAY = FINETUNE + " --replay_dataset {w}/replay"
MEASURE = "measure --base {w}/llama --model {w}/llama --output_dir {t}/out --retention wiki={w}/wiki.txt --max_length 24"

BAD_INPUT = {
    # the model
    "missing model": (SAMPLE.replace("{w}/llama", "{t}/nothing"), "model: no folder or file"),
    "unknown Hub id": (SAMPLE.replace("{w}/llama", "nobody/nothing"), "model: cannot load"),
    "no model": ("sample --output_dir {t}/out", "model_name_or_path: missing; give --model_name_or_path"),
    "no model to finetune": (REPLAY.replace("--model_name_or_path {w}/llama", ""), "model_name_or_path: missing; give"),
    "missing tuned model": (MEASURE.replace("--model {w}/llama", "--model {t}/nothing"), "model: no folder or file"),
    "start token": (SAMPLE + " --start_token <nothing>", "start_token: '<nothing>' is not in the vocabulary; give"),
    "too long": (SAMPLE.replace("--max_length 8", "--max_length 999"), "max_length: 999 is more than this model's 128"),
    "too long to measure": (MEASURE.replace("--max_length 24", "--max_length 999"), "max_length: 999 is more than"),
    # rows
    "no rows": (REPLAY.replace("--dataset_name {w}/new.jsonl", ""), "dataset_name: missing; give --dataset_name"),
    "missing rows": (REPLAY.replace("new.jsonl", "no.jsonl"), "no.jsonl'"),
    "unknown dataset": (REPLAY.replace("{w}/new.jsonl", "nobody/nothing"), "dataset_name: cannot load 'nobody/nothing'"),
    "empty rows": (REPLAY.replace("{w}/new.jsonl", "{t}/empty.jsonl"), "empty.jsonl' is empty; give a file"),
    "malformed rows": (REPLAY.replace("{w}/new.jsonl", "{t}/malformed.jsonl"), "malformed.jsonl' line 2 is not JSON"),
    "rows without text": (REPLAY.replace("{w}/new.jsonl", "{t}/numbers.parquet"), "numbers.parquet' has columns number; it needs text, messages, or"),
    "eval without rows": (REPLAY + " --eval_strategy steps", "give --eval_dataset_name FILE, or eval_strategy no"),
    "missing eval rows": (REPLAY + " --eval_dataset_name {t}/no.jsonl", "no.jsonl'; check the path"),
    "unknown split": (REPLAY + " --dataset_train_split train --dataset_test_split x --eval_strategy epoch", "split 'x'"),
    # replay
    "no replay": (FINETUNE, "replay_dataset: missing, and replay_objective 'kl' needs it; give rows, or set replay_coef 0"),
    "missing replay": (FINETUNE + " --replay_dataset {t}/no.jsonl", "no.jsonl'; check the path"),
    "empty replay": (FINETUNE + " --replay_dataset {t}/empty.jsonl", "empty.jsonl' is empty"),
    "replay without text": (FINETUNE + " --replay_dataset {t}/numbers.parquet", "it needs text, messages, or prompt"),
    "not a replay folder": (FINETUNE + " --replay_dataset {w}/llama", "has no manifest.json; make it with `retain sample"),
    "unfinished replay": (FINETUNE + " --replay_dataset {t}/unfinished", "finish it with the same `retain sample` command"),
    "replay of another tokenizer": (FINETUNE + " --replay_dataset {t}/foreign", "the token ids mean other text; sample"),
    "replay of another model": (FINETUNE + " --replay_dataset {t}/off", "sample from this model, or set allow_off_policy"),
    "replay is retention": (REPLAY + " --retention own={w}/replay", "retention: 'own' shares 8 rows with the replay"),
    "reference without adapter": (REPLAY + " --replay_reference adapter", "but there is no adapter; use copy, or --use_peft"),
    "replace with one row": (
        REPLAY + " --replay_objective replace --per_device_train_batch_size 1",
        "use a share that leaves both replay and new rows",
    ),
    # texts
    "retention without =": (MEASURE + " --retention wiki.txt", "retention: 'wiki.txt' is not name=file; write e.g."),
    "retention twice": (MEASURE + " --retention wiki=a", "the name 'wiki' comes twice; give each text its own"),
    "no retention": (MEASURE.split(" --retention")[0], "retention: missing; give at least one text as --retention"),
    "missing retention": (MEASURE + " --retention b={t}/no.txt", "no.txt'; check the path"),
    "missing new task": (MEASURE + " --new-task b={t}/no.txt", "no.txt'; check the path"),
    "not UTF-8": (MEASURE + " --retention b={t}/latin.txt", "latin.txt' is not UTF-8 at byte 3; convert it"),
    "missing prompts": (MEASURE + " --prompts {t}/no.txt", "no.txt'; check the path"),
    "empty text": (MEASURE + " --retention b={t}/blank.jsonl", "retention: 'b' has no text to measure; give documents"),
    "missing run": ("report --runs {t}/nothing --output_dir {t}/out", "No such file or directory: '{t}/nothing'; check"),
    "run of another kind": ("report --runs {w}/replay/manifest.json --output_dir {t}/out", "make it with `retain measure`"),
    "no runs": ("report --output_dir {t}/out", "runs: missing; give at least one folder as --runs"),
    # flags and YAML
    "unknown flag": (SAMPLE + " --num_rosw 3", "--num_rosw"),
    "abbreviated flag": (SAMPLE + " --num_row 3", "--num_row"),
    "flag without value": (SAMPLE + " --seed", "argument --seed: expected one argument"),
    "not a number": (SAMPLE + " --seed ten", "argument --seed: invalid int value: 'ten'"),
    "out of range": (SAMPLE.replace("--num_rows 2", "--num_rows 0"), "num_rows: 0 does not fit; use a whole number of at"),
    "not finite": (REPLAY + " --replay_coef nan", "replay_coef: nan does not fit; use a number of at least 0"),
    "negative": (REPLAY + " --replay_coef -1", "replay_coef: -1.0 does not fit; use a number of at least 0"),
    "share of everything": (REPLAY + " --replay_objective replace --replay_share 1", "use a share above 0 and below 1"),
    "bad choice": (REPLAY + " --replay_objective l2", "replay_objective"),
    "bad dtype": (SAMPLE + " --dtype float63", "dtype"),
    "no output_dir": (SAMPLE.replace("--output_dir {t}/out", ""), "output_dir: missing; give --output_dir"),
    "no output_dir to measure": (MEASURE.replace("--output_dir {t}/out", ""), "output_dir: missing; give --output_dir"),
    "output_dir is a file": (SAMPLE.replace("{t}/out", "{w}/wiki.txt"), "File exists: '{w}/wiki.txt'; check the path"),
    "other files there": (SAMPLE.replace("{t}/out", "{t}/notes"), "holds other files (mine.txt, …); choose an empty"),
    "another dataset there": (
        SAMPLE.replace("{t}/out", "{t}/unfinished"),
        "asked 8; choose another folder, or set overwrite_output_dir",
    ),
    "missing YAML": (SAMPLE + " --config {t}/no.yaml", "No such file or directory: '{t}/no.yaml'; check the path"),
    "no YAML": (SAMPLE + " --config", "config: --config needs a file"),
    "broken YAML": (SAMPLE + " --config {t}/broken.yaml", "config: not YAML at line 2"),
    "YAML list": (SAMPLE + " --config {t}/list.yaml", "must contain a YAML mapping"),
    "unknown YAML key": (REPLAY + " --config {t}/unknown.yaml", "replay_ceof"),
    "bad choice in YAML": (
        REPLAY + " --config {t}/choice.yaml",
        "replay_objective: 'l2' is not known; use one of 'kl', 'ntp', 'replace', 'kl_new'",
    ),
    "bad type in YAML": (REPLAY + " --config {t}/type.yaml", "replay_coef"),
    "bad list in YAML": (MEASURE.split(" --ret")[0] + " --config {t}/mapping.yaml", "retention: {'wiki': 'a.txt'} is not"),
    "text for list in YAML": (MEASURE.split(" --ret")[0] + " --config {t}/text.yaml", "retention: 'wiki=a.txt' is not"),
    "number for a path": (SAMPLE.split(" --output_dir")[0] + " --config {t}/path.yaml", "output_dir: 5 is not"),
    "checkpoint": (REPLAY + " --resume_from_checkpoint {t}/no", "is not a whole checkpoint; give a checkpoint-N folder"),
}


@pytest.fixture(scope="module")
def bad_files(world, tmp_path_factory) -> Path:
    """Everything that can be wrong with a file."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text('{"text": ""}\n')
    (folder / "malformed.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    Dataset.from_dict({"number": [1, 2, 3]}).to_parquet(folder / "numbers.parquet")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    for name, change in {
        "unfinished": {},
        "foreign": {"tokenizer_fingerprint": "another"},
        "off": {"model_fingerprint": "another"},
    }.items():
        shutil.copytree(world / "replay", folder / name)
        manifest = json.loads((folder / name / MANIFEST).read_text())
        (folder / name / MANIFEST).write_text(json.dumps(manifest | change))
    (folder / "unfinished" / "shard-00000.parquet").unlink()
    for name, text in {
        "broken": "seed: 1\nnum_rows: [\n",
        "list": "- seed\n",
        "unknown": "replay_ceof: 1\n",
        "choice": "replay_objective: l2\n",
        "type": "replay_coef: much\n",
        "mapping": "retention:\n  wiki: a.txt\n",
        "text": "retention: wiki=a.txt\n",
        "path": "output_dir: 5\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_writes_nothing(case, world, bad_files, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command, expected = (text.replace("{w}", str(world)).replace("{t}", str(bad_files)) for text in BAD_INPUT[case])
    arguments = command.split()
    if arguments[0] == "finetune":
        arguments += TRAIN
    before = snapshot(world), snapshot(bad_files)
    capsys.readouterr()
    code = main(arguments)
    error = capsys.readouterr().err
    print(case, "→", error)
    assert code == 1
    assert error.count("\n") == 1
    assert error.startswith(f"retain {arguments[0]}: ")
    assert expected in error
    assert "Error:" not in error  # an exception of no one's making, named by its type
    for path in (bad_files / "out").rglob("*"):
        assert path.name == ".lock"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert (snapshot(world), snapshot(bad_files)) == before
