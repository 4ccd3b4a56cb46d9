"""What must hold before a run is called protected; each check refuses in one line with the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from retain.config import ReplayConfig
from retain.data import Document
from retain.models import max_positions
from retain.reference import Reference
from retain.replay import ReplayDataset

LOADS_EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
OVERLAP = 32  # tokens by which rows are looked up; at least half as many must agree to count as the same row


def check_rows_fit(rows: ReplayDataset, model: Any) -> None:
    """Rows must have something to predict, fit the model's positions, and use its tokens.

    Raises:
        ValueError: naming what does not fit.
    """
    if not rows.num_predictions.sum():
        raise ValueError(f"replay_dataset: {rows.source!r} has no row of two tokens or more; give longer rows")
    longest, limit = int(np.diff(rows.offsets).max()), max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(f"replay_dataset: rows of {longest} tokens, but this model has {limit} positions; cut them")
    largest, vocabulary = int(rows.tokens.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise ValueError(
            f"replay_dataset: token id {largest}, but this model has {vocabulary} tokens; sample from this model"
        )


def check_held_out(rows: ReplayDataset, retention: Mapping[str, Sequence[Document]]) -> None:
    """What is replayed must not be measured on.

    Two rows are the same if they agree to the end of the shorter one: a licence header that many files begin with
    is not a row.

    Raises:
        ValueError: naming the text and how many rows it shares.
    """
    by_beginning: dict[tuple[int, ...], list[list[int]]] = {}
    for index in range(len(rows)):
        row = rows[index].tolist()
        by_beginning.setdefault(tuple(row[:OVERLAP]), []).append(row)
    for name, documents in retention.items():
        windows = [window for document in documents for window in document.windows if len(window) >= OVERLAP // 2]
        shared = sum(
            any(row[: len(window)] == window[: len(row)] for row in by_beginning.get(tuple(window[:OVERLAP]), []))
            for window in windows
        )
        if shared:
            raise ValueError(
                f"retention: {name!r} shares {shared} rows with the replay dataset; measure on rows never replayed"
            )


def see_the_base_everywhere(*, may_change: bool) -> None:
    """FSDP may leave the weights of all processes but one empty until they are sharded; the base must be seen first.

    Args:
        may_change: whether the model is still to be loaded, so that the setting can be switched off.

    Raises:
        ValueError: if the model was loaded so already.
    """
    empty = [os.environ.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", LOADS_EMPTY)]
    if not all(empty) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if not may_change:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true leaves the weights of this process empty, and the base must be seen "
            "on every process; set it false, or give the model by name"
        )
    os.environ[LOADS_EMPTY] = "false"


@contextmanager
def loaded_whole(args: Any) -> Iterator[None]:
    """Load weights that DeepSpeed's ZeRO-3 would take apart at once: the base must be seen on every process first.

    They are shared out when training begins.
    """
    from transformers.integrations import (
        is_deepspeed_zero3_enabled,
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    if not is_deepspeed_zero3_enabled():
        yield
        return
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:  # what accelerate's settings made, or the file of --deepspeed
        set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)


def check_whole(model: Any) -> None:
    """Refuse a model whose weights DeepSpeed's ZeRO-3 has already shared out.

    Raises:
        ValueError: with what to do instead.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model: its weights were shared out by ZeRO-3 when it was loaded; the base must be seen on every process: "
            "give the model by name, or load it before the training arguments are made"
        )


def takes_cache(config: ReplayConfig, rows: ReplayDataset | None, *, own_rows: bool) -> bool:
    """Whether the base's predictions come from what was stored beside the replay rows.

    Args:
        own_rows: whether the rows are the model's own; another model's predictions are not the base's.

    Raises:
        ValueError: if that was asked for and cannot be had.
    """
    if not config.uses_reference or config.replay_reference not in ("auto", "cache"):
        return False
    if config.replay_objective == "kl" and rows is not None and rows.cache is not None and own_rows:
        return True
    if config.replay_reference == "auto":
        return False
    why = "'kl_new' needs predictions on new rows" if config.replay_objective == "kl_new" else "nothing fit is stored"
    raise ValueError(
        f"replay_reference: 'cache', but {why}; use auto, or rows that this model drew with "
        "`retain sample --store_reference hidden`"
    )


def check_base_is_frozen(model: Any) -> None:
    """An adapter switched off shows the base only while nothing but the adapter is trained.

    Raises:
        ValueError: naming a weight of the base that would be trained.
    """
    prefix = getattr(model.base_model, "prefix", None) or "prompt_encoder"
    own = (prefix, "modules_to_save", "prompt_encoder", "token_adapter", "trainable_tokens")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in own):
            raise ValueError(
                f"replay_reference: 'adapter', but the base's own {name!r} is trained too, so switching the adapter "
                "off does not give the base; use replay_reference copy, or freeze it"
            )


def make_reference(config: ReplayConfig, model: Any, *, has_adapter: bool) -> Reference:
    """The adapter switched off where there is or will be one, else a frozen copy of the model as it is now.

    Raises:
        ValueError: if what was asked for cannot be had.
    """
    if config.replay_reference == "adapter" and not has_adapter:
        raise ValueError("replay_reference: 'adapter', but there is no adapter; use copy, or --use_peft")
    if config.replay_reference != "copy" and has_adapter:
        return Reference()
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError("replay_reference: a copy under DeepSpeed ZeRO-3 is not supported; use an adapter or FSDP2")
    return Reference.copy_of(model)
