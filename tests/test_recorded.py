"""Numbers recorded from short runs: whatever is moved or merged, these must stay.

`python tests/test_recorded.py` records them anew; a commit that does so says which number moved, and why. On the
machine that recorded them (same processor, same versions) they are compared to the last bit, elsewhere to 1e-6, or
`LOOSER` where rounding is enlarged.
Only public names of `retain` are used here, so that the record outlives any file in which they stand.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model, make_texts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig

from retain import (
    ReplayConfig,
    ReplayMixin,
    ReplaySFTTrainer,
    ReplayTrainer,
    fit_forgetting_law,
    load_replay_dataset,
    measure,
    sample_replay,
    versions,
)

RECORD = Path(__file__).with_name("recorded.json")
TOKENIZER = make_tokenizer()
TEXTS = make_texts(24, seed=1)
ARGUMENTS = {
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True, "seed": 7,
    "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "logging_steps": 1, "report_to": "none",
    "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True, "bf16": False,
    "gradient_checkpointing": False,
}  # fmt: skip
SFT = {**ARGUMENTS, "max_length": 24}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class ReplayDPOTrainer(ReplayMixin, DPOTrainer):
    """Replay inside DPO."""


def machine() -> dict[str, str]:
    """What decides the last bit: the processor and the libraries."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {"processor": model[1] if model else platform.processor(), **versions()}


def pool(folder: Path, architecture: str = "llama", **settings: Any) -> Path:
    sample_replay(make_model(architecture), TOKENIZER, folder, num_rows=12, max_length=24, seed=5, **settings)
    return folder


def rows_of(folder: Path) -> dict[str, Any]:
    dataset = load_replay_dataset(str(folder), TOKENIZER, 3, 24)
    rows = np.stack([np.asarray(dataset[at]) for at in range(len(dataset))])
    return {"shape": list(rows.shape), "sha256": hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()}


def losses(folder: Path, trainer_class: type = ReplaySFTTrainer, args: Any = None, **more: Any) -> dict[str, Any]:
    """What a short run logs: losses, KL, coefficient, and what was forgotten."""
    replay = {"replay_coef": 2.0, "per_device_replay_batch_size": 2} | more.pop("replay", {})
    rows = more.pop("rows", None) or Dataset.from_list([{"text": text} for text in TEXTS])
    trainer = trainer_class(
        model=make_model(), args=args or SFTConfig(str(folder / "run"), **SFT), train_dataset=rows,
        eval_dataset=rows.select(range(4)), processing_class=TOKENIZER, replay_config=ReplayConfig(**replay),
        replay_dataset=str(more.pop("pool", None) or pool(folder / "pool")),
        retention_datasets={"old": make_texts(6, seed=9)}, **more,
    )  # fmt: skip
    trainer.train()
    kept = ("loss", "eval_loss", "grad_norm", "replay/", "retention/old/forgetting", "retention/old/ref_kl")
    found: dict[str, list[float]] = {}
    for row in trainer.state.log_history:
        for name, value in row.items():
            if name.startswith(kept) and isinstance(value, float):
                found.setdefault(name, []).append(value)
    return found


def dpo(folder: Path) -> dict[str, Any]:
    rows = Dataset.from_list(
        [{"prompt": a, "chosen": b, "rejected": a[::-1]} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    )
    arguments = DPOConfig(str(folder / "run"), **ARGUMENTS, max_length=48)
    return losses(folder, ReplayDPOTrainer, arguments, rows=rows, peft_config=LoraConfig(**LORA))


def plain(folder: Path) -> dict[str, Any]:
    tokens = [TOKENIZER(text, truncation=True, max_length=16, padding="max_length")["input_ids"] for text in TEXTS]
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens])
    return losses(folder, ReplayTrainer, TrainingArguments(str(folder / "run"), **ARGUMENTS), rows=rows)


def report(folder: Path, **more: Any) -> dict[str, Any]:
    """Every number of a report: what was measured, without when and where."""
    texts = {"old": make_texts(6, seed=9), "older": make_texts(5, seed=10)}
    found = measure(make_model(), make_model(seed=1), texts, tokenizer=TOKENIZER, max_length=24, **more)
    return {
        name: found.data[name] for name in ("retention", "new_task", "choices", "generations") if name in found.data
    }


def law(form: str) -> dict[str, Any]:
    rng, rows = np.random.default_rng(3), []
    for run, size in enumerate(np.geomspace(1e4, 1e6, 6)):
        for steps in (40, 80, 160, 320):
            bracket = ((2e4 / size) ** 0.3 + (60 / steps) ** 0.5) ** 1.2
            new = 0.8 * bracket + 1.5 + 0.01 * rng.normal()
            rows.append({"run": f"r{run}", "num_params": size, "num_steps": steps, "finetuning_loss": new,
                         "forgetting_loss": 6 - 1.7 * new + 0.01 * rng.normal()})  # fmt: skip
    found = fit_forgetting_law(rows, form, num_resamples=100)
    at = found.predict(num_params=3e5, num_steps=200)
    return {"value": {name: float(value) for name, value in at.value.items()},
            "ci": {name: [float(end) for end in ends] for name, ends in at.ci.items()}}  # fmt: skip


CASES: dict[str, Callable[[Path], Any]] = {
    "sft": losses,
    "sft_lora": lambda folder: losses(folder, peft_config=LoraConfig(**LORA)),
    "dpo_lora": dpo,
    "plain_trainer": plain,
    "packing": lambda folder: losses(
        folder, args=SFTConfig(str(folder / "run"), **SFT, packing=True, packing_strategy="wrapped")
    ),
    "budget": lambda folder: losses(folder, replay={"max_ref_kl": 0.01}),
    "cache": lambda folder: losses(folder, pool=pool(folder / "pool", store_reference="hidden")),
    "ntp": lambda folder: losses(folder, replay={"replay_objective": "ntp"}),
    "pool_llama": lambda folder: rows_of(pool(folder)),
    "pool_gemma3": lambda folder: rows_of(pool(folder, "gemma3_text")),
    "report_texts": report,
    "report_new_task": lambda folder: report(folder, new_task={"new": make_texts(4, seed=11)}, prompts=["the quick"]),
    "law_joint": lambda _: law("joint"),
    "law_forgetting": lambda _: law("forgetting"),
}  # fmt: skip

# On another processor (recorded on an Intel Xeon, seen on an AMD EPYC): the budget's coefficient follows quotients of
# KLs of a thousandth of a nat (1.5e-5 off), and an interval over four documents their few divergences (4.3e-6 off).
LOOSER = {"budget": 1e-4, "report_new_task": 1e-5}


def alike(now: Any, then: Any, tolerance: float, where: str) -> None:
    """Assert that two records agree: floats within the tolerance, absolute or of themselves; 0: to the last bit."""
    assert type(now) is type(then), where
    if isinstance(then, dict):
        assert now.keys() == then.keys(), where
        for name in then:
            alike(now[name], then[name], tolerance, f"{where}.{name}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for at, pair in enumerate(zip(now, then, strict=True)):
            alike(*pair, tolerance, f"{where}[{at}]")
    elif isinstance(then, float) and tolerance:
        assert now == pytest.approx(then, rel=tolerance, abs=tolerance), where
    else:
        assert now == then, where


@pytest.mark.parametrize("name", CASES)
def test_nothing_moved(tmp_path: Path, name: str) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(CASES[name](tmp_path)))
    alike(now, record["cases"][name], 0.0 if machine() == record["machine"] else LOOSER.get(name, 1e-6), name)


if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"cases": {}}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            record["cases"][name] = CASES[name](Path(folder))
    record["machine"] = machine()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
