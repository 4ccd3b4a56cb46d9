"""The typed content of a report, which is also the schema that report.json is checked against.

Fields with a default may be missing or null in a file, as in older ones; keys without a field are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from retain.files import MAPPING, NUMBER
from retain.report.metrics import GAIN, METRICS
from retain.report.numbers import Estimate, is_number

KNOWN_METRICS = (GAIN.name, *METRICS)
MIN_FLOOR = 1e-6  # nats per token; a smaller divergence is float32 rounding, so shares of it are meaningless


@dataclass(frozen=True)
class TextResult:
    """The metrics of a text: for each name in `METRICS`, and for `gain`, an `Estimate` or None."""

    estimates: dict[str, Estimate] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Estimate | None:
        if name not in KNOWN_METRICS:
            raise AttributeError(f"no metric {name!r}; there are {', '.join(KNOWN_METRICS)}")
        return self.estimates.get(name)


@dataclass(frozen=True)
class KeptSums:
    """Per document, sums in nats over the predicted tokens, and the number of these tokens."""

    ref_kl: list[float]
    loss: list[float]
    base_loss: list[float]
    num_tokens: list[float]


@dataclass(frozen=True)
class EvaluatedDocuments(KeptSums):
    """Sums for the documents of the text `name` at an evaluation during training."""

    step: float
    name: str


@dataclass(frozen=True)
class Answers:
    """Both models' answers compared under one scoring rule, from `compare_answers`."""

    agreement: Estimate | None = None
    noise_agreement: Estimate | None = None
    accuracy: Estimate | None = None
    base_accuracy: Estimate | None = None
    change: Estimate | None = None
    counts: dict[str, int] = field(default_factory=dict)
    mcnemar_p: float | None = None


@dataclass(frozen=True)
class LostQuestion:
    """A question that the base answers correctly and the tuned model does not."""

    prompt: str
    choices: list[str]
    base: int
    tuned: int


@dataclass(frozen=True)
class QuestionSet:
    num_questions: int
    style: str
    notes: list[str]
    rules: dict[str, Answers]
    chat_template: bool | None = None
    lost: list[LostQuestion] = field(default_factory=list)


@dataclass(frozen=True)
class BehaviorShares:
    """The shares of both models' answers that show a behaviour, such as a refusal, according to one scorer."""

    rate: Estimate | None = None
    base_rate: Estimate | None = None
    change: Estimate | None = None
    counts: dict[str, int] = field(default_factory=dict)
    mcnemar_p: float | None = None


@dataclass(frozen=True)
class ScorerDisagreement:
    """The share of each model's answers on which two scorers differ."""

    scorers: list[str]
    base: Estimate | None = None
    tuned: Estimate | None = None


@dataclass(frozen=True)
class AnsweredRequest:
    prompt: str
    base: str
    tuned: str
    fate: dict[str, str] = field(default_factory=dict)  # by scorer


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of both models' texts in tokens, and their change."""

    base_length: Estimate | None = None
    length: Estimate | None = None
    length_change: Estimate | None = None


@dataclass(frozen=True)
class BehaviorSet:
    """A behaviour of both models on the same prompts: refusals of `harmful` or `harmless` requests, or `behaviors`."""

    kind: str = "harmful"
    num_prompts: int = 0
    chat_template: bool | None = None
    max_new_tokens: int = 0
    scorers: dict[str, BehaviorShares] = field(default_factory=dict)
    disagreement: list[ScorerDisagreement] = field(default_factory=list)
    thinking: Lengths | None = None  # where both models think
    notes: list[str] = field(default_factory=list)
    examples: list[AnsweredRequest] = field(default_factory=list)

    @property
    def noun(self) -> str:
        """What a prompt is called: a request also by its kind."""
        return f"{self.kind} prompt" if self.kind in ("harmful", "harmless") else "prompt"


@dataclass(frozen=True)
class Continuation:
    """A prompt continued by both models; `ended` tells for each whether it stopped by itself."""

    prompt: str
    base: str
    tuned: str
    how: str = "greedy"
    ended: dict[str, bool] = field(default_factory=dict)
    expected: str | None = None
    updated: str | None = None
    fate: str | None = None


@dataclass(frozen=True)
class Drift(Lengths):
    """How the texts of both models differ: content (`identical`, `words`), and form of each model and its change."""

    num_prompts: int = 0
    identical: Estimate | None = None
    words: Estimate | None = None
    base_ended: Estimate | None = None
    ended: Estimate | None = None
    ended_change: Estimate | None = None
    base_markers: Estimate | None = None
    markers: Estimate | None = None
    markers_change: Estimate | None = None


@dataclass(frozen=True)
class Knowledge:
    num_questions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    kept_share: Estimate | None = None


@dataclass(frozen=True)
class TokenResult:
    text: str = ""
    base_loss: float | None = None
    loss: float | None = None
    ref_kl: float | None = None
    base_top: str = ""
    tuned_top: str = ""


@dataclass(frozen=True)
class MovedDocument:
    """A document with a large ref_kl, token by token."""

    tokens: list[TokenResult]
    document: int | None = None
    num_tokens: int | None = None
    ref_kl: float | None = None
    forgetting: float | None = None


@dataclass(frozen=True)
class Judgement:
    """The gate's result; `code` is 0 (within), 2 (beyond) or 3 (not enough evidence)."""

    code: int
    verdict: str
    checks: list[str] = field(default_factory=list)
    max_forgetting: float | None = None
    max_ref_kl: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True)
class RunResults:
    """The results of one tuned model. Keys name texts, question sets, request sets, behaviours, or decodings."""

    name: str
    retention: dict[str, TextResult]
    base: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    created: str | None = None
    new_task: dict[str, TextResult] = field(default_factory=dict)
    noise_floor: dict[str, TextResult] = field(default_factory=dict)
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    documents: list[EvaluatedDocuments] = field(default_factory=list)
    per_document: dict[str, KeptSums] = field(default_factory=dict)
    worst: dict[str, list[MovedDocument]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    choices: dict[str, QuestionSet] = field(default_factory=dict)
    refusals: dict[str, BehaviorSet] = field(default_factory=dict)
    behaviors: dict[str, BehaviorSet] = field(default_factory=dict)
    generations: list[Continuation] = field(default_factory=list)
    drift: dict[str, Drift] = field(default_factory=dict)
    knowledge: Knowledge | None = None
    gate: Judgement | None = None

    @property
    def texts(self) -> dict[str, TextResult]:
        """All measured texts, those of the new task first."""
        return self.new_task | self.retention

    @property
    def rules(self) -> Iterator[tuple[str, str, Answers]]:
        """(question set, scoring rule, compared answers) of all question sets."""
        for name, questions in self.choices.items():
            for rule, answers in questions.rules.items():
                yield name, rule, answers

    @property
    def trained_tokens(self) -> str | None:
        """Which tokens the run's `eval_loss` counts; None if unknown."""
        return self.training.get("loss_tokens")

    @property
    def kept_step(self) -> float | None:
        """The step of the checkpoint that `load_best_model_at_end` loaded."""
        step = self.training.get("kept_step")
        return step if is_number(step) else None

    @property
    def end_step(self) -> float | None:
        """The step of the final model: `kept_step`, else the last evaluated step."""
        steps, _ = self.series("eval_loss")
        return self.kept_step if self.kept_step is not None else steps[-1] if steps else None

    def loss_tokens(self, text: str) -> str | None:
        """Which tokens of a measured text count; None if unknown."""
        return (self.settings.get("loss_tokens") or {}).get(text)

    def floor(self, text: str) -> float:
        """The noise floor of a text's ref_kl in nats per token: its upper end, at least `MIN_FLOOR`."""
        noise = self.noise_floor.get(text, TextResult()).ref_kl
        return max(MIN_FLOOR, *((noise.value, *(noise.ci or ())) if noise else (0.0,)))

    def series(self, key: str) -> tuple[list[float], list[float]]:
        return series(self.trajectory, key)

    @property
    def training_losses(self) -> tuple[list[float], list[float]]:
        """Logged steps and losses on new-task rows, without replay where they are logged separately."""
        new_task = self.series("new_task/loss")
        return new_task if new_task[0] else self.series("loss")


ReportRuns = Sequence[RunResults]


def series(trajectory: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a key in a trajectory, in step order, without rows that have no finite number."""
    points = {row["step"]: row[key] for row in trajectory if is_number(row.get(key))}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def names_of_texts(runs: ReportRuns) -> list[str]:
    """Names of all runs' retention texts, measured or logged, in order of first appearance."""
    names: dict[str, None] = {}
    for run in runs:
        logged = [re.fullmatch(r"retention/(.+)/ref_kl", key) for row in run.trajectory for key in row]
        names |= dict.fromkeys([*run.retention, *(match[1] for match in logged if match)])
    return list(names)


def texts_by_forgetting(runs: ReportRuns) -> list[str]:
    """Names of all runs' measured retention texts, by the largest forgetting in any run, in descending order."""
    most: dict[str, float] = {}
    for run in runs:
        for name, result in run.retention.items():
            value = result.forgetting.value if result.forgetting else -math.inf
            most[name] = max(value, most.get(name, value))
    return sorted(most, key=lambda name: -most[name])


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def read_as(kind: Any, value: Any) -> Any:
    """Convert a value of report.json to the type `kind`, an annotation above."""
    if kind is Estimate:
        return Estimate.read(value)
    if kind is TextResult:
        estimates = {name: Estimate.read(value[name]) for name in KNOWN_METRICS if value.get(name)}
        return TextResult({name: estimate for name, estimate in estimates.items() if estimate})
    if isinstance(kind, type) and is_dataclass(kind):
        known = {name: hint for name, hint in _types(kind).items() if value.get(name) is not None}
        return kind(**{name: read_as(hint, value[name]) for name, hint in known.items()})
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return read_as(parts[0], value)
    if origin is dict and parts[1] is not Any:
        return {key: read_as(parts[1], item) for key, item in value.items()}
    if origin is list and (is_dataclass(parts[0]) or get_origin(parts[0])):
        return [read_as(parts[0], item) for item in value]
    return value


def contradiction(value: Any, name: str = "", *, is_count: bool = False) -> str | None:
    """The first place in results that no measurement gives: an estimate outside its interval, a negative count.

    Args:
        value: `RunResults`, or the part of it that is called `name`.
        is_count: whether numbers in it are counts.
    """
    place = repr(name.removeprefix("."))
    if isinstance(value, Estimate) and value.ci is not None:
        (low, high), rounding = value.ci, 1e-9 * max(1.0, *map(abs, value.ci))
        if not low - rounding <= value.value <= high + rounding:
            return f"{place} is {value.value:g}, outside its interval [{low:g}, {high:g}]"
    if is_count and is_number(value) and value < 0:
        return f"{place} is {value:g}, a negative number"
    parts = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    has_fields = is_dataclass(value)  # the keys of others are the user's names
    if has_fields:
        parts = (value.estimates if isinstance(value, TextResult) else vars(value)).items()
    found = (
        contradiction(
            part,
            f"{name}.{key}",
            is_count=is_count or (has_fields and (key == "counts" or str(key).startswith("num_"))),
        )
        for key, part in parts
    )
    return next(filter(None, found), None)


def json_shape(kind: Any) -> Any:
    """The JSON shape of the type `kind`, for `check_shape`."""
    if kind is Estimate:
        ends, sizes = [(*NUMBER, type(None))] * 2, {f"{name}?": int for name in _types(kind) if name[:4] == "num_"}
        return {"value?": NUMBER, "ci?": ends, **sizes}
    if kind is TextResult:
        return {str: json_shape(Estimate)}
    if isinstance(kind, type) and is_dataclass(kind):
        optional = {part.name: (part.default, part.default_factory) != (MISSING, MISSING) for part in fields(kind)}
        return {f"{name}{'?' * optional[name]}": json_shape(hint) for name, hint in _types(kind).items()}
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return json_shape(parts[0])
    if origin is dict:
        return MAPPING if parts[1] is Any else {str: json_shape(parts[1])}
    if origin is list:
        return [json_shape(parts[0])]
    return NUMBER if kind is float else kind
