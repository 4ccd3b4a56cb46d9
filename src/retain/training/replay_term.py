"""The replay term of one batch: a sum over its predicted tokens, in nats, made at the output head.

Where the head is a plain matrix of weights no logits are ever held; where an adapter sits on it, or a model does
something of its own there, the naive forms on whole logits say the same at their price.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
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
from retain.models.head import HeadForm, at_head, find_head_form
from retain.models.reference import Reference, evaluation_mode
from retain.replay.dataset import ReplayDataset

Inputs = dict[str, Tensor]


class ReplayTerm:
    """Sums of an objective over the predicted tokens of a batch.

    Args:
        form: what the model does at its output head; None where it is not a plain one.
        reference: the frozen base, where it is asked while training.
        ref_head: the base's own head, where hidden states were stored and the model's head is trained.
        autocast: makes the context in which a frozen copy must run to use the dtype of the model being trained.
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
        """Move the base's own head to the device of training."""
        if self.ref_head is not None:
            bias = None if self.ref_head.bias is None else self.ref_head.bias.to(device)
            self.ref_head = self.ref_head._replace(weight=self.ref_head.weight.to(device), bias=bias)

    def next_token_loss(self, model: Any, unwrapped: Any, inputs: Inputs, labels: Tensor) -> Tensor:
        """Σ −log p_θ(label), over labels that are not −100."""
        targets, mask = labels[:, 1:], labels[:, 1:] != -100
        if self.form is None:
            values = next_token_loss(logits_at(model, inputs)[:, :-1], targets.clamp(min=0))
            return values.masked_fill(~mask, 0.0).sum()
        form = self.form

        def compute(hidden: Tensor, module: nn.Linear) -> Tensor:
            return chunked_next_token_loss(targets[mask], hidden[:, :-1][mask], form.head(module))

        return at_head(model, unwrapped, inputs, compute)

    def kl(
        self,
        model: Any,
        unwrapped: Any,
        inputs: Inputs,
        mask: Tensor,
        stored: dict[str, Tensor] | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Σ KL(base ‖ θ) over the predictions in `mask`, of shape (rows, length − 1).

        Args:
            stored: the base's predictions there, as `ReferenceCache.batch` gives them; else the reference is asked.
            values: filled with the terms of the sum, row by row.
        """
        if stored is not None and "tokens" in stored:
            return self._of_topk(model, unwrapped, inputs, mask, stored, values)
        if self.form is None:
            assert stored is None, "hidden states say nothing without a plain head"
            return self.on_logits(kl_divergence, model, unwrapped, inputs, mask, values)
        form, ref_head = self.form, self.ref_head
        if stored is not None:
            ref_hidden = stored["hidden"]
        else:
            assert self.reference is not None
            copied = self.reference.ref_model is not None
            inside: Any = self.reference.ref_model if copied else unwrapped
            if copied:
                ref_head = form.head(inside.get_output_embeddings())

            def keep(hidden: Tensor, module: nn.Linear) -> Tensor:
                return hidden[:, :-1][mask]

            ref_hidden = self._ref(model, unwrapped, lambda base: at_head(base, inside, inputs, keep))

        def compute(hidden: Tensor, module: nn.Linear) -> Tensor:
            head = form.head(module)  # with an adapter's reference the base's too: it is frozen
            return chunked_kl_divergence(ref_hidden, ref_head or head, hidden[:, :-1][mask], head, values)

        return at_head(model, unwrapped, inputs, compute)

    def on_logits(
        self,
        divergence: Callable[[Tensor, Tensor], Tensor],
        model: Any,
        unwrapped: Any,
        inputs: Inputs,
        mask: Tensor,
        values: Tensor | None = None,
    ) -> Tensor:
        """Σ divergence(base's logits, model's logits) over the predictions in `mask`: any function of whole logits."""
        ref_logits = self._ref(model, unwrapped, lambda base: logits_at(base, inputs))
        found = divergence(ref_logits[:, :-1], logits_at(model, inputs)[:, :-1])
        if values is not None:
            values.copy_(found.detach()[mask])
        return found.masked_fill(~mask, 0.0).sum()

    def _of_topk(
        self,
        model: Any,
        unwrapped: Any,
        inputs: Inputs,
        mask: Tensor,
        stored: dict[str, Tensor],
        values: Tensor | None,
    ) -> Tensor:
        log_probs, tokens = stored["log_probs"], stored["tokens"].long()
        if self.form is None:
            found = topk_kl_divergence(log_probs, tokens, logits_at(model, inputs)[:, :-1][mask])
            if values is not None:
                values.copy_(found.detach())
            return found.sum()
        form = self.form

        def compute(hidden: Tensor, module: nn.Linear) -> Tensor:
            return chunked_topk_kl_divergence(log_probs, tokens, hidden[:, :-1][mask], form.head(module), values)

        return at_head(model, unwrapped, inputs, compute)

    def _ref(self, model: Any, unwrapped: Any, ask: Callable[[Any], Tensor]) -> Tensor:
        assert self.reference is not None
        with self.reference.base(model, unwrapped, self.autocast) as base:
            return ask(base)


@torch.no_grad()
def stored_error(term: ReplayTerm, model: Any, inputs: Inputs, mask: Tensor, stored: dict[str, Tensor]) -> float:
    """KL(stored ‖ model) per token, in nats, of a model that has not been trained yet: what storing cost.

    0 but for rounding when the predictions are this model's.
    """
    return float(term.kl(model, model, inputs, mask, stored)) / int(mask.sum())


PROBE_TEMPERATURE = 1.25  # a distribution that is off the base by a known amount


@torch.no_grad()
def describe_store(model: Any, rows: ReplayDataset, num_rows: int = 8) -> dict[str, Any]:
    """What the stored predictions of a model keep, on its first rows; all but `num_tokens` per token.

    Returns:
        `exact_kl`: KL(base ‖ probe), nats, the probe being the model at a temperature of 1.25; `stored_kl`: the same
        from what is stored. `kl_error`: KL(base ‖ stored), nats, for hidden states. `rest`: mass outside of the
        tokens that are stored.
    """
    assert rows.cache is not None
    indices = range(min(num_rows, len(rows)))
    batch = {name: value.to(model.device) for name, value in rows.batch(indices).items()}
    mask = batch.pop("labels")[:, 1:] != -100
    stored = {name: value.to(model.device) for name, value in rows.cache.batch(indices).items()}
    with evaluation_mode(model):
        logits = logits_at(model, batch)[:, :-1][mask].float()
    probe = logits / PROBE_TEMPERATURE
    told = {"num_tokens": int(mask.sum()), "exact_kl": float(kl_divergence(logits, probe).mean())}
    if "tokens" in stored:
        of_stored = topk_kl_divergence(stored["log_probs"], stored["tokens"].long(), probe)
        rest = 1 - stored["log_probs"].exp().sum(-1)
        return {**told, "stored_kl": float(of_stored.mean()), "rest": float(rest.mean())}
    form = find_head_form(model)
    head = model.get_output_embeddings() if form is None else form.head(model.get_output_embeddings()).logits
    found = head(stored["hidden"])
    error = float(kl_divergence(logits, found).mean())
    return {**told, "stored_kl": float(kl_divergence(found, probe).mean()), "kl_error": error, "rest": 0.0}
