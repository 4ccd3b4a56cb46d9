"""The command line: bad input ends in one line, and good input goes all the way, for every architecture."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, CHATML, make_texts, make_tokenizer, save_model

from retain.cli.main import VERBS, load_verb, main
from retain.files import one_line
from retain.models.description import model_fingerprint
from retain.models.loading import load_model
from retain.replay.dataset import MANIFEST, load_self_generated

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
    arguments = ["--model", str(folder / "llama"), "--output_dir", str(folder / "replay")]
    assert main(["sample", *arguments, "--num_rows", "8", "--max_length", "24"]) == 0
    return folder


# Bad input: (verb, arguments with {w} for the world and {t} for a scratch folder, what the line must say)

SAMPLE = "sample --model {w}/llama --output_dir {t}/out --num_rows 2 --max_length 8"
FINETUNE = "finetune --model {w}/llama --dataset_name {w}/new.jsonl --output_dir {t}/out"
REPLAY = FINETUNE + " --replay_dataset {w}/replay"
MEASURE = (
    "measure --base {w}/llama --model {w}/llama --output_dir {t}/out --retention wiki={w}/wiki.txt --max_length 24"
)

BAD_INPUT = {
    "windows too long": (MEASURE.replace("--max_length 24", "--max_length 999"), "max_length: 999 is more than this"),
    # the model
    "missing model": (SAMPLE.replace("{w}/llama", "{t}/nothing"), "model: no folder or file"),
    "unknown Hub id": (SAMPLE.replace("{w}/llama", "nobody/nothing"), "model: cannot load"),
    "no model": ("sample --output_dir {t}/out", "model: missing; give --model"),
    "no model to finetune": (REPLAY.replace("--model {w}/llama", ""), "model: missing; give"),
    "missing tuned model": (MEASURE.replace("--model {w}/llama", "--model {t}/nothing"), "model: no folder or file"),
    "start token": (SAMPLE + " --start_token <nothing>", "start_token: '<nothing>' is not in the vocabulary; give"),
    "too long": (SAMPLE.replace("--max_length 8", "--max_length 999"), "max_length: 999 is more than this model's 128"),
    "too long to measure": (MEASURE.replace("--max_length 24", "--max_length 999"), "max_length: 999 is more than"),
    # rows
    "no rows": (REPLAY.replace("--dataset_name {w}/new.jsonl", ""), "dataset_name: missing; give --dataset_name"),
    "missing rows": (REPLAY.replace("new.jsonl", "no.jsonl"), "no.jsonl'"),
    "unknown dataset": (
        REPLAY.replace("{w}/new.jsonl", "nobody/nothing"),
        "dataset_name: cannot load 'nobody/nothing'",
    ),
    "empty rows": (REPLAY.replace("{w}/new.jsonl", "{t}/empty.jsonl"), "empty.jsonl' is empty; give a file"),
    "malformed rows": (REPLAY.replace("{w}/new.jsonl", "{t}/malformed.jsonl"), "malformed.jsonl' line 2 is not JSON"),
    "rows without text": (
        REPLAY.replace("{w}/new.jsonl", "{t}/numbers.parquet"),
        "numbers.parquet' has columns number; it needs text, messages, or",
    ),
    "eval without rows": (REPLAY + " --eval_strategy steps", "give --eval_dataset_name FILE, or eval_strategy no"),
    "missing eval rows": (REPLAY + " --eval_dataset_name {t}/no.jsonl", "no.jsonl'; check the path"),
    "unknown split": (
        REPLAY + " --dataset_train_split train --dataset_test_split x --eval_strategy epoch",
        "split 'x'",
    ),
    # replay
    "no replay": (
        FINETUNE,
        "replay_dataset: missing, and replay_objective 'kl' needs it; give rows, or set replay_coef 0",
    ),
    "missing replay": (FINETUNE + " --replay_dataset {t}/no.jsonl", "no.jsonl'; check the path"),
    "empty replay": (FINETUNE + " --replay_dataset {t}/empty.jsonl", "empty.jsonl' is empty"),
    "replay without text": (FINETUNE + " --replay_dataset {t}/numbers.parquet", "it needs text, messages, or prompt"),
    "not a replay folder": (
        FINETUNE + " --replay_dataset {w}/llama",
        "has no manifest.json; make it with `retain sample",
    ),
    "unfinished replay": (
        FINETUNE + " --replay_dataset {t}/unfinished",
        "finish it with the same `retain sample` command",
    ),
    "replay of another tokenizer": (
        FINETUNE + " --replay_dataset {t}/foreign",
        "the token ids may mean other text; sample",
    ),
    "replay of another model": (
        FINETUNE + " --replay_dataset {t}/off",
        "sample from this model, or set allow_off_policy",
    ),
    "replay is retention": (REPLAY + " --retention own={w}/replay", "retention: 'own' shares 8 rows with the replay"),
    "reference without adapter": (
        REPLAY + " --replay_reference adapter",
        "but there is no adapter; use copy, or --use_peft",
    ),
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
    "missing run": (
        "report --runs {t}/nothing --output_dir {t}/out",
        "runs: cannot read '{t}/nothing' (No such file or directory); give what `retain measure` wrote",
    ),
    "run of another kind": (
        "report --runs {w}/replay/manifest.json --output_dir {t}/out",
        "make it with `retain measure`",
    ),
    "no runs": ("report --output_dir {t}/out", "runs: missing; give at least one folder as --runs"),
    # flags and YAML
    "unknown flag": (SAMPLE + " --num_rosw 3", "--num_rosw"),
    "abbreviated flag": (SAMPLE + " --num_row 3", "--num_row"),
    "flag without value": (SAMPLE + " --seed", "argument --seed: expected one argument"),
    "not a number": (SAMPLE + " --seed ten", "argument --seed: invalid int value: 'ten'"),
    "out of range": (
        SAMPLE.replace("--num_rows 2", "--num_rows 0"),
        "num_rows: 0 does not fit; use a whole number of at",
    ),
    "not finite": (REPLAY + " --replay_coef nan", "replay_coef: nan does not fit; use a number of at least 0"),
    "no rows to sample": (
        REPLAY + " --replay_num_rows 0",
        "replay_num_rows: 0 does not fit; use a whole number of at least 1",
    ),
    "no documents": (
        REPLAY + " --retention_max_documents 0",
        "retention_max_documents: 0 does not fit; use a whole number of at least 1",
    ),
    "no model folder": (
        SAMPLE.replace("{w}/llama", "nowhere/"),
        "model: no folder or file 'nowhere/'; give a folder, a GGUF file or a Hub id",
    ),
    "no replay folder": (REPLAY.replace("{w}/replay", "nowhere/"), "data: no file 'nowhere/'; check the path"),
    "a word of no flag": (REPLAY + " --report_to none wandb", "wandb: belongs to no flag"),
    "nobody's flag": (REPLAY + " --number_processes 2", "--number_processes: not known here nor to accelerate"),
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
        "num_rows 8, not 2; choose another folder, or set overwrite_output_dir",
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
    "bad list in YAML": (
        MEASURE.split(" --ret")[0] + " --config {t}/mapping.yaml",
        "retention: {'wiki': 'a.txt'} is not",
    ),
    "number for a path": (SAMPLE.split(" --output_dir")[0] + " --config {t}/path.yaml", "output_dir: 5 is not"),
    "checkpoint": (
        REPLAY + " --resume_from_checkpoint {t}/no",
        "is not a whole checkpoint; give a checkpoint-N folder",
    ),
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
        "broken": "seed: 1\nnum_rows: 2: 3\n",
        "list": "- seed\n",
        "unknown": "replay_ceof: 1\n",
        "choice": "replay_objective: l2\n",
        "type": "replay_coef: much\n",
        "mapping": "retention:\n  wiki: a.txt\n",
        "path": "output_dir: 5\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


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
    assert list((bad_files / "out").glob("*")) == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert (snapshot(world), snapshot(bad_files)) == before


BAD_ROWS = [
    [{"text": 3}],
    [{"text": None}],
    [{"text": "a"}, {"text": None}],
    [{"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}],
    [{"messages": "hi"}],
    [{"prompt": "a"}],
    [{"prompt": "a", "completion": 1}],
    [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=str)
def test_training_rows_of_the_wrong_type_end_in_one_line(bad, world, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in bad))
    arguments = REPLAY.replace("{w}/new.jsonl", str(rows)).replace("{w}", str(world)).replace("{t}", str(tmp_path))
    capsys.readouterr()
    assert main([*arguments.split(), *TRAIN]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Error:" not in error
    assert "rows.jsonl" in error
    assert not (tmp_path / "out").exists()


def test_hostile_text_cannot_drive_the_terminal(world, tmp_path, capsys):
    """Its escapes arrive in messages: column names, paths, manifests."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"\x1b]0;owned\x07\u202e": "a"}) + "\n")
    arguments = REPLAY.replace("{w}/new.jsonl", str(rows)).replace("{w}", str(world)).replace("{t}", str(tmp_path))
    capsys.readouterr()
    assert main([*arguments.split(), *TRAIN]) == 1
    assert main(["sample", "--model", "\x1b[2Jno", "--output_dir", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "owned" in told
    assert not {"\x1b", "\x07", "\u202e"} & set(told)


def test_a_card_that_cannot_be_written_is_known_before_measuring(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retain.cli.measure.measure_models", None)
    arguments = MEASURE.replace("{w}", str(world)).replace("{t}", str(tmp_path)).split()
    (tmp_path / "bad.md").write_text("---\na: [\n---\n")
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe\x00")
    for card, said in (("no/README.md", "is not a file in a folder"), (".", "is not a file"),
                       ("bad.md", "is no YAML"), ("bytes.md", "is not UTF-8 text")):  # fmt: skip
        assert main([*arguments, "--model_card", str(tmp_path / card)]) == 1
        told = capsys.readouterr().err
        assert told.startswith("retain measure: model_card: ")
        assert said in told
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_said(world, tmp_path, capsys):
    save_model(tmp_path / "other", seed=1)
    command = FINETUNE.replace("{w}", str(world)).replace("{t}", str(tmp_path)).split()
    assert main([*command, *TRAIN, "--use_peft", "--lora_r", "2", "--replay_coef", "0"]) == 0
    for base, warned in ((world / "llama", False), (tmp_path / "other", True)):
        arguments = ["--base", str(base), "--model", str(tmp_path / "out"), "--retention", f"wiki={world}/wiki.txt"]
        arguments += ["--max_length", "24", "--max_new_tokens", "2", "--output_dir", str(tmp_path / f"report-{warned}")]
        assert main(["measure", *arguments]) == 0
        report = json.loads((tmp_path / f"report-{warned}" / "report.json").read_text())
        assert any("it was trained on another base" in line for line in report["warnings"]) == warned
        assert ("another base" in capsys.readouterr().out) == warned


def test_verbs_and_version(capsys):
    import retain

    assert main([]) == 1
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    output = capsys.readouterr()
    assert output.out.count("usage: retain VERB") == 2
    assert output.out.endswith(f"{retain.__version__}\n")
    assert output.err == ""
    assert main(["forget"]) == 1
    assert capsys.readouterr().err == f"retain: no verb 'forget'; use one of {', '.join(VERBS)}\n"


@pytest.mark.parametrize("name", VERBS)
def test_the_help_opens_with_an_example_and_explains_every_flag_of_ours(name, capsys):
    verb = load_verb(name)
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{VERBS[name]}\n\n  {verb.example}\n\nFlags:\n")
    for field in dataclasses.fields(verb.settings[-1]):
        assert f"  --{field.name} " in shown
        assert field.metadata["help"].strip().endswith((".", "]")), "a sentence"
    assert not re.search("--no_|--[a-z]+-", shown), "no second names"
    assert main([name, "--help_all"]) == 0
    assert ("--num_train_epochs" in capsys.readouterr().out) == (len(verb.settings) > 1)
    assert main([name]) == 1
    assert f"retain {name}: give --{verb.required[0]}" in capsys.readouterr().err


def test_what_a_verb_says_of_its_flags_is_so():
    for name in VERBS:
        verb = load_verb(name)
        words = shlex.split(verb.example)
        assert words[:2] == ["retain", name]
        verb.check([[word for word in words[2:] if word not in ("--config", "sft.yaml")]])
        ours = {field.name for field in dataclasses.fields(verb.settings[-1])}
        assert {*verb.groups, verb.positional} <= ours | {""}
        known = ours.union(*({field.name for field in dataclasses.fields(kind)} for kind in verb.settings))
        assert {verb.known_name(given) for given in {*verb.aliases, *verb.borrowed}} <= known


def test_an_interrupted_verb_says_how_to_go_on(world, tmp_path, capsys, monkeypatch):
    import retain.sampling.write

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(retain.sampling.write, "draw_rows", interrupt)
    arguments = SAMPLE.replace("{w}", str(world)).replace("{t}", str(tmp_path)).split()
    assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "retain sample: interrupted; run the same command again to resume"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 223680 vs 223572"),  # torch.save
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk_is_named_whoever_meets_it(error):
    assert (
        one_line(error)
        == "a file could not be written, probably No space left on device; free some space and run it again"
    )


def test_the_last_whole_checkpoint_is_resumed(tmp_path):
    from retain.training.stopping import checkpoint_to_resume

    for step, state in {2: '{"global_step": 2}', 10: '{"global_step": 10}', 12: '{"global_st', 14: None}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    asked = SimpleNamespace(resume_from_checkpoint="true", output_dir=str(tmp_path))
    assert checkpoint_to_resume(asked) == str(tmp_path / "checkpoint-10")
    asked.resume_from_checkpoint = str(tmp_path / "checkpoint-12")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        checkpoint_to_resume(asked)


def test_a_bug_is_named_by_its_type_and_shown_where_when_asked(world, tmp_path, capsys, monkeypatch):
    import retain.sampling.write

    def bug(*args, **kwargs):
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(retain.sampling.write, "draw_rows", bug)
    arguments = SAMPLE.replace("{w}", str(world)).replace("{t}", str(tmp_path)).split()
    assert main(arguments) == 1
    expected = "retain sample: ZeroDivisionError: one (RETAIN_DEBUG=1 shows where)"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    monkeypatch.setenv("RETAIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(arguments)


@pytest.mark.parametrize("flag", ["--new_task", "--new-task"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_flag_of_several_values_is_repeatable(flag, joined, tmp_path):
    def given(name: str, value: str) -> list[str]:
        return [f"{name}={value}"] if joined else [name, value]

    arguments = [*given(flag, "a=x"), "--base", "b", *given("--retention", "w=y"), *given(flag, "c=z")]
    arguments += [*given("--choices", "arc=q"), *given("--choices", "mmlu=r"), "--choice_style", "letter"]
    (config,) = load_verb("measure").parse([*arguments, "--model", "m", "--output_dir", "o"])
    assert (config.new_task, config.retention, config.base) == (["a=x", "c=z"], ["w=y"], "b")
    assert (config.choices, config.choice_style) == (["arc=q", "mmlu=r"], "letter")
    (config,) = load_verb("measure").parse(["--pair", "a", "--pair", "b", "--output_dir", "o"])
    assert config.pair == ["a", "b"]
    (tmp_path / "one.yaml").write_text("model: out\nbase: m\nretention: w=y\noutput_dir: o\n")
    (config,) = load_verb("measure").parse(["--config", str(tmp_path / "one.yaml")])
    assert (config.model, config.retention) == (["out"], ["w=y"])


# As a process


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RETAIN_DEBUG"}
    command = [sys.executable, "-m", "retain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_a_process_ends_with_the_code_and_one_line(bad_files, tmp_path):
    done = run("finetune", "--config", str(bad_files / "choice.yaml"), "--use_cpu", "--bf16", "False", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    expected = "retain finetune: replay_objective: 'l2' is not known; use one of 'kl', 'ntp', 'replace', 'kl_new'\n"
    assert done.stderr == expected
    assert list(tmp_path.iterdir()) == []
    done = run("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: retain VERB")


# All the way

METRIC_NAMES = {
    "forgetting",
    "loss",
    "base_loss",
    "ref_kl",
    "ref_cross_entropy",
    "base_ref_cross_entropy",
    "ref_argmax_cross_entropy",
    "base_ref_argmax_cross_entropy",
    "ref_agreement",
    "bits_per_byte",
    "base_bits_per_byte",
}


def check_metrics(metrics: dict, names: set[str]) -> None:
    assert set(metrics) == names
    for metric in metrics.values():
        assert set(metric) == {"value", "ci", "num_documents", "num_tokens"}
        assert metric["num_documents"] == 6
        assert metric["num_tokens"] > 100
        low, high = metric["ci"]
        assert low <= metric["value"] <= high


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sample_finetune_measure(architecture, world, tmp_path, capsys):
    """One path through every verb, and everything it should leave behind."""
    model, replay, out, report = (str(tmp_path / name) for name in ("base", "replay", "out", "report"))
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "gpt2" else {}
    save_model(Path(model), architecture, **no_dropout)
    wiki, held = f"wiki={world}/wiki.txt", f"{world}/held.jsonl"
    arguments = ["--num_rows", "6", "--max_length", "24", "--per_device_batch_size", "4"]
    assert main(["sample", "--model", model, "--output_dir", replay, *arguments]) == 0
    assert "document start: '<s>' (id 3)" in capsys.readouterr().out

    arguments = ["--model", model, "--dataset_name", f"{world}/new.jsonl", "--eval_dataset_name", held]
    arguments += ["--output_dir", out, "--replay_dataset", replay, "--retention", wiki, "--eval_strategy", "steps"]
    assert main(["finetune", *arguments, "--eval_steps", "2", *TRAIN]) == 0
    output = capsys.readouterr().out
    assert "protection: kl, coefficient 1, reference copy (proven to be the base)" in output
    assert f"replay: 6 rows, self-generated by {model}; 1 per device and micro-batch" in output
    assert "retention/wiki: forgetting " in output

    rows = lines(tmp_path / "out" / "metrics.jsonl")
    steps = [row for row in rows if "replay/kl" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["replay/kl"] == pytest.approx(0, abs=1e-6)
    assert steps[2]["replay/kl"] > 1e-6
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3]
    retention = [row for row in rows if "retention/wiki/loss" in row]
    assert [row["step"] for row in retention] == [2, 3]
    assert {"retention/wiki/forgetting", "retention/wiki/ref_kl", "retention/wiki/ref_agreement"} <= set(retention[0])
    settings = json.loads((tmp_path / "out" / "retain_config.json").read_text())
    assert settings["replay"]["replay_objective"] == "kl"
    assert settings["reference"] == "copy"
    assert settings["replay_dataset"]["manifest"]["model_fingerprint"] == model_fingerprint(load_model(model))
    assert settings["training_arguments"]["max_steps"] == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Forgetting" in card
    assert "| **wiki** |" in card
    assert "huggingface.co/datasets" not in card, "a file has no page on the Hub"
    assert model_fingerprint(load_model(out)) != model_fingerprint(load_model(model))

    arguments = ["--base", model, "--model", out, "--retention", wiki, "--new_task", f"new={held}"]
    arguments += ["--output_dir", report, "--max_length", "24", "--max_new_tokens", "4", "--num_resamples", "200"]
    assert main(["measure", *arguments]) == 0
    assert "nats per token" in capsys.readouterr().out
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    check_metrics(data["retention"]["wiki"], METRIC_NAMES)
    check_metrics(data["new_task"]["new"], METRIC_NAMES | {"gain"})
    assert abs(data["noise_floor"]["wiki"]["ref_kl"]["value"]) < 1e-6 < data["retention"]["wiki"]["ref_kl"]["value"]
    assert data["base"]["fingerprint"] == settings["replay_dataset"]["manifest"]["model_fingerprint"]
    assert data["tuned"]["fingerprint"] == model_fingerprint(load_model(out))
    assert data["training"]["replay_coef"] == 1.0
    assert [row["step"] for row in data["trajectory"]] == [1, 2, 3]
    assert len(data["documents"]) == 2
    assert [row["how"] for row in data["generations"]] == ["greedy"] * 2 + ["sampled"] * 2
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}


def finetune(world: Path, folder: Path, *arguments: str) -> int:
    given = REPLAY.replace("{w}", str(world)).replace("{t}/out", str(folder)).split()
    return main([*given, *TRAIN, *arguments])


def test_an_adapter_is_measured_from_its_folder(world, tmp_path, capsys):
    out, report = str(tmp_path / "out"), tmp_path / "report"
    wiki = f"wiki={world}/wiki.txt"
    arguments = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--retention", wiki]
    assert finetune(world, tmp_path / "out", *arguments) == 0
    assert "reference adapter (proven to be the base)" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    base = str(world / "llama")
    arguments = ["--retention", wiki, "--max_length", "24", "--max_new_tokens", "2", "--num_resamples", "100"]
    assert main(["measure", "--base", base, "--model", out, "--output_dir", str(report), *arguments]) == 0
    data = json.loads((report / "report.json").read_text())
    assert data["base"]["fingerprint"] == data["tuned"]["fingerprint"]  # the weights below the adapter
    assert data["retention"]["wiki"]["ref_kl"]["value"] > 1e-7
    assert data["training"]["reference"] == "adapter"


KEPT = ("retention", "generations", "noise_floor", "gate")


def test_several_models_of_one_base_are_measured_and_judged_together(world, tmp_path, capsys):
    """Each has the report that it has alone; the base's answers are taken once, and the worst decides."""
    save_model(tmp_path / "moved" / "final", seed=1)
    shutil.copytree(world / "llama", tmp_path / "same" / "final")
    models = [str(tmp_path / name / "final") for name in ("same", "moved")]
    shared = ["measure", "--base", str(world / "llama"), "--retention", f"wiki={world}/wiki.txt", "--max_length", "24"]
    shared += ["--max_new_tokens", "2", "--num_resamples", "100", "--max_ref_kl", "0.01"]
    codes = [main([*shared, "--model", model, "--output_dir", str(tmp_path / name)])
             for model, name in zip(models, "ab", strict=True)]  # fmt: skip
    capsys.readouterr()
    assert main([*shared, "--model", *models, "--output_dir", str(tmp_path / "both")]) == 3
    shown = capsys.readouterr().out
    assert codes == [3, 3], "six documents are too few to decide"
    assert shown.count("gate: not enough evidence") == 2
    for name, alone in (("same_final", "a"), ("moved_final", "b")):
        files = (tmp_path / folder / "report.json" for folder in (f"both/{name}", alone))
        together, apart = ({key: json.loads(file.read_text())[key] for key in KEPT} for file in files)
        assert together == apart
    runs = json.loads((tmp_path / "both" / "report.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["same_final", "moved_final"]
    assert main([*shared, "--model", models[0], "--model", models[0], "--output_dir", str(tmp_path / "c")]) == 1
    assert "is given twice; leave one of them out" in capsys.readouterr().err


def test_replay_may_be_sampled_on_the_way(world, tmp_path, capsys):
    assert finetune(world, tmp_path / "out", "--replay_dataset", "self", "--replay_num_rows", "5") == 0
    rows = load_self_generated(tmp_path / "out" / "replay")
    assert len(rows) == 5
    assert len(rows[0]) == 24
    assert rows.manifest is not None
    assert rows.manifest["model_fingerprint"] == model_fingerprint(load_model(str(world / "llama")))
    assert "replay: 5 rows, self-generated by" in capsys.readouterr().out


def test_a_config_written_for_trl_sft_works_unchanged(world, tmp_path, capsys):
    """Parsed by TRL's own dataclasses here, then by `retain finetune`, which only adds its flags."""
    import yaml
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    config = {
        "model_name_or_path": str(world / "llama"),
        "dataset_name": str(world / "new.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "learning_rate": 1.0e-3,
        "max_length": 24,
        "per_device_train_batch_size": 2,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    types = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    parsed = TrlParser(types).parse_args_and_config(["--config", str(path)])
    assert parsed[1].learning_rate == 1e-3
    assert main(["finetune", "--config", str(path)]) == 1
    assert capsys.readouterr().err.startswith("retain finetune: replay_dataset: missing")
    assert main(["finetune", "--config", str(path), "--replay_dataset", str(world / "replay")]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "sft.yaml").read_text() == yaml.safe_dump(config)


def test_a_config_may_hold_our_settings_too_and_flags_win(world, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(f"replay_coef: 0.5\nreplay_objective: ntp\nretention: ['wiki={world}/wiki.txt']\nseed: 3\n")
    assert finetune(world, tmp_path / "out", f"--config={path}", "--replay_coef", "2") == 0
    settings = json.loads((tmp_path / "out" / "retain_config.json").read_text())
    assert settings["replay"]["replay_coef"] == 2
    assert settings["replay"]["replay_objective"] == "ntp"
    assert settings["retention"] == {"wiki": 6}
    assert settings["training_arguments"]["seed"] == 3


def test_rows_of_messages_go_all_the_way(world, tmp_path, capsys):
    """A chat model whose BOS is a role marker: chat rows to train on, documents that start with the separator."""
    model = save_model(tmp_path / "chat")
    tokenizer = make_tokenizer(bos="<|im_start|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    turns = [[{"role": "user", "content": "the fox"}, {"role": "assistant", "content": text}] for text in make_texts(6)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    command = REPLAY.replace("{w}/llama", str(model)).replace("{w}/new.jsonl", str(tmp_path / "chat.jsonl"))
    command = command.replace("{w}/replay", "self").replace("{t}", str(tmp_path))
    assert main([*command.split(), *TRAIN, "--replay_num_rows", "4"]) == 0
    assert "document start: '<|endoftext|>' (id 0)" in capsys.readouterr().out
    rows = load_self_generated(tmp_path / "out" / "replay")
    assert [rows[at][0] for at in range(4)] == [0] * 4


def test_sampled_rows_may_be_measured_on(world, tmp_path):
    """The model's own text as a retention text, from a folder of `retain sample`."""
    command = MEASURE.replace("wiki={w}/wiki.txt", "own={w}/replay").replace("{w}", str(world))
    assert main([*command.replace("{t}", str(tmp_path)).split(), "--num_resamples", "100"]) == 0
    metrics = json.loads((tmp_path / "out" / "report.json").read_text())["retention"]["own"]
    assert metrics["ref_kl"]["value"] == 0
    assert metrics["loss"]["num_tokens"] == 8 * 23


def test_seeds_are_heard(world, tmp_path):
    for seed in ("0", "1"):
        command = SAMPLE.replace("{w}", str(world)).replace("{t}", str(tmp_path / seed))
        assert main([*command.split(), "--seed", seed]) == 0
    one, other = (load_self_generated(tmp_path / seed / "out") for seed in ("0", "1"))
    assert not torch.equal(torch.from_numpy(one.tokens), torch.from_numpy(other.tokens))
