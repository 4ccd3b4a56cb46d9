"""What replay costs a training step: by share of the batch and reference, with plain steps beside it.

    python benchmarks/replay_cost.py [--model NAME | --size 5.8M] [--shares 8 16 32] [--output FILE]
    python benchmarks/replay_cost.py --parts memory --output FILE    # beside the times that the file has

Every cell is a real run of `ReplayTrainer` with replay on every other step, by turns in the new rows' forward pass
(`joint`) and in one of its own (`apart`). A step's ratio is its time over the mean of the plain steps before and after
it, from the end of one optimizer step to that of the next; shown are medians with 95% bootstrap intervals. The anchor
acts on every step: its run is timed between plain runs. `predicted` counts floating-point operations: a plain
step 3 units a token (forward 1, backward 2; with frozen weights 1), the reference 1 more, stored hidden states the
head's part of 1. Processor seconds on a CPU, which other processes disturb less; wall-clock on a GPU. `memory` is the
peak of a few steps, model and optimizer with them, over that of plain ones: median and range. Without
--model: a Qwen3 of --size parameters with random weights, on which losses mean nothing and times do.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model
from replay_step import peak_memory
from scipy.stats import bootstrap
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from retain import ReplayConfig, ReplayDataset, ReplayTrainer, load_model, load_tokenizer, versions
from retain.lab.models import make_config, make_model
from retain.lab.streams import Stream
from retain.lab.tokenizers import word_tokenizer
from retain.models.description import num_parameters
from retain.replay.dataset import load_self_generated
from retain.replay.stored_fisher import FISHER_FILE
from retain.sampling.write import sample_replay

VOCAB, RANK = 1024, 16
WARM = 4  # steps: until the KL has risen, replay has a pass of its own
SHARES = (4, 8, 16, 32)  # new tokens per replay token
PARTS = ("time", "memory")


@dataclass(frozen=True)
class Cell:
    """`rows` of `length` replay tokens a step; none where `rows` is 0. `anchor`: the optimizer holds it, too."""

    method: str  # full, LoRA
    reference: str  # copy, adapter, cache
    rows: int = 0
    length: int = 0
    anchor: bool = False


def cells(rows: int, length: int, shares: Sequence[int]) -> list[Cell]:
    """Shares of a batch by rows, and below one row by its length."""
    kinds = (("full", "copy"), ("full", "cache"), ("LoRA", "adapter"), ("LoRA", "cache"))
    sizes = [(max(1, rows // share), share) for share in shares]
    return [
        *(Cell(*kind, number, rows * length // (share * number)) for kind in kinds for number, share in sizes),
        *(Cell(method, "cache", anchor=True) for method in ("full", "LoRA")),
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
    return 1 + extra / plain * cell.rows * cell.length / (rows * length)


def num_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


class Clock(TrainerCallback):
    """Seconds from the end of each optimizer step to the next; replay joins the new rows in every fourth."""

    def __init__(self, trainer: ReplayTrainer, device: str) -> None:
        self.replay, self.joint, self.device, self.ends = trainer.replay, trainer.replay.joint, device, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.replay.joint = self.joint if state.global_step % 4 == 0 else None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() if self.device == "cuda" else time.process_time())


class Bench:
    """A model with the rows that it is trained on, and replay with stored predictions."""

    def __init__(
        self, name: str | None, size: str, rows: int, length: int, folder: Path, device: str, dtype: str
    ) -> None:
        self.rows, self.length, self.folder, self.device, self.dtype = rows, length, folder, device, dtype
        if name is None:
            tokenizer = word_tokenizer(VOCAB)
            make_model(make_config(size, vocab_size=VOCAB, max_length=length)).save_pretrained(folder / "model")
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

    def steps(self, cell: Cell, number: int) -> Float[np.ndarray, " number"]:
        """Seconds of each optimizer step, after some to warm up."""
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
                replay_every=2,
                replay_reference=cell.reference if cell.rows else "auto",  # type: ignore[arg-type]
            ),
            replay_dataset=self.pool(cell) if cell.rows or cell.anchor else None,
        )
        trainer.remove_callback(PrinterCallback)
        clock = Clock(trainer, self.device)
        trainer.add_callback(clock)
        trainer.train()
        return np.diff(clock.ends[WARM - 1 :])

    def arguments(self, steps: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.folder / "run"), max_steps=steps, per_device_train_batch_size=self.rows,
            learning_rate=1e-3, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=self.device == "cpu", bf16=self.dtype == "bfloat16",
        )  # fmt: skip


def ratios(bench: Bench, cell: Cell, cycles: int) -> dict[str, Float[np.ndarray, " cycles"]]:
    """Time of steps over that of plain ones: with replay of both kinds, or with the anchor."""
    if cell.anchor:
        bare = Cell(cell.method, "auto")
        before, own, after = (bench.steps(one, 2 * cycles) for one in (bare, cell, bare))
        return {"anchored": 2 * own / (before + after)}
    seconds = bench.steps(cell, 4 * cycles + 2)
    found = 2 * seconds[2:-1:2] / (seconds[1:-2:2] + seconds[3::2])
    return {"apart": found[::2], "joint": found[1::2]}


def row_of(bench: Bench, cell: Cell) -> dict[str, Any]:
    """A cell's settings, as the file names it."""
    share = f"1/{bench.rows * bench.length // (cell.rows * cell.length)}" if cell.rows else None
    return {**asdict(cell), "share": share}


def times(bench: Bench, cell: Cell, cycles: int) -> dict[str, Any]:
    """A cell's ratios: medians, with 95% intervals over the steps."""
    row: dict[str, Any] = {}
    for name, found in ratios(bench, cell, cycles).items():
        ends = bootstrap((found,), np.median, method="percentile", rng=0).confidence_interval
        row[name] = {"value": round(float(np.median(found)), 3), "ci": [round(float(end), 3) for end in ends]}
    row["predicted"] = round(predicted(cell, bench.rows, bench.length, bench.head, bench.shapes), 3)
    return row


def peaks(bench: Bench, cell: Cell, repeats: int) -> Float[np.ndarray, " repeats"]:
    """Bytes at the peaks of runs of some steps, of both kinds where rows are replayed."""
    return np.array([peak_memory(lambda: bench.steps(cell, WARM), bench.device) for _ in range(repeats)], float)


def line_of(row: dict[str, Any]) -> str:
    found = [
        f"{name} {row[name]['value']:.3f} {row[name]['ci']}" for name in ("joint", "apart", "anchored") if name in row
    ]
    what = f"{row['method']} {row['reference']} {row['share'] or ''}"
    if "predicted" in row:
        found.append(f"by operations {row['predicted']:.3f}")
    if "memory" in row:
        found.append(f"memory {row['memory']['value']:.3f} {row['memory'].get('range', '')}")
    return f"{what:18} {'  '.join(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or folder; default: random weights")
    parser.add_argument("--size", default="430k", help="parameters of the random model; default: study 01's")
    parser.add_argument("--rows", type=int, default=32, help="new rows a step")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="new tokens per replay token")
    parser.add_argument("--cycles", type=int, default=60, help="timed replay steps of either kind")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which memory is measured")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="others stay as --output has them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    logging.getLogger("retain").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.model, options.size, options.rows, options.length, Path(folder), device, dtype)
        facts: dict[str, Any] = {
            "model": options.model or f"random, {options.size}", "num_params": bench.num_params, "fisher": bench.fisher,
            "rows": options.rows, "length": options.length, "cycles": options.cycles, "seed": 0, "dtype": dtype,
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "threads": options.threads, "clock": "wall" if device == "cuda" else "processor", "versions": versions(),
            "cells": [],
        }  # fmt: skip
        known: list[dict[str, Any]] = []
        if set(options.parts) != set(PARTS) and options.output and options.output.exists():
            kept = json.loads(options.output.read_text())
            others = ("repeats", "plain_megabytes") if "time" in options.parts else ("fisher", "cycles")
            facts, known = facts | {name: kept[name] for name in others if name in kept}, kept["cells"]
        plain = {}
        if "memory" in options.parts:
            for method in ("full", "LoRA"):  # a first run, whose threads and caches are new, does not count
                plain[method] = float(np.median(peaks(bench, Cell(method, "auto"), 1 + options.repeats)[1:]))
            facts["repeats"] = options.repeats
            facts["plain_megabytes"] = {method: round(found / 2**20, 1) for method, found in plain.items()}
        for cell in cells(options.rows, options.length, options.shares):
            row = row_of(bench, cell)
            row = next((one for one in known if row.items() <= one.items()), row)
            if "time" in options.parts:
                row |= times(bench, cell, options.cycles)
            if "memory" in options.parts:
                over = peaks(bench, cell, options.repeats) / plain[cell.method]
                row["memory"] = {"value": round(float(np.median(over)), 3)}
                if len(over) > 1:
                    row["memory"]["range"] = [round(float(end), 3) for end in (over.min(), over.max())]
            facts["cells"].append(row)
            print(line_of(row), flush=True)
            if options.output:
                rest = [one for one in known if one not in facts["cells"]]
                whole = facts | {"cells": [*facts["cells"], *rest]}
                options.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
