"""Train tiny models in as many processes as torchrun starts, and save the weights: `ddp_run.py FOLDER BATCH`."""

import sys
from pathlib import Path

import torch
from conftest import make_model, make_texts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_trainer import LORA, config

from retain import ReplayConfig, ReplayDataset, ReplaySFTTrainer
from retain.sampling import sample_rows

CASES = {
    "llama-copy": ("llama", None, "kl"),
    "gemma-copy": ("gemma3_text", None, "kl"),  # its embedding scale is a buffer that autograd saves
    "llama-adapter": ("llama", LORA, "kl"),
    "llama-ntp": ("llama", None, "ntp"),
    "llama-new": ("llama", None, "kl_new"),
}


def main(folder: Path, batch: int) -> None:
    rows = Dataset.from_list([{"text": text} for text in make_texts(48, seed=1)])
    for name, (architecture, lora, objective) in CASES.items():
        drawn = sample_rows(make_model(architecture), 3, range(20), 24, seed=6).numpy()
        replay = ReplayDataset.from_rows([row[: 3 + at % 20] for at, row in enumerate(drawn)], "ragged")
        trainer = ReplaySFTTrainer(
            model=make_model(architecture),
            args=config(folder / name, per_device_train_batch_size=batch, optim="sgd", learning_rate=0.3, max_steps=4),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(**lora) if lora else None,
            replay_config=ReplayConfig(replay_objective=objective, replay_coef=2.0, per_device_replay_batch_size=batch),
            replay_dataset=replay,
            retention_datasets={"words": make_texts(4, seed=9)},
        )
        trainer.train()
        trainer.evaluate_retention()
        if trainer.is_world_process_zero():
            kl = [row["replay/loss"] for row in trainer.state.log_history if "replay/loss" in row]
            weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
            torch.save({"weights": weights, "kl": kl}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
