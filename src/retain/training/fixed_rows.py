"""KL(base || model) on a few replay rows, the same at every log: what shows of an anchor where no rows are drawn."""

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
from retain.training.anchored_adamw import AnchoredLoRA, AnchoredWeight, whole
from retain.training.replay_term import ReplayTerm, TermBatch

NUM_ROWS = 2  # the longest; a forward pass over them at a log


class FixedRows:
    """The rows, and what the base said of them before the first step.

    Its hidden states are kept, and become its predictions by its own head, of which an anchor knows the weights. Where
    the head is no plain one, its logits.

    Args:
        model: the base, or the base with an adapter, which is switched off.
        anchored: what is trained, at the base.
        autocast: makes the context of the training's forward passes.
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
        parts = {id(getattr(model.get_output_embeddings(), name, None)): name for name in ("weight", "bias")}
        held = [one for one in anchored if isinstance(one, AnchoredWeight)]
        self._head = {parts[id(one.parameters[0])]: one for one in held if id(one.parameters[0]) in parts}
        base = Reference().base(model) if hasattr(model, "disable_adapter") else evaluation_mode(model)
        with base, torch.no_grad(), autocast():
            found = self.term.predictions(self._batch(model, model.device))
        self._stored = {name: value.cpu() for name, value in found.items()}

    def _batch(self, model: Any, device: torch.device, stored: dict[str, Tensor] | None = None) -> TermBatch:
        inputs = {name: value.to(device) for name, value in self._rows.items()}
        return TermBatch(model, inputs, inputs.pop("labels"), stored)

    @torch.no_grad()
    def kl(self, model: Any, device: torch.device) -> float:
        """KL(base ‖ model) of the weights in place, nats per token; all processes that share a model call it."""
        stored = {name: value.to(device) for name, value in self._stored.items()}
        if self.term.form is not None and self._head:
            head = self.term.form.head(extract_model_from_parallel(model).get_output_embeddings())
            of_base: dict[str, Any] = {name: whole(one.base) for name, one in self._head.items()}
            self.term.ref_head = head._replace(**of_base)
        batch = self._batch(model, device, stored)
        with evaluation_mode(model), self.autocast():
            total = float(self.term.kl(batch))
        self.term.ref_head = None
        reshard(model)
        return total / int(batch.mask.sum())
