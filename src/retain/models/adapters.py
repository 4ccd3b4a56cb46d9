"""Merging an adapter into its base: the result is a whole model, to sample from or finetune again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from retain.files import PART, first_line, read_json, write_json
from retain.models.loading import ADAPTER_FILES, find_file, load_model, load_tokenizer, resolve_model_path, stored_dtype
from retain.models.reference import prediction_difference, probe, rounding_tolerance

ADAPTER_CONFIG, MERGED_FILE = "adapter_config.json", "merged.json"


def adapted_model(name: str, *, revision: str = "main") -> str | None:
    """The name of the base of an adapter; None if `name` is a whole model."""
    config = find_file(resolve_model_path(name), ADAPTER_CONFIG, revision)
    return read_json(config, "model", "save the adapter again").get("base_model_name_or_path") if config else None


def merge_adapter(tuned: Any) -> Any:
    """Merge the adapter of `tuned` into its base, in place, and return the whole model.

    Raises:
        ValueError: if the adapter cannot be merged, or the merged model predicts something else, as with an adapter on
            an output head that is tied to the embeddings.
    """
    expected = probe(tuned)
    try:
        merged = tuned.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(f"model: its adapter cannot be merged into its base: {first_line(error)}") from error
    if (difference := prediction_difference(probe(merged), expected)) > rounding_tolerance(merged):
        raise ValueError(
            f"model: merging the adapter into its base changes its predictions (log-probabilities differ by "
            f"{difference:.2g} of their spread), as on a head that is tied to the embeddings; finetune its base instead"
        )
    return merged


def merged_base(name: str, folder: Path, *, revision: str = "main", trust_remote_code: bool = False) -> None:
    """Merge an adapter into its base and save the result in `folder`, in the dtype of the base's checkpoint, once.

    Raises:
        ValueError: if the adapter cannot be merged, or `folder` holds another merged adapter.
    """
    path = resolve_model_path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    files = (find_file(path, file, revision) for file in (ADAPTER_CONFIG, *ADAPTER_FILES))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file)).hexdigest()
    if folder.exists():
        if read_json(folder / MERGED_FILE, "output_dir", "choose another folder").get("sha256") != digest:
            raise ValueError(f"output_dir: {str(folder)!r} was merged from another adapter; choose another folder")
        return
    tuned = load_model(name, dtype="float32", revision=revision, **options)
    dtype = stored_dtype(tuned.peft_config[tuned.active_adapter].base_model_name_or_path, **options)
    part = folder.with_name(f".{folder.name}{PART}")  # if this process is killed, `files.exclusive` removes it
    merge_adapter(tuned).to(dtype).save_pretrained(part)
    load_tokenizer(name, revision=revision, **options).save_pretrained(part)
    write_json(part / MERGED_FILE, {"adapter": name, "sha256": digest})
    part.rename(folder)
