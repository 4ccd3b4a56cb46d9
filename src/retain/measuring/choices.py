"""Multiple choice: the log-likelihood of each choice under base and tuned model, as lm-evaluation-harness scores it.

Conventions of lm-evaluation-harness 0.4.13 (`TemplateLM._encode_pair`, `HFLM._loglikelihood_tokens`,
`ConfigurableTask.process_results`): a continuation is what the tokens of context + continuation have beyond the
context's own; spaces at the context's end belong to the continuation; special tokens are the tokenizer's own and are
left out where the text already begins with BOS; what is too long loses tokens at its beginning; the first of equals
wins. Unlike there, log-probabilities are taken in float32 at every dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retain.checks import several
from retain.data.rows import Document, read_sample
from retain.files import visible
from retain.losses import next_token_loss
from retain.measuring.measure_options import Options
from retain.measuring.paired_answers import compare_answers, share_entry
from retain.measuring.thinking import answer_turn
from retain.measuring.tokens import Forward, batches, check_finite, logits_of, padded, row_by_row
from retain.models.base_predictions import MeasuredBase
from retain.models.description import max_positions, with_least_room
from retain.progress import StageProgress

# Name in lm-evaluation-harness: (Hub id, configuration, the split that it scores).
QUESTION_SETS = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation"),
}
CHOICE_STYLES = ("text", "letter")
NOISE_QUESTIONS = 8  # of each set, on which the base is measured against itself
MAX_LOST = 10  # lost questions of each set that a report keeps
MAX_CHARACTERS = 2000  # of a text that a report keeps as an example


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def load_questions(source: str, *, max_questions: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of a JSONL, JSON or Parquet file, of a name in `QUESTION_SETS`, or of the test split of a Hub dataset.

    Rows carry `question`, `choices` (a list, or `text` and `label` as in ARC) and `answer` or `answerKey`: an index
    from 0, a letter or label, or the text of the right choice.

    Args:
        max_questions: how many to draw with `seed`, in their own order; None for all.
    """
    rows = read_sample(source, QUESTION_SETS, "choices", split="test", max_rows=max_questions, seed=seed)
    return [as_question(row, where) for row, where in rows]


def as_questions(name: str, rows: Sequence[Question | Mapping[str, Any]]) -> list[Question]:
    """Questions as they are, and rows as `load_questions` reads them from a file."""
    return [
        row if isinstance(row, Question) else as_question(row, f"{name}, row {at + 1}")
        for at, row in enumerate(several("questions", name, rows))
    ]


def as_question(row: Mapping[str, Any], where: str) -> Question:
    """A row in any of the known forms as a `Question`; a `ValueError` of one line where it has none of them."""
    text, given = row.get("question"), row.get("choices")
    choices, labels = (given.get("text"), given.get("label")) if isinstance(given, Mapping) else (given, None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"choices: {where} has no question; write question, choices and answer in every row")
    good = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not good or len(choices) < 2:  # type: ignore[arg-type]
        raise ValueError(f"choices: {where} has choices {choices!r:.80}; give a list of at least two texts")
    answers = {name: row[name] for name in ("answer", "answerKey") if row.get(name) is not None} or {"answer": None}
    found = {_answer_index(name, answer, choices, labels, where) for name, answer in answers.items()}  # type: ignore[arg-type]
    if len(found) > 1:
        raise ValueError(f"choices: {where} has answer and answerKey of two choices; give one of them")
    return Question(text, tuple(choices), found.pop())  # type: ignore[arg-type]


def _answer_index(name: str, answer: Any, choices: list[str], labels: list[Any] | None, where: str) -> int:
    """A label first; `answerKey` is one, while a number in `answer` may be an index, too."""
    index = {answer} & set(range(len(choices))) if isinstance(answer, int) and not isinstance(answer, bool) else set()
    if labels is not None:
        by_label = {at for at, label in enumerate(labels) if str(label) == str(answer)}
        found, why = by_label or index, "the label of several choices"
        if by_label and name == "answer":
            found, why = by_label | index, "both a label and the index of another choice"
    elif index:
        found, why = index, ""
    else:
        letters = {at for at in range(min(len(choices), 26)) if ascii_uppercase[at] == answer}
        found = letters | ({choices.index(answer)} if answer in choices else set())
        why = "both a letter and another choice"
    if len(found) != 1:
        why = why if found else "none of its choices"
        raise ValueError(f"choices: {where} has answer {answer!r:.80}, {why}; give the index of the right one, from 0")
    return found.pop()


def context_and_answers(question: Question, style: str) -> tuple[str, tuple[str, ...]]:
    """The context of a question and the answers to choose from, without the space between.

    text: as arc_challenge in the harness. letter: as commonsense_qa there, and mmlu but for its first line.

    >>> context_and_answers(Question("Where do birds sing?", ("in rain", "in trees"), 1), "text")
    ('Question: Where do birds sing?\\nAnswer:', ('in rain', 'in trees'))
    """
    if style == "text":
        return f"Question: {question.text}\nAnswer:", question.choices
    letters = tuple(ascii_uppercase[: len(question.choices)])
    listed = [f"{letter}. {choice}" for letter, choice in zip(letters, question.choices, strict=True)]
    return "\n".join([f"Question: {question.text.strip()}", *listed, "Answer:"]), letters


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text behind what the tokenizer itself puts first, which a text that begins with BOS already has.

    What it puts last, as an EOS, is left out: it is no part of a continuation, and a context does not end there.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    opened = first is not None and text.startswith(str(tokenizer.decode([first])))
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if opened:
        return plain
    whole: list[int] = tokenizer(text, verbose=False)["input_ids"]
    ends = (at for at in range(len(plain), len(whole) + 1) if whole[at - len(plain) : at] == plain)
    return whole[: next(ends, len(whole))]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the continuation, cut where the context's own tokens end."""
    kept = context.rstrip()
    whole, start = encode_text(tokenizer, context + continuation), encode_text(tokenizer, kept)
    return start, whole[len(start) :]


@dataclass
class Inputs:
    """What goes through a model: each input once, with the continuations that it scores."""

    rows: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = field(default_factory=dict)
    """Tokens but the last → (question, choice, tokens of the continuation). Choices of one letter share theirs."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """Of each question: characters of each answer."""
    num_truncated: int = 0

    @property
    def parts(self) -> list[Any]:
        """Everything that scores follow from beside the model."""
        return [list(map(list, self.rows.items())), [len(lengths) for lengths in self.lengths]]

    def add(self, question: int, choice: int, tokens: Sequence[int], wanted: list[int]) -> None:
        """Tokens of a context and a choice together, of which the last are the choice's own."""
        self.rows.setdefault(tuple(tokens[:-1]), []).append((question, choice, wanted))


def encode_questions(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    style: str,
    chat_template: bool,
    limit: int | None,
) -> Inputs:
    """Tokens of every question with every choice, at most `limit` a row."""
    if chat_template and not tokenizer.chat_template:
        raise ValueError("choice_chat_template: this tokenizer has no chat template; leave the flag out")
    inputs = Inputs()
    for at, question in enumerate(questions):
        if style == "letter" and len(question.choices) > len(ascii_uppercase):
            raise ValueError(f"choice_style: question {at + 1} has more choices than letters; use choice_style text")
        context, answers = context_and_answers(question, style)
        if chat_template:
            context = answer_turn(context, tokenizer)
        inputs.lengths.append(np.array([len(answer) for answer in answers], float))
        for choice, answer in enumerate(answers):
            start, wanted = encode_pair(tokenizer, context, answer if chat_template else f" {answer}")
            if not 0 < len(wanted) <= (limit or len(wanted)):
                raise ValueError(
                    f"choices: choice {choice + 1} of question {at + 1} has {len(wanted)} tokens of its own; "
                    f"leave the question out, or try choice_style {'letter' if style == 'text' else 'text'}"
                )
            tokens = start + wanted
            kept = tokens if limit is None else tokens[-(limit + 1) :]
            inputs.num_truncated += len(kept) < len(tokens)
            inputs.add(at, choice, kept, wanted)
    return inputs


@torch.no_grad()
def choice_scores(
    forward: Forward,
    inputs: Inputs,
    *,
    batch_tokens: int,
    device: torch.device | str,
    title: str | None = None,
    who: str = "model",
) -> list[np.ndarray]:
    """Log-likelihood (nats) of every choice of every question.

    Args:
        batch_tokens: padded tokens per forward pass.
        title: of its stage of progress; None for none.
        who: the setting that named the model, for errors.

    Raises:
        ValueError: for a log-likelihood that is not finite.
    """
    rows = list(inputs.rows)
    scores = [np.zeros(len(lengths)) for lengths in inputs.lengths]
    documents = [Document([list(row)], 0) for row in rows]
    with StageProgress(title, sum(map(len, rows)), "tokens") if title else nullcontext() as stage:
        for indices, windows in batches(documents, batch_tokens):
            logits = forward(**{name: value.to(device) for name, value in padded(windows).items()})
            for row, (index, window) in enumerate(zip(indices, windows, strict=True)):
                for question, choice, wanted in inputs.rows[rows[index]]:
                    own = logits[row, len(window) - len(wanted) : len(window)]
                    losses = next_token_loss(own, torch.tensor(wanted, device=own.device))
                    scores[question][choice] = -float(losses.double().sum())
            if stage is not None:
                stage.update(sum(map(len, windows)))
    for at, found in enumerate(scores, start=1):
        for choice, value in enumerate(found, start=1):
            check_finite(value, f"{who}: its log-likelihood of answer {choice} to question {at} is")
    return scores


def both_scores(
    base: MeasuredBase, tuned: PreTrainedModel, inputs: Inputs, options: Options, title: str = ""
) -> list[list[np.ndarray]]:
    """`choice_scores` of the base, made once, and of the tuned model; with a title as stages of progress."""

    def scored(who: str, model: PreTrainedModel) -> list[np.ndarray]:
        name = f"{visible(title)}, {'base' if who == 'base' else 'tuned'}" if title else None
        sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": model.device, "title": name}
        return choice_scores(logits_of(model), inputs, who=who, **sizes)

    parts = [inputs.parts, options.batch_tokens]
    return [base.recall("choices", parts, lambda: scored("base", base.model)), scored("model", tuned)]


def likeliest_choices(scores: Sequence[np.ndarray], lengths: Sequence[np.ndarray], rule: str) -> list[int]:
    """The index of the choice with the highest log-likelihood (`acc`), or the highest per character (`acc_norm`).

    >>> likeliest_choices([np.array([-4.0, -6.0])], [np.array([2.0, 6.0])], "acc_norm")
    [1]
    """
    return [
        int((found / length if rule == "acc_norm" else found).argmax())
        for found, length in zip(scores, lengths, strict=False)  # of the noise floor there are fewer scores
    ]


def question_encoder(
    base: PreTrainedModel, tuned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: str, chat_template: bool
) -> Callable[[Sequence[Question]], Inputs]:
    """`encode_questions` for rows that both models have room for."""
    limit = max_positions(with_least_room(base, tuned))
    return partial(encode_questions, tokenizer=tokenizer, style=style, chat_template=chat_template, limit=limit)


def measure_choices(
    base: PreTrainedModel | MeasuredBase,
    tuned: PreTrainedModel,
    questions: Sequence[Question],
    options: Options,
    *,
    style: str = "text",
    chat_template: bool = False,
    title: str = "",
) -> dict[str, Any]:
    """Ask both models the same questions; `rules` holds what `compare_answers` found under each scoring rule.

    Letters are all of one length, so there `acc` is the only rule.
    """
    if not questions:
        raise ValueError("choices: there are no questions; give a file with at least one")
    base = MeasuredBase.of(base)
    options.stage(f"questions of {title}")
    encode = question_encoder(base.model, tuned, options.tokenizer, style, chat_template)
    inputs, few = encode(questions), encode(questions[:NOISE_QUESTIONS])
    scores = both_scores(base, tuned, inputs, options, title)
    sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": base.model.device, "who": "base"}
    alone = partial(choice_scores, row_by_row(base.model), few, **sizes)
    scores.append(base.recall("choice_noise", [few.parts, options.batch_tokens], alone))
    right = np.array([question.answer for question in questions])
    rules, answers = {}, {}
    for rule in ("acc", "acc_norm") if style == "text" else ("acc",):
        before, after, again = (np.array(likeliest_choices(found, inputs.lengths, rule)) for found in scores)
        flags = (before == right).tolist(), (after == right).tolist()
        same = int((before[: len(again)] == again).sum())
        rules[rule] = {
            **compare_answers(before.tolist(), after.tolist(), *flags),
            "noise_agreement": share_entry(same, len(again)),
        }
        answers[rule] = {"base": before.tolist(), "tuned": after.tolist()}
    return {
        "style": f"choice_style {style}",
        "chat_template": chat_template,
        "num_questions": len(questions),
        "num_truncated": inputs.num_truncated,
        "notes": [f"{inputs.num_truncated} rows were too long and lost their beginning."] * bool(inputs.num_truncated),
        "rules": rules,
        "answers": {"right": right.tolist(), **answers},
        "lost": _lost(questions, *answers[rule].values()),
    }


def _lost(questions: Sequence[Question], base: list[int], tuned: list[int]) -> list[dict[str, Any]]:
    """The first few questions that the base answered rightly and the tuned model does not."""
    found = [
        {"prompt": question.text[:MAX_CHARACTERS], "base": before, "tuned": after}
        | {"choices": [choice[:MAX_CHARACTERS] for choice in question.choices]}
        for question, before, after in zip(questions, base, tuned, strict=True)
        if before == question.answer != after
    ]
    return found[:MAX_LOST]
