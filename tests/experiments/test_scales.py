"""What all studies of the laboratory share: parts made in processes of their own, and one report at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
STUDY = """
'''A study of nothing.'''
import os, signal, sys, time
from pathlib import Path
from experiments.program import conduct
HERE = Path(__file__).parent

def make(name, part):
    if part == 7:
        raise ValueError("part 7 does not fit")
    if part == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3 if part == 3 else 0.3)
    with open(HERE / "made.txt", "a") as file:
        file.write(f"{name} {part}\\n")
    (HERE / f"{os.getpid()}.pid").touch()

def report(name):
    return (HERE / "made.txt").read_text(), lambda path: path.write_text("figure")

conduct(__doc__.strip(), HERE, {"laptop": 3}, parts=range, make=make, report=report)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


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
    for part, message in ((7, "part 7 does not fit"), (8, "was killed; finished runs are kept: run the command again")):
        failed = run(tmp_path, "--seeds", "3", str(part))
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1].endswith(message)
        assert "laptop 3" not in (tmp_path / "made.txt").read_text(), "the other part is ended, too"


@pytest.mark.slow
def test_no_part_outlives_a_killed_study(tmp_path: Path) -> None:
    nap = "time.sleep(3 if part == 3 else 0.3)"
    assert nap in STUDY
    (tmp_path / "run.py").write_text(STUDY.replace(nap, "(HERE / f'{os.getpid()}.pid').touch(); time.sleep(60)"))
    study = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=ENVIRONMENT)
    end = time.monotonic() + 60
    while len(found := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    parts = [psutil.Process(int(path.stem)) for path in found]
    study.kill()
    study.wait()
    assert len(parts) == 2
    assert not psutil.wait_procs(parts, timeout=10)[1]


@pytest.mark.parametrize("name", ["02_baselines", "06_continual_tasks", "09_learning_rate"])
def test_a_study_of_which_nothing_is_made_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = import_module(f"experiments.study_{name}.run")
    monkeypatch.setattr(study, "HERE", tmp_path / f"study_{name}")
    with pytest.raises(SystemExit, match=rf"^study_{name}, scale laptop: no \w+ is made yet$"):
        study.main(["--report"])
