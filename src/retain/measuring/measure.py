"""`measure`: a tuned model against its base on named texts and questions, with a noise floor, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retain.checks import Unchosen, check_named, check_number, several
from retain.data.rows import OLD_TEXT, Document, Reading, Text, as_documents, without_copies
from retain.measuring.behaviors import behavior_prompts, measure_behavior
from retain.measuring.choices import CHOICE_STYLES, Question, as_questions, measure_choices, question_encoder
from retain.measuring.generations import Prompt, measure_generations, options_that_fit
from retain.measuring.measure_options import Options
from retain.measuring.refusals import Judge, as_turns, judge_inputs, measure_refusals
from retain.measuring.tokens import text_results
from retain.models.base_predictions import MeasuredBase
from retain.models.description import (
    check_predicts_tokens,
    choose_start_token,
    differing_settings,
    length_that_fits,
    max_positions,
    model_fingerprint,
    num_parameters,
    tokenizer_fingerprint,
    with_least_room,
)
from retain.models.reference import evaluation_mode, runs_through
from retain.progress import progress_line
from retain.report.report import ForgettingReport

LEAST = {"max_length": 2, "max_windows": 1, "batch_tokens": 1, "max_new_tokens": 0, "num_resamples": 1, "seed": 0}
MAX_LOGITS = 1 << 27  # of a forward pass, 0.5 GB in float32; 2048 tokens of a vocabulary of 65k


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
    behaviors: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    prompts: Sequence[str | Prompt] = (),
    sampled: bool = False,
    name: str = "tuned",
    start_token: str | int | None = None,
    max_length: int = Unchosen(512),
    max_windows: int | None = None,
    batch_tokens: int = Unchosen(2048),
    max_new_tokens: int = Unchosen(48),
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
        choices: name → multiple-choice questions for both models: of `load_questions`, or rows as in its files.
        choice_style: `text` scores each choice's words, `letter` the letters of choices listed in the question.
        choice_chat_template: put each question as a user's turn.
        refusals: name → harmful requests for both models.
        harmless: name → harmless requests, for over-refusal.
        judge: a model that judges, too, whether an answer refuses.
        behaviors: `tools`, `formats`, `thinking` or `turn_ends` → prompts with what is verified, of `load_behavior`.
        prompts: texts that both models continue greedily, and with `sampled` a second time, drawn at temperature 1.
        max_length: longest window in tokens, by default at most the model's positions; longer documents are cut.
        max_windows: windows of each document, from its beginning; None for all.
        batch_tokens: padded tokens per forward pass; by default fewer where the vocabulary is above 65k.
        max_new_tokens: of each continuation and answer; by default those of a behaviour are longer.
        progress: called with the name of each stage; long ones then show how far they are, on standard error.

    Returns:
        A report. `report["wiki"].ref_kl.value` is of a text, `report.results.choices["arc"].rules["acc"].agreement` of
        questions, `report.results.refusals["advbench"].scorers["judge"].rate` of requests,
        `report.results.behaviors["tools"].scorers["right"].rate` of behaviours. `report.data` is the file.

    Raises:
        ValueError: if the models differ in dtype, attention kernel or vocabulary, windows are longer than they can
            take, or a text has no documents.

    >>> from retain.lab.models import make_config, make_model
    >>> from retain.lab.tokenizers import word_tokenizer
    >>> base, tuned = (make_model(make_config(20_000, vocab_size=8, max_length=8), seed) for seed in (0, 1))
    >>> report = measure(base, tuned, {"old": ["w1 w2 w3", "w3 w1"]}, tokenizer=word_tokenizer(8))
    >>> print(report["old"].ref_kl)
    0.003 [0.000, 0.026]
    """
    base = MeasuredBase.of(base)
    _check_settings(
        choice_style, max_length=max_length, max_windows=max_windows, batch_tokens=batch_tokens,
        max_new_tokens=max_new_tokens, num_resamples=num_resamples, seed=seed,
    )  # fmt: skip
    _check_comparable(base.model, tuned)
    _check_texts(retention, new_task or {})
    check_apart("harmless", harmless or {}, refusals or {}, "a set of refusals")
    if retention or new_task:  # questions and requests have lengths of their own
        max_length = length_that_fits(with_least_room(base.model, tuned), max_length)
    start, batch_tokens = choose_start_token(tokenizer, start_token), tokens_that_fit(base.model, batch_tokens)
    options = Options(tokenizer, start.id, batch_tokens, max_new_tokens, num_resamples, seed, progress)
    cut = partial(as_documents, tokenizer=tokenizer, start_id=start.id, max_length=max_length, max_windows=max_windows)
    trained = Reading(completion_only_loss, assistant_only_loss, as_trained=True)
    learned = {text: cut(text, source, reading=trained, field="new_task") for text, source in (new_task or {}).items()}
    known = {text: cut(text, source, reading=OLD_TEXT) for text, source in retention.items()}
    windows = [window for text in (learned | known).values() for document in text for window in document.windows]
    _check_windows(base.model, tuned, tokenizer, windows)
    notes: list[str] = []
    distinct = partial(_distinct, warnings=notes)
    asked = {text: distinct(text, as_questions(text, given), "questions") for text, given in (choices or {}).items()}
    requested = [
        (kind, text, distinct(text, requests, "requests"))
        for kind, sets in (("harmful", refusals), ("harmless", harmless))
        for text, requests in (sets or {}).items()
    ]
    given = [Prompt(one) if isinstance(one, str) else one for one in several("prompts", "prompts", prompts)]
    given = distinct("prompts", given, "prompts")
    encode = question_encoder(base.model, tuned, tokenizer, choice_style, choice_chat_template)
    for questions in asked.values():  # what has no room is refused before anything is measured
        encode(questions)
    for _, _, requests in requested:
        if judge is not None:
            judge_inputs(judge, requests, [""] * len(requests))  # refuses what leaves no room for any answer
    turns = [turn for _, _, requests in requested for turn in as_turns(requests, tokenizer)]
    fit = partial(_answer_options, [base.model, tuned], warnings=notes)
    options = fit([*given, *turns], options)
    rows = {kind: distinct(kind, of_kind, "prompts") for kind, of_kind in (behaviors or {}).items()}
    shown, unmeasured = behavior_prompts(rows, options)
    if unmeasured and not (shown or learned or known or asked or requested or given):
        raise ValueError(f"behaviors: {unmeasured[0]}, and nothing else is asked for; give retention, too")
    shown = [replace(behavior, options=fit(behavior.prompts, behavior.options)) for behavior in shown]
    with nullcontext() if progress is None else progress_line(), evaluation_mode(base.model), evaluation_mode(tuned):
        base.check_unchanged()
        result = text_results(base, tuned, learned, known, options)
        result["warnings"] += notes + unmeasured
        result |= {"choices": {}, "refusals": {}, "behaviors": {}, "generations": []}
        put = partial(measure_choices, style=choice_style, chat_template=choice_chat_template)
        for text, questions in asked.items():
            result["choices"][text] = put(base, tuned, questions, options, title=text)
        for kind, text, requests in requested:
            options.stage(f"requests of {text}")
            result["refusals"][text] = measure_refusals(base, tuned, requests, options, kind=kind, judge=judge)
        for behavior in shown:
            options.stage(f"behaviour {behavior.name}")
            result["behaviors"][behavior.name] = measure_behavior(base, tuned, behavior)
        if given:
            options.stage("continuations")
            continued = measure_generations(base, tuned, given, options, sampled=sampled)
            result["warnings"] += continued.pop("notes")
            result |= continued
    settings = {"max_length": max_length, "max_windows": max_windows, "start_token": str(start)}
    loss_tokens = {text: tokens_of_loss(documents) for text, documents in (learned | known).items()}
    models = _models(base, tuned, options, settings | {"loss_tokens": loss_tokens})
    return ForgettingReport.new(name, **models, **result)


def _distinct(name: str, items: Sequence[Any], unit: str, *, warnings: list[str]) -> list[Any]:
    found, notes = without_copies(name, several(unit, name, items), unit)
    warnings += notes
    return found


def _answer_options(
    models: Sequence[PreTrainedModel], prompts: Sequence[Prompt], options: Options, *, warnings: list[str]
) -> Options:
    found = options_that_fit(models, prompts, options)
    if found is not options:
        warnings.append(
            f"answers have at most {found.max_new_tokens} tokens, not {options.max_new_tokens}: behind the longest "
            "prompt the models have room for no more"
        )
    return found


def tokens_of_loss(documents: Sequence[Document]) -> str:
    """Which tokens of a text's documents are predicted."""
    return " and ".join(sorted({document.loss_tokens for document in documents}))


def tokens_that_fit(model: PreTrainedModel, batch_tokens: int) -> int:
    """Tokens per forward pass: a default is fewer where the vocabulary is large, for two models hold logits."""
    if isinstance(batch_tokens, Unchosen):
        vocabulary = model.get_output_embeddings().weight.shape[0]
        return min(int(batch_tokens), max(1, MAX_LOGITS // vocabulary))
    return batch_tokens


def _check_settings(choice_style: str, **numbers: int | None) -> None:
    for setting, number in numbers.items():
        if number is not None:
            check_number(setting, number, low=LEAST[setting], integer=True)
    if choice_style not in CHOICE_STYLES:
        raise ValueError(f"choice_style: {choice_style!r} is not known; use {' or '.join(CHOICE_STYLES)}")


def _check_texts(retention: Mapping[str, Any], new_task: Mapping[str, Any]) -> None:
    for field, texts in (("retention", retention), ("new_task", new_task)):
        check_named(field, texts)
    check_apart("new_task", new_task, retention, "a retention text")


def check_apart(field: str, names: Iterable[str], others: Iterable[str], what: str) -> None:
    """Refuse a name of `field` that is among `others`, each of which is `what`: one would be lost beside the other."""
    if twice := set(names) & set(others):
        raise ValueError(f"{field}: {min(twice)!r} is {what}, too; give each its own name")


def _check_windows(
    base: PreTrainedModel, tuned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Sequence[Sequence[int]]
) -> None:
    """Refuse windows of documents that came as tokens, if the models have no such token or no room for as many."""
    longest, room = max(map(len, windows), default=0), max_positions(with_least_room(base, tuned))
    if room is not None and longest > room:
        raise ValueError(f"retention: a document has {longest} tokens, more than the models' {room} positions; cut it")
    most = max(map(max, windows), default=0)
    known = base.get_input_embeddings().weight.shape[0]
    if most >= known:
        token = tokenizer.convert_ids_to_tokens(most)
        raise ValueError(f"tokenizer: {token!r} is token {most}, and the models have {known}; give their own tokenizer")


def _check_comparable(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    for model in (base, tuned):
        check_predicts_tokens(model)
    if runs_through(base, tuned):  # trained or merged in place, or copied after a trainer had patched the forward
        raise ValueError("base: a forward pass of it runs the tuned model, so nothing would differ; load the base anew")
    for what, of_base, of_tuned in differing_settings(base, tuned):
        remedy = "load both alike, or the difference is the result"
        if what == "vocabulary":
            remedy = "give a copy of the base with the model's tokens (add_tokens, resize_token_embeddings) as base"
        raise ValueError(f"{what}: base has {of_base}, model has {of_tuned}; {remedy}")


def _models(
    base: MeasuredBase, tuned: PreTrainedModel, options: Options, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The parts of a report that name both models, and how they were measured."""

    def identity(model: PreTrainedModel, fingerprint: str) -> dict[str, Any]:
        return {"model": model.name_or_path, "fingerprint": fingerprint, "num_params": num_parameters(model)}

    return {
        "base": identity(base.model, base.fingerprint),
        "tuned": identity(tuned, model_fingerprint(tuned)),
        "settings": {
            **settings,
            **{name: getattr(options, name) for name in ("batch_tokens", "seed", "num_resamples")},
            "tokenizer_fingerprint": tokenizer_fingerprint(options.tokenizer),
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "attn_implementation": base.model.config._attn_implementation,
            "device": str(base.model.device),
        },
    }
