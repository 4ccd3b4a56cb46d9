"""Check that a model drew its rows: compare their log-probabilities with forward passes without a cache.

Sampling is checked at the length at which it is used, and a pool with the model that is about to be trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retain.replay.dataset import ReplayDataset

COMPARED_POSITIONS = 64  # positions whose float32 log-probabilities are in memory at once and compared together


def rope_switch(model: Any) -> int | None:
    """Length beyond which LongRoPE encodes all positions of a sequence differently; None for other models."""
    kinds = [kind for kind in rope_kinds(model) if kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in kinds), default=None)


def rope_kinds(model: Any) -> list[dict[str, Any]]:
    """A model's RoPE settings: one for all layers, or one for each type of layer."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]


@torch.no_grad()
def row_log_probs(model: Any, row: Int[Tensor, " length"]) -> Float[Tensor, " predicted"]:
    """Log-probability of each token of a row after its first, nats, predicted by the model without a cache."""
    logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
    parts = []
    for part, tokens in zip(logits.split(COMPARED_POSITIONS), row[1:].split(COMPARED_POSITIONS), strict=True):
        parts.append(torch.log_softmax(part.float(), dim=-1).gather(-1, tokens[:, None]).squeeze(-1))
    return torch.cat(parts)


# Share of draws that a cache may change, on average over `COMPARED_POSITIONS`. Rounding changes 2e-6 in float32 (25
# tiny architectures) and 2 % in bfloat16 (SmolLM2-135M); a cache kept across LongRoPE's switch changes 5 to 13 %.
MAX_CACHE_DRIFT = {torch.float32: 1e-2}
MAX_CACHE_DRIFT_HALF = 0.1


def check_draws(
    model: Any, rows: Int[Tensor, "rows length"], given: Sequence[int], log_probs: Float[Tensor, "rows predicted"]
) -> None:
    """Refuse rows that a pass without a cache would have drawn differently.

    The share of changed draws is ½ E|1 − q/p| over draws from p: the total variation distance of the distributions.

    Args:
        given: number of given tokens of each row.
        log_probs: of the last tokens of each row, as they were drawn; values at given tokens are ignored.
    """
    num_predicted = log_probs.shape[1]
    uncached = torch.stack([row_log_probs(model, row) for row in rows])[:, -num_predicted:]
    drawn = torch.arange(rows.shape[1])[-num_predicted:] >= torch.tensor(given).unsqueeze(-1)
    changed = (1 - (uncached - log_probs).double().exp()).abs().cpu() / 2
    parts = max(1, changed.shape[1] // COMPARED_POSITIONS)
    share = 0.0
    for part, counted in zip(changed.tensor_split(parts, 1), drawn.tensor_split(parts, 1), strict=True):
        if counted.any():
            share = max(share, float(part[counted].mean()))
    if share > MAX_CACHE_DRIFT.get(model.dtype, MAX_CACHE_DRIFT_HALF):
        raise ValueError(
            f"max_length: within {rows.shape[1]} tokens {model.config.model_type!r} predicts differently with its "
            f"cache than without ({share:.0%} of draws would differ), so the rows would not be its own; use a shorter "
            "max_length, sample with --engine vllm, or replay real text"
        )


# Largest mean difference of a pool's log-probabilities from the model's, nats per token over `CHECKED_TOKENS` tokens.
# Measured on 12 rows of 96 tokens of SmolLM2-135M, by the dtypes of sampler and model: 2e-6 if both are float32; in
# bfloat16 or autocast .0001 to .005; from bfloat16 to float32 .013, with a standard deviation of .19 for one token.
MAX_POOL_DRIFT, MAX_POOL_DRIFT_HALF, TOKEN_NOISE_HALF = 1e-3, 0.05, 0.5
CHECKED_TOKENS = 1000


def check_pool(model: Any, rows: ReplayDataset, *, half: bool) -> None:
    """Refuse a pool whose stored log-probabilities are not the model's, checked on a few rows spread over it.

    The mean difference estimates KL(sampler || model). It also detects what a fingerprint of the weights does not:
    other position encodings, windows, soft caps, attention or precision.

    Args:
        model: the base, in the mode and precision of training.
        half: whether the sampler or the model is in half precision.
    """
    assert rows.log_probs is not None
    num_rows = max(2, math.ceil(CHECKED_TOKENS / max(1.0, rows.num_predictions.mean())))
    chosen = np.unique(np.linspace(0, len(rows) - 1, num_rows).astype(int)).tolist()
    drift, count = 0.0, max(1, int(rows.num_predictions[chosen].sum()))
    for at in chosen:
        row = torch.from_numpy(rows[at].astype(np.int64)).to(model.device)
        log_probs = row_log_probs(model, row)[max(0, int(rows.prefix_lengths[at]) - 1) :]
        drift += float(rows.log_probs[at]) - float(log_probs.double().sum())
    limit = MAX_POOL_DRIFT_HALF + TOKEN_NOISE_HALF / math.sqrt(count) if half else MAX_POOL_DRIFT
    if not abs(drift) <= limit * count:
        raise ValueError(
            f"replay_dataset: the rows in {rows.source!r} are not this model's own: their log-probabilities are off by "
            f"{drift / count:.2g} nats per token on {len(chosen)} rows, and rounding explains at most {limit:.2g}; the "
            "configuration (rope_parameters, windows, soft caps, attention) or the precision differs; sample from the "
            "model as it is trained, or set allow_off_policy_replay"
        )
