"""Results -> HTML, Markdown, JSON, a terminal table, a model card section. Takes plain dicts, never models.

Every string in a result may come from a model or a stranger: `visible` makes control characters harmless once, at
the door; HTML and Markdown escape at the point of writing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.files import MAPPING, NUMBER, atomic_path, check_shape, read_json, write_text
from retain.metrics import GAIN, KEPT_SUMS, METRICS, TABLE_METRICS
from retain.report import style as plots
from retain.report import tables
from retain.report.answers import MEANINGS, answers_sentence, answers_table
from retain.report.behaviour_tables import (
    KNOWLEDGE_FATES,
    SCORERS,
    drift_table,
    generations,
    knowledge_table,
    refusals_sentence,
    refusals_table,
)
from retain.report.comparison import compare_at_matched_loss
from retain.report.figures import panels
from retain.report.frontier import frontier_sentences
from retain.report.heat_map import heat_map, worst_documents
from retain.report.numbers import bounds_of, cell
from retain.report.sentences import (
    base_sentences,
    budget_sentence,
    comparison_verdict,
    end_sentences,
    overfit_sentence,
    run_verdict,
    scale_sentence,
    unlike_sentences,
)
from retain.text import visible

if TYPE_CHECKING:
    import jinja2

SCHEMA = "retain.report/1"
TEMPLATES = Path(__file__).parent / "templates"
MOST_CHARS, MOST_NAME = 20_000, 200  # of one string, of a run's name: what is longer is cut, and says so
# The shape of `data`, for `check_shape`: what every report tells, and what it may.
ENTRY = {"value?": NUMBER, "ci?": [(*NUMBER, type(None))] * 2, "num_documents?": int, "num_tokens?": int}
TEXTS = {str: {str: ENTRY}}
SUMS = {key: [NUMBER] for key in (*KEPT_SUMS, "num_tokens")}
CHOICES = {"num_questions": int, "style": str, "notes": [str], "rules": {str: MAPPING}}
CHOICES |= {"chat_template": (bool, type(None))}
SHAPE = {
    "name": str, "retention": TEXTS, "new_task?": TEXTS, "noise_floor?": TEXTS,
    **dict.fromkeys(("base?", "tuned?", "settings?", "training?", "versions?", "drift?", "knowledge?"), MAPPING),
    "created?": str, "trajectory?": [{"step": NUMBER}], "documents?": [{"step": NUMBER, "name": str, **SUMS}],
    "per_document?": {str: SUMS}, "worst?": {str: [{"tokens": [MAPPING]}]}, "warnings?": [str],
    "choices?": {str: CHOICES}, "refusals?": {str: {"scorers?": {str: MAPPING}}},
    "generations?": [{"prompt": str, "base": str, "tuned": str}],
}  # fmt: skip
TABLES = ("table", "answers", "refusals", "drift", "knowledge", "matched")  # of a terminal


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval over documents (None where too few give one), and what it was measured on."""

    value: float
    ci: tuple[float, float] | None
    num_documents: int
    num_tokens: int

    def __str__(self) -> str:
        return " ".join(cell(self.value, self.ci).values()).strip()


@dataclass(frozen=True)
class TextResult:
    """What was measured on one text: for each name in `retain.metrics.METRICS` (and `gain`) an `Estimate`, or None."""

    estimates: dict[str, Estimate]

    def __getattr__(self, name: str) -> Estimate:
        if name not in METRICS and name != GAIN.name:
            raise AttributeError(f"no metric {name!r}; there are {', '.join((GAIN.name, *METRICS))}")
        return self.estimates.get(name)  # type: ignore[return-value]  # None where it was not measured


@dataclass(repr=False)
class ForgettingReport:
    """The result of one `retain measure`: `data` is the dict of schema `retain.report/1`.

    `report["wiki"].ref_kl.value` is a number, `.ci` its interval; `print(report)` is the summary.
    """

    data: dict[str, Any]

    def __getitem__(self, text: str) -> TextResult:
        """What was measured on a retention text, or on one of the new task.

        Raises:
            KeyError: if no text has this name, with those that there are.
        """
        texts = {**(self.data.get("new_task") or {}), **(self.data.get("retention") or {})}
        if text not in texts:
            raise KeyError(f"{text!r} was not measured; there are {', '.join(map(repr, texts)) or 'no texts'}")
        found = {name: of for name in (GAIN.name, *METRICS) if (of := texts[text].get(name))}
        return TextResult({
            name: Estimate(of["value"], bounds_of(of.get("ci")), of["num_documents"], of["num_tokens"])
            for name, of in found.items()
        })  # fmt: skip

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<ForgettingReport: {self.verdict}>"

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks: its style stays inside, and nothing in it can run."""
        page = comparison_html([self.data], title=f"Forgetting report: {self.data['name']}")
        return f'<iframe sandbox srcdoc="{escape(page)}" style="width: 100%; height: 40em; border: 0"></iframe>'

    @classmethod
    def from_json(cls, path: str | Path) -> ForgettingReport:
        """Read what `write` wrote.

        Raises:
            ValueError: one line, for a file that is something else or damaged.
        """
        data = read_json(Path(path), "runs", "give what `retain measure` wrote")
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"schema of {path} is {found!r}, expected {SCHEMA!r}; make it with `retain measure`")
        check_shape(data, SHAPE, f"runs: {str(path)!r} is damaged", "measure again")
        if _finite(data) != data:
            raise ValueError(
                f"runs: {str(path)!r} holds a number that is not finite, which is no result; measure again"
            )
        return cls(data)

    @property
    def verdict(self) -> str:
        """One sentence in plain words: is forgetting shown, how much, and what was learned for it."""
        return told(visible(self.data))

    def summary(self) -> str:
        return comparison_summary([self.data])

    def to_json(self, path: str | Path) -> None:
        write_text(path, _json(self.data))

    def to_markdown(self, path: str | Path) -> None:
        write_text(path, comparison_markdown([self.data], title=f"Forgetting report: {self.data['name']}"))

    def to_html(self, path: str | Path) -> None:
        write_text(path, comparison_html([self.data], title=f"Forgetting report: {self.data['name']}"))

    def to_model_card(self, path: str | Path) -> None:
        """Put the section "Forgetting" and the `model-index` into a model card, a new one where there is none."""
        from retain.report.model_card import card_with_forgetting

        old = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
        write_text(path, card_with_forgetting(old, self.data))

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.md and report.html, each whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json(Path(folder) / "report.json")
        self.to_markdown(Path(folder) / "report.md")
        self.to_html(Path(folder) / "report.html")


def write_comparison(
    folder: str | Path, reports: list[dict], title: str, notes: Sequence[str] = (), interactive: bool = False
) -> None:
    """Write report.json (`runs`, `comparison`), report.md, report.html and figure.png for several runs of one base.

    figure.png, learning against forgetting, is written where both were measured. `interactive`: of report.html.
    """
    page = comparison_html(reports, title=title, notes=notes, interactive=interactive)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compared = compare_at_matched_loss(reports)
    whole = {"title": title, "notes": list(notes), "runs": reports, "comparison": compared}
    write_text(folder / "report.json", _json(whole))
    write_text(folder / "report.md", comparison_markdown(reports, title=title, notes=notes))
    write_text(folder / "report.html", page)
    figure = plots.frontier_row(reports, compared)
    if figure is not None:
        with atomic_path(folder / "figure.png") as temporary:
            plots.save_png(figure, temporary)


def comparison_html(reports: list[dict], *, title: str, notes: Sequence[str] = (), interactive: bool = False) -> str:
    """One self-contained page with no request to anywhere; no script in it unless `interactive`.

    `interactive`: the figures with lines answer the mouse. plotly's script is embedded, so the page takes 5 MB more.
    """
    view = _view(reports, title, notes)
    scripts, policy = _scripts(interactive)
    worst, left_out = worst_documents(shortened(reports))
    view |= {
        "figures": _figures(view["runs"], view["comparison"], interactive), "scripts": scripts, "policy": policy,
        "generations": generations(view["runs"]), "worst": worst, "worst_left_out": left_out,
    }  # fmt: skip
    return _environment(html=True).get_template("report.html").render(view)


def _scripts(interactive: bool) -> tuple[list[str], str]:
    if not interactive:
        return [], ""
    from retain.report.interactive import policy, scripts

    sources = scripts()
    return sources, policy(sources)


def comparison_markdown(reports: list[dict], *, title: str, notes: Sequence[str] = ()) -> str:
    return _environment(html=False).get_template("report.md").render(_view(reports, title, notes))


def model_card_section(data: dict) -> str:
    """The section "Forgetting" of a model card, as Markdown."""
    return _environment(html=False).get_template("model_card.md").render(_view([data], "Forgetting", ()))


def comparison_summary(reports: list[dict]) -> str:
    """Verdict and table for a terminal; no escape sequence of a model reaches it."""
    view = _view(reports, "", ())
    lines = [view["verdict"], ""]
    lines += [f"  ! {warning}" for warning in view["warnings"]] + [""] * bool(view["warnings"])
    lines += [*view["pareto"], ""] if view["pareto"] else []
    for table in [view[name] for name in TABLES if view[name] and view[name]["sections"]]:
        rows = [["", *(["base"] if table["has_base"] else []), *table["columns"]]]
        for section in table["sections"]:
            rows.append([section["title"]])
            for row in section["rows"]:
                cells = ([row["base"]] if table["has_base"] else []) + row["cells"]
                rows.append([f"  {row['label']}", *(f"{c['value']} {c['interval']}".strip() for c in cells)])
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
        widths[0] = min(widths[0], 48)
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows]
        lines += [f"  * {note}" for note in table["notes"]] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _view(reports: list[dict], title: str, notes: Sequence[str]) -> dict[str, Any]:
    """Everything the templates show, as plain strings and numbers."""
    runs: list[dict] = visible(shortened(reports))
    compared = compare_at_matched_loss(runs) if len(runs) > 1 else None
    main = tables.metric_table(runs, main=True)
    warnings = _warnings(runs) + list(filter(None, map(overfit_sentence, runs)))
    warnings += [*compared["warnings"], *unlike_sentences(compared)] if compared else []
    end, ends = (tables.comparison_table(compared, "end"), end_sentences(compared)) if compared else (None, [])
    return {
        "title": visible(title), "notes": visible(list(notes)), "runs": runs, "comparison": compared,
        "warnings": warnings,
        "verdict": comparison_verdict(runs, compared) if compared else told(runs[0]),
        "verdicts": [told(run, runs[0] if at else None) for at, run in enumerate(runs)] if compared else [],
        "pareto": frontier_sentences(compared) if compared else [],
        "table": main | {"notes": [*filter(None, map(scale_sentence, runs)), *base_sentences(runs)]},
        "rest": tables.metric_table(runs, main=False),
        "matched": tables.comparison_table(compared, "matched") if compared and compared["matched"] else None,
        "end": end | {"notes": ends + end["notes"]} if end else None, "ends": ends,
        "heat": heat_map(runs),
        "answers": answers_table(runs), "refusals": refusals_table(runs), "drift": drift_table(runs),
        "knowledge": knowledge_table(runs), "sizes": tables.sizes(runs), "facts": tables.facts(runs),
        "metrics": TABLE_METRICS, "asked": MEANINGS, "scorers": SCORERS, "fates": KNOWLEDGE_FATES,
    }  # fmt: skip


def shortened(value: Any, length: int = MOST_CHARS) -> Any:
    """The same data with every long string cut and saying so: a model may write a megabyte on one line."""
    if isinstance(value, str):
        return value if len(value) <= length else f"{value[:length]}… [{len(value) - length:,} more characters]"
    if isinstance(value, dict):
        return {key: shortened(item, MOST_NAME if key == "name" else length) for key, item in value.items()}
    return [shortened(item, length) for item in value] if isinstance(value, (list, tuple)) else value


def _warnings(runs: list[dict]) -> list[str]:
    """Each once; of several runs with the name of the run, unless all say the same."""
    said = {warning: [run["name"] for run in runs if warning in (run.get("warnings") or [])]
            for run in runs for warning in run.get("warnings") or []}  # fmt: skip
    return [w if len(names) == len(runs) else f"{', '.join(names)}: {w}" for w, names in said.items()]


def told(run: dict, plain: dict | None = None) -> str:
    """The verdict on the texts, the questions that were asked, what was refused, and a budget beside a plain run."""
    asked = [sentence for sentence in (answers_sentence(run), refusals_sentence(run)) if sentence]
    texts = [run_verdict(run)] * bool(run.get("retention") or not asked)
    return " ".join([*texts, *asked, budget_sentence(run, plain)]).rstrip()


def _figures(runs: list[dict], compared: dict | None, interactive: bool) -> list[dict[str, str]]:
    """All figures as pictures, and where asked those with lines as plotly's data, too."""
    data: dict[str, str] = {}
    if interactive:
        from retain.report.interactive import figure_json

        data = {panel["words"]: figure_json(panel, len(runs)) for panel in panels(runs, compared)}
    drawn = plots.report_figures(runs, compared)
    return [{"kind": kind, "svg": plots.to_svg(figure, w), "data": data.get(w, "")} for kind, w, figure in drawn]


def _environment(html: bool) -> jinja2.Environment:
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    finalize = (lambda value: value) if html else markdown
    environment = jinja2.Environment(
        loader=loader, autoescape=html, finalize=finalize, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["minus"] = lambda text: text.replace("-", "\N{MINUS SIGN}")
    return environment


def markdown(value: Any) -> Any:
    """Escape a value for Markdown, table cells included; what a template marks `|safe` is left alone."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    special = r"([\\`*{}\[\]#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.)"  # an address is no link
    return re.sub(special, r"\\\1", text).replace("\n", " ")


def _json(data: dict) -> str:
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: a number that does not exist is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
