"""Planning a finetune: which pilot runs identify a law, what they predict, and the setting that keeps within a limit.

Runs without replay follow the joint law (`retain.laws.forms`). For runs with replay no law is known; each coefficient κ
that was tried has surfaces of its own, in n = log N and p = log P (steps, tuned parameters), with the curvature shared:

    L_ft(κ) - L_ft(0) = level_κ + slope_κ·n + size_κ·p + curve·n²        log L_f(κ) = the same with other numbers

L_ft(0) is the joint law's: replay changes little of what is learned, and all of what is forgotten. This describes and
explains nothing: it predicts only for coefficients, sizes and steps that the pilots span. Of nine such forms it had the
least error on held-out pilots of a real case (study 05): .05 nats of L_ft and 17% of L_f; the joint law with
a factor for L_f in place of log L_f's own surface had 31%.
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
SKIPPED_EVALUATIONS = 2  # the first ones, in which the warm-up still shows
MAX_ERROR_RATIO = 1.25  # of a law's held-out error to that of copying the nearest pilot; above it the law is rejected


@dataclass(frozen=True)
class Pilot:
    """One short run: LoRA rank, replay coefficient, optimizer steps."""

    rank: int
    coef: float
    steps: int

    @property
    def name(self) -> str:
        return f"r{self.rank}-coef{self.coef:g}-{self.steps}"


@dataclass(frozen=True)
class PilotRun:
    """A pilot that was made, and what it cost: tokens of new rows, seconds."""

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
    """A finetune not yet made, with what the pilots predict of it, and what a pilot with this very setting measured."""

    rank: int
    num_params: int
    num_steps: int
    replay_coef: float
    finetuning_loss: Predicted
    forgetting_loss: Predicted
    measured: Losses | None = None

    @property
    def best_known_loss(self) -> float:
        """The new-task loss: measured where a pilot did, predicted elsewhere."""
        return self.measured.finetuning_loss if self.measured else self.finetuning_loss.value

    @property
    def contradicted(self) -> bool:
        """Whether its own pilot measured something outside an interval."""
        intervals = (self.finetuning_loss, self.forgetting_loss)
        return any(not of.low <= at <= of.high for of, at in zip(intervals, self.measured or (), strict=False))

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.num_steps} steps, {replay_phrase(self.replay_coef)}"


def replay_phrase(coef: float) -> str:
    """A replay coefficient in words."""
    return f"replay coefficient {coef:g}" if coef else "no replay"


@dataclass
class PilotLaws:
    """What was fitted to the pilots: the law without replay, and the surfaces of the coefficients, where tried."""

    no_replay: ForgettingLaw
    replay: ForgettingLaw | None
    measured: dict[tuple[int, int, float], Losses]  # num_params, num_steps, replay_coef → both losses

    def of(self, coef: float) -> ForgettingLaw:
        """The law of a coefficient."""
        law = self.replay if coef else self.no_replay
        assert law is not None
        return law


@dataclass
class Plan:
    """A recommendation, or none.

    Args:
        max_ref_kl: limit of forgetting, KL(base ‖ model), nats per token; level: of the intervals held to it.
        chosen: the setting that learns most within the limit; fallback: the one that forgets least, to train under the
            controller of the limit where none is chosen.
        best: replay coefficient → its setting that learns most within the limit.
        rejected_laws: replay coefficient → why its law is not followed; its best setting is then the best measured one.
        caveats: what the pilots cannot say.
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
                {"replay_coef": coef, "setting": one and asdict(one)} for coef, one in self.best.items()
            ],
            "not_identified": self.caveats,
            "law_not_followed": [{"replay_coef": coef, "why": why} for coef, why in self.rejected_laws.items()],
        }


def pilot_grid(ranks: Sequence[int], coefs: Sequence[float], steps: int) -> list[Pilot]:
    """Every rank without replay; each coefficient above 0 with the least, the middle and the largest rank.

    >>> [pilot.name for pilot in pilot_grid([1, 2, 4], [0, 10], steps=60)]
    ['r1-coef0-60', 'r2-coef0-60', 'r4-coef0-60', 'r1-coef10-60', 'r2-coef10-60', 'r4-coef10-60']
    """
    ordered = sorted(set(ranks))
    some = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
    replay = [Pilot(rank, coef, steps) for coef in sorted(set(coefs) - {0}) for rank in some]
    return [Pilot(rank, 0.0, steps) for rank in ordered] + replay


def eval_steps(steps: int) -> int:
    """Steps between two measurements of a pilot."""
    return max(1, steps // EVALUATIONS)


def first_step(steps: int) -> int:
    """The first measurement that is fitted."""
    return SKIPPED_EVALUATIONS * eval_steps(steps)


def read_pilot(folder: Path, pilot: Pilot, retention: str) -> list[Measurement]:
    """Measurements of a pilot after its first ones; `retention` names the text of `forgetting_loss`."""
    columns = [one.name for one in fields(Measurement)]
    rows, _ = read_metrics(folder / "metrics.jsonl", folder.name, columns, retention, "ref_kl")
    return [Measurement(**row, replay_coef=pilot.coef) for row in rows if row["num_steps"] >= first_step(pilot.steps)]


def replay_form(coefs: Sequence[float]) -> Form:
    """The surfaces of the module's docstring, for these coefficients."""
    names = (*(f"{name}_{coef:g}" for name in ("level", "slope", "size") for coef in coefs), "curve")

    def terms(x: Values, _: Values) -> Sequence[Sequence[Number]]:
        n, p = np.log(x["num_steps"]), np.log(x["num_params"])
        of = [(x["replay_coef"] == coef).astype(float) for coef in coefs]
        one = [*of, *(which * n for which in of), *(which * p for which in of), n**2]
        none = [0.0] * len(names)
        return [[*one, *none], [*none, *one]]

    return Form(
        name="replay",
        equation="L_ft - L_ft(0), log L_f = level_κ + slope_κ·log N + size_κ·log P + curve·(log N)²",
        inputs=(*P_N, "replay_coef"),
        outputs=("loss_change", "log_forgetting"),
        exponents={},
        coefficients=tuple(f"{name}{of}" for of in ("_ft", "_f") for name in names),
        terms=terms,
        centred=P_N,
    )


def fit_pilots(measurements: Sequence[Measurement], *, num_resamples: int = 1000, seed: int = 0) -> PilotLaws:
    """The laws of measured pilots."""
    for one in measurements:
        if one.forgetting_loss <= 0:
            raise ValueError(f"run: {one.run!r} has forgotten nothing; raise learning_rate or pilot_steps")
    measured = {
        (one.num_params, one.num_steps, one.replay_coef): Losses(one.finetuning_loss, one.forgetting_loss)
        for one in measurements
    }
    with_replay = [one for one in measurements if one.replay_coef]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kept in the laws' `warnings`
        rows = [asdict(one) for one in measurements if not one.replay_coef]
        law = fit_forgetting_law(rows, "joint", num_resamples=num_resamples, seed=seed)
        if not with_replay:
            return PilotLaws(law, None, measured)
        P, N = ([float(getattr(one, name)) for one in with_replay] for name in P_N)
        losses = law.predict(num_params=P, num_steps=N).value["finetuning_loss"]
        rows = [
            {**asdict(one), "loss_change": one.finetuning_loss - loss, "log_forgetting": np.log(one.forgetting_loss)}
            for one, loss in zip(with_replay, losses, strict=True)
        ]
        form = replay_form(sorted({one.replay_coef for one in with_replay}))
        return PilotLaws(law, fit_forgetting_law(rows, form, num_resamples=num_resamples, seed=seed), measured)


def predicted_settings(
    laws: PilotLaws, sizes: Mapping[int, int], coef: float, steps: Sequence[int], level: float
) -> list[Setting]:
    """Every rank and number of steps with one coefficient; with replay only steps that the pilots span."""
    law = laws.of(coef)
    if coef:
        seen = law.runs.columns["num_steps"]
        steps = [at for at in steps if seen.min() <= at <= seen.max()]
    pairs = [(rank, at) for rank in sizes for at in steps]
    P, N = [float(sizes[rank]) for rank, _ in pairs], [float(at) for _, at in pairs]
    more = {"replay_coef": [coef] * len(pairs)} if coef else {}
    at = law.predict(level=level, num_params=P, num_steps=N, **more)  # type: ignore[arg-type]
    learned, lost = (np.stack([at.value[name], *at.ci[name]]) for name in law.form.outputs)
    if coef:
        base = laws.no_replay.predict(num_params=P, num_steps=N).value["finetuning_loss"]
        learned, lost = np.maximum(base + learned, 0.0), np.exp(lost)
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
    """The setting with the lowest new-task loss of those whose forgetting stays within `max_ref_kl`.

    Within: the upper end of the `level` interval of a new measurement is at most the limit, nats per token, and a pilot
    with this very setting measured what the interval says. Settings are compared by what pilots measured, where they
    did. Where a law is worse than its pilots (`rejection_reason`), the best setting that was measured within the limit.

    Args:
        sizes: LoRA rank → parameters that it tunes; the ranks to choose from.
        coefs: replay coefficients to choose from, each among the pilots.
        max_steps: the longest run without replay; the pilots' own length by default.
    """
    seen = np.unique(laws.no_replay.runs.columns["num_steps"]).astype(int)
    grain = int(np.diff(seen).min()) if len(seen) > 1 else 1
    steps = range(int(seen[0]), (max_steps or int(seen[-1])) + 1, grain)
    settings = {coef: predicted_settings(laws, sizes, coef, steps, level) for coef in sorted(set(coefs))}
    rejected = {coef: why for coef, of in settings.items() if (why := rejection_reason(laws, of))}
    best = {
        coef: (_best_measured if coef in rejected else _best_predicted)(of, max_ref_kl) for coef, of in settings.items()
    }
    chosen = min((one for one in best.values() if one), key=_preference, default=None)
    strongest = settings[max(settings)]
    longest = [one for one in strongest if one.num_steps == max(one.num_steps for one in strongest)]
    fallback = min(longest, key=lambda one: one.forgetting_loss.value)
    plan = Plan(max_ref_kl, level, chosen, fallback, best, rejected_laws=rejected)
    once = _best_measured([one for of in settings.values() for one in of], max_ref_kl)
    if once and once.measured and (not chosen or once.best_known_loss < chosen.best_known_loss):
        learned, lost = (f"{value:.4g}" for value in once.measured)
        plan.caveats.append(
            f"measured: {once} had {learned} and forgetting {lost}, once; its interval reaches above the limit"
        )
    plan.caveats += plan_caveats(laws, plan, sizes)
    return plan


def _best_predicted(settings: Sequence[Setting], max_ref_kl: float) -> Setting | None:
    within = [one for one in settings if one.forgetting_loss.high <= max_ref_kl and not one.contradicted]
    return min(within, key=_preference, default=None)


def _best_measured(settings: Sequence[Setting], max_ref_kl: float) -> Setting | None:
    within = [one for one in settings if one.measured and one.measured.forgetting_loss <= max_ref_kl]
    return min(within, key=_preference, default=None)


def _preference(one: Setting) -> tuple[float, int, int]:
    return one.best_known_loss, one.num_steps, one.rank


def rejection_reason(laws: PilotLaws, settings: Sequence[Setting]) -> str | None:
    """Why the law of these settings is not followed: worse than its pilots, or too vague to tell settings apart."""
    coef = settings[0].replay_coef
    for at, name in enumerate(("new-task loss", "logarithm of forgetting" if coef else "forgetting")):
        law = laws.of(coef)
        error, copied = law.run_error(law.form.outputs[at]), neighbour_error(laws, coef, at)
        if error > MAX_ERROR_RATIO * copied:
            return (
                f"it misses the {name} of held-out pilots by {error:.3g}, where a copy of the nearest pilot misses it "
                f"by {copied:.3g}"
            )
    losses = [of.finetuning_loss for of in laws.measured.values()]
    width = np.median([one.finetuning_loss.high - one.finetuning_loss.low for one in settings])
    if width > max(losses) - min(losses):
        return (
            f"its intervals of the new-task loss, {width:.3g} wide at the median, are wider than all gains: pilots "
            f"measured {min(losses):.4g} to {max(losses):.4g}"
        )
    return None


def neighbour_error(laws: PilotLaws, coef: float, at: int) -> float:
    """Root mean squared error of copying, at each step, the pilot of the nearest size with the same coefficient."""
    curves: dict[tuple[float, int], dict[int, float]] = {}  # coefficient, num_params → step → value
    for (size, step, of), losses in laws.measured.items():
        if bool(of) == bool(coef):
            curves.setdefault((of, size), {})[step] = np.log(losses[at]) if coef and at else losses[at]
    errors = []
    for (of, size), own in curves.items():
        distance = {other: abs(np.log(other / size)) for same, other in curves if same == of and other != size}
        nearest = curves[of, min(distance, key=lambda other: distance[other])]
        errors.append(np.mean([(value - nearest[step]) ** 2 for step, value in own.items() if step in nearest]))
    return float(np.sqrt(np.mean(errors)))


def plan_caveats(laws: PilotLaws, plan: Plan, sizes: Mapping[int, int]) -> list[str]:
    """What the pilots cannot say, a sentence each."""
    found = [f"{replay_phrase(coef)}: the law is not followed; {why}" for coef, why in plan.rejected_laws.items()]
    chosen = plan.chosen
    if chosen and not chosen.measured:
        found.append(f"recommended: no pilot had {chosen}; its losses are predictions")
    found += [f"law without replay: {text}" for text in laws.no_replay.warnings]
    if laws.replay is None:
        found.append("replay: no pilot had any, so its effect is not known; add a coefficient above 0")
    else:
        coefs = ", ".join(f"{coef:g}" for coef in np.unique(laws.replay.runs.columns["replay_coef"]))
        found += [f"runs with replay: {text}" for text in laws.replay.warnings if not text.startswith("replay_coef")]
        found.append(f"replay: only the coefficients {coefs} and one share of replay rows were tried, none between")
    if chosen:
        if chosen.rank in (min(sizes), max(sizes)):
            found.append(f"rank: {chosen.rank} is at the edge of the ranks tried; beyond it may be better")
        steps, tried = chosen.num_steps, laws.of(chosen.replay_coef).runs.columns["num_steps"]
        if steps == tried.min():
            found.append(f"steps: {steps} is the first measurement of the pilots; fewer may do as well")
        elif steps > tried.max():
            found.append(f"steps: {steps} is beyond the pilots; the interval trusts the form of the law")
        elif steps == tried.max():
            found.append(f"steps: {steps} is the pilots' own length; more may learn more within the limit")
    return [*found, "recipe: learning rate, batch, data and length of rows are the pilots' own; for others plan again"]
