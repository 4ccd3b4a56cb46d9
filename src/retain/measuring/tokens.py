"""Token-level forgetting on named texts: metrics with intervals, noise floor, and the documents that moved most.

Everything is first summed per document, in nats, because intervals resample documents, not tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retain.data.rows import Document, without_copies
from retain.files import visible
from retain.losses import expectation, shifted
from retain.measuring.paired_answers import report_entry
from retain.models.base_predictions import MeasuredBase
from retain.progress import StageProgress
from retain.report.metrics import BITS_PER_BYTE, GAIN, KEPT_SUMS, METRICS, SUMS
from retain.statistics import bootstrap_ratio, resample_counts, share_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Float[Tensor, "rows length vocab"]]
MEASURING = "measuring"  # the kind of a text's progress stage
CHUNK = 1 << 22  # float32 logits held at once: 16 MiB, which the allocator can reuse from its heap
NOISE_DOCUMENTS = 4  # documents per text on which the base is compared with itself
WORST_DOCUMENTS = 2  # documents per text shown token by token
MAX_TABLE_TOKENS = 240  # tokens shown per document


@dataclass(frozen=True)
class Options:
    """Settings of `measure`, where they are described, and `start_id`, the token that starts a document."""

    tokenizer: PreTrainedTokenizerBase
    start_id: int
    batch_tokens: int = 2048
    max_new_tokens: int = 48
    num_resamples: int = 2000
    seed: int = 0
    progress: Callable[[str], object] | None = None

    def stage(self, name: str) -> None:
        """Report the name of the stage that begins."""
        if self.progress is not None:
            self.progress(name)


@dataclass(frozen=True)
class DocumentSums:
    """Per-document sums, each of shape (documents,), in nats or counts; the keys of `values` are `SUMS`."""

    values: dict[str, np.ndarray]
    num_tokens: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    def kept(self) -> dict[str, list[float]]:
        """What files keep per document for paired intervals: sums in nats, rounded to six places, and tokens."""
        sums = {name: self.values[name].round(6).tolist() for name in KEPT_SUMS}
        return sums | {"num_tokens": self.num_tokens.tolist()}


def batches(documents: Sequence[Document], batch_tokens: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Batches of windows of similar length, at most `batch_tokens` padded tokens each: (document indices, windows)."""
    windows = [(index, window) for index, document in enumerate(documents) for window in document.windows]
    windows.sort(key=lambda pair: -len(pair[1]))
    while windows:
        rows = max(1, batch_tokens // len(windows[0][1]))
        batch, windows = windows[:rows], windows[rows:]
        yield [index for index, _ in batch], [window for _, window in batch]


def padded(windows: Sequence[Sequence[int]]) -> dict[str, Int[Tensor, "rows length"]]:
    """`input_ids` and `attention_mask`, right-padded with 0."""
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
    """Sum every quantity in `SUMS` over the positions of each row where `mask` is True, a few positions at a time."""
    totals = {name: torch.zeros(len(logits), dtype=torch.float64) for name in SUMS}
    positions = max(1, CHUNK // (logits.shape[0] * logits.shape[2]))
    for at in range(0, logits.shape[1], positions):
        part = slice(at, at + positions)
        for name, value in token_values(ref_logits[:, part], logits[:, part], targets[:, part]).items():
            totals[name] += value.masked_fill(~mask[:, part], 0.0).double().sum(-1).cpu()
    return totals


@dataclass(frozen=True)
class Predictions:
    """A model's predictions at each position: float32 log-probabilities, and the likeliest token."""

    log_probs: Float[Tensor, "*batch vocab"]
    top: Int[Tensor, "*batch"]

    @classmethod
    def of(cls, logits: Float[Tensor, "*batch vocab"]) -> Predictions:
        return cls(torch.log_softmax(logits.float(), dim=-1), logits.argmax(-1))

    @cached_property
    def probs(self) -> Float[Tensor, "*batch vocab"]:
        return self.log_probs.exp()

    def loss(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """−log p(token), nats."""
        return -self.log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def expectation(self, values: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
        """Mean of `values` under the model's distribution."""
        return expectation(self.probs, values)


def token_values(
    ref_logits: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]
) -> dict[str, Float[Tensor, "*batch"]]:
    """Every quantity in `SUMS` at every position, in nats or counts; each softmax is computed once."""
    base, model = Predictions.of(ref_logits), Predictions.of(logits)
    quantities = ((name, METRICS[name].per_token) for name in SUMS)
    return {name: per_token(base, model, targets) for name, per_token in quantities if per_token}


def measuring_title(text: str) -> str:
    """The name of the progress stage in which a text is measured."""
    return f"measuring {visible(text)}"


@torch.no_grad()
def document_sums(
    ref_forward: Forward,
    forward: Forward,
    documents: Sequence[Document],
    *,
    batch_tokens: int,
    device: torch.device | str = "cpu",
    text: str = "text",
    title: str | None = None,
) -> DocumentSums:
    """Per-document sums of `SUMS` for two models, which see the same batches in the same order.

    Args:
        ref_forward, forward: `input_ids`, `attention_mask` → logits.
        batch_tokens: padded tokens per forward pass.
        text: the name of these documents, for errors.
        title: the name of the progress stage; None shows no progress.

    Raises:
        ValueError: if a sum is not finite, naming the model, the document and the remedy.
    """
    values = {name: np.zeros(len(documents)) for name in SUMS}
    total = sum(len(window) for document in documents for window in document.windows)
    progress = StageProgress(title, total, "tokens", MEASURING, work=1) if title else nullcontext()
    with progress as stage:
        for indices, windows in batches(documents, batch_tokens):
            inputs = {name: value.to(device) for name, value in padded(windows).items()}
            targets, mask = shifted(inputs["input_ids"], inputs["attention_mask"])
            for row, (index, window) in enumerate(zip(indices, windows, strict=True)):
                if documents[index].masks is not None:
                    mask[row, : len(window) - 1] = torch.tensor(documents[index].mask_of(window)[1:])
            ref_logits, logits = ref_forward(**inputs)[:, :-1], forward(**inputs)[:, :-1]
            for name, sums in token_sums(ref_logits, logits, targets, mask).items():
                np.add.at(values[name], indices, sums.numpy())
            if stage is not None:
                stage.update(sum(map(len, windows)))
    # The base's sums come first, and those that depend on both models last.
    for name in sorted(SUMS, key=lambda name: (not name.startswith("base_"), name != "loss")):
        who = "base" if name.startswith("base_") else "model"
        for at, value in enumerate(values[name], start=1):
            check_finite(value, f"{who}: its {name.removeprefix('base_')} on document {at} of {text!r} is")
    num_tokens = np.array([document.num_tokens for document in documents])
    return DocumentSums(values, num_tokens, np.array([document.num_bytes for document in documents]))


def check_finite(value: float, what: str) -> None:
    """Raise a `ValueError` that begins with `what` and names cause and remedy if a loss is not finite."""
    if math.isfinite(value):
        return
    remedy = "it gives a token there zero probability: leave the text out, or unmask its vocabulary"
    if math.isnan(value):
        remedy = "its weights or dtype produce NaN: check how it was trained and saved, and load it in float32"
    raise ValueError(f"{what} {value:g}; {remedy}")


def summarize(sums: DocumentSums, *, seed: int = 0, num_resamples: int = 2000) -> dict[str, dict[str, Any]]:
    """Every metric of `METRICS` by name, each with its value, 95% interval over documents, and sample sizes.

    A share's interval is never narrower than Wilson's over tokens, whose width is not 0 even at 100%.
    """
    num_bytes = np.maximum(sums.num_bytes, 1) * np.log(2)
    result = {}
    counts = resample_counts(len(sums), num_resamples, seed)
    for name, metric in METRICS.items():
        numerator = metric.total(sums.values) if metric.total else sums.values[name]
        denominator = num_bytes if metric.unit == BITS_PER_BYTE else sums.num_tokens
        within = (metric.least, metric.most)
        value, low, high = bootstrap_ratio(numerator, denominator, counts=counts, within=within)
        if metric.is_share:
            _, least, most = share_interval(round(numerator.sum()), int(denominator.sum()))
            low, high = min(low, least), max(high, most)  # NaN stays
        result[name] = report_entry(value, low, high, num_documents=len(sums), num_tokens=int(sums.num_tokens.sum()))
    return result


def logits_at(model: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "rows length vocab"]:
    """Logits at the positions of the input, without those of prompt tuning's virtual tokens before it."""
    return model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]


def logits_of(model: Any) -> Forward:
    """A model as a function of `input_ids` and `attention_mask` that returns logits."""
    return lambda **inputs: logits_at(model, inputs)


def row_by_row(model: Any) -> Forward:
    """`logits_of` one unpadded row at a time, which differs from the batched pass by the kernels' rounding only."""

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        width = input_ids.shape[1]
        rows = []
        for ids, length in zip(input_ids, attention_mask.sum(-1).tolist(), strict=True):
            logits = logits_at(model, {"input_ids": ids[None, :length]})
            rows.append(torch.nn.functional.pad(logits, (0, 0, 0, width - length)) if length < width else logits)
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    return forward


def text_results(
    base: MeasuredBase,
    tuned: PreTrainedModel,
    new_task: dict[str, list[Document]],
    retention: dict[str, list[Document]],
    options: Options,
) -> dict[str, Any]:
    """The token-level parts of a report: metrics per text, noise floor, sums per document, and worst documents."""
    result: dict[str, Any] = {name: {} for name in ("retention", "new_task", "noise_floor", "per_document", "worst")}
    result["warnings"] = []
    if new_task or retention:
        options.stage("measuring texts")
    for text, all_documents in (new_task | retention).items():
        documents, notes = without_copies(text, all_documents, "documents")
        result["warnings"] += notes
        sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": tuned.device}
        sums = document_sums(base.logits, logits_of(tuned), documents, text=text, title=measuring_title(text), **sizes)
        metrics = _summary(sums, options)
        result["per_document"][text] = sums.kept()
        if text in new_task:
            result["new_task"][text] = metrics | {GAIN.name: negated(metrics["forgetting"])}
            continue
        result["retention"][text] = metrics
        result["noise_floor"][text] = _noise_floor(base, documents[:NOISE_DOCUMENTS], text, options)
        places = {id(document): at for at, document in enumerate(all_documents)}  # before copies were left out
        worst = _worst(base, tuned, documents, sums, options.tokenizer)
        result["worst"][text] = [row | {"document": places[id(documents[row["document"]])]} for row in worst]
    return result


def _summary(sums: DocumentSums, options: Options) -> dict[str, Any]:
    return summarize(sums, seed=options.seed, num_resamples=options.num_resamples)


def _noise_floor(base: MeasuredBase, documents: Sequence[Document], text: str, options: Options) -> dict[str, Any]:
    def against_itself() -> dict[str, Any]:
        sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": base.model.device}
        sizes |= {"text": text, "title": f"noise floor of {visible(text)}"}
        return _summary(document_sums(logits_of(base.model), row_by_row(base.model), documents, **sizes), options)

    rows = [[document.windows, document.num_bytes, document.masks] for document in documents]
    parts = [rows, options.batch_tokens, options.seed, options.num_resamples]
    noise: dict[str, Any] = base.recall("noise", parts, against_itself)
    return noise


def _worst(
    base: MeasuredBase,
    tuned: PreTrainedModel,
    documents: Sequence[Document],
    sums: DocumentSums,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The documents with the largest ref_kl per token, and what changed at each token of their first window."""
    per_token = sums.values["ref_kl"] / sums.num_tokens
    forgetting = (sums.values["loss"] - sums.values["base_loss"]) / sums.num_tokens
    rows = []
    for at in np.argsort(-per_token, kind="stable")[:WORST_DOCUMENTS].tolist():
        facts = {"document": at, "num_tokens": int(sums.num_tokens[at])}
        facts |= {"ref_kl": float(per_token[at]), "forgetting": float(forgetting[at])}
        rows.append(facts | {"tokens": token_table(base.model, tuned, documents[at].windows[0], tokenizer)})
    return rows


@torch.no_grad()
def token_table(
    base: PreTrainedModel, tuned: PreTrainedModel, window: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """For each token of a window, both models' losses and ref_kl in nats, and the likeliest token of each."""
    inputs = {name: value.to(base.device) for name, value in padded([window[: MAX_TABLE_TOKENS + 1]]).items()}
    targets, _ = shifted(inputs["input_ids"])
    before, after = (logits_of(model)(**inputs)[:, :-1] for model in (base, tuned))
    values = {name: value[0].tolist() for name, value in token_values(before, after, targets).items()}
    tops = [logits.argmax(-1)[0].tolist() for logits in (before, after)]
    rows = []
    for at, token in enumerate(targets[0].tolist()):
        ids = {"text": token, "base_top": tops[0][at], "tuned_top": tops[1][at]}
        texts = {name: str(tokenizer.decode([index])) for name, index in ids.items()}
        rows.append(texts | {name: round(values[name][at], 5) for name in KEPT_SUMS})
    return rows


def negated(metric: dict[str, Any]) -> dict[str, Any]:
    """A metric with the opposite sign, and its interval's ends swapped."""
    low, high = metric["ci"]
    interval = [None, None] if low is None else [-high, -low]
    return {**metric, "value": -metric["value"], "ci": interval}
