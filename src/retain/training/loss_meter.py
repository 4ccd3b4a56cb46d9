"""The parts of a protected run's loss, summed over micro-batches, steps and processes, for logs, budget and checks."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retain.training.coef_controller import OPENING_LENGTH


class LossMeter:
    """Accumulates the parts of a run's loss until they are logged.

    Args:
        accelerator: the host trainer's; it sums over processes.
        compared: whether the replay term is a KL to the base.
    """

    def __init__(self, accelerator: Any, *, compared: bool) -> None:
        self.accelerator, self.compared = accelerator, compared
        self.step_term = torch.zeros((), device=accelerator.device)  # replay term of the current step, on this process
        self._step_parts = torch.zeros(2, 2, device=accelerator.device)  # (opening, rest): Σ KL and predictions
        self._parts = torch.zeros_like(self._step_parts)  # since the last log
        self._terms: list[Tensor] = []
        self._num_steps = 0  # steps with replay since the last log
        self._new_task: dict[int, Any] = {}  # step → the host's own loss
        self._largest_kl, self._kl_is_zero = torch.zeros_like(self.step_term), compared

    def begin_step(self) -> None:
        """Start a step with replay."""
        self.step_term, self._step_parts = torch.zeros_like(self.step_term), torch.zeros_like(self._step_parts)
        self._num_steps += 1

    def forget(self, step: int) -> None:
        """Drop the new-task loss of a step that is repeated after it ran out of memory."""
        self._new_task.pop(step, None)

    def add_new_task(self, step: int, loss: Tensor) -> None:
        """Add a micro-batch's part of the host's own loss."""
        self._new_task[step] = self._new_task.get(step, 0.0) + loss

    def add_term(self, term: Tensor) -> None:
        """Add a micro-batch's part of the step's replay term."""
        self._terms.append(term.detach())
        self.step_term = self.step_term.to(term.device) + term.detach()
        if self.compared:
            self._largest_kl = torch.maximum(self._largest_kl.to(term.device), term.detach().abs())

    def add_values(self, values: Float[Tensor, n], mask: Bool[Tensor, "rows predictions"]) -> None:
        """Add the KL of a micro-batch's predictions, those in `mask`, in nats."""
        opening = in_opening(mask)[mask]
        parts = torch.stack([torch.stack([values[part].sum(), part.sum()]) for part in (opening, ~opening)])
        self._step_parts, self._parts = self._step_parts + parts, self._parts + parts

    def kl_after_openings(self) -> float:
        """Mean KL of the step after the rows' openings, over micro-batches and processes; nats per token."""
        total, count = self.accelerator.reduce(self._step_parts, reduction="sum")[1].tolist()
        return total / max(count, 1.0)

    def kl_stayed_zero(self) -> bool:
        """Whether no process has seen a nonzero KL yet; every process must call it."""
        if self._kl_is_zero:
            self._kl_is_zero = float(self.accelerator.reduce(self._largest_kl, reduction="sum")) == 0.0
        return self._kl_is_zero

    def logs(self, step: int, coef: float) -> dict[str, float]:
        """The parts of the logged `loss`, as means over the steps before `step` since the last call."""
        logs: dict[str, float] = {}
        if self._new_task:
            finished = [loss for done, loss in self._new_task.items() if done < step]
            logs["new_task/loss"] = self.accelerator.reduce(torch.stack(finished).mean(), reduction="mean").item()
            self._new_task = {}
        if not self._terms:
            return logs
        mean = self.accelerator.reduce(torch.stack(self._terms).sum() / self._num_steps, reduction="mean").item()
        logs["replay/loss"] = mean
        if self.compared:
            logs["replay/kl"] = mean
            parts = self.accelerator.reduce(self._parts, reduction="sum").tolist()
            logs |= {f"replay/kl_{name}": kl / n for name, (kl, n) in zip(("opening", "rest"), parts, strict=True) if n}
            self._parts = torch.zeros_like(self._parts)
        self._terms, self._num_steps = [], 0
        return {**logs, "replay/coef": coef}


def in_opening(mask: Bool[Tensor, "rows predictions"]) -> Bool[Tensor, "rows predictions"]:
    """Which predictions in `mask` have fewer than `OPENING_LENGTH` tokens before them; at most half of each row.

    >>> in_opening(torch.ones(1, 6, dtype=torch.bool))
    tensor([[ True,  True,  True, False, False, False]])
    """
    early = torch.arange(mask.shape[1], device=mask.device) < OPENING_LENGTH
    return mask & early & (mask.cumsum(-1) <= mask.sum(-1, keepdim=True) // 2)
