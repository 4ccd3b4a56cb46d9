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
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, make_texts, make_tokenizer, save_model

from retain import ForgettingReport
from retain.cli.main import VERBS, load_verb, main
from retain.files import one_line, read_jsonl
from retain.models.description import model_fingerprint
from retain.models.loading import load_model, load_tokenizer
from retain.replay.dataset import load_self_generated
from retain.training.run_files import NamedBase

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


# {w} is the world, {t} a scratch folder.
SAMPLE = "sample --model {w}/llama --output_dir {t}/out --num_rows 2 --max_length 8"
FINETUNE = "finetune --model {w}/llama --dataset_name {w}/new.jsonl --output_dir {t}/out"
REPLAY = FINETUNE + " --replay_dataset {w}/replay"
MEASURE = (
    "measure --base {w}/llama --model {w}/llama --output_dir {t}/out --retention wiki={w}/wiki.txt --max_length 24"
)


def test_hostile_text_cannot_drive_the_terminal(world, tmp_path, capsys):
    """Its escapes arrive in messages: column names, paths, manifests."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"\x1b]0;owned\x07\u202e": "a"}) + "\n")
    arguments = REPLAY.replace("{w}/new.jsonl", str(rows)).replace("{w}", str(world)).replace("{t}", str(tmp_path))
    capsys.readouterr()
    assert main([*arguments.split(), *TRAIN]) == 1
    assert main(["sample", "--model", "\x1b[2Jno", "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "owned" in error
    assert not {"\x1b", "\x07", "\u202e"} & set(error)


def test_a_card_that_cannot_be_written_is_known_before_measuring(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("retain.cli.measure.measure_models", None)
    arguments = MEASURE.replace("{w}", str(world)).replace("{t}", str(tmp_path)).split()
    (tmp_path / "bad.md").write_text("---\na: [\n---\n")
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe\x00")
    for card, expected in (("no/README.md", "is not a file in a folder"), (".", "is not a file"),
                       ("bad.md", "is not YAML"), ("bytes.md", "is not UTF-8 text")):  # fmt: skip
        assert main([*arguments, "--model_card", str(tmp_path / card)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("retain measure: model_card: ")
        assert expected in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_warned_of(world, tmp_path, capsys):
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
    arguments = ["--base", str(tmp_path / "out"), "--model", str(world / "llama"), *arguments[4:-2]]
    assert main(["measure", *arguments, "--output_dir", str(tmp_path / "swapped")]) == 0
    report = json.loads((tmp_path / "swapped" / "report.json").read_text())
    assert "is an adapter of" in report["warnings"][0], "what was learned was called forgetting"


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


def test_an_interrupted_verb_says_how_to_resume(world, tmp_path, capsys, monkeypatch):
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
    (tmp_path / "checkpoint-best").mkdir()
    args = SimpleNamespace(resume_from_checkpoint="true", output_dir=str(tmp_path), process_index=0)
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-10")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-2", "checkpoint-10", "checkpoint-best"}, "what is half-written is not written over"
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-12")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        checkpoint_to_resume(args)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (
            ["checkpoint-2/trainer_state.json", "checkpoint-2/scheduler.pt", "retain_config.json"],
            "--resume_from_checkpoint true to resume from the",
        ),
        (
            ["checkpoint-2/trainer_state.json"],
            r"its checkpoints hold weights alone \(save_only_model\); start again in",
        ),
        (["checkpoint-2/model.safetensors"], "no whole checkpoint; .* --resume_from_checkpoint true to begin again"),
        (["model.safetensors", "retain_config.json"], "no whole checkpoint; .* --resume_from_checkpoint true to begin"),
        (["metrics.jsonl", "retain_config.json"], "no checkpoint yet; run the same command to begin again"),
    ],
)
@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
def test_what_to_do_after_a_stop_is_what_the_verb_then_takes(tmp_path, capsys, monkeypatch, verb, files, advice):
    from retain.training.stopping import checkpoint_to_resume

    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"global_step": 2}')
    given = {"finetune": ["--replay_coef", "0"], "pretrain": ["--corpus", "add"]}[verb]

    def interrupt(*configs):
        raise KeyboardInterrupt

    monkeypatch.setattr("retain.cli.main.load_verb", lambda name: dataclasses.replace(load_verb(name), run=interrupt))
    assert main([verb, *given, "--output_dir", str(tmp_path)]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(advice, line)
    resume = "true" if "--resume_from_checkpoint true" in line else None
    folder = tmp_path / "other" if "another folder" in line else tmp_path
    found = checkpoint_to_resume(
        SimpleNamespace(resume_from_checkpoint=resume, output_dir=str(folder), process_index=0)
    )
    assert (found is not None) == line.endswith("to resume from the last checkpoint")


@pytest.mark.parametrize("resume", [None, "true"])
@pytest.mark.parametrize("file", ["model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "q4.gguf"])
def test_a_model_is_not_written_over(tmp_path, file, resume):
    from retain.training.stopping import checkpoint_to_resume

    (tmp_path / file).touch()
    args = SimpleNamespace(resume_from_checkpoint=resume, output_dir=str(tmp_path), process_index=0)
    with pytest.raises(ValueError, match=rf"holds a model \({file}\), which would be lost; choose another folder"):
        checkpoint_to_resume(args)
    (tmp_path / "retain_config.json").touch()  # a run that was killed before its first checkpoint begins anew
    args.resume_from_checkpoint = "true"
    assert checkpoint_to_resume(args) is None


def test_a_bug_is_named_by_its_type_and_located_under_RETAIN_DEBUG(world, tmp_path, capsys, monkeypatch):
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


def test_a_process_ends_with_the_code_and_one_line(tmp_path):
    (tmp_path / "choice.yaml").write_text("replay_objective: l2\n")
    done = run("finetune", "--config", "choice.yaml", "--use_cpu", "--bf16", "False", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    expected = "retain finetune: replay_objective: 'l2' is not known; use one of 'kl', 'ntp', 'replace', 'kl_new'\n"
    assert done.stderr == expected
    assert [path.name for path in tmp_path.iterdir()] == ["choice.yaml"]


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


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])  # test_defaults.py has others
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
    assert "protection: kl, coefficient 1, reference cache (hidden) (proven to be the base)" in output
    assert f"replay: 6 rows, self-generated by {model}; 1 per device and micro-batch" in output
    assert "forgotten: ref_kl " in output

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
    assert settings["reference"] == "cache (hidden)"
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


def test_the_noise_floor_shows_its_progress(world, tmp_path, capsys):
    """Four whole documents, one window at a time: of a book it took minutes, of which nothing was seen."""
    assert main(MEASURE.replace("{w}", str(world)).replace("{t}", str(tmp_path)).split()) == 0
    error = capsys.readouterr().err
    for stage in ("measuring wiki", "noise floor of wiki"):
        assert re.search(rf"^{stage}: [\d,]+ tokens in ", error, re.M), stage


def test_an_adapter_is_measured_from_its_folder(world, tmp_path, capsys):
    out, report = str(tmp_path / "out"), tmp_path / "report"
    wiki = f"wiki={world}/wiki.txt"
    arguments = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--retention", wiki]
    assert finetune(world, tmp_path / "out", *arguments) == 0
    assert "reference cache (hidden) (proven to be the base)" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    base = str(world / "llama")
    arguments = ["--retention", wiki, "--max_length", "24", "--max_new_tokens", "2", "--num_resamples", "100"]
    assert main(["measure", "--base", base, "--model", out, "--output_dir", str(report), *arguments]) == 0
    data = json.loads((report / "report.json").read_text())
    assert data["base"]["fingerprint"] == data["tuned"]["fingerprint"]  # the weights below the adapter
    assert data["retention"]["wiki"]["ref_kl"]["value"] > 1e-7
    assert data["training"]["reference"] == "cache (hidden)"


@pytest.mark.parametrize(
    ("other", "differs"),
    [({}, False), ({"revision": "bbb"}, True), ({"fingerprint": "2"}, True), ({"fingerprint": None}, False),
     ({"model": "org/y"}, True)],
)  # fmt: skip
def test_two_runs_have_one_base_if_nothing_that_both_know_differs(other, differs):
    base = {"model": "org/x", "source": "named", "revision": "aaa", "fingerprint": "1"}
    assert NamedBase(**base | other).differs_from(NamedBase(**base)) == differs


KEPT = ("retention", "generations", "noise_floor", "gate")


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "true"]], ids=["whole", "lora"])
def test_the_base_of_a_run_is_known_by_its_files(world, tmp_path, capsys, adapter):
    """No file of a whole finetune named it."""
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(world / "llama", tmp_path / "base")
    assert finetune(world, out, "--model", str(tmp_path / "base"), "--replay_coef", "0", *adapter) == 0
    settings = json.loads((out / "retain_config.json").read_text())
    assert settings["base"]["model"] == str(tmp_path / "base")
    words = f"measure --retention old={world}/wiki.txt --max_documents 2 --max_new_tokens 0 --max_length 16".split()
    capsys.readouterr()
    assert main([*words, "--model", str(out), "--output_dir", str(tmp_path / "report")]) == 0
    assert f"base: {tmp_path}/base, the model that the run in " in capsys.readouterr().out
    data = ForgettingReport.from_json(tmp_path / "report" / "report.json").data
    assert (data["base"]["model"], data["warnings"]) == (str(tmp_path / "base"), [])
    if adapter:
        save_model(tmp_path / "base", seed=5)
        assert main([*words, "--model", str(out), "--output_dir", str(tmp_path / "changed")]) == 1
        assert "base' is no longer the model that the run in" in capsys.readouterr().err
        return
    save_model(tmp_path / "moved", seed=5)
    assert settings["base"]["fingerprint"] == data["base"]["fingerprint"]
    shutil.copytree(out, other)
    settings["base"]["model"] = str(tmp_path / "moved")
    (other / "retain_config.json").write_text(json.dumps(settings))
    argv = [*words, "--output_dir", str(tmp_path / "two"), "--model"]
    assert main([*argv, str(out), "--model", str(other)]) == 1
    assert re.search(
        "base: '.*base' is the model that .*, and '.*moved' the model that .*give", capsys.readouterr().err
    )
    assert main([*argv, str(other)]) == 1
    assert "moved' is no longer the model that the run in" in capsys.readouterr().err
    assert main([*argv, str(world / "llama")]) == 1
    assert "does not name its base; give --base" in capsys.readouterr().err


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
    output = capsys.readouterr().out
    assert "replay: 5 rows, self-generated by" in output
    assert "reference cache (hidden)" in output


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


def test_a_mixture_written_for_trl_sft_works_unchanged(world, tmp_path, capsys):
    """Its datasets are mappings, of which TRL makes a dataclass; they were refused as no list."""
    path = tmp_path / "sft.yaml"
    files = [{"path": "json", "data_files": str(world / name)} for name in ("new.jsonl", "held.jsonl")]
    path.write_text(json.dumps({"datasets": files}))  # which is YAML, too
    command = ["finetune", "--config", str(path), "--model", str(world / "llama"), *TRAIN]
    command += ["--replay_dataset", str(world / "replay"), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["replay/kl"] == pytest.approx(0, abs=1e-6)
    capsys.readouterr()
    both = [*command, "--output_dir", str(tmp_path / "both"), "--dataset_name", str(world / "new.jsonl")]
    assert main(both) == 1  # it had trained on the mixture alone
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("new.jsonl' beside datasets, which would be trained on alone; leave one out")
    )
    path.write_text(json.dumps({"datasets": files, "streaming": True}))
    stream = [*command, "--output_dir", str(tmp_path / "stream"), "--max_steps", "-1"]
    assert main(stream) == 1
    assert "max_steps: missing; give it" in capsys.readouterr().err
    assert not (tmp_path / "stream").exists(), "it had drawn its rows before"
    path.write_text(json.dumps({"datasets": [{**files[0], "splitt": "train"}]}))
    assert main(command) == 1
    assert "is not a list of mappings with path, name, data_dir" in capsys.readouterr().err
    path.write_text(json.dumps({"datasets": [files[0] | {"data_files": str(tmp_path / "no.jsonl")}]}))
    assert main([*command, "--output_dir", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.startswith("retain finetune: datasets: cannot load 'json' (Unable to find ")


def test_settings_that_were_given_and_have_no_effect_are_named(world, tmp_path, capsys):
    """`--lora_r` without `--use_peft true` trained all weights, and a test split of one dataset was not made."""
    flags = ["--lora_r", "4", "--test_split_size", "0.1", "--anchor_lr_ratio", "3", "--replay_coef", "1"]
    assert finetune(world, tmp_path / "some", *flags, "--replay_num_rows", "9") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not used")]
    assert line == (
        "not used: lora_r 4 without use_peft true, test_split_size 0.1 without datasets, replay_num_rows 9 without "
        "replay_dataset self, anchor_lr_ratio 3.0 without anchor_coef"
    )
    used = ["--use_peft", "true", "--lora_r", "4", "--anchor_coef", "10", "--anchor_lr_ratio", "3"]
    assert finetune(world, tmp_path / "all", *used) == 0
    assert "not used" not in capsys.readouterr().out


DATED = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML


def test_a_template_that_writes_the_date_writes_that_of_the_beginning(world, tmp_path, monkeypatch, capsys):
    """As Llama 3.2's: rows of the next day were others, so what was killed before midnight could not resume."""
    from transformers.utils import chat_template_utils

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2, tzinfo=tz)

    model = shutil.copytree(world / "llama", tmp_path / "chat")
    make_tokenizer(template=DATED).save_pretrained(model)
    turns = [[{"role": "user", "content": "the fox"}, {"role": "assistant", "content": text}] for text in make_texts(6)]
    rows = tmp_path / "chat.jsonl"
    rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    sample = f"sample --model {model} --output_dir {tmp_path}/rows --num_rows 4 --max_length 40 --start chat".split()
    sample += ["--rows_per_shard", "2"]
    tune = ["finetune", "--model", str(model), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    tune += [*TRAIN, "--replay_dataset", str(tmp_path / "rows"), "--max_length", "64"]
    tune += ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3"]
    assert main(sample) == 0
    assert main(tune) == 0
    before = load_self_generated(tmp_path / "rows").tokens
    first = json.loads((tmp_path / "out" / "retain_config.json").read_text())
    (tmp_path / "rows" / "shard-00001.parquet").unlink()
    for last in (2, 3):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{last}")
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert main(sample) == 0, capsys.readouterr().err
    assert (load_self_generated(tmp_path / "rows").tokens == before).all()
    assert main([*tune, "--resume_from_checkpoint", "true"]) == 0, capsys.readouterr().err
    then = json.loads((tmp_path / "out" / "retain_config.json").read_text())
    assert [then[name] for name in ("created", "new_rows")] == [first[name] for name in ("created", "new_rows")]
    assert load_tokenizer(str(tmp_path / "out")).chat_template == DATED
    shutil.rmtree(tmp_path / "out")
    assert main(tune) == 0
    assert json.loads((tmp_path / "out" / "retain_config.json").read_text())["new_rows"] != first["new_rows"]


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


def test_another_seed_draws_other_rows(world, tmp_path):
    for seed in ("0", "1"):
        command = SAMPLE.replace("{w}", str(world)).replace("{t}", str(tmp_path / seed))
        assert main([*command.split(), "--seed", seed]) == 0
    one, other = (load_self_generated(tmp_path / seed / "out") for seed in ("0", "1"))
    assert not torch.equal(torch.from_numpy(one.tokens), torch.from_numpy(other.tokens))
