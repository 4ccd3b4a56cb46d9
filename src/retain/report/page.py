"""Results -> HTML, Markdown, a terminal table, a section of a model card.

Every string in a result may come from a model or a stranger: `harmless` makes control characters visible once; HTML
and Markdown escape at the point of writing.
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
from retain.report.chain import chain_panel, chain_sentences, chain_verdict, over_chain
from retain.report.comparison import compare_at_matched_loss
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
MAX_CHARS, MAX_NAME_CHARS = 20_000, 200  # of a string, of a run's name: what is longer is cut, and says so
SHOWN_PROMPTS = 3  # with their answers; the others are folded
MAX_LABEL_CHARS = 48  # of the first column in a terminal
MULTILINE = ("prompt", "base", "tuned", "text", "base_top", "tuned_top")  # of models and users; a name is one line
TABLES = ("table", "answers", "refusals", "behaviors", "drift", "knowledge", "matched")  # of a terminal
HEADINGS = {  # of the tables in Markdown
    "table": "What was learned, what was forgotten", "answers": "Answers to the same questions",
    "refusals": "What the models refuse", "behaviors": "What the models do",
    "knowledge": "What the models know", "drift": "What the models write",
    "matched": "At the same new-task loss", "end": "At the end of each run", "rest": "Further metrics",
}  # fmt: skip
MAX_WORDS = 1500  # of a generation that is compared word by word: the comparison is quadratic
FULL_HEAT = 3.0  # nats: a token's divergence from which its colour is full, the same in every report
MAX_TOKENS = 20_000  # on a page; a token costs some 150 bytes of it
MAX_TOKEN_CHARS, MAX_TOP_CHARS = 200, 40


@dataclass(frozen=True)
class Page:
    """What one run, or several of one base, are shown as; `chain`: they are stages in order, not rivals."""

    runs: ReportRuns
    title: str = ""
    notes: Sequence[str] = ()
    chain: bool = False

    def html(self) -> str:
        """One self-contained page with no script in it and no request to anywhere."""
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
        """What was learned and forgotten, or each text over the stages of a chain; empty where there is little."""
        from retain.report import style

        runs = self.view["runs"]
        if self.chain:
            panel = chain_panel(runs, texts := self.view["chained"])
            return style.to_svg(style.draw_panel(panel, [text.name for text in texts]), panel.description)
        if not (found := learned_and_forgotten(runs)):
            return ""
        description = " ".join(panel.description for panel in found)
        return style.to_svg(style.draw_intervals(found, [run.name for run in runs]), description)

    def markdown(self) -> str:
        """Verdict, tables and what they mean; what was written, asked and answered is on the page."""
        view = self.view
        meanings = view["metrics"] | (view["answer_lines"] if view["answers"] else {})
        meanings |= (view["scorers"] if view["refusals"] else {}) | (view["shown"] if view["behaviors"] else {})
        meanings |= view["fates"] if view["knowledge"] else {}
        shown = [(heading, view[name]) for name, heading in HEADINGS.items()]
        return _environment(html=False).get_template("report.md").render(view | {"tables": shown, "meanings": meanings})

    def model_card(self) -> str:
        """The section "Forgetting" of a model card, as Markdown."""
        return _environment(html=False).get_template("model_card.md").render(self.view)

    def summary(self) -> str:
        """Verdict and tables for a terminal; no escape sequence of a model reaches it."""
        view = self.view
        lines = [view["verdict"], ""]
        for group in ([f"  ! {warning}" for warning in view["warnings"]], view["pareto"], view["chain"]):
            lines += [*group, ""] if group else []
        for table in [view[name] for name in TABLES if view[name] and view[name].sections]:
            lines += terminal_table(table)
        return "\n".join(lines).rstrip() + "\n"

    @cached_property
    def view(self) -> dict[str, Any]:
        """Everything the templates show, as plain strings and numbers."""
        runs, chain = [harmless(run) for run in self.runs], self.chain
        compared = compare_at_matched_loss(runs) if len(runs) > 1 and not chain else None
        chained = over_chain(runs) if chain else []
        said = comparison_verdict(compared) if compared else chain_verdict(runs, chained) if chain else verdict(runs[0])
        warnings = _warnings(runs) + list(filter(None, map(overfit_sentence, runs)))
        ends = end_sentences(compared) if compared else []
        return {
            "title": visible(self.title), "notes": list(map(visible, self.notes)), "runs": runs, "comparison": compared,
            "warnings": warnings + ([*compared.warnings, *mismatch_sentences(compared)] if compared else []),
            "verdict": said, "chained": chained, "chain": chain_sentences(runs, chained),
            "pareto": frontier_sentences(compared) if compared else [],
            "table": tables.metric_table(
                runs, notes=[*filter(None, map(scale_sentence, runs)), *tables.base_notes(runs)]),
            "rest": tables.metric_table(runs, main=False),
            "matched": tables.comparison_table(compared, "matched") if compared and compared.matched else None,
            "end": tables.comparison_table(compared, "end", notes=ends) if compared else None, "ends": ends,
            "answers": tables.answers_table(runs), "refusals": tables.refusals_table(runs),
            "behaviors": tables.behaviors_table(runs), "drift": tables.drift_table(runs),
            "knowledge": tables.knowledge_table(runs),
            "sizes": tables.sizes(runs), "facts": list(tables.facts(runs)),
            "metrics": {metric.label: metric.meaning for metric in TABLE_METRICS.values()},
            "answer_lines": {line.label: line.meaning for line in tables.ANSWERS if line.meaning},
            "scorers": tables.SCORERS, "fates": tables.KNOWLEDGE_FATES, "shown": tables.behavior_meanings(runs),
        }  # fmt: skip


def terminal_table(table: tables.Table) -> list[str]:
    """A table as lines, in columns."""
    rows = [["", *["base"] * table.has_base, *table.columns]]
    for section in table.sections:
        rows.append([section.title])
        rows += [[f"  {row.label}", *map(str, [row.base] * table.has_base + row.cells)] for row in section.rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    widths[0] = min(widths[0], MAX_LABEL_CHARS)
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows]
    return [*lines, *(f"  * {note}" for note in table.notes), ""]


def harmless(value: Any, key: str = "") -> Any:
    """The same results with every string cut to a length, and every character that is hidden or acts made visible."""
    if isinstance(value, str):
        length = MAX_NAME_CHARS if key == "name" else MAX_CHARS
        cut = f"… [{len(value) - length:,} more characters]" if len(value) > length else ""
        return (visible_text if key in MULTILINE else visible)(value[:length] + cut)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: harmless(getattr(value, one.name), one.name) for one in fields(value)})
    if isinstance(value, dict):
        return {visible(name): harmless(item, name) for name, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list) else value


def _warnings(runs: ReportRuns) -> list[str]:
    """Each once; of several runs with the name of the run, unless all have the same."""
    names = {warning: [run.name for run in runs if warning in run.warnings] for run in runs for warning in run.warnings}
    return [w if len(of) == len(runs) else f"{', '.join(of)}: {w}" for w, of in names.items()]


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
    """A value for Markdown, table cells included; what a template marks `|safe` is left alone.

    >>> markdown_escaped("a|b <c> http://d")
    'a\\\\|b &lt;c&gt; http\\\\://d'
    """
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    special = r"([\\`*{}\[\]#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.)"  # an address is no link
    return re.sub(special, r"\\\1", text).replace("\n", " ")


# What is written out to read, with colour as a second carrier: shares of full strength, which the page mixes in


class ShownToken(NamedTuple):
    """A token to write out, its heat, whether the two models put different tokens first, and its numbers."""

    piece: str
    heat: int
    other: bool
    numbers: str


def worst_documents(runs: ReportRuns) -> tuple[dict[str, list[tuple[int, MovedDocument]]], int]:
    """By text the documents that moved most, each with the place of its run; and how many were left out for room."""
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
    """A prompt, in `title` without the lines that open all of them, and what followed, by the place of the run."""

    title: str
    how: str
    texts: dict[int, Continuation]

    @property
    def first(self) -> Continuation:
        return next(iter(self.texts.values()))


def generations(runs: ReportRuns) -> list[ShownPrompt]:
    """Per prompt and way of writing what the models wrote; `how` is empty where there is one way only."""
    found: dict[tuple[str, str], dict[int, Continuation]] = {}
    for place, run in enumerate(runs):
        for row in run.generations:
            found.setdefault((row.prompt, row.how), {})[place] = row
    several = len({how for _, how in found}) > 1
    prompts = {prompt for prompt, _ in found}
    start = commonprefix([*prompts]).rfind("\n") + 1 if len(prompts) > 1 else 0  # noqa: RUF071 (of characters)
    return [ShownPrompt(prompt[start:], how * several, texts) for (prompt, how), texts in found.items()]


def differences(base: str, tuned: str) -> list[tuple[bool, str]]:
    """`tuned` in pieces, each marked True where its words are not the base's.

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
        changed = changed or bool(between and text.isspace())  # a mark runs on over the space between words
        if pieces and pieces[-1][0] == changed:
            text = pieces.pop()[1] + text
        pieces.append((changed, text))
    return pieces
