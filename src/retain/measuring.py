"""`measure`: a tuned model against its base on named texts, with a noise floor, continuations, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from retain.data import Document, as_documents
from retain.metrics import document_sums, logits_of, row_by_row, summarize
from retain.models import (
    choose_start_token,
    display_name,
    max_positions,
    model_fingerprint,
    num_parameters,
    tokenizer_fingerprint,
)
from retain.reference import evaluation_mode
from retain.report import ForgettingReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOISE_DOCUMENTS = 4  # documents of each text on which the base is measured against itself


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
        name = display_name(model.config._name_or_path)
        return {"model": name, "fingerprint": model_fingerprint(model), "num_params": num_parameters(model)}

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
