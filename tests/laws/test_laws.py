"""Laws of forgetting: forms against published values, fits against the truth and naive twins, intervals, files."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from published_laws import (
    BOTH,
    NEWS,
    OPENORCA,
    PER_RANK,
    RANKS,
    injection,
    linear_forgetting,
    paper_design,
    power_of,
    quadratic,
    quiet_fit,
    saturation,
    shifted_power,
    size,
    truth,
)
from scipy import optimize, stats

from retain import fit_forgetting_law
from retain.cli.fit import FitConfig
from retain.laws.fit import LawWarning
from retain.laws.forms import FORMS, Form, form_of
from retain.laws.law import ForgettingLaw, first_crossings
from retain.laws.variable_projection import HUBER, fit_many

PUBLISHED = pytest.mark.parametrize("coefficients", [OPENORCA, NEWS], ids=["OpenOrca", "News"])


def rows_of(table: dict, keep) -> dict:
    return {name: np.asarray(column)[keep] for name, column in table.items()}


@pytest.fixture(scope="module")
def noisy_law() -> ForgettingLaw:
    return quiet_fit(paper_design(), num_resamples=100)


# Forms


def test_published_check_values():
    r8, r256 = 8 * PER_RANK, 256 * PER_RANK
    line = {name: OPENORCA[name] for name in ("c_fft", "s_fft")}
    early, late = truth(OPENORCA, r8, 50), truth(OPENORCA, r8, 260)
    assert early == pytest.approx([0.767, 0.711], abs=5e-4)
    assert linear_forgetting(early[0], **line) == pytest.approx(0.718, abs=5e-4)
    assert late == pytest.approx([0.677, 0.873], abs=5e-4)
    assert linear_forgetting(late[0], **line) == pytest.approx(0.875, abs=5e-4)
    assert truth(NEWS, r256, 260) == pytest.approx([1.989, 1.017], abs=5e-4)


def test_other_forms_by_hand():
    law = {"A": 2.0, "B": 50.0, "alpha": 0.4, "beta": 0.3, "s": 1.0}
    assert injection(1e6, 1e7, 0.0, **law) == pytest.approx(1 + 2 * 1e7**0.3 / 1e6**0.4)
    assert injection(1e6, 1e7, 0.02, **law) == pytest.approx(injection(2e6, 1e7, 0.0, **law)), "like parameters"
    assert size(100.0, c=5.0, alpha=0.5) == pytest.approx(0.5)
    assert saturation(100.0, c=5.0, gamma=0.5, s=2.0) == pytest.approx(1.5)
    assert quadratic(3.0, c=2.0, q=0.5, s=1.0) == pytest.approx(11.5)


DESIGNS = {  # form: its pure function, parameters, columns in the function's order
    "injection": (
        injection,
        {"A": 2.0, "B": 80.0, "alpha": 0.4, "beta": 0.3, "s": 1.0},
        {"num_params": [1e6, 4e6, 2e7], "num_tokens": [1e6, 4e6, 1e7], "replay_share": [0, 0.01, 0.05]},
    ),
    "size": (size, {"c": 5e3, "alpha": 0.7}, {"num_params": [1e6, 3e6, 1e7, 5e7]}),
    "saturation": (saturation, {"c": 0.6, "gamma": 0.25, "s": 0.3}, {"tokens_per_param": [10, 32, 100, 316, 1000]}),
    "quadratic": (quadratic, {"c": 0.2, "q": 0.7, "s": 0.05}, {"ref_kl": [0, 0.1, 0.3, 0.5, 0.9]}),
    "linear": (linear_forgetting, {"c_fft": 1.7, "s_fft": 2.0}, {"finetuning_loss": [0.6, 0.65, 0.7, 0.8]}),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_each_form_recovers_the_parameters_of_its_pure_function(name):
    function, params, values = DESIGNS[name]
    columns = [column.ravel() for column in np.meshgrid(*values.values())]
    table = {"run": range(len(columns[0])), **dict(zip(values, columns, strict=True))}
    table["forgetting_loss"] = function(*columns, **params)
    law = quiet_fit(table, name, num_resamples=0)
    assert law.params == pytest.approx(params, rel=1e-4)


def test_every_form_is_named_in_the_help_and_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "laws.md").read_text(encoding="utf-8")
    [form] = [one for one in fields(FitConfig) if one.name == "form"]
    for name in FORMS:
        assert name in form.metadata["help"]
        assert f"`{name}`" in page


@pytest.mark.parametrize("name", ["finetuning", "forgetting"])
@PUBLISHED
def test_a_law_alone_is_recovered_from_noise_free_data(name, coefficients):
    """Exponents exactly; a, b and c up to the freedom of the form, so compared where the bracket is 1."""
    of = "ft" if name == "finetuning" else "f"
    table = paper_design(coefficients, noise=0)
    law = quiet_fit(table, name, num_resamples=0)
    for exponent in ("alpha", "beta"):
        assert law.params[exponent] == pytest.approx(coefficients[f"{exponent}_{of}"], rel=1e-3)
    assert law.params["rho"] == pytest.approx(coefficients["rho"], rel=1e-3)
    centre = {key: np.exp(np.log(table[key]).mean()) for key in ("num_params", "num_steps")}
    power = {**power_of(coefficients, of), "c": 1.0, "s": 0.0, "rho": 1.0}
    scale = shifted_power(centre["num_params"], centre["num_steps"], **power)
    a = coefficients[f"a_{of}"] * scale ** (-1 / coefficients[f"alpha_{of}"])
    assert law.params["a"] == pytest.approx(a, rel=0.01)
    assert abs(law.params["c"]) == pytest.approx(
        coefficients["c_ft"] * scale ** coefficients["rho"] * (1 if of == "ft" else coefficients["c_fft"]), rel=1e-3
    )


EQUAL = {
    "a_f": 2e6, "alpha_f": 0.3, "b_f": 300.0, "beta_f": 0.5, "a_ft": 2e6, "alpha_ft": 0.3, "b_ft": 300.0,
    "beta_ft": 0.5, "rho": 1.2, "c_ft": 0.8, "s_ft": 1.5, "c_fft": 1.7, "s_fft": 6.0,
}  # fmt: skip
BRACKETS = {
    "equal": EQUAL,
    "half as large again": EQUAL | {"a_f": 3e6, "b_f": 450.0},
    "other exponents": EQUAL | {"a_f": 5e5, "alpha_f": 0.2, "beta_f": 0.7},
}


@pytest.mark.parametrize("kind", BRACKETS)
def test_exact_joint_data_are_recovered_with_any_brackets(kind):
    """c_fft and s_fft were frozen at a regression line, which is the law's only where both brackets are equal."""
    law_of = BRACKETS[kind]
    P, N = map(np.ravel, np.meshgrid(np.geomspace(1e6, 1e9, 7), np.geomspace(50, 2000, 8)))
    run = [f"{size:g}" for size in P]
    table = {"run": run, "num_params": P, "num_steps": N, **dict(zip(BOTH, truth(law_of, P, N), strict=True))}
    law = quiet_fit(table, num_resamples=0)
    for factor, close in ((1, {"abs": 1e-4}), (10, {"rel": 0.01})):
        found = law.predict(num_params=factor * P, num_steps=factor * N).value
        for name, exact in zip(BOTH, truth(law_of, factor * P, factor * N), strict=True):
            assert found[name] == pytest.approx(exact, **close)
    if kind == "equal":
        assert {name: law.params[name] for name in ("c_fft", "s_fft", "rho")} == pytest.approx(
            {name: law_of[name] for name in ("c_fft", "s_fft", "rho")}, rel=1e-6
        )


@PUBLISHED
def test_the_joint_law_is_recovered(coefficients):
    table = paper_design(coefficients, noise=0)
    law = quiet_fit(table, num_resamples=0)
    at = law.predict(num_params=table["num_params"], num_steps=table["num_steps"]).value
    for name in BOTH:
        assert at[name] == pytest.approx(table[name], rel=1e-3)
    assert law.params["rho"] == pytest.approx(coefficients["rho"], rel=0.05)
    assert law.params["c_fft"] == pytest.approx(coefficients["c_fft"], rel=0.05)
    assert min(law.r_squared.values()) > 0.9999


@PUBLISHED
def test_predictions_from_noisy_runs_are_within_a_percent(coefficients):
    table = paper_design(coefficients, seed=3)
    law = quiet_fit(table, num_resamples=0)
    at = law.predict(num_params=table["num_params"], num_steps=table["num_steps"]).value
    errors = [np.abs(at[name] / exact - 1) for name, exact in
              zip(BOTH, truth(coefficients, table["num_params"], table["num_steps"]), strict=True)]  # fmt: skip
    assert max(np.median(error) for error in errors) < 0.01
    assert max(error.max() for error in errors) < 0.02
    assert 0.94 < law.r_squared["forgetting_loss"] < 0.99


@pytest.mark.parametrize("form", ["joint", "finetuning", "forgetting"])
def test_reported_parameters_are_those_of_the_pure_functions(form, noisy_law):
    law = noisy_law if form == "joint" else quiet_fit(paper_design(), form, num_resamples=0)
    P, N, params = 3e7, 120.0, law.params
    found = law.predict(num_params=P, num_steps=N).value
    if form == "joint":
        exact = truth(params, P, N)
        assert [found[name] for name in BOTH] == pytest.approx(exact, rel=1e-9)
    else:
        power = {name: params[name] for name in ("a", "alpha", "b", "beta", "rho", "c", "s")}
        assert next(iter(found.values())) == pytest.approx(float(shifted_power(P, N, **power)), rel=1e-9)


# The search, against naive twins


def test_the_robust_fit_is_scipys():
    """The same minimum of Huber's loss as scipy's search over coefficients and exponent at once."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 100, 30)
    y = (2 * x**-0.7 + 0.5) / 0.05 + rng.normal(size=30)
    y[::7] += 12  # outliers

    def terms(exponents):
        return np.stack([x ** -exponents[:, :1], np.ones((len(exponents), 30))], axis=-1) / 0.05

    bounds = {"low": np.array([0.01]), "high": np.array([5.0])}
    found, loss = fit_many(terms, np.array([[2.0]]), y[None], np.ones((1, 30)), **bounds, tolerance=1e-14)
    twin = optimize.least_squares(
        lambda p: (p[1] * x ** -p[0] + p[2]) / 0.05 - y, [0.7, 2.0, 0.5], loss="huber", f_scale=HUBER, xtol=1e-14
    )
    assert [found.exponents[0, 0], *found.coefficients[0]] == pytest.approx(twin.x, rel=1e-4)
    assert loss[0] == pytest.approx(twin.cost, rel=1e-9)
    squares, _ = fit_many(terms, np.array([[2.0]]), y[None], np.ones((1, 30)), **bounds, robust=False)
    assert abs(squares.exponents[0, 0] - 0.7) > 2 * abs(found.exponents[0, 0] - 0.7)


def test_fits_made_together_are_those_made_alone():
    tables = [paper_design(seed=seed, steps=8) for seed in range(3)]
    law = quiet_fit(tables[0], "forgetting", num_resamples=0)
    observed = np.stack([table["forgetting_loss"] for table in tables])
    start = np.repeat(law.estimate.exponents, 3, axis=0)
    law.problem.set_noise(law.estimate)
    together, _ = law.problem.fit(start, observed=observed, robust=True, tolerance=1e-10)
    for at in range(3):
        alone, _ = law.problem.fit(start[[at]], observed=observed[[at]], robust=True, tolerance=1e-10)
        assert law.problem.predict(alone) == pytest.approx(law.problem.predict(together[[at]]), rel=1e-9)


def test_bounds_hold_and_the_law_warns_of_them():
    with pytest.warns(LawWarning, match="exponents: rho at a bound"):
        law = fit_forgetting_law(paper_design(noise=0), form_of("forgetting", {"rho": (0.5, 2.0)}), num_resamples=0)
    assert law.params["rho"] == pytest.approx(2.0)


@pytest.mark.parametrize("level", [0.9, 0.99, 0.999])
def test_the_stretch_of_intervals_is_exact_at_three_runs(level):
    """An expansion of Student's t was 4% low at 99%, 17% at 99.9%."""
    law = quiet_fit({"run": range(3), "finetuning_loss": [1, 2, 3], "forgetting_loss": [3, 2.1, 1]}, "linear",
                    num_resamples=0)  # fmt: skip
    upper = (1 + level) / 2
    assert law.stretch(level) == pytest.approx(stats.t.ppf(upper, 2) / stats.norm.ppf(upper), rel=1e-9)


def test_held_out_error_is_that_of_a_refit_without_the_run():
    table = paper_design(steps=10)
    law = quiet_fit(table, "forgetting", num_resamples=0)
    rest = quiet_fit(rows_of(table, table["run"] != "r256"), "forgetting", num_resamples=0, seed=1)
    held = rows_of(table, table["run"] == "r256")
    exact = rest.predict(num_params=held["num_params"], num_steps=held["num_steps"]).value["forgetting_loss"]
    error = math.sqrt(np.mean((exact - held["forgetting_loss"]) ** 2))
    assert law.held_out["largest num_params"]["forgetting_loss"] == pytest.approx(error, rel=0.1)
    assert law.held_out["largest num_params"] == law.held_out["run r256"]
    assert set(law.held_out) == {f"run r{rank}" for rank in RANKS} | {"largest num_params", "last third of the steps"}


def test_the_longest_runs_are_held_out_where_lengths_differ():
    table = paper_design(steps=10)
    law = quiet_fit(rows_of(table, (table["num_steps"] < 150) | (table["run"] == "r16")), "forgetting", num_resamples=0)
    assert law.held_out["longest runs"] == law.held_out["run r16"]


# Intervals


def coverage(count: int, form: str, resamples: int, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """How often 90% intervals hold the curve and a new measurement, at points within and beyond the design; and how
    often they hold the curve when points are resampled as if each were a run."""
    P, N = PER_RANK * np.array([32.0, 64.0, 256.0, 512.0]), np.array([150.0, 260.0, 200.0, 260.0])
    rng = np.random.default_rng(seed)
    hits: dict[str, list] = {"curve": [], "new": [], "points": []}
    exact = truth(OPENORCA, P, N)[1]
    for trial in range(count):
        table = paper_design(seed=1000 * seed + trial, steps=steps)
        sigma = 0.2 * truth(OPENORCA, table["num_params"], table["num_steps"])[1].std()
        options = {"num_resamples": resamples, "num_starts": 8}
        at = quiet_fit(table, form, **options).predict(level=0.9, num_params=P, num_steps=N)
        new = exact + sigma * rng.normal(size=4)
        hits["curve"].append(within(exact, at.curve_ci["forgetting_loss"]))
        hits["new"].append(within(new, at.ci["forgetting_loss"]))
        if form != "joint" and trial % 2 == 0:
            points = {**table, "run": range(len(table["run"]))}
            at = quiet_fit(points, form, **options).predict(level=0.9, num_params=P, num_steps=N)
            hits["points"].append(within(exact, at.curve_ci["forgetting_loss"]))
    return {name: np.mean(found, axis=0) for name, found in hits.items() if found}


def within(value, interval) -> np.ndarray:
    return (interval[0] <= value) & (value <= interval[1])


def test_intervals_over_runs_cover_and_intervals_over_points_do_not():
    """Pitfall 26. A small version of the slow test below; 30 data sets leave ±6% of chance in each figure."""
    found = coverage(30, "forgetting", resamples=80, steps=6)
    assert 0.82 <= found["curve"].mean() <= 0.98
    assert 0.82 <= found["new"].mean() <= 0.98
    assert found["points"].mean() < found["curve"].mean() - 0.15


@pytest.mark.slow
def test_coverage_of_the_joint_law_on_the_papers_design():
    found = coverage(200, "joint", resamples=200, steps=22, seed=1)
    assert 0.85 <= found["curve"].mean() <= 0.96
    assert 0.85 <= found["new"].mean() <= 0.95


SINGLE = {  # form: input, curve, whether noise is a share of the value, its size (of the spread, or of the value)
    "size": (np.geomspace(6e6, 46e6, 6), lambda P: size(P, c=0.26 * 6e6**2, alpha=2.0), True, 0.15),
    "linear": (np.linspace(0.5, 1.0, 6), lambda L_ft: linear_forgetting(L_ft, c_fft=1.7, s_fft=2.0), False, 0.1),
    "saturation": (np.geomspace(10, 1000, 6), lambda T: saturation(T, c=0.6, gamma=0.25, s=0.4), False, 0.1),
    "quadratic": (np.linspace(0.05, 0.9, 6), lambda K: quadratic(K, c=0.2, q=0.7, s=0.2), False, 0.1),
}


def coverage_of_single_points(form: str, count: int, resamples: int = 200) -> np.ndarray:
    """How often nominal 90% intervals of six runs of one point each hold a new measurement, and the curve, at each of
    the six: shape (2, 6)."""
    x, curve, share, noise = SINGLE[form]
    exact, hits = curve(x), []
    sigma = noise * (exact if share else exact.std())
    name = FORMS[form].inputs[0]
    for trial in range(count):
        rng = np.random.default_rng([trial, 5])
        y, new = exact + sigma * rng.normal(size=(2, len(x)))
        table = {"run": range(len(x)), name: x, "forgetting_loss": np.maximum(y, 1e-9)}
        at = quiet_fit(table, form, num_resamples=resamples, num_starts=4).predict(level=0.9, **{name: x})
        hits.append([within(new, at.ci["forgetting_loss"]), within(exact, at.curve_ci["forgetting_loss"])])
    return np.mean(hits, axis=0)


@pytest.mark.parametrize("form", SINGLE)
def test_six_runs_of_one_point_cover_a_new_measurement(form):
    """`size` covered .64 at the smallest model. A small version of the slow test below; 60 data sets."""
    found = coverage_of_single_points(form, 60, resamples=60)[0]
    assert found.mean() >= 0.83
    assert found.min() >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("form", SINGLE)
def test_coverage_of_six_runs_of_one_point_is_near_nominal(form):
    """The table in docs/laws.md."""
    found = coverage_of_single_points(form, 500)[0]
    assert 0.86 <= found.mean() <= 0.94
    assert found.min() >= 0.84


def test_no_interval_of_a_loss_reaches_below_0_and_the_cut_is_noted():
    """A KL of 0.041 [-2.74, 2.76] was printed without a word."""
    table = paper_design(noise=1.0, steps=6)
    table["forgetting_loss"] = np.maximum(table["forgetting_loss"] - 0.7, 0.001)
    law = quiet_fit(table, num_resamples=60, num_starts=4)
    ask = {"num_params": 8 * PER_RANK, "num_steps": [5.0, 20.0, 50.0]}
    at = law.predict(**ask)
    assert min(np.min(end) for name in BOTH for end in (*at.ci[name], *at.curve_ci[name], at.value[name])) == 0
    notes = [text for text in at.to_dict()["notes"] if text.startswith("forgetting_loss: ")]
    assert len(notes) == 1
    assert notes[0].endswith("here; no run had a value below 0, so it is cut at 0")
    table["forgetting_loss"] -= 0.01  # a rise of the loss may be negative, as some are
    at = quiet_fit(table, num_resamples=60, num_starts=4).predict(**ask)
    assert np.min(at.ci["forgetting_loss"]) < 0


def test_the_published_table_of_sizes_is_fitted_as_the_page_says():
    """2605.26097: forgetting at equal learning over five model sizes; docs/laws.md has these numbers."""
    P, L_f = [5.8e6, 12.2e6, 21e6, 32e6, 46e6], [0.264, 0.045, 0.018, 0.0066, 0.0058]
    law = quiet_fit({"run": range(5), "num_params": P, "forgetting_loss": L_f}, "size")
    low, high = law.conf_int()["alpha"]
    assert f"{law.params['alpha']:.1f} [{low:.1f}, {high:.1f}]" == "1.9 [1.1, 2.8]"
    assert law.r_squared["forgetting_loss"] == pytest.approx(0.961, abs=5e-4)
    assert law.predict(num_params=[5.8e6, 46e6]).value["forgetting_loss"] == pytest.approx([0.221, 0.0043], rel=0.01)


def test_the_form_size_is_of_relative_errors():
    """The smallest model alone decided the fit, since its error in nats is the largest."""
    P = np.geomspace(5e6, 5e7, 6)
    L_f = size(P, c=0.26 * 5e6**2, alpha=2.0) * np.array([1.5, 1, 1, 1, 1, 1])
    law = quiet_fit({"run": range(6), "num_params": P, "forgetting_loss": L_f}, "size", num_resamples=50)
    assert law.params["alpha"] == pytest.approx(2.0, rel=0.1)
    assert law.predict(num_params=P).value["forgetting_loss"][1:] == pytest.approx(L_f[1:], rel=0.15)
    with pytest.raises(
        ValueError, match="forgetting_loss: 0 has no logarithm, which the form 'size' needs; drop the row"
    ):
        fit_forgetting_law({"run": range(6), "num_params": P, "forgetting_loss": [0, *L_f[1:]]}, "size")


@pytest.mark.slow
def test_a_thousand_refits_of_the_joint_law_take_under_half_a_minute():
    import time

    table = paper_design(steps=40)
    start = time.process_time()
    law = quiet_fit(table, num_resamples=1000)
    assert time.process_time() - start < 30
    assert len(law.draws) == 1000


def test_intervals_hold_their_estimates_and_grow_with_the_level(noisy_law):
    wide, narrow = noisy_law.conf_int(0.95), noisy_law.conf_int(0.5)
    for name in ("c_fft", "s_fft", "slope_steps_ft"):
        assert wide[name][0] < noisy_law.params[name] < wide[name][1]
        assert wide[name][0] < narrow[name][0] < narrow[name][1] < wide[name][1]
        low, high = noisy_law.conf_int(0.6827)[name]
        assert noisy_law.stderr[name] == pytest.approx((high - low) / 2)


def test_intervals_are_stretched_by_students_t_of_the_runs(noisy_law):
    """Six runs, five degrees of freedom; the amplitude of L_ft is the first coefficient that is fitted."""
    drawn = np.log(noisy_law.draws.coefficients[:, 0] / noisy_law.params["c_ft"])
    ratio = stats.t.ppf(0.95, 5) / stats.norm.ppf(0.95)
    expected = noisy_law.params["c_ft"] * np.exp(ratio * np.quantile(drawn, [0.05, 0.95]))
    assert noisy_law.conf_int(0.9)["c_ft"] == pytest.approx(tuple(expected), rel=2e-3)
    assert ratio > 1.2


def test_a_new_measurement_is_less_certain_than_the_curve(noisy_law):
    at = noisy_law.predict(num_params=1e8, num_steps=150)
    for name in BOTH:
        assert at.ci[name][0] < at.curve_ci[name][0] < at.value[name] < at.curve_ci[name][1] < at.ci[name][1]
    sigma = 0.2 * truth(OPENORCA, *(paper_design()[name] for name in ("num_params", "num_steps")))[1].std()
    assert at.ci["forgetting_loss"][1] - at.ci["forgetting_loss"][0] > 2 * sigma


def test_the_same_seed_gives_the_same_law_and_another_does_not():
    table = paper_design(steps=6)
    laws = [quiet_fit(table, "forgetting", num_resamples=20, seed=seed) for seed in (0, 0, 1)]
    assert laws[0].conf_int() == laws[1].conf_int()
    assert laws[0].conf_int() != laws[2].conf_int()


# Doubts


def test_one_rank_cannot_say_how_forgetting_changes_with_size():
    with pytest.warns(LawWarning) as caught:
        law = fit_forgetting_law(paper_design(ranks=(8,)), "forgetting", num_resamples=10)
    texts = [str(one.message) for one in caught]
    assert texts == law.warnings
    assert texts[0] == "num_params: 1.99885e+07 in every row; its effect on the losses is not identified"
    assert texts[1] == "run: only 1, so there are no intervals; they need at least 3 runs"
    at = law.predict(num_params=8 * PER_RANK, num_steps=200)
    assert math.isnan(at.ci["forgetting_loss"][0])
    assert at.value["forgetting_loss"] == pytest.approx(truth(OPENORCA, 8 * PER_RANK, 200)[1], rel=0.03)
    with pytest.raises(ValueError, match=r"num_params: every run has 1.99885e\+07, so nothing is known of others"):
        law.predict(num_params=1e9, num_steps=200)


FEW = {
    "joint": (paper_design(ranks=(8, 16, 32)), "runs: 3, but the form 'joint' needs 4 that differ in num_par"),
    "two ranks": (paper_design(ranks=(8, 64)), "num_params: 2 different values, but the form 'two ranks' needs 3"),
    "steps": (paper_design(steps=3), "num_steps: 3 different values, but the form 'steps' needs 4"),
    "size": ({"num_params": [1, 2]}, "runs: 2, but the form 'size' needs 3 that differ in num_params"),
    "saturation": ({"tokens_per_param": [1, 2]}, "tokens_per_param: 2 different values, but the form 'saturation' n"),
    "quadratic": ({"ref_kl": [1, 2, 3]}, "runs: 3, but the form 'quadratic' needs 4 that differ in ref_kl"),
    "linear": ({"finetuning_loss": [1, 2]}, "runs: 2, but the form 'linear' needs 3 that differ in finet"),
    "injection": (
        {"num_params": [1, 2, 3, 4], "num_tokens": [1, 2, 4, 8], "replay_share": [0, 0.1, 0, 0.1]},
        "runs: 4, but the form 'injection' needs 5 that differ in num_params and num_tokens and replay_share",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_fewer_runs_than_a_form_needs_are_refused(name):
    """Rows were counted, so that a joint law of three runs with many points each was fitted with a warning."""
    table, message = FEW[name]
    if "run" not in table:
        count = len(next(iter(table.values())))
        table = {"run": range(count), **table, "forgetting_loss": np.arange(count) ** 2 + 0.5}
    with pytest.raises(ValueError, match=".+") as caught:
        fit_forgetting_law(table, replace(FORMS.get(name, FORMS["joint"]), name=name), num_resamples=0)
    assert str(caught.value).startswith(message), caught.value


def test_seeds_of_three_ranks_are_enough_runs_and_few_are_warned_of():
    tables = [paper_design(ranks=RANKS[:3], seed=seed) for seed in (0, 1)]
    both = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    both["run"] = [f"{run}-{seed}" for seed in (0, 1) for run in tables[0]["run"]]
    assert not any(text.startswith("run: ") for text in quiet_fit(both, num_resamples=0).warnings)
    law = quiet_fit(paper_design(ranks=(8, 16, 64, 256)), "forgetting", num_resamples=10)
    assert any(text.startswith("run: only 4; intervals from fewer than 6") for text in law.warnings)
    assert not any("num_params" in text for text in law.warnings)


def test_parameters_that_noisy_runs_leave_open_are_named_and_the_line_is_not(noisy_law):
    loose = noisy_law.unidentified()
    assert {"rho", "a_ft", "a_f"} <= set(loose)
    assert {"c_fft", "s_fft"}.isdisjoint(loose)
    assert any(text.startswith("parameters: ") and "a_ft" in text for text in noisy_law.warnings)
    exact = quiet_fit(paper_design(noise=0.0005), "finetuning", num_resamples=40)
    assert "rho" not in exact.unidentified()


def test_extrapolation_is_reported(noisy_law):
    inside = noisy_law.predict(num_params=1e8, num_steps=100)
    assert inside.extrapolates == []
    outside = noisy_law.predict(num_params=1e8, num_steps=400)
    assert outside.extrapolates == ["num_steps 400 is outside the runs' 50 to 260"]
    width = [at.curve_ci["forgetting_loss"][1] - at.curve_ci["forgetting_loss"][0] for at in
             (inside, noisy_law.predict(num_params=1e8, num_steps=4000))]  # fmt: skip
    assert width[1] > width[0]


# One's own form, several data sets


def test_a_form_of_ones_own():
    mine = Form(
        name="mine", equation="L_f = c·log(N)^k + s", inputs=("num_steps",), outputs=("forgetting_loss",),
        exponents={"k": (0.1, 4.0)}, coefficients=("c", "s"),
        terms=lambda x, values: [[np.log(x["num_steps"]) ** values["k"], 1.0]],
    )  # fmt: skip
    N = np.tile(np.arange(10.0, 200, 10), 3)
    offsets = 0.001 * np.repeat([-1, 0.2, 0.8], 19) * np.cos(N / 30)
    table = {"run": np.repeat(["a", "b", "c"], 19), "num_steps": N, "forgetting_loss": 0.3 * np.log(N) ** 1.5 + 1}
    table["forgetting_loss"] += offsets
    law = quiet_fit(table, mine, num_resamples=30)
    assert law.params == pytest.approx({"k": 1.5, "c": 0.3, "s": 1.0}, rel=0.05)


def test_shared_exponents_over_data_sets():
    """α, β, ρ are the same for both, the rest is each one's own."""
    tables = []
    for name, c, s, share in (("one", 0.2, 0.6, 0.4), ("two", 0.5, 1.9, 0.7)):
        table = paper_design(noise=0, steps=10)
        P, N = (table[key] / np.exp(np.log(table[key]).mean()) for key in ("num_params", "num_steps"))
        bracket = share * P**-0.05 + (1 - share) * N**-0.15
        tables.append({**table, "finetuning_loss": c * bracket**6.0 + s, "dataset": [name] * len(P)})
    both = {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}
    with pytest.raises(ValueError, match="dataset: 2 data sets; fit each alone, or set shared_exponents"):
        fit_forgetting_law(both, "finetuning")
    law = quiet_fit(both, "finetuning", shared_exponents=True, num_resamples=20)
    assert [law.params[name] for name in ("alpha", "beta", "rho")] == pytest.approx([0.05, 0.15, 6.0], rel=0.02)
    assert [law.params[f"c[{name}]"] for name in ("one", "two")] == pytest.approx([0.2, 0.5], rel=0.01)
    for table, name in zip(tables, ("one", "two"), strict=True):
        at = law.predict(num_params=table["num_params"], num_steps=table["num_steps"], dataset=name)
        assert at.value["finetuning_loss"] == pytest.approx(table["finetuning_loss"], abs=1e-5)
    assert len(law.runs.names) == 12
    with pytest.raises(ValueError, match="dataset: None was not fitted; use one of 'one', 'two'"):
        law.predict(num_params=1e8, num_steps=100)
    assert "2 data sets" in law.summary()


# Solving


def test_solve_is_the_inverse_of_predict(noisy_law):
    for steps in (60.0, 120.0, 400.0):
        at = noisy_law.predict(num_params=1e8, num_steps=steps)
        for name in BOTH:
            found = noisy_law.solve("num_steps", num_params=1e8, **{name: at.value[name]})
            assert found.value == pytest.approx(steps, rel=1e-4)
            assert found.ci[0] < steps < found.ci[1]
        assert bool(found.extrapolates) == (steps > 260)
    target = noisy_law.predict(num_params=1e8, num_steps=100).value["forgetting_loss"]
    found = noisy_law.solve("num_params", num_steps=100, forgetting_loss=target)
    assert found.value == pytest.approx(1e8, rel=1e-4)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"num_params": 1e8, "forgetting_loss": 9.0}, "forgetting_loss: 9 is not reached; the law has"),
        ({"num_params": 1e8}, "solve: give one of finetuning_loss, forgetting_loss"),
        ({"num_steps": 5, "num_params": 1e8, "forgetting_loss": 0.8}, "solve: give one of"),
        ({"forgetting_loss": 0.8}, "predict: the form 'joint' takes num_params, num_steps; got num_steps"),
    ],
)
def test_solve_refuses_what_is_no_question(noisy_law, question, message):
    name = "num_steps"
    with pytest.raises((ValueError, TypeError), match=message):
        noisy_law.solve(name, **question) if name not in question else noisy_law.solve("num_params", **question)


def test_crossings_of_curves():
    grid = np.array([1.0, 10.0, 100.0])
    curves = np.array([[0, 1, 2], [2, 1, 0], [2, 3, 4], [0, 0.1, 0.2]], dtype=float)
    assert first_crossings(grid, curves, 1.5).tolist() == pytest.approx([10**1.5, 10**0.5, 0.0, math.inf])


# Files


def test_a_law_comes_back_from_its_file_exactly(noisy_law, tmp_path):
    noisy_law.to_json(tmp_path / "law.json")
    again = ForgettingLaw.from_json(tmp_path / "law.json")
    assert again.params == noisy_law.params
    assert again.conf_int() == noisy_law.conf_int()
    assert again.summary() == noisy_law.summary()
    ask = {"num_params": 2e8, "num_steps": 300}
    assert again.predict(**ask) == noisy_law.predict(**ask)
    again.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "law.json").read_bytes()
    assert json.loads((tmp_path / "law.json").read_text())["settings"]["versions"]["numpy"]


def test_a_form_of_ones_own_comes_back_with_the_form(tmp_path):
    mine = replace(FORMS["quadratic"], name="mine")
    table = {"run": range(9), "ref_kl": np.arange(9) / 9, "forgetting_loss": (np.arange(9) / 9) ** 2 + 0.1}
    law = quiet_fit(table, mine, num_resamples=5)
    law.to_json(tmp_path / "law.json")
    with pytest.raises(ValueError, match="form: 'mine' is not known"):
        ForgettingLaw.from_json(tmp_path / "law.json")
    assert ForgettingLaw.from_json(tmp_path / "law.json", form=mine).params == law.params


DAMAGES = {
    "not a law": lambda data: {"schema": "retain.report/1"},
    "a list": lambda data: [1, 2],
    "no draws": lambda data: {name: value for name, value in data.items() if name != "draws"},
    "draws of another shape": lambda data: data | {"draws": {**data["draws"], "exponents": [[1.0]]}},
    "ragged": lambda data: data | {"spread": [[1.0], [1.0, 2.0]]},
    "text for numbers": lambda data: data | {"estimate": {**data["estimate"], "coefficients": "x"}},
    "rows gone": lambda data: data | {"runs": {name: column[:-1] for name, column in data["runs"].items()}},
    "bounds in the wrong order": lambda data: data | {"bounds": {"rho": [3, 1]}},
    "an unknown form": lambda data: data | {"form": "best"},
    "negative steps": lambda data: data | {"runs": {**data["runs"], "num_steps": [-1.0] * 132}},
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_law_is_refused_in_one_line(noisy_law, tmp_path, kind):
    noisy_law.to_json(tmp_path / "law.json")
    data = json.loads((tmp_path / "law.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps(DAMAGES[kind](data)))
    with pytest.raises(ValueError, match=".+") as caught:
        ForgettingLaw.from_json(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "nothing"])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(ValueError, match="law: cannot read .*; give a file that `retain fit` wrote"):
        ForgettingLaw.from_json(tmp_path / "law.json")


# Questions that have no answer


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"num_params": 1e8}, "predict: the form 'joint' takes num_params, num_steps; got num_params"),
        ({"num_params": -1, "num_steps": 5}, "num_params: -1 is out of range; use a finite number above 0"),
        ({"num_params": 1e8, "num_steps": 0}, "num_steps: 0 is out of range"),
        ({"num_params": 1e8, "num_steps": math.nan}, "num_steps: nan is out of range"),
        ({"num_params": 1e8, "num_steps": "many"}, "predict: could not convert string to float"),
        ({"num_params": 1e8, "num_steps": 5, "level": 1.0}, "level: 1.0 is out of range"),
        ({"num_params": [1e8, 2e8], "num_steps": [1, 2, 3]}, "predict: shape mismatch"),
    ],
)
def test_predict_refuses_what_cannot_be(noisy_law, inputs, message):
    with pytest.raises(ValueError, match=message):
        noisy_law.predict(**inputs)


def test_unknown_forms_and_bounds_are_refused():
    with pytest.raises(ValueError, match="form: 'jont' is not known; use one of linear, joint"):
        fit_forgetting_law(paper_design(), "jont")
    with pytest.raises(ValueError, match="bounds: 'alpha' is not an exponent of the form 'joint'"):
        form_of("joint", {"alpha": (0, 1)})


def test_arrays_of_points_keep_their_shape(noisy_law):
    P, N = np.meshgrid([2e7, 1e8, 4e8], [50.0, 200.0])
    at = noisy_law.predict(num_params=P, num_steps=N)
    assert at.value["forgetting_loss"].shape == at.ci["forgetting_loss"][0].shape == (2, 3)
    one = noisy_law.predict(num_params=P[1, 2], num_steps=N[1, 2])
    assert one.value["forgetting_loss"] == at.value["forgetting_loss"][1, 2]
    assert one.ci["forgetting_loss"] == (at.ci["forgetting_loss"][0][1, 2], at.ci["forgetting_loss"][1][1, 2])


# Figures


def test_figures_show_every_size_and_stand_apart(noisy_law):
    figure = noisy_law.plot()
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["New-task loss", "Forgetting", "Forgetting over learning (dashed: the line)",
                      "Residuals of forgetting"]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["20M", "40M", "80M", "160M", "320M", "640M"]
    residual = figure.axes[3].lines[0].get_ydata()
    assert np.abs(residual).max() < 0.05
    assert figure.axes[2].xaxis_inverted()


def test_forms_of_one_output_have_figures_too():
    table = {"run": range(9), "ref_kl": np.arange(9) / 9, "forgetting_loss": (np.arange(9) / 9) ** 2 + 0.1}
    law = quiet_fit(table, "quadratic", num_resamples=5)
    assert [axes.get_title("left") for axes in law.plot().axes] == ["Forgetting", "Residuals of forgetting"]
