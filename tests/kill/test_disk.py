"""A full disk, a folder that cannot be written, and two commands in one folder: one line, and nothing is lost."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from killing import TRAIN, differences, flags, make_kinds, make_world, snapshot
from test_kill import server, world  # noqa: F401

from retain.cli.main import main
from retain.files import exclusive


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing more into a file fails with EFBIG, as it does with ENOSPC on a full disk; for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    root = make_world(tmp_path_factory.mktemp("here"))
    return root


def commands(w: Path) -> dict[str, list[str]]:
    """Short runs of every verb that writes a folder."""
    tune = flags(
        dataset_name=w / "rows.jsonl",
        eval_dataset_name=w / "held.jsonl",
        replay_dataset="self",
        replay_num_rows=8,
        **TRAIN | {"max_steps": 4},
    )
    pretrain = flags(corpus="synthetic", num_states=16, vocab_size=16, branching=3, max_length=16, model_size=20000)
    plan = flags(model=w / "model", dataset_name=w / "rows.jsonl", retention=f"wiki={w}/wiki.txt", max_ref_kl=0.01)
    sample = flags(model_name_or_path=w / "model", num_rows=8, rows_per_shard=4, max_length=32)
    return {
        "sample": ["sample", *sample],
        "finetune": ["finetune", *flags(model_name_or_path=w / "model"), *tune],
        "measure": ["measure", *flags(base=w / "model", model=w / "tuned", retention=f"wiki={w}/wiki.txt"),
                    *flags(max_length=32, max_new_tokens=4)],
        "pretrain": ["pretrain", *pretrain, *flags(max_steps=8, use_cpu=True, disable_tqdm=True, eval_rows=4)],
        "sweep": ["sweep", str(w / "sweep.yaml")],
        "plan": ["plan", *plan],
    }  # fmt: skip


def complaint(argv: list[str], capsys) -> str:
    """The one line with which a command fails."""
    capsys.readouterr()
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    (line,) = (line for line in said.err.splitlines() if line.startswith(f"retain {argv[0]}: "))
    assert said.err.strip().splitlines()[-1] == line
    return line


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


# How many bytes of a file can be written, and the file that is larger, or the folder where it lies.
FULL = [
    ("sample", ["--store_reference", "none"], 1500, "shard-00000.parquet"),
    ("sample", ["--store_reference", "hidden"], 8000, "reference-00000.safetensors"),
    ("finetune", [], 60_000, "out"),  # the weights of a checkpoint
    ("finetune", [], 250_000, "out"),  # its optimizer's state
    ("pretrain", [], 50_000, "out"),
    ("measure", [], 6_000, "report."),
]


@pytest.mark.parametrize(("verb", "more", "size", "name"), FULL)
def test_a_full_disk_is_named_and_the_command_goes_on(here, tmp_path, capsys, monkeypatch, verb, more, size, name):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    argv = [*commands(here)[verb], *more, "--output_dir", str(tmp_path / "out")]
    with no_file_above(size):
        line = complaint(argv, capsys)
    assert name in line, line
    assert "File too large: " in line or "No space left on device: " in line
    assert line.endswith("; check the path, its permissions and the space left")
    assert not parts(tmp_path)
    resume = ["--resume_from_checkpoint", "true"] if verb in ("finetune", "pretrain") else []
    assert main([*argv, *resume]) == 0
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "whole" / "cache"))
    whole = [*commands(here)[verb], *more, "--output_dir", str(tmp_path / "whole" / "out")]
    assert main(whole) == 0
    out, places = tmp_path / "out", (str(tmp_path / "whole"), str(tmp_path))
    assert not differences(snapshot(tmp_path / "whole" / "out"), snapshot(out), places)


@pytest.mark.slow
def test_what_was_there_before_a_full_disk_stays(here, tmp_path, capsys):
    """An older report is still there whole when a newer one does not fit; so are a run's checkpoints."""
    argv = [*commands(here)["measure"], "--output_dir", str(tmp_path / "report")]
    assert main(argv) == 0
    before = snapshot(tmp_path / "report")
    with no_file_above(4_000):
        complaint([*argv, "--max_length", "16"], capsys)
    assert snapshot(tmp_path / "report") == before
    tune = [*commands(here)["finetune"], "--max_steps", "8", "--output_dir", str(tmp_path / "out")]
    assert main([*tune, "--save_total_limit", "9"]) == 0
    before = snapshot(tmp_path / "out" / "checkpoint-4")
    for checkpoint in (6, 8):
        (tmp_path / "out" / f"checkpoint-{checkpoint}" / "trainer_state.json").unlink()
    again = [*tune, "--save_total_limit", "9", "--resume_from_checkpoint", "true"]
    with no_file_above(60_000):
        complaint(again, capsys)
    assert snapshot(tmp_path / "out" / "checkpoint-4") == before
    assert main(again) == 0
    assert snapshot(tmp_path / "out" / "checkpoint-4") == before


@pytest.mark.parametrize("verb", ["sample", "finetune", "measure", "pretrain", "sweep", "plan"])
def test_a_file_in_the_place_of_the_folder(here, tmp_path, capsys, verb):
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in complaint([*commands(here)[verb], "--output_dir", str(tmp_path / "out")], capsys)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("verb", ["sample", "finetune", "measure", "pretrain", "sweep", "plan"])
def test_a_second_command_in_one_folder_is_refused(here, tmp_path, capsys, verb):
    with exclusive(tmp_path / "out", "a report"):
        line = complaint([*commands(here)[verb], "--output_dir", str(tmp_path / "out")], capsys)
        assert os.listdir(tmp_path / "out") == [".lock"], "nothing was written into it"
    assert line == (
        f"retain {verb}: output_dir: another process is writing to {str(tmp_path / 'out')!r}; wait for it, or choose "
        "another folder"
    )


def test_a_folder_that_was_made_for_nothing_goes(here, tmp_path, capsys):
    line = complaint([*commands(here)["finetune"], "--learning_rate", "1", "--replay_dataset", "none", "--output_dir",
                      str(tmp_path / "out")], capsys)  # fmt: skip
    assert "none" in line
    assert not (tmp_path / "out").exists()


# A disk of its own, where it can be mounted


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk is for root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "size"), [(1, 120), (1, 400), (2, 600), (2, 1300), (3, 500), (7, 200), (9, 600)])
def test_a_small_disk_fills(server, world, disk, tmp_path, at, size):  # noqa: F811
    """ENOSPC wherever it comes first; when there is space, the same command ends as if nothing had been."""
    kind = make_kinds(world)[at]
    argv = [*kind.argv, "--output_dir", str(disk / "run" / "out")]
    remount(disk, f"size={size}k")
    done = server.run(argv, disk / "run")
    assert done["code"] in (0, 1), done["said"][-2000:]
    assert "Traceback" not in done["said"]
    if done["code"]:
        line = done["said"].strip().splitlines()[-1]
        assert line.startswith(f"retain {kind.argv[0]}: No space left on device: '{disk}"), done["said"][-2000:]
        assert not parts(disk)
    remount(disk, "size=64m")
    again = [*argv, "--resume_from_checkpoint", "true"] if kind.resumes else argv
    assert server.run(again, disk / "run")["code"] == 0
    whole = [*kind.argv, "--output_dir", str(tmp_path / "whole" / "out")]
    assert server.run(whole, tmp_path / "whole")["code"] == 0
    places = (str(tmp_path / "whole"), str(disk / "run"))
    assert not differences(snapshot(tmp_path / "whole"), snapshot(disk / "run"), places)
    print(f"\n{kind.name}, {size} KiB: {done['said'].strip().splitlines()[-1] if done['code'] else 'it fitted'}")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample", "finetune", "measure", "pretrain", "sweep", "plan"])
def test_a_disk_that_is_for_reading_only(here, disk, capsys, verb):
    remount(disk, "ro")
    line = complaint([*commands(here)[verb], "--output_dir", str(disk / "out")], capsys)
    assert f"Read-only file system: '{disk}" in line
    assert line.endswith("; check the path, its permissions and the space left")
