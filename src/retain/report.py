"""Results -> HTML, Markdown, JSON, a terminal table, a model card section. Takes plain dicts, never models.

Every string in a result may come from a model or a stranger: `visible` makes control characters harmless once, at
the door; HTML and Markdown escape at the point of writing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain import plots
from retain.capabilities.answers import MEANINGS, answers_sentence, answers_table
from retain.comparison import cell, compare_at_matched_loss, comparison_verdict, is_number, run_verdict
from retain.files import atomic_path, write_text
from retain.text import visible

if TYPE_CHECKING:
    import jinja2

SCHEMA = "retain.report/1"
TEMPLATES = Path(__file__).parent / "templates"
MOST_WORDS = 1500  # of a generation that is compared word by word: the comparison is quadratic

# metric: (label, key of the base's own value or None for the noise floor, meaning). Nats per token if not said.
METRICS: dict[str, tuple[str, str | None, str]] = {
    "gain": ("gain", "", "new-task loss of the base minus that of the tuned model; positive is learning"),
    "forgetting": ("forgetting", None, "loss on the text after tuning minus before; positive is bad"),
    "ref_kl": ("divergence (ref_kl)", None, "KL(base ‖ tuned): how far the next-token distribution moved from the "
               "base, 0 is not at all; sees change that averages out in the loss"),
    "ref_agreement": ("same top token", None, "share of positions where both models put the same token first"),
    "loss": ("loss", "base_loss", "next-token loss on the text"),
    "bits_per_byte": ("bits per byte", "base_bits_per_byte", "loss per byte of text, comparable across tokenizers"),
    "ref_cross_entropy": ("cross-entropy to base, soft", "base_ref_cross_entropy",
                          "targets are the base's next-token distributions (Kalajdzievski 2024)"),
    "ref_argmax_cross_entropy": ("cross-entropy to base, hard", "base_ref_argmax_cross_entropy",
                                 "targets are the base's most likely tokens (Kalajdzievski 2024)"),
}  # fmt: skip
MAIN = {"new_task": ("gain", "loss"), "retention": ("forgetting", "ref_kl", "ref_agreement", "loss")}


@dataclass
class ForgettingReport:
    """The result of one `retain measure`: `data` is the dict of schema `retain.report/1`."""

    data: dict[str, Any]

    @classmethod
    def from_json(cls, path: str | Path) -> ForgettingReport:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"schema of {path} is {found!r}, expected {SCHEMA!r}; make it with `retain measure`")
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

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.md and report.html, each whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json(Path(folder) / "report.json")
        self.to_markdown(Path(folder) / "report.md")
        self.to_html(Path(folder) / "report.html")


def write_comparison(folder: str | Path, reports: list[dict], title: str, notes: Sequence[str] = ()) -> None:
    """Write report.json (`runs`, `comparison`), report.md, report.html and figure.png for several runs of one base.

    figure.png, learning against forgetting, is written where trajectories were measured.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compared = compare_at_matched_loss(reports)
    whole = {"title": title, "notes": list(notes), "runs": reports, "comparison": compared}
    write_text(folder / "report.json", _json(whole))
    write_text(folder / "report.md", comparison_markdown(reports, title=title, notes=notes))
    write_text(folder / "report.html", comparison_html(reports, title=title, notes=notes))
    figure = plots.frontier_row(reports, compared["matched_loss"])
    if figure is not None:
        with atomic_path(folder / "figure.png") as temporary:
            plots.save_png(figure, temporary)


def comparison_html(reports: list[dict], *, title: str, notes: Sequence[str] = ()) -> str:
    """One self-contained page: no script, no request to anywhere."""
    view = _view(reports, title, notes)
    view |= {"figures": _figures(view["runs"], view["comparison"]), "generations": _generations(view["runs"])}
    return _environment(html=True).get_template("report.html").render(view)


def comparison_markdown(reports: list[dict], *, title: str, notes: Sequence[str] = ()) -> str:
    return _environment(html=False).get_template("report.md").render(_view(reports, title, notes))


def model_card_section(data: dict) -> str:
    """The section "Forgetting" of a model card, as Markdown."""
    return _environment(html=False).get_template("model_card.md").render(_view([data], "Forgetting", ()))


def comparison_summary(reports: list[dict]) -> str:
    """Verdict and table for a terminal; no escape sequence of a model reaches it."""
    view = _view(reports, "", ())
    lines = [view["verdict"], ""]
    for table in [view[name] for name in ("table", "answers", "matched") if view[name] and view[name]["sections"]]:
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
    runs: list[dict] = visible(reports)
    compared = compare_at_matched_loss(runs) if len(runs) > 1 else None
    return {
        "title": visible(title), "notes": visible(list(notes)), "runs": runs, "comparison": compared,
        "verdict": comparison_verdict(runs, compared) if compared else told(runs[0]),
        "verdicts": [told(run) for run in runs] if compared else [],
        "table": metric_table(runs, lambda kind, metric: metric in MAIN[kind]),
        "rest": metric_table(runs, lambda kind, metric: metric not in MAIN[kind]),
        "matched": _comparison_table(compared, "matched") if compared and compared["matched"] else None,
        "end": _comparison_table(compared, "end") if compared else None, "answers": answers_table(runs),
        "sizes": _sizes(runs), "facts": _facts(runs), "metrics": METRICS, "asked": MEANINGS,
    }  # fmt: skip


def told(run: dict) -> str:
    """The verdict on the texts, and on the questions that were asked."""
    asked = answers_sentence(run)
    return " ".join([run_verdict(run)] * bool(run.get("retention") or not asked) + [asked] * bool(asked))


def metric_table(runs: list[dict], wanted: Callable[[str, str], bool]) -> dict[str, Any]:
    """Metrics down, runs across; the column `base` is the base's own value, or base against base: the noise floor."""
    sections = []
    for kind, suffix in (("new_task", " (new task)"), ("retention", "")):
        for text in dict.fromkeys(text for run in runs for text in run.get(kind) or {}):
            measured = [(run.get(kind) or {}).get(text) or {} for run in runs]
            floor: dict = next(filter(None, ((run.get("noise_floor") or {}).get(text) for run in runs)), {})
            rows = []
            for metric, (name, base_key, _) in METRICS.items():
                if wanted(kind, metric) and any(metric in metrics for metrics in measured):
                    bases = [floor.get(metric)] if base_key is None else [m.get(base_key) for m in measured]
                    base = next((value for value in bases if value), None)
                    cells = [_cell(metrics.get(metric), metric) for metrics in measured]
                    rows.append({"label": name, "base": _cell(base, metric), "cells": cells})
            sections += [{"title": text + suffix, "rows": rows}] if rows else []
    return {"columns": [run["name"] for run in runs], "has_base": True, "sections": sections, "notes": []}


def _cell(entry: dict | None, metric: str) -> dict[str, str]:
    return cell((entry or {}).get("value"), (entry or {}).get("ci"), percent=metric == "ref_agreement")


def _comparison_table(compared: dict, place: str) -> dict[str, Any]:
    """The runs side by side, at matched new-task loss or at their ends."""
    runs, notes = compared["runs"], []
    if place == "matched":
        losses = [cell(compared["matched_loss"]) for _ in runs]
        head = [("loss", losses), ("reached at step", [_plain(run["matched_step"], ".1f") for run in runs])]
    else:
        relative = [_plain(run["relative_loss_difference"], "+.1%") for run in runs]
        head = [("loss", [cell(run["final_loss"]) for run in runs]), ("against the first", relative)]
    sections = [("new task", head)]
    for text, entries in compared[place].items():
        keys = (("ref_kl", METRICS["ref_kl"][0]), ("forgetting", "forgetting"), ("prevented", "prevented"))
        rows = [(name, [cell(e[key], e[f"{key}_ci"], key == "prevented") for e in entries]) for key, name in keys]
        sections.append((text, rows))
        notes += [f"{text}, {entry['name']}: {entry['note']}" for entry in entries if entry["note"]]
    filled = [
        {"title": title, "rows": [{"label": label, "base": None, "cells": cells} for label, cells in rows]}
        for title, rows in sections
    ]
    return {"columns": [run["name"] for run in runs], "has_base": False, "sections": filled, "notes": notes}


def _plain(value: float | None, form: str) -> dict[str, str]:
    return {"value": "–" if value is None else format(value, form), "interval": ""}


def _sizes(runs: list[dict]) -> list[str]:
    """How much text stands behind each row."""
    sizes = {}
    for text, metrics in [item for run in runs for kind in MAIN for item in (run.get(kind) or {}).items()]:
        entry = next((m for m in metrics.values() if is_number((m or {}).get("num_documents"))), None)
        if entry:
            sizes[text] = f"{text}: {entry['num_documents']:,} documents, {entry.get('num_tokens') or 0:,} tokens"
    return list(sizes.values())


def _facts(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """(key, a value per run, or one value where all agree) of models, settings, training and versions."""
    groups = ("base", "tuned", "settings", "training", "versions")
    tables = [
        {"created": run.get("created")}
        | {f"{group}: {key}": value for group in groups for key, value in (run.get(group) or {}).items()}
        for run in runs
    ]
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = ["–" if table.get(key) is None else str(table[key]) for table in tables]
        rows.append((key, values if len(set(values)) > 1 else values[:1]))
    return rows


def _figures(runs: list[dict], compared: dict | None) -> list[dict[str, str]]:
    drawn = plots.report_figures(runs, compared["matched_loss"] if compared else None)
    return [{"kind": kind, "svg": plots.to_svg(figure, words)} for kind, words, figure in drawn]


def _generations(runs: list[dict]) -> list[dict[str, Any]]:
    """Per prompt: the base's text and each run's, the latter in pieces (differs from the base?, text)."""
    found: dict[str, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for row in run.get("generations") or []:
            entry = found.setdefault(row["prompt"], {"base": row["base"], "runs": [None] * len(runs)})
            pieces = differences(entry["base"], row["tuned"])
            entry["runs"][place] = {"pieces": pieces, "same": row["tuned"] == entry["base"]}
    return [{"prompt": prompt, **entry} for prompt, entry in found.items()]


def differences(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, each marked True where its words are not the base's."""
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (base, tuned))
    if max(len(before), len(after)) > MOST_WORDS:
        return [(False, tuned)]
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    codes = [(tag != "equal", "".join(after[j1:j2])) for tag, _, _, j1, j2 in matcher.get_opcodes() if j2 > j1]
    pieces: list[tuple[bool, str]] = []
    for place, (changed, text) in enumerate(codes):
        between = pieces and pieces[-1][0] and place + 1 < len(codes) and codes[place + 1][0]
        changed = changed or bool(between and text.isspace())  # a mark runs on over the space between words
        if pieces and pieces[-1][0] == changed:
            text = pieces.pop()[1] + text
        pieces.append((changed, text))
    return pieces


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
    return re.sub(r"([\\`*{}\[\]#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text).replace("\n", " ")


def _json(data: dict) -> str:
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: a number that does not exist is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
