"""The runs of the study of laws: their settings, their data, and what is measured at every evaluation."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from experiments.corpora import Texts
from experiments.finetunes import Bench, Run, make_trainer, scratch
from retain import ReplayConfig
from retain.measuring.tokens import document_sums, logits_of
from retain.models.description import num_tuned
from retain.training.run_files import read_run

RANKS = (1, 2, 4, 8, 16, 32)
LARGEST = max(RANKS)
STEPS = 200
SEEDS = (0, 1)
COEFS = (0.3, 3.0)
REPLAY_RANKS = (4, 16)


@dataclass(frozen=True, kw_only=True)
class LawRun(Run):
    """A finetune on one of the data sets; LoRA with scale alpha/√rank on all linear layers, as in the paper."""

    dataset: str = "verilog"
    method: str = "lora"
    alpha: float = 4.0
    batch_size: int = 16
    max_steps: int = STEPS
    learning_rate: float = 5e-3
    replay_rows: int = 4

    def config(self) -> ReplayConfig:
        """The same as `retain`'s own settings."""
        return ReplayConfig(replay_coef=self.coef, per_device_replay_batch_size=self.replay_rows)


def plain_runs(dataset: str, ranks: tuple[int, ...] = RANKS) -> list[LawRun]:
    """Every rank with every seed."""
    return [LawRun(dataset=dataset, lora_rank=rank, seed=seed) for seed in SEEDS for rank in ranks]


def other_runs(dataset: str) -> list[LawRun]:
    """What the law of LoRA was not fitted to: full finetuning, and KL replay of several strengths."""
    full = LawRun(dataset=dataset, method="full", learning_rate=1e-3)
    replay = [LawRun(dataset=dataset, lora_rank=rank, coef=coef) for coef in COEFS for rank in REPLAY_RANKS]
    return [replace(run, seed=seed) for run in (full, *replay) for seed in SEEDS]


def read_headers(every: int = 10, seed: int = 0) -> tuple[list[str], list[str]]:
    """C++ headers that torch ships (BSD-3), each once, without licence headers: to train on, and whole files apart."""
    root = Path(torch.__file__).parent / "include"
    paths = [path for folder in ("c10", "ATen/core") for path in sorted((root / folder).rglob("*.h"))]
    texts = {re.sub(r"\A(?:\s*//[^\n]*)*\s*", "", path.read_text(encoding="utf-8", errors="replace")) for path in paths}
    files = sorted(text for text in texts if 600 <= len(text) <= 150_000)
    random.Random(seed).shuffle(files)
    away = max(1, len(files) // every)
    return files[away:], files[:away]


def texts_of(dataset: str, texts: Texts) -> Texts:
    """The same old data with another new task."""
    if dataset == "verilog":
        return texts
    training, held_out = read_headers()
    return replace(texts, verilog=training, held_out_verilog=held_out)


def tuned(run: LawRun, bench: Bench) -> Any:
    """The base, with the run's LoRA."""
    model = bench.base()
    if run.method == "full":
        return model
    torch.manual_seed(run.seed)
    alpha = run.alpha
    config = LoraConfig(r=run.lora_rank, lora_alpha=alpha, use_rslora=True, target_modules="all-linear")  # type: ignore[arg-type]
    return get_peft_model(model, config)


class BothReadings(TrainerCallback):
    """L_f at every evaluation: cross-entropy to the base's distribution (soft), and to its top token (hard)."""

    def __init__(self, base: Any, bench: Bench) -> None:
        self.base, self.bench = logits_of(base.eval()), bench
        self.found: dict[int, dict[str, float]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        sums = document_sums(self.base, logits_of(model), self.bench.retention["prose"], batch_tokens=2048)
        each = {name: float(value.sum() / sums.num_tokens.sum()) for name, value in sums.values.items()}
        self.found[state.global_step] = {
            "soft": each["base_ref_cross_entropy"] + each["ref_kl"],
            "hard": each["ref_argmax_cross_entropy"],
            "forgetting": each["loss"] - each["base_loss"],
        }


def finetune(run: LawRun, bench: Bench) -> dict[str, Any]:
    """Train; new-task loss and L_f in both readings at every evaluation, nats per token."""
    unwatched, readings = replace(bench, retention={}), BothReadings(bench.base(), bench)
    with scratch() as folder:
        trainer = make_trainer(replace(run, method="ready"), unwatched, folder, model=tuned(run, bench))
        trainer.add_callback(readings)
        size, began = num_tuned(trainer.model), now()
        trainer.train()
        rows = [row for row in read_run(folder)["trajectory"] if "eval_loss" in row]
    every = [{"step": row["step"], "eval_loss": row["eval_loss"], **readings.found[row["step"]]} for row in rows]
    short = [{name: round(value, 6) for name, value in row.items()} for row in every]
    assert all(math.isfinite(value) for row in short for value in row.values())
    return {"began": began, "num_params": size, "trajectory": short}


def now() -> str:
    """This moment in UTC: a prediction is worth something only where it is older than the run."""
    return datetime.now(UTC).isoformat(timespec="seconds")
