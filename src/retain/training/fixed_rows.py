"""KL(base || model) on a few fixed replay rows, logged for a run with an anchor that draws no replay rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from retain.models.head import find_head_form, reshard
from retain.models.reference import Reference, evaluation_mode
from retain.replay.dataset import ReplayDataset
from retain.training.anchored_adamw import AnchoredLoRA, AnchoredWeight, gathered
from retain.training.replay_term import ReplayTerm, TermBatch

NUM_ROWS = 2  # the longest ones; each log costs a forward pass over them


class FixedRows:
    """The rows, and what the base predicts of them, stored before the first step.

    The base's hidden states are stored; its head, whose weights the anchor keeps, turns them into predictions. For a
    head that is not plain, logits are stored.

    Args:
        model: the base, or the base with an adapter, which is switched off.
        anchored: the trained weights, with their values in the base.
        autocast: makes the context in which training runs its forward passes.
    """

    def __init__(
        self,
        model: Any,
        rows: ReplayDataset,
        anchored: Sequence[AnchoredWeight | AnchoredLoRA],
        autocast: Callable[[], Any],
    ) -> None:
        self.autocast, self.term = autocast, ReplayTerm(find_head_form(model), None)
        self._rows = rows.batch(np.argsort(-rows.num_predictions, kind="stable")[:NUM_ROWS].tolist())
        names = {id(getattr(model.get_output_embeddings(), name, None)): name for name in ("weight", "bias")}
        weights = {id(weight.parameters[0]): weight for weight in anchored if isinstance(weight, AnchoredWeight)}
        self._head = {names[key]: weight for key, weight in weights.items() if key in names}
        base = Reference().base(model) if hasattr(model, "disable_adapter") else evaluation_mode(model)
        with base, torch.no_grad(), autocast():
            predictions = self.term.predictions(self._batch(model, model.device))
        self._stored = {name: value.cpu() for name, value in predictions.items()}

    def _batch(self, model: Any, device: torch.device, stored: dict[str, Tensor] | None = None) -> TermBatch:
        inputs = {name: value.to(device) for name, value in self._rows.items()}
        return TermBatch(model, inputs, inputs.pop("labels"), stored)

    @torch.no_grad()
    def kl(self, model: Any, device: torch.device) -> float:
        """KL(base ‖ model) at the current weights, nats per token; all processes that share a model must call it."""
        stored = {name: value.to(device) for name, value in self._stored.items()}
        if self.term.form is not None and self._head:
            head = self.term.form.head(extract_model_from_parallel(model).get_output_embeddings())
            base_values: dict[str, Any] = {name: gathered(weight.base) for name, weight in self._head.items()}
            self.term.ref_head = head._replace(**base_values)
        batch = self._batch(model, device, stored)
        with evaluation_mode(model), self.autocast():
            total = float(self.term.kl(batch))
        self.term.ref_head = None
        reshard(model)
        return total / int(batch.mask.sum())
