"""Sampling with vLLM, for GPUs and large models: `retain sample --engine vllm`.

Every setting is stated: left alone, vLLM takes over what the checkpoint's generation_config says. Two are traps.
`min_tokens` would not make rows long, it would forbid their end-of-document tokens (vLLM sets those to −inf until
so many tokens are there, `ignore_eos` or not); `ignore_eos` alone makes every row as long as it may be. And a dtype of
`auto` loads a float32 checkpoint in half precision.

A row's seed is a pure function of (seed, row), but vLLM's rounding depends on which rows run together: rows are as good
a draw each time, not the same to the last bit. It reports no entropy, so these datasets have no such column.

Weights are shared by nobody. `sample_replay` fingerprints the transformers model, which lies in host memory (the
weights once more, read and hashed once); vLLM, and each replica of it, loads its own from the same files.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from retain.models.loading import resolve_model_path
from retain.sampling.engine import Drawn, Engine, Work, in_batches

if find_spec("vllm") is None:
    raise ValueError("engine: 'vllm' needs the extra; pip install 'retain[vllm]'")

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
PATIENCE = 20.0  # seconds that a replica has to leave, then to heed an interrupt


def row_seed(seed: int, row: int) -> int:
    """The seed of one row, from 0 to 2⁶³ − 1: a pure function of (seed, row)."""
    return int(np.random.Philox(key=[seed, row]).random_raw()) >> 1


@dataclass(frozen=True)
class Replica:
    """One copy of the model in vLLM, loaded when it first draws. `arguments`: those of `vllm.LLM`."""

    arguments: dict[str, Any]
    max_length: int
    seed: int

    @cached_property
    def llm(self) -> Any:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would inherit the dataset's lock
        from vllm import LLM

        return LLM(**self.arguments)

    def draw(self, prefixes: Sequence[Sequence[int]], rows: Sequence[int]) -> Drawn:
        """Draw the rows with these numbers behind their given beginnings; see `retain.sampling.engine.draw_rows`."""
        from vllm import SamplingParams, TokensPrompt

        params = [
            SamplingParams(**SAMPLING, seed=row_seed(self.seed, row), max_tokens=self.max_length - len(prefix))
            for prefix, row in zip(prefixes, rows, strict=True)
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(prefix)) for prefix in prefixes]
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        completions = [answer.outputs[0] for answer in answers]
        for row, asked, found in zip(rows, params, completions, strict=True):
            if len(found.token_ids) != asked.max_tokens:
                count = f"{len(found.token_ids)} of {asked.max_tokens} tokens"
                raise RuntimeError(f"engine: vLLM ended row {row} after {count} ({found.finish_reason})")
        logprobs = np.array([found.cumulative_logprob for found in completions])
        if not np.isfinite(logprobs).all():
            raise ValueError("dtype: the model's predictions are not finite; load it as float32 or bfloat16")
        tokens = [[*prefix, *found.token_ids] for prefix, found in zip(prefixes, completions, strict=True)]
        return Drawn(np.array(tokens, dtype=np.int32), np.array([len(prefix) for prefix in prefixes]), logprobs, None)


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
    data_parallel_size: int = 1,
) -> Iterator[Engine]:
    """An engine for `sample_replay(..., engine=engine, engine_name="vllm")`; vLLM gets `batch_size` rows at once.

    Processes are spawned, so a script of your own needs its `if __name__ == "__main__":`.

    Args:
        name: the model as `load_model` takes it; no adapter.
        dtype: of the transformers model that `sample_replay` gets: the manifest says so.
        max_length, seed: as for `sample_replay`.
        tensor_parallel_size: GPUs that share one copy.
        data_parallel_size: copies, each a process of its own with its own GPUs of this machine, for that is how vLLM
            runs dense models side by side offline (`LLM` refuses its own data_parallel_size).

    Raises:
        ValueError: if there are too few GPUs.
    """
    arguments = {
        "model": resolve_model_path(name),
        "revision": revision,
        "tokenizer_revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": tensor_parallel_size,
        "max_model_len": max_length,
        "generation_config": "vllm",  # not the checkpoint's
        "logprobs_mode": "raw_logprobs",  # of the model's own distribution
    }
    replica = Replica(arguments, max_length, seed)
    if data_parallel_size == 1:
        yield in_batches(replica.draw)
        return
    replicas = Replicas(replica, devices_of_replicas(data_parallel_size, tensor_parallel_size))
    try:
        yield replicas.draw
    finally:
        replicas.close()


def devices_of_replicas(count: int, size: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each replica: the next `size` of the GPUs that this process may see."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(index) for index in range(torch.cuda.device_count())] if named is None else named.split(",")
    gpus = [gpu for gpu in found if gpu.strip()]
    if len(gpus) < count * size:
        raise ValueError(
            f"data_parallel_size: {count} copies of tensor_parallel_size {size} need {count * size} GPUs and "
            f"{len(gpus)} are visible; use fewer copies"
        )
    return [",".join(gpus[at : at + size]) for at in range(0, count * size, size)]


class Replicas:
    """Replica processes that draw whole shards, started when they are first needed; this process writes the files."""

    def __init__(self, replica: Replica, devices: Sequence[str]) -> None:
        self.replica, self.devices = replica, devices
        self.processes: dict[Any, Any] = {}  # by this process's end of the pipe to each

    def start(self) -> None:
        context = get_context("spawn")
        for devices in self.devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self.replica, devices))
            process.start()
            theirs.close()  # so that its end is seen here
            self.processes[ours] = process

    def draw(
        self, shards: Sequence[Work], batch_size: int, progress: Callable[[int], object]
    ) -> Iterator[tuple[Work, Drawn]]:
        """An engine: each replica gets its next shard when it is done with the last."""
        if shards and not self.processes:
            self.start()
        todo, idle, busy = deque(shards), list(self.processes), dict[Any, Work]()
        while todo or busy:
            while todo and idle:
                replica, work = idle.pop(), todo.popleft()
                with suppress(BrokenPipeError):  # it is gone: its answer will say so
                    replica.send((work, batch_size))
                busy[replica] = work
            for replica in wait(list(busy)):
                drawn, work = self.answer(replica), busy.pop(replica)
                idle.append(replica)
                progress(len(work.rows))
                yield work, drawn

    def answer(self, replica: Any) -> Drawn:
        """What a replica drew, or an error that says why it did not."""
        try:
            answer = replica.recv()
        except (EOFError, OSError) as error:
            self.processes[replica].join(PATIENCE)
            code = self.processes[replica].exitcode
            raise RuntimeError(
                f"engine: a vLLM replica ended with exit code {code}; finished shards are kept, run the same again"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Let the replicas go: the idle ones see that nobody asks any more, the others are interrupted."""
        for replica in self.processes:
            replica.close()
        for process in self.processes.values():
            process.join(PATIENCE)
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
                process.join(PATIENCE)
            process.kill()
            process.join()


def serve(driver: Connection, replica: Replica, devices: str) -> None:
    """What a replica process does: draw the shards that come, until nobody asks any more."""
    os.environ["CUDA_VISIBLE_DEVICES"] = devices  # before CUDA is first used
    engine = in_batches(replica.draw)
    try:
        while True:
            work, batch_size = driver.recv()
            try:
                [(_, drawn)] = engine([work], batch_size, lambda rows: None)
            except Exception as error:  # whatever it is, the driver should say it
                kind = ValueError if isinstance(error, ValueError) else RuntimeError
                driver.send(kind(str(error) if kind is ValueError else f"{type(error).__name__}: {error}"))
            else:
                driver.send(drawn)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
