"""Plan a finetune: the pilot runs that identify a law, their predictions, and the best setting within a limit.

Runs without replay follow the joint law (`retain.laws.forms`). For runs with replay no law is known: each coefficient κ
of the pilots gets its own surfaces in n = log N and p = log P (steps, tuned parameters), with one shared curvature:

    L_ft(κ) - L_ft(0) = level_κ + slope_κ·n + size_κ·p + curve·n²        log L_f(κ) = the same with other numbers

L_ft(0) is the joint law's: replay changes learning little and forgetting a lot. The form only describes: it predicts
for the coefficients of the pilots, and for sizes and steps that they span. Of nine such forms it had the least error on
held-out pilots of a real case (study 05): .05 nats of L_ft and 17% of L_f; the joint law with a factor for L_f instead
of a surface of log L_f had 31%.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retain.laws.fit import fit_forgetting_law
from retain.laws.forms import P_N, Form, Number, Values
from retain.laws.law import ForgettingLaw
from retain.laws.run_tables import read_metrics

EVALUATIONS = 12  # of each pilot
SKIPPED_EVALUATIONS = 2  # first evaluations, which the warm-up affects
MAX_ERROR_RATIO = 1.25  # of a law's held-out error to that of copying the nearest pilot; above it the law is rejected


@dataclass(frozen=True)
class Pilot:
    """One short run to make: LoRA rank, replay coefficient, optimizer steps."""

    rank: int
    coef: float
    steps: int

    @property
    def name(self) -> str:
        return f"r{self.rank}-coef{self.coef:g}-{self.steps}"


@dataclass(frozen=True)
class PilotRun:
    """A finished pilot and its cost: steps, tokens of new rows, seconds."""

    pilot: Pilot
    folder: str
    num_params: int
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One evaluation of a pilot; losses as in `Losses`."""

    run: str
    num_params: int
    num_steps: int
    replay_coef: float
    finetuning_loss: float
    forgetting_loss: float


class Losses(NamedTuple):
    """Loss on the new task, and forgetting as KL(base ‖ model), nats per token."""

    finetuning_loss: float
    forgetting_loss: float


@dataclass(frozen=True)
class Predicted:
    """Nats per token, with the interval of a new measurement."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Setting:
    """A setting of a finetune, the losses predicted for it, and those measured if a pilot had this setting."""

    rank: int
    num_params: int
    num_steps: int
    replay_coef: float
    finetuning_loss: Predicted
    forgetting_loss: Predicted
    measured: Losses | None = None

    @property
    def best_known_loss(self) -> float:
        """The new-task loss: measured if a pilot had this setting, else predicted."""
        return self.measured.finetuning_loss if self.measured else self.finetuning_loss.value

    @property
    def contradicted(self) -> bool:
        """Whether a pilot with this setting measured a loss outside its interval."""
        intervals = (self.finetuning_loss, self.forgetting_loss)
        return any(not ci.low <= loss <= ci.high for ci, loss in zip(intervals, self.measured or (), strict=False))

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.num_steps} steps, {replay_phrase(self.replay_coef)}"


def replay_phrase(coef: float) -> str:
    """A replay coefficient in words."""
    return f"replay coefficient {coef:g}" if coef else "no replay"


@dataclass
class PilotLaws:
    """The laws fitted to the pilots: without replay, and the surfaces of the replay coefficients if there were any."""

    no_replay: ForgettingLaw
    replay: ForgettingLaw | None
    measured: dict[tuple[int, int, float], Losses]  # num_params, num_steps, replay_coef → both losses

    def law(self, coef: float) -> ForgettingLaw:
        """The law that predicts runs with this replay coefficient."""
        law = self.replay if coef else self.no_replay
        assert law is not None
        return law


@dataclass
class Plan:
    """A recommended setting, if there is one within the limit.

    Args:
        max_ref_kl: limit of KL(base ‖ model), nats per token; level: of the intervals whose upper end must keep it.
        chosen: the setting that learns most within the limit.
        fallback: the setting that forgets least, to train with `--max_ref_kl` if none is chosen.
        best: replay coefficient → its setting that learns most within the limit.
        caveats: what the pilots leave open.
        rejected_laws: replay coefficient → why its law is not followed; its best setting is then the best measured one.
    """

    max_ref_kl: float
    level: float
    chosen: Setting | None
    fallback: Setting
    best: dict[float, Setting | None] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    rejected_laws: dict[float, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "max_ref_kl": self.max_ref_kl,
            "level": self.level,
            "feasible": self.chosen is not None,
            "recommendation": self.chosen and asdict(self.chosen),
            "best_of_each_coefficient": [
                {"replay_coef": coef, "setting": setting and asdict(setting)} for coef, setting in self.best.items()
            ],
            "not_identified": self.caveats,
            "law_not_followed": [{"replay_coef": coef, "why": why} for coef, why in self.rejected_laws.items()],
        }


def pilot_grid(ranks: Sequence[int], coefs: Sequence[float], steps: int) -> list[Pilot]:
    """Pilots of every rank without replay, and of each coefficient above 0 with the smallest, middle and largest rank.

    >>> [pilot.name for pilot in pilot_grid([1, 2, 4], [0, 10], steps=60)]
    ['r1-coef0-60', 'r2-coef0-60', 'r4-coef0-60', 'r1-coef10-60', 'r2-coef10-60', 'r4-coef10-60']
    """
    ordered = sorted(set(ranks))
    replay_ranks = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    replay = [Pilot(rank, coef, steps) for coef in sorted(set(coefs) - {0}) for rank in replay_ranks]
    return [Pilot(rank, 0.0, steps) for rank in ordered] + replay


def eval_steps(steps: int) -> int:
    """Steps between two evaluations of a pilot."""
    return max(1, steps // EVALUATIONS)


def first_step(steps: int) -> int:
    """The step of the first evaluation that is fitted."""
    return SKIPPED_EVALUATIONS * eval_steps(steps)


def read_pilot(folder: Path, pilot: Pilot, retention: str) -> list[Measurement]:
    """Measurements of a pilot from `first_step` on; `retention` names the text of `forgetting_loss`."""
    columns = [column.name for column in fields(Measurement)]
    rows, _ = read_metrics(folder / "metrics.jsonl", folder.name, columns, retention, "ref_kl")
    return [Measurement(**row, replay_coef=pilot.coef) for row in rows if row["num_steps"] >= first_step(pilot.steps)]


def replay_form(coefs: Sequence[float]) -> Form:
    """The surfaces of runs with replay (see the module), for these coefficients."""
    names = (*(f"{name}_{coef:g}" for name in ("level", "slope", "size") for coef in coefs), "curve")

    def terms(x: Values, _: Values) -> Sequence[Sequence[Number]]:
        n, p = np.log(x["num_steps"]), np.log(x["num_params"])
        masks = [(x["replay_coef"] == coef).astype(float) for coef in coefs]
        surface = [*masks, *(mask * n for mask in masks), *(mask * p for mask in masks), n**2]
        zeros = [0.0] * len(names)
        return [[*surface, *zeros], [*zeros, *surface]]

    return Form(
        name="replay",
        equation="L_ft - L_ft(0), log L_f = level_κ + slope_κ·log N + size_κ·log P + curve·(log N)²",
        inputs=(*P_N, "replay_coef"),
        outputs=("loss_change", "log_forgetting"),
        exponents={},
        coefficients=tuple(f"{name}{suffix}" for suffix in ("_ft", "_f") for name in names),
        terms=terms,
        centred=P_N,
    )


def fit_pilots(measurements: Sequence[Measurement], *, num_resamples: int = 1000, seed: int = 0) -> PilotLaws:
    """Fit the laws to the measurements of the pilots."""
    for at in measurements:
        if at.forgetting_loss <= 0:
            raise ValueError(f"run: {at.run!r} has forgotten nothing; raise learning_rate or pilot_steps")
    measured = {
        (at.num_params, at.num_steps, at.replay_coef): Losses(at.finetuning_loss, at.forgetting_loss)
        for at in measurements
    }
    with_replay = [at for at in measurements if at.replay_coef]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `law.warnings` keeps them
        rows = [asdict(at) for at in measurements if not at.replay_coef]
        law = fit_forgetting_law(rows, "joint", num_resamples=num_resamples, seed=seed)
        if not with_replay:
            return PilotLaws(law, None, measured)
        P, N = ([float(getattr(at, name)) for at in with_replay] for name in P_N)
        losses = law.predict(num_params=P, num_steps=N).value["finetuning_loss"]
        rows = [
            {**asdict(at), "loss_change": at.finetuning_loss - loss, "log_forgetting": np.log(at.forgetting_loss)}
            for at, loss in zip(with_replay, losses, strict=True)
        ]
        form = replay_form(sorted({at.replay_coef for at in with_replay}))
        return PilotLaws(law, fit_forgetting_law(rows, form, num_resamples=num_resamples, seed=seed), measured)


def predicted_settings(
    laws: PilotLaws, sizes: Mapping[int, int], coef: float, steps: Sequence[int], level: float
) -> list[Setting]:
    """Every rank and number of steps with one coefficient; with replay, only steps within the pilots' range."""
    law = laws.law(coef)
    if coef:
        seen = law.runs.columns["num_steps"]
        steps = [num_steps for num_steps in steps if seen.min() <= num_steps <= seen.max()]
    pairs = [(rank, num_steps) for rank in sizes for num_steps in steps]
    P, N = [float(sizes[rank]) for rank, _ in pairs], [float(num_steps) for _, num_steps in pairs]
    replay = {"replay_coef": [coef] * len(pairs)} if coef else {}
    prediction = law.predict(level=level, num_params=P, num_steps=N, **replay)  # type: ignore[arg-type]
    learned, lost = (np.stack([prediction.value[name], *prediction.ci[name]]) for name in law.form.outputs)
    if coef:
        no_replay = laws.no_replay.predict(num_params=P, num_steps=N).value["finetuning_loss"]
        learned, lost = np.maximum(no_replay + learned, 0.0), np.exp(lost)
    return [
        Setting(rank, sizes[rank], num_steps, coef, Predicted(*map(float, new)), Predicted(*map(float, old)),
                laws.measured.get((sizes[rank], num_steps, coef)))
        for (rank, num_steps), new, old in zip(pairs, learned.T, lost.T, strict=True)
    ]  # fmt: skip


def recommend(
    laws: PilotLaws,
    sizes: Mapping[int, int],
    *,
    max_ref_kl: float,
    coefs: Sequence[float] = (0.0,),
    max_steps: int | None = None,
    level: float = 0.9,
) -> Plan:
    """Recommend the setting with the lowest new-task loss whose forgetting stays within `max_ref_kl`.

    It does if the upper end of the `level` interval of a new measurement is at most the limit, nats per token, and no
    pilot with this setting measured a loss outside its interval. New-task losses are the measured ones where there are
    any. A coefficient whose law is rejected (`rejection_reason`) offers its best setting measured within the limit.

    Args:
        sizes: LoRA rank → parameters that it tunes; the ranks to choose from.
        coefs: replay coefficients to choose from, each among the pilots.
        max_steps: the longest run without replay; the pilots' length by default.
    """
    seen = np.unique(laws.no_replay.runs.columns["num_steps"]).astype(int)
    interval = int(np.diff(seen).min()) if len(seen) > 1 else 1
    steps = range(int(seen[0]), (max_steps or int(seen[-1])) + 1, interval)
    settings = {coef: predicted_settings(laws, sizes, coef, steps, level) for coef in sorted(set(coefs))}
    rejected = {coef: why for coef, group in settings.items() if (why := rejection_reason(laws, group))}
    best = {
        coef: (_best_measured if coef in rejected else _best_predicted)(group, max_ref_kl)
        for coef, group in settings.items()
    }
    chosen = min((setting for setting in best.values() if setting), key=_preference, default=None)
    strongest = settings[max(settings)]
    last_step = max(setting.num_steps for setting in strongest)
    longest = [setting for setting in strongest if setting.num_steps == last_step]
    fallback = min(longest, key=lambda setting: setting.forgetting_loss.value)
    plan = Plan(max_ref_kl, level, chosen, fallback, best, rejected_laws=rejected)
    tried = _best_measured([setting for group in settings.values() for setting in group], max_ref_kl)
    if tried and tried.measured and (not chosen or tried.best_known_loss < chosen.best_known_loss):
        learned, lost = (f"{value:.4g}" for value in tried.measured)
        plan.caveats.append(
            f"measured: {tried} had {learned} and forgetting {lost}, once; its interval reaches above the limit"
        )
    plan.caveats += plan_caveats(laws, plan, sizes)
    return plan


def _best_predicted(settings: Sequence[Setting], max_ref_kl: float) -> Setting | None:
    within = [at for at in settings if at.forgetting_loss.high <= max_ref_kl and not at.contradicted]
    return min(within, key=_preference, default=None)


def _best_measured(settings: Sequence[Setting], max_ref_kl: float) -> Setting | None:
    within = [at for at in settings if at.measured and at.measured.forgetting_loss <= max_ref_kl]
    return min(within, key=_preference, default=None)


def _preference(setting: Setting) -> tuple[float, int, int]:
    return setting.best_known_loss, setting.num_steps, setting.rank


def rejection_reason(laws: PilotLaws, settings: Sequence[Setting]) -> str | None:
    """Why the law of these settings is rejected: worse than its nearest pilots, or too wide to tell settings apart."""
    coef = settings[0].replay_coef
    law = laws.law(coef)
    for output, name in enumerate(("new-task loss", "logarithm of forgetting" if coef else "forgetting")):
        error, copied = law.run_error(law.form.outputs[output]), neighbour_error(laws, coef, output)
        if error > MAX_ERROR_RATIO * copied:
            return (
                f"its error on the {name} of held-out pilots is {error:.3g}, and that of copying the nearest pilot "
                f"{copied:.3g}"
            )
    measured = [losses.finetuning_loss for losses in laws.measured.values()]
    width = np.median([setting.finetuning_loss.high - setting.finetuning_loss.low for setting in settings])
    if width > max(measured) - min(measured):
        return (
            f"its intervals of the new-task loss (median width {width:.3g}) are wider than the range that the pilots "
            f"measured, {min(measured):.4g} to {max(measured):.4g}"
        )
    return None


def neighbour_error(laws: PilotLaws, coef: float, output: int) -> float:
    """Root mean squared error of copying, at each step, the pilot of the nearest size with the same coefficient."""
    curves: dict[float, dict[int, dict[int, float]]] = {}  # coefficient → num_params → step → value
    for (size, step, other), losses in laws.measured.items():
        if bool(other) == bool(coef):
            value = np.log(losses[output]) if coef and output else losses[output]
            curves.setdefault(other, {}).setdefault(size, {})[step] = value
    errors = []
    for by_size in curves.values():
        for size, curve in by_size.items():
            others = [other for other in by_size if other != size]
            nearest = by_size[min(others, key=lambda other: abs(np.log(other / size)))]
            errors.append(np.mean([(value - nearest[step]) ** 2 for step, value in curve.items() if step in nearest]))
    return float(np.sqrt(np.mean(errors)))


def plan_caveats(laws: PilotLaws, plan: Plan, sizes: Mapping[int, int]) -> list[str]:
    """What the pilots leave open, a sentence each."""
    texts = [f"{replay_phrase(coef)}: the law is not followed; {why}" for coef, why in plan.rejected_laws.items()]
    chosen = plan.chosen
    if chosen and not chosen.measured:
        texts.append(f"recommended: no pilot had {chosen}; its losses are predictions")
    texts += [f"law without replay: {text}" for text in laws.no_replay.warnings]
    if laws.replay is None:
        texts.append("replay: no pilot had any, so its effect is unknown; add a coefficient above 0")
    else:
        coefs = ", ".join(f"{coef:g}" for coef in np.unique(laws.replay.runs.columns["replay_coef"]))
        texts += [f"runs with replay: {text}" for text in laws.replay.warnings if not text.startswith("replay_coef")]
        texts.append(f"replay: only the coefficients {coefs} and one share of replay rows were tried")
    if chosen:
        if chosen.rank in (min(sizes), max(sizes)):
            texts.append(f"rank: {chosen.rank} is at the edge of the ranks tried; one beyond it may be better")
        steps, tried = chosen.num_steps, laws.law(chosen.replay_coef).runs.columns["num_steps"]
        if steps == tried.min():
            texts.append(f"steps: {steps} is the first measurement of the pilots; fewer may do as well")
        elif steps > tried.max():
            texts.append(f"steps: {steps} is beyond the pilots; the interval assumes that the law still holds")
        elif steps == tried.max():
            texts.append(f"steps: {steps} is the length of the pilots; more may learn more within the limit")
    return [*texts, "recipe: learning rate, batch, data and row length are those of the pilots; plan again for others"]
