"""lm-evaluation-harness: a model's answers in its per-sample files.

Written for lm_eval 0.4.13. A line of a per-sample file (`--log_samples`, `lm_eval.result_schema.SampleResult`) has
`doc_id`, `target`, `arguments`, `filtered_resps`, `filter`, `doc_hash`, `prompt_hash`, and a number for each metric. A
multiple-choice response is `[log-likelihood, is_greedy]` per choice; any other is text.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from retain.data.row_files import json_rows
from retain.measuring.paired_answers import Answered, AnswerFile

ANSWER_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # those that judge one answer by itself


def read_samples(path: Path) -> AnswerFile:
    """The answers of a per-sample file by metric and filter.

    Raises:
        ValueError: one line naming the file and the line, for what is not such a file, holds a question twice, or a
            number that is not finite.
    """
    answers: dict[str, dict[Hashable, Answered]] = {}
    seen: set[tuple[str, Any]] = set()
    for where, row in json_rows(path, "pair"):
        if not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise ValueError(f"{where} is not a sample of lm-eval; give a file that lm_eval --log_samples wrote")
        name, number = str(row.get("filter", "none")), row["doc_id"]
        if (name, number) in seen:
            raise ValueError(f"{where} has doc_id {number!r} a second time; give a file of one run")
        seen.add((name, number))
        responses = row["filtered_resps"] if isinstance(row["filtered_resps"], list) else []
        numbers = [one[0] for one in responses if isinstance(one, list) and one]  # log-likelihoods; else texts
        metrics = [metric for metric in ANSWER_METRICS if metric in row]
        for value in (*numbers, *(row[metric] for metric in metrics)):
            if str(value).lower().lstrip("-") in ("nan", "inf", "infinity"):  # also where they were written as text
                raise ValueError(f"{where} has {value}, which is no result; evaluate that model again, in float32")
        question = {key: row.get(key) for key in ("doc_hash", "target_hash")}
        for metric in metrics:
            found = Answered(answer_of(row, metric), row[metric] == 1, question, row.get("prompt_hash"))
            answers.setdefault(metric if name == "none" else f"{metric} ({name})", {})[number] = found
    if not seen:
        raise ValueError(f"pair: {str(path)!r} is empty; give a file that lm_eval --log_samples wrote")
    return AnswerFile("lm-eval", task_of(path), path.parent.name or path.stem, str(path), answers)


def task_of(path: Path) -> str:
    """`arc_easy` of `samples_arc_easy_2026-11-01T10-00-00.123456.jsonl`; else the file's own name."""
    name = path.stem.removeprefix("samples_")
    task, _, date = name.rpartition("_")
    return task if task and date[:1].isdigit() else path.stem


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
