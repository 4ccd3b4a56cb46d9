"""Two processes over gloo give the run of one: the same rows, the same logged replay loss, the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from ddp_run import CASES

HERE = Path(__file__).parent


def launch(folder: Path, processes: int, batch: int) -> None:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(HERE / "ddp_run.py"), str(folder), str(batch)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_are_one(tmp_path: Path) -> None:
    launch(tmp_path / "one", 1, 4)
    launch(tmp_path / "two", 2, 2)
    for name in CASES:
        one, two = (torch.load(tmp_path / run / f"{name}.pt", weights_only=True) for run in ("one", "two"))
        gap = max(float((one["weights"][key] - two["weights"][key]).abs().max()) for key in one["weights"])
        assert gap < 5e-6, (name, gap)
        assert torch.allclose(torch.tensor(one["kl"]), torch.tensor(two["kl"]), rtol=1e-4, atol=1e-7), name
        assert max(one["kl"]) > 1e-6, name
