"""SIGINT and SIGTERM: one line, exit code 130 or 143, a checkpoint where one is expected, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_texts
from killing import TRAIN, differences, flags, make_kinds, make_world, run_fresh, snapshot
from test_kill import server, world  # noqa: F401

import retain.cli.flags
import retain.lab.runner
import retain.measuring.measure
import retain.sampling.write
from retain.cli import finetune
from retain.cli.main import load_verb, main
from retain.training.stopping import SAME_ON_RESUME
from retain.training.trainer import ReplaySFTTrainer

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A job that a shell starts in the background ignores SIGINT, and so would these tests and their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("here"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def last_line(capsys) -> str:
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return said.err.strip().splitlines()[-1]


RESUME = "run the same command with --resume_from_checkpoint true to resume from the last checkpoint"
BEGIN_AGAIN = "there is no checkpoint yet; run the same command to begin again"
KEPT = {"reference": "safetensors", "shard": "parquet"}


@pytest.mark.parametrize("number", CODES)
def test_sampling_stops_and_goes_on(here, tmp_path, capsys, monkeypatch, number):
    argv = ["sample", *flags(model_name_or_path=here / "model", num_rows=16, rows_per_shard=4, max_length=16)]
    assert main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    write, before = (
        retain.sampling.write.write_shard,
        signal.getsignal(signal.SIGTERM),
    )  # Ray's, where it was begun here

    def stop(folder, shard, *rest):
        write(folder, shard, *rest)
        if shard == 1:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(retain.sampling.write, "write_shard", stop)
        assert main([*argv, "--output_dir", str(tmp_path / "out")]) == CODES[number]
    assert last_line(capsys) == f"retain sample: {WORDS[number]}; run the same command again to resume"
    shards = [f"{kind}-0000{at}.{end}" for kind, end in KEPT.items() for at in (0, 1)]
    assert files(tmp_path / "out") == ["manifest.json", *shards]
    assert signal.getsignal(signal.SIGTERM) == before
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    assert not differences(snapshot(tmp_path / "whole"), snapshot(tmp_path / "out"), ("whole", "out"))


@pytest.fixture(scope="module")
def tune(here) -> list[str]:
    argv = ["finetune", *flags(model_name_or_path=here / "model", dataset_name=here / "rows.jsonl", **TRAIN)]
    argv += flags(eval_dataset_name=here / "held.jsonl", retention=[f"wiki={here}/wiki.txt"])
    lora = flags(lora_r=4, lora_dropout=0.1, lora_target_modules="all-linear")
    return [*argv, "--use_peft", *lora, *flags(replay_dataset="self", replay_num_rows=16, max_steps=6)]


def raising(monkeypatch, numbers: list[int], step: int = 2) -> None:
    """Signals that arrive while step `step` + 1 is made."""
    training_step = ReplaySFTTrainer.training_step

    def stop(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        for number in numbers if self.state.global_step == step else ():
            signal.raise_signal(number)
        return loss

    monkeypatch.setattr(ReplaySFTTrainer, "training_step", stop)


@pytest.fixture(scope="module")
def undisturbed(tune, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*tune, "--output_dir", str(folder / "out")]) == 0
    return folder


def test_finetuning_stops_with_a_checkpoint_and_goes_on_to_the_bit(tune, undisturbed, tmp_path, capsys, monkeypatch):
    """At SIGTERM; tests/training/test_footguns.py has SIGINT."""
    number = signal.SIGTERM
    with monkeypatch.context() as patch:
        raising(patch, [number])
        assert main([*tune, "--output_dir", str(tmp_path / "out")]) == CODES[number]
    assert last_line(capsys) == f"retain finetune: {WORDS[number]}; {RESUME}"
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3, "the step that was being made is kept; checkpoints are due at 2 and 4"
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists(), "half a run does not pass for a whole one"
    assert main([*tune, "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "out")]) == 0
    places = (str(undisturbed), str(tmp_path))
    assert not differences(snapshot(undisturbed), snapshot(tmp_path), places)


def test_a_second_signal_stops_at_once(tune, tmp_path, capsys, monkeypatch):
    raising(monkeypatch, [signal.SIGINT, signal.SIGINT])
    assert main([*tune, "--output_dir", str(tmp_path / "out")]) == 130
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]


@pytest.mark.parametrize("number", CODES)
def test_a_signal_that_python_drops_is_sent_again(capsys, monkeypatch, number):
    """What is raised while an object is finalised is dropped, whatever it is."""

    class Unlucky:
        def __del__(self):
            signal.raise_signal(number)

    def work(self, argv):
        Unlucky()
        for _ in range(100):
            time.sleep(0.1)

    monkeypatch.setattr(retain.cli.flags.Verb, "__call__", work)
    assert main(["sample", "--num_rows", "1"]) == CODES[number]
    assert last_line(capsys).startswith(f"retain sample: {WORDS[number]}; ")


def test_without_checkpoints_there_is_none(tune, tmp_path, capsys, monkeypatch):
    argv = [*tune, "--save_strategy", "no", "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        raising(patch, [signal.SIGTERM])
        assert main(argv) == 143
    assert last_line(capsys) == f"retain finetune: terminated; {BEGIN_AGAIN}"
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert main(argv) == 0
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("number", CODES)
def test_measuring_stops_and_leaves_nothing(here, tmp_path, capsys, monkeypatch, number):
    argv = ["measure", *flags(base=here / "model", model=here / "tuned", retention=f"wiki={here}/wiki.txt")]
    argv += flags(max_length=32, max_new_tokens=4, output_dir=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            retain.measuring.measure, "measure_generations", lambda *args, **kwargs: signal.raise_signal(number)
        )
        assert main(argv) == CODES[number]
    assert last_line(capsys) == f"retain measure: {WORDS[number]}; nothing was written; run it again"
    assert not (tmp_path / "out").exists()
    assert main(argv) == 0


# A run that takes long, and ends well when it is asked to stop.
POLITE = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1]); folder.mkdir(parents=True)
def stop(*args): (folder / "stopped").write_text("x"); sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(folder / "begun").write_text("x")
for _ in range(600): time.sleep(0.1)  # short ones: a signal just before a sleep begins waits for its end
"""


@pytest.mark.parametrize("number", CODES)
def test_a_stopped_sweep_asks_its_runs_to_stop(tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr(retain.lab.runner, "PROGRAM", POLITE)
    (tmp_path / "s.yaml").write_text(json.dumps({"verb": "finetune", "grid": {"max_steps": [1]}}))

    def stop_when_begun() -> None:
        while not list((tmp_path / "out").glob("runs/*/begun")):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_begun, daemon=True).start()
    assert main(["sweep", str(tmp_path / "s.yaml"), "--output_dir", str(tmp_path / "out")]) == CODES[number]
    assert last_line(capsys) == f"retain sweep: {WORDS[number]}; {load_verb('sweep').resume}"
    assert list((tmp_path / "out").glob("runs/*/stopped"))


def test_a_new_run_is_not_begun_over_old_checkpoints(tune, undisturbed, capsys):
    """Were it killed before its first checkpoint, it would go on from the other run's."""
    before = snapshot(undisturbed)
    assert main([*tune, "--learning_rate", "1", "--output_dir", str(undisturbed / "out")]) == 1
    assert "of an earlier run; resume it with --resume_from_checkpoint true, or choose another" in last_line(capsys)
    assert snapshot(undisturbed) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [("data_seed", 5), ("learning_rate", 0.5), ("lr_scheduler_type", "cosine"), ("per_device_train_batch_size", 3),
     ("replay_coef", 7.0), ("replay_objective", "ntp"), ("max_ref_kl", 0.5), ("anchor_coef", 7.0), ("lora_r", 2)],
)  # fmt: skip
def test_a_run_does_not_go_on_with_other_settings(tune, undisturbed, capsys, monkeypatch, flag, value):
    if flag in SAME_ON_RESUME:
        monkeypatch.setattr(finetune, "load_for_training", None)  # refused before a model is loaded
    before = snapshot(undisturbed)
    argv = [*tune, "--resume_from_checkpoint", "true", "--output_dir", str(undisturbed / "out")]
    assert main([*argv, f"--{flag}", str(value)]) == 1
    named = "num_params: " if flag == "lora_r" else f"{flag}: {value!r}"  # not what is chosen otherwise because of it
    assert f"finetune: {named}" in (line := last_line(capsys))
    assert f"but the run in {str(undisturbed / 'out')!r} started with" in line
    assert snapshot(undisturbed) == before


def test_a_run_does_not_go_on_with_other_rows(tune, undisturbed, tmp_path, capsys):
    rows = tmp_path / "other.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(16, seed=77)))
    before = snapshot(undisturbed)
    argv = [*tune, "--resume_from_checkpoint", "true", "--output_dir", str(undisturbed / "out")]
    assert main([*argv, "--dataset_name", str(rows)]) == 1
    assert "finetune: new_rows: the run in " in last_line(capsys)
    assert snapshot(undisturbed) == before


def test_a_finished_run_that_goes_on_is_as_it_was(tune, undisturbed, tmp_path):
    """A run may be killed between its last line and its end: nothing is told twice."""
    import shutil

    shutil.copytree(undisturbed, tmp_path / "copy")
    assert main([*tune, "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "copy" / "out")]) == 0
    places = (str(undisturbed), str(tmp_path / "copy"))
    assert not differences(snapshot(undisturbed), snapshot(tmp_path / "copy"), places)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 3, 7, 8, 9])
def test_stopped_at_random_moments(server, world, tmp_path, at):  # noqa: F811
    """As by Ctrl-C and by a scheduler, of processes that load everything themselves, too."""
    kind, rng = make_kinds(world)[at], np.random.default_rng(at)

    def argv(folder: Path, again: bool) -> list[str]:
        resume = ["--resume_from_checkpoint", "true"] if again and kind.resumes else []
        return [*kind.argv, *resume, "--output_dir", str(folder / "out")]

    whole = server.run(argv(tmp_path / "whole", False), tmp_path / "whole")
    folder, stopped = tmp_path / "stopped", 0
    for attempt, number in enumerate([signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM]):
        if attempt < 3:
            after = rng.uniform(0.3, whole["seconds"])
            found = server.run(argv(folder, attempt > 0), folder, kill_after=after, number=number)
        else:
            after = rng.uniform(2, server.startup)
            found = run_fresh(argv(folder, True), folder, after, tmp_path / "log.txt", number=number)
        assert "Traceback" not in found["said"], found["said"][-2000:]
        last_words = whole["said"].strip().splitlines()[-1].replace(str(tmp_path / "whole"), str(folder))
        if found["code"] == -number and found["said"].strip().endswith(last_words):
            continue  # it was through, and Python on its way out, where nobody hears any more
        assert found["code"] in (0, CODES[number]), (found["code"], found["said"][-2000:])
        stopped += found["code"] != 0
        if found["code"]:
            assert found["said"].strip().splitlines()[-1].startswith(f"retain {kind.argv[0]}: {WORDS[number]}; ")
        assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert server.run(argv(folder, True), folder)["code"] == 0
    # A stop adds a checkpoint of its own, and with save_total_limit another goes: the rest must be equal.
    whole_files, files_after = (
        {name: value for name, value in snapshot(place).items() if "checkpoint-" not in name}
        for place in (tmp_path / "whole", folder)
    )
    assert not differences(whole_files, files_after, (str(tmp_path / "whole"), str(folder)))
    print(f"\n{kind.name}: stopped {stopped} times")
