"""Sweeps of real pretraining runs, killed while they train: each resumes and ends with the same weights."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from retain.cli.sweep import SweepConfig, make_runs, read_sweep
from retain.files import read_jsonl

pytestmark = pytest.mark.slow
KILLS = 10
RATES = [3e-3, 1e-3]
SEEDS = [0, 1]
COMMON = {
    "corpus": "synthetic", "num_states": 16, "vocab_size": 16, "branching": 3, "max_length": 16, "model_size": 20000,
    "max_steps": 400, "save_steps": 20, "logging_steps": 10, "eval_steps": 100, "eval_rows": 16, "use_cpu": True,
    "per_device_train_batch_size": 4, "disable_tqdm": True,
}  # fmt: skip
OF_ITS_DAY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime"}
OF_ITS_DAY |= {"eval_samples_per_second", "eval_steps_per_second", "seconds"}  # of the clock
OF_ITS_DAY |= {"train_loss"}  # transformers' mean over the steps since a run went on
DRIVER = "import sys; from retain.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text(json.dumps({"verb": "pretrain", "common": COMMON, "grid": {"learning_rate": RATES, "seed": SEEDS}}))
    return path


def make(sweep: Path, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    return make_runs(SweepConfig(sweep=str(sweep), output_dir=str(folder), **settings), read_sweep(sweep))


@pytest.fixture(scope="module")
def undisturbed(sweep: Path) -> dict[str, Any]:
    rows = make(sweep, sweep.parent / "whole", num_workers=2)
    assert not any(pretrained(row)["resumed"] for row in rows)
    return {row["key"]: ends(row) for row in rows}


def pretrained(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(row["folder"]) / "pretrain.json").read_text())


def ends(row: dict[str, Any]) -> tuple[dict[str, float], str]:
    """What a run says in the end of more than its last stretch, and its weights' bits."""
    weights = (Path(row["folder"]) / "model.safetensors").read_bytes()
    values = {name: value for name, value in row["result"].items() if name not in OF_ITS_DAY}
    return values, hashlib.sha256(weights).hexdigest()


def lines(folder: Path) -> dict[str, int]:
    """How much each run has logged so far."""
    return {path.parent.name: path.read_bytes().count(b"\n") for path in folder.glob("runs/*/metrics.jsonl")}


def trained(folder: Path) -> float:
    """When a run last logged something."""
    return max((path.stat().st_mtime for path in folder.glob("runs/*/metrics.jsonl")), default=0.0)


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it came to nothing"
        time.sleep(0.02)


def test_ten_kills_change_nothing(sweep: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """The moments are drawn from what the runs have logged, so that they lie all over a sweep on any machine."""
    every = sum(lines(sweep.parent / "whole").values())
    command = [sys.executable, "-c", DRIVER, "sweep", str(sweep), "--output_dir", str(tmp_path), "--num_workers", "2"]
    rng = np.random.default_rng(0)
    for moment in sorted(rng.integers(1, int(0.8 * every), KILLS)):
        began = time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda moment=moment, began=began: sum(lines(tmp_path).values()) >= moment and trained(tmp_path) > began)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it was killed ten times"
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(children, timeout=10)[1], "a run outlives its sweep"
    rows = make(sweep, tmp_path, num_workers=2)
    assert {row["key"]: ends(row) for row in rows} == undisturbed
    kept = read_jsonl(tmp_path / "results.jsonl")
    assert len(kept) == len({row["key"] for row in kept}) == len(undisturbed)
    assert any(pretrained(row)["resumed"] for row in rows)
