"""Sweeps: which runs there are, each made once, and nothing lost to a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import save_model
from test_safety import without_network

from retain.cli.main import main
from retain.cli.sweep import SweepConfig, last_values, make_runs, read_sweep
from retain.files import exclusive, read_jsonl
from retain.lab import runner
from retain.lab.runner import VerbRun

# Stands for a run of `finetune`: logs a number, takes a while, writes its result at the end.
FAKE = """
import json, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = Path(flags["--output_dir"]); folder.mkdir(parents=True, exist_ok=True)
with open(folder / "begun", "a") as file: file.write("x")
time.sleep(float(flags.get("--sleep", 0.05)))
if flags.get("--fail"): sys.exit(f"retain finetune: {flags['--fail']}")
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval_loss": 2 * float(flags["--x"])}) + "\\n")
"""


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner, "PROGRAM", FAKE)


def write(path: Path, **sweep) -> str:
    path.write_text(json.dumps({"verb": "finetune", **sweep}))  # JSON is YAML
    return str(path)


def make(path: str, folder: Path, **settings) -> list[dict]:
    """The rows of a sweep whose flags no verb knows."""
    return make_runs(SweepConfig(sweep=path, output_dir=str(folder), **settings), read_sweep(path))


def test_a_grid_times_a_list(tmp_path):
    (tmp_path / "sft.yaml").write_text("learning_rate: 0.5\nmax_steps: 9\noutput_dir: theirs\n")
    path = write(
        tmp_path / "s.yaml",
        common={"config": str(tmp_path / "sft.yaml"), "max_steps": 4, "seed": None},
        grid={"lora_r": [1, 2], "x": ["a"]},
        list=[{"replay_coef": 0}, {"replay_coef": 1, "replay_dataset": "r"}],
    )
    runs = read_sweep(path)
    shared = {"learning_rate": 0.5, "max_steps": 4, "x": "a"}
    assert [dict(run.flags) for run in runs] == [
        {**shared, "lora_r": rank, **entry}
        for rank in (1, 2)
        for entry in ({"replay_coef": 0}, {"replay_coef": 1, "replay_dataset": "r"})
    ]
    assert len({run.key for run in runs}) == 4
    assert runs[0].key == VerbRun("finetune", dict(reversed(runs[0].flags.items()))).key, "order is no setting"
    assert runs[0].key != VerbRun("pretrain", runs[0].flags).key


def test_a_run_as_a_command(tmp_path):
    run = VerbRun("finetune", {"a": True, "retention": ["x=1", "y=2"], "k": {"b": 1}})
    assert run.arguments(tmp_path) == [
        "finetune", "--a", "true", "--retention", "x=1", "y=2", "--k", '{"b": 1}', "--output_dir", str(tmp_path),
    ]  # fmt: skip
    (tmp_path / "checkpoint-5").mkdir()
    assert run.arguments(tmp_path)[-2:] == ["--resume_from_checkpoint", "true"]
    assert "--resume_from_checkpoint" not in VerbRun("sample", {}).arguments(tmp_path)


def test_finished_runs_are_skipped_and_broken_ones_made_again(tmp_path, fake):
    path = write(tmp_path / "s.yaml", grid={"x": [1, 2, 3]})
    rows = make(path, tmp_path / "out", num_workers=2)
    assert [row["result"]["eval_loss"] for row in rows] == [2, 4, 6]
    assert all(row["status"] == "done" and row["exit_code"] == 0 and row["versions"] for row in rows)
    wider = write(tmp_path / "s.yaml", grid={"x": [1, 2, 3, 4]})
    assert len(make(wider, tmp_path / "out")) == 4
    begun = [len((Path(row["folder"]) / "begun").read_text()) for row in read_jsonl(tmp_path / "out" / "results.jsonl")]
    assert begun == [1, 1, 1, 1]
    broken = write(tmp_path / "s.yaml", grid={"x": [1]}, list=[{"fail": "rank: 0 does not fit"}, {}])
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^sweep: 1 of 2 runs failed, .*: retain finetune: rank: 0 does not fit; correct"
        ):
            make(broken, tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed"] * 2, "a broken run is tried again"


def test_runs_are_given_threads_and_no_more_run_together_than_there_are_workers(tmp_path, monkeypatch):
    timed = """
import json, os, sys, time
from pathlib import Path
folder, began = Path(sys.argv[-1]), time.time()
folder.mkdir(parents=True)
time.sleep(0.5)
row = {"step": 1, "began": began, "ended": time.time(), "threads": int(os.environ["OMP_NUM_THREADS"])}
(folder / "metrics.jsonl").write_text(json.dumps(row))
"""
    monkeypatch.setattr(runner, "PROGRAM", timed)
    path = write(tmp_path / "s.yaml", grid={"x": [1, 2, 3]})
    rows = make(path, tmp_path / "out", num_workers=2, cores_per_run=3)
    first, second, third = sorted((row["result"] for row in rows), key=lambda result: result["began"])
    assert second["began"] < first["ended"]
    assert third["began"] > min(first["ended"], second["ended"])
    assert {row["result"]["threads"] for row in rows} == {3}


def test_the_last_value_of_everything_is_collected(tmp_path):
    rows = [{"step": 1, "loss": 3.0, "note": "x"}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = {"retention": {"a": {"ref_kl": {"value": 0.5, "ci": [0, 1]}}}, "new_task": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert last_values(tmp_path) == {"step": 2, "loss": 2.0, "eval_loss": 2.5, "retention/a/ref_kl": 0.5}


def test_the_numbers_of_questions_and_of_several_models_are_collected(tmp_path):
    """A row of such a sweep was done, and empty."""
    number = {"value": 0.5, "ci": [0, 1], "num_questions": 4}
    answers = {"style": "x", "rules": {"acc": {"agreement": number, "counts": {"right_right": 2}, "mcnemar_p": 0.1}}}
    asked = {"name": "a", "retention": {}, "choices": {"q": answers}, "worst": {"w": []}}
    (tmp_path / "report.json").write_text(json.dumps(asked))
    assert last_values(tmp_path) == {"choices/q/rules/acc/agreement": 0.5}
    texts = {"name": "b", "retention": {"wiki": {"ref_kl": number | {"value": 0.25}, "loss": {"value": None}}}}
    (tmp_path / "report.json").write_text(json.dumps({"runs": [asked, texts], "comparison": {}}))
    assert last_values(tmp_path) == {"a/choices/q/rules/acc/agreement": 0.5, "b/retention/wiki/ref_kl": 0.25}


WAITING = "from retain.cli.main import main\nsys.exit(main(sys.argv[1:]))", "import time; time.sleep(60)"
DRIVER = """
import sys
sys.path.insert(0, {source!r})
from retain.cli.sweep import SweepConfig, make_runs, read_sweep
from retain.lab import runner
runner.PROGRAM = {program!r}
make_runs(SweepConfig(sweep={path!r}, output_dir={out!r}, num_workers=2), read_sweep({path!r}))
"""


def test_no_process_outlives_a_killed_sweep(tmp_path):
    """Else the next sweep would write into the same folder beside it."""
    program = runner.PROGRAM.replace(*WAITING)
    path = write(tmp_path / "s.yaml", grid={"x": [1]})
    source = str(Path(runner.__file__).parents[2])
    driver = DRIVER.format(source=source, program=program, path=path, out=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.DEVNULL)
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_a_run_whose_sweep_died_before_it_began_does_nothing():
    done = subprocess.run([sys.executable, "-c", runner.PROGRAM.replace(*WAITING)], stdin=subprocess.DEVNULL, timeout=9)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("verb: [", "is not YAML"),
        ("- a", "holds list, not keys with values"),
        ("verb: 3", "has verb 3; name one of retain's"),
        ("verb: finetune\ngird: {a: [1]}", "has 'gird'; use common, grid, list, verb"),
        ("verb: finetune\ngrid: {a: 1}", "grid of 'a' in .* is 1; give a list of values"),
        ("verb: finetune\ngrid: {a: [1, 1]}", "has a run twice: {'a': 1}; leave one out"),
        ("verb: finetune\nlist: [3]", "flags in every list entry"),
        ("verb: finetune\ncommon: {output_dir: x}", "output_dir in .* is chosen by the sweep"),
        ("verb: finetune\ncommon: {a: 2026-11-22}", "has 'common': .*; give text .dates in quotes., numbers or lists"),
        ("verb: finetune\ngrid: {a: [!!set {x}]}", "has 'grid': .*; give text"),
        ("verb: finetune\n3: x", "has 3: 'x'; give text"),
        ("verb: finetune\ncommon: {config: [a]}", r"config in .* is \['a'\]; give the path of one YAML file"),
        ("verb: finetune\ncommon: {config: nowhere.yaml}", "config: cannot read 'nowhere.yaml'"),
    ],
)
def test_a_bad_sweep_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_sweep(tmp_path / "s.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("sample", {"num_rowz": 4}, "--num_rowz: unknown argument"),
        ("sample", {"num_rows": "many"}, "num_rows: 'many' does not fit; use a whole number"),
        ("measure", {"base": "m", "what": 1}, "--what: unknown argument"),
        (
            "finetune",
            {"model_name_or_path": "m", "dataset_name": "d", "number_processes": 2},
            "--number_processes: unknown argument",
        ),
        ("finetune", {"dataset_name": "d", "save_strategy": "often"}, "invalid choice: 'often'"),
        ("pretrain", {"corpus": "synthetic", "model_sise": "1M"}, "--model_sise: unknown argument"),
        ("weep", {"x": 1}, "verb 'weep'"),
        ("sweep", {"sweep": "s.yaml"}, "verb 'sweep'"),
    ],
)
def test_no_run_begins_where_the_flags_of_one_are_wrong(tmp_path, capsys, fake, verb, flags, message):
    good = {"model_name_or_path": "m"} if verb in ("sample", "finetune") else {}
    path = write(tmp_path / "s.yaml", verb=verb, list=[{**good, **flags}])
    assert main(["sweep", path, "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"retain sweep: sweep: {path}")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_second_sweep_in_one_folder_is_refused(tmp_path, fake):
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out", "a sweep"), pytest.raises(ValueError, match="another process is writing"):
        make(write(tmp_path / "s.yaml", grid={"x": [1]}), tmp_path / "out")


@pytest.mark.program
def test_a_sweep_on_the_command_line(tmp_path, capsys, monkeypatch):
    """A real run of `sample`, which asks for no network."""
    for name, value in without_network(tmp_path / "path").items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    folder = save_model(tmp_path / "model")
    shared = {"model_name_or_path": str(folder), "num_rows": 4, "max_length": 16}
    (tmp_path / "s.yaml").write_text(json.dumps({"verb": "sample", "common": shared, "grid": {"seed": [0]}}))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--output_dir", str(tmp_path / "out")]) == 0
    assert "1 run: " in capsys.readouterr().out
    assert [row["status"] for row in read_jsonl(tmp_path / "out" / "results.jsonl")] == ["done"]
