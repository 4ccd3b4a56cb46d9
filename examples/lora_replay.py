"""LoRA with replay; the reference is the adapter off: `python examples/lora_replay.py MODEL rows.jsonl out/`."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from retain import ReplayConfig, ReplaySFTTrainer, load_model, load_tokenizer, sample_replay

name, rows, out = sys.argv[1:]
device = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
tokenizer = load_tokenizer(name)
model = load_model(name, dtype="float32")
sample_replay(model, tokenizer, f"{out}/replay", num_rows=32, max_length=64)
trainer = ReplaySFTTrainer(
    model=model,
    args=SFTConfig(out, max_steps=10, max_length=64, learning_rate=1e-3, **device),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    replay_config=ReplayConfig(replay_coef=1.0, per_device_replay_batch_size=4),
    replay_dataset=f"{out}/replay",
)
print("\n".join(trainer.protection()))
trainer.train()
trainer.save_model(out)
