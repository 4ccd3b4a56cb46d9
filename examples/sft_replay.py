"""TRL's SFT with self-generated replay: `python examples/sft_replay.py MODEL rows.jsonl wiki.txt out/`."""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig

from retain import ReplayConfig, ReplaySFTTrainer, load_model, load_tokenizer, sample_replay

name, rows, wiki, out = sys.argv[1:]
device = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
tokenizer = load_tokenizer(name)
model = load_model(name, dtype="float32")

# 1. The base model writes its own replay rows: from the document start, at temperature 1, untruncated.
sample_replay(model, tokenizer, f"{out}/replay", num_rows=32, max_length=64)

# 2. TRL's trainer with a KL penalty to the frozen base on those rows.
trainer = ReplaySFTTrainer(
    model=model,
    args=SFTConfig(out, max_steps=10, max_length=64, learning_rate=1e-4, eval_strategy="steps", eval_steps=5, **device),
    train_dataset=load_dataset("json", data_files=rows, split="train[:80%]"),
    eval_dataset=load_dataset("json", data_files=rows, split="train[80%:]"),
    processing_class=tokenizer,
    replay_config=ReplayConfig(replay_objective="kl", replay_coef=1.0),
    replay_dataset=f"{out}/replay",
    retention_datasets={"wiki": Path(wiki).read_text().split("\n\n")},
)
trainer.train()
trainer.save_model(out)

# 3. What was forgotten, with 95% intervals over documents; also in out/metrics.jsonl at every evaluation.
trainer.evaluate_retention()
print(trainer.report("with replay"))
