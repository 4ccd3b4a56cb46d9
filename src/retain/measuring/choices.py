"""Multiple choice: the log-likelihood of each choice under base and tuned model, as lm-evaluation-harness scores it.

Conventions of lm-evaluation-harness 0.4.13 (`TemplateLM._encode_pair`, `HFLM._loglikelihood_tokens`,
`ConfigurableTask.process_results`): the continuation is the tokens that context + continuation adds to those of the
context; trailing spaces of the context belong to the continuation; the tokenizer adds its special tokens unless the
text already begins with BOS; rows that are too long are truncated on the left; the first of equal choices wins. Unlike
the harness, log-probabilities are float32 for every dtype of the model.
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
from retain.measuring.paired_answers import compare_answers, share_entry
from retain.measuring.thinking import answer_turn
from retain.measuring.tokens import Forward, Options, batches, check_finite, logits_of, padded, row_by_row
from retain.models.base_predictions import MeasuredBase
from retain.models.description import max_positions, with_least_room
from retain.progress import StageProgress

# Name in lm-evaluation-harness: (Hub id, configuration, split that it scores).
QUESTION_SETS = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation"),
}
CHOICE_STYLES = ("text", "letter")
NOISE_QUESTIONS = 8  # questions per set on which the base is compared with itself
MAX_LOST = 10  # lost questions per set that a report keeps
MAX_CHARACTERS = 2000  # per example text in a report


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def load_questions(source: str, *, max_questions: int | None = None, seed: int = 0) -> list[Question]:
    """Read multiple-choice questions from a file, a name in `QUESTION_SETS`, or the test split of a Hub dataset.

    Files are JSONL, JSON or Parquet. Rows have `question`, `choices` (a list, or `text` and `label` as in ARC) and
    `answer` or `answerKey`: an index from 0, a letter or label, or the text of the right choice.

    Args:
        max_questions: questions to draw with `seed`, keeping their order; None for all.
    """
    rows = read_sample(source, QUESTION_SETS, "choices", split="test", max_rows=max_questions, seed=seed)
    return [as_question(row, where) for row, where in rows]


def as_questions(name: str, rows: Sequence[Question | Mapping[str, Any]]) -> list[Question]:
    """Convert rows in the format of `load_questions` to questions; `Question`s stay as they are."""
    return [
        row if isinstance(row, Question) else as_question(row, f"{name}, row {at + 1}")
        for at, row in enumerate(several("questions", name, rows))
    ]


def as_question(row: Mapping[str, Any], where: str) -> Question:
    """Convert a row to a `Question`; raises a one-line `ValueError` naming `where` if its format is unknown."""
    text, listed = row.get("question"), row.get("choices")
    choices, labels = (listed.get("text"), listed.get("label")) if isinstance(listed, Mapping) else (listed, None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"choices: {where} has no question; write question, choices and answer in every row")
    good = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not good or len(choices) < 2:  # type: ignore[arg-type]
        raise ValueError(f"choices: {where} has choices {choices!r:.80}; give a list of at least two texts")
    answers = {name: row[name] for name in ("answer", "answerKey") if row.get(name) is not None} or {"answer": None}
    indices = {_answer_index(name, answer, choices, labels, where) for name, answer in answers.items()}  # type: ignore[arg-type]
    if len(indices) > 1:
        raise ValueError(f"choices: {where} has an answer and an answerKey for different choices; give one of them")
    return Question(text, tuple(choices), indices.pop())  # type: ignore[arg-type]


def _answer_index(name: str, answer: Any, choices: list[str], labels: list[Any] | None, where: str) -> int:
    """The index of the right choice; labels come first, though a number in `answer` may also be an index."""
    index = {answer} & set(range(len(choices))) if isinstance(answer, int) and not isinstance(answer, bool) else set()
    if labels is not None:
        by_label = {at for at, label in enumerate(labels) if str(label) == str(answer)}
        matches, why = by_label or index, "the label of several choices"
        if by_label and name == "answer":
            matches, why = by_label | index, "both a label and the index of another choice"
    elif index:
        matches, why = index, ""
    else:
        matches = {at for at, letter in enumerate(ascii_uppercase[: len(choices)]) if letter == answer}
        matches |= {choices.index(answer)} if answer in choices else set()
        why = "both a letter and another choice"
    if len(matches) != 1:
        why = why if matches else "none of its choices"
        raise ValueError(f"choices: {where} has answer {answer!r:.80}, {why}; give the index of the right one, from 0")
    return matches.pop()


def context_and_answers(question: Question, style: str) -> tuple[str, tuple[str, ...]]:
    """The context of a question and its possible answers, without the space between them.

    Style `text` is arc_challenge in the harness; `letter` is commonsense_qa, and mmlu without its first line.

    >>> context_and_answers(Question("Where do birds sing?", ("in rain", "in trees"), 1), "text")
    ('Question: Where do birds sing?\\nAnswer:', ('in rain', 'in trees'))
    """
    if style == "text":
        return f"Question: {question.text}\nAnswer:", question.choices
    letters = tuple(ascii_uppercase[: len(question.choices)])
    listed = [f"{letter}. {choice}" for letter, choice in zip(letters, question.choices, strict=True)]
    return "\n".join([f"Question: {question.text.strip()}", *listed, "Answer:"]), letters


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text after the tokenizer's own opening tokens, which are not repeated if the text begins with BOS.

    Closing tokens such as EOS are left out: they belong to no continuation, and no context ends with them.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if first is not None and text.startswith(str(tokenizer.decode([first]))):
        return plain
    whole: list[int] = tokenizer(text, verbose=False)["input_ids"]
    ends = (at for at in range(len(plain), len(whole) + 1) if whole[at - len(plain) : at] == plain)
    return whole[: next(ends, len(whole))]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context, and those that the continuation adds."""
    whole, start = encode_text(tokenizer, context + continuation), encode_text(tokenizer, context.rstrip())
    return start, whole[len(start) :]


@dataclass
class Inputs:
    """Distinct model inputs, each with the continuations that it scores."""

    rows: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = field(default_factory=dict)
    """Tokens without the last → (question, choice, tokens of the continuation). One-token choices share their row."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """Per question, the length of each answer in characters."""
    num_truncated: int = 0

    @property
    def parts(self) -> list[Any]:
        """Everything besides the model that determines the scores."""
        return [list(map(list, self.rows.items())), [len(lengths) for lengths in self.lengths]]

    def add(self, question: int, choice: int, tokens: Sequence[int], continuation: list[int]) -> None:
        """Add the tokens of a context and a choice, which end with those of the choice."""
        self.rows.setdefault(tuple(tokens[:-1]), []).append((question, choice, continuation))


def encode_questions(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    style: str,
    chat_template: bool,
    limit: int | None,
) -> Inputs:
    """Tokenize every question with every choice, at most `limit` tokens per row."""
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
            start, continuation = encode_pair(tokenizer, context, answer if chat_template else f" {answer}")
            if not 0 < len(continuation) <= (limit or len(continuation)):
                raise ValueError(
                    f"choices: choice {choice + 1} of question {at + 1} has {len(continuation)} tokens of its own; "
                    f"leave the question out, or try choice_style {'letter' if style == 'text' else 'text'}"
                )
            tokens = start + continuation
            kept = tokens if limit is None else tokens[-(limit + 1) :]
            inputs.num_truncated += len(kept) < len(tokens)
            inputs.add(at, choice, kept, continuation)
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
    """Log-likelihoods (nats) of the choices, one array of shape (choices,) per question.

    Args:
        batch_tokens: padded tokens per forward pass.
        title: the name of the progress stage; None shows no progress.
        who: the setting that named the model, for errors.

    Raises:
        ValueError: if a log-likelihood is not finite.
    """
    rows = list(inputs.rows)
    scores = [np.zeros(len(lengths)) for lengths in inputs.lengths]
    documents = [Document([list(row)], 0) for row in rows]
    with StageProgress(title, sum(map(len, rows)), "tokens") if title else nullcontext() as stage:
        for indices, windows in batches(documents, batch_tokens):
            logits = forward(**{name: value.to(device) for name, value in padded(windows).items()})
            for row, (index, window) in enumerate(zip(indices, windows, strict=True)):
                for question, choice, continuation in inputs.rows[rows[index]]:
                    predicting = logits[row, len(window) - len(continuation) : len(window)]
                    losses = next_token_loss(predicting, torch.tensor(continuation, device=logits.device))
                    scores[question][choice] = -float(losses.double().sum())
            if stage is not None:
                stage.update(sum(map(len, windows)))
    for at, of_question in enumerate(scores, start=1):
        for choice, value in enumerate(of_question, start=1):
            check_finite(value, f"{who}: its log-likelihood of answer {choice} to question {at} is")
    return scores


def both_scores(
    base: MeasuredBase, tuned: PreTrainedModel, inputs: Inputs, options: Options, title: str = ""
) -> list[list[np.ndarray]]:
    """`choice_scores` of the base, computed once, and of the tuned model; a title shows them as progress stages."""

    def scored(who: str, model: PreTrainedModel) -> list[np.ndarray]:
        name = f"{visible(title)}, {'base' if who == 'base' else 'tuned'}" if title else None
        sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": model.device, "title": name}
        return choice_scores(logits_of(model), inputs, who=who, **sizes)

    parts = [inputs.parts, options.batch_tokens]
    return [base.recall("choices", parts, lambda: scored("base", base.model)), scored("model", tuned)]


def likeliest_choices(scores: Sequence[np.ndarray], lengths: Sequence[np.ndarray], rule: str) -> list[int]:
    """Per question, the choice with the highest log-likelihood (`acc`), or the highest per character (`acc_norm`).

    >>> likeliest_choices([np.array([-4.0, -6.0])], [np.array([2.0, 6.0])], "acc_norm")
    [1]
    """
    return [
        int((of_question / length if rule == "acc_norm" else of_question).argmax())
        for of_question, length in zip(scores, lengths, strict=False)  # the noise floor scores fewer questions
    ]


def question_encoder(
    base: PreTrainedModel, tuned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: str, chat_template: bool
) -> Callable[[Sequence[Question]], Inputs]:
    """`encode_questions`, limited to the positions of both models."""
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
    """Compare both models' answers to the same questions; `rules` has the result of `compare_answers` for each rule.

    Style `letter` has the rule `acc` only, since all letters have the same length.
    """
    if not questions:
        raise ValueError("choices: there are no questions; give a file with at least one")
    base = MeasuredBase.of(base)
    options.stage(f"questions of {title}")
    encode = question_encoder(base.model, tuned, options.tokenizer, style, chat_template)
    inputs, few = encode(questions), encode(questions[:NOISE_QUESTIONS])
    scores = both_scores(base, tuned, inputs, options, title)
    sizes: dict[str, Any] = {"batch_tokens": options.batch_tokens, "device": base.model.device, "who": "base"}
    sizes["title"] = f"{visible(title)}, noise floor" if title else None
    unbatched = partial(choice_scores, row_by_row(base.model), few, **sizes)
    scores.append(base.recall("choice_noise", [few.parts, options.batch_tokens], unbatched))
    right = np.array([question.answer for question in questions])
    rules, answers = {}, {}
    for rule in ("acc", "acc_norm") if style == "text" else ("acc",):
        before, after, again = (np.array(likeliest_choices(of_model, inputs.lengths, rule)) for of_model in scores)
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
        "notes": [f"{inputs.num_truncated} rows were too long and truncated on the left."] * bool(inputs.num_truncated),
        "rules": rules,
        "answers": {"right": right.tolist(), **answers},
        "lost": _lost(questions, *answers[rule].values()),
    }


def _lost(questions: Sequence[Question], base: list[int], tuned: list[int]) -> list[dict[str, Any]]:
    """The first questions that the base answers correctly and the tuned model does not."""
    lost = [
        {"prompt": question.text[:MAX_CHARACTERS], "base": before, "tuned": after}
        | {"choices": [choice[:MAX_CHARACTERS] for choice in question.choices]}
        for question, before, after in zip(questions, base, tuned, strict=True)
        if before == question.answer != after
    ]
    return lost[:MAX_LOST]
