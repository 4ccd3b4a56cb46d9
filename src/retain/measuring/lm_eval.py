"""lm-evaluation-harness run on base and tuned model in memory, and its answers paired question by question.

Written for lm_eval 0.4.13. Tasks are its own, loaded once for both models: names, groups (each subtask is measured),
tags, or YAML files. Its log-probabilities are taken in float32, as in `choices`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retain.measuring.lm_eval_files import METRICS, Samples, add_sample, pair_samples
from retain.models.reference import evaluation_mode
from retain.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def measure_with_lm_eval(
    base: PreTrainedModel,
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
        include_path: a folder with tasks of one's own.
        limit: only so many questions of each task, from its beginning.
        num_fewshot: examples before each question; None for what each task says.
        batch_size: rows per forward pass.

    Returns:
        Name of each task (subtasks of groups) → what `measure_choices` gives, with a rule for each metric.
        A task whose answers do not follow from its samples is left out with a warning.

    Raises:
        ValueError: one line, if lm_eval is missing, a task is unknown, cannot be loaded or has no metric that judges
            answers one by one, or no task could be compared.
    """
    loaded = load_tasks(tasks, include_path)
    options: dict[str, Any] = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat_template": chat_template,
        "batch_size": batch_size,
    }
    sides = [
        evaluate_samples(model, tokenizer, list(loaded.values()), who=who, seed=seed, **options)
        for who, model in (("base", base), ("model", tuned))
    ]
    found = {}
    for task in loaded:
        style = f"{task} of lm-evaluation-harness, as it puts them"
        try:
            found[task] = pair_samples(sides[0][task], sides[1][task], names=("base", "tuned model"), style=style)
        except ValueError as error:
            logger.warning("lm_eval: %s is left out; %s", task, first_line(error))
            continue
        found[task]["chat_template"] = chat_template
    if not found:
        raise ValueError(f"lm_eval: no answers of {', '.join(loaded)} can be compared; give tasks of multiple choice")
    return found


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, Any]:
    """Tasks of lm_eval by name, groups and tags taken apart.

    Raises:
        ValueError: as `measure_with_lm_eval`.
    """
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
        if not set(metrics) & set(METRICS):
            raise ValueError(f"lm_eval: {name!r} has {', '.join(metrics) or 'no metric'}, which judge no answer by "
                             f"itself; give tasks with {', '.join(METRICS)}")  # fmt: skip
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
    who: str = "model",
) -> dict[str, Samples]:
    """What one model answers: name of the task → its samples. Its dtype, device, modes and tokenizer stay.

    Args:
        who: the setting that named the model, for errors.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

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
            add_sample(found[task], row, f"{who}: its answer to {task} of lm_eval")
    return found
