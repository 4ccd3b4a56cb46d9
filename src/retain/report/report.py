"""`ForgettingReport`: report.json, and everything that is rendered from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from retain import versions
from retain.files import NUMBER, check_shape, read_json, without_nan, write_text
from retain.report import page
from retain.report.chain import chain_panel
from retain.report.figures import panels
from retain.report.model_card import card_with_forgetting
from retain.report.results import RunResults, TextResult, contradiction, json_shape, read_as
from retain.report.sentences import verdict

REPORT_SCHEMA = "retain.report/1"


@dataclass(repr=False)
class ForgettingReport:
    """The result of one `retain measure`: `data` is report.json, the dict of schema `retain.report/1`.

    `report["wiki"].ref_kl.value` is a number, `.ci` its interval; `report.results` has everything by name, typed, as
    `report.results.choices["arc"].rules["acc"].agreement`; `print(report)` is the summary.
    """

    data: dict[str, Any]

    @classmethod
    def new(cls, name: str, **parts: Any) -> ForgettingReport:
        """A new report from its measured parts; others are empty."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"schema": REPORT_SCHEMA, "name": name, "versions": versions(), "created": created, "settings": {}}
        return cls({**head, "retention": {}, **parts})

    @property
    def results(self) -> RunResults:
        """The current content of `data`, typed."""
        return read_as(RunResults, self.data)

    def __getitem__(self, text: str) -> TextResult:
        """The metrics of a retention or new-task text.

        Raises:
            KeyError: if no text has this name; lists those that exist.
        """
        texts = self.results.texts
        if text not in texts:
            raise KeyError(f"{text!r} was not measured; there are {', '.join(map(repr, texts)) or 'no texts'}")
        return texts[text]

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<ForgettingReport: {self.verdict}>"

    def _repr_html_(self) -> str:
        """The page for notebooks, in a sandboxed frame: its style stays inside, and nothing in it can run."""
        html = self._page.html()
        return f'<iframe sandbox srcdoc="{escape(html)}" style="width: 100%; height: 40em; border: 0"></iframe>'

    @classmethod
    def from_json(cls, path: str | Path) -> ForgettingReport:
        """Read a report.json that `write` or `to_json` wrote.

        Raises:
            ValueError: in one line, if the file is not a report or is damaged.
        """
        data = read_json(Path(path), "runs", "give what `retain measure` wrote")
        if not isinstance(data, dict) or data.get("schema") != REPORT_SCHEMA:
            if isinstance(data, dict) and "runs" in data:
                raise ValueError(f"runs: {str(path)!r} compares several models; give the folder of each, next to it")
            schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"schema of {path} is {schema!r}, expected {REPORT_SCHEMA!r}; make it with `retain measure`"
            )
        where = f"runs: {str(path)!r}"
        shape = json_shape(RunResults) | {"trajectory?": [{"step": NUMBER}]}
        check_shape(data, shape, f"{where} is damaged", "measure again")
        for sums in [*(data.get("per_document") or {}).values(), *(data.get("documents") or [])]:
            if len({len(column) for column in sums.values() if isinstance(column, list)}) > 1:
                raise ValueError(f"{where} is damaged: its columns differ in their number of documents; measure again")
        if without_nan(data) != data:
            raise ValueError(f"{where} holds a number that is not finite, which is not a result; measure again")
        report = cls(data)
        if wrong := contradiction(report.results):
            raise ValueError(f"{where} is damaged: {wrong}; measure again")
        return report

    @property
    def _page(self) -> page.Page:
        return page.Page([self.results], f"Forgetting report: {self.data['name']}")

    @property
    def verdict(self) -> str:
        """One sentence: whether forgetting is shown, how much, and what was learned for it."""
        return verdict(page.harmless(self.results))

    def summary(self) -> str:
        """Verdict and tables for a terminal."""
        return self._page.summary()

    def to_json(self, path: str | Path) -> None:
        write_text(path, _json(self.data))

    def to_model_card(self, path: str | Path) -> None:
        """Add the section "Forgetting" and the `model-index` to a model card, which is created if there is none."""
        old = Path(path).read_text(encoding="utf-8-sig") if Path(path).exists() else ""
        write_text(path, card_with_forgetting(old, self.results))

    def write(self, folder: str | Path) -> None:
        """Write report.md, report.html and, last, report.json, each whole or not at all."""
        _write(Path(folder), self.data, self._page)


def write_comparison(
    folder: str | Path,
    reports: Sequence[ForgettingReport],
    title: str,
    notes: Sequence[str] = (),
    *,
    chain: bool = False,
) -> page.Page:
    """Write report.json (`runs`, `comparison`), report.md, report.html and figure.png for several runs of one base.

    figure.png, learning against forgetting, is written if both were measured.

    Args:
        chain: the runs are stages in order, each finetuned from the one before and measured against the first base. The
            page shows what each text lost since its loss was lowest, and report.json has it as `chain`.

    Returns:
        The page, which also has a summary for a terminal.
    """
    from retain.report import style  # with matplotlib, which reading a report does not need

    runs, folder = [report.results for report in reports], Path(folder)
    written = page.Page(runs, title, notes, chain)
    data: dict[str, Any] = {"title": title, "notes": list(notes), "runs": [report.data for report in reports]}
    data |= {"chain": list(map(asdict, written.chained))} if chain else {"comparison": asdict(written.compared)}
    _write(folder, data, written)
    figure: Any  # or None
    if chain:
        figure = style.draw_panel(chain_panel(runs, written.chained), [text.name for text in written.chained])
    else:
        figure = style.frontier_row(panels(runs, written.compared), len(runs))
    if figure is not None:
        style.save_png(figure, folder / "figure.png")
    return written


def _write(folder: Path, data: dict[str, Any], shown: page.Page) -> None:
    files = {
        "report.md": shown.markdown(),
        "report.html": shown.html(),
        "report.json": _json(data),
    }  # json: it is whole
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(folder / name, text)


def _json(data: dict[str, Any]) -> str:
    return json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"
