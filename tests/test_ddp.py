"""Two processes over gloo give the run of one: the same rows, losses and weights, with DDP and with FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from ddp_run import CASES

from retain.sampling import sample_replay

HERE = Path(__file__).parent
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def launch(folder: Path, processes: int, batch: int, way: str) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(HERE / "ddp_run.py"), str(folder), str(batch), way]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if way == "fsdp2":
        environment |= FSDP2
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CASES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """All cases by one process, by two with DDP, and by two with FSDP2."""
    folder = tmp_path_factory.mktemp("processes")
    sample_replay(
        make_model(), make_tokenizer(), folder / "stored", num_rows=20, max_length=20, seed=6, store_reference="hidden"
    )
    return {
        "one": launch(folder / "one", 1, 4, "ddp"),
        "ddp": launch(folder / "ddp", 2, 2, "ddp"),
        "fsdp2": launch(folder / "fsdp2", 2, 2, "fsdp2"),
    }


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(runs: dict[str, dict[str, dict[str, Any]]], way: str, name: str) -> None:
    one, two = runs["one"][name], runs[way][name]
    assert two["sharded"] == (way == "fsdp2")
    assert one["weights"].keys() == two["weights"].keys()
    gap = max(float((one["weights"][key] - two["weights"][key]).abs().max()) for key in one["weights"])
    assert gap < 5e-6
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["replay/loss"] == pytest.approx(one["replay/loss"], rel=1e-4, abs=1e-6)
    assert max(one["replay/loss"]) > 1e-3
    assert two["retention"] == pytest.approx(one["retention"], rel=1e-3, abs=1e-6)
