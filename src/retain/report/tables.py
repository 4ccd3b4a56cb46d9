"""The tables of a report as plain strings: measurements in rows, runs in columns; None if no run has any."""

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

HEATED = ("forgetting", "ref_kl")  # rows of the main table that are coloured by value
MIN_PROMPTS = 10  # for the drift table; over fewer prompts every interval spans most of the scale


class Line(NamedTuple):
    """A row of a table: the value that it shows of a measured object, and the base's value."""

    label: str
    value: Callable[[Any], Any]
    as_cell: Callable[[Any], Cell]
    base: Callable[[Any], Any] = lambda _: None
    meaning: str = ""


def _fate(name: str, label: str, meaning: str = "") -> Line:
    """The number of questions or prompts with a fate from base to tuned model."""
    return Line(label, lambda measured: measured.counts.get(name), count_cell, meaning=meaning)


def _share(label: str, name: str, base: str = "", meaning: str = "", as_cell: Any = share_cell) -> Line:
    return Line(label, attrgetter(name), as_cell, attrgetter(base) if base else lambda _: None, meaning)


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
    _share("accuracy, change", "change", as_cell=points_cell),
    _fate("right_wrong", "right → wrong", "questions that the base answered correctly and the tuned model does not"),
    _fate("wrong_right", "wrong → right", "the reverse; if both numbers are alike, accuracy does not move"),
    _fate("wrong_other", "wrong → other wrong", "questions that both get wrong, with different answers"),
    CHANCE,
)  # fmt: skip
BEHAVIOR_LINES = (
    _share("share of answers", "rate", "base_rate"),
    _share("share of answers, change", "change", as_cell=points_cell),
    _fate("kept", "both models"),
    _fate("lost", "only the base"),
    _fate("gained", "only the tuned model"),
    _fate("never", "neither"),
    CHANCE,
)
BEHAVIOR_SCORERS = {  # label and meaning; a sentence names the first scorer of a behaviour or of a set of requests
    "judge": ("refuses (judge)", "a model that is asked whether the answer is a refusal says so"),
    "phrases": ("refuses (phrases)", "a phrase of a refusal is found in the written answer"),
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
DRIFT_CONTENT = (_share("identical text", "identical"), _share("words in common (F1)", "words", as_cell=value_cell))
DRIFT_FORM = (
    _share("length, tokens", "length", "base_length", as_cell=length_cell),
    _share("length, tokens, change", "length_change", as_cell=length_cell),
    _share("ended by itself", "ended", "base_ended"),
    _share("ended by itself, change", "ended_change", as_cell=points_cell),
    _share("chat markers written out", "markers", "base_markers"),
    _share("chat markers written out, change", "markers_change", as_cell=points_cell),
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
    """Sections of rows with a column per run, after a column of the base if `has_base`."""

    columns: list[str]
    sections: list[Section]
    notes: list[str] = field(default_factory=list)
    has_base: bool = True


def _rows(lines: Sequence[Line], of_runs: Sequence[Any]) -> list[Row]:
    """A row for each line; `of_runs` has the measured object of each run, or None."""
    known = [measured for measured in of_runs if measured is not None]
    rows = []
    for line in lines:
        base = next((value for value in map(line.base, known) if value is not None), None)
        cells = [Cell() if measured is None else line.as_cell(line.value(measured)) for measured in of_runs]
        rows.append(Row(line.label, cells, line.as_cell(base)))
    return rows


def _table(runs: ReportRuns, sections: list[Section], notes: Sequence[str] = (), has_base: bool = True) -> Any:
    return Table([run.name for run in runs], sections, list(dict.fromkeys(notes)), has_base) if sections else None


def _keys(groups: Sequence[Mapping[Any, Any]]) -> list[Any]:
    return list(dict.fromkeys(key for group in groups for key in group))


def metric_table(runs: ReportRuns, main: bool = True, notes: Sequence[str] = ()) -> Table:
    """The main metrics of each text, or the others; the column `base` is the base's own value, or the noise floor.

    Among the retention texts, the one that was forgotten most comes first.
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
                    of_base = f"base_{name}"
                    bases = [getattr(result, of_base) for result in of_runs] if of_base in METRICS else []
                    as_cell = share_cell if metric.is_share else value_cell
                    cells = [_heated(as_cell(value), value, _full_heat(runs, name)) for value in values]
                    base = next(filter(None, bases or [getattr(floor, name)]), None)
                    rows.append(Row(metric.label, cells, as_cell(base)))
            title = f"{text} (new task)" if kind == "new_task" else text
            sections += [Section(title, rows)] * bool(rows)
    return Table([run.name for run in runs], sections, list(notes))


def _full_heat(runs: ReportRuns, name: str) -> float:
    """The value at which a metric's cells have their full colour; 0 for no colour."""
    estimates = [getattr(result, name) for run in runs for result in run.retention.values()]
    coloured = name in HEATED and (len(runs) > 1 or len(estimates) > 2)
    return max((abs(estimate.value) for estimate in estimates if estimate), default=0.0) if coloured else 0.0


def _heated(plain: Cell, estimate: Estimate | None, full: float) -> Cell:
    return plain._replace(heat=heat(estimate.value, full), cool=estimate.value < 0) if estimate else plain


def base_notes(runs: ReportRuns) -> list[str]:
    """Notes on which run the column `base` is from, if others were measured differently."""
    notes = []
    for text in _keys([run.texts for run in runs]):
        first, *others = [run for run in runs if text in run.texts]
        if unlike := [f"“{run.name}”" for run in others if mismatch(first, run, text)]:
            notes.append(f"{text}: the column base is from “{first.name}”; measured differently: {enumeration(unlike)}")
    return notes


def answers_table(runs: ReportRuns) -> Table | None:
    """Answers by question set and rule; the column `base` is its agreement with itself, and its accuracy."""
    of_runs = [{(name, rule): answers for name, rule, answers in run.rules} for run in runs]
    sections = [
        Section(f"{name}, {rule}", _rows(ANSWERS, [answers.get((name, rule)) for answers in of_runs]))
        for name, rule in _keys(of_runs)
    ]
    sets = [item for run in runs for item in run.choices.items()]
    notes = [f"{name}: {note}" for name, questions in sets for note in [_questions_note(questions), *questions.notes]]
    return _table(runs, sections, notes)


def _questions_note(questions: QuestionSet) -> str:
    return f"{quantity(questions.num_questions, 'question')}, {questions.style}{_template(questions.chat_template)}."


def _template(used: bool | None) -> str:
    return {None: "", True: ", in the chat template", False: ", without a chat template"}[used]


def behaviors_table(runs: ReportRuns, part: Literal["refusals", "behaviors"]) -> Table | None:
    """The share of answers of each model that refuse or show each behaviour, and on which two scorers differ."""
    sections, notes = [], []
    for name in _keys([getattr(run, part) for run in runs]):
        sets = [getattr(run, part).get(name) or BehaviorSet() for run in runs]
        about = f"{name}, over-refusal" if any(each.kind == "harmless" for each in sets) else name
        by_kind = []
        for scorer in _keys([each.scorers for each in sets]):
            rows = _rows(BEHAVIOR_LINES, [each.scorers.get(scorer) for each in sets])
            if scorer in BEHAVIOR_SCORERS:
                sections.append(Section(f"{about}, {BEHAVIOR_SCORERS[scorer][0]}", rows))
            else:
                by_kind.append(rows[0]._replace(label=scorer))
        sections += [Section(f"{name}, by kind", by_kind)] * bool(by_kind)
        pairs = [{tuple(pair.scorers): pair for pair in each.disagreement} for each in sets]
        rows = [
            _rows([_share(" and ".join(pair), "tuned", "base")], [of_run.get(pair) for of_run in pairs])[0]
            for pair in _keys(pairs)
        ]
        sections += [Section(f"{name}, answers on which two scorers differ", rows)] * bool(rows)
        thinking = [each.thinking for each in sets]
        if any(thinking):
            sections.append(Section(f"{name}, where both models think", _rows(DRIFT_FORM[:2], thinking)))
        notes += _set_notes(name, sets)
    return _table(runs, sections, notes)


def behavior_meanings(runs: ReportRuns, part: Literal["refusals", "behaviors"]) -> dict[str, str]:
    """Label → meaning of the scorers by which refusals or behaviours were measured."""
    measured = {scorer for run in runs for each in getattr(run, part).values() for scorer in each.scorers}
    return dict(about for scorer, about in BEHAVIOR_SCORERS.items() if scorer in measured)


def _set_notes(name: str, sets: Sequence[BehaviorSet]) -> list[str]:
    return [f"{name}: {note}" for each in sets if each.num_prompts for note in [_prompts_note(each), *each.notes]]


def _prompts_note(prompts: BehaviorSet) -> str:
    length = f", answers of at most {quantity(prompts.max_new_tokens, 'token')}" if prompts.max_new_tokens else ""
    return f"{quantity(prompts.num_prompts, prompts.noun)}{_template(prompts.chat_template)}{length}."


def drift_table(runs: ReportRuns) -> Table | None:
    """Drift in content and in form, of greedy and of sampled continuations, if there are enough prompts."""
    sections = []
    for how in _keys([run.drift for run in runs]):
        drifts = [run.drift.get(how) for run in runs]
        prompts = max(drift.num_prompts for drift in drifts if drift)
        if prompts >= MIN_PROMPTS:
            title = f"{how}, {quantity(prompts, 'prompt')}"
            sections += [Section(f"{title}: content", _rows(DRIFT_CONTENT, drifts))]
            sections += [Section(f"{title}: form", _rows(DRIFT_FORM, drifts))]
    return _table(runs, sections)


def knowledge_table(runs: ReportRuns) -> Table | None:
    """The share of the base's knowledge that the tuned model keeps, and the fates of all questions."""
    of_runs = [run.knowledge for run in runs]
    num_questions = max((knowledge.num_questions for knowledge in of_runs if knowledge), default=0)
    title = f"{quantity(num_questions, 'question')} with an expected answer"
    return _table(runs, [Section(title, _rows(KNOWLEDGE, of_runs))] * bool(num_questions), has_base=False)


def comparison_table(compared: Comparison, place: Literal["matched", "end"], notes: Sequence[str] = ()) -> Table:
    """The runs side by side at matched new-task loss, or at their ends."""
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
            Row(METRICS["ref_kl"].label, [cell(entry.ref_kl, entry.ref_kl_ci) for entry in entries]),
            Row("forgetting", [cell(entry.forgetting, entry.forgetting_ci) for entry in entries]),
            Row("prevented", [cell(entry.prevented, entry.prevented_ci, percent=True) for entry in entries]),
        ]
        sections.append(Section(text, rows))
        notes += [f"{text}, {entry.name}: {entry.note}" for entry in entries if entry.note]
    return Table([run.name for run in runs], sections, notes, has_base=False)


def _cell_of(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(format(value, form))


def sizes(runs: ReportRuns) -> list[str]:
    """The numbers of documents and tokens of each text."""
    by_text = {}
    for run in runs:
        for text, result in run.texts.items():
            if estimate := next((each for each in result.estimates.values() if each.num_documents), None):
                documents, tokens = quantity(estimate.num_documents, "document"), quantity(estimate.num_tokens, "token")
                counted = run.loss_tokens(text) or "all"
                by_text[text] = f"{text}: {documents}, {tokens}" + ("" if counted == "all" else f" of {counted}")
    return list(by_text.values())


def facts(runs: ReportRuns) -> Iterator[tuple[str, list[str]]]:
    """(key, values) of models, settings, training and versions: one value per run, or a single one if all agree."""
    groups = ("base", "tuned", "settings", "training", "versions")
    tables = [
        {"created": run.created}
        | {f"{group}: {key}": value for group in groups for key, value in getattr(run, group).items()}
        for run in runs
    ]
    for key in _keys(tables):
        values = ["–" if table.get(key) is None else str(table[key]) for table in tables]
        yield key, values if len(set(values)) > 1 else values[:1]
