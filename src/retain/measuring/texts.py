"""Token-level forgetting on named texts, with a noise floor and the worst documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retain.data.rows import Document, without_copies
from retain.losses import shifted
from retain.measuring.measure_options import Options
from retain.measuring.tokens import DocumentSums, document_sums, logits_of, padded, row_by_row, summarize, token_values
from retain.models.base_predictions import MeasuredBase
from retain.report.metrics import GAIN, KEPT_SUMS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOISE_DOCUMENTS = 4  # documents of each text on which the base is measured against itself
WORST_DOCUMENTS = 2  # of each text, shown token by token
MAX_TABLE_TOKENS = 240  # of each of them


def text_results(
    base: MeasuredBase,
    tuned: PreTrainedModel,
    new_task: dict[str, list[Document]],
    retention: dict[str, list[Document]],
    options: Options,
) -> dict[str, Any]:
    """The parts of a report that token-level losses fill."""
    result: dict[str, Any] = {name: {} for name in ("retention", "new_task", "noise_floor", "per_document", "worst")}
    result["warnings"] = []
    if new_task or retention:
        options.stage("measuring texts")
    for text, given in (new_task | retention).items():
        documents, notes = without_copies(text, given, "documents")
        result["warnings"] += notes
        sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": tuned.device}
        sums = document_sums(base.logits, logits_of(tuned), documents, text=text, shown=True, **sizes)
        metrics = _summary(sums, options)
        result["per_document"][text] = sums.kept()
        if text in new_task:
            result["new_task"][text] = metrics | {GAIN.name: negated(metrics["forgetting"])}
            continue
        result["retention"][text] = metrics
        result["noise_floor"][text] = _noise_floor(base, documents[:NOISE_DOCUMENTS], options)
        places = {id(document): at for at, document in enumerate(given)}  # in the text's own order
        worst = _worst(base, tuned, documents, sums, options.tokenizer)
        result["worst"][text] = [row | {"document": places[id(documents[row["document"]])]} for row in worst]
    return result


def _summary(sums: DocumentSums, options: Options) -> dict[str, Any]:
    return summarize(sums, seed=options.seed, num_resamples=options.num_resamples)


def _noise_floor(base: MeasuredBase, documents: Sequence[Document], options: Options) -> dict[str, Any]:
    def against_itself() -> dict[str, Any]:
        sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": base.model.device}
        return _summary(document_sums(logits_of(base.model), row_by_row(base.model), documents, **sizes), options)

    rows = [[document.windows, document.num_bytes, document.masks] for document in documents]
    parts = [rows, options.batch_tokens, options.seed, options.num_resamples]
    found: dict[str, Any] = base.recall("noise", parts, against_itself)
    return found


def _worst(
    base: MeasuredBase,
    tuned: PreTrainedModel,
    documents: Sequence[Document],
    sums: DocumentSums,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The documents that moved most per token, and what changed at each of their first tokens."""
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
    """Token by token of a window: losses of both (nats), ref_kl, and what each puts first."""
    inputs = {name: value.to(base.device) for name, value in padded([window[: MAX_TABLE_TOKENS + 1]]).items()}
    targets, _ = shifted(inputs["input_ids"])
    before, after = (logits_of(model)(**inputs)[:, :-1] for model in (base, tuned))
    values = {name: value[0].tolist() for name, value in token_values(before, after, targets).items()}
    tops = [one.argmax(-1)[0].tolist() for one in (before, after)]
    rows = []
    for at, token in enumerate(targets[0].tolist()):
        ids = {"text": token, "base_top": tops[0][at], "tuned_top": tops[1][at]}
        words = {name: str(tokenizer.decode([one])) for name, one in ids.items()}
        rows.append(words | {name: round(values[name][at], 5) for name in KEPT_SUMS})
    return rows


def negated(metric: dict[str, Any]) -> dict[str, Any]:
    """A metric with the other sign, its interval turned round."""
    low, high = metric["ci"]
    interval = [None, None] if low is None else [-high, -low]
    return {**metric, "value": -metric["value"], "ci": interval}
