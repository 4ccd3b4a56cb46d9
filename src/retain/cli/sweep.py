"""`retain sweep`: a YAML file of runs of one verb → a row of results for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from retain.checks import Settings, setting
from retain.cli.flags import Verb
from retain.lab.sweep import run_sweep
from retain.report.numbers import quantity


@dataclass(kw_only=True)
class SweepConfig(Settings):
    """`retain sweep`: many runs of one verb, each made once; the file comes first, without a flag."""

    sweep: str = setting(
        "", "YAML file with verb, common flags, a grid of lists, and a list of flags together.", required=True
    )
    output_dir: str = setting("", "Folder for results.jsonl, runs/ and logs/.", required=True)
    engine: Literal["local", "ray"] = setting(
        "local", "local: processes of this machine. ray: the cluster of RAY_ADDRESS, or one begun here."
    )
    num_workers: int | None = setting(None, "Runs at a time. Default: as many as there are cores for.", low=1)
    cores_per_run: int = setting(1, "Cores of each run, and threads that it uses.", low=1)


def run_sweep_file(config: SweepConfig) -> None:
    """Make the runs, and print where their results are."""
    options = {name: getattr(config, name) for name in ("engine", "num_workers", "cores_per_run")}
    rows = run_sweep(config.sweep, config.output_dir, check=partial(check_runs, config.sweep), **options)
    print(f"{quantity(len(rows), 'run')}: {Path(config.output_dir) / 'results.jsonl'}")


def check_runs(path: str, runs: Sequence[Any]) -> None:
    """Refuse a sweep before its first run where a run's own command line would be refused.

    Raises:
        ValueError: naming the run's flag.
    """
    from retain.cli.main import VERBS, load_verb

    verb = runs[0].verb  # of all
    if verb not in VERBS or verb == "sweep":
        raise ValueError(f"sweep: {path} has verb {verb!r}; name another of retain's, say finetune")
    try:
        load_verb(verb).check(run.arguments(Path("run"))[1:] for run in runs)
    except ValueError as error:
        raise ValueError(f"sweep: {path}: {error}") from error


VERB = Verb(
    name="sweep",
    example="retain sweep sweep.yaml --output_dir sweep/",
    settings=(SweepConfig,),
    run=run_sweep_file,
    resume="finished runs are kept; run the same command again to resume the others",
    positional="sweep",
)
