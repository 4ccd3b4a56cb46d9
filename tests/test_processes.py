"""Two processes under `accelerate launch` write the shards of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import save_model


def test_two_processes_sample_the_rows_of_one(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    flags = ["--model_name_or_path", "model", "--num_rows", "22", "--max_length", "12", "--rows_per_shard", "4"]
    flags += ["--per_device_batch_size", "4"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    for name, before in (("one", ["-m"]), ("two", launch)):
        command = [sys.executable, *before, "retain", "sample", *flags, "--output_dir", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("document start") == 1, "one process speaks"
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("shard-*.parquet")} for name in ("one", "two")
    )
    assert len(one) == 6
    assert one == two
