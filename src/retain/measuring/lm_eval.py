"""lm-evaluation-harness: its answers of base and tuned model, paired question by question, in memory or from files.

Written for lm_eval 0.4.13. In memory its own tasks run on both models, with log-probabilities in float32, as in
`choices`. A line of a per-sample file (`--log_samples`, `lm_eval.result_schema.SampleResult`) has `doc_id`, `target`,
`arguments`, `filtered_resps`, `filter`, `doc_hash`, `prompt_hash`, and a number for each metric. A multiple-choice
response is `[log-likelihood, is_greedy]` per choice; any other is text.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retain.data.row_files import json_rows
from retain.files import first_line
from retain.measuring.paired_answers import compare_answers
from retain.report.report import ForgettingReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retain.models.base_predictions import MeasuredBase

logger = logging.getLogger(__name__)

ANSWER_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # those that judge one answer by itself
Samples = dict[str, dict[int, dict[str, Any]]]  # filter → doc_id → line


def measure_with_lm_eval(
    base: PreTrainedModel | MeasuredBase,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Evaluate both models on the same questions and compare their answers.

    The global random states are set by `seed`, as lm_eval does.

    Args:
        tasks: names of tasks, groups or tags, or YAML files.
        include_path: folder with your own tasks.
        limit: number of questions of each task, from its beginning; None for all.
        num_fewshot: examples before each question; None for what each task says.
        batch_size: rows per forward pass.

    Returns:
        Name of each task (subtasks of groups) → what `measure_choices` gives, with a rule for each metric.
        A task whose answers do not follow from its samples is left out with a warning.

    Raises:
        ValueError: one line, if lm_eval is missing, a task is unknown, cannot be loaded or has no metric that judges
            answers one by one, or no task could be compared.
    """
    from retain.models.base_predictions import MeasuredBase

    base, loaded = MeasuredBase.of(base), load_tasks(tasks, include_path)
    options: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "chat_template": chat_template}
    options |= {"batch_size": batch_size, "seed": seed}
    put = [tokenizer, list(loaded.values())]
    before = base.recall("lm_eval", [list(loaded), options], lambda: evaluate_samples(base.model, *put, **options))
    after = evaluate_samples(tuned, *put, who="model", **options)
    found = {}
    for task in loaded:
        style = f"{task} of lm-evaluation-harness, as it puts them"
        try:
            found[task] = pair_samples(before[task], after[task], names=("base", "tuned model"), style=style)
        except ValueError as error:
            logger.warning("lm_eval: %s is left out; %s", task, first_line(error))
            continue
        found[task]["chat_template"] = chat_template
    if not found:
        raise ValueError(f"lm_eval: no answers of {', '.join(loaded)} can be compared; give tasks of multiple choice")
    return found


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, Any]:
    """Tasks of lm_eval by name, groups and tags taken apart."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm_eval: the package is not installed; pip install 'retain[eval]'")
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"include_path: no folder {path!r}; give one with the YAML files of tasks")
    for theirs in (False, True):  # which are 15,000 files
        manager = TaskManager(include_path=path, include_defaults=theirs)
        unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
        try:
            loaded = None if unknown else manager.load(list(names))["tasks"]
        except Exception as error:  # data sets come from the Hub, and tasks may be programs
            if theirs:
                raise ValueError(f"lm_eval: cannot load {', '.join(names)}; {first_line(error)}") from error
            continue
        if loaded is not None:
            break
    else:
        raise ValueError(f"lm_eval: no task {unknown[0]!r}; `lm-eval ls tasks` lists them, or give a YAML file")
    for name, task in loaded.items():
        metrics = sorted(task.higher_is_better())
        if not set(metrics) & set(ANSWER_METRICS):
            raise ValueError(f"lm_eval: {name!r} has {', '.join(metrics) or 'no metric'}, which judge no answer by "
                             f"itself; give tasks with {', '.join(ANSWER_METRICS)}")  # fmt: skip
    return loaded


def evaluate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    limit: int | None,
    num_fewshot: int | None,
    chat_template: bool,
    batch_size: int,
    seed: int,
    who: str = "base",
) -> dict[str, Samples]:
    """What one model answers: name of the task → its samples. Its dtype, device, modes and tokenizer stay.

    Args:
        who: the setting that named the model, for errors.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from retain.models.reference import evaluation_mode

    with evaluation_mode(model):
        result = simple_evaluate(
            # A copy, since a tokenizer without a padding token is given one.
            model=HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                softmax_dtype=torch.float32,
            ),
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat_template,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    found: dict[str, Samples] = {}
    for task, rows in result["samples"].items():
        found[task] = {}
        for row in rows:
            _add_sample(found[task], row, f"{who}: its answer to {task} of lm_eval")
    return found


def read_samples(path: Path) -> Samples:
    """The lines of a per-sample file by filter and question.

    Raises:
        ValueError: one line naming the file and the line, for what is not such a file or holds a question twice.
    """
    samples: Samples = {}
    for where, row in json_rows(path, "pair"):
        if not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise ValueError(f"{where} is not a sample of lm-eval; give a file that lm_eval --log_samples wrote")
        _add_sample(samples, row, where)
    if not samples:
        raise ValueError(f"pair: {str(path)!r} is empty; give a file that lm_eval --log_samples wrote")
    return samples


def _add_sample(samples: Samples, row: dict[str, Any], where: str) -> None:
    """Put a line where it belongs; a `ValueError` that begins with `where` for one twice, or a number not finite."""
    of_filter = samples.setdefault(str(row.get("filter", "none")), {})
    if row["doc_id"] in of_filter:
        raise ValueError(f"{where} has doc_id {row['doc_id']!r} a second time; give a file of one run")
    responses = row["filtered_resps"] if isinstance(row["filtered_resps"], list) else []
    numbers = [one[0] for one in responses if isinstance(one, (list, tuple)) and one]  # log-likelihoods; else texts
    for number in (*numbers, *(row[name] for name in ANSWER_METRICS if name in row)):
        if str(number).lower().lstrip("-") in ("nan", "inf", "infinity"):  # also where they were written as text
            raise ValueError(f"{where} has {number}, which is no result; evaluate that model again, in float32")
    of_filter[row["doc_id"]] = row


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
    names = (repr(str(base)), repr(str(tuned)))
    return pair_samples(read_samples(base), read_samples(tuned), names=names, style="paired from files of lm-eval")


def pair_samples(base: Samples, tuned: Samples, *, names: tuple[str, str], style: str) -> dict[str, Any]:
    """The same for samples in memory.

    Args:
        names: where each side comes from, for errors.
        style: how the questions were put, for the page.
    """
    rules: dict[str, Any] = {}
    notes: dict[str, None] = {}
    unclear: dict[str, None] = {}  # metrics whose answers do not follow
    for name in base:
        before, after = (side.get(name, {}) for side in (base, tuned))
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
        raise ValueError(f"pair: {names[0]} and {names[1]} {why}")
    most = max(compared["agreement"]["num_questions"] for compared in rules.values())
    return {"style": style, "chat_template": None, "num_questions": most, "rules": rules,
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
