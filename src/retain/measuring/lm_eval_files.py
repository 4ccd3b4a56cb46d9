"""Per-sample results of lm-evaluation-harness (`--log_samples`), paired question by question without any model.

Schema of version 0.4.13 (`lm_eval.result_schema.SampleResult`): a line has `doc_id`, `target`, `arguments`,
`filtered_resps`, `filter`, `doc_hash`, `prompt_hash`, and a number for each of its metrics. A multiple-choice response
is `[log-likelihood, is_greedy]` per choice; any other is text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from retain.data.row_files import json_rows
from retain.report.answers import compare_answers

METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")
Samples = dict[str, dict[int, dict[str, Any]]]  # filter → doc_id → line


def read_samples(path: str | Path) -> Samples:
    """The lines of a per-sample file by filter and question.

    Raises:
        ValueError: one line naming the file and the line, for what is not such a file or holds a question twice.
    """
    samples: Samples = {}
    for where, row in json_rows(Path(path), "pair"):
        if not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise ValueError(f"{where} is not a sample of lm-eval; give a file that lm_eval --log_samples wrote")
        add_sample(samples, row, where)
    if not samples:
        raise ValueError(f"pair: {str(path)!r} is empty; give a file that lm_eval --log_samples wrote")
    return samples


def add_sample(samples: Samples, row: dict[str, Any], where: str) -> None:
    """Put a line where it belongs; a `ValueError` that begins with `where` for one twice, or a number not finite."""
    of_filter = samples.setdefault(str(row.get("filter", "none")), {})
    if row["doc_id"] in of_filter:
        raise ValueError(f"{where} has doc_id {row['doc_id']!r} a second time; give a file of one run")
    responses = row["filtered_resps"] if isinstance(row["filtered_resps"], list) else []
    numbers = [one[0] for one in responses if isinstance(one, (list, tuple)) and one]  # log-likelihoods; else texts
    for number in (*numbers, *(row[name] for name in METRICS if name in row)):
        if str(number).lower().lstrip("-") in ("nan", "inf", "infinity"):  # also where they were written as text
            raise ValueError(f"{where} has {number}, which is no result; evaluate that model again, in float32")
    of_filter[row["doc_id"]] = row


def paired_report(paths: Sequence[str]) -> dict[str, Any]:
    """The data of a report on two per-sample files of one task, the base's first."""
    from retain import versions

    base, tuned = (Path(path) for path in paths)
    return {
        "schema": "retain.report/1",
        "name": tuned.parent.name or tuned.stem,
        "base": {"model": str(base)},
        "tuned": {"model": str(tuned)},
        "settings": {},
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "retention": {},
        "choices": {task_of(tuned): pair(base, tuned)},
    }


def task_of(path: Path) -> str:
    """`arc_easy` of `samples_arc_easy_2026-11-01T10-00-00.123456.jsonl`; else the file's own name."""
    name = path.stem.removeprefix("samples_")
    task, _, date = name.rpartition("_")
    return task if task and date[:1].isdigit() else path.stem


def pair(base: Path, tuned: Path) -> dict[str, Any]:
    """Compare the answers that two files hold to the same questions; in the form of `measure_choices`.

    Raises:
        ValueError: if the files share no question, hold different ones under one number, or tell no answers.
    """
    names = (repr(str(base)), repr(str(tuned)))
    return pair_samples(read_samples(base), read_samples(tuned), names=names, style="paired from files of lm-eval")


def pair_samples(base: Samples, tuned: Samples, *, names: tuple[str, str], style: str) -> dict[str, Any]:
    """The same for samples in memory.

    Args:
        names: where each side comes from, for errors.
        style: how the questions were asked, for the page.
    """
    rules: dict[str, Any] = {}
    notes: dict[str, None] = {}
    untold: dict[str, None] = {}
    for name in base:
        before, after = (side.get(name, {}) for side in (base, tuned))
        both = [number for number in before if number in after]
        if not both:
            continue
        first: dict[Any, int] = {}
        shared = [
            number for number in both if first.setdefault(before[number].get("doc_hash") or number, number) == number
        ]
        if len(shared) < len(both):
            notes[f"{len(both) - len(shared)} of {len(both)} questions are copies of others, and left out."] = None
        notes |= dict.fromkeys(_differences(before, after, both))
        rows = [[of_file[number] for number in shared] for of_file in (before, after)]
        for metric in (metric for metric in METRICS if all(metric in row for of_file in rows for row in of_file)):
            found = [[answer_of(row, metric) for row in of_file] for of_file in rows]
            if None in found[0] + found[1]:
                notes[f"{metric} is left out: the answers behind it do not follow from the file."] = None
                untold[metric] = None
                continue
            right = [[row[metric] == 1 for row in of_file] for of_file in rows]
            rule = metric if name == "none" else f"{metric} ({name})"
            rules[rule] = compare_answers(found[0], found[1], *right)
    if not rules:
        why = f"share no question with {', '.join(METRICS)}; give two of the same task"
        if untold:
            why = f"do not tell the answers behind {', '.join(untold)}; give a task whose answers are right or wrong"
        raise ValueError(f"pair: {names[0]} and {names[1]} {why}")
    most = max(compared["agreement"]["num_questions"] for compared in rules.values())
    return {"style": style, "chat_template": None, "num_questions": most, "rules": rules,
            "notes": list(notes), "answers": {}, "lost": []}  # fmt: skip


def _differences(before: dict[int, dict], after: dict[int, dict], shared: list[int]) -> list[str]:
    """What the files do not share, in words; a `ValueError` where one number names two questions."""
    for number in shared:
        for key in ("doc_hash", "target_hash"):
            one, other = before[number].get(key), after[number].get(key)
            if one != other and one is not None and other is not None:
                raise ValueError(f"pair: doc_id {number} is not the same question in both files ({key} differs); "
                                 "give files of the same task and version")  # fmt: skip
    alone = [len(of_file) - len(shared) for of_file in (before, after)]
    other = sum(before[number].get("prompt_hash") != after[number].get("prompt_hash") for number in shared)
    said = [f"Left out, since only one file has them: {alone[0]} of the base's questions, {alone[1]} of the tuned's."]
    asked = [f"{other} of {len(shared)} questions were put in other words: another template, or other examples."]
    return said * any(alone) + asked * bool(other)


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
