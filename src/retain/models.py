"""Loading a model and its tokenizer, finding the token that starts a document, and fingerprints.

A name may be a Hub id, a folder, a GGUF file, a folder that holds one, `package:NAME` for an installed package
that ships one, or an adapter folder. GGUF weights are dequantised once and kept as safetensors in a cache
(`RETAIN_CACHE`, default `~/.cache/retain`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from retain.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens that separate documents in the pretraining of models whose bos_token is missing or a chat marker.
DOCUMENT_SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "</s>",
    "<eos>",
)
# What PEFT's own parameters are called beside the prefixes of its methods, and what it puts into the base's names.
OF_ADAPTERS = (".modules_to_save.", "prompt_encoder.", ".ranknum.", ".adaption_")
WRAPPED = ("base_model.model.", ".token_adapter", ".base_layer", ".original_module")
PROBE_TEXT = "The naïve fox — 3.14% of 日本 — jumps\n\tover it's lazy(dog); // ok?"


def cache_dir() -> Path:
    """Folder where dequantised models are kept."""
    return Path(os.environ.get("RETAIN_CACHE", Path.home() / ".cache" / "retain"))


def resolve_model_path(name: str) -> str:
    """Return what `from_pretrained` can load: `name` itself, or the cached folder of a dequantised GGUF file.

    Raises:
        ValueError: if `name` is a path or package that does not hold exactly one model.
    """
    if name.startswith("package:"):
        try:
            spec = importlib.util.find_spec(name.removeprefix("package:"))
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"model: package {name.removeprefix('package:')!r} is not installed; pip install it first")
        return _from_gguf_folder(Path(spec.submodule_search_locations[0]), name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model: {name!r} is a file but not a .gguf; give a folder, a GGUF file or a Hub id")
        return str(dequantise_gguf(path))
    if name and path.is_dir():
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return str(path)
        return _from_gguf_folder(path, name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/") or not name:
        raise ValueError(f"model: no folder or file {name!r}; give a folder, a GGUF file or a Hub id")
    return name


def _from_gguf_folder(folder: Path, name: str) -> str:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"model: {name!r} holds no config.json and {len(files)} .gguf files; name one model")
    return str(dequantise_gguf(files[0]))


def dequantise_gguf(path: Path) -> Path:
    """Dequantise a GGUF file to float32 safetensors in the cache, once, and return the folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model: {path.name} needs the package gguf; pip install 'retain[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_dir() / "models" / f"{path.stem}-{key}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = _load(
        AutoModelForCausalLM,
        str(path.parent),
        f"the weights in {path.name!r}",
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.hf_quantizer = None  # else save_pretrained takes the dequantised weights for quantised ones and refuses
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = _load(AutoTokenizer, str(path.parent), f"the tokenizer in {path.name!r}", gguf_file=path.name)
    temporary = Path(tempfile.mkdtemp(prefix=".dequantising-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)  # whole or not at all
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (
            isinstance(error, OSError) and folder.exists()
        ):  # else another process was faster: its folder holds the same weights
            raise
    return folder


def default_device() -> str:
    """The accelerator's type where there is one that has float64 (Apple's has not), else `cpu`."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None and accelerator.type != "mps" else "cpu"


def default_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """`auto` means the checkpoint's own dtype on an accelerator, and float32 on a CPU, where bf16 is no faster."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto" if torch.accelerator.is_available() else torch.float32
    return getattr(torch, dtype)


def _load(loader: Any, name: str, what: str, **kwargs: Any) -> Any:
    try:
        return loader.from_pretrained(name, **kwargs)
    except Exception as error:  # damaged files raise whatever their reader raises: SafetensorError, struct.error, …
        if "trust_remote_code" in str(error):
            asked = "brings code of its own; read it, and give --trust_remote_code true if you trust it"
            raise ValueError(f"model: {name!r} {asked}") from error
        why = first_line(error)
        raise ValueError(f"model: cannot load {what} of {name!r}; check the name, or the files: {why}") from error


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model, or a base with its adapter, in eval mode.

    Raises:
        ValueError: one line saying which model could not be loaded and why.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(name)
    if (Path(path) / "adapter_config.json").exists():
        return _load_adapter(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device=device,
        )
    model = _load(
        AutoModelForCausalLM,
        path,
        "the weights",
        dtype=default_dtype(dtype),
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    return model.to(device).eval() if device is not None else model.eval()


def _load_adapter(path: str, **kwargs: Any) -> Any:
    from peft import PeftConfig, PeftModel

    config = _load(PeftConfig, path, "the adapter")
    if not config.base_model_name_or_path:
        raise ValueError(f"model: the adapter in {path!r} does not name its base; merge it into its base first")
    base = load_model(config.base_model_name_or_path, **kwargs)
    return PeftModel.from_pretrained(base, path).eval()


def load_tokenizer(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, or a `ValueError` of one line."""
    from transformers import AutoTokenizer

    path = resolve_model_path(name)
    return _load(AutoTokenizer, path, "the tokenizer", revision=revision, trust_remote_code=trust_remote_code)


def tokenizer_of_tuned(name: str, base_tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> None:
    """Check that a tuned model, where its folder holds a tokenizer, reads text as its base does.

    Raises:
        ValueError: if the two cut text into different tokens, so that divergences mean nothing.
    """
    folder = Path(name).expanduser()
    if not (folder / "tokenizer_config.json").is_file():
        return
    found = tokenizer_fingerprint(load_tokenizer(name, trust_remote_code=trust_remote_code))
    if found != tokenizer_fingerprint(base_tokenizer):
        raise ValueError(f"model: the tokenizer in {name!r} is not the base's; measure against its own base")


@dataclass(frozen=True)
class StartToken:
    """The token that starts a document in pretraining, and why it was chosen."""

    id: int
    token: str
    reason: str

    def __str__(self) -> str:
        return f"{self.token!r} (id {self.id}): {self.reason}"


def choose_start_token(tokenizer: PreTrainedTokenizerBase, override: str | int | None = None) -> StartToken:
    """Choose the document start: BOS, unless it is missing or a chat role marker; then the document separator.

    SmolLM2-Instruct's BOS opens every chat turn and Qwen has none; both separate documents by `<|endoftext|>`.

    Raises:
        ValueError: if `override` is not in the vocabulary, or no token can be found.
    """
    if override is not None:
        return _start_token_by_name(tokenizer, override)
    bos = tokenizer.bos_token
    if bos is not None and not _is_chat_marker(tokenizer, bos):
        return StartToken(int(tokenizer.bos_token_id), str(bos), "the tokenizer's bos_token")
    why = "there is no bos_token" if bos is None else f"bos_token {bos!r} is a chat role marker"
    vocabulary = tokenizer.get_vocab()
    for token in (*DOCUMENT_SEPARATORS, tokenizer.eos_token):
        if token is not None and token in vocabulary and not _is_chat_marker(tokenizer, token):
            return StartToken(int(vocabulary[token]), str(token), f"the document separator, since {why}")
    raise ValueError(f"start_token: {why} and no document separator is known; give --start_token TOKEN")


def _start_token_by_name(tokenizer: PreTrainedTokenizerBase, override: str | int) -> StartToken:
    vocabulary = tokenizer.get_vocab()
    if str(override).isdecimal():  # an id, although digits are tokens too: none of those starts a document
        if int(override) < len(tokenizer):
            token = str(tokenizer.convert_ids_to_tokens(int(override)))
            return StartToken(int(override), token, "given as start_token")
    elif override in vocabulary:
        return StartToken(int(vocabulary[override]), str(override), "given as start_token")
    raise ValueError(f"start_token: {override!r} is not in the vocabulary; give one of its tokens or ids")


def _is_chat_marker(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether the chat template writes `token` around turns: more than once in a conversation of three."""
    if not tokenizer.chat_template:
        return False
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).count(str(token)) > 1
    except Exception:  # a template is the checkpoint's own program and may reject these turns in any way
        return f"'{token}'" in str(tokenizer.chat_template) or str(token).startswith("<|im_")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and of how a probe text is cut; blind to padding, templates and special-token roles."""
    vocabulary = sorted((str(token), int(index)) for token, index in tokenizer.get_vocab().items())
    probe = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()[:16]


@cache
def _of_adapters() -> tuple[str, ...]:
    """What a parameter's name holds where it is an adapter's own, of every method that PEFT knows."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    prefixes = {getattr(tuner, "prefix", None) for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()}
    return (*OF_ADAPTERS, *sorted(f".{prefix}" for prefix in prefixes if prefix))


def base_parameter_name(name: str) -> str | None:
    """The name a parameter has in the model without its adapter, or None for the adapter's own parameters."""
    if any(part in name for part in _of_adapters()):
        return None
    for part in WRAPPED:
        name = name.replace(part, "")
    return name.replace("attn.model.", "attn.")  # adaption prompts wrap whole attention modules


def sums_of_bits(tensor: torch.Tensor, as_integers: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int]:
    """Sums over a tensor's values as integers: plain, and weighted by place. Made where the tensor lies, in parts."""
    total = weighted = 0
    values = tensor.detach().reshape(-1)
    for start in range(0, values.numel(), 1 << 24):
        bits = as_integers(values[start : start + (1 << 24)]).to(torch.int64)
        position = torch.arange(bits.numel(), device=bits.device) % 65521 + 1
        total += int(bits.sum())
        weighted += int((bits * position).sum()) + start % 65521
    return total, weighted


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """Hash over names, shapes and every weight rounded to bfloat16, so the same for a float32 and a bfloat16 load.

    Adapter weights are left out: a LoRA model has its base's fingerprint for as long as the base is intact.
    """
    digest = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, parameter in sorted(base.named_parameters()):
        base_name = base_parameter_name(name)
        if base_name is None:
            continue
        total, weighted = sums_of_bits(parameter, lambda values: values.to(torch.bfloat16).view(torch.int16))
        digest.update(f"{base_name}:{tuple(parameter.shape)}:{total}:{weighted}\n".encode())
    return digest.hexdigest()[:16]


def display_name(name: str) -> str:
    """A model's name for people: a dequantised model's file rather than its folder in the cache."""
    path = Path(name)
    return path.name.rpartition("-")[0] if path.parent == cache_dir() / "models" else name


def unlike(base: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """In what two models differ that would make a difference of their predictions: (what, the base's, the other's)."""
    for what, of_base, of_other in (
        ("dtype", base.dtype, other.dtype),
        ("attn_implementation", base.config._attn_implementation, other.config._attn_implementation),
        ("vocabulary", *(model.get_output_embeddings().weight.shape[0] for model in (base, other))),
    ):
        if of_base != of_other:
            yield what, of_base, of_other


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_tuned(model: nn.Module) -> int:
    """Number of parameters that training changes, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def lora_num_params(
    model: str,
    rank: int,
    target_modules: list[str] | None = None,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> int:
    """How many parameters a LoRA of this rank tunes in `model`, from its configuration alone: no weights are read."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    path = resolve_model_path(model)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: cannot read the configuration of {model!r}; check the name: {first_line(error)}"
        ) from error
    modules: Any = target_modules
    if target_modules == ["all-linear"]:
        modules = "all-linear"
    try:
        tuned = get_peft_model(empty, LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise ValueError(
            f"lora_target_modules: {target_modules!r} does not fit {model!r}; {first_line(error)}"
        ) from error
    return num_tuned(tuned)


def max_positions(model: Any) -> int | None:
    """Longest sequence the model can take, in tokens, or None where its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
