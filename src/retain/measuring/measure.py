"""`measure`: compare a tuned model with its base on texts, questions, requests and prompts; returns a report."""

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
from retain.measuring.refusals import Judge, as_turns, judge_inputs, measure_refusals
from retain.measuring.tokens import Options, text_results
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
MAX_LOGITS = 1 << 27  # per forward pass: 0.5 GB in float32, or 2048 tokens of a vocabulary of 65k

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
        base: the base model, or a `MeasuredBase`, which runs the base once for several tuned models.
        retention: name → texts (strings, rows, or token documents) to measure forgetting on; never replayed.
        new_task: name → held-out texts of the new task, for the gain; read as TRL's `SFTTrainer` reads training rows.
        completion_only_loss, assistant_only_loss: which tokens of the new task's rows count, as in `SFTConfig`.
        choices: name → multiple-choice questions, from `load_questions` or as rows of its format.
        choice_style: `text` scores the words of each choice; `letter` lists the choices and scores their letters.
        choice_chat_template: ask each question as a user turn.
        refusals: name → harmful requests.
        harmless: name → harmless requests, for over-refusal.
        judge: a model that also judges whether an answer refuses.
        behaviors: `tools`, `formats`, `thinking` or `turn_ends` → prompts from `load_behavior`.
        prompts: texts that both models continue greedily and, if `sampled`, once more at temperature 1.
        max_length: tokens per window, by default at most the model's positions; longer documents are cut.
        max_windows: windows per document, from its beginning; None for all.
        batch_tokens: padded tokens per forward pass; the default is smaller for vocabularies above 65k.
        max_new_tokens: tokens per continuation and answer; the defaults of behaviours are larger.
        progress: called with the name of each stage; long stages then show their progress on standard error.

    Returns:
        A report, with `report["wiki"].ref_kl.value` for a text, `report.results.choices["arc"].rules["acc"].agreement`
        for questions, `report.results.refusals["advbench"].scorers["judge"].rate` for requests, and
        `report.results.behaviors["tools"].scorers["right"].rate` for behaviours. `report.data` is the file.

    Raises:
        ValueError: if the models differ in dtype, attention kernel or vocabulary, a window exceeds their positions, or
            a text has no documents.

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
    _check_names(retention, new_task or {}, refusals or {}, harmless or {})
    if retention or new_task:  # questions and requests have lengths of their own
        max_length = length_that_fits(with_least_room(base.model, tuned), max_length)
    start, batch_tokens = choose_start_token(tokenizer, start_token), tokens_that_fit(base.model, batch_tokens)
    options = Options(tokenizer, start.id, batch_tokens, max_new_tokens, num_resamples, seed, progress)
    cut = partial(as_documents, tokenizer=tokenizer, start_id=start.id, max_length=max_length, max_windows=max_windows)
    reading = Reading(completion_only_loss, assistant_only_loss, as_trained=True)
    learned = {text: cut(text, rows, reading=reading, field="new_task") for text, rows in (new_task or {}).items()}
    retained = {text: cut(text, rows, reading=OLD_TEXT) for text, rows in retention.items()}
    _check_windows(base.model, tuned, tokenizer, learned | retained)
    warnings: list[str] = []
    distinct = partial(_distinct, warnings=warnings)
    questions = distinct({key: as_questions(key, rows) for key, rows in (choices or {}).items()}, "questions")
    requests = {"harmful": distinct(refusals, "requests"), "harmless": distinct(harmless, "requests")}
    prompts = [Prompt(one) if isinstance(one, str) else one for one in several("prompts", "prompts", prompts)]
    prompts = distinct({"prompts": prompts}, "prompts")["prompts"]
    encode = question_encoder(base.model, tuned, tokenizer, choice_style, choice_chat_template)
    for rows in questions.values():  # refuses questions that do not fit before anything is measured
        encode(rows)
    texts = [text for sets in requests.values() for rows in sets.values() for text in rows]
    if judge is not None:
        judge_inputs(judge, texts, [""] * len(texts))  # refuses requests that leave no room for an answer
    fit = partial(_answer_options, [base.model, tuned], warnings=warnings)
    options = fit([*prompts, *as_turns(texts, tokenizer)], options)
    shown, unmeasured = behavior_prompts(distinct(behaviors, "prompts"), options)
    if unmeasured and not (shown or learned or retained or questions or refusals or harmless or prompts):
        raise ValueError(f"behaviors: {unmeasured[0]}, and there is nothing else to measure; give retention, too")
    shown = [replace(behavior, options=fit(behavior.prompts, behavior.options)) for behavior in shown]
    with nullcontext() if progress is None else progress_line(), evaluation_mode(base.model), evaluation_mode(tuned):
        base.check_unchanged()
        result = text_results(base, tuned, learned, retained, options)
        result["warnings"] += warnings + unmeasured
        style: dict[str, Any] = {"style": choice_style, "chat_template": choice_chat_template}
        result["choices"] = {
            key: measure_choices(base, tuned, rows, options, **style, title=key) for key, rows in questions.items()
        }
        result["refusals"] = {
            key: measure_refusals(base, tuned, rows, options, kind=kind, judge=judge, title=key)
            for kind, sets in requests.items()
            for key, rows in sets.items()
        }
        result["behaviors"] = {behavior.name: measure_behavior(base, tuned, behavior) for behavior in shown}
        result["generations"] = []
        if prompts:
            generations = measure_generations(base, tuned, prompts, options, sampled=sampled)
            result["warnings"] += generations.pop("notes")
            result |= generations
    settings = {"max_length": max_length, "max_windows": max_windows, "start_token": str(start)}
    models = _models(base, tuned, options, learned | retained, settings)
    return ForgettingReport.new(name, **models, **result)


def _distinct(sets: Mapping[str, Sequence[Any]] | None, unit: str, *, warnings: list[str]) -> dict[str, list[Any]]:
    """Each set without its copies, which `warnings` counts."""
    distinct = {}
    for name, items in (sets or {}).items():
        distinct[name], notes = without_copies(name, several(unit, name, items), unit)
        warnings += notes
    return distinct


def _answer_options(
    models: Sequence[PreTrainedModel], prompts: Sequence[Prompt], options: Options, *, warnings: list[str]
) -> Options:
    fitting = options_that_fit(models, prompts, options)
    if fitting is not options:
        warnings.append(
            f"answers have at most {fitting.max_new_tokens} tokens, not {options.max_new_tokens}: the models have no "
            "room for more after the longest prompt"
        )
    return fitting


def tokens_that_fit(model: PreTrainedModel, batch_tokens: int) -> int:
    """Tokens per forward pass; a default is reduced for a large vocabulary, since two models hold logits."""
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


def _check_names(
    retention: Mapping[str, Any], new_task: Mapping[str, Any], refusals: Iterable[str], harmless: Iterable[str]
) -> None:
    check_named("retention", retention)
    check_named("new_task", new_task)
    check_apart("new_task", new_task, retention, "a retention text")
    check_apart("harmless", harmless, refusals, "a set of refusals")


def check_apart(field: str, names: Iterable[str], others: Iterable[str], what: str) -> None:
    """Refuse a name of `field` that `others`, each of them `what`, also use: one result would replace the other."""
    if shared := set(names) & set(others):
        raise ValueError(f"{field}: {min(shared)!r} is also the name of {what}; give each its own name")


def _check_windows(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[Document]],
) -> None:
    """Refuse windows, such as those of token documents, with unknown tokens or more tokens than positions."""
    windows = [window for documents in texts.values() for document in documents for window in document.windows]
    longest, room = max(map(len, windows), default=0), max_positions(with_least_room(base, tuned))
    if room is not None and longest > room:
        raise ValueError(f"retention: a document has {longest} tokens, more than the models' {room} positions; cut it")
    largest = max(map(max, windows), default=0)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(f"tokenizer: {token!r} is token {largest}, but the models have {vocabulary}; give their own")


def _check_comparable(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    for model in (base, tuned):
        check_predicts_tokens(model)
    if runs_through(base, tuned):  # trained or merged in place, or copied after a trainer patched its forward
        raise ValueError("base: its forward pass runs the tuned model, so nothing would differ; load the base again")
    for what, of_base, of_tuned in differing_settings(base, tuned):
        remedy = "load both the same way, or this difference is measured too"
        if what == "vocabulary":
            remedy = "give as base a copy with the model's tokens (add_tokens, resize_token_embeddings)"
        raise ValueError(f"{what}: base has {of_base}, model has {of_tuned}; {remedy}")


def _models(
    base: MeasuredBase,
    tuned: PreTrainedModel,
    options: Options,
    texts: Mapping[str, Sequence[Document]],
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The parts of a report that identify both models and the settings of the measurement."""
    loss_tokens = {text: sorted({document.loss_tokens for document in rows}) for text, rows in texts.items()}

    def identity(model: PreTrainedModel, fingerprint: str) -> dict[str, Any]:
        return {"model": model.name_or_path, "fingerprint": fingerprint, "num_params": num_parameters(model)}

    return {
        "base": identity(base.model, base.fingerprint),
        "tuned": identity(tuned, model_fingerprint(tuned)),
        "settings": {
            **settings,
            "loss_tokens": {text: " and ".join(tokens) for text, tokens in loss_tokens.items()},
            **{name: getattr(options, name) for name in ("batch_tokens", "seed", "num_resamples")},
            "tokenizer_fingerprint": tokenizer_fingerprint(options.tokenizer),
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "attn_implementation": base.model.config._attn_implementation,
            "device": str(base.model.device),
        },
    }
