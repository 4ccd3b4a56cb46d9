"""Several processes draw the shards of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_model


@pytest.mark.program
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_two_processes_sample_the_rows_of_one(engine: str, tmp_path: Path) -> None:
    """Each process draws its share of the shards; with vLLM, here a stand-in, on GPUs of its own."""
    save_model(tmp_path / "model")
    flags = ["--model", "model", "--num_rows", "22", "--max_length", "12", "--rows_per_shard", "4"]
    flags += ["--per_device_batch_size", "4", "--engine", engine]
    flags += ["--tensor_parallel_size", "2"] if engine == "vllm" else []
    (tmp_path / "devices").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "FAKE_VLLM_DEVICES": str(tmp_path / "devices")}
    stand_in = str(Path(__file__).parents[1] / "sampling" / "fake_vllm")
    environment["PYTHONPATH"] = os.pathsep.join([stand_in, *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    for name, before in (("one", ["-m"]), ("two", launch)):
        command = [sys.executable, *before, "retain", "sample", *flags, "--output_dir", name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("document start") == 1, "one process speaks"
        assert ("drawn by 2 processes" in done.stdout) == (name == "two")
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("shard-*.parquet")} for name in ("one", "two")
    )
    assert len(one) == 6
    assert one == two
    devices = sorted(path.name for path in (tmp_path / "devices").iterdir())
    assert devices == (["4,5", "4,5,6,7", "6,7"] if engine == "vllm" else [])
