"""Whether rows are a model's own: their log-probabilities against forward passes without a cache.

Sampling is proven so at the length at which it is used, and a pool against the model that is about to be trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retain.replay.dataset import ReplayDataset

COMPARED_POSITIONS = 64  # positions whose float32 log-probabilities are held at once, and over which draws are compared


def rope_switch(model: Any) -> int | None:
    """Tokens beyond which LongRoPE encodes all positions of a sequence otherwise; None for a model without it."""
    kinds = [kind for kind in rope_kinds(model) if kind.get("rope_type") == "longrope"]
    return min((kind["original_max_position_embeddings"] for kind in kinds), default=None)


def rope_kinds(model: Any) -> list[dict[str, Any]]:
    """Settings of a model's rotary positions: of all layers, or by their type."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]


def passes(model: Any, length: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of passes that predict a row as it was drawn: over `end` tokens each, for tokens begin+1 to end.

    One pass, but for LongRoPE: there a short sequence predicts its next token otherwise than as a part of a long one.
    """
    switch, last = rope_switch(model), length - 1
    ends = [last] if switch is None or switch >= last else [switch, last]
    yield from zip([0, *ends], ends, strict=False)


@torch.no_grad()
def row_log_probs(model: Any, row: Int[Tensor, " length"]) -> Float[Tensor, " predicted"]:
    """Log-probability of each token of a row behind its first, nats, as the model without a cache predicts it."""
    found = []
    for begin, end in passes(model, len(row)):
        logits = model(input_ids=row[None, :end], use_cache=False).logits[0, begin:]
        for at in range(begin, end, COMPARED_POSITIONS):
            part = slice(at, min(at + COMPARED_POSITIONS, end))
            log_probs = torch.log_softmax(logits[at - begin : part.stop - begin].float(), dim=-1)
            found.append(log_probs.gather(-1, row[at + 1 : part.stop + 1, None]).squeeze(-1))
    return torch.cat(found)


# Share of draws that a cache may change, on average over `COMPARED_POSITIONS`. Rounding changes 2e-6 in float32 (25
# tiny architectures) and 2 % in bfloat16 (SmolLM2-135M); a cache that is kept where LongRoPE switches, 5 to 13 %.
MAX_CACHE_DRIFT = {torch.float32: 1e-2}
MAX_CACHE_DRIFT_HALF = 0.1


def check_draws(
    model: Any, rows: Int[Tensor, "rows length"], given: Sequence[int], log_probs: Float[Tensor, "rows predicted"]
) -> None:
    """Refuse rows that a pass without a cache would have drawn differently.

    The share is ½ E|1 − q/p| over draws from p: the total variation distance between the two distributions.

    Args:
        given: tokens that each row began with.
        log_probs: with which the last tokens of each were drawn; of given ones anything.
    """
    num_predicted = log_probs.shape[1]
    found = torch.stack([row_log_probs(model, row) for row in rows])[:, -num_predicted:]
    drawn = torch.arange(rows.shape[1])[-num_predicted:] >= torch.tensor(given).unsqueeze(-1)
    changed = (1 - (found - log_probs).double().exp()).abs().cpu() / 2
    parts = max(1, changed.shape[1] // COMPARED_POSITIONS)
    share = 0.0
    for part, counted in zip(changed.tensor_split(parts, 1), drawn.tensor_split(parts, 1), strict=True):
        if counted.any():
            share = max(share, float(part[counted].mean()))
    if share > MAX_CACHE_DRIFT.get(model.dtype, MAX_CACHE_DRIFT_HALF):
        raise ValueError(
            f"max_length: within {rows.shape[1]} tokens {model.config.model_type!r} predicts differently with its "
            f"cache than without ({share:.0%} of draws would differ), so its rows would not be its own; use a shorter "
            "max_length, sample with --engine vllm, or replay real text"
        )


# Nats per token by which a pool's log-probabilities may be off a model's own, on average over `CHECKED_TOKENS` tokens.
# Measured on 12 rows of 96 tokens of SmolLM2-135M, by the dtypes of sampler and model: 2e-6 where both are float32; in
# bfloat16 or autocast .0001 to .005, from bfloat16 to float32 .013, where one token is off by .19 (standard deviation).
MAX_POOL_DRIFT, MAX_POOL_DRIFT_HALF, TOKEN_NOISE_HALF = 1e-3, 0.05, 0.5
CHECKED_TOKENS = 1000


def check_pool(model: Any, rows: ReplayDataset, *, half: bool) -> None:
    """Refuse a pool whose stored log-probabilities are not the model's, on a few rows spread over it.

    The mean of their difference estimates KL(sampler || model). It sees what weights do not show: the encoding of
    positions, windows, soft caps, attention, precision.

    Args:
        model: the base, in the mode and precision of training.
        half: whether the sampler or the model is in half precision.
    """
    assert rows.log_probs is not None
    enough = max(2, math.ceil(CHECKED_TOKENS / max(1.0, rows.num_predictions.mean())))
    chosen = np.unique(np.linspace(0, len(rows) - 1, enough).astype(int)).tolist()
    off, count = 0.0, max(1, int(rows.num_predictions[chosen].sum()))
    for at in chosen:
        row = torch.from_numpy(rows[at].astype(np.int64)).to(model.device)
        found = row_log_probs(model, row)[max(0, int(rows.prefix_lengths[at]) - 1) :]
        off += float(rows.log_probs[at]) - float(found.double().sum())
    limit = MAX_POOL_DRIFT_HALF + TOKEN_NOISE_HALF / math.sqrt(count) if half else MAX_POOL_DRIFT
    if not abs(off) <= limit * count:
        raise ValueError(
            f"replay_dataset: the rows in {rows.source!r} are not this model's own: their log-probabilities are off by "
            f"{off / count:.2g} nats per token on {len(chosen)} rows, and rounding makes less than {limit:.2g}; the "
            "configuration differs (rope_parameters, windows, soft caps, attention) or the precision; sample from the "
            "model as it is trained, or set allow_off_policy_replay"
        )
