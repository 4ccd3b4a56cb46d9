"""The mathematics: pure functions of logits, unreduced, computed in float32, in nats.

Notation of the papers: π is the frozen base (`ref_logits`), θ the model being trained (`logits`).
All take logits that are already aligned: position t predicts the token at t + 1 (see `shifted`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def next_token_loss(logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """−log p_θ(target), nats per position. Marek et al., `ntp_pre`."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl_divergence(
    ref_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(π ‖ θ) = Σ_v p_π (log p_π − log p_θ), nats per position, full vocabulary. Marek et al., `kl_pre`.

    Forward KL: the base comes first, and `ref_logits` carries no gradient by the caller's doing.
    """
    ref_log_probs = torch.log_softmax(ref_logits.float(), dim=-1)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(-1)


def cross_entropy(
    ref_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """−Σ_v p_π log p_θ = H(π) + KL(π ‖ θ), nats per position. Kalajdzievski's forgetting loss, soft reading."""
    return -(torch.softmax(ref_logits.float(), dim=-1) * torch.log_softmax(logits.float(), dim=-1)).sum(-1)


def argmax_cross_entropy(
    ref_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """−log p_θ(argmax p_π), nats per position. Kalajdzievski's forgetting loss, hard reading."""
    return next_token_loss(logits, ref_logits.argmax(-1))


def agreement(
    ref_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Bool[Tensor, "*batch"]:
    """Whether base and model hold the same token most likely. Kalajdzievski, section on capabilities."""
    return ref_logits.argmax(-1) == logits.argmax(-1)


def shifted(
    input_ids: Int[Tensor, "rows length"], attention_mask: Int[Tensor, "rows length"] | None = None
) -> tuple[Int[Tensor, "rows length-1"], Bool[Tensor, "rows length-1"]]:
    """Targets for the logits at positions 0 … T−2, and which of them are real tokens.

    A row of T tokens has T−1 predictions: the last position's target lies outside the row.
    """
    targets = input_ids[:, 1:]
    if attention_mask is None:
        return targets, torch.ones_like(targets, dtype=torch.bool)
    return targets, attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
