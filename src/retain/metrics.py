"""Token-level forgetting of a model against its base, with intervals over documents.

Everything is summed per document first: documents, not tokens, are what is resampled. All sums are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retain.data import Document
from retain.losses import agreement, argmax_cross_entropy, cross_entropy, kl_divergence, next_token_loss, shifted
from retain.statistics import bootstrap_ratio

Forward = Callable[..., Float[Tensor, "rows length vocab"]]
CHUNK = 128  # positions whose float32 logits are held at once
SUMS = ("loss", "base_loss", "ref_kl", "entropy", "argmax_loss", "base_argmax_loss", "agreement")


@dataclass(frozen=True)
class DocumentSums:
    """Per-document sums, each of shape (documents,); nats but for counts. `SUMS` names the keys of `values`."""

    values: dict[str, np.ndarray]
    num_tokens: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)


def batches(documents: Sequence[Document], batch_tokens: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Windows of like length together, at most `batch_tokens` padded tokens each: (document indices, windows)."""
    windows = [(index, window) for index, document in enumerate(documents) for window in document.windows]
    windows.sort(key=lambda pair: -len(pair[1]))
    while windows:
        rows = max(1, batch_tokens // len(windows[0][1]))
        taken, windows = windows[:rows], windows[rows:]
        yield [index for index, _ in taken], [window for _, window in taken]


def padded(windows: Sequence[Sequence[int]]) -> dict[str, Int[Tensor, "rows length"]]:
    """`input_ids` and `attention_mask`, padded at the right with id 0 and masked there."""
    width = max(map(len, windows))
    input_ids = torch.tensor([[*window, *[0] * (width - len(window))] for window in windows])
    mask = torch.tensor([[1] * len(window) + [0] * (width - len(window)) for window in windows])
    return {"input_ids": input_ids, "attention_mask": mask}


def token_sums(
    ref_logits: Float[Tensor, "rows length vocab"],
    logits: Float[Tensor, "rows length vocab"],
    targets: Int[Tensor, "rows length"],
    mask: Tensor,
) -> dict[str, Float[Tensor, rows]]:
    """Sums over the masked positions of each row of every quantity in `SUMS`; float32, a few positions at a time."""
    totals = {name: torch.zeros(len(logits), dtype=torch.float64) for name in SUMS}
    for at in range(0, logits.shape[1], CHUNK):
        part = slice(at, at + CHUNK)
        ref, live, target = ref_logits[:, part].float(), logits[:, part].float(), targets[:, part]
        found = {
            "loss": next_token_loss(live, target),
            "base_loss": next_token_loss(ref, target),
            "ref_kl": kl_divergence(ref, live),
            "entropy": cross_entropy(ref, ref),
            "argmax_loss": argmax_cross_entropy(ref, live),
            "base_argmax_loss": argmax_cross_entropy(ref, ref),
            "agreement": agreement(ref, live).float(),
        }
        for name, value in found.items():
            totals[name] += value.masked_fill(~mask[:, part], 0.0).double().sum(-1).cpu()
    return totals


@torch.no_grad()
def document_sums(
    ref_forward: Forward,
    forward: Forward,
    documents: Sequence[Document],
    *,
    batch_tokens: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> DocumentSums:
    """Measure `forward` against `ref_forward` on documents; both see the same batches in the same order.

    Args:
        ref_forward, forward: `input_ids`, `attention_mask` → logits.
        batch_tokens: padded tokens per forward pass.
        progress: called with the number of windows just measured.
    """
    values = {name: np.zeros(len(documents)) for name in SUMS}
    for indices, windows in batches(documents, batch_tokens):
        inputs = {name: value.to(device) for name, value in padded(windows).items()}
        targets, mask = shifted(inputs["input_ids"], inputs["attention_mask"])
        ref_logits, logits = ref_forward(**inputs)[:, :-1], forward(**inputs)[:, :-1]
        for name, sums in token_sums(ref_logits, logits, targets, mask).items():
            np.add.at(values[name], indices, sums.numpy())
        if progress is not None:
            progress(len(windows))
    num_tokens = np.array([document.num_tokens for document in documents])
    return DocumentSums(values, num_tokens, np.array([document.num_bytes for document in documents]))


def summarize(sums: DocumentSums, *, seed: int = 0, num_resamples: int = 2000) -> dict[str, dict[str, Any]]:
    """Every metric by name, each with value, 95% interval over documents, and sample sizes.

    Nats per token, but `ref_agreement` (share of tokens) and the bits per byte. The base's own value stands beside
    each cross-entropy, for comparison: `ref_cross_entropy` = entropy of the base + `ref_kl`.
    """
    values, tokens = sums.values, sums.num_tokens
    num_bytes = np.maximum(sums.num_bytes, 1) * np.log(2)
    ratios = {
        "forgetting": (values["loss"] - values["base_loss"], tokens),
        "loss": (values["loss"], tokens),
        "base_loss": (values["base_loss"], tokens),
        "ref_kl": (values["ref_kl"], tokens),
        "ref_cross_entropy": (values["entropy"] + values["ref_kl"], tokens),
        "base_ref_cross_entropy": (values["entropy"], tokens),
        "ref_argmax_cross_entropy": (values["argmax_loss"], tokens),
        "base_ref_argmax_cross_entropy": (values["base_argmax_loss"], tokens),
        "ref_agreement": (values["agreement"], tokens),
        "bits_per_byte": (values["loss"], num_bytes),
        "base_bits_per_byte": (values["base_loss"], num_bytes),
    }
    result = {}
    for name, (numerator, denominator) in ratios.items():
        value, low, high = bootstrap_ratio(numerator, denominator, num_resamples=num_resamples, seed=seed)
        interval = [low, high] if np.isfinite(low) else [None, None]
        result[name] = {
            "value": value,
            "ci": interval,
            "num_documents": len(sums),
            "num_tokens": int(tokens.sum()),
        }
    return result


def logits_at(model: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "rows length vocab"]:
    """Logits at the input's own positions: prompt tuning puts virtual tokens before them."""
    return model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]


def logits_of(model: Any) -> Forward:
    """A model as a function from `input_ids` and `attention_mask` to logits."""
    return lambda **inputs: logits_at(model, inputs)


def row_by_row(model: Any) -> Forward:
    """The same model, one unpadded row at a time: against the batched pass it shows the noise of the kernels."""

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        width = input_ids.shape[1]
        rows = []
        for ids, length in zip(input_ids, attention_mask.sum(-1).tolist(), strict=True):
            logits = model(input_ids=ids[None, :length], use_cache=False).logits
            rows.append(torch.nn.functional.pad(logits, (0, 0, 0, width - length)))
        return torch.cat(rows)

    return forward
