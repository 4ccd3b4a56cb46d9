"""`retain sweep`: a YAML file of runs of one verb → a row of results for each run, made once."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from retain import versions
from retain.checks import Settings, setting
from retain.cli.flags import Verb
from retain.files import exclusive, read_jsonl
from retain.lab.runner import RunRows, VerbRun, run_here
from retain.progress import StageProgress, progress_line
from retain.report.numbers import is_number, quantity

RESULTS = "results.jsonl"
REPORT_PARTS = ("new_task", "retention", "choices", "refusals", "behaviors", "drift", "knowledge")  # with numbers
GATE_CODES = (0, 2, 3)  # exit codes of `measure` that are not errors


@dataclass(kw_only=True)
class SweepConfig(Settings):
    """Settings of `retain sweep`; the file comes first, without a flag."""

    sweep: str = setting(
        "", "YAML file with a verb, common flags, a grid of lists, and a list of flags that go together.", required=True
    )
    output_dir: str = setting("", "Folder for results.jsonl, runs/ and logs/.", required=True)
    num_workers: int | None = setting(None, "Runs at a time. Default: as many as the cores allow.", low=1)
    cores_per_run: int = setting(1, "Cores, and threads, per run.", low=1)


def run_sweep(config: SweepConfig) -> None:
    """Check the sweep, make its runs, and print where the results are."""
    runs = read_sweep(config.sweep)
    check_runs(config.sweep, runs)
    rows = make_runs(config, runs)
    print(f"{quantity(len(rows), 'run')}: {Path(config.output_dir) / RESULTS}")


def read_sweep(path: str | Path) -> list[VerbRun]:
    """The runs of a YAML file: `verb`, `common` flags, a `grid` of lists, and a `list` of flags that go together.

    Every combination of the grid is run with every entry of the list. The flag `config` names a YAML file of further
    flags; the sweep's own flags win.
    """
    sweep, keys = _read_yaml(path, "sweep"), {"verb", "common", "grid", "list"}
    if unknown := set(sweep) - keys:
        raise ValueError(f"sweep: {path} has {min(unknown)!r}; use {', '.join(sorted(keys))}")
    verb = sweep.get("verb")
    if not isinstance(verb, str):
        raise ValueError(f"sweep: {path} has verb {verb!r}; name one of retain's, say finetune")
    common, grid, entries = sweep.get("common") or {}, sweep.get("grid") or {}, sweep.get("list") or [{}]
    if not isinstance(entries, list) or not all(isinstance(flags, dict) for flags in (common, grid, *entries)):
        raise ValueError(
            f"sweep: {path} needs flags under common, lists of values under grid, flags in every list entry"
        )
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"sweep: grid of {name!r} in {path} is {values!r}; give a list of values")
    runs = [
        VerbRun(verb, _resolved({**common, **dict(zip(grid, cell, strict=True)), **entry}, str(path)))
        for cell in itertools.product(*grid.values())
        for entry in entries
    ]
    if len({run.key for run in runs}) < len(runs):
        repeated = next(run for at, run in enumerate(runs) if run in runs[:at])
        raise ValueError(f"sweep: {path} has a run twice: {dict(repeated.flags)}; leave one out")
    return runs


def _resolved(flags: dict[str, Any], where: str) -> dict[str, Any]:
    """Flags merged over those of their `config` file, without empty ones."""
    if "output_dir" in flags:
        raise ValueError(f"sweep: output_dir in {where} is chosen by the sweep; leave it out")
    if "config" in flags:
        if not isinstance(flags["config"], str):
            raise ValueError(f"sweep: config in {where} is {flags['config']!r}; give the path of one YAML file")
        flags = _read_yaml(flags["config"], "config") | {name: flags[name] for name in flags if name != "config"}
        flags.pop("output_dir", None)
    return {name: value for name, value in flags.items() if value is not None}


def _read_yaml(path: str | Path, field: str) -> dict[str, Any]:
    try:
        flags = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{field}: cannot read {str(path)!r}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{field}: {str(path)!r} is not YAML; check the file") from error
    if not isinstance(flags, dict):
        raise ValueError(f"{field}: {str(path)!r} holds {type(flags).__name__}, not keys with values; check the file")
    for name, value in flags.items():
        if not _fits_command_line({name: value}):
            raise ValueError(
                f"{field}: {str(path)!r} has {name!r}: {value!r}; give text (dates in quotes), numbers or lists of them"
            )
    return flags


def _fits_command_line(value: Any) -> bool:
    """Whether a value can be written on a command line; YAML also has dates, sets and keys that are not text."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _fits_command_line(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(map(_fits_command_line, value))
    return value is None or isinstance(value, (str, int, float))


def last_values(folder: Path) -> dict[str, float]:
    """The last value of everything that a run logged, and every number of its report, by its path in the report.

    In a report of several models, paths start with the name of the model.
    """
    values: dict[str, float] = {}
    for row in read_jsonl(folder / "metrics.jsonl"):
        values |= {name: value for name, value in row.items() if is_number(value)}
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        reports = report.get("runs")
        for model_report in reports or [report]:
            prefix = f"{model_report['name']}/" if reports else ""
            for part in REPORT_PARTS:
                values |= dict(numbers_in(model_report.get(part), f"{prefix}{part}"))
    return values


def numbers_in(part: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number with an interval in a part of a report, with its path."""
    if isinstance(part, dict) and is_number(part.get("value")):
        yield name, part["value"]
    elif isinstance(part, dict):
        for key, inner in part.items():
            yield from numbers_in(inner, f"{name}/{key}")


def sweep_row(run: VerbRun, folder: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """The row of a run in `results.jsonl`: how it ended, and what it logged and measured."""
    code = outcome["exit_code"]
    is_done = code == 0 or (run.verb == "measure" and code in GATE_CODES)
    return {
        "key": run.key, "verb": run.verb, "flags": dict(run.flags), "status": "done" if is_done else "failed",
        "exit_code": code, "error": None if is_done else outcome["last_line"], "seconds": outcome["seconds"],
        "folder": str(folder), "result": last_values(folder) if is_done else {}, "versions": versions(),
    }  # fmt: skip


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_runs(path: str, runs: Sequence[VerbRun]) -> None:
    """Refuse runs whose command line their verb would refuse."""
    from retain.cli.main import VERBS, load_verb

    verb = runs[0].verb  # the same for all runs
    if verb not in VERBS or verb == "sweep":
        raise ValueError(f"sweep: {path} has verb {verb!r}; name another of retain's, say finetune")
    try:
        load_verb(verb).check(run.arguments(Path("run"))[1:] for run in runs)
    except ValueError as error:
        raise ValueError(f"sweep: {path}: {error}") from error


def make_runs(config: SweepConfig, runs: Sequence[VerbRun]) -> list[dict[str, Any]]:
    """Make every run that is not done yet; return the rows of all runs.

    Raises:
        ValueError: after the last run, if any failed; the others are kept.
    """
    root, threads = Path(config.output_dir).absolute(), config.cores_per_run
    failed: list[dict[str, Any]] = []
    with exclusive(root, "a sweep"):
        results = RunRows(root / RESULTS)
        todo = [run for run in runs if run.key not in results.rows]
        with progress_line(), StageProgress("sweep", len(runs), "runs", initial=len(runs) - len(todo)) as stage:

            def record(run: VerbRun, outcome: dict[str, Any]) -> None:
                row = sweep_row(run, root / "runs" / run.key, outcome)
                results.append(row)
                if row["status"] == "failed":
                    failed.append(row)
                stage.update()

            workers = config.num_workers or max(1, num_cores() // threads)
            run_here(todo, root, record, num_workers=workers, threads=threads)
    if failed:
        raise ValueError(
            f"sweep: {len(failed)} of {len(runs)} runs failed, the others are kept; the first "
            f"({failed[0]['key']}): {failed[0]['error']}; correct it and run the sweep again"
        )
    return [results.rows[run.key] for run in runs]


VERB = Verb(
    name="sweep",
    example="retain sweep sweep.yaml --output_dir sweep/",
    settings=(SweepConfig,),
    run=run_sweep,
    resume="finished runs are kept; run the same command again to resume the others",
    positional="sweep",
)
