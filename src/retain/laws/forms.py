"""Forms of the laws of forgetting, as sums of terms for the fit. Losses are in nats per token.

- P, N, D, T, p, K, L_ft, L_f: columns of the runs, `RUN_COLUMNS`; P counts the tuned parameters in LoRA laws, all
  parameters of the model in size and injection
- a, b, α, β, ρ: of the shifted power laws; c, s: an amplitude and the loss in the limit
- _ft, _f, _fft: of L_ft, of L_f, and of the line L_f(L_ft)

Sources: linear, joint, finetuning and forgetting are from Kalajdzievski, arXiv 2401.05605: the more learned, the more
forgotten. injection is from Bethune et al., arXiv 2502.06042: a share p of old data acts like (1 + B·p) times the
parameters. size and saturation describe tables of Marek et al., arXiv 2605.26097: forgetting at equal learning over
model size, and over pretraining tokens per parameter. quadratic is from RL's Razor, arXiv 2509.04259: forgetting over
the divergence on the new task.

**What the data identify.** c·[(a/P)^α + (b/N)^β]^ρ is unchanged by a → a·k^(1/α), b → b·k^(1/β), c → c·k^-ρ. The fit
removes this freedom: the bracket is 1 at the centre of the data (geometric means P₀, N₀), where c is the distance to
the limit. α, β and ρ are nearly degenerate too: for large ρ the form tends to c·(P/P₀)^-e·(N/N₀)^-f, which only
depends on e = ρ·w·α and f = ρ·(1-w)·β, with w = (a/P₀)^α. They are reported as `slope_params` and `slope_steps`.
The fit searches ρ, w (`share`), ρ·α (`reach_params`) and ρ·β (`reach_steps`).

The joint law adds a freedom: a different c_fft, with s_fft, a_f and b_f to match, gives the same law. So only ρ, L_f's
distance from its limit (c_fft times its bracket) and that limit (s_fft - c_fft·s_ft) are fitted, together with L_ft.
c_fft is reported as the slope of L_f over L_ft along a run at the centre, -(dL_f/dN) / (dL_ft/dN): the slope of the
line wherever the two brackets are equal.

A form is one entry of `FORMS`, a column one of `RUN_COLUMNS`; nothing else names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = float | Array
Values = Mapping[str, Array]
Centres = Mapping[str, float]


@dataclass(frozen=True)
class Column:
    """A column of runs: its symbol in equations, its label on axes and its valid values.

    Args:
        low: smallest value; with `positive`, values must exceed it.
        per_run: all rows of a run have the same value.
    """

    symbol: str
    label: str
    low: float = -np.inf
    positive: bool = False
    per_run: bool = False

    def allows(self, values: Number) -> np.ndarray:
        """Which values are valid."""
        return np.isfinite(values) & (values > self.low if self.positive else values >= self.low)

    @property
    def range(self) -> str:
        """The valid values, in words."""
        low = f" {'above' if self.positive else 'of at least'} {self.low:g}" if np.isfinite(self.low) else ""
        return f"a finite number{low}"


RUN_COLUMNS = {
    "num_params": Column("P", "parameters", 0, positive=True, per_run=True),
    "num_steps": Column("N", "steps", 0, positive=True),
    "num_tokens": Column("D", "tokens", 0, positive=True),
    "tokens_per_param": Column("T", "pretraining tokens per parameter", 0, positive=True, per_run=True),
    "replay_share": Column("p", "share of old data", 0, per_run=True),
    "ref_kl": Column("K", "ref_kl on the new task, nats per token", 0),
    "finetuning_loss": Column("L_ft", "new-task loss, nats per token", 0),
    "forgetting_loss": Column("L_f", "forgetting loss, nats per token"),  # or its rise, which may be negative
}


def column_of(name: str) -> Column:
    """The column of this name; a column that only a user's form has takes any finite number."""
    return RUN_COLUMNS.get(name) or Column(name, name)


@dataclass(frozen=True)
class Form:
    """A law for the fit: each output is a sum of coefficients times terms.

    The fit solves for the coefficients exactly and searches the exponents between their bounds.

    Args:
        name: its name, in files too.
        equation: to be read, in the symbols of `legend`.
        inputs, outputs: columns of the runs.
        coefficients: names, in the order of the terms.
        terms: (inputs, exponents) → for each output (or its logarithm, with `logs`) one array per coefficient. Inputs
            have shape (points,); exponents broadcast against them, with fits as the first axis.
        exponents: name → bounds; searched on a log scale if the lower bound is positive.
        logs: fit the logarithms of the outputs: errors are relative, and predictions stay above 0.
        levels: input → how many different values of it the form needs; fewer are refused, except one value in every
            row, with which other values are refused in predictions.
        local: exponents that each data set has for itself where exponents are shared.
        centred: inputs divided by their geometric mean before `terms` gets them.
        report: exponents, coefficients and centres → the parameters as published.
    """

    name: str
    equation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    coefficients: tuple[str, ...]
    terms: Callable[[Values, Values], Sequence[Sequence[Number]]]
    exponents: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    logs: bool = False
    levels: Mapping[str, int] = field(default_factory=dict)
    local: tuple[str, ...] = ()
    centred: tuple[str, ...] = ()
    report: Callable[[Values, Centres], dict[str, Array]] = lambda values, _: dict(values)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the fit reads."""
        return tuple(dict.fromkeys((*self.inputs, *self.outputs)))

    @property
    def legend(self) -> dict[str, str]:
        """Symbols of the equation → columns.

        >>> FORMS["quadratic"].legend
        {'K': 'ref_kl', 'L_f': 'forgetting_loss'}
        """
        return {column_of(name).symbol: name for name in self.columns}


def _bracket(inputs: Values, values: Values, suffix: str = "") -> Array:
    """[w·P^-α + (1-w)·N^-β]^ρ with P and N in units of their centres."""
    rho, share = values["rho"], values[f"share{suffix}"]
    by_params = share * inputs["num_params"] ** -(values[f"reach_params{suffix}"] / rho)
    return (by_params + (1 - share) * inputs["num_steps"] ** -(values[f"reach_steps{suffix}"] / rho)) ** rho


def _power_exponents(suffix: str = "") -> dict[str, tuple[float, float]]:
    return {f"reach_params{suffix}": (1e-3, 5.0), f"reach_steps{suffix}": (1e-3, 5.0), f"share{suffix}": (0.0, 1.0)}


def _published(values: Values, centres: Centres, suffix: str, scale: Number) -> dict[str, Array]:
    """a, α, b, β and the slopes, for a bracket that is `scale` at the centre."""
    rho, share = values["rho"], values[f"share{suffix}"]
    alpha, beta = values[f"reach_params{suffix}"] / rho, values[f"reach_steps{suffix}"] / rho
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            f"a{suffix}": centres["num_params"] * (scale * share) ** (1 / alpha),
            f"alpha{suffix}": alpha,
            f"b{suffix}": centres["num_steps"] * (scale * (1 - share)) ** (1 / beta),
            f"beta{suffix}": beta,
            f"slope_params{suffix}": rho * share * alpha,
            f"slope_steps{suffix}": rho * (1 - share) * beta,
        }


def _report_power(values: Values, centres: Centres) -> dict[str, Array]:
    return {name: values[name] for name in ("c", "s", "rho")} | _published(values, centres, "", 1.0)


def _report_joint(values: Values, centres: Centres) -> dict[str, Array]:
    """Parameters of the joint law; c_fft is the slope of L_f over L_ft along a run at the centre (see the module)."""
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN where steps have no effect
        steps_f, steps_ft = ((1 - values[f"share{name}"]) * values[f"reach_steps{name}"] for name in ("_f", "_ft"))
        c_fft = -values["amplitude_f"] * steps_f / (values["c_ft"] * steps_ft)
        scale = (steps_ft / steps_f) ** (1 / values["rho"])  # of the bracket of L_f: amplitude_f = -c_fft·c_ft·scale^ρ
    named = {"c_fft": c_fft, "s_fft": values["limit_f"] + c_fft * values["s_ft"]}
    named |= {name: values[name] for name in ("c_ft", "s_ft", "rho")}
    return named | _published(values, centres, "_ft", 1.0) | _published(values, centres, "_f", scale)


def _joint_terms(inputs: Values, values: Values) -> Sequence[Sequence[Number]]:
    return [[_bracket(inputs, values, "_ft"), 1.0, 0.0, 0.0], [0.0, 0.0, _bracket(inputs, values, "_f"), 1.0]]


def _injection_terms(inputs: Values, values: Values) -> Sequence[Sequence[Number]]:
    effective_params = (1 + values["B"] * inputs["replay_share"]) * inputs["num_params"]
    return [[inputs["num_tokens"] ** values["beta"] * effective_params ** -values["alpha"], 1.0]]


def _report_injection(values: Values, centres: Centres) -> dict[str, Array]:
    unit = centres["num_tokens"] ** values["beta"] * centres["num_params"] ** -values["alpha"]
    return {"A": values["A"] / unit, **{name: values[name] for name in ("B", "alpha", "beta", "s")}}


def _report_size(values: Values, centres: Centres) -> dict[str, Array]:
    c = np.exp(values["log_c"]) * centres["num_params"] ** values["alpha"]
    return {"c": c, "alpha": values["alpha"]}


P_N, RHO = ("num_params", "num_steps"), {"rho": (0.3, 30.0)}
LOSSES = ("finetuning_loss", "forgetting_loss")
P_N_LEVELS = {"num_params": 3, "num_steps": 4}  # a level, α and w; then β, ρ and c
FINETUNING = Form(
    name="finetuning",
    equation="L_ft = c·[(a/P)^α + (b/N)^β]^ρ + s",
    inputs=P_N,
    outputs=("finetuning_loss",),
    exponents=_power_exponents() | RHO,
    coefficients=("c", "s"),
    terms=lambda x, values: [[_bracket(x, values), 1.0]],
    levels=P_N_LEVELS,
    local=("share",),
    centred=P_N,
    report=_report_power,
)
FORMS = {
    form.name: form
    for form in (
        Form(
            name="linear",
            equation="L_f = -c_fft·L_ft + s_fft",
            inputs=("finetuning_loss",),
            outputs=("forgetting_loss",),
            coefficients=("c_fft", "s_fft"),
            terms=lambda x, _: [[-x["finetuning_loss"], 1.0]],
            levels={"finetuning_loss": 2},
        ),
        Form(
            name="joint",
            equation="L_ft = c_ft·[(a_ft/P)^α_ft + (b_ft/N)^β_ft]^ρ + s_ft;  "
            "L_f = -c_fft·(c_ft·[(a_f/P)^α_f + (b_f/N)^β_f]^ρ + s_ft) + s_fft",
            inputs=P_N,
            outputs=LOSSES,
            exponents=_power_exponents("_ft") | _power_exponents("_f") | RHO,
            coefficients=("c_ft", "s_ft", "amplitude_f", "limit_f"),
            terms=_joint_terms,
            levels=P_N_LEVELS,
            local=("share_ft", "share_f"),
            centred=P_N,
            report=_report_joint,
        ),
        FINETUNING,
        replace(
            FINETUNING,
            name="forgetting",
            equation="L_f = c·[(a/P)^α + (b/N)^β]^ρ + s, with c below zero where forgetting grows",
            outputs=("forgetting_loss",),
        ),
        Form(
            name="injection",
            equation="L_f = A·D^β / ((1 + B·p)·P)^α + s",
            inputs=("num_params", "num_tokens", "replay_share"),
            outputs=("forgetting_loss",),
            exponents={"alpha": (1e-2, 3.0), "beta": (1e-2, 3.0), "B": (1e-2, 1e6)},
            coefficients=("A", "s"),
            terms=_injection_terms,
            levels={"num_params": 2, "num_tokens": 2, "replay_share": 2},
            centred=("num_params", "num_tokens"),
            report=_report_injection,
        ),
        Form(
            name="size",
            equation="L_f = c·P^-α",
            inputs=("num_params",),
            outputs=("forgetting_loss",),
            coefficients=("log_c", "alpha"),
            terms=lambda x, _: [[1.0, -np.log(x["num_params"])]],
            logs=True,
            levels={"num_params": 2},
            centred=("num_params",),
            report=_report_size,
        ),
        Form(
            name="saturation",
            equation="L_f = s - c·T^-γ",
            inputs=("tokens_per_param",),
            outputs=("forgetting_loss",),
            exponents={"gamma": (1e-2, 5.0)},
            coefficients=("c", "s"),
            terms=lambda x, values: [[-(x["tokens_per_param"] ** -values["gamma"]), 1.0]],
            levels={"tokens_per_param": 3},
        ),
        Form(
            name="quadratic",
            equation="L_f = s + c·K + q·K²",
            inputs=("ref_kl",),
            outputs=("forgetting_loss",),
            coefficients=("c", "q", "s"),
            terms=lambda x, _: [[x["ref_kl"], x["ref_kl"] ** 2, 1.0]],
            levels={"ref_kl": 3},
        ),
    )
}


def form_of(form: str | Form, bounds: Mapping[str, tuple[float, float]] | None = None) -> Form:
    """The form of this name, or the form given, with these bounds of its exponents where there are any."""
    if not isinstance(form, Form):
        if form not in FORMS:
            raise ValueError(f"form: {form!r} is not known; use one of {', '.join(FORMS)}")
        form = FORMS[form]
    for name, (low, high) in (bounds or {}).items():
        if name not in form.exponents:
            known = ", ".join(form.exponents) or "none"
            raise ValueError(f"bounds: {name!r} is not an exponent of the form {form.name!r}; it has {known}")
        if not 0 <= low < high < np.inf:
            raise ValueError(f"bounds: {name} from {low:g} to {high:g} is not an interval; use 0 <= low < high")
    return replace(form, exponents={**form.exponents, **(bounds or {})})
