"""`retain fit`: measured runs → a law of forgetting."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retain.checks import setting
from retain.cli.flags import Verb
from retain.cli.settings import SeedSettings
from retain.files import check_writable
from retain.laws.fit import fit_forgetting_law
from retain.laws.forms import FORMS, form_of
from retain.laws.run_tables import read_runs, recipe_differences


@dataclass(kw_only=True)
class FitConfig(SeedSettings):
    """Settings of `retain fit`; the files come first, without a flag."""

    runs: list[str] = setting(
        list,
        "metrics.jsonl files of finetunes, or tables (.csv, .parquet, .jsonl) with the columns run, num_params, "
        "num_steps, finetuning_loss, forgetting_loss, and dataset if there are several.",
        required="name the files first: retain fit runs/*/metrics.jsonl --output law.json",
    )
    output: str = setting("", "File for the law (.json).", required=True)
    form: str = setting("joint", f"Form of the law: {', '.join(FORMS)}.", required=True)
    plot: str | None = setting(None, "File for a figure (.png) of runs, curves and residuals.")
    retention_name: str | None = setting(
        None, "Retention text whose forgetting is fitted, if the finetunes measured several."
    )
    forgetting_metric: Literal["ref_kl", "forgetting", "loss"] = setting(
        "ref_kl", "Metric of that text to use as the forgetting loss: ref_kl, forgetting (loss after - before) or loss."
    )
    min_steps: float = setting(0.0, "Leave out measurements before this step, which the warm-up still affects.")
    shared_exponents: bool = setting(
        False, "Fit one set of exponents for all data sets, and everything else per data set."
    )
    num_resamples: int = setting(1000, "Bootstrap resamples over runs; 0 for no intervals.")
    num_starts: int = setting(32, "Random starting points of the exponents.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot is not None and not self.plot.lower().endswith(".png"):
            raise ValueError(f"plot: {self.plot!r} is no .png; give a name such as law.png")


def run_fit(config: FitConfig) -> None:
    """Fit a law to measured runs, write it, and print its summary."""
    for flag, path in (("output", config.output), ("plot", config.plot)):
        if path is not None:
            check_writable(Path(path), flag)
    runs = read_runs(
        config.runs,
        form_of(config.form).columns,
        retention=config.retention_name,
        metric=config.forgetting_metric,
        min_steps=config.min_steps,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary repeats them
        law = fit_forgetting_law(
            runs,
            config.form,
            shared_exponents=config.shared_exponents,
            num_starts=config.num_starts,
            num_resamples=config.num_resamples,
            seed=config.seed,
        )
    if all(Path(run).is_dir() or Path(run).name == "metrics.jsonl" for run in config.runs):  # tables do not name it
        law.settings["forgetting_metric"] = config.forgetting_metric
    law.to_json(config.output)
    lines = [law.summary(), *(f"! {note}" for note in recipe_differences(config.runs)), "", f"law: {config.output}"]
    if config.plot:
        from retain.report.style import save_png

        save_png(law.plot(), config.plot)
        lines.append(f"figure: {config.plot}")
    print("\n".join(lines))


VERB = Verb(
    name="fit",
    example="retain fit runs/*/metrics.jsonl --form joint --output law.json",
    settings=(FitConfig,),
    run=run_fit,
    positional="runs",
    groups={"retention_name": "Which measurements", "shared_exponents": "How it is fitted"},
)
