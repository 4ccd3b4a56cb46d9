"""Hosts, devices and ways to share a model over them: what protection knows, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from conftest import make_model, make_texts
from peft import LoraConfig
from training_runs import LORA, ROWS, TOKENIZER, config, rows_of, train
from transformers import TrainingArguments
from trl import SFTTrainer

from retain import ForgettingCallback, ReplayConfig, ReplaySFTTrainer, ReplayTrainer
from retain.replay.dataset import ReplayDataset
from retain.training.trainer_checks import (
    LOADS_EMPTY,
    check_devices,
    check_loads_everywhere,
    check_unsharded,
    expected_steps,
)

INVOKING = [[3, 7, 9, *range(10, 20)]] * 8  # rows with what switches an activated LoRA on
TEXTS = {"words": make_texts(3, seed=9)}


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


def test_weights_that_fsdp_leaves_empty_are_not_taken_for_the_base(
    tmp_path: Path, replay: ReplayDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("WORLD_SIZE", "2"), (LOADS_EMPTY, "true")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: true leaves"):
        ReplaySFTTrainer(model=make_model(), processing_class=TOKENIZER, replay_dataset=replay)
    check_loads_everywhere(may_change=True)  # as where a model is loaded by name
    assert os.environ[LOADS_EMPTY] == "false"


def test_devices_on_which_replay_would_be_wrong_are_refused(tmp_path: Path, replay: ReplayDataset) -> None:
    """torch's DataParallel hands each copy a part of the rows; Apple's devices have no float64."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert args.n_gpu == 0
    args._n_gpu = 2
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(ValueError, match="devices: 2 GPUs and one process; start it with accelerate launch"):
        ReplayTrainer(
            model=make_model(), args=args, train_dataset=rows, processing_class=TOKENIZER, replay_dataset=replay,
            replay_config=ReplayConfig(),
        )  # fmt: skip
    with pytest.raises(ValueError, match="devices: mps has no float64, which sums need; set use_cpu true"):
        check_devices(SimpleNamespace(args=SimpleNamespace(n_gpu=1, device=torch.device("mps"))))


def test_parallelism_that_replay_does_not_know_is_refused() -> None:
    """Replay rows are drawn by process; the ranks of one model must see the same rows."""

    def trainer(**sizes: int) -> Any:
        parallel = ParallelismConfig(**sizes)
        args = SimpleNamespace(n_gpu=1, device=torch.device("cpu"))
        sized = {f"get_{name}_size": lambda name=name: getattr(parallel, f"{name}_size") for name in ("tp", "cp", "sp")}
        return SimpleNamespace(args=args, is_fsdp_enabled=False, is_fsdp_xla_enabled=False, **sized)

    check_devices(trainer())
    for name in ("tp", "cp", "sp"):
        with pytest.raises(ValueError, match=f"devices: {name}_size 2 .* set it to 1"):
            check_devices(trainer(**{f"{name}_size": 2}))
    xla, fsdp1 = trainer(), trainer()
    xla.is_fsdp_xla_enabled = True
    with pytest.raises(ValueError, match="devices: .*XLA's FSDP.*fsdp_version 2"):
        check_devices(xla)
    fsdp1.is_fsdp_enabled, fsdp1.accelerator = True, SimpleNamespace(is_fsdp2=False)
    with pytest.raises(ValueError, match="devices: FSDP1.*fsdp_version 2"):
        check_devices(fsdp1)
    fsdp1.accelerator.is_fsdp2 = True
    check_devices(fsdp1)


@pytest.mark.parametrize(("rows", "drop", "accumulate"), [(7, True, 1), (7, False, 1), (11, True, 2), (9, False, 2)])
def test_steps_are_counted_as_the_host_makes_them(
    tmp_path: Path, replay: ReplayDataset, rows: int, drop: bool, accumulate: int
) -> None:
    """Rows that fill no batch are dropped: a run of one step was called protected."""
    changes = {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": drop}
    changes["gradient_accumulation_steps"] = accumulate
    trainer = train(tmp_path, replay, train_dataset=ROWS.select(range(rows)), changes=changes)
    assert trainer.state.global_step == expected_steps(trainer.args, trainer.train_dataset)


@pytest.mark.parametrize("measured", [False, True], ids=["replay", "callback"])
def test_activated_lora_with_checkpointing_is_refused(tmp_path: Path, replay: ReplayDataset, measured: bool) -> None:
    """PEFT takes one forward pass a backward pass there; replay and the reference need more."""
    alora = LoraConfig(**LORA, alora_invocation_tokens=[7, 9])
    args = config(tmp_path, gradient_checkpointing=True, max_steps=2)
    more: dict[str, Any] = {"callbacks": [ForgettingCallback(TEXTS)]} if measured else {"replay_dataset": replay}
    host = SFTTrainer if measured else ReplaySFTTrainer
    with pytest.raises(ValueError, match="gradient_checkpointing: .*aLoRA.*set it false"):
        host(make_model(), args, train_dataset=ROWS, processing_class=TOKENIZER, peft_config=alora, **more)
    train(tmp_path, ReplayDataset.from_rows(INVOKING, "invoking"), peft_config=alora, changes={"max_steps": 2})


@pytest.mark.parametrize(("mark", "says"), [("ds_id", "by name"), ("device_mesh", "over a device mesh.*load it whole")])
def test_weights_that_are_shared_out_already_are_refused(mark: str, says: str) -> None:
    """By ZeRO-3, or as a `DTensor` by `tp_plan` and `distributed_config`."""
    model = make_model()
    check_unsharded(model)
    setattr(next(model.parameters()), mark, 0)
    with pytest.raises(ValueError, match=says):
        check_unsharded(model)


def test_a_model_spread_over_devices_by_device_map_is_refused(replay: ReplayDataset) -> None:
    model = make_model()
    model.hf_device_map = {"": 0}
    check_unsharded(model)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="^device_map: spreads the model over 2 devices.*leave it out.*FSDP2"):
        ReplaySFTTrainer(model=model, processing_class=TOKENIZER, replay_dataset=replay)
