"""The runs of the study of laws: their settings, their data, and what is measured at every evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import TrainerCallback

from experiments.corpora import read_cpp, read_web
from experiments.finetunes import Bench, Run, make_trainer, scratch
from retain import ReplayConfig
from retain.measuring.tokens import document_sums, logits_of
from retain.models.description import num_tuned
from retain.training.run_files import read_run

TASKS = {"verilog": None, "cpp": read_cpp, "web": read_web}
RANKS = (1, 2, 4, 8, 16, 32)
LARGEST = max(RANKS)
STEPS = 200
SEEDS = (0, 1)
COEFS = (0.3, 3.0)
SOME_RANKS = (4, 16)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IA3_RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class LawRun(Run):
    """A finetune on one of the data sets; LoRA, scale alpha/√rank as in the paper, on all linear layers by default."""

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
    """What the law of LoRA was not fitted to: full finetuning, fewer parts of the model, and KL replay."""
    whole = [LawRun(dataset=dataset, method=method, learning_rate=1e-3) for method in ("full", "top layer")]
    ia3 = LawRun(dataset=dataset, method="IA3", learning_rate=IA3_RATE)
    attention = [LawRun(dataset=dataset, method="attention", lora_rank=rank) for rank in SOME_RANKS]
    replay = [LawRun(dataset=dataset, lora_rank=rank, coef=coef) for coef in COEFS for rank in SOME_RANKS]
    return [replace(run, seed=seed) for run in (*whole, ia3, *attention, *replay) for seed in SEEDS]


def tuned(run: LawRun, bench: Bench) -> Any:
    """The base as the run's method trains it."""
    model = bench.base()
    if run.method in ("full", "top layer"):
        model.requires_grad_(run.method == "full")
        model.model.layers[-1].requires_grad_(True)
        return model
    torch.manual_seed(run.seed)
    if run.method == "IA3":
        config: Any = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    else:
        targets: Any = ATTENTION if run.method == "attention" else "all-linear"
        config = LoraConfig(r=run.lora_rank, lora_alpha=run.alpha, use_rslora=True, target_modules=targets)  # type: ignore[arg-type]
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
