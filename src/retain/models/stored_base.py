"""The base as it is needed when nothing of it is kept but its output head: its hidden states on known texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from retain.losses import Head
from retain.models.head import at_head
from retain.models.reference import evaluation_mode, probe_tokens


class RememberedBase(nn.Module):
    """Gives the base's logits on texts that it read before training began; on others it fails.

    Its memory: the head, and the hidden states of the texts on the CPU.

    Args:
        model: the base.
        head: its output head, as a copy that stays.
        windows: token ids of each text that will be asked for.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, model: Any, head: Head, windows: Iterable[Sequence[int]] = ()) -> None:
        super().__init__()
        self.scale, self.softcap = head.scale, head.softcap
        self.register_buffer("weight", head.weight)
        self.register_buffer("bias", head.bias)
        self.config = model.config  # says how many tokens there are, which is all that a probe asks
        rows = [*probe_tokens(self.config.get_text_config().vocab_size).tolist(), *windows]
        with evaluation_mode(model), torch.no_grad():
            self.states = {tuple(row): self._states(model, row) for row in rows}

    @staticmethod
    def _states(model: Any, row: Sequence[int]) -> Tensor:
        inputs = {"input_ids": torch.tensor([row], device=model.device)}
        return at_head(model, model, inputs, lambda hidden, module: hidden[0]).cpu()

    @property
    def head(self) -> Head:
        """The base's output head."""
        return Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        """Logits of shape (rows, length, vocab), 0 hidden states on padding."""
        lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(-1).tolist()
        found = [self.states[tuple(ids[:n])] for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        hidden = nn.utils.rnn.pad_sequence(found, batch_first=True)
        hidden = nn.functional.pad(hidden, (0, 0, 0, input_ids.shape[1] - hidden.shape[1]))
        return SimpleNamespace(logits=self.head.logits(hidden.to(self.device)))
