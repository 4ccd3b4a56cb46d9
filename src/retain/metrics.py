"""Token-level forgetting of a model against its base, with intervals over documents.

Everything is summed per document first: documents, not tokens, are what is resampled. All sums are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retain.data import Document, tokenize_documents
from retain.losses import kl_divergence, next_token_loss, shifted
from retain.models import (
    choose_start_token,
    max_positions,
    model_fingerprint,
    num_parameters,
    tokenizer_fingerprint,
)
from retain.reference import evaluation_mode
from retain.report import ForgettingReport
from retain.statistics import bootstrap_ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Forward = Callable[..., Float[Tensor, "rows length vocab"]]
NOISE_DOCUMENTS = 8
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
        ref_top, top = ref.argmax(-1), live.argmax(-1)
        ref_log_probs = torch.log_softmax(ref, dim=-1)
        found = {
            "loss": next_token_loss(live, target),
            "base_loss": next_token_loss(ref, target),
            "ref_kl": kl_divergence(ref, live),
            "entropy": -(ref_log_probs.exp() * ref_log_probs).sum(-1),
            "argmax_loss": next_token_loss(live, ref_top),
            "base_argmax_loss": next_token_loss(ref, ref_top),
            "agreement": (ref_top == top).float(),
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


def logits_of(model: Any) -> Forward:
    """A model as a function from `input_ids` and `attention_mask` to logits.

    Logits at the input's own positions: prompt tuning puts virtual tokens before them.
    """
    return lambda **inputs: model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    start_id: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations, one prompt at a time so that padding plays no part."""
    texts = []
    for prompt in prompts:
        ids = [start_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=start_id,
        )
        texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return texts


def default_prompts(texts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tokens: int = 16) -> list[str]:
    """The first few tokens of the first document of each text, to be continued by both models."""
    prompts = []
    for source in texts.values():
        first = source[0]
        ids = (
            first.windows[0][1:]
            if isinstance(first, Document)
            else tokenizer(first, add_special_tokens=False)["input_ids"]
        )
        prompts.append(str(tokenizer.decode(ids[:tokens])))
    return prompts


def measure(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    retention: Mapping[str, Iterable[str] | Sequence[Document]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    new_task: Mapping[str, Iterable[str] | Sequence[Document]] | None = None,
    prompts: Sequence[str] = (),
    name: str = "tuned",
    start_token: str | int | None = None,
    max_length: int = 512,
    max_windows: int | None = None,
    batch_tokens: int = 2048,
    max_new_tokens: int = 48,
    num_resamples: int = 2000,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> ForgettingReport:
    """Measure how much `tuned` forgot of `base`.

    Args:
        retention: name → texts (or documents of tokens) on which forgetting is measured; never replay rows.
        new_task: name → held-out texts of the new task, for the gain.
        prompts: continued greedily by both models, side by side.
        max_length: longest window in tokens; longer documents are cut into several.
        max_windows: measure only so many windows of each document.
        progress: called with the name of each stage.

    Returns:
        A report; `report.data["retention"][name][metric]` is `{"value", "ci", "num_documents", "num_tokens"}`.

    Raises:
        ValueError: if the models differ in dtype, attention kernel or vocabulary, windows are longer than they can
            take, or a text has no documents.
    """
    _check_comparable(base, tuned)
    limit = max_positions(base)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length: {max_length} is more than this model's {limit} positions; use at most {limit}")
    start = choose_start_token(tokenizer, start_token)
    say = progress or (lambda stage: None)
    sums = partial(document_sums, logits_of(base), batch_tokens=batch_tokens, device=base.device)
    summary = partial(summarize, seed=seed, num_resamples=num_resamples)
    cut = partial(as_documents, tokenizer=tokenizer, start_id=start.id, max_length=max_length, max_windows=max_windows)

    result: dict[str, Any] = {"retention": {}, "new_task": {}, "noise_floor": {}, "generations": []}
    with evaluation_mode(base), evaluation_mode(tuned):
        for text, source in (new_task or {}).items():
            say(f"measuring {text}")
            metrics = summary(sums(logits_of(tuned), cut(text, source)))
            result["new_task"][text] = metrics | {"gain": _negated(metrics["forgetting"])}
        for text, source in retention.items():
            say(f"measuring {text}")
            documents = cut(text, source)
            result["retention"][text] = summary(sums(logits_of(tuned), documents))
            result["noise_floor"][text] = summary(sums(row_by_row(base), documents[:NOISE_DOCUMENTS]))
        if prompts:
            say("writing continuations")
            texts = [continuations(model, tokenizer, prompts, start.id, max_new_tokens) for model in (base, tuned)]
            result["generations"] = [
                {"prompt": prompt, "base": before, "tuned": after}
                for prompt, before, after in zip(prompts, *texts, strict=True)
            ]
    settings = {
        "max_length": max_length,
        "max_windows": max_windows,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "num_resamples": num_resamples,
        "start_token": str(start),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    return ForgettingReport(_header(base, tuned, name, settings) | result)


def as_documents(
    name: str,
    source: Iterable[str] | Sequence[Document],
    *,
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    max_length: int,
    max_windows: int | None,
) -> list[Document]:
    """Texts cut into windows, or documents as they are.

    Raises:
        ValueError: if nothing is left to measure.
    """
    items = list(source)
    if items and isinstance(items[0], Document):
        documents: list[Document] = items  # type: ignore[assignment]
    else:
        texts = cast("list[str]", items)
        documents = tokenize_documents(texts, tokenizer, start_id, max_length, max_windows=max_windows)
    if not documents:
        raise ValueError(f"retention: {name!r} has no text to measure; give documents of at least one token")
    return documents


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


def _negated(metric: dict[str, Any]) -> dict[str, Any]:
    low, high = metric["ci"]
    interval = [None, None] if low is None else [-high, -low]
    return {**metric, "value": -metric["value"], "ci": interval}


def _check_comparable(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    for what, of_base, of_tuned in (
        ("dtype", base.dtype, tuned.dtype),
        ("attn_implementation", base.config._attn_implementation, tuned.config._attn_implementation),
        ("vocabulary", *(model.get_output_embeddings().weight.shape[0] for model in (base, tuned))),
    ):
        if of_base != of_tuned:
            raise ValueError(
                f"{what}: base has {of_base}, model has {of_tuned}; load both alike, or the difference is the result"
            )


def _header(base: PreTrainedModel, tuned: PreTrainedModel, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    from retain import versions

    def identity(model: PreTrainedModel) -> dict[str, Any]:
        path = model.config._name_or_path
        return {"model": path, "fingerprint": model_fingerprint(model), "num_params": num_parameters(model)}

    return {
        "schema": "retain.report/1",
        "name": name,
        "base": identity(base),
        "tuned": identity(tuned),
        "settings": {
            **settings,
            "dtype": str(base.dtype).removeprefix("torch."),
            "attn_implementation": base.config._attn_implementation,
            "device": str(base.device),
        },
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "training": None,
        "trajectory": [],
        "documents": [],
    }
