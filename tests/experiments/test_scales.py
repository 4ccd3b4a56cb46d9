"""What all studies of the laboratory share: parts made in processes of their own, and one report at the end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDY = f"""
'''A study of nothing.'''
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(EXPERIMENTS)!r})
from scales import conduct
HERE = Path(__file__).parent

def make(name, part):
    if part == 7:
        raise ValueError("part 7 does not fit")
    if part == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3 if part == 3 else 0.3)
    with open(HERE / "made.txt", "a") as file:
        file.write(f"{{name}} {{part}}\\n")
    (HERE / f"{{os.getpid()}}.pid").touch()

def report(name):
    return (HERE / "made.txt").read_text(), lambda path: path.write_text("figure")

conduct(__doc__.strip(), HERE, {{"laptop": 3}}, parts=range, make=make, report=report)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_parts_are_made_side_by_side_and_told_once(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(STUDY)
    (tmp_path / "README.md").write_text("<!-- results: written by run.py -->\n<!-- end of results -->")
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted((tmp_path / "made.txt").read_text().splitlines()) == [f"laptop {part}" for part in range(3)]
    assert len(list(tmp_path.glob("*.pid"))) == 2
    assert sorted(done.stdout.split("\n")) == sorted(["", "", *(tmp_path / "made.txt").read_text().splitlines()])
    assert (tmp_path / "figure.png").read_text() == "figure"
    assert "laptop 0" in (tmp_path / "README.md").read_text()
    for part, message in ((7, "part 7 does not fit"), (8, "was killed; finished runs are kept: run it again")):
        failed = run(tmp_path, "--seeds", "3", str(part))
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1].endswith(message)
        assert "laptop 3" not in (tmp_path / "made.txt").read_text(), "the other part is ended, too"


@pytest.mark.slow
def test_no_part_outlives_a_killed_study(tmp_path: Path) -> None:
    nap = "time.sleep(3 if part == 3 else 0.3)"
    assert nap in STUDY
    (tmp_path / "run.py").write_text(STUDY.replace(nap, "(HERE / f'{os.getpid()}.pid').touch(); time.sleep(60)"))
    study = subprocess.Popen([sys.executable, str(tmp_path / "run.py")])
    end = time.monotonic() + 60
    while len(found := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    parts = [psutil.Process(int(path.stem)) for path in found]
    study.kill()
    study.wait()
    assert len(parts) == 2
    assert not psutil.wait_procs(parts, timeout=10)[1]


@pytest.mark.parametrize(
    "name",
    [
        "02_baselines",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("06_continual_tasks", "09_learning_rate")),
    ],
)
def test_a_scale_of_which_nothing_is_made_says_so(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / name / "run.py"), "--scale", "paper", "--report"],
        capture_output=True, text=True, cwd=EXPERIMENTS.parent,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(rf"{name}, scale paper: no \w+ is made yet", done.stderr.splitlines()[-1]), done.stderr
    assert "scale paper is a sketch: nobody has run these settings" in done.stderr


def test_rows_are_appended_and_a_torn_one_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from harness import Results

    path = tmp_path / "results.jsonl"
    results = Results(path, "bench")
    results.make({"seed": 0}, lambda: {"loss": 1.0})
    with open(path, "a") as file:
        file.write('{"key": "torn"')
    again = Results(path, "bench")
    assert again.rows.keys() == results.rows.keys()
    again.make({"seed": 1}, lambda: {"loss": 2.0})
    assert [row["loss"] for row in Results(path, "bench").rows.values()] == [1.0, 2.0]


STUDIES = [path.name for path in sorted(EXPERIMENTS.glob("[01]*")) if "conduct(" in (path / "run.py").read_text()]
BUILD = """
import json, sys
sys.path.insert(0, {folder!r})
import run as study
kept = {{}}
study.conduct = lambda *given, **named: kept.update(named, scales=given[2])
study.main([])
from retain.lab.models import counted_size_of, make_config

def built(scale):
    world = getattr(scale, "world", scale)
    sizes = [size.name for size in world.sizes] if hasattr(world, "sizes") else [getattr(world, "model_size", None)]
    vocabulary, length = getattr(world, "vocab_size", 64), getattr(world, "max_length", 64)
    shapes = [make_config(size, vocab_size=vocabulary, max_length=length) for size in sizes if size]
    return {{"parts": len(list(kept["parts"](scale))), "params": [counted_size_of(shape) for shape in shapes]}}

print(json.dumps({{name: built(scale) for name, scale in kept["scales"].items()}}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_scale_of_a_study_can_be_built(name: str) -> None:
    """Its settings are valid, its models have shapes, and it has parts to make; nothing is trained."""
    code = BUILD.format(folder=str(EXPERIMENTS / name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scales = json.loads(done.stdout)
    assert list(scales) == ["laptop", "gpu", "paper"]
    assert all(scale["parts"] for scale in scales.values())
    largest = [max(scale["params"], default=0) for scale in scales.values()]
    assert largest == sorted(largest), "a study grows with its scale"


def test_the_studies_of_the_laboratory_have_scales() -> None:
    assert [name[:2] for name in STUDIES] == ["02", "06", "07", "08", "09", "10", "11", "12", "13"]
