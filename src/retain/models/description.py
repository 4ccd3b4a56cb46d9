"""Facts about a model or tokenizer: the document start token, fingerprints, sizes, positions, devices."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from retain.checks import Unchosen
from retain.models.reference import sees_ahead

# Tokens that separate documents in the pretraining of models whose bos_token is missing or a chat marker.
DOCUMENT_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<|startoftext|>", "</s>", "<eos>")
# Parts of adapters' parameter names besides the prefixes of PEFT's methods; what PEFT inserts into the base's names.
ADAPTER_PARTS = (".modules_to_save.", "prompt_encoder.", ".ranknum.", ".adaption_")
INSERTED = ("base_model.model.", ".token_adapter", ".base_layer", ".original_module")
PROBE_TEXT = "The naïve fox — 3.14% of 日本 — jumps\n\tover it's lazy(dog); // ok?"


def default_device() -> str:
    """The accelerator's type if there is one with float64 (Apple's has none), else `cpu`."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None and accelerator.type != "mps" else "cpu"


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class StartToken:
    """The token that starts a document in pretraining, and why it was chosen."""

    id: int
    token: str
    reason: str

    def __str__(self) -> str:
        return f"{self.token!r} (id {self.id}): {self.reason}"


def choose_start_token(tokenizer: PreTrainedTokenizerBase, override: str | int | None = None) -> StartToken:
    """Choose the document start: BOS, or the document separator if BOS is missing or a chat role marker.

    A BOS that the tokenizer itself puts before plain text starts documents, even if a chat template repeats it.
    SmolLM2-Instruct's BOS opens every chat turn and Qwen has none; both separate documents with `<|endoftext|>`.

    Raises:
        ValueError: if `override` is not in the vocabulary, or no token fits.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "fox": 1}, unk_token="fox"))
    >>> print(choose_start_token(PreTrainedTokenizerFast(tokenizer_object=words)))
    '<|endoftext|>' (id 0): the document separator, since there is no bos_token
    """
    if override is not None:
        return _start_token_by_name(tokenizer, override)
    bos = tokenizer.bos_token
    opens_plain_text = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    if bos is not None and (opens_plain_text or not _is_chat_marker(tokenizer, bos)):
        return StartToken(int(tokenizer.bos_token_id), str(bos), "the tokenizer's bos_token")
    why = "there is no bos_token" if bos is None else f"bos_token {bos!r} is a chat role marker"
    vocabulary = tokenizer.get_vocab()
    for token in (*DOCUMENT_SEPARATORS, tokenizer.eos_token):
        if token is not None and token in vocabulary and not _is_chat_marker(tokenizer, token):
            return StartToken(int(vocabulary[token]), str(token), f"the document separator, since {why}")
    raise ValueError(f"start_token: {why} and no document separator is known; give --start_token TOKEN")


def _start_token_by_name(tokenizer: PreTrainedTokenizerBase, override: str | int) -> StartToken:
    vocabulary = tokenizer.get_vocab()
    if str(override).isdecimal():  # digits are read as an id: no document starts with a digit token
        if int(override) < len(tokenizer):
            token = str(tokenizer.convert_ids_to_tokens(int(override)))
            return StartToken(int(override), token, "given as start_token")
    elif override in vocabulary:
        return StartToken(int(vocabulary[override]), str(override), "given as start_token")
    raise ValueError(f"start_token: {override!r} is not in the vocabulary; give one of its tokens or ids")


def _is_chat_marker(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether the chat template writes `token` at every turn; Llama-2-chat's BOS opens only users' turns."""
    if not tokenizer.chat_template:
        return False
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).count(str(token)) >= len(turns)
    except Exception:  # a template is code of the checkpoint and may reject these turns in any way
        return f"'{token}'" in str(tokenizer.chat_template) or str(token).startswith("<|im_")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the tokens of a probe text; ignores padding, templates and special-token roles."""
    vocabulary = sorted((str(token), int(index)) for token, index in tokenizer.get_vocab().items())
    probe = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()[:16]


@cache
def _adapter_parts() -> tuple[str, ...]:
    """Parts of a name that mark a parameter as an adapter's own, for every method of PEFT."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    prefixes = {getattr(tuner, "prefix", None) for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()}
    return (*ADAPTER_PARTS, *sorted(f".{prefix}" for prefix in prefixes if prefix))


def base_parameter_name(name: str) -> str | None:
    """The name a parameter has in the model without its adapter, or None for the adapter's own parameters."""
    if any(part in name for part in _adapter_parts()):
        return None
    for part in INSERTED:
        name = name.replace(part, "")
    return name.replace("attn.model.", "attn.")  # adaption prompts wrap whole attention modules


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """Hash of all names, shapes and weights, rounded to bfloat16: a float32 and a bfloat16 load agree.

    Adapter weights are left out: a LoRA model has the fingerprint of its base as long as the base is intact.
    """
    digest = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, parameter in sorted(base.named_parameters()):
        base_name = base_parameter_name(name)
        if base_name is None:
            continue
        values, total, weighted = parameter.detach().reshape(-1), 0, 0
        for start in range(0, values.numel(), 1 << 24):  # on the weights' device, in parts
            bits = values[start : start + (1 << 24)].to(torch.bfloat16).view(torch.int16).to(torch.int64)
            place = torch.arange(bits.numel(), device=bits.device) % 65521 + 1
            total += int(bits.sum())
            weighted += int((bits * place).sum()) + start % 65521
        digest.update(f"{base_name}:{tuple(parameter.shape)}:{total}:{weighted}\n".encode())
    return digest.hexdigest()[:16]


def differing_settings(base: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Differences between two models that would change their predictions: (what, the base's, the other's)."""
    for what, of_base, of_other in (
        ("dtype", base.dtype, other.dtype),
        ("attn_implementation", base.config._attn_implementation, other.config._attn_implementation),
        ("vocabulary", *(model.get_output_embeddings().weight.shape[0] for model in (base, other))),
    ):
        if of_base != of_other:
            yield what, of_base, of_other


def check_predicts_tokens(model: Any) -> None:
    """Refuse a model that does not predict each next token from the tokens before it."""
    is_whole = all(parameter.numel() for parameter in model.parameters())  # not sharded by ZeRO-3
    headless = model.config.is_encoder_decoder or model.get_output_embeddings() is None
    if headless or (is_whole and sees_ahead(model)):
        raise ValueError(
            f"model: {type(model).__name__} has no head that predicts each next token; replay and retention need a "
            "causal language model (AutoModelForCausalLM)"
        )


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_tuned(model: nn.Module) -> int:
    """Number of parameters that training changes, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def max_positions(model: Any) -> int | None:
    """Longest sequence that the model can take, in tokens; None if its configuration names none.

    The virtual tokens of a prompt take positions; RoBERTa skips those up to its padding token's.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    skipped = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    prompt = getattr(model, "active_peft_config", None)
    return int(limit - max(skipped, default=0) - (getattr(prompt, "num_virtual_tokens", None) or 0))


def with_least_room(*models: Any) -> Any:
    """The model with the fewest positions."""
    return min(models, key=lambda model: max_positions(model) or math.inf)


def length_that_fits(model: Any, length: int, name: str = "max_length") -> int:
    """`length`, in tokens; a default is lowered to the model's positions.

    Raises:
        ValueError: if a length that the user gave exceeds the model's positions.
    """
    limit = max_positions(model)
    if limit is None or length <= limit:
        return int(length)
    if isinstance(length, Unchosen):
        return limit
    raise ValueError(f"{name}: {length} is more than this model's {limit} positions; use at most {limit}")
