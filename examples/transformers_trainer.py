"""`transformers.Trainer` with replay: `python examples/transformers_trainer.py MODEL rows.jsonl out/`."""

import sys

from datasets import load_dataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from retain import ReplayConfig, ReplayTrainer, load_model, load_tokenizer, sample_replay

name, rows, out = sys.argv[1:]
tokenizer = load_tokenizer(name)
model = load_model(name, dtype="float32")
sample_replay(model, tokenizer, f"{out}/replay", num_rows=32, max_length=64)

dataset = load_dataset("json", data_files=rows, split="train")
dataset = dataset.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns=["text"])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = ReplayTrainer(
    model=model,
    args=TrainingArguments(out, max_steps=10, logging_steps=5, learning_rate=1e-4, report_to="none"),
    train_dataset=dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
    replay_config=ReplayConfig(replay_coef=1.0),
    replay_dataset=f"{out}/replay",
)
trainer.train()
trainer.save_model(out)
