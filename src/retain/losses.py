"""The mathematics: pure functions of logits, unreduced, in float32 and nats; `chunked_*`: sums, from hidden states.

Notation of the papers: π is the frozen base (`ref_logits`), θ the model being trained (`logits`).
All take logits that are already aligned: position t predicts the token at t + 1 (see `shifted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_BYTES = 1 << 25  # float32 logits per chunk of the chunked losses; up to three such arrays are alive at once
NO_REST = 1e-5  # mass outside the top k that counts as rounding error where the model gives those tokens none


def next_token_loss(logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """−log p_θ(target), nats per position. Marek et al., `ntp_pre`.

    >>> next_token_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def expectation(probs: Float[Tensor, "*batch vocab"], values: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Σ_v p_v x_v with 0 · ∞ = 0, as for tokens that have logit −∞ in both models."""
    mean = torch.linalg.vecdot(probs, values)
    if bool(mean.isnan().any()):  # rare, and the mask costs as much as the softmax
        mean = torch.linalg.vecdot(probs, values.masked_fill(probs == 0, 0.0))
    return mean


def kl_divergence(
    ref_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(π ‖ θ) = Σ_v p_π (log p_π − log p_θ), nats per position, full vocabulary. Marek et al., `kl_pre`.

    Forward KL: the base comes first. The caller computes `ref_logits` without gradient.

    >>> kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.1201)
    """
    ref_log_probs = torch.log_softmax(ref_logits.float(), dim=-1)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return expectation(ref_log_probs.exp(), ref_log_probs - log_probs)


def shifted(
    input_ids: Int[Tensor, "rows length"], attention_mask: Int[Tensor, "rows length"] | None = None
) -> tuple[Int[Tensor, "rows length-1"], Bool[Tensor, "rows length-1"]]:
    """Targets for the logits at positions 0 … T−2, and a mask of those that are real tokens.

    A row of T tokens has T−1 predictions: the last position has no target.
    """
    targets = input_ids[:, 1:]
    if attention_mask is None:
        return targets, torch.ones_like(targets, dtype=torch.bool)
    return targets, attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()


class Head(NamedTuple):
    """The output head of a model: logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """All logits at once, in the dtype of `hidden`, as the model itself computes them."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


# (positions, log p_θ at them) -> divergence at each position, and the distribution that θ is pulled towards.
Target = Callable[[slice, Tensor], tuple[Float[Tensor, " positions"], Float[Tensor, "positions vocab"]]]


def chunked_kl_divergence(
    ref_hidden: Float[Tensor, "positions ref_hidden"],
    ref_head: Head,
    hidden: Float[Tensor, "positions hidden"],
    head: Head,
    values: Float[Tensor, " positions"] | None = None,
) -> Float[Tensor, ""]:
    """Σ over positions of KL(π ‖ θ), nats, without materialising the logits of either model.

    Equals the sum of `kl_divergence(ref_head.logits(ref_hidden), head.logits(hidden))` in value and gradient. The
    gradient is computed in the forward pass, so nothing is computed twice; the head's only if it is trained. That is
    why the loss is a sum: the gradient must know the weights of the positions. `values` receives the terms of the sum.
    """
    ref_weight = _multiplier(ref_head.weight.detach(), ref_hidden.dtype)

    def target(part: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        ref = _log_probs(ref_hidden[part], ref_weight, ref_head)[0]
        probs = ref.exp()
        return expectation(probs, ref.sub_(log_probs)), probs

    return _summed_divergence(hidden, head, _filling(values, target))


def chunked_topk_kl_divergence(
    ref_log_probs: Float[Tensor, "positions k"],
    ref_tokens: Int[Tensor, "positions k"],
    hidden: Float[Tensor, "positions hidden"],
    head: Head,
    values: Float[Tensor, " positions"] | None = None,
) -> Float[Tensor, ""]:
    """Σ over positions of KL(π ‖ θ) over the base's top k tokens and one bin for all other tokens; nats.

    At most the KL over the full vocabulary (differences inside the bin are lost), and 0 only where the models agree on
    the top k and on the bin, which is kept because dropping or renormalising it would bias the target. `values`
    receives the terms of the sum.
    """

    def target(part: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        value, log_ratio = _topk_parts(ref_log_probs[part], ref_tokens[part], log_probs)
        pull = (log_probs + log_ratio.unsqueeze(-1)).exp_()  # the rest, scaled to its mass under the base
        return value, pull.scatter_(-1, ref_tokens[part], ref_log_probs[part].float().exp())

    return _summed_divergence(hidden, head, _filling(values, target))


def _filling(values: Tensor | None, target: Target) -> Target:
    """Wrap `target` so that it also writes its divergences into `values`."""

    def filling(part: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        value, pull = target(part, log_probs)
        if values is not None:
            values[part] = value
        return value, pull

    return filling


def chunked_next_token_loss(
    targets: Int[Tensor, " positions"], hidden: Float[Tensor, "positions hidden"], head: Head
) -> Float[Tensor, ""]:
    """Σ over positions of −log p_θ(target), nats: the sum of `next_token_loss` without materialising the logits."""

    def target(part: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        tokens = targets[part].unsqueeze(-1)
        return -log_probs.gather(-1, tokens).squeeze(-1), torch.zeros_like(log_probs).scatter_(-1, tokens, 1.0)

    return _summed_divergence(hidden, head, target)


def topk_kl_divergence(
    ref_log_probs: Float[Tensor, "*batch k"], ref_tokens: Int[Tensor, "*batch k"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """The naive twin of `chunked_topk_kl_divergence`, unreduced: nats per position."""
    return _topk_parts(ref_log_probs, ref_tokens, torch.log_softmax(logits.float(), dim=-1))[0]


def _topk_parts(ref_log_probs: Tensor, ref_tokens: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence, and the log ratio of the rest's mass, base over model."""
    ref = ref_log_probs.float()
    ref_rest = (-ref.exp().sum(-1)).log1p().nan_to_num(nan=-torch.inf)  # rounding may lift the sum above 1
    if ref.shape[-1] == log_probs.shape[-1]:
        ref_rest = torch.full_like(ref_rest, -torch.inf)  # there is no rest
    others = log_probs.scatter(-1, ref_tokens, -torch.inf)
    rest = others.logsumexp(-1)
    if bool((none := rest == -torch.inf).any()):  # its gradient would be NaN
        rest = others.masked_fill(none.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(none, -torch.inf)
        ref_rest = ref_rest.masked_fill(none & (ref_rest < math.log(NO_REST)), -torch.inf)
    of_topk = expectation(ref.exp(), ref - log_probs.gather(-1, ref_tokens))
    ratio = torch.where(ref_rest.isfinite(), ref_rest - rest, 0.0)
    return of_topk + ref_rest.exp() * ratio, torch.where(ref_rest.isfinite(), ratio, -torch.inf)


def _summed_divergence(hidden: Tensor, head: Head, target: Target) -> Tensor:
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad: a gradient as large as the head
        bias = None if head.bias is None else head.bias.detach()
        head = head._replace(weight=head.weight.detach(), bias=bias)
    return _ChunkedDivergence.apply(hidden, *head, target)


class _ChunkedDivergence(torch.autograd.Function):
    """Σ of a divergence whose gradient with respect to the logits is p_θ − target, chunk by chunk of positions.

    Gradients are accumulated in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        target: Target,
    ) -> Tensor:
        head = Head(weight, bias, scale, softcap)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen explicitly here
            factor = _multiplier(weight, hidden.dtype)
            total = hidden.new_zeros((), dtype=torch.float64)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
            step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
            for at in range(0, len(hidden), step):
                part = slice(at, at + step)
                log_probs, slope = _log_probs(hidden[part], factor, head)
                value, pull = target(part, log_probs)
                total += value.sum(dtype=torch.float64)
                grad = log_probs.exp_().sub_(pull).mul_(scale)
                del pull
                if slope is not None:
                    grad.mul_(slope)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(factor.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ factor
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return total.float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dtypes = (None, *ctx.dtypes)
        grads = [
            None if grad is None else (grad * upstream).to(dtype or grad.dtype)
            for grad, dtype in zip(ctx.saved_tensors, dtypes, strict=True)
        ]
        return (*grads, None, None, None)


def _multiplier(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's weight in the dtype of the matrix products: that of the hidden states, float32 on a CPU."""
    return weight.to(dtype if weight.is_cuda else torch.float32)


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32, for factors of any dtype."""
    if left.dtype == torch.float32:
        return left @ right.float()
    return torch.mm(left, right.to(left.dtype), out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float32:
        total.addmm_(left, right.float())  # in place: the product is as large as the head
    else:
        total.add_(_float32_product(left, right))


def _log_probs(hidden: Tensor, weight: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """log p in float32, shape (positions, vocab), and the slope of the soft cap, if any."""
    logits = _float32_product(hidden.to(weight.dtype), weight.T)
    if head.bias is not None:
        logits += head.bias.detach().float()
    logits *= head.scale
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits.square()
        logits *= head.softcap
    return logits.sub_(logits.logsumexp(-1, keepdim=True)), slope
