"""`measure`: a tuned model against its base on named texts and questions, with a noise floor, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from retain import versions
from retain.checks import Unchosen, check_named, several
from retain.data.rows import OLD_TEXT, Document, Reading, Text, as_documents, without_copies
from retain.measuring.choices import Question, as_questions, measure_choices
from retain.measuring.generations import Prompt, measure_generations
from retain.measuring.options import Options
from retain.measuring.refusals import Judge, measure_refusals
from retain.measuring.texts import text_results
from retain.models.base_predictions import MeasuredBase
from retain.models.description import (
    check_predicts_tokens,
    choose_start_token,
    length_that_fits,
    model_fingerprint,
    num_parameters,
    tokenizer_fingerprint,
    unlike,
    with_least_room,
)
from retain.models.reference import evaluation_mode, runs_through
from retain.report.report import ForgettingReport

MOST_LOGITS = 1 << 27  # of a forward pass, 0.5 GB in float32; 2048 tokens of a vocabulary of 65k

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Texts = Iterable[str | Mapping[str, Any] | Text] | Sequence[Document]


def measure(
    base: PreTrainedModel | MeasuredBase,
    tuned: PreTrainedModel,
    retention: Mapping[str, Texts],
    *,
    tokenizer: PreTrainedTokenizerBase,
    new_task: Mapping[str, Texts] | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    choices: Mapping[str, Sequence[Question | Mapping[str, Any]]] | None = None,
    choice_style: str = "text",
    choice_chat_template: bool = False,
    refusals: Mapping[str, Sequence[str]] | None = None,
    harmless: Mapping[str, Sequence[str]] | None = None,
    judge: Judge | None = None,
    prompts: Sequence[str | Prompt] = (),
    sampled: bool = False,
    name: str = "tuned",
    start_token: str | int | None = None,
    max_length: int = Unchosen(512),
    max_windows: int | None = None,
    ci: float | None = None,
    batch_tokens: int = Unchosen(2048),
    max_new_tokens: int = 48,
    num_resamples: int = 2000,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> ForgettingReport:
    """Measure how much `tuned` forgot of `base`.

    Args:
        base: the base, or a `MeasuredBase` of it, which is asked once for several tuned models.
        retention: name → texts (words, rows, or documents of tokens) on which forgetting is measured; never replayed.
        new_task: name → held-out texts of the new task, for the gain; read as TRL's `SFTTrainer` reads training rows.
        completion_only_loss, assistant_only_loss: which tokens of the new task's rows count, as in `SFTConfig`.
        choices: name → multiple-choice questions that both models answer: of `load_questions`, or rows as in its files.
        choice_style: `text` scores each choice's words, `letter` the letters of choices listed in the question.
        choice_chat_template: put each question as a user's turn.
        refusals: name → harmful requests that both models answer.
        harmless: name → harmless requests, for over-refusal.
        judge: a model that is asked, too, whether an answer refuses.
        prompts: continued by both models, side by side: greedily, and with `sampled` once drawn at temperature 1.
        max_length: longest window in tokens, by default at most the model's positions; longer documents are cut.
        max_windows: measure only so many windows of each document.
        ci: draw only as many documents of each text as it takes for an interval of forgetting of ± so many nats per
            token; None measures all.
        progress: called with the name of each stage; long ones then have a bar of their own.

    Returns:
        A report; `report.data["retention"][name][metric]` is `{"value", "ci", "num_documents", "num_tokens"}`,
        `report.data["choices"][name]["rules"][rule]` what `compare_answers` found, and
        `report.data["refusals"][name]["scorers"][scorer]` what `compare_refusals` did.

    Raises:
        ValueError: if the models differ in dtype, attention kernel or vocabulary, windows are longer than they can
            take, or a text has no documents.
    """
    base = MeasuredBase.of(base)
    _check_comparable(base.model, tuned)
    _check_texts(retention, new_task or {})
    if retention or new_task:  # questions and requests have lengths of their own
        max_length = length_that_fits(with_least_room(base.model, tuned), max_length)
    start, batch_tokens = choose_start_token(tokenizer, start_token), tokens_that_fit(base.model, batch_tokens)
    options = Options(tokenizer, start.id, batch_tokens, max_new_tokens, ci, num_resamples, seed, progress)
    cut = partial(as_documents, tokenizer=tokenizer, start_id=start.id, max_length=max_length, max_windows=max_windows)
    trained = Reading(completion_only_loss, assistant_only_loss, as_trained=True)
    learned, kept = (
        {text: cut(text, of, reading=reading) for text, of in group.items()}
        for group, reading in ((new_task or {}, trained), (retention, OLD_TEXT))
    )
    _check_tokens(base.model, tokenizer, [document for text in (learned | kept).values() for document in text])
    with evaluation_mode(base.model), evaluation_mode(tuned):
        base.check_unchanged()
        result = text_results(base, tuned, learned, kept, options)
        result |= {"choices": {}, "refusals": {}, "generations": []}

        def distinct(name_of: str, items: Sequence[Any], unit: str) -> list[Any]:
            found, notes = without_copies(name_of, several(unit, name_of, items), unit)
            result["warnings"] += notes
            return found

        for name_of, questions in (choices or {}).items():
            own = distinct(name_of, as_questions(name_of, questions), "questions")
            put = partial(measure_choices, style=choice_style, chat_template=choice_chat_template, title=name_of)
            result["choices"][name_of] = put(base, tuned, own, options)
        for kind, sets in (("harmful", refusals), ("harmless", harmless)):
            for name_of, requests in (sets or {}).items():
                options.stage(f"putting requests of {name_of}")
                own = distinct(name_of, requests, "requests")
                result["refusals"][name_of] = measure_refusals(base, tuned, own, options, kind=kind, judge=judge)
        if prompts:
            options.stage("writing continuations")
            given = [Prompt(one) if isinstance(one, str) else one for one in several("prompts", "prompts", prompts)]
            continued = measure_generations(
                base, tuned, distinct("prompts", given, "prompts"), options, sampled=sampled
            )
            result["warnings"] += continued.pop("notes")
            result |= continued
    settings: dict[str, Any] = {"max_length": max_length, "max_windows": max_windows, "start_token": str(start)}
    settings |= {name: getattr(options, name) for name in ("ci", "batch_tokens", "seed", "num_resamples")}
    settings["loss_tokens"] = {text: loss_tokens(documents) for text, documents in (learned | kept).items()}
    settings["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
    return ForgettingReport(_header(base, tuned, name, settings) | result)


def loss_tokens(documents: Sequence[Document]) -> str:
    """Which tokens of a text's documents are predicted."""
    return " and ".join(sorted({document.loss_tokens for document in documents}))


def tokens_that_fit(model: PreTrainedModel, batch_tokens: int) -> int:
    """Tokens per forward pass: a default is fewer where the vocabulary is large, for two models hold logits."""
    if isinstance(batch_tokens, Unchosen):
        vocabulary = model.get_output_embeddings().weight.shape[0]
        return min(int(batch_tokens), max(1, MOST_LOGITS // vocabulary))
    return batch_tokens


def _check_texts(retention: Mapping[str, Any], new_task: Mapping[str, Any]) -> None:
    for field, texts in (("retention", retention), ("new_task", new_task)):
        check_named(field, texts)
    if twice := set(retention) & set(new_task):
        raise ValueError(f"new_task: {min(twice)!r} is a retention text, too; give each text its own name")


def _check_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> None:
    most = max((max(window) for document in documents for window in document.windows), default=0)
    known = base.get_input_embeddings().weight.shape[0]
    if most >= known:
        token = tokenizer.convert_ids_to_tokens(most)
        raise ValueError(f"tokenizer: {token!r} is token {most}, and the models have {known}; give their own tokenizer")


def _check_comparable(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    for model in (base, tuned):
        check_predicts_tokens(model)
    if runs_through(base, tuned):  # trained or merged in place, or copied after a trainer had patched the forward
        raise ValueError("base: a forward pass of it runs the tuned model, so nothing would differ; load the base anew")
    for what, of_base, of_tuned in unlike(base, tuned):
        remedy = "load both alike, or the difference is the result"
        if what == "vocabulary":
            remedy = "give a copy of the base with the model's tokens (add_tokens, resize_token_embeddings) as base"
        raise ValueError(f"{what}: base has {of_base}, model has {of_tuned}; {remedy}")


def _header(base: MeasuredBase, tuned: PreTrainedModel, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    def identity(model: PreTrainedModel, fingerprint: str) -> dict[str, Any]:
        name = model.name_or_path
        return {"model": name, "fingerprint": fingerprint, "num_params": num_parameters(model)}

    model = base.model
    return {
        "schema": "retain.report/1",
        "name": name,
        "base": identity(model, base.fingerprint),
        "tuned": identity(tuned, model_fingerprint(tuned)),
        "settings": {
            **settings,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config._attn_implementation,
            "device": str(model.device),
        },
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "training": None,
        "trajectory": [],
        "documents": [],
    }
