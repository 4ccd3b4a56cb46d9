"""A stand-in for vLLM where the real one (`make test-vllm`) cannot show something, or takes too long to start.

That is: a row that ends early, predictions that are not finite, lists of GPUs, a launcher's environment, what the verb
passes on, and when it is closed. It draws uniformly from 320 tokens. `FAKE_VLLM_DEVICES`: a folder where each process
leaves the name of its devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

VOCABULARY = 320


class SamplingParams(SimpleNamespace):
    pass


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": prompt_token_ids}


class LLM:
    made: list[LLM] = []  # noqa: RUF012
    missing = 0  # tokens that a row ends early
    logprob = -math.log(VOCABULARY)  # of each token

    def __init__(self, **arguments: Any) -> None:
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & os.environ.keys()
        self.arguments = arguments
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if devices and len(devices.split(",")) < arguments["tensor_parallel_size"]:
            raise ValueError(
                f"tensor_parallel_size {arguments['tensor_parallel_size']} is more than the GPUs {devices}"
            )
        if "FAKE_VLLM_DEVICES" in os.environ:
            Path(os.environ["FAKE_VLLM_DEVICES"], devices).touch()
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        self.is_open = True
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(workers=[], shutdown=self.close))
        LLM.made.append(self)

    def close(self) -> None:
        self.is_open = False

    def generate(
        self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        assert self.is_open
        assert len(prompts) == len(sampling_params)
        return [SimpleNamespace(outputs=[self.complete(asked)]) for asked in sampling_params]

    def complete(self, asked: SamplingParams) -> SimpleNamespace:
        count = asked.max_tokens - self.missing
        tokens = np.random.default_rng(asked.seed).integers(VOCABULARY, size=count).tolist()
        return SimpleNamespace(token_ids=tokens, cumulative_logprob=count * self.logprob, finish_reason="length")
