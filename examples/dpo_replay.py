"""Replay inside any other trainer, here DPO: `python examples/dpo_replay.py MODEL pairs.jsonl out/`."""

import sys

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from retain import ReplayConfig, ReplayMixin, load_model, load_tokenizer, sample_replay


class ReplayDPOTrainer(ReplayMixin, DPOTrainer):
    """The mixin comes first: it adds its term to the host trainer's loss."""


name, rows, out = sys.argv[1:]
device = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
tokenizer = load_tokenizer(name)
model = load_model(name, dtype="float32")
sample_replay(model, tokenizer, f"{out}/replay", num_rows=32, max_length=64)
trainer = ReplayDPOTrainer(
    model=model,
    args=DPOConfig(out, max_steps=5, logging_steps=1, max_length=64, learning_rate=1e-5, **device),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=tokenizer,
    replay_config=ReplayConfig(replay_coef=1.0),
    replay_dataset=f"{out}/replay",
)
trainer.train()
trainer.save_model(out)
