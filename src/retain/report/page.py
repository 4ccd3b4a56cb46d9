"""Render results as HTML, Markdown, terminal tables, or a section of a model card.

Any string in a result may come from a model or a stranger: `harmless` makes control characters visible once, and HTML
and Markdown are escaped where they are written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retain.files import visible, visible_text
from retain.report import tables
from retain.report.chain import ChainedText, chain_panel, chain_sentences, chain_verdict, over_chain
from retain.report.comparison import Comparison, compare_at_matched_loss
from retain.report.figures import learned_and_forgotten, panels
from retain.report.metrics import TABLE_METRICS
from retain.report.numbers import cell, heat
from retain.report.results import Continuation, MovedDocument, ReportRuns, TokenResult
from retain.report.sentences import (
    comparison_verdict,
    end_sentences,
    frontier_sentences,
    mismatch_sentences,
    opening,
    overfit_sentence,
    scale_sentence,
    text_verdict,
    verdict,
)

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
MAX_CHARS, MAX_NAME_CHARS = 20_000, 200  # of a string, and of a run's name; longer ones are cut, with a note
SHOWN_PROMPTS = 3  # prompts shown with their answers; the others are folded
MAX_LABEL_CHARS = 48  # width of the first column in a terminal
MULTILINE = ("prompt", "base", "tuned", "text", "base_top", "tuned_top")  # fields whose strings may have several lines
TABLES = ("table", "answers", "refusals", "behaviors", "drift", "knowledge", "matched")  # in a terminal
HEADINGS = {  # tables in Markdown
    "table": "What was learned, what was forgotten", "answers": "Answers to the same questions",
    "refusals": "What the models refuse", "behaviors": "What the models do",
    "knowledge": "What the models know", "drift": "What the models write",
    "matched": "At the same new-task loss", "end": "At the end of each run", "rest": "Further metrics",
}  # fmt: skip
MAX_WORDS = 1500  # of a generation to compare word by word, which takes quadratic time
FULL_HEAT = 3.0  # nats of divergence at which a token's colour is full, the same in every report
MAX_TOKENS = 20_000  # shown on a page, at about 150 bytes each
MAX_TOKEN_CHARS, MAX_TOP_CHARS = 200, 40


@dataclass(frozen=True)
class Page:
    """How one run, or several runs of one base, are shown; with `chain`, they are stages in order, not rivals."""

    runs: ReportRuns
    title: str = ""
    notes: Sequence[str] = ()
    chain: bool = False

    def html(self) -> str:
        """One self-contained page, without scripts or requests."""
        from retain.report import style  # with matplotlib, which nothing else here needs

        view = self.view
        runs, names, compared = view["runs"], [run.name for run in view["runs"]], view["comparison"]
        worst, left_out = worst_documents(runs)
        drawn = [(panel, style.draw_panel(panel, names)) for panel in panels(runs, compared)]
        prompts = generations(runs)
        sentence, findings = opening(runs, compared)
        more = {
            "opening": view["verdict"] if self.chain else sentence, "findings": findings,
            "opening_figure": self._opening_figure(),
            "verdicts": [(at, text_verdict(run)) for at, run in enumerate(runs) if run.retention] if names[1:] else [],
            "figures": [{"kind": one.kind, "svg": style.to_svg(figure, one.description)} for one, figure in drawn],
            "prompts": {"shown": prompts[:SHOWN_PROMPTS], "folded": prompts[SHOWN_PROMPTS:]},
            "worst": worst, "worst_left_out": left_out,
        }  # fmt: skip
        return _environment(html=True).get_template("report.html").render(view | more)

    def _opening_figure(self) -> str:
        """An SVG of what was learned and forgotten, or of each text over the stages of a chain; may be empty."""
        from retain.report import style

        runs = self.view["runs"]
        if self.chain:
            panel = chain_panel(runs, texts := self.view["chained"])
            return style.to_svg(style.draw_panel(panel, [text.name for text in texts]), panel.description)
        if not (opening_panels := learned_and_forgotten(runs)):
            return ""
        description = " ".join(panel.description for panel in opening_panels)
        return style.to_svg(style.draw_intervals(opening_panels, [run.name for run in runs]), description)

    def markdown(self) -> str:
        """Verdict, tables and their meanings; texts and answers are on the page only."""
        view = self.view
        meanings = view["metrics"] | (view["answer_lines"] if view["answers"] else {})
        meanings |= view["shown"]["refusals"] | view["shown"]["behaviors"]
        meanings |= view["fates"] if view["knowledge"] else {}
        shown = [(heading, view[name]) for name, heading in HEADINGS.items()]
        return _environment(html=False).get_template("report.md").render(view | {"tables": shown, "meanings": meanings})

    def model_card(self) -> str:
        """The section "Forgetting" of a model card, as Markdown."""
        return _environment(html=False).get_template("model_card.md").render(self.view)

    def summary(self) -> str:
        """Verdict and tables for a terminal, without escape sequences from models."""
        view = self.view
        lines = [view["verdict"], ""]
        for group in ([f"  ! {warning}" for warning in view["warnings"]], view["pareto"], view["chain"]):
            lines += [*group, ""] if group else []
        for table in [view[name] for name in TABLES if view[name] and view[name].sections]:
            lines += terminal_table(table)
        return "\n".join(lines).rstrip() + "\n"

    @cached_property
    def compared(self) -> Comparison:
        """The runs compared with the first, for a page that is not of a chain."""
        return compare_at_matched_loss(self.runs)

    @cached_property
    def chained(self) -> list[ChainedText]:
        """Every text over the stages of a chain."""
        return over_chain(self.runs)

    @cached_property
    def view(self) -> dict[str, Any]:
        """Everything the templates show, as plain strings and numbers."""
        runs, chain = [harmless(run) for run in self.runs], self.chain
        compared = harmless(self.compared) if len(runs) > 1 and not chain else None
        chained = harmless(self.chained) if chain else []
        sentence = chain_verdict(runs, chained) if chain else verdict(runs[0])
        warnings = _warnings(runs) + list(filter(None, map(overfit_sentence, runs)))
        ends = end_sentences(compared) if compared else []
        return {
            "title": visible(self.title), "notes": list(map(visible, self.notes)), "runs": runs, "comparison": compared,
            "warnings": warnings + ([*compared.warnings, *mismatch_sentences(compared)] if compared else []),
            "verdict": comparison_verdict(compared) if compared else sentence,
            "chained": chained, "chain": chain_sentences(runs, chained),
            "pareto": frontier_sentences(compared) if compared else [],
            "table": tables.metric_table(
                runs, notes=[*filter(None, map(scale_sentence, runs)), *tables.base_notes(runs)]),
            "rest": tables.metric_table(runs, main=False),
            "matched": tables.comparison_table(compared, "matched") if compared and compared.matched else None,
            "end": tables.comparison_table(compared, "end", notes=ends) if compared else None, "ends": ends,
            "answers": tables.answers_table(runs), "drift": tables.drift_table(runs),
            "knowledge": tables.knowledge_table(runs),
            "sizes": tables.sizes(runs), "facts": list(tables.facts(runs)),
            "metrics": {metric.label: metric.meaning for metric in TABLE_METRICS.values()},
            "answer_lines": {line.label: line.meaning for line in tables.ANSWERS if line.meaning},
            "fates": tables.KNOWLEDGE_FATES,
            "refusals": tables.behaviors_table(runs, "refusals"),
            "behaviors": tables.behaviors_table(runs, "behaviors"),
            "shown": {part: tables.behavior_meanings(runs, part) for part in ("refusals", "behaviors")},
        }  # fmt: skip


def terminal_table(table: tables.Table) -> list[str]:
    """The lines of a table in aligned columns."""
    rows = [["", *["base"] * table.has_base, *table.columns]]
    for section in table.sections:
        rows.append([section.title])
        rows += [[f"  {row.label}", *map(str, [row.base] * table.has_base + row.cells)] for row in section.rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    widths[0] = min(widths[0], MAX_LABEL_CHARS)
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows]
    return [*lines, *(f"  * {note}" for note in table.notes), ""]


def harmless(value: Any, key: str = "") -> Any:
    """The same results with long strings cut, and hidden and control characters made visible."""
    if isinstance(value, str):
        length = MAX_NAME_CHARS if key == "name" else MAX_CHARS
        cut = f"… [{len(value) - length:,} more characters]" if len(value) > length else ""
        return (visible_text if key in MULTILINE else visible)(value[:length] + cut)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: harmless(getattr(value, part.name), part.name) for part in fields(value)})
    if isinstance(value, dict):
        return {visible(name): harmless(item, name) for name, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list) else value


def _warnings(runs: ReportRuns) -> list[str]:
    """Each warning once, with the names of its runs unless all have it."""
    warned = {text: [run.name for run in runs if text in run.warnings] for run in runs for text in run.warnings}
    return [text if len(names) == len(runs) else f"{', '.join(names)}: {text}" for text, names in warned.items()]


def _environment(html: bool) -> jinja2.Environment:
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    finalize = (lambda value: value) if html else markdown_escaped
    environment = jinja2.Environment(
        loader=loader, autoescape=html, finalize=finalize, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"minus": lambda text: text.replace("-", "\N{MINUS SIGN}"), "shown_token": shown_token}
    environment.globals |= {"cell": cell, "differences": differences}
    return environment


def markdown_escaped(value: Any) -> Any:
    """Escape a value for Markdown text and table cells, unless a template marks it `|safe`.

    >>> markdown_escaped("a|b <c> http://d")
    'a\\\\|b &lt;c&gt; http\\\\://d'
    """
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    special = r"([\\`*{}\[\]#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.)"  # also unlinks addresses
    return re.sub(special, r"\\\1", text).replace("\n", " ")


class ShownToken(NamedTuple):
    """A token's text, its heat, whether the models' top tokens differ, and its numbers."""

    piece: str
    heat: int
    other: bool
    numbers: str


def worst_documents(runs: ReportRuns) -> tuple[dict[str, list[tuple[int, MovedDocument]]], int]:
    """Text → the documents that moved most, each with its run's place; and how many a page has no room for."""
    shown: dict[str, list[tuple[int, MovedDocument]]] = {}
    room, left_out = MAX_TOKENS, 0
    for text in dict.fromkeys(text for run in runs for text in run.worst):
        for place, run in enumerate(runs):
            for document in run.worst.get(text, []):
                if len(document.tokens) > room:
                    left_out += 1
                else:
                    room -= len(document.tokens)
                    shown.setdefault(text, []).append((place, document))
    return shown, left_out


def shown_token(token: TokenResult) -> ShownToken:
    before, after, moved = (cell(value).value for value in (token.base_loss, token.loss, token.ref_kl))
    base, tuned = (top[:MAX_TOP_CHARS].replace("\n", "⏎") for top in (token.base_top, token.tuned_top))
    numbers = f"loss {before} → {after}, ref_kl {moved}; first for the base: “{base}”, tuned: “{tuned}”"
    piece = token.text[:MAX_TOKEN_CHARS].replace("\n", "⏎\n")
    return ShownToken(piece, heat(token.ref_kl or 0.0, FULL_HEAT), base != tuned, numbers)


class ShownPrompt(NamedTuple):
    """A prompt, without the opening lines that all prompts share, and its continuations by the place of the run."""

    title: str
    how: str
    texts: dict[int, Continuation]

    @property
    def first(self) -> Continuation:
        return next(iter(self.texts.values()))


def generations(runs: ReportRuns) -> list[ShownPrompt]:
    """The models' continuations by prompt and decoding; `how` is empty if there is only one decoding."""
    texts: dict[tuple[str, str], dict[int, Continuation]] = {}
    for place, run in enumerate(runs):
        for row in run.generations:
            texts.setdefault((row.prompt, row.how), {})[place] = row
    several = len({how for _, how in texts}) > 1
    prompts = {prompt for prompt, _ in texts}
    start = commonprefix([*prompts]).rfind("\n") + 1 if len(prompts) > 1 else 0  # noqa: RUF071 (of characters)
    return [ShownPrompt(prompt[start:], how * several, of_runs) for (prompt, how), of_runs in texts.items()]


def differences(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, each marked True if its words differ from the base's.

    >>> differences("a red cat", "a blue cat")
    [(False, 'a '), (True, 'blue'), (False, ' cat')]
    """
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (base, tuned))
    if max(len(before), len(after)) > MAX_WORDS:
        return [(False, tuned)]
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    codes = [(tag != "equal", "".join(after[j1:j2])) for tag, _, _, j1, j2 in matcher.get_opcodes() if j2 > j1]
    pieces: list[tuple[bool, str]] = []
    for place, (changed, text) in enumerate(codes):
        between = pieces and pieces[-1][0] and place + 1 < len(codes) and codes[place + 1][0]
        changed = changed or bool(between and text.isspace())  # also mark the space between two changed words
        if pieces and pieces[-1][0] == changed:
            text = pieces.pop()[1] + text
        pieces.append((changed, text))
    return pieces
