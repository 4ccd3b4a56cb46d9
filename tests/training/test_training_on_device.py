"""Protected runs on a device that is not the CPU: the losses and weights of the CPU's, and a resume."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_texts
from peft import LoraConfig
from simulated_device import DEVICE, assert_as_on_cpu, on_device
from test_forgetting_callback import callback, host
from training_runs import LORA, TOKENIZER, difference, rows_of, train, weights

from retain import ReplayConfig
from retain.files import read_jsonl
from retain.replay.dataset import load_self_generated
from retain.sampling.write import sample_replay
from retain.training.anchored_adamw import AnchoredAdamW

BASE: dict[str, Any] = {"replay_coef": 2.0, "per_device_replay_batch_size": 4}
ADAPTER = LoraConfig(**LORA)
RUNS: dict[str, dict[str, Any]] = {
    "copy, tied head": {"architecture": "gemma3_text", "changes": {"gradient_accumulation_steps": 2}},
    "adapter": {"peft_config": ADAPTER},
    "hidden": {"store": "hidden"},
    "topk": {"store": "topk", "peft_config": ADAPTER},
    "anchor": {"replay": {"anchor_coef": 10.0}},
    "anchored adapter": {"replay": {"anchor_coef": 10.0, "replay_coef": 0.0}, "peft_config": ADAPTER},
    "held": {"replay": {"max_ref_kl": 1e-3}},
    "replaced": {"replay": {"replay_objective": "replace", "replay_coef": 0.5}},
    "new rows": {"replay": {"replay_objective": "kl_new"}},
}


def run(
    folder: Path,
    *,
    store: str | None = None,
    replay: dict[str, Any] | None = None,
    architecture: str = "llama",
    changes: dict[str, Any] | None = None,
    **given: Any,
) -> Any:
    """A few steps with retention texts, where trainers are placed."""
    model = make_model(architecture, num_hidden_layers=1)
    rows = rows_of(model, 8)
    if store is not None:
        settings: dict[str, Any] = {"num_rows": 8, "max_length": 24, "seed": 5, "store_reference": store}
        rows = load_self_generated(sample_replay(model, TOKENIZER, folder / "pool", **settings))
    changes = {"use_cpu": False, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, **(changes or {})}
    if "anchor_coef" in (replay or {}):
        changes |= {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-2}
    texts = {"words": make_texts(2, seed=9)}
    trainer = train(
        folder, rows, model, replay_config=ReplayConfig(**BASE | (replay or {})), changes=changes,
        retention_datasets=texts, **given,
    )  # fmt: skip
    trainer.evaluate_retention()
    return trainer


def some(names: Iterable[str], *fast: str) -> Any:
    """Those that are fast, or differ most; CI runs the others, too."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.program) for name in names]


@pytest.mark.parametrize("name", some(RUNS, "copy, tied head", "topk", "anchor"))
@on_device
def test_a_run_is_that_of_the_cpu(name, tmp_path):
    def work(device: str) -> list[Any]:
        torch.manual_seed(0)
        trainer = run(tmp_path / device, **RUNS[name])
        assert trainer.model.device.type == trainer.args.device.type == device
        assert isinstance(trainer.optimizer.optimizer, AnchoredAdamW) == ("anchor" in name)
        left_out = ("runtime", "per_second", "seconds")
        logs = [
            {key: value for key, value in row.items() if not any(word in key for word in left_out)}
            for row in trainer.state.log_history
        ]
        return [logs, weights(trainer.model)]

    assert_as_on_cpu(work, tolerance=2e-3 if "anchor" in name else 2e-4)


@pytest.mark.parametrize("kind", some(["copy, tied head", "adapter"], "adapter"))
@on_device
def test_mixed_precision_compares_like_with_like(kind, tmp_path):
    """Under the device's autocast, not the CPU's, the reference runs in the precision of the model."""
    trainer = run(tmp_path, **{**RUNS[kind], "changes": {"bf16": True, "max_steps": 3}})
    kl = [row["replay/kl"] for row in trainer.state.log_history if "replay/kl" in row]
    assert trainer.accelerator.mixed_precision == "bf16"
    assert abs(kl[0]) < 1e-6
    assert all(value > 1e-5 for value in kl[1:])


@pytest.mark.parametrize("name", ["anchor"])
@on_device
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    saved = {**RUNS[name], "changes": {"save_strategy": "steps", "save_steps": 1}}
    whole = run(tmp_path, **saved)
    again = run(tmp_path, **saved, resume=str(tmp_path / "checkpoint-1"))
    assert again.model.device.type == DEVICE
    assert difference(weights(whole.model), weights(again.model)) == 0


@pytest.mark.parametrize("kind", some(["plain", "lora"], "lora"))
@on_device
def test_the_callback_measures_what_it_measures_on_the_cpu(kind, tmp_path):
    def work(device: str) -> list[dict[str, Any]]:
        host(
            kind,
            tmp_path / device,
            callback(choices={}),
            model=make_model(num_hidden_layers=1),
            use_cpu=False,
            max_steps=2,
        ).train()
        return [
            {key: value for key, value in row.items() if key == "step" or key.startswith("retention/")}
            for row in read_jsonl(tmp_path / device / "metrics.jsonl")
        ]

    assert_as_on_cpu(work, tolerance=1e-3)
