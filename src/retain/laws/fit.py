"""Fit a law of forgetting: search exponents from many starts, bootstrap over runs, warn of what the runs leave open.

**Why runs.** Points of one run are correlated, so resampling points makes intervals far too narrow. Each resample is
every run's fitted curve plus the run's residuals times one random weight (wild bootstrap over runs, Webb's six
weights). Residuals are first scaled by (1 - leverage of the run)^-1, to the size they would have if the run were left
out (CR3), and deviations from the fit by the ratio of Student's t (runs - 1 degrees of freedom) to the normal quantile.
Drawing whole runs with replacement drops ranks from the design, and its intervals cover less.
"""

from __future__ import annotations

import warnings

import numpy as np

from retain import versions
from retain.laws.fit_problem import Problem
from retain.laws.forms import Array, Form, form_of
from retain.laws.law import MAX_INTERVAL_RATIO, ForgettingLaw
from retain.laws.run_tables import Rows, Runs, as_runs
from retain.laws.variable_projection import Fits

WEBB = np.sqrt([1.5, 1.0, 0.5])
MAX_REFITS_AT_ONCE = 100  # resamples fitted in one batch, whose terms take some ten megabytes
MIN_RUNS = 3  # for intervals
ENOUGH_RUNS = 6  # for good intervals


def fit_forgetting_law(
    runs: Runs | Rows,
    form: str | Form = "joint",
    *,
    shared_exponents: bool = False,
    num_starts: int = 32,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ForgettingLaw:
    """Fit a law to measurements of runs. What the runs leave open is issued as `LawWarning` and kept in `law.warnings`.

    Args:
        runs: rows, or a mapping of columns: `run`, the columns of the form, and `dataset` if there are several.
        form: a name in `retain.laws.forms.FORMS`, or your own `Form`.
        shared_exponents: share exponents between data sets; each still has its own coefficients and `local` exponents.
        num_starts: random starts of the exponents within their bounds.
        num_resamples: bootstrap resamples over runs; 0 for no intervals.
        seed: of the starts and the resamples.

    Raises:
        ValueError: if the runs are malformed, or too few or too alike for the form.

    >>> learned = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    >>> runs = {"run": range(6), "finetuning_loss": learned, "forgetting_loss": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}
    >>> law = fit_forgetting_law(runs, "linear", num_resamples=0)
    >>> {name: round(value, 3) for name, value in law.params.items()}
    {'c_fft': 2.0, 's_fft': 2.0}
    """
    settings = {
        "shared_exponents": shared_exponents, "num_starts": num_starts, "num_resamples": num_resamples, "seed": seed,
        "versions": versions(),
    }  # fmt: skip
    form = form_of(form)
    table = as_runs(runs, form.columns)
    problem = Problem(form, table)
    _check_problem(problem, shared_exponents)
    best = _search(problem, num_starts, seed)
    jacobian = fit_jacobian(problem, best)
    resamples = num_resamples if len(table.names) >= MIN_RUNS else 0
    law = ForgettingLaw(
        form=form,
        runs=table,
        estimate=best,
        draws=_bootstrap(problem, best, scaled_residuals(problem, best, jacobian, 1.0), resamples, seed),
        spread=scaled_residuals(problem, best, jacobian, 0.5).reshape(problem.num_outputs, -1),
        held_out=held_out_errors(problem, best),
        warnings=[*table.left_out, *design_warnings(problem)],
        settings=settings,
    )
    law.warnings += fit_warnings(law)
    for text in law.warnings:
        warnings.warn(text, LawWarning, stacklevel=2)
    return law


def _check_problem(problem: Problem, shared_exponents: bool) -> None:
    runs, form = problem.runs, problem.form
    if problem.num_datasets > 1 and not shared_exponents:
        raise ValueError(f"dataset: {problem.num_datasets} data sets; fit each alone, or set shared_exponents")
    _check_levels(form, runs)
    if len(problem.observed) <= problem.num_free:
        raise ValueError(
            f"runs: {len(runs)} rows for the {problem.num_free} free parameters of the form {form.name!r}; give more "
            "rows, or use a simpler form"
        )
    for name in form.outputs:
        if runs.columns[name].std() <= 1e-12 * np.abs(runs.columns[name]).max():
            raise ValueError(f"{name}: the same in every row, so there is nothing to fit; give runs that differ")


def _check_levels(form: Form, runs: Runs) -> None:
    """Refuse too few distinct values of an input, and too few runs if an input is constant within each run."""
    keys, between = np.array(runs.keys), {}
    for name, needed in form.levels.items():
        column = runs.columns[name]
        seen = len(np.unique(column))
        if 1 < seen < needed:
            raise ValueError(
                f"{name}: {seen} different values, but the form {form.name!r} needs {needed}; add runs with others"
            )
        if seen > 1 and all(np.ptp(column[keys == run]) == 0 for run in runs.names):
            between[name] = needed - 1
    needed = 2 + sum(between.values())  # the level, what each input adds, and one run to judge them by
    if between and len(runs.names) < needed:
        raise ValueError(
            f"runs: {len(runs.names)}, but the form {form.name!r} needs {needed} that differ in "
            f"{' and '.join(between)}; add runs (more points of one run do not help)"
        )


def _search(problem: Problem, num_starts: int, seed: int) -> Fits:
    """The best fit of many starts: least squares first, then twice robustly in units of the noise."""
    rng = np.random.default_rng(seed)
    starts = rng.uniform(problem.low, problem.high, size=(max(num_starts, 1), len(problem.low)))
    fits, loss = problem.fit(starts, robust=False, tolerance=1e-8)
    for tolerance in (1e-8, 1e-13):
        problem.set_noise(fits[[int(loss.argmin())]])
        best = fits.exponents[np.argsort(loss)[:6]]
        fits, loss = problem.fit(best, tolerance=tolerance, max_iterations=400)
    return fits[[int(loss.argmin())]]


def fit_jacobian(problem: Problem, best: Fits) -> Array:
    """Derivatives of the rows, in units of the noise, by all exponents and coefficients; shape (rows, parameters)."""
    center = np.concatenate([best.exponents, best.coefficients], axis=1)[0]
    width = np.concatenate([1e-6 * (problem.high - problem.low), 1e-4 * np.abs(center[len(problem.low) :]) + 1e-9])
    width[: len(problem.low)] *= np.where(best.exponents[0] + width[: len(problem.low)] > problem.high, -1, 1)
    moved = center + np.diag(width)
    change = problem.fitted(Fits(*np.split(moved, [len(problem.low)], axis=1))) - problem.fitted(best)
    return change.reshape(len(width), -1).T / width / problem.scale[:, None]


def scaled_residuals(problem: Problem, best: Fits, jacobian: Array, power: float) -> Array:
    """Residuals of each run times (1 - leverage)^-power: 1/2 gives the noise's size, 1 a left-out run's residuals."""
    residuals = (problem.observed - problem.fitted(best).reshape(-1)) / problem.scale
    length = np.linalg.norm(jacobian, axis=0)
    basis, values, _ = np.linalg.svd(jacobian / np.where(length > 0, length, 1.0), full_matrices=False)
    basis = basis[:, values > 1e-7 * values[0]]
    codes = problem.run_codes
    for code in range(len(problem.runs.names)):
        rows = codes == code
        left, sizes, _ = np.linalg.svd(basis[rows], full_matrices=False)
        kept = np.maximum(1 - sizes**2, 0.01)  # 0 for a run that determines a coefficient alone
        residuals[rows] += left @ ((kept**-power - 1) * (left.T @ residuals[rows]))
    return residuals * problem.scale


def _bootstrap(problem: Problem, best: Fits, residuals: Array, count: int, seed: int) -> Fits:
    """Refits to the fitted curves plus each run's residuals times one random weight per run."""
    rng = np.random.default_rng(seed + 1)
    fitted = problem.fitted(best).reshape(-1)
    parts = [best[:0]]
    for first in range(0, count, MAX_REFITS_AT_ONCE):
        size = (min(MAX_REFITS_AT_ONCE, count - first), len(problem.runs.names))
        observed = fitted + rng.choice([*WEBB, *-WEBB], size=size)[:, problem.run_codes] * residuals
        start = np.repeat(best.exponents, size[0], axis=0)
        parts.append(problem.fit(start, observed=observed, tolerance=1e-5, max_iterations=40)[0])
    return Fits(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(best)))


class LawWarning(UserWarning):
    """Something about a law that the runs leave open."""


def held_out_groups(problem: Problem) -> dict[str, np.ndarray]:
    """Masks of rows to hold out: each run, the largest size, the longest training; only where enough rows remain."""
    runs, codes = problem.runs, problem.runs.run_codes
    groups = {f"run {name}": codes == index for index, name in enumerate(runs.names)}
    sizes = runs.columns.get("num_params") if "num_params" in problem.form.inputs else None
    if sizes is not None and len(np.unique(sizes)) > 2:
        groups["largest num_params"] = sizes == sizes.max()
    steps = runs.columns.get("num_steps")
    if steps is not None and len(np.unique(steps)) > 3:
        longest = np.array([steps[codes == index].max() for index in range(len(runs.names))])
        if longest.max() > longest.min():
            groups["longest runs"] = (longest == longest.max())[codes]
        else:
            groups["last third of the steps"] = steps > np.quantile(np.unique(steps), 2 / 3)
    return {name: rows for name, rows in groups.items() if (~rows).sum() * problem.num_outputs > problem.num_free}


def held_out_errors(problem: Problem, best: Fits) -> dict[str, dict[str, float]]:
    """Root mean squared errors on rows held out of a refit: group → output → nats."""
    groups = held_out_groups(problem)
    if len(problem.runs.names) < 2 or not groups:
        return {}
    left_out = np.array(list(groups.values()))
    weight = np.tile(~left_out, (1, problem.num_outputs)).astype(float)
    start = np.repeat(best.exponents, len(groups), axis=0)
    fits, _ = problem.fit(start, weight=weight, tolerance=1e-7)
    error = problem.predict(fits) - problem.in_nats(problem.observed.reshape(problem.num_outputs, -1))
    return {
        name: {
            output: float(np.sqrt(np.mean(error[index, at, rows] ** 2)))
            for at, output in enumerate(problem.form.outputs)
        }
        for index, (name, rows) in enumerate(groups.items())
    }


def design_warnings(problem: Problem) -> list[str]:
    """Warnings about this choice of runs; they do not depend on what the runs measured."""
    runs, texts = problem.runs, []
    for name in problem.form.inputs:
        values = np.unique(runs.columns[name])
        if len(values) == 1:
            texts.append(f"{name}: {values[0]:g} in every row; its effect on the losses is not identified")
        elif len(values) == 2:
            texts.append(f"{name}: only two values; the shape of the law between and beyond them is assumed")
    count = len(runs.names)
    if count < MIN_RUNS:
        texts.append(f"run: only {count}, so there are no intervals; they need at least {MIN_RUNS} runs")
    elif count < ENOUGH_RUNS:
        texts.append(f"run: only {count}; intervals from fewer than {ENOUGH_RUNS} runs are rough")
    return texts


def fit_warnings(law: ForgettingLaw) -> list[str]:
    """What the measurements of these runs leave open."""
    problem, texts, exponents = law.problem, [], law.estimate.exponents[0]
    tolerance = 1e-6 * (problem.high - problem.low)
    at_bound = (exponents <= problem.low + tolerance) | (exponents >= problem.high - tolerance)
    if names := dict.fromkeys(name for name, stuck in zip(problem.slots, at_bound, strict=True) if stuck):
        texts.append(f"exponents: {', '.join(names)} at a bound; the data do not have the shape of the form")
    if unidentified := law.unidentified():
        texts.append(
            f"parameters: {', '.join(unidentified)} not identified (95% intervals span a factor above "
            f"{MAX_INTERVAL_RATIO:g}); predictions within the data may still be good"
        )
    return texts
