"""The replay term of one batch: a sum over its predicted tokens, in nats, computed at the output head.

For a plain head, whole logits are never held. For any other head (with an adapter on it, say) the naive forms on whole
logits give the same value and need more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from retain.losses import (
    Head,
    chunked_kl_divergence,
    chunked_next_token_loss,
    chunked_topk_kl_divergence,
    kl_divergence,
    next_token_loss,
    topk_kl_divergence,
)
from retain.measuring.tokens import logits_at
from retain.models.head import HeadForm, at_head
from retain.models.reference import Reference


class TermBatch(NamedTuple):
    """The rows of a term, and the model that reads them.

    Args:
        model: as the trainer calls it, wrapped or not.
        inputs: the model's inputs.
        labels: token ids of shape (rows, length), −100 where nothing is predicted.
        stored: the base's predictions at these labels, as returned by `ReferenceCache.batch`.
        values: filled with each prediction's KL, row by row, shape (predictions,).
        hidden: the model's hidden states at its head, if a forward pass has computed them already.
    """

    model: Any
    inputs: dict[str, Tensor]
    labels: Int[Tensor, "rows length"]
    stored: dict[str, Tensor] | None = None
    values: Float[Tensor, predictions] | None = None
    hidden: Float[Tensor, "rows length size"] | None = None

    @property
    def mask(self) -> Bool[Tensor, "rows length-1"]:
        """Which predictions have a label."""
        return self.labels[:, 1:] != -100

    def masked(self, hidden: Float[Tensor, "rows length size"]) -> Float[Tensor, "predictions size"]:
        """The positions at which a prediction in the mask is made."""
        return hidden[:, :-1][self.mask]

    def logits(self, model: Any) -> Float[Tensor, "predictions vocab"]:
        """A model's logits for the predictions in the mask."""
        return self.masked(logits_at(model, self.inputs))

    def at_head(self, model: Any, compute: Callable[[Tensor, nn.Linear], Tensor]) -> Tensor:
        """`compute` of a model's hidden states for the predictions in the mask, and of its output head."""
        if self.hidden is not None:
            return compute(self.masked(self.hidden), extract_model_from_parallel(model).get_output_embeddings())
        return at_head(model, self.inputs, lambda hidden, module: compute(self.masked(hidden), module))

    def summed(self, kl: Float[Tensor, predictions]) -> Tensor:
        """The sum of each prediction's KL; fills `values`."""
        if self.values is not None:
            self.values.copy_(kl.detach())
        return kl.sum()


class ReplayTerm:
    """The sums over a batch's predicted tokens, in nats, that objectives are built from.

    Args:
        form: of the model's output head; None if the head is not plain.
        reference: the frozen base, if training uses one.
        ref_head: the base's own head, if hidden states were stored and the model's head is trained.
        autocast: makes the context in which a frozen copy uses the dtype of the model being trained.
    """

    def __init__(
        self,
        form: HeadForm | None,
        reference: Reference | None,
        ref_head: Head | None = None,
        autocast: Callable[[], Any] = nullcontext,
    ) -> None:
        self.form, self.reference, self.ref_head, self.autocast = form, reference, ref_head, autocast

    def to(self, device: torch.device) -> None:
        """Move the base's own head to the training device."""
        if self.ref_head is not None:
            bias = None if self.ref_head.bias is None else self.ref_head.bias.to(device)
            self.ref_head = self.ref_head._replace(weight=self.ref_head.weight.to(device), bias=bias)

    def next_token_loss(self, batch: TermBatch) -> Tensor:
        """Σ −log p_θ(label)."""
        targets, form = batch.labels[:, 1:][batch.mask], self.form
        if form is None:
            return next_token_loss(batch.logits(batch.model), targets).sum()
        compute = lambda hidden, module: chunked_next_token_loss(targets, hidden, form.head(module))  # noqa: E731
        return batch.at_head(batch.model, compute)

    def kl(self, batch: TermBatch) -> Tensor:
        """Σ KL(base ‖ θ), from the batch's stored predictions if it has any, else from the reference."""
        form, stored = self.form, batch.stored
        if stored is not None and "tokens" in stored:
            return self._topk_kl(batch, stored["log_probs"], stored["tokens"].long())
        if form is None:
            assert stored is None or "logits" in stored, "stored hidden states need a plain head"
            ref_logits = self._ref(batch, batch.logits) if stored is None else stored["logits"]
            return batch.summed(kl_divergence(ref_logits, batch.logits(batch.model)))
        ref_head, ref_hidden = self.ref_head, None if stored is None else stored["hidden"]
        if ref_hidden is None:
            assert self.reference is not None
            ref_model: Any = self.reference.ref_model
            if ref_model is not None:
                ref_head = form.head(ref_model.get_output_embeddings())
            own_pass = batch._replace(hidden=None)
            ref_hidden = self._ref(batch, lambda base: own_pass.at_head(base, lambda hidden, module: hidden))

        def compute(hidden: Tensor, module: nn.Linear) -> Tensor:
            head = form.head(module)  # also the base's, if the reference is the adapter switched off: it is frozen
            return chunked_kl_divergence(ref_hidden, ref_head or head, hidden, head, batch.values)

        return batch.at_head(batch.model, compute)

    def predictions(self, batch: TermBatch) -> dict[str, Tensor]:
        """The predictions of the batch's model, in the form that `kl` reads from `stored`."""
        if self.form is None:
            return {"logits": batch.logits(batch.model)}
        return {"hidden": batch.at_head(batch.model, lambda hidden, module: hidden)}

    def _topk_kl(self, batch: TermBatch, log_probs: Tensor, tokens: Tensor) -> Tensor:
        form = self.form
        if form is None:
            return batch.summed(topk_kl_divergence(log_probs, tokens, batch.logits(batch.model)))

        def compute(hidden: Tensor, module: nn.Linear) -> Tensor:
            return chunked_topk_kl_divergence(log_probs, tokens, hidden, form.head(module), batch.values)

        return batch.at_head(batch.model, compute)

    def _ref(self, batch: TermBatch, predict: Callable[[Any], Tensor]) -> Tensor:
        assert self.reference is not None
        with self.reference.base(batch.model, self.autocast) as base:
            return predict(base)


@torch.no_grad()
def kl_values(term: ReplayTerm, batch: TermBatch) -> Float[Tensor, predictions]:
    """KL(base ‖ model) of each prediction of a batch, nats; 0 up to rounding while the model is still the base."""
    values = torch.zeros(int(batch.mask.sum()), device=batch.labels.device)
    term.kl(batch._replace(values=values))
    return values
