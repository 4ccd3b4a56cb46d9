"""Two processes over gloo give the run of one: the same rows, losses and weights, with DDP, FSDP2 and DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ddp_run
import pytest
import torch
from conftest import forked, make_model, make_texts, make_tokenizer, places
from ddp_run import CASES, CORNER, LOADED, MORE, PARTS
from safetensors.torch import load_file

from retain.sampling.write import sample_replay

HERE = Path(__file__).parent
DEEPSPEED = HERE.parents[1] / ".cache" / "deepspeed"  # not in the environment: others would import it at every start
PATHS = (HERE, HERE.parent, HERE.parents[1] / "src")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
Found = dict[str, dict[str, Any]]


def launch(folder: Path, processes: int, batch: int, way: str, names: Collection[str], **environment: str) -> Found:
    folder.mkdir()
    if way == "zero":  # in processes that find DeepSpeed when they begin
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(HERE / "ddp_run.py"), str(folder), str(batch), way, *names]
        around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
        done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        ranks = [
            forked(folder / f"{rank}.txt", ddp_run.run, folder, batch, way, names, **environment, **around)
            for rank, around in enumerate(places(processes))
        ]
        for rank, process in enumerate(ranks):
            process.join(240)
            assert process.exitcode == 0, (folder / f"{rank}.txt").read_text()[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    sample_replay(
        make_model(), make_tokenizer(), folder / "stored", num_rows=20, max_length=20, seed=6, store_reference="hidden"
    )
    return folder


@pytest.fixture(scope="module")
def corner(folder: Path) -> dict[str, Found]:
    """By one process, by two with DDP, and by two with FSDP2: what is run of each."""
    return {
        "one": launch(folder / "one", 1, 4, "ddp", sorted({*CORNER["ddp"], *CORNER["fsdp2"]})),
        "ddp": launch(folder / "ddp", 2, 2, "ddp", CORNER["ddp"]),
        "fsdp2": launch(folder / "fsdp2", 2, 2, "fsdp2", CORNER["fsdp2"], **FSDP2),
    }


@pytest.mark.program
@pytest.mark.parametrize(("way", "name"), [(way, name) for way, names in CORNER.items() for name in names])
def test_two_processes_are_one(corner: dict[str, Found], way: str, name: str) -> None:
    check_pair(corner["one"][name], corner[way][name], way, name)


@pytest.fixture(scope="module")
def more(folder: Path) -> dict[str, Found]:
    """All cases, and those of further settings, by one process and by two."""
    names = [*CASES, *MORE]
    return {
        "one": launch(folder / "more-one", 1, 4, "ddp", names),
        "ddp": launch(folder / "more-ddp", 2, 2, "ddp", names),
        "fsdp2": launch(folder / "more-fsdp2", 2, 2, "fsdp2", names, **FSDP2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [name for name in (*CASES, *MORE) if "bf16" not in name])
def test_two_processes_are_one_in_more_settings(more: dict[str, Found], way: str, name: str) -> None:
    """All of `CASES`, accumulation, `replace`, adapters, stored predictions, a budget, an anchor, resumed runs."""
    check_pair(more["one"][name], more[way][name], way, name)
    if "budget" in name:
        assert more[way][name]["replay/coef"] == pytest.approx(more["one"][name]["replay/coef"], rel=1e-4)
        assert len(set(more[way][name]["replay/coef"])) == 4
    for found in (more["one"][name], more[way][name]) if "resumed" in name else ():
        assert all(torch.equal(found["whole"][key], value) for key, value in found["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["copy-bf16", "adapter-bf16", "cache-bf16", "adapter-bf16-halved"])
def test_two_processes_in_bf16_are_one_but_for_its_rounding(more: dict[str, Found], way: str, name: str) -> None:
    """Batches of another size round otherwise; FSDP2 keeps weights in bf16 that autocast leaves in float32."""
    one, two = more["one"][name], more[way][name]
    assert max(float((one["weights"][key] - two["weights"][key]).abs().max()) for key in one["weights"]) < 5e-3
    assert abs(two["replay/loss"][0]) < 1e-4
    assert two["replay/loss"][1:] == pytest.approx(one["replay/loss"][1:], rel=0.05)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Found:
    return launch(folder / "loaded", 2, 2, "fsdp2", LOADED, **FSDP2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copy", "cache"])
def test_fsdp2_trains_in_float32_what_was_loaded_in_bfloat16(loaded: Found, kind: str) -> None:
    """To the bit the run of the same weights in float32; a copy of them stays in bfloat16, and takes half."""
    halved, rounded = loaded[f"{kind}-bf16-halved"], loaded[f"{kind}-bf16-rounded"]
    assert all(torch.equal(halved["weights"][key], value) for key, value in rounded["weights"].items())
    for key in ("loss", "new_task/loss", "replay/loss"):
        assert halved[key] == rounded[key]
    assert abs(halved["replay/loss"][0]) < 1e-4 < halved["replay/loss"][-1]
    if kind == "copy":
        # with the head, which stays gathered after a pass
        assert 0 < halved["copy_bytes"] < 0.7 * rounded["copy_bytes"]


HSDP = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


@pytest.mark.slow
def test_hsdp_on_four_processes_is_one_process(folder: Path) -> None:
    """Two replicas of two parts each; the frozen copy lies on the same mesh."""
    names = ["llama-copy", "llama-adapter", "llama-cache", "whole-anchor"]
    one = launch(folder / "hsdp-one", 1, 4, "ddp", names)
    four = launch(folder / "hsdp", 4, 1, "fsdp2", names, **HSDP)
    for name in names:
        check_pair(one[name], four[name], "fsdp2", name)
        assert all(of == ["(Replicate(), Shard(dim=0))"] for of in four[name]["placed"])
    assert len(four["llama-copy"]["placed"]) == 2, "the model and the copy"


@pytest.mark.slow
def test_fsdp2_gathers_the_head_once_however_many_chunks_there_are(more: dict[str, Found]) -> None:
    """Pitfall 13."""
    whole, in_chunks = more["fsdp2"]["copy-accumulated"]["gathers"]
    assert whole == in_chunks > 0


brought = pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="DeepSpeed is brought by `make test-slow`")


def zero(stage: int) -> dict[str, str]:
    path = os.pathsep.join(map(str, (*PATHS, DEEPSPEED)))
    found = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "PYTHONPATH": path}
    return found | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true", "DS_ACCELERATOR": "cpu"}


@pytest.mark.slow
@brought
@pytest.mark.parametrize(
    ("stage", "names"),
    [(1, tuple(CASES)), (2, tuple(CASES)), (3, ("llama-adapter",)), (3, ("llama-cache",))],  # no copy with ZeRO-3
)
def test_deepspeed_is_one_process(more: dict[str, Found], folder: Path, stage: int, names: tuple[str, ...]) -> None:
    found = launch(folder / f"zero{stage}{names[0]}", 2, 2, "zero", names, **zero(stage))
    for name in names:
        assert found[name]["wrapped"][1] == "DeepSpeedEngine"
        check_same(more["one"][name], found[name])


@pytest.mark.slow
@brought
def test_zero3_from_the_command_line_sees_the_base_whole(folder: Path) -> None:
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(24, seed=1))
    (folder / "rows.jsonl").write_text(rows)
    found = {}
    for way, processes, around in (("one", 1, {}), ("zero3", 2, zero(3))):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "retain", "finetune", "--model", "model", "--dataset_name", "rows.jsonl"]
        command += ["--replay_dataset", "stored", "--output_dir", f"out-{way}", "--max_steps", "3", "--optim", "sgd"]
        command += ["--learning_rate", "0.3", "--max_length", "24", "--bf16", "false", "--eval_strategy", "no"]
        command += ["--per_device_train_batch_size", str(4 // processes), "--lr_scheduler_type", "constant"]
        command += ["--per_device_replay_batch_size", str(4 // processes), "--use_cpu", "false"]
        command += ["--ddp_backend", "gloo", "--save_strategy", "no"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | around
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "reference cache (hidden) (proven to be the base)" in done.stdout
        found[way] = load_file(folder / f"out-{way}" / "model.safetensors")
    assert found["one"].keys() == found["zero3"].keys()
    assert max(float((found["one"][key] - found["zero3"][key]).abs().max()) for key in found["one"]) < 5e-6


def check_pair(one: dict[str, Any], two: dict[str, Any], way: str, name: str) -> None:
    """Two processes that share the work as they are told to have the run of one."""
    model, wrapped = two["wrapped"]
    assert model.startswith("FSDP") if way == "fsdp2" else wrapped == "DistributedDataParallel"
    check_same(one, two)
    if name == "qwen-joint":
        assert (one["joint"], two["joint"]) == (True, way == "ddp")
    if way == "fsdp2" and "copy" in name:
        # its tied embeddings stay gathered after a pass
        assert 0 < two["copy_bytes"] < 0.7 * one["copy_bytes"], "the copy is shared out like the model"
    if "anchor" in name:
        assert two["replay/anchor"] == pytest.approx(one["replay/anchor"], rel=1e-4)
        assert one["replay/anchor"][-1] > 1e-4
        assert two["fixed"] == pytest.approx(one["fixed"], rel=1e-3)
        assert one["fixed"] > 1e-3
        assert two["replay/kl_fixed"] == pytest.approx(one["replay/kl_fixed"], rel=1e-3)
        assert bool(one["replay/kl_fixed"]) == (name == "whole-anchor")


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["weights"].keys() == two["weights"].keys()
    gap = max(float((one["weights"][key] - two["weights"][key]).abs().max()) for key in one["weights"])
    assert gap < 1e-5  # 5.4e-6 on an AMD EPYC, for a resumed run with an anchor
    for key in ("loss", "new_task/loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    for key in ("replay/loss", *PARTS):
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)
    assert not one["replay/loss"] or max(one["replay/loss"]) > 1e-3  # `replace` adds no term
    assert two["retention"] == pytest.approx(one["retention"], rel=1e-3, abs=1e-6)
