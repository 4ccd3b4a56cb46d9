"""What replay costs a training step: by share of the batch, every k-th step and reference, with plain steps beside it.

    python benchmarks/replay_cost.py [--model NAME] [--rows 32] [--length 64] [--shares 8 16 32] [--output FILE]

Every cell is a real run of `ReplayTrainer`, timed between the ends of its optimizer steps, and again with new and
replay rows in passes of their own (`apart_ratio`); before and after it the same number of plain steps are timed, and
the ratio is to their mean. `predicted` counts floating-point operations: a plain
step 3 units a token (forward 1, backward 2; with frozen weights 1), the reference 1 more, stored hidden states the
head's part of 1. Processor seconds on a CPU, which other processes disturb less; wall-clock on a GPU. Without --model:
a Qwen3 of 5.8M parameters with random weights, on which losses mean nothing and times do.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from retain import ReplayConfig, ReplayDataset, ReplayTrainer, load_model, load_tokenizer, versions
from retain.lab.models import make_config, make_model
from retain.lab.streams import Stream
from retain.lab.tokenizers import word_tokenizer
from retain.models.description import num_parameters
from retain.replay.dataset import load_self_generated
from retain.replay.fisher import FISHER_FILE
from retain.sampling.write import sample_replay

SIZE, VOCAB, WARM, RANK = "5.8M", 4096, 2, 16
SHARES = (2, 4, 8, 16, 32)  # new tokens per replay token


@dataclass(frozen=True)
class Cell:
    """`rows` of `length` replay tokens a step; none where `rows` is 0. `anchor`: the optimizer holds it, too."""

    method: str  # full, LoRA
    reference: str  # copy, adapter, cache
    rows: int
    length: int
    every: int = 1
    anchor: bool = False


def cells(rows: int, length: int, shares: Sequence[int]) -> list[Cell]:
    """Shares of a batch by rows, and below one row by its length."""

    def cell(share: int, method: str = "full", reference: str = "copy", every: int = 1) -> Cell:
        number = max(1, rows // share)
        return Cell(method, reference, number, rows * length // (share * number), every)

    return [
        *(cell(share) for share in shares),
        *(cell(share, every=every) for share, every in ((4, 2), (4, 4), (2, 8)) if share in shares),
        *(cell(share, reference="cache") for share in shares),
        Cell("full", "cache", 0, 0, anchor=True),
        *(cell(share, "LoRA", reference) for reference in ("adapter", "cache") for share in shares),
        Cell("LoRA", "cache", 0, 0, anchor=True),
    ]


def predicted(cell: Cell, rows: int, length: int, head: float, shapes: Sequence[tuple[int, int]]) -> float:
    """Operations of a step over those of a plain one.

    Args:
        head: the output head's part of a forward pass.
        shapes: of the matrices of linear layers; the anchor turns the smaller side of each.
    """
    plain = 3 if cell.method == "full" else 2
    if cell.anchor:
        turned = sum((2 * m * n if cell.method == "full" else 3 * RANK * min(m, n)) * min(m, n) for m, n in shapes)
        return 1 + turned / (plain * rows * length * sum(m * n for m, n in shapes))
    extra = plain + (head if cell.reference == "cache" else 1)
    return 1 + extra / plain * cell.rows * cell.length / (rows * length) / cell.every


def num_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


class Clock(TrainerCallback):
    """Seconds from the end of each optimizer step to the next."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if self.device == "cuda" else time.process_time())


class Bench:
    """A model with the rows that it is trained on, and replay with stored predictions."""

    def __init__(self, name: str | None, rows: int, length: int, folder: Path, device: str, dtype: str) -> None:
        self.rows, self.length, self.folder, self.device, self.dtype = rows, length, folder, device, dtype
        if name is None:
            tokenizer = word_tokenizer(VOCAB)
            make_model(make_config(SIZE, vocab_size=VOCAB, max_length=length)).save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        self.name = name or str(folder / "model")
        self.tokenizer, model = load_tokenizer(self.name), self.model()
        how: dict[str, Any] = {"num_rows": 64, "max_length": length, "seed": 1, "store_reference": "hidden"}
        began = time.perf_counter()
        sample_replay(model, self.tokenizer, folder / "replay", **how)
        sampled = time.perf_counter()
        sample_replay(model, self.tokenizer, folder / "replay", **how, store_fisher=True)
        self.fisher = {
            "seconds_over_sampling": round((time.perf_counter() - sampled) / (sampled - began), 3),
            "bytes_over_model": round((folder / "replay" / FISHER_FILE).stat().st_size / num_bytes(model), 3),
        }
        self.replay = load_self_generated(folder / "replay")
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers]
        self.vocab, self.num_params = model.get_output_embeddings().weight.shape[0], num_parameters(model)
        head = model.get_output_embeddings().weight.numel()
        inner = sum(weight.numel() for weight in model.model.parameters() if weight.ndim == 2)
        self.head = head / (inner - model.get_input_embeddings().weight.numel() + head)

    def model(self) -> Any:
        return load_model(self.name, dtype="float32", device=self.device)

    def pool(self, cell: Cell) -> ReplayDataset:
        """Its rows, whole where their stored predictions are read, else cut to the cell's length."""
        if cell.reference == "cache":
            return self.replay
        cut = [self.replay[at][: cell.length] for at in range(len(self.replay))]
        return ReplayDataset.from_rows(cut, self.replay.source, self.replay.manifest)

    def steps(self, cell: Cell, number: int, *, apart: bool = False) -> float:
        """Mean seconds of an optimizer step, over `number` steps after some to warm up.

        Args:
            apart: new and replay rows have passes of their own.
        """
        rng, most = np.random.default_rng(0), self.rows * (number + WARM)
        tokens = rng.integers(3, self.vocab, (most, self.length))
        model = self.model()
        if cell.method == "LoRA":
            model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainer = ReplayTrainer(
            model=model,
            args=self.arguments(number + WARM),
            train_dataset=Stream(lambda numbers: tokens[numbers], most),
            data_collator=default_data_collator,
            processing_class=self.tokenizer,
            replay_config=ReplayConfig(
                replay_coef=1.0 if cell.rows else 0.0,
                anchor_coef=20.0 if cell.anchor else 0.0,
                per_device_replay_batch_size=max(cell.rows, 1),
                replay_every=cell.every,
                replay_reference=cell.reference if cell.rows else "auto",  # type: ignore[arg-type]
            ),
            replay_dataset=self.pool(cell) if cell.rows or cell.anchor else None,
        )
        if apart:
            trainer.replay.joint = None
        trainer.remove_callback(PrinterCallback)
        clock = Clock(self.device)
        trainer.add_callback(clock)
        trainer.train()
        return (clock.ends[-1] - clock.ends[WARM - 1]) / number

    def arguments(self, steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.folder / "run"), max_steps=steps, per_device_train_batch_size=self.rows,
            learning_rate=1e-3, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=self.device == "cpu", bf16=self.dtype == "bfloat16",
        )  # fmt: skip


def measure(bench: Bench, chosen: Sequence[Cell], rounds: int, number: int) -> list[dict[str, Any]]:
    """Every cell in every round, as it is and with passes of its own, between plain steps of its method."""
    found: dict[Cell, list[tuple[float, ...]]] = {cell: [] for cell in chosen}
    for at in range(rounds):
        before: tuple[str, float] | None = None
        for cell, ratios in found.items():
            bare = Cell(cell.method, cell.reference, 0, 0)
            if before is None or before[0] != cell.method:
                before = cell.method, bench.steps(bare, number)
            own = [bench.steps(cell, number, apart=apart) for apart in (False, True)[: 1 + bool(cell.rows)]]
            after = bench.steps(bare, number)
            ratios.append(tuple(2 * seconds / (before[1] + after) for seconds in own))
            before = cell.method, after
        logging.warning("round %d of %d", at + 1, rounds)
    return [row_of(cell, ratios, bench) for cell, ratios in found.items()]


def row_of(cell: Cell, ratios: Sequence[tuple[float, ...]], bench: Bench) -> dict[str, Any]:
    share = f"1/{bench.rows * bench.length // (cell.rows * cell.length)}" if cell.rows else None
    ordered, apart = sorted(ratio[0] for ratio in ratios), [ratio[1] for ratio in ratios if ratio[1:]]
    return {
        **asdict(cell), "share": share, "time_ratio": round(statistics.median(ordered), 3),
        "range": [round(ordered[0], 3), round(ordered[-1], 3)],
        "apart_ratio": round(statistics.median(apart), 3) if apart else None,
        "predicted": round(predicted(cell, bench.rows, bench.length, bench.head, bench.shapes), 3),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder; default: random weights")
    parser.add_argument("--rows", type=int, default=32, help="new rows a step")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="new tokens per replay token")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each cell and round; a multiple of 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    logging.getLogger("retain").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.model, options.rows, options.length, Path(folder), device, dtype)
        chosen = cells(options.rows, options.length, options.shares)
        rows = measure(bench, chosen, options.rounds, options.steps)
        facts = {
            "model": options.model or f"random, {SIZE}", "num_params": bench.num_params, "fisher": bench.fisher,
            "rows": options.rows, "length": options.length, "rounds": options.rounds, "steps": options.steps, "seed": 0,
            "dtype": dtype,
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "threads": options.threads, "clock": "wall" if device == "cuda" else "processor", "versions": versions(),
        }  # fmt: skip
    for row in rows:
        low, high = row["range"]
        every = f" every {row['every']} steps" if row["every"] > 1 else ""
        what = f"{row['reference']:7} {row['share']:>4}{every}" if row["share"] else "anchor"
        label = f"{row['method']:4} {what}"
        apart = f", apart {row['apart_ratio']:.3f}" if row["apart_ratio"] else ""
        ratio = f"{row['time_ratio']:.3f} [{low:.3f}, {high:.3f}]{apart}"
        print(f"{label:34} {ratio}, by operations {row['predicted']:.3f}")
    if options.output:
        options.output.write_text(json.dumps({**facts, "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
