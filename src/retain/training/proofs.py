"""Proofs on a built trainer: stored rows and predictions are the base's, and training moves the model from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retain.models.reference import Reference, evaluation_mode
from retain.replay.dataset import ReplayDataset
from retain.replay.provenance import check_pool
from retain.replay.stored_predictions import ReferenceCache
from retain.training.replay_term import ReplayTerm, TermBatch, kl_values

logger = logging.getLogger(__name__)

# Most nats per token by which stored predictions may differ from the model's own before training.
MAX_STORED_ERROR, MAX_STORED_ERROR_HALF = 1e-4, 2e-2
PROVEN_ROWS = 8  # rows with stored predictions to check, spread over the shards, which may come from different runs
MAX_NOISE = 5e-3  # nats per token at the untrained model; half precision causes less


def prove_own_rows(
    rows: ReplayDataset, model: Any, accelerator: Any, reference: Reference | None, *, allow_off_policy: bool
) -> None:
    """Refuse rows whose stored log-probabilities are not the base's in the precision of training.

    Args:
        reference: the base; if it is no copy, the base is the model without its adapter.
        allow_off_policy: warn instead.
    """
    adapter_off = hasattr(model, "disable_adapter") and (reference is None or reference.kind != "copy")
    base = Reference().base(model) if adapter_off else evaluation_mode(model)
    try:
        with base, accelerator.autocast():
            check_pool(model, rows, half=_is_half(rows, model, accelerator))
    except ValueError as error:
        if not allow_off_policy:
            raise
        logger.warning("off-policy replay: %s", error)


def prove_stored(term: ReplayTerm, rows: ReplayDataset, model: Any, accelerator: Any) -> dict[int, Tensor]:
    """Refuse stored predictions that are not the base's; return `stored_kl` before training.

    The base is the model before training, or without its adapter where that does not start at it, like a prompt.
    This runs on the model's current device: a host that shards the model moves it to the training device only later.
    """
    limit = MAX_STORED_ERROR_HALF if _is_half(rows, model, accelerator) else MAX_STORED_ERROR
    kl = stored_kl(term, rows, model)
    if hasattr(model, "disable_adapter") and not all(float(values.mean()) <= limit for values in kl.values()):
        with Reference().base(model):
            kl = stored_kl(term, rows, model)
    for row, values in kl.items():
        if not (error := float(values.mean())) <= limit:
            raise ValueError(
                f"replay_reference: the predictions stored in {rows.source!r} are not this model's (KL {error:.2g} "
                f"nats per token of row {row} before training); sample again, or set replay_reference to adapter or "
                "copy"
            )
    return kl


def stored_kl(term: ReplayTerm, rows: ReplayDataset, model: Any) -> dict[int, Tensor]:
    """KL(stored ‖ model) of each prediction of a few rows, by row number; nats, without dropout."""
    assert rows.cache is not None
    predicted = np.flatnonzero(rows.num_predictions)
    _, first_of_shard = np.unique(predicted // rows.cache.rows_per_shard, return_index=True)
    shards = np.unique(np.linspace(0, len(first_of_shard) - 1, PROVEN_ROWS).astype(int))
    chosen = predicted[first_of_shard[shards]] if len(first_of_shard) > 1 else predicted[:2]
    return {row: _kl(term, rows, [row], model, rows.cache).cpu() for row in chosen.tolist()}


def has_moved(term: ReplayTerm, rows: ReplayDataset, model: Any, kl_before: Mapping[int, Tensor] | None) -> bool:
    """Whether the model predicts any replay row differently from its base, in any bit; without dropout.

    The KL of training does not show this if rounding of stored predictions, or dropout, keeps it from being 0.

    Args:
        kl_before: what `prove_stored` returned; None if no predictions are stored.
    """
    reference = term.reference
    if kl_before is not None:
        if not hasattr(model, "disable_adapter"):
            kl_now = stored_kl(term, rows, model)
            return any(not torch.equal(kl_now[row], before) for row, before in kl_before.items())
        reference = Reference()
    term = ReplayTerm(term.form, reference, None, term.autocast)
    batches = (range(len(rows))[at : at + PROVEN_ROWS] for at in range(0, len(rows), PROVEN_ROWS))
    return any(bool(_kl(term, rows, batch, model).any()) for batch in batches)


def prove_adapter_off(model: Any, base_probe: Tensor) -> None:
    """Prove that the model without its adapter is the base: with any reference, the anchor pulls an adapter to 0."""
    try:
        Reference().prove(model, base_probe)
    except ValueError as error:
        raise ValueError(
            "anchor_coef: without its adapter the model is not the one that was passed in, and the anchor would pull "
            "it there; merge an adapter that was trained before into its base, replace an init_lora_weights that "
            "rewrites the base (PiSSA, OLoRA), or set anchor_coef 0"
        ) from error


def check_noise(kl: float, max_ref_kl: float | None) -> None:
    """Warn of a KL before the first step, in nats per token: the model is still its base, so it is noise.

    Raises:
        ValueError: if `max_ref_kl` is at most twice that noise: no coefficient could keep it.
    """
    if kl < MAX_NOISE:
        return
    what = (
        f"before the first step the KL is {kl:.2g} nats per token: noise of dropout, NEFTune or half precision, or an "
        "adapter that does not start at its base (a prompt)"
    )
    if max_ref_kl is not None and kl > max_ref_kl / 2:
        raise ValueError(f"max_ref_kl: {max_ref_kl:g}, but {what}; remove the cause, or allow more than twice that KL")
    logger.warning("replay/kl: %s; remove the cause, or the penalty acts on noise, too", what)


def zero_kl_error(steps: int) -> ValueError:
    """The error for a run whose KL ends at 0 up to noise, although its reference was proven not to move."""
    return ValueError(
        f"replay/kl: 0 up to rounding and dropout after {steps} steps, so nothing protects the model: either its "
        "weights do not move at this learning_rate and dtype, or only tokens that no replay row holds are trained "
        "(TrainableTokensConfig); change these, or give rows that hold the tokens"
    )


def _kl(
    term: ReplayTerm, rows: ReplayDataset, indices: Sequence[int], model: Any, cache: ReferenceCache | None = None
) -> Tensor:
    """KL(base ‖ model) of each prediction of these rows, nats; without dropout."""
    inputs = {name: value.to(model.device) for name, value in rows.batch(indices).items()}
    stored = {name: value.to(model.device) for name, value in cache.batch(indices).items()} if cache else None
    with evaluation_mode(model), term.autocast():
        return kl_values(term, TermBatch(model, inputs, inputs.pop("labels"), stored))


def _is_half(rows: ReplayDataset, model: Any, accelerator: Any) -> bool:
    """Whether the replay rows were drawn, or the model is trained, in half precision."""
    dtypes = {(rows.manifest or {}).get("sampler", {}).get("dtype"), str(model.dtype).removeprefix("torch.")}
    return bool({"bfloat16", "float16"} & dtypes) or accelerator.mixed_precision != "no"
