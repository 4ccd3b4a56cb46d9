"""Several processes draw the shards of one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import forked, places, save_model

from retain.cli.main import main


@pytest.mark.program
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_two_processes_sample_the_rows_of_one(engine: str, tmp_path: Path) -> None:
    """Each process draws its share of the shards; with vLLM, here a stand-in, on GPUs of its own."""
    save_model(tmp_path / "model")
    flags = ["--model", "model", "--num_rows", "22", "--max_length", "12", "--rows_per_shard", "4"]
    flags += ["--per_device_batch_size", "4", "--engine", engine, "--store_reference", "hidden"]
    flags += ["--tensor_parallel_size", "2"] if engine == "vllm" else []
    (tmp_path / "devices").mkdir()
    environment = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "FAKE_VLLM_DEVICES": str(tmp_path / "devices")}
    stand_in = str(Path(__file__).parents[1] / "sampling" / "fake_vllm")

    def sample(name: str) -> None:
        sys.path.insert(0, stand_in)
        os.chdir(tmp_path)
        sys.exit(main(["sample", *flags, "--output_dir", name]))

    for name, processes in (("one", 1), ("two", 2)):
        said = [tmp_path / f"{name}-{rank}.txt" for rank in range(processes)]
        ranks = [
            forked(said[rank], sample, name, **environment, **around) for rank, around in enumerate(places(processes))
        ]
        for process in ranks:
            process.join(200)
        words = "".join(path.read_text() for path in said)
        assert [process.exitcode for process in ranks] == [0] * processes, words[-3000:]
        assert words.count("document start") == 1, "one process speaks"
        assert ("drawn by 2 processes" in words) == (name == "two")
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("[rs]*-0*")} for name in ("one", "two")
    )
    assert len(one) == 6 + 6, "rows, and predictions"
    assert one == two
    devices = sorted(path.name for path in (tmp_path / "devices").iterdir())
    assert devices == (["4,5", "4,5,6,7", "6,7"] if engine == "vllm" else [])
