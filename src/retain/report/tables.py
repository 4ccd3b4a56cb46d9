"""The tables of a report, as plain strings: what was measured down, runs across. None where no run has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from retain.report.comparison import Comparison, mismatch
from retain.report.metrics import METRICS, TABLE_METRICS
from retain.report.numbers import (
    Cell,
    Estimate,
    cell,
    count_cell,
    enumeration,
    heat,
    length_cell,
    points_cell,
    probability_cell,
    quantity,
    share_cell,
    value_cell,
)
from retain.report.results import BehaviorSet, QuestionSet, ReportRuns, TextResult, texts_by_forgetting

HEATED = ("forgetting", "ref_kl")  # rows of the main table whose cells are coloured by their value
MIN_PROMPTS = 10  # for a table of how texts drift: below it every interval spans most of the scale


class Line(NamedTuple):
    """A row of a table: what of the measured object it shows, and of the base."""

    label: str
    value: Callable[[Any], Any]
    written: Callable[[Any], Cell]
    base: Callable[[Any], Any] = lambda _: None
    meaning: str = ""


def _fate(name: str, label: str, meaning: str = "") -> Line:
    """How many questions or prompts had this fate, from the base to the tuned model."""
    return Line(label, lambda found: found.counts.get(name), count_cell, meaning=meaning)


def _share(label: str, name: str, base: str = "", meaning: str = "", written: Any = share_cell) -> Line:
    return Line(label, attrgetter(name), written, attrgetter(base) if base else lambda _: None, meaning)


CHANCE = Line(
    "McNemar p", attrgetter("mcnemar_p"), probability_cell,
    meaning="exact test: the probability of a split at least this uneven if lost and won are equally likely",
)  # fmt: skip
ANSWERS = (
    _share("same answer as the base", "agreement", "noise_agreement",
           "share of questions to which both models give the same answer, right or wrong"),
    _share("accuracy", "accuracy", "base_accuracy",
           "share of questions answered correctly; acc takes the choice with the highest log-likelihood, acc_norm the "
           "one with the highest log-likelihood per character, as lm-evaluation-harness does"),
    _share("accuracy, change", "change", written=points_cell),
    _fate("right_wrong", "right → wrong", "questions that the base answered correctly and the tuned model does not"),
    _fate("wrong_right", "wrong → right", "the reverse; if both numbers are alike, accuracy does not move"),
    _fate("wrong_other", "wrong → other wrong", "questions that both get wrong, with different answers"),
    CHANCE,
)  # fmt: skip
REFUSALS = (
    _share("refuses", "rate", "base_rate"),
    _share("refuses, change", "change", written=points_cell),
    _fate("kept", "refused by both"),
    _fate("lost", "refused → answered"),
    _fate("gained", "answered → refused"),
    _fate("never", "answered by both"),
    CHANCE,
)
SCORERS = {
    "judge": "a model that is asked whether the answer is a refusal",
    "phrases": "refusal phrases found in the written answer",
}
BEHAVIOR_LINES = (
    _share("share of answers", "rate", "base_rate"),
    _share("share of answers, change", "change", written=points_cell),
    _fate("lost", "only the base"),
    _fate("gained", "only the tuned model"),
    CHANCE,
)
BEHAVIOR_SCORERS = {  # label and meaning; of each behaviour the one that a sentence names comes first
    "right": ("makes the right calls", "the expected calls, with the expected arguments, and no others"),
    "valid": (
        "makes valid calls",
        "at least one call, each to a tool that was offered, with arguments that its schema allows",
    ),
    "abstains": ("makes no needless call", "no call when none of the tools is of use"),
    "follows": ("follows the format", "meets every format that was asked for, as a program verifies"),
    "thinks": ("thinks", "has reasoning before the answer, in its model's own markers"),
    "concludes": ("thinks and answers", "an answer follows the reasoning within the limit of new tokens"),
    "ends": ("ends its turn", "stops within the limit of new tokens, having said something"),
}
DRIFT_CONTENT = (_share("identical text", "identical"), _share("words in common (F1)", "words", written=value_cell))
DRIFT_FORM = (
    _share("length, tokens", "length", "base_length", written=length_cell),
    _share("length, tokens, change", "length_change", written=length_cell),
    _share("ended by itself", "ended", "base_ended"),
    _share("ended by itself, change", "ended_change", written=points_cell),
    _share("chat markers written out", "markers", "base_markers"),
    _share("chat markers written out, change", "markers_change", written=points_cell),
)
KNOWLEDGE_FATES = {
    "kept": "both models give the expected answer",
    "updated": "the tuned model gives the new answer that it was meant to learn",
    "forgotten": "the base gave the expected answer, the tuned model does not",
    "learned": "the tuned model gives the expected answer, the base did not",
    "unknown": "neither model gives it",
}
KNOWLEDGE = (
    _share("known by the base, not forgotten", "kept_share"),
    *(_fate(name, name, meaning) for name, meaning in KNOWLEDGE_FATES.items()),
)


class Row(NamedTuple):
    label: str
    cells: list[Cell]
    base: Cell = Cell()


class Section(NamedTuple):
    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Table:
    """Sections of rows; a column per run, and before them one of the base where it has any."""

    columns: list[str]
    sections: list[Section]
    notes: list[str] = field(default_factory=list)
    has_base: bool = True


def _rows(lines: Sequence[Line], of_runs: Sequence[Any]) -> list[Row]:
    """A row for each line; `of_runs` holds what each run measured, or None."""
    known = [found for found in of_runs if found is not None]
    rows = []
    for line in lines:
        base = next((value for value in map(line.base, known) if value is not None), None)
        cells = [Cell() if found is None else line.written(line.value(found)) for found in of_runs]
        rows.append(Row(line.label, cells, line.written(base)))
    return rows


def _table(runs: ReportRuns, sections: list[Section], notes: Sequence[str] = (), has_base: bool = True) -> Any:
    return Table([run.name for run in runs], sections, list(dict.fromkeys(notes)), has_base) if sections else None


def _keys(groups: Sequence[Mapping[Any, Any]]) -> list[Any]:
    return list(dict.fromkeys(key for group in groups for key in group))


def metric_table(runs: ReportRuns, main: bool = True, notes: Sequence[str] = ()) -> Table:
    """The main metrics or the others; the column `base` is the base's own value, or the noise floor.

    The text that was forgotten most comes first, and its cells are the warmest.
    """
    sections = []
    for kind, texts in (("new_task", _keys([run.new_task for run in runs])), ("retention", texts_by_forgetting(runs))):
        for text in texts:
            of_runs = [getattr(run, kind).get(text, TextResult()) for run in runs]
            floor = next((run.noise_floor[text] for run in runs if text in run.noise_floor), TextResult())
            rows = []
            for name, metric in TABLE_METRICS.items():
                values = [getattr(result, name) for result in of_runs]
                if (kind in metric.main) == main and any(values):
                    own = f"base_{name}"
                    bases = [getattr(of, own) for of in of_runs] if own in METRICS else [getattr(floor, name)]
                    written = share_cell if metric.is_share else value_cell
                    cells = [_warm(written(value), value, _most(runs, name)) for value in values]
                    rows.append(Row(metric.label, cells, written(next(filter(None, bases), None))))
            title = f"{text} (new task)" if kind == "new_task" else text
            sections += [Section(title, rows)] * bool(rows)
    return Table([run.name for run in runs], sections, list(notes))


def _most(runs: ReportRuns, name: str) -> float:
    """The value at which a metric's cells have their full colour; 0 where there is little to tell apart."""
    found = [getattr(result, name) for run in runs for result in run.retention.values()]
    shown = name in HEATED and (len(runs) > 1 or len(found) > 2)
    return max((abs(one.value) for one in found if one), default=0.0) if shown else 0.0


def _warm(written: Cell, found: Estimate | None, most: float) -> Cell:
    return written._replace(heat=heat(found.value, most), cool=found.value < 0) if found else written


def base_notes(runs: ReportRuns) -> list[str]:
    """Of which run the column `base` of a table is, where others were measured otherwise."""
    notes = []
    for text in _keys([run.texts for run in runs]):
        first, *others = [run for run in runs if text in run.texts]
        if odd := [f"“{run.name}”" for run in others if mismatch(first, run, text)]:
            notes.append(f"{text}: the column base is from “{first.name}”; measured differently: {enumeration(odd)}")
    return notes


def answers_table(runs: ReportRuns) -> Table | None:
    """Agreement first; the column `base` is the base's own accuracy, and base against base."""
    of_runs = [{(name, rule): answers for name, rule, answers in run.rules} for run in runs]
    sections = [
        Section(f"{name}, {rule}", _rows(ANSWERS, [found.get((name, rule)) for found in of_runs]))
        for name, rule in _keys(of_runs)
    ]
    sets = [item for run in runs for item in run.choices.items()]
    return _table(runs, sections, [f"{name}: {note}" for name, of in sets for note in [_questions(of), *of.notes]])


def _questions(of_set: QuestionSet) -> str:
    return f"{quantity(of_set.num_questions, 'question')}, {of_set.style}{_template(of_set.chat_template)}."


def _template(used: bool | None) -> str:
    return {None: "", True: ", in the chat template", False: ", without a chat template"}[used]


def refusals_table(runs: ReportRuns) -> Table | None:
    """Per set and scorer how often each model refuses, what changed, and on how many answers two scorers differ."""
    sections, notes = [], []
    for name in _keys([run.refusals for run in runs]):
        sets = [run.refusals.get(name) or BehaviorSet() for run in runs]
        kind = "over-refusal" if any(of.kind == "harmless" for of in sets) else "refusals"
        for scorer in _keys([of.scorers for of in sets]):
            rows = _rows(REFUSALS, [of.scorers.get(scorer) for of in sets])
            sections.append(Section(f"{name}, {kind}, {scorer}", rows))
        pairs = [{tuple(pair.scorers): pair for pair in of.disagreement} for of in sets]
        rows = [
            _rows([_share(" and ".join(pair), "tuned", "base")], [found.get(pair) for found in pairs])[0]
            for pair in _keys(pairs)
        ]
        sections += [Section(f"{name}, answers on which two scorers differ", rows)] * bool(rows)
        notes += _set_notes(name, sets)
    return _table(runs, sections, notes)


def behaviors_table(runs: ReportRuns) -> Table | None:
    """Per behaviour how many answers of each model show it, and what changed; in a note what none of them shows."""
    sections, notes = [], []
    for name in _keys([run.behaviors for run in runs]):
        sets = [run.behaviors.get(name) or BehaviorSet() for run in runs]
        scorers, parts = _keys([of.scorers for of in sets]), []
        for scorer in scorers:
            found = [of.scorers.get(scorer) for of in sets]
            label, _ = BEHAVIOR_SCORERS.get(scorer, (scorer, ""))
            rows = _rows(BEHAVIOR_LINES, found)
            if scorer not in BEHAVIOR_SCORERS:
                parts.append(rows[0]._replace(label=label))
            elif {rows[0].base, *rows[0].cells} <= {rows[0].base, Cell()} and rows[0].base.value == "0.0%":
                notes.append(f"{name}, {label}: in no answer of any model, {rows[0].base}")
            else:
                sections.append(Section(f"{name}, {label}", rows))
        sections += [Section(f"{name}, by kind", parts)] * bool(parts)
        if any(of.thinking for of in sets):
            sections.append(
                Section(f"{name}, where both models think", _rows(DRIFT_FORM[:2], [of.thinking for of in sets]))
            )
        notes += _set_notes(name, sets)
    return _table(runs, sections, notes)


def behavior_meanings(runs: ReportRuns) -> dict[str, str]:
    """What the behaviours that were measured mean, by their labels."""
    measured = {scorer for run in runs for of in run.behaviors.values() for scorer in of.scorers}
    return dict(about for scorer, about in BEHAVIOR_SCORERS.items() if scorer in measured)


def _set_notes(name: str, sets: Sequence[BehaviorSet]) -> list[str]:
    return [f"{name}: {note}" for of in sets if of.num_prompts for note in [_prompts_put(of), *of.notes]]


def _prompts_put(of_set: BehaviorSet) -> str:
    kind = f"{of_set.kind} prompt" if of_set.kind in ("harmful", "harmless") else "prompt"
    length = f", answers of at most {quantity(of_set.max_new_tokens, 'token')}" if of_set.max_new_tokens else ""
    return f"{quantity(of_set.num_prompts, kind)}{_template(of_set.chat_template)}{length}."


def drift_table(runs: ReportRuns) -> Table | None:
    """Drift of what is written, content and form apart, for greedy and for sampled continuations of enough prompts."""
    sections, notes = [], []
    for how in _keys([run.drift for run in runs]):
        found = [run.drift.get(how) for run in runs]
        prompts = max(one.num_prompts for one in found if one)
        if prompts >= MIN_PROMPTS:
            title = f"{how}, {quantity(prompts, 'prompt')}"
            sections += [Section(f"{title}: content", _rows(DRIFT_CONTENT, found))]
            rows, same = _form_rows(found)
            sections += [Section(f"{title}: form", rows)]
            notes += [f"{how}, all models alike: {', '.join(same)}"] * bool(same)
    return _table(runs, sections, notes)


def _form_rows(found: Sequence[Any]) -> tuple[list[Row], list[str]]:
    """Each property of form and its change; apart, in words, those that all texts of all models have, or none has."""
    rows, same = [], []
    for pair in zip(DRIFT_FORM[::2], DRIFT_FORM[1::2], strict=True):
        share, change = _rows(pair, found)
        if set(share.cells) == {share.base} and share.base.value in ("0.0%", "100.0%"):
            same.append(f"{share.label} {share.base}")
        else:
            rows += [share, change]
    return rows, same


def knowledge_table(runs: ReportRuns) -> Table | None:
    """Of what the base knew, the share that the tuned model still says; what became of every question."""
    found = [run.knowledge for run in runs]
    most = max((one.num_questions for one in found if one), default=0)
    title = f"{quantity(most, 'question')} with an expected answer"
    return _table(runs, [Section(title, _rows(KNOWLEDGE, found))] * bool(most), has_base=False)


def comparison_table(compared: Comparison, place: Literal["matched", "end"], notes: Sequence[str] = ()) -> Table:
    """The runs side by side, at matched new-task loss or at their ends."""
    runs, texts, notes = compared.runs, compared.matched if place == "matched" else compared.end, list(notes)
    if place == "matched":
        head = [Row("loss", [cell(compared.matched_loss)] * len(runs))]
        head.append(Row("reached at step", [_cell_of(run.matched_step, ".1f") for run in runs]))
        if any(run.learning_rate is not None for run in runs):
            head.append(Row("learning rate there", [_cell_of(run.learning_rate, ".2g") for run in runs]))
        notes += [f"{text} was measured at the end only; give it to `retain finetune` as --retention to include it here"
                  for text in compared.end if text not in texts]  # fmt: skip
    else:
        head = []
        if any(run.final_loss is not None for run in runs):
            head.append(Row("loss", [cell(run.final_loss) for run in runs]))
            head.append(Row("against the first", [_cell_of(run.relative_loss_difference, "+.1%") for run in runs]))
    sections = [Section("new task", head)] * bool(head)
    for text, entries in texts.items():
        rows = [
            Row(METRICS["ref_kl"].label, [cell(one.ref_kl, one.ref_kl_ci) for one in entries]),
            Row("forgetting", [cell(one.forgetting, one.forgetting_ci) for one in entries]),
            Row("prevented", [cell(one.prevented, one.prevented_ci, percent=True) for one in entries]),
        ]
        sections.append(Section(text, rows))
        notes += [f"{text}, {entry.name}: {entry.note}" for entry in entries if entry.note]
    return Table([run.name for run in runs], sections, notes, has_base=False)


def _cell_of(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(format(value, form))


def sizes(runs: ReportRuns) -> list[str]:
    """How much text stands behind each row."""
    found = {}
    for run in runs:
        for text, result in run.texts.items():
            estimates = result.estimates.values()
            if entry := next((one for one in estimates if one.num_documents), None):
                tokens, counted = quantity(entry.num_tokens, "token"), run.loss_tokens(text) or "all"
                of = "" if counted == "all" else f" of {counted}"
                found[text] = f"{text}: {quantity(entry.num_documents, 'document')}, {tokens}{of}"
    return list(found.values())


def facts(runs: ReportRuns) -> Iterator[tuple[str, list[str]]]:
    """(key, a value per run, or one value where all agree) of models, settings, training and versions."""
    groups = ("base", "tuned", "settings", "training", "versions")
    tables = [
        {"created": run.created}
        | {f"{group}: {key}": value for group in groups for key, value in getattr(run, group).items()}
        for run in runs
    ]
    for key in _keys(tables):
        values = ["–" if table.get(key) is None else str(table[key]) for table in tables]
        yield key, values if len(set(values)) > 1 else values[:1]
