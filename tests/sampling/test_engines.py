"""Other engines: what the verb passes on to vLLM and refuses (behind a stand-in), and a real Ray cluster."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer
from pyarrow import parquet

from retain.cli.main import main
from retain.cli.sample import SampleConfig, first_device
from retain.models.description import default_device
from retain.models.loading import load_model, load_tokenizer
from retain.replay import stored_predictions
from retain.replay.dataset import load_self_generated, read_manifest
from retain.sampling import write
from retain.sampling.engine import Shard
from retain.sampling.write import sample_replay

FLAGS = ["--num_rows", "22", "--max_length", "64", "--rows_per_shard", "4", "--per_device_batch_size", "4"]
SETTINGS = {"num_rows": 22, "max_length": 64, "rows_per_shard": 4, "batch_size": 4}


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` and the engines change the environment and the libraries' verbosity."""
    from transformers.utils import logging

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the world that is nearly uniform, so that it ends documents now and then, and has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    make_model(scale=1.0).save_pretrained(folder)
    make_tokenizer(template=CHATML).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def sample(model: Path, output_dir: Path, *flags: str) -> int:
    return main(["sample", "--model", str(model), "--output_dir", str(output_dir), *flags])


def sample_on(engine: Any, model: Path, folder: Path, **settings: Any) -> Path:
    settings = {**SETTINGS, **settings, "engine": nullcontext(engine)}
    return sample_replay(load_model(str(model)), load_tokenizer(str(model)), folder, **settings)


# Flags and refusals


@pytest.mark.parametrize("engine", ["vllm", "ray"])
def test_an_engine_that_is_not_installed_is_one_line(engine, llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, f"retain.{engine}_engine", raising=False)
    assert sample(llama_folder, tmp_path / "out", "--engine", engine) == 1
    says = f"retain sample: engine: '{engine}' needs the extra; pip install 'retain-llm[{engine}]'"
    assert capsys.readouterr().err.splitlines() == [says]
    assert not (tmp_path / "out").exists()


def test_ray_refuses_launched_processes(llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sample(llama_folder, tmp_path / "out", "--engine", "ray") == 1
    says = "retain sample: engine: 'ray' starts its own workers; run it without accelerate or torchrun"
    assert capsys.readouterr().err.splitlines() == [says]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "tgi"}, "engine: 'tgi' is not known; use one of 'torch', 'vllm', 'ray'"),
        ({"num_workers": 2}, "num_workers: 2 needs engine ray, not 'torch'"),
        ({"num_workers": 0, "engine": "ray"}, "num_workers: 0 does not fit"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2 needs engine vllm, not 'torch'"),
        ({"tensor_parallel_size": 0, "engine": "vllm"}, "tensor_parallel_size: 0 does not fit"),
        ({"attn_implementation": "eager", "engine": "vllm"}, "attn_implementation: 'eager' has no effect with vllm"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(model="m", output_dir="o", **settings)


# vLLM


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_vllm"))
    yield importlib.import_module("vllm")
    sys.modules.pop("vllm")
    sys.modules.pop("retain.sampling.vllm_engine", None)


def test_a_rows_seed_is_its_own_and_fits_vllm(vllm):
    from retain.sampling.vllm_engine import row_seed

    seeds = [row_seed(seed, row) for seed in (0, 1, 2**63 - 1) for row in range(300)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(1, 7) == seeds[307]


def test_a_row_that_vllm_cuts_short_and_one_without_a_finite_prediction_stop_the_job(vllm, llama_folder, monkeypatch):
    from retain.sampling.vllm_engine import vllm_engine

    def draw() -> None:
        with vllm_engine(str(llama_folder), dtype=torch.float32, max_length=20, seed=3) as engine:
            list(engine([Shard(0, [8], [[3]])], 1, lambda rows: None))

    monkeypatch.setattr(vllm.LLM, "missing", 14)
    with pytest.raises(RuntimeError, match=r"engine: vLLM ended row 8 after 5 of 19 tokens \(length\)"):
        draw()
    monkeypatch.setattr(vllm.LLM, "missing", 0)
    monkeypatch.setattr(vllm.LLM, "logprob", np.nan)
    with pytest.raises(ValueError, match="dtype: the model's predictions are not finite"):
        draw()
    assert not any(llm.is_open for llm in vllm.LLM.made)


def test_vllm_on_the_command_line(vllm, chat_folder, tmp_path, capsys):
    flags = ["--engine", "vllm", "--num_rows", "10", "--max_length", "24", "--rows_per_shard", "4", "--preview", "2"]
    flags += ["--dtype", "bfloat16", "--start", "document=0.5,chat=0.5", "--tensor_parallel_size", "2"]
    folder = tmp_path / "replay"
    assert sample(chat_folder, folder, *flags) == 0
    says = capsys.readouterr().out
    assert "loss: " in says
    assert "entropy" not in says
    manifest = read_manifest(folder)
    sampler = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0, "stop_at_eos": False}
    assert manifest["sampler"] == {"engine": "vllm", **sampler, "dtype": "bfloat16"}
    asked = {"dtype": "bfloat16", "tensor_parallel_size": 2, "trust_remote_code": False}
    asked |= {"revision": "main", "tokenizer_revision": "main"}
    assert vllm.LLM.made[-1].arguments.items() >= asked.items()
    assert manifest["batch_size"] == 4, "whole shards"
    assert parquet.read_table(folder / "shard-00002.parquet").column_names == [
        *("row", "input_ids", "prefix_length", "logprob"),
    ]
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["summary"]["entropy"] is None
    assert statistics["summary"]["loss"]["value"] == pytest.approx(np.log(320), rel=0.1)
    rows = load_self_generated(folder)
    beginning = load_tokenizer(str(chat_folder)).encode("<|im_start|>user\n")
    assert len(rows) == 10
    assert sorted({int(length) for length in rows.prefix_lengths}) == [1, len(beginning)]
    made = len(vllm.LLM.made)
    assert sample(chat_folder, folder, *flags) == 0
    assert len(vllm.LLM.made) == made, "nothing is left to draw"
    assert sample(chat_folder, folder, *flags[2:-2], "--store_reference", "none") == 1
    assert "holds rows with sampler" in capsys.readouterr().err


def assert_predictions_are_those_of_a_pass(folder: Path, model: Path) -> None:
    rows = load_self_generated(folder)
    batch = rows.batch(range(len(rows)))
    drawn = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        states = load_model(str(model), dtype=torch.float32)(**batch, output_hidden_states=True).hidden_states[-1]
    assert rows.cache is not None
    torch.testing.assert_close(rows.cache.batch(range(len(rows)))["hidden"], states[:, :-1][drawn])


STORED = ["--engine", "vllm", "--num_rows", "10", "--max_length", "24", "--rows_per_shard", "4", "--dtype", "float32"]


@pytest.mark.parametrize("kind", [[], ["--store_reference", "hidden"]], ids=["auto", "hidden"])
def test_rows_of_vllm_get_predictions_and_fisher_when_it_is_closed(kind, vllm, chat_folder, tmp_path, monkeypatch):
    """Killed before its last shard, in the pass, and behind it, and with a file damaged: the same command goes on."""
    folder, flags = tmp_path / "replay", [*STORED, *kind, "--store_fisher", "true"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    kill_at: list[tuple[str, int]] = []
    passes: list[int] = []

    def interrupted(module: ModuleType, name: str) -> None:
        work = getattr(module, name)

        def call(*arguments: Any) -> None:
            assert not any(llm.is_open for llm in vllm.LLM.made) or name == "write_shard"
            assert torch.get_num_threads() == 2 or name == "write_shard"
            number = arguments[1] if name != "store_fisher" else 0
            if (name, number) in kill_at:
                raise KeyboardInterrupt
            passes.extend([number] if name == "write_predictions" else [])
            work(*arguments)

        monkeypatch.setattr(module, name, call)

    interrupted(write, "write_shard")
    interrupted(stored_predictions, "write_predictions")
    interrupted(write.stored_fisher, "store_fisher")
    began = len(vllm.LLM.made)
    for place, drawn, stored, starts in (
        (("write_shard", 1), 1, [], 1),
        (("write_predictions", 2), 3, [0, 1], 2),
        (("store_fisher", 0), 3, [0, 1, 2], 2),
    ):
        kill_at[:] = [place]
        assert sample(chat_folder, folder, *flags) == 130
        assert (len(contents(folder)), passes, len(vllm.LLM.made) - began) == (drawn, stored, starts)
        assert read_manifest(folder)["store_reference"] == ("hidden" if len(stored) == 3 else None)
    kill_at.clear()
    assert sample(chat_folder, folder, *flags) == 0
    assert (folder / "fisher.safetensors").exists()
    assert_predictions_are_those_of_a_pass(folder, chat_folder)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert (passes, len(vllm.LLM.made) - began) == ([0, 1, 2], 2), "the pass alone, then Fisher alone"

    assert sample(chat_folder, folder, *flags) == 0
    assert (passes, len(vllm.LLM.made) - began) == ([0, 1, 2], 2), "nothing is left to do"
    cache = stored_predictions.cache_path(folder, 1)
    cache.write_bytes(cache.read_bytes()[:-4])
    assert sample(chat_folder, folder, *flags) == 0
    assert (passes, len(vllm.LLM.made) - began) == ([0, 1, 2, 1], 2)
    (folder / "shard-00002.parquet").unlink()
    monkeypatch.setattr("retain.sampling.vllm_engine.row_seed", lambda seed, row: row + 99)  # vLLM's rows may differ
    assert sample(chat_folder, folder, *flags) == 0
    assert (passes, len(vllm.LLM.made) - began) == ([0, 1, 2, 1, 2], 3)
    assert_predictions_are_those_of_a_pass(folder, chat_folder)


def test_rows_of_vllm_over_several_devices_get_no_predictions_unasked(vllm, chat_folder, tmp_path, monkeypatch, caplog):
    """The pass needs the model whole on one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    flags = [*STORED, "--tensor_parallel_size", "2"]
    assert sample(chat_folder, tmp_path / "replay", *flags) == 0
    assert read_manifest(tmp_path / "replay")["store_reference"] is None
    assert (
        "predictions are not stored (the pass over the rows needs the whole model on one device, not 2" in caplog.text
    )
    assert sample(chat_folder, tmp_path / "replay", *flags, "--store_reference", "hidden") == 0
    assert_predictions_are_those_of_a_pass(tmp_path / "replay", chat_folder)


def test_the_first_device_of_a_process_is_one_of_its_engines(monkeypatch):
    assert first_device(2, None) == default_device()
    monkeypatch.setattr("retain.cli.sample.default_device", lambda: "cuda")
    assert first_device(2, None) == "cuda"
    assert first_device(2, SimpleNamespace(local_process_index=3)) == "cuda:6"


def test_launched_processes_have_their_own_gpus(vllm, monkeypatch):
    from retain.sampling.vllm_engine import gpus_of_process

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-5ab")
    assert gpus_of_process(1) is None, "no launcher: vLLM takes what it needs"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert gpus_of_process(1) == "GPU-5ab"
    with pytest.raises(ValueError, match="3 processes with 2 GPUs each need 6 GPUs and 3 are visible; launch fewer"):
        gpus_of_process(2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert gpus_of_process(2) == "4,5"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_of_process(2) is None


# Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: retain-llm[ray]")


@pytest.fixture(scope="module")
def cluster() -> Iterator[ModuleType]:
    """A Ray cluster of this machine with three CPUs, whatever it has."""
    ray = importlib.import_module("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(cluster, llama_folder) -> Iterator[Any]:
    """An engine of two workers, which the tests share, for they load the model in seconds."""
    from retain.sampling.ray_workers import ray_engine

    load = partial(load_model, str(llama_folder), dtype=torch.float32)
    with ray_engine(load, max_length=64, seed=0, num_workers=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama_folder) -> Path:
    """The rows of one process."""
    model, tokenizer = load_model(str(llama_folder)), load_tokenizer(str(llama_folder))
    return sample_replay(model, tokenizer, tmp_path_factory.mktemp("whole"), **SETTINGS)


@pytest.mark.program
@needs_ray
def test_rays_rows_are_those_of_one_process(workers, llama_folder, whole, tmp_path):
    told: list[int] = []
    sample_on(workers, llama_folder, tmp_path, progress=told.append)
    assert contents(tmp_path) == contents(whole)
    assert len(contents(tmp_path)) == 6
    assert sum(told) == 22
    assert read_manifest(tmp_path)["sampler"] == read_manifest(whole)["sampler"]
    for name in ("shard-00001.parquet", "shard-00004.parquet"):  # begun by one, finished by the other
        (tmp_path / name).unlink()
    sample_replay(load_model(str(llama_folder)), load_tokenizer(str(llama_folder)), tmp_path, **SETTINGS)
    assert contents(tmp_path) == contents(whole)


def ray_workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "ray::Worker" in "".join(child.cmdline())]


@pytest.mark.program
@needs_ray
def test_a_killed_ray_worker_loses_no_rows(workers, llama_folder, whole, tmp_path):
    killed: list[int] = []
    list(workers([Shard(0, [0], [[1]])], 1, lambda rows: None))  # until one is up, and the other may be slower
    deadline = time.monotonic() + 60
    while len(before := {process.pid for process in ray_workers()}) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(before) == 2

    def kill_one_that_draws() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for pid in before:
                if "ray::Worker.work" in "".join(psutil.Process(pid).cmdline()) and not killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill_one_that_draws)
    thread.start()
    sample_on(workers, llama_folder, tmp_path)
    thread.join()
    assert len(killed) == 1
    assert contents(tmp_path) == contents(whole)
    assert killed[0] not in {process.pid for process in ray_workers()}


@pytest.mark.program
@needs_ray
def test_what_fails_in_a_ray_worker_is_said_by_the_driver(workers):
    with pytest.raises(IndexError, match="^index out of range in self$"):
        list(workers([Shard(0, [0], [[999]])], 1, lambda rows: None))


def indented(text: str) -> list[str]:
    """The lines of the summary; Ray may speak beside it, of the worker that was killed above."""
    return [line for line in text.splitlines() if line.startswith("  ")]


@needs_ray
@pytest.mark.slow
def test_ray_on_the_command_line(cluster, llama_folder, tmp_path, capsys):
    """A dataset that one process began, predictions kept, is finished by a worker."""
    flags = [*FLAGS, "--store_reference", "topk"]
    assert sample(llama_folder, tmp_path / "one", *flags) == 0
    summary = indented(capsys.readouterr().out)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("shard-00001.parquet", "reference-00001.safetensors", "shard-00005.parquet"):
        (tmp_path / "two" / name).unlink()
    assert sample(llama_folder, tmp_path / "two", *flags, "--engine", "ray", "--num_workers", "1") == 0
    assert indented(capsys.readouterr().out) == summary != []
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("[rs]*")} for name in ("one", "two"))
    assert one == two
    assert len(one) == 6 + 6 + 1
    assert sample(llama_folder, tmp_path / "new", *flags, "--engine", "ray", "--num_workers", "4") == 1
    assert "num_workers: 4 need a CPU each and the cluster has 3; use fewer" in capsys.readouterr().err
    assert sample(llama_folder, tmp_path / "two", *flags, "--engine", "ray", "--num_workers", "4") == 0, "none is begun"


STOPPED = """
import sys, threading, os, signal, time
from pathlib import Path
from retain.cli.main import main
def interrupt():
    while not list(Path(sys.argv[2]).glob("shard-*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
sys.exit(main(["sample", "--model", sys.argv[1], "--output_dir", sys.argv[2], *sys.argv[3:]]))
"""


@pytest.mark.slow
@needs_ray
def test_an_interrupted_ray_job_stops_cleanly_and_goes_on(cluster, workers, llama_folder, whole, tmp_path):
    """On a cluster that was there before and goes on without it."""
    folder = tmp_path / "out"
    command = [sys.executable, "-c", STOPPED, str(llama_folder), str(folder), *FLAGS, "--engine", "ray"]
    address = cluster.get_runtime_context().gcs_address
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RAY_ADDRESS": address}
    for _ in range(5):  # six shards are few: the signal may come behind the last
        shutil.rmtree(folder, ignore_errors=True)
        done = subprocess.run(
            [*command, "--num_workers", "1"], env=environment, capture_output=True, text=True, timeout=200
        )
        if done.returncode:
            break
    assert done.returncode == 130, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1] == "retain sample: interrupted; run the same command again to resume"
    assert "Traceback" not in done.stderr + done.stdout
    assert 1 <= len(contents(folder)) <= 6
    deadline = time.monotonic() + 20
    while len(ray_workers()) > 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ray_workers()) <= 2, "its worker went with it"
    assert sample(llama_folder, folder, *FLAGS) == 0
    assert contents(folder) == contents(whole)
