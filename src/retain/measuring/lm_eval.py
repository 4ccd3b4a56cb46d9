"""lm-evaluation-harness: the answers of base and tuned model in its files, paired question by question.

Written for lm_eval 0.4.13. A line of a per-sample file (`--log_samples`, `lm_eval.result_schema.SampleResult`) has
`doc_id`, `target`, `arguments`, `filtered_resps`, `filter`, `doc_hash`, `prompt_hash`, and a number for each metric. A
multiple-choice response is `[log-likelihood, is_greedy]` per choice; any other is text.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retain.data.row_files import json_rows
from retain.measuring.paired_answers import compare_answers
from retain.report.report import ForgettingReport

ANSWER_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # those that judge one answer by itself
Samples = dict[str, dict[int, dict[str, Any]]]  # filter → doc_id → line


def read_samples(path: Path) -> Samples:
    """The lines of a per-sample file by filter and question.

    Raises:
        ValueError: one line naming the file and the line, for what is not such a file, holds a question twice, or a
            number that is not finite.
    """
    samples: Samples = {}
    for where, row in json_rows(path, "pair"):
        if not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise ValueError(f"{where} is not a sample of lm-eval; give a file that lm_eval --log_samples wrote")
        of_filter = samples.setdefault(str(row.get("filter", "none")), {})
        if row["doc_id"] in of_filter:
            raise ValueError(f"{where} has doc_id {row['doc_id']!r} a second time; give a file of one run")
        responses = row["filtered_resps"] if isinstance(row["filtered_resps"], list) else []
        numbers = [one[0] for one in responses if isinstance(one, list) and one]  # log-likelihoods; else texts
        for number in (*numbers, *(row[name] for name in ANSWER_METRICS if name in row)):
            if str(number).lower().lstrip("-") in ("nan", "inf", "infinity"):  # also where they were written as text
                raise ValueError(f"{where} has {number}, which is no result; evaluate that model again, in float32")
        of_filter[row["doc_id"]] = row
    if not samples:
        raise ValueError(f"pair: {str(path)!r} is empty; give a file that lm_eval --log_samples wrote")
    return samples


def paired_report(paths: Sequence[str]) -> ForgettingReport:
    """A report on two per-sample files of one task, the base's first."""
    base, tuned = (Path(path) for path in paths)
    return ForgettingReport.new(
        tuned.parent.name or tuned.stem,
        base={"model": str(base)},
        tuned={"model": str(tuned)},
        choices={task_of(tuned): pair_files(base, tuned)},
    )


def task_of(path: Path) -> str:
    """`arc_easy` of `samples_arc_easy_2026-11-01T10-00-00.123456.jsonl`; else the file's own name."""
    name = path.stem.removeprefix("samples_")
    task, _, date = name.rpartition("_")
    return task if task and date[:1].isdigit() else path.stem


def pair_files(base: Path, tuned: Path) -> dict[str, Any]:
    """Compare the answers that two files hold to the same questions; in the form of `measure_choices`.

    Raises:
        ValueError: if the files share no question, hold different ones under one number, or imply no answers.
    """
    of_base, of_tuned = read_samples(base), read_samples(tuned)
    rules: dict[str, Any] = {}
    notes: dict[str, None] = {}
    unclear: dict[str, None] = {}  # metrics whose answers do not follow
    for name in of_base:
        before, after = (side.get(name, {}) for side in (of_base, of_tuned))
        both = [number for number in before if number in after]
        if not both:
            continue
        first: dict[Any, int] = {}
        for number in both:
            first.setdefault(before[number].get("doc_hash") or number, number)
        shared = list(first.values())
        if len(shared) < len(both):
            notes[f"{len(both) - len(shared)} of {len(both)} questions are copies of others, and left out."] = None
        notes |= dict.fromkeys(_differences(before, after, both))
        sides = [[of_file[number] for number in shared] for of_file in (before, after)]
        for metric in ANSWER_METRICS:
            if not all(metric in row for rows in sides for row in rows):
                continue
            answers = [[answer_of(row, metric) for row in rows] for rows in sides]
            if None in answers[0] + answers[1]:
                notes[f"{metric} is left out: the answers behind it do not follow from the file."] = None
                unclear[metric] = None
                continue
            right = [[row[metric] == 1 for row in rows] for rows in sides]
            compared = compare_answers(answers[0], answers[1], right[0], right[1])
            rules[metric if name == "none" else f"{metric} ({name})"] = compared
    if not rules:
        why = f"share no question with {', '.join(ANSWER_METRICS)}; give two of the same task"
        if unclear:
            why = f"do not tell the answers behind {', '.join(unclear)}; give a task whose answers are right or wrong"
        raise ValueError(f"pair: {str(base)!r} and {str(tuned)!r} {why}")
    most = max(compared["agreement"]["num_questions"] for compared in rules.values())
    return {"style": "paired from files of lm-eval", "chat_template": None, "num_questions": most, "rules": rules,
            "notes": list(notes), "answers": {}, "lost": []}  # fmt: skip


def _differences(before: dict[int, dict], after: dict[int, dict], shared: list[int]) -> Iterator[str]:
    """What the files do not share, in words; a `ValueError` where one number names two questions."""
    for number in shared:
        for key in ("doc_hash", "target_hash"):
            one, other = before[number].get(key), after[number].get(key)
            if one != other and one is not None and other is not None:
                raise ValueError(f"pair: doc_id {number} is not the same question in both files ({key} differs); "
                                 "give files of the same task and version")  # fmt: skip
    alone = [len(of_file) - len(shared) for of_file in (before, after)]
    if any(alone):
        yield f"Left out, since only one file has them: {alone[0]} of the base's questions, {alone[1]} of the tuned's."
    if other := sum(before[number].get("prompt_hash") != after[number].get("prompt_hash") for number in shared):
        yield f"{other} of {len(shared)} questions were put in other words: another template, or other examples."


def answer_of(row: dict[str, Any], metric: str) -> Hashable | None:
    """The answer that a metric judged: the index of the likeliest choice, or the text; None where it does not follow.

    The metric's own number must agree: else the choices' lengths, say, are not those of the file's continuations.
    """
    responses = row["filtered_resps"]
    if not isinstance(responses, list) or not responses or row[metric] not in (0, 1):
        return None
    if metric == "exact_match":
        return responses[0] if isinstance(responses[0], str) else None
    try:
        scores = np.array([float(response[0]) for response in responses])
        arguments = row["arguments"].values() if isinstance(row["arguments"], dict) else row["arguments"]
        choices = [pair["arg_1"] if isinstance(pair, dict) else pair[1] for pair in arguments]
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    if all(choice.startswith(" ") for choice in choices):  # the space between question and answer is not counted
        choices = [choice[1:] for choice in choices]
    if len(choices) != len(scores) or not all(choices):
        return None
    sizes = {"acc": [1] * len(choices), "acc_norm": list(map(len, choices)),
             "acc_bytes": [len(choice.encode("utf-8", "replace")) for choice in choices]}  # fmt: skip
    answer = int((scores / np.array(sizes[metric], float)).argmax())
    target = str(row["target"])
    right = {int(target)} if target.isdecimal() else set()
    right |= {choices.index(target)} if target in choices else set()
    agrees = not right or any((answer == one) == (row[metric] == 1) for one in right)
    return answer if agrees else None
