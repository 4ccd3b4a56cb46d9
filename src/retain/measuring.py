"""`measure`: a tuned model against its base on named texts and questions, with a noise floor, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retain.callbacks import read_run
from retain.capabilities.choices import Question, load_questions, measure_choices
from retain.data import Document, as_documents, named_sources, prompt_text, read_rows
from retain.metrics import document_sums, logits_of, row_by_row, summarize
from retain.models import (
    choose_start_token,
    default_device,
    display_name,
    load_model,
    load_tokenizer,
    max_positions,
    model_fingerprint,
    num_parameters,
    tokenizer_fingerprint,
    tokenizer_of_tuned,
)
from retain.reference import evaluation_mode
from retain.replay import load_texts
from retain.report import ForgettingReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retain.config import MeasureConfig

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
    choices: Mapping[str, Sequence[Question]] | None = None,
    choice_style: str = "text",
    choice_chat_template: bool = False,
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
        choices: name → multiple-choice questions that both models answer.
        choice_style: `text` scores each choice's words, `letter` the letters of choices listed in the question.
        choice_chat_template: put each question as a user's turn.
        prompts: continued greedily by both models, side by side.
        max_length: longest window in tokens; longer documents are cut into several.
        max_windows: measure only so many windows of each document.
        progress: called with the name of each stage; the questions then have a bar of their own.

    Returns:
        A report; `report.data["retention"][name][metric]` is `{"value", "ci", "num_documents", "num_tokens"}`, and
        `report.data["choices"][name]["rules"][rule]` what `compare_answers` found.

    Raises:
        ValueError: if the models differ in dtype, attention kernel or vocabulary, windows are longer than they can
            take, or a text has no documents.
    """
    _check_comparable(base, tuned)
    limit = max_positions(base)
    if limit is not None and max_length > limit and (retention or new_task):
        raise ValueError(f"max_length: {max_length} is more than this model's {limit} positions; use at most {limit}")
    start = choose_start_token(tokenizer, start_token)
    say = progress or (lambda stage: None)
    shared: dict[str, Any] = {"batch_tokens": batch_tokens, "seed": seed, "num_resamples": num_resamples}
    asking = {"tokenizer": tokenizer, "style": choice_style, "chat_template": choice_chat_template, **shared}
    cut = partial(as_documents, tokenizer=tokenizer, start_id=start.id, max_length=max_length, max_windows=max_windows)
    with evaluation_mode(base), evaluation_mode(tuned):
        result = _on_texts(base, tuned, new_task or {}, retention, cut, say, **shared)
        for questions, source in (choices or {}).items():
            say(f"asking {questions}")
            bar = questions if progress else None
            result["choices"][questions] = measure_choices(base, tuned, source, description=bar, **asking)
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
        **shared,
        "start_token": str(start),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    return ForgettingReport(_header(base, tuned, name, settings) | result)


def _on_texts(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    new_task: Mapping[str, Any],
    retention: Mapping[str, Any],
    cut: Callable[[str, Any], list[Document]],
    say: Callable[[str], object],
    *,
    batch_tokens: int,
    seed: int,
    num_resamples: int,
) -> dict[str, Any]:
    """The parts of a report that token-level losses on texts fill."""
    sums = partial(document_sums, logits_of(base), batch_tokens=batch_tokens, device=base.device)
    summary = partial(summarize, seed=seed, num_resamples=num_resamples)
    result: dict[str, Any] = {"retention": {}, "new_task": {}, "noise_floor": {}, "choices": {}, "generations": []}
    for text, source in new_task.items():
        say(f"measuring {text}")
        metrics = summary(sums(logits_of(tuned), cut(text, source)))
        result["new_task"][text] = metrics | {"gain": _negated(metrics["forgetting"])}
    for text, source in retention.items():
        say(f"measuring {text}")
        documents = cut(text, source)
        result["retention"][text] = summary(sums(logits_of(tuned), documents))
        result["noise_floor"][text] = summary(sums(row_by_row(base), documents[:NOISE_DOCUMENTS]))
    return result


def run_measure(config: MeasureConfig, say: Callable[[str], object]) -> ForgettingReport:
    """`retain measure`: load the texts, the questions and both models, and measure."""
    assert config.base is not None
    assert config.model is not None
    groups = [named_sources(getattr(config, name), name) for name in ("retention", "new_task", "choices")]
    trust = config.trust_remote_code
    tokenizer = load_tokenizer(config.base, revision=config.model_revision, trust_remote_code=trust)
    retention, new_task = (
        {name: load_texts(source, tokenizer, config.max_documents) for name, source in group.items()}
        for group in groups[:2]
    )
    choices = {
        name: load_questions(source, max_questions=config.max_questions, seed=config.seed)
        for name, source in groups[2].items()
    }
    if config.prompts:
        prompts = [prompt_text(row, tokenizer) for row in read_rows(config.prompts)]
    else:
        prompts = default_prompts({**new_task, **retention}, tokenizer)
    tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=trust)
    base, tuned = _load_both(config)
    names = ("choice_style", "choice_chat_template", "start_token", "max_length", "batch_tokens", "max_new_tokens")
    options: dict[str, Any] = {name: getattr(config, name) for name in (*names, "num_resamples", "seed")}
    options |= {"tokenizer": tokenizer, "name": Path(config.model).name, "progress": say}
    report = measure(base, tuned, retention, new_task=new_task, choices=choices, prompts=prompts, **options)
    report.data.update(read_run(Path(config.model)))
    return report


def _load_both(config: MeasureConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base as asked for, and the tuned model with the same dtype, kernel and device."""
    base = load_model(
        str(config.base),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        device=default_device(),
    )
    tuned = load_model(
        str(config.model),
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        trust_remote_code=config.trust_remote_code,
        device=base.device,
    )
    return base, tuned


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
