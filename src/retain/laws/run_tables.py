"""Runs to fit a law to: one checked row per measurement, from rows, tables on disk or `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retain.data.row_files import JSON_SUFFIXES, TABLE_SUFFIXES, json_rows, read_table
from retain.files import METRICS_FILE, read_json, read_jsonl, read_settings, short_names
from retain.laws.forms import Array, column_of

RECIPE = {  # settings that are no input of a law, by their section of `retain_config.json`
    "replay": ("replay_objective", "replay_coef"),
    "training_arguments": (
        *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"),
    ),
    "": ("new_rows", "loss_tokens", "retention_windows"),  # a hash of the training rows; what the losses count
}
ADAPTER_RECIPE = ("base_model_name_or_path", "peft_type", "target_modules")  # in PEFT's adapter_config.json
NO_NAME = (None, "")
Rows = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Runs:
    """Measurements of runs: the run and data set of each row, and columns of numbers, shape (rows,)."""

    run: tuple[str, ...]
    dataset: tuple[str, ...]
    columns: dict[str, Array]
    left_out: tuple[str, ...] = ()  # how many measurements were left out, a sentence for each reason

    def __len__(self) -> int:
        return len(self.run)

    @cached_property
    def keys(self) -> list[str]:
        """The run of each row, prefixed with its data set if there are several."""
        several = len(self.datasets) > 1
        return [f"{data}/{run}" if several else run for run, data in zip(self.run, self.dataset, strict=True)]

    @cached_property
    def names(self) -> list[str]:
        """Each run once, in order; the same run on two data sets is two runs."""
        return list(dict.fromkeys(self.keys))

    @cached_property
    def datasets(self) -> list[str]:
        """Each data set once, in order."""
        return list(dict.fromkeys(self.dataset))

    @cached_property
    def run_codes(self) -> np.ndarray:
        """Index into `names` of each row's run."""
        return np.array([self.names.index(key) for key in self.keys])

    @cached_property
    def dataset_codes(self) -> np.ndarray:
        """Index into `datasets` of each row's data set."""
        return np.array([self.datasets.index(name) for name in self.dataset])


def as_runs(rows: Runs | Rows, columns: Sequence[str]) -> Runs:
    """Check rows (mappings, or a mapping of columns) and keep `columns`, `run` and `dataset`."""
    table = _by_column(rows)
    if missing := [name for name in ("run", *columns) if name not in table]:
        found = ", ".join(map(str, table)) or "none"
        raise ValueError(f"runs: no column {missing[0]!r}; needs {', '.join(('run', *columns))}, has {found}")
    length = {len(values) for values in table.values()}
    if length == {0} or len(length) > 1:
        counts = ", ".join(map(str, sorted(length)))
        raise ValueError(f"runs: columns of {counts} rows; give the same number in each, at least 1")
    labels, sets = _names("run", table["run"]), [""] * len(table["run"])
    if any(name not in NO_NAME for name in table.get("dataset", [])):
        sets = _names("dataset", table["dataset"])
    kept = dict.fromkeys((*columns, *(["num_steps"] if "num_steps" in table else [])))
    numbers = {name: _numbers(name, table[name], labels) for name in kept}
    runs = Runs(tuple(labels), tuple(sets), numbers, rows.left_out if isinstance(rows, Runs) else ())
    _check_runs(runs)
    return runs


def _by_column(rows: Any) -> dict[str, Sequence[Any]]:
    if isinstance(rows, Runs):
        rows = {"run": rows.run, "dataset": rows.dataset, **rows.columns}
    if isinstance(rows, Mapping):
        return {name: list(values) for name, values in rows.items()}
    if not (isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)):
        raise ValueError(f"runs: {type(rows).__name__} is not a table; give a list of rows or a mapping of columns")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _names(column: str, values: Sequence[Any]) -> list[str]:
    for index, value in enumerate(values, start=1):
        if value in NO_NAME or value != value:  # NaN, as in pandas
            raise ValueError(f"{column}: missing in row {index}; name it in every row")
    return [str(value) for value in values]


def _numbers(name: str, values: Sequence[Any], labels: Sequence[str]) -> Array:
    numbers, column = np.full(len(values), np.nan), column_of(name)
    for index, (value, label) in enumerate(zip(values, labels, strict=True)):
        with suppress(TypeError, ValueError):
            numbers[index] = value  # None is NaN
        if not column.allows(numbers[index]):
            raise ValueError(f"{name}: {value!r} in run {label!r} is not {column.range}; correct or drop the row")
    return numbers


def _check_runs(runs: Runs) -> None:
    rows_by_run: dict[str, list[tuple[float, ...]]] = {}
    for key, row in zip(runs.keys, zip(*runs.columns.values(), strict=True), strict=True):
        rows_by_run.setdefault(key, []).append(row)
    names, twins = list(runs.columns), dict[tuple, str]()
    for key, rows in rows_by_run.items():
        distinct = {row[names.index("num_steps")] for row in rows} if "num_steps" in names else set(rows)
        if len(distinct) < len(rows):
            raise ValueError(f"run: {key!r} has the same step or row twice; name every run (and seed) differently")
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            if column_of(name).per_run and len(set(values)) > 1:
                raise ValueError(f"{name}: run {key!r} has several values; name every run differently")
        twin = twins.setdefault(tuple(sorted(rows)), key)
        if twin != key:
            raise ValueError(f"run: {key!r} is a copy of {twin!r}, which makes intervals too narrow; give it once")


def read_runs(
    paths: Sequence[str | Path],
    columns: Sequence[str],
    *,
    retention: str | None = None,
    metric: str = "ref_kl",
    min_steps: float = 0,
) -> Runs:
    """Read the `metrics.jsonl` of finetunes, or tables (CSV, Parquet, JSONL) that already have the columns.

    Measurements at step 0, where nothing was trained, are left out and counted in `left_out`.

    Args:
        columns: the columns that the form needs.
        retention: the retention text of `forgetting_loss`, if the runs measured several.
        metric: its metric: ref_kl, forgetting or loss.
        min_steps: leave out measurements before this step, which the warm-up affects.
    """
    rows: list[dict[str, Any]] = []
    partial = 0
    files = [_file_of(Path(path)) for path in paths]
    places = [file.parent if file.name == METRICS_FILE else file for file in files]
    for file, name in zip(files, short_names(places, "runs"), strict=True):
        if not file.is_file():
            raise ValueError(f"runs: no file {str(file)!r}; give metrics.jsonl files of finetunes, or tables")
        if file.name == METRICS_FILE:
            table, lacking = read_metrics(file, name, columns, retention, metric)
            partial += lacking
        else:
            table = _read_table(file, columns)
        if twice := {str(row.get("run")) for row in table} & {str(row.get("run")) for row in rows}:
            raise ValueError(
                f"run: {min(twice)!r} is in {file.name!r} and in an earlier file; name every run differently"
            )
        rows += table
    steps = [at if isinstance(at := row.get("num_steps"), int | float) else math.nan for row in rows]
    reasons = {
        "at step 0 left out; nothing was trained there": sum(at == 0 for at in steps),
        f"before step {min_steps:g} left out, by min_steps": sum(0 < at < min_steps for at in steps),
        "left out; they have only one of the two losses": partial,
    }
    kept = [row for row, at in zip(rows, steps, strict=True) if not (at == 0 or 0 < at < min_steps)]  # < 0: `as_runs`
    left_out = tuple(f"runs: {n} {'row' if n == 1 else 'rows'} {reason}" for reason, n in reasons.items() if n)
    if left_out and not kept:
        raise ValueError(f"{'; '.join(left_out)}; no row remains: give measurements of later steps")
    return replace(as_runs(kept, columns), left_out=left_out)


def recipe_differences(sources: Sequence[str]) -> list[str]:
    """A sentence for each recipe setting in which finetunes differ; runs of a law may differ only in its columns."""
    folders = [file.parent for file in map(_file_of, map(Path, sources)) if file.name == METRICS_FILE]
    recipes, notes = list(map(_recipe, folders)), []
    for name in dict.fromkeys(name for recipe in recipes for name in recipe):
        values = sorted({recipe[name] for recipe in recipes if name in recipe})
        if len(values) > 1:
            notes.append(f"{name}: the runs have {', '.join(values)}; a law is of one recipe: fit runs of one value")
    return notes


def _recipe(folder: Path) -> dict[str, str]:
    """A run's recipe by setting, and the number of documents of its retention texts, from its files."""
    settings = read_settings(folder, {"replay?": dict, "training_arguments?": dict, "retention?": {str: int}})
    parts = [(settings.get(part) or {} if part else settings, names) for part, names in RECIPE.items()]
    if (adapter := folder / "adapter_config.json").is_file():
        parts.append((read_json(adapter, "runs", "restore it, or give a table"), ADAPTER_RECIPE))
    recipe = {name: part[name] for part, names in parts for name in names if part.get(name) is not None}
    recipe |= {f"documents of {text}": count for text, count in (settings.get("retention") or {}).items()}
    return {name: str(sorted(value) if isinstance(value, list) else value) for name, value in recipe.items()}


def _file_of(path: Path) -> Path:
    return path / METRICS_FILE if path.is_dir() else path


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a table, which must have `run` and `columns`."""
    needed = ("run", *columns)
    if path.suffix.lower() in JSON_SUFFIXES:
        rows = [row for _, row in json_rows(path, "runs")]
    elif path.suffix.lower() in TABLE_SUFFIXES:
        rows = read_table(path, "runs", text_columns=("run", "dataset")).to_pylist()  # "01" and "1" are two runs
    else:
        raise ValueError(f"runs: {path.name!r} has an unknown ending; use metrics.jsonl, .csv, .parquet or .jsonl")
    if absent := [name for name in needed if not any(name in row for row in rows)]:
        found = ", ".join(dict.fromkeys(str(name) for row in rows for name in row)) or "none"
        raise ValueError(
            f"runs: {path.name!r} has no column {absent[0]!r}; needs {', '.join(needed)}, has {found:.200}"
        )
    return rows


def read_metrics(
    path: Path, run: str, columns: Sequence[str], retention: str | None, metric: str
) -> tuple[list[dict[str, Any]], int]:
    """Evaluations of one finetune, with its number of tuned parameters; and how many lack one of the two losses."""
    steps: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(path, {"step": int}):  # an evaluation is logged in two rows of one step
        steps.setdefault(row["step"], {}).update(row)
    names = sorted({key.split("/", 1)[1].rpartition("/")[0] for row in steps.values() for key in row
                    if key.startswith("retention/") and key.endswith(f"/{metric}")})  # fmt: skip
    if retention is None and len(names) > 1:
        raise ValueError(f"retention: {path} has {', '.join(names)}; choose one with --retention_name NAME")
    key = f"retention/{retention or ''.join(names)}/{metric}"
    wanted = {"finetuning_loss": "eval_loss", "forgetting_loss": key}
    wanted = {column: logged for column, logged in wanted.items() if column in columns}
    complete = [step for step, row in steps.items() if all(name in row for name in wanted.values())]
    partial = sum(any(name in row for name in wanted.values()) for row in steps.values()) - len(complete)
    if not any(complete):
        lacking = next((name for name in wanted.values() if not any(name in row for row in steps.values())), "step")
        remedy = "finetune with --eval_strategy steps, --eval_dataset_name and --retention"
        if lacking == key and names:
            remedy = f"choose one of {', '.join(names)} with --retention_name"
        raise ValueError(f"runs: {path} has no evaluation with {lacking!r} after step 0; {remedy}")
    size = {"num_params": tuned_params(path.parent)} if "num_params" in columns else {}
    rows = [
        {"run": run, "num_steps": step, **size, **{column: steps[step][name] for column, name in wanted.items()}}
        for step in sorted(complete)
    ]
    return rows, partial


def tuned_params(folder: Path) -> int:
    """Number of parameters that a finetune tuned, from its `retain_config.json`."""
    count = read_settings(folder, {"num_params?": int}).get("num_params")
    if count is None:
        raise ValueError(
            f"num_params: missing from {str(folder / 'retain_config.json')!r}; restore it, or give a table"
        )
    return int(count)
