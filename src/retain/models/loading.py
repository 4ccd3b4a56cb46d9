"""Strict loading of models, adapters and tokenizers: no weight is left random or ignored without a word.

A name is a Hub id, a folder, a GGUF file, a folder with one, `package:NAME` for an installed package that ships one,
or an adapter (folder or Hub id). GGUF weights are dequantised once and cached as safetensors (`RETAIN_CACHE`, default
`~/.cache/retain`). `field` is the setting that errors name.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from retain.files import check_model_path, first_line, hub_remedy
from retain.models.description import base_parameter_name, num_tuned, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What torch.compile, DDP, FSDP1 and activation checkpointing insert into the names of weights.
WRAPPER_NAMES = r"(^|\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
# Files of a tokenizer; any of them shows that a model has its own.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIG_FILES = ("config.json", "adapter_config.json")  # a model has the first, an adapter the second
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def resolve_model_path(name: str, field: str = "model") -> str:
    """What `from_pretrained` can load: `name` itself, or the cached folder of a dequantised GGUF file.

    Raises:
        ValueError: if `name` is a path or package that does not hold exactly one model.
    """
    if name.startswith("package:"):
        try:
            spec = importlib.util.find_spec(name.removeprefix("package:"))
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            package = name.removeprefix("package:")
            raise ValueError(f"{field}: package {package!r} is not installed; pip install it first")
        return _from_gguf_folder(Path(spec.submodule_search_locations[0]), name, field)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{field}: {name!r} is a file but not a .gguf; give a folder, a GGUF file or a Hub id")
        return str(dequantise_gguf(path, field))
    if name and path.is_dir():
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return str(path)
        return _from_gguf_folder(path, name, field)
    check_model_path(name, field)
    return name


def _from_gguf_folder(folder: Path, name: str, field: str) -> str:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        checkpoints = sorted(folder.glob("checkpoint-*/"), key=lambda path: path.stat().st_mtime)
        remedy = f"give {str(checkpoints[-1])!r}, or save the model there" if checkpoints else "give a model's folder"
        raise ValueError(f"{field}: {name!r} holds no config.json, adapter_config.json or .gguf file; {remedy}")
    if len(files) > 1:
        raise ValueError(f"{field}: {name!r} holds no config.json and {len(files)} .gguf files; name one model")
    return str(dequantise_gguf(files[0], field))


def find_file(path: str, file: str, revision: str = "main", field: str = "model") -> Path | None:
    """A file of a model in its folder, or on the Hub (offline: in the local cache); None if the model has no such file.

    Raises:
        ValueError: if the Hub does not answer or has no such model.
    """
    if Path(path).is_dir():
        return Path(path, file) if Path(path, file).is_file() else None
    try:
        return Path(hf_hub_download(path, file, revision=revision))
    except (OSError, ValueError, EntryNotFoundError) as error:  # covers the Hub client's own errors
        no_answer = isinstance(error, LocalEntryNotFoundError)  # a subclass of EntryNotFoundError
        cached = (try_to_load_from_cache(path, config, revision=revision) for config in CONFIG_FILES)
        if any(isinstance(file, str) for file in cached) if no_answer else isinstance(error, EntryNotFoundError):
            return None
        problem = f"{path!r} is not a local folder, and could not be read from the Hub"
        raise ValueError(f"{field}: {problem} ({first_line(error)}); {hub_remedy()}") from error


def gguf_cache() -> Path:
    """Folder that holds dequantised models."""
    return Path(os.environ.get("RETAIN_CACHE", Path.home() / ".cache" / "retain")) / "models"


def dequantise_gguf(path: Path, field: str = "model") -> Path:
    """Dequantise a GGUF file to float32 safetensors in the cache, once, and return the folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{field}: {path.name!r} needs the package gguf; pip install 'retain-llm[gguf]'")
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = gguf_cache() / f"{path.stem}-{key}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = _load_weights(str(path.parent), field, gguf_file=path.name, **settings)
    model.hf_quantizer = None  # else save_pretrained refuses, taking the weights for quantised ones
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = _load(AutoTokenizer, str(path.parent), "the tokenizer", field, gguf_file=path.name)
    with tempfile.TemporaryDirectory(prefix=".dequantising-", dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            Path(temporary).rename(folder)  # whole or not at all
        except OSError:
            if not folder.exists():  # another process was faster: its folder holds the same weights
                raise
    size = sum(file.stat().st_size for file in folder.iterdir())
    logger.warning("%s: %.1f GB of dequantised weights are cached in %s", path.name, size / 1e9, folder)
    return folder


def is_dequantised(path: str) -> bool:
    """Whether this is the cached folder of a dequantised GGUF file."""
    return Path(path).parent == gguf_cache()


def stored_dtype(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> torch.dtype | None:
    """The dtype of a checkpoint's weights according to its config.json; it may be loaded in another."""
    config = AutoConfig.from_pretrained(
        resolve_model_path(name), revision=revision, trust_remote_code=trust_remote_code
    )
    return getattr(config, "dtype", None)


def _load(loader: Any, path: str, what: str, field: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(None if "state_dict" in options else path, **options)
    except Exception as error:  # readers of damaged files raise many kinds: SafetensorError, struct.error, …
        if "trust_remote_code" in str(error):
            remedy = "read it, and give --trust_remote_code true if you trust it"
            raise ValueError(f"{field}: {path!r} brings its own code; {remedy}") from error
        name, why = str(Path(path, options.get("gguf_file") or "")), first_line(error)
        if (revision := options.get("revision") or "main") != "main":
            why = f"{why} (revision {revision!r})"
        raise ValueError(f"{field}: cannot load {what} of {name!r}; check the name, or the files: {why}") from error


def _load_weights(path: str, field: str, **options: Any) -> Any:
    """A causal language model with all of its weights from the checkpoint; prefixes of wrappers in names are accepted.

    Raises:
        ValueError: if a weight is missing or has another shape, or if one that matters would be ignored.
    """
    from transformers import AutoModelForCausalLM

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # else an error without names
    model, info = _load(AutoModelForCausalLM, path, "the weights", field, **options)
    name = str(Path(path, options.get("gguf_file") or ""))
    if info["missing_keys"] and any(re.search(WRAPPER_NAMES, key) for key in info["unexpected_keys"]):
        # Not with key_mapping: the model would keep it and save its weights under the text of the pattern.
        weights = _unwrapped(_read_safetensors(path, options.get("revision") or "main", field), name)
        options |= {"config": model.config, "state_dict": weights, "generation_config": model.generation_config}
        model, info = _load(type(model), path, "the weights", field, **options)
    unexpected = set(info["unexpected_keys"])
    if missing := set(info["missing_keys"]):
        holds = f" (it holds {_first_names(unexpected)})" if unexpected else ""
        raise ValueError(
            f"{field}: {name!r} lacks {len(missing)} of its weights, which would be random: {_first_names(missing)}"
            f"{holds}; save the whole model again, output head and all shards"
        )
    if info["mismatched_keys"]:
        key, in_file, in_config = min(info["mismatched_keys"])
        raise ValueError(
            f"{field}: {name!r} is not the model that its config.json describes: {key} is {list(in_file)} in the file "
            f"and {list(in_config)} by config.json; take both from one checkpoint"
        )
    is_quantised = hasattr(model.config, "quantization_config")
    if ignored := set() if is_quantised else {key for key in unexpected if _in_weighted_module(model, key)}:
        raise ValueError(
            f"{field}: {name!r} holds weights that its config.json does not describe, and that would be ignored: "
            f"{_first_names(ignored)}; take both from one checkpoint"
        )
    if unexpected:
        logger.warning("%s: %r holds weights that the model does not use: %s", field, name, _first_names(unexpected))
    return model


def _in_weighted_module(model: Any, key: str) -> bool:
    """Whether a weight belongs to a module that has weights, like a bias that the configuration leaves out."""
    modules, name = dict(model.named_modules()), key
    while name not in modules:
        name = name.rpartition(".")[0]
    return next(modules[name].parameters(recurse=False), None) is not None


def _first_names(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def _read_safetensors(path: str, revision: str, field: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint in safetensors, by name; empty for another format."""
    index = find_file(path, "model.safetensors.index.json", revision, field)
    files = set(json.loads(index.read_text())["weight_map"].values()) if index else {"model.safetensors"}
    paths = filter(None, (find_file(path, file, revision, field) for file in sorted(files)))
    return {name: value for shard in paths for name, value in load_file(shard).items()}


def _unwrapped(weights: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The weights without wrappers' prefixes in their names; logs a warning if there were any."""
    unwrapped = {re.sub(WRAPPER_NAMES, r"\1", name): value for name, value in weights.items()}
    if unwrapped.keys() != weights.keys():
        logger.warning("%s: removed a wrapper's prefix (_orig_mod., module., …) from the names of weights", source)
    return unwrapped


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    field: str = "model",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model, or a base with its adapter, in eval mode.

    The dtype `auto` is the checkpoint's own on an accelerator and float32 on a CPU, where bfloat16 is no faster.

    >>> load_model("models/fox/")
    Traceback (most recent call last):
    ValueError: model: no folder or file 'models/fox/'; give a folder, a GGUF file or a Hub id
    """
    path = resolve_model_path(name, field)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    if find_file(path, "adapter_config.json", revision, field):
        return _load_adapter(path, revision, field, dtype=dtype, device=device, **options).eval()
    if dtype == "auto" and not torch.accelerator.is_available():
        dtype = torch.float32
    options |= {"dtype": dtype, "revision": revision}
    model = _load_weights(path, field, **options, **kwargs)
    model.config.name_or_path = path  # libraries look for the tokenizer there
    model.name_or_path = path
    if is_dequantised(path):  # adapters must not name a folder of this machine's cache as their base
        model.name_or_path = name if name.startswith("package:") else str(Path(name).expanduser().absolute())
        # PEFT looks for a config.json there when it saves an adapter
        warnings.filterwarnings("ignore", f"Could not find a config file in {re.escape(model.name_or_path)} ")
    return model.to(device).eval() if device is not None else model.eval()


def loaded_as(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `load_model` that load another model like this one."""
    return {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation, "device": model.device}


def _load_adapter(path: str, revision: str, field: str, **options: Any) -> Any:
    """The base of the adapter in `path`, with the adapter and all of its weights."""
    from peft import PeftConfig, PeftModelForCausalLM, set_peft_model_state_dict

    config = _load(PeftConfig, path, "the adapter", field, revision=revision)
    base = config.base_model_name_or_path
    remedy = "name the base it was trained on as base_model_name_or_path in its adapter_config.json"
    if not base:
        raise ValueError(f"{field}: the adapter in {path!r} does not name its base; merge it into its base first")
    if Path(base).is_dir() and Path(base, "adapter_config.json").exists():
        raise ValueError(f"{field}: {base!r}, the base of the adapter {path!r}, is itself an adapter; {remedy}, merged")
    file, weights = _adapter_weights(path, revision, field)
    base_field = f"{field}: the base of the adapter {path!r} (base_model_name_or_path in its adapter_config.json)"
    model = load_model(base, revision=config.revision or "main", field=base_field, **options)
    if not any(re.search(WRAPPER_NAMES, parameter) for parameter, _ in model.named_parameters()):
        weights = _unwrapped(weights, file)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    config.inference_mode = True
    model = PeftModelForCausalLM(model, config)
    try:
        keys = set_peft_model_state_dict(model, weights)
    except KeyError as error:
        raise ValueError(f"{field}: {file!r} lacks {error.args[0]}; save the whole adapter again") from error
    except RuntimeError as error:  # shapes differ
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        why = re.sub(r"torch\.Size\((.*?)\)", r"\1", lines[0].rstrip(".")) if lines else first_line(error)
        if f"[{vocabulary}" in why:
            remedy = f"if tokens were added, add them to the base too (resize_token_embeddings), save it, and {remedy}"
        raise ValueError(f"{field}: {file!r} does not fit its base {base!r}: {why}; {remedy}") from error
    if not config.is_prompt_learning:  # the single tensor of a prompt loads or raises
        if missing := _missing_adapter_weights(model, set(keys.missing_keys)):
            raise ValueError(
                f"{field}: {file!r} lacks {len(missing)} of its weights, and the adapter is wrong without them: "
                f"{_first_names(missing)}; save the whole adapter again"
            )
        if unexpected := keys.unexpected_keys:
            raise ValueError(
                f"{field}: weights in {file!r} would be ignored by its base {base!r}: {_first_names(unexpected)}; "
                f"{remedy}"
            )
    return model


def _adapter_weights(path: str, revision: str, field: str) -> tuple[str, dict[str, torch.Tensor]]:
    from peft import load_peft_weights

    file = next(filter(None, (find_file(path, name, revision, field) for name in ADAPTER_FILES)), None)
    if file is None:
        raise ValueError(f"{field}: the adapter {path!r} holds no {ADAPTER_FILES[0]}; copy it there, or save it again")
    try:
        return str(file), load_peft_weights(str(file.parent), device="cpu")
    except Exception as error:  # readers of damaged files raise many kinds
        remedy = "copy it again, or save the adapter again"
        raise ValueError(f"{field}: {str(file)!r} is damaged; {remedy}: {first_line(error)}") from error


def _missing_adapter_weights(model: Any, missing: set[str]) -> set[str]:
    """The adapter's weights among `missing`, except AdaLoRA's counters and those that share a loaded tensor."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if base_parameter_name(name) is None}
    loaded = {id(value) for name, value in own.items() if name not in missing}
    return {name for name in own.keys() & missing if id(own[name]) not in loaded and ".ranknum." not in name}


def load_tokenizer(
    name: str, *, revision: str = "main", trust_remote_code: bool = False, field: str = "model"
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; raises a one-line `ValueError` if that fails."""
    path = resolve_model_path(name, field)
    is_folder = Path(path).is_dir()
    if not is_folder:  # fail once: without an answer, transformers would ask the Hub for every file of a tokenizer
        find_file(path, CONFIG_FILES[0], revision, field)
    if is_folder and not any(find_file(path, file) for file in TOKENIZER_FILES):
        raise ValueError(f"{field}: {path!r} holds no tokenizer; copy the tokenizer files of its base there")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return _load(AutoTokenizer, path, "the tokenizer", field, **options)


def tokenizer_of_tuned(
    name: str, base_tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tuned model's own tokenizer, whose chat template may differ, or the base's if it has none.

    Raises:
        ValueError: if the two cut text into different tokens, which would make divergences meaningless.
    """
    path = resolve_model_path(name)
    if not any(find_file(path, file) for file in TOKENIZER_FILES):
        return base_tokenizer
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(base_tokenizer):
        return tokenizer
    own, base = tokenizer.get_vocab(), base_tokenizer.get_vocab()
    if is_dequantised(path) and all(own.get(token, at) == at for token, at in base.items()):
        # A GGUF file pads its vocabulary and lacks the pre-tokenizer's rules.
        template, tokenizer = tokenizer.chat_template, copy.deepcopy(base_tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer
    if base.items() < own.items():
        added = _first_names({repr(token) for token in own.keys() - base.keys()})
        raise ValueError(
            f"model: the tokenizer in {name!r} has tokens that the base's lacks: {added}; give --base a copy of the "
            "base with the same tokens (add_tokens, resize_token_embeddings, save_pretrained)"
        )
    other = min((token for token, at in base.items() if own.get(token) != at), default=None)
    example = "" if other is None else f" ({other!r} is {own.get(other)}, in the base {base[other]})"
    raise ValueError(
        f"model: the tokenizer in {name!r} cuts or numbers text differently from the base's{example}: it was trained "
        "on another base; measure it against that one"
    )


def empty_model(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the `meta` device, from its configuration: shapes without weights."""
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: cannot read the configuration of {name!r} ({first_line(error)}); {hub_remedy()}"
        ) from error


def lora_num_params(
    model: str,
    rank: int,
    target_modules: list[str] | None = None,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> int:
    """Number of parameters that a LoRA of this rank trains in `model`; reads only its configuration."""
    from peft import LoraConfig, get_peft_model

    empty = empty_model(model, revision=revision, trust_remote_code=trust_remote_code)
    modules = "all-linear" if target_modules == ["all-linear"] else target_modules
    try:
        tuned = get_peft_model(empty, LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise ValueError(
            f"lora_target_modules: {target_modules!r} does not fit {model!r}; {first_line(error)}"
        ) from error
    return num_tuned(tuned)
