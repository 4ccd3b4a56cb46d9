"""Short runs of tiny models that the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_model, make_texts, make_tokenizer, sample_rows
from datasets import Dataset
from trl import SFTConfig

from retain import ReplayConfig, ReplaySFTTrainer
from retain.files import read_jsonl
from retain.models.description import model_fingerprint, tokenizer_fingerprint
from retain.replay.dataset import ReplayDataset

TOKENIZER = make_tokenizer()
ROWS = Dataset.from_list([{"text": text} for text in make_texts(48, seed=1)])
TOKENS = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in ([*range(5, 21)], [*range(30, 46)]) * 16])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "lr_scheduler_type": "constant",
    "bf16": False, "use_cpu": True, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "seed": 7,
    "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def rows_of(model: Any, count: int = 20) -> ReplayDataset:
    """Rows that a model wrote, with the manifest that says so."""
    manifest = {
        "model": "tiny",
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(TOKENIZER),
    }
    return ReplayDataset.from_rows(list(sample_rows(model, 3, range(count), 24, seed=5).numpy()), "own", manifest)


def config(folder: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(str(folder), **{**SETTINGS, "max_length": 24, **changes})


def train(
    folder: Path,
    replay: ReplayDataset | None,
    model: Any = None,
    trainer_class: type = ReplaySFTTrainer,
    replay_config: ReplayConfig | None = None,
    resume: str | None = None,
    changes: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    trainer = trainer_class(
        model=model if model is not None else make_model(),
        args=config(folder, **(changes or {})),
        train_dataset=kwargs.pop("train_dataset", ROWS),
        processing_class=TOKENIZER,
        replay_dataset=replay,
        replay_config=replay_config or ReplayConfig(replay_coef=2.0, per_device_replay_batch_size=4),
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def assert_kl_rises_from_zero(trainer: Any, zero: float = 1e-7, risen: float = 1e-7) -> None:
    """The model is its base at the first step, and is held to it when it has moved."""
    kl = logged(trainer, "replay/kl")
    assert abs(kl[0]) < zero
    assert all(value > risen for value in kl[1:])


def points(folder: Path, key: str = "retention/words/ref_kl") -> dict[int, float]:
    """A value of `metrics.jsonl` at each step that has it."""
    return {row["step"]: row[key] for row in read_jsonl(folder / "metrics.jsonl") if key in row}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
