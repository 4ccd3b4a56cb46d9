"""The base's predictions, cached in memory as hidden states, from which its output head computes logits.

Hidden states stay on the CPU, a hundred times smaller than logits. They are cached by batch, because what a kernel
computes for a row may depend on the other rows: cached and recomputed logits are equal bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retain.losses import Head
from retain.models.description import model_fingerprint
from retain.models.head import at_head, find_head_form, seen_by_head
from retain.models.reference import evaluation_mode, probe, probe_tokens

MAX_STATES_BYTES = 4 << 30  # of hidden states; texts beyond it are read again for every tuned model

Batch = tuple[tuple[int, ...], ...]  # the tokens of each row, without padding


def batch_of(input_ids: Int[Tensor, "rows length"], attention_mask: Tensor | None = None) -> Batch:
    """The tokens of a right-padded batch, as a key.

    >>> batch_of(torch.tensor([[5, 6, 7], [5, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    ((5, 6, 7), (5, 8))
    """
    lengths = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(-1).tolist()
    return tuple(tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths, strict=True))


class HiddenStates(nn.Module):
    """A stand-in for a base: its logits, from cached hidden states, on batches that it has read.

    Args:
        config: the base's configuration.
        head: its output head; a copy if the model's own is trained.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, config: Any, head: Head) -> None:
        super().__init__()
        self.scale, self.softcap = head.scale, head.softcap
        self.register_buffer("weight", head.weight.detach())
        self.register_buffer("bias", None if head.bias is None else head.bias.detach())
        self.config = config  # `probe` reads the vocabulary size
        self.states: dict[Batch, Float[Tensor, "rows length hidden"]] = {}

    @classmethod
    def of(cls, model: Any, head: Head, batches: Sequence[Mapping[str, Tensor]]) -> HiddenStates:
        """The predictions of `model` on `batches` of `input_ids` and `attention_mask`, and on the probe tokens."""
        cached = cls(model.config, head)
        tokens = probe_tokens(model.config.get_text_config().vocab_size)
        with evaluation_mode(model), torch.no_grad():
            for batch in ({"input_ids": tokens}, *batches):
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                cached.states[batch_of(**batch)] = at_head(model, inputs, lambda hidden, module: hidden).cpu()
        return cached

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
        """Logits of shape (rows, length, vocab); those on padding are meaningless.

        Raises:
            KeyError: if the base has not read this batch.
        """
        hidden = self.states[batch_of(input_ids, attention_mask)]
        return SimpleNamespace(logits=self.head.logits(hidden.to(self.device)))


class MeasuredBase:
    """A base against which several tuned models are measured; its own predictions and answers are computed once::

        base = MeasuredBase(load_model("base"))
        reports = [measure(base, load_model(name), texts, tokenizer=tokenizer) for name in ("a", "b")]

    Args:
        model: the base; it must not change.
        max_bytes: memory for hidden states; texts beyond it are read again for every tuned model.
    """

    def __init__(self, model: Any, max_bytes: int = MAX_STATES_BYTES) -> None:
        self.model, self.free_bytes = model, max_bytes
        form = find_head_form(model) if max_bytes else None
        self.cached = None if form is None else HiddenStates(model.config, form.head(model.get_output_embeddings()))
        self._answers: dict[str, Any] = {}
        self._probe: Tensor | None = None

    @classmethod
    def of(cls, base: Any) -> MeasuredBase:
        """`base` itself if it is a `MeasuredBase`, else a `MeasuredBase` that caches no hidden states."""
        return base if isinstance(base, cls) else cls(base, max_bytes=0)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the base's weights; reads all of them."""
        return model_fingerprint(self.model)

    def check_unchanged(self) -> None:
        """Refuse a base whose predictions changed since this was first called, or are NaN."""
        log_probs = probe(self.model)
        if self._probe is None:
            self._probe = log_probs
        if bool(log_probs.isnan().any()):
            raise ValueError("base: its predictions are NaN; check how it was trained and saved, or load it in float32")
        if not torch.equal(log_probs, self._probe):
            raise ValueError("base: it changed after it was first measured; make a new MeasuredBase of it")

    def logits(self, **inputs: Tensor) -> Float[Tensor, "rows length vocab"]:
        """The base's logits for `input_ids` and `attention_mask`, from cached hidden states if there are any."""
        length = inputs["input_ids"].shape[1]
        if self.cached is None:
            return self.model(**inputs, use_cache=False).logits[:, -length:]
        batch = batch_of(**inputs)
        if batch in self.cached.states:
            return self.cached(**inputs).logits
        with seen_by_head(self.model) as seen:
            logits = self.model(**inputs, use_cache=False).logits[:, -length:]
        hidden = seen[0][:, -length:]
        if hidden.nbytes <= self.free_bytes:
            self.free_bytes -= hidden.nbytes
            self.cached.states[batch] = hidden.contiguous().cpu()
        return logits

    def recall(self, kind: str, parts: Sequence[Any], make: Callable[[], Any]) -> Any:
        """`make()`, cached by `kind` and `parts`: everything that the result depends on besides the base."""
        key = hashlib.sha256(json.dumps([kind, parts]).encode()).hexdigest()
        if key not in self._answers:
            self._answers[key] = make()
        return copy.deepcopy(self._answers[key])
