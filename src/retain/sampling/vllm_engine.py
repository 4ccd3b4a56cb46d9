"""Sampling with vLLM, for GPUs and large models: `retain sample --engine vllm`.

Every setting is explicit, since vLLM's defaults come from the checkpoint's generation_config. Two settings are traps.
`min_tokens` would not lengthen rows but forbid their end-of-document tokens (vLLM sets those to −inf up to that length,
with or without `ignore_eos`); `ignore_eos` alone gives every row its full length. And a dtype of `auto` would load a
float32 checkpoint in half precision.

A row's seed is a pure function of (seed, row), but vLLM's rounding depends on which rows run together: repeated rows
are equally good draws, but not the same to the last bit. vLLM reports no entropy, so its datasets lack that column.

One process has one engine. Under `torchrun` or `accelerate launch` each process draws whole shards with its own engine
and GPUs. `sample_replay` fingerprints the transformers model, which stays in host memory (a second copy of the weights,
read and hashed once); vLLM loads its own from the same files. vLLM returns no predictions to store: the transformers
model computes them after the engine is closed, on one of its devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from retain.models.loading import resolve_model_path
from retain.sampling.engine import DrawnRows, Engine, batch_engine

if find_spec("vllm") is None:
    raise ValueError("engine: 'vllm' needs the extra; pip install 'retain-llm[vllm]'")

SAMPLING = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": True,
    "min_tokens": 0,
    "detokenize": False,
    "logprobs": 0,  # of the drawn token alone
    "flat_logprobs": True,
}
# Variables of torchrun and accelerate, from which an engine would join their process group.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


def row_seed(seed: int, row: int) -> int:
    """The seed of one row, from 0 to 2⁶³ − 1: a pure function of (seed, row)."""
    return int(np.random.Philox(key=[seed, row]).random_raw()) >> 1


@contextmanager
def open_llm(arguments: dict[str, Any], devices: str | None) -> Iterator[Any]:
    """A vLLM engine in this process; its workers end with the context, which frees the memory of their devices.

    Args:
        arguments: of `vllm.LLM`.
        devices: its GPUs; None for all.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would inherit the dataset's lock
    os.environ.setdefault(
        "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
    )  # an engine process would survive if this one is killed
    from vllm import LLM

    before, threads = dict(os.environ), torch.get_num_threads()  # vLLM sets this process to one thread
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        llm = LLM(**arguments)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    try:
        yield llm
    finally:
        executor = llm.llm_engine.model_executor  # `engine_core.shutdown` would end torchrun's process group, too
        workers = executor.workers
        executor.shutdown()
        for worker in workers:
            worker.proc.join()
        torch.set_num_threads(threads)


def draw_with(
    llm: Any, prefixes: Sequence[Sequence[int]], rows: Sequence[int], *, max_length: int, seed: int
) -> DrawnRows:
    """Draw the rows with these numbers, continued from their prefixes; see `retain.sampling.engine.draw_rows`."""
    from vllm import SamplingParams, TokensPrompt

    params = [
        SamplingParams(**SAMPLING, seed=row_seed(seed, row), max_tokens=max_length - len(prefix))
        for prefix, row in zip(prefixes, rows, strict=True)
    ]
    prompts = [TokensPrompt(prompt_token_ids=list(prefix)) for prefix in prefixes]
    completions = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
    for row, param, completion in zip(rows, params, completions, strict=True):
        if len(completion.token_ids) != param.max_tokens:
            count = f"{len(completion.token_ids)} of {param.max_tokens} tokens"
            raise RuntimeError(f"engine: vLLM ended row {row} after {count} ({completion.finish_reason})")
    logprobs = np.array([completion.cumulative_logprob for completion in completions])
    if not np.isfinite(logprobs).all():
        raise ValueError("dtype: the model's predictions are not finite; load it as float32 or bfloat16")
    tokens = [[*prefix, *completion.token_ids] for prefix, completion in zip(prefixes, completions, strict=True)]
    return DrawnRows(np.array(tokens, dtype=np.int32), np.array([len(prefix) for prefix in prefixes]), logprobs, None)


@contextmanager
def vllm_engine(
    name: str,
    *,
    dtype: torch.dtype,
    max_length: int,
    seed: int,
    revision: str = "main",
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
) -> Iterator[Engine]:
    """An engine for `sample_replay(..., engine=vllm_engine(...), engine_name="vllm")`.

    vLLM gets `batch_size` rows at once. It spawns processes, so your own script needs `if __name__ == "__main__":`.

    Args:
        name: the model as `load_model` takes it; no adapter.
        dtype: that of `sample_replay`'s transformers model, which the manifest records.
        max_length, seed: as for `sample_replay`.
        tensor_parallel_size: GPUs of this process's engine.
    """
    arguments = {
        "model": resolve_model_path(name),
        "revision": revision,
        "tokenizer_revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "mp",  # its workers end with this process
        "max_model_len": max_length,
        "generation_config": "vllm",  # not the checkpoint's
        "logprobs_mode": "raw_logprobs",  # of the model's own distribution
    }
    with open_llm(arguments, gpus_of_process(tensor_parallel_size)) as llm:
        yield batch_engine(partial(draw_with, llm, max_length=max_length, seed=seed))


def gpus_of_process(size: int) -> str | None:
    """CUDA_VISIBLE_DEVICES for this process of a launch; None without a launcher, or without GPUs."""
    num_processes, rank = (int(os.environ.get(name, 0)) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = map(str, range(torch.cuda.device_count())) if variable is None else variable.split(",")
    gpus = [gpu for gpu in visible if gpu.strip()]
    if num_processes < 2 or not gpus:
        return None
    if (needed := num_processes * size) > len(gpus):
        raise ValueError(
            f"tensor_parallel_size: {num_processes} processes with {size} GPUs each need {needed} GPUs and {len(gpus)} "
            "are visible; launch fewer processes"
        )
    return ",".join(gpus[rank * size : (rank + 1) * size])
