"""`retain report`: several measured runs → one page, compared at matched new-task loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retain.checks import Settings, setting
from retain.cli.flags import Verb
from retain.cli.settings import CHAIN_HELP
from retain.files import exclusive, short_names
from retain.report.report import ForgettingReport, write_comparison


@dataclass(kw_only=True)
class ReportConfig(Settings):
    """Settings of `retain report`."""

    runs: list[str] = setting(
        list, "Folders written by `retain measure`, the unprotected run first.",
        required="give at least one folder as --runs DIR",
    )  # fmt: skip
    output_dir: str = setting("", "Folder for report.json, report.md and report.html.", required=True)
    title: str = setting("Forgetting report", "Title of the page.")
    chain: bool = setting(False, CHAIN_HELP)


def run_report(config: ReportConfig) -> None:
    """Write one page for several reports, and print its summary."""
    folder = Path(config.output_dir)
    paths = [Path(run) / "report.json" if Path(run).is_dir() else Path(run) for run in config.runs]
    if folder.resolve() in [path.parent.resolve() for path in paths]:
        raise ValueError(
            f"output_dir: {config.output_dir!r} is one of runs, and its report would be overwritten; choose another"
        )
    with exclusive(folder, "a report"):
        reports = [ForgettingReport.from_json(path) for path in paths]
        if len({report.data["name"] for report in reports}) < len(reports):  # e.g. two folders called out/
            for report, name in zip(reports, short_names([path.parent for path in paths], "runs"), strict=True):
                report.data["name"] = name
        comparison = write_comparison(folder, reports=reports, title=config.title, chain=config.chain)
    print(f"{comparison.summary()}\n\nreport: {folder / 'report.html'}")


VERB = Verb(
    name="report",
    example="retain report --runs report-plain/ report-replay/ --output_dir both/",
    settings=(ReportConfig,),
    run=run_report,
)
