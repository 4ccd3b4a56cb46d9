"""A stand-in for vLLM's public face, after vLLM 0.33.0: names, defaults and what retain relies on; nothing of its code.

It draws with transformers. Arguments that vLLM does not know are TypeErrors; end-of-document tokens stop a row unless
`ignore_eos`, and are forbidden until `min_tokens`, `ignore_eos` or not; the checkpoint's generation_config is taken
over where nobody says otherwise. A launcher's process group would be taken for its own. `FAKE_VLLM_DEVICES`: a folder
where each process leaves the name of its devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# What `LLM(**kwargs)` hands to EngineArgs, as far as anybody here might want it.
ENGINE_ARGS = {
    "max_model_len", "generation_config", "override_generation_config", "logprobs_mode", "max_logprobs",
    "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_lora",
    "distributed_executor_backend", "disable_log_stats", "pipeline_parallel_size", "load_format",
}  # fmt: skip


class VLLMValidationError(ValueError):
    pass


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        if self.seed == -1:
            self.seed = None
        self.stop, self.stop_token_ids = self.stop or [], self.stop_token_ids or []
        bounds = {"temperature": (0, 2), "top_p": (1e-9, 1), "min_p": (0, 1), "top_k": (-1, 1 << 30)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise VLLMValidationError(f"{name} must be in [{low}, {high}], got {getattr(self, name)}.")
        if self.max_tokens is not None and not 1 <= self.max_tokens >= self.min_tokens >= 0:
            raise VLLMValidationError(f"min_tokens must be less than or equal to max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise VLLMValidationError("stop strings are only supported when detokenize is True.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise OverflowError("Python integer out of bounds for int64")


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, Any]:
    assert type(prompt_token_ids) is list
    assert all(type(token) is int for token in prompt_token_ids), "a list of Python's integers"
    return {"prompt_token_ids": prompt_token_ids}


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, position: dict[int, Logprob]) -> None:
        ((token, found),) = position.items()
        self.token_ids.append(token)
        self.logprobs.append(found.logprob)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: Any) -> Any:
        return {self.token_ids[index]: Logprob(self.logprobs[index])}


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: FlatLogprobs | list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    made: list[LLM] = []  # noqa: RUF012

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - ENGINE_ARGS
        if unknown:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} & os.environ.keys()
        self.arguments = {"model": model, "trust_remote_code": trust_remote_code, "dtype": dtype, "revision": revision}
        self.arguments |= {"tokenizer_revision": tokenizer_revision, "tensor_parallel_size": tensor_parallel_size}
        self.arguments |= kwargs
        self.asked: list[SamplingParams] = []
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if devices and len(devices.split(",")) < tensor_parallel_size:
            raise ValueError(f"tensor_parallel_size {tensor_parallel_size} is more than the GPUs {devices}")
        if "FAKE_VLLM_DEVICES" in os.environ:
            Path(os.environ["FAKE_VLLM_DEVICES"], devices).touch()
        self.max_model_len = kwargs.get("max_model_len") or 128
        loaded = torch.float16 if dtype == "auto" else getattr(torch, dtype)  # auto halves what is float32
        self.model = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=loaded)
        self.eos = AutoTokenizer.from_pretrained(model, revision=tokenizer_revision).eos_token_id
        self.own = GenerationConfig.from_pretrained(model)
        self.takes_over = kwargs.get("generation_config", "auto") == "auto"
        LLM.made.append(self)

    def get_default_sampling_params(self) -> SamplingParams:
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        said = {name: getattr(self.own, name) for name in names if getattr(self.own, name) is not None}
        return SamplingParams(**said if self.takes_over else {})

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: Any = None,
        tokenization_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> list[RequestOutput]:
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        params = params if isinstance(params, Sequence) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise VLLMValidationError(f"The lengths of prompts ({len(prompts)}) and params ({len(params)})")
        found = []
        for prompt, asked in zip(prompts, params, strict=True):
            self.asked.append(asked)
            ids = prompt["prompt_token_ids"]
            found.append(RequestOutput(str(len(self.asked)), None, ids, None, [self.complete(ids, asked)]))
        return found

    @torch.inference_mode()
    def complete(self, ids: list[int], asked: SamplingParams) -> CompletionOutput:
        if len(ids) >= self.max_model_len:
            raise VLLMValidationError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        assert (asked.temperature, asked.top_p, asked.top_k, asked.repetition_penalty) == (1.0, 1.0, 0, 1.0)
        generator = torch.Generator()
        generator.manual_seed(asked.seed) if asked.seed is not None else generator.seed()
        own = self.own.eos_token_id
        ends = {self.eos, *(own if isinstance(own, list) else [own])} - {None}  # even with generation_config="vllm"
        tokens: list[int] = []
        total, reason = 0.0, "length"
        kept: Any = FlatLogprobs() if asked.flat_logprobs else []
        most = math.inf if asked.max_tokens is None else asked.max_tokens
        while len(tokens) < most and len(ids) + len(tokens) < self.max_model_len:
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1].float()
            raw = torch.log_softmax(logits, -1)
            if len(tokens) < asked.min_tokens:
                logits[sorted(ends)] = -torch.inf
            token = int(torch.multinomial(torch.softmax(logits, -1), 1, generator=generator))
            tokens.append(token)
            total += float(raw[token])
            kept.append({token: Logprob(float(raw[token]))})
            if token in ends and not asked.ignore_eos:
                reason = "stop"
                break
        said = asked.logprobs is not None
        return CompletionOutput(0, "", tokens, total if said else None, kept if said else None, reason)
