"""Loading a model, an adapter or a tokenizer.

A name may be a Hub id, a folder, a GGUF file, a folder that holds one, `package:NAME` for an installed package
that ships one, or an adapter folder. GGUF weights are dequantised once and kept as safetensors in a cache
(`RETAIN_CACHE`, default `~/.cache/retain`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retain.models import cache_dir, num_tuned, tokenizer_fingerprint
from retain.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
