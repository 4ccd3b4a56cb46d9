"""The budget's controller on simulated plants: KL follows pull · coef^-power with a lag, and is measured with noise.

Every number of steps and every share below is what was reached, with some room; none of it is a theorem.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retain.training.coef_controller import BOUNDS, CoefController

BUDGET = 0.02


@dataclass(frozen=True)
class Plant:
    """A finetune as its replay KL sees it.

    At rest KL is BUDGET · (balance / coef)^power, so `balance` is the coefficient that holds the budget. Either KL
    itself (`linear`) or the distance of the weights, its root, follows with `lag` steps at the full learning rate;
    `momentum` puts a second lag of a third before it. `decay` is linear, and lowers both speed and pull.
    """

    balance: float = 1.0
    power: float = 1.3
    lag: float = 10.0
    kind: Literal["linear", "weights", "momentum"] = "weights"
    warmup: float = 0.0
    decay: bool = False
    noise: float = 0.0
    skew: Literal["gamma", "lognormal"] = "gamma"

    def rate(self, step: int, num_steps: int) -> float:
        warm = math.ceil(self.warmup * num_steps)
        if step < warm:
            return (step + 1) / warm
        return 1 - 0.9 * (step - warm) / (num_steps - warm) if self.decay else 1.0

    def measure(self, kl: float, rng: random.Random) -> float:
        if not self.noise:
            return kl
        if self.skew == "gamma":
            return kl * rng.gammavariate(1 / self.noise**2, self.noise**2)
        spread = math.sqrt(math.log(1 + self.noise**2))
        return kl * rng.lognormvariate(-(spread**2) / 2, spread)


@dataclass
class Run:
    control: CoefController
    kls: list[float]  # true, without the noise of measuring
    coefs: list[float]

    @property
    def end(self) -> float:
        """Mean KL of the last fifth, in budgets."""
        return statistics.fmean(self.kls[-math.ceil(len(self.kls) / 5) :]) / self.control.budget

    @property
    def peak(self) -> float:
        return max(self.kls) / self.control.budget

    def settled(self) -> int:
        """The step from which on KL stays within 20% of the budget."""
        outside = [step for step, kl in enumerate(self.kls) if not 0.8 <= kl / self.control.budget <= 1.2]
        return outside[-1] + 1 if outside else 0

    def swing(self) -> float:
        """Largest over smallest coefficient of the last quarter."""
        last = self.coefs[-len(self.coefs) // 4 :]
        return max(last) / min(last)


def simulate(plant: Plant, num_steps: int, *, seed: int = 0, budget: float = BUDGET, **settings: float) -> Run:
    rng = random.Random(seed)
    run = Run(CoefController(budget, num_steps=num_steps, **settings), [], [])
    weights = drive = 0.0  # roots of KL
    for step in range(num_steps):
        kl, coef, rate = weights**2, run.control.coef, plant.rate(step, num_steps)
        run.kls.append(kl)
        run.coefs.append(coef)
        run.control.update(plant.measure(kl, rng))
        pull = 0.5 + 0.5 * rate if plant.decay else 1.0
        rest = BUDGET * pull * (plant.balance / coef) ** plant.power
        speed = 1 - math.exp(-rate / plant.lag)
        if plant.kind == "linear":
            weights = math.sqrt(kl + speed * (rest - kl))
            continue
        drive += (math.sqrt(rest) - drive) * (min(1.0, 3 * speed) if plant.kind == "momentum" else 1.0)
        weights += speed * (drive - weights)
    return run


noises = st.sampled_from([0.0, 0.3, 0.5, 0.6])
decades = st.floats(-1.5, 1.5).map(lambda exponent: 10**exponent)
plants = st.builds(
    Plant,
    balance=decades,
    power=st.floats(0.7, 2),
    lag=st.floats(math.log(2), math.log(40)).map(math.exp),
    kind=st.sampled_from(["linear", "weights", "momentum"]),
    warmup=st.sampled_from([0.0, 0.03, 0.1]),
    decay=st.booleans(),
)


def grid(**settings) -> list[Plant]:
    return [
        Plant(balance=balance, power=power, lag=lag, kind=kind, **settings)
        for balance in (0.03, 1.0, 30.0)
        for power in (0.7, 2.0)
        for lag in (2.0, 10.0, 40.0)
        for kind in ("linear", "weights", "momentum")
    ]


# Without noise: where it ends, when it is there, how far it shoots over


@settings(max_examples=40, deadline=None)
@given(plant=plants)
def test_1000_steps_end_at_the_budget(plant):
    """The balance may lie a factor of 30 above or below the first coefficient."""
    run = simulate(plant, 1000)
    assert 0.9 <= run.end <= 1.15
    assert run.settled() <= 750


@settings(max_examples=30, deadline=None)
@given(plant=plants)
def test_300_steps_end_at_the_budget_where_lags_are_short(plant):
    plant = replace(plant, lag=min(plant.lag, 15), decay=False)
    assert 0.9 <= simulate(plant, 300).end <= 1.1


@pytest.mark.parametrize("plant", [Plant(lag=lag, power=power) for lag in (3, 10) for power in (1, 2)], ids=repr)
def test_step_response_from_the_balance_itself(plant):
    """Begun at the right coefficient, KL rises to the budget and is settled within 90 steps."""
    run = simulate(plant, 300)
    assert run.settled() <= 90
    assert run.peak <= 1.05


@pytest.mark.parametrize("num_steps", [1000, 4000])
def test_a_warmup_of_low_kl_does_not_spend_the_coefficient(num_steps):
    """Pulls that rise 30-fold above the first coefficient's balance, behind a warmup, overshoot by half at most."""
    plants = [plant for plant in grid(warmup=0.1) if plant.lag > 2 and plant.kind == "weights"]
    assert max(simulate(plant, num_steps).peak for plant in plants) <= 1.5


@pytest.mark.parametrize("balance", [0.03, 1.0, 30.0])
def test_the_coefficient_ends_at_the_balance(balance):
    assert simulate(Plant(balance=balance, power=1.5), 1000).control.coef == pytest.approx(balance, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(plant=plants, ratio=st.floats(1.01, 10), num_steps=st.sampled_from([300, 600]))
def test_a_stricter_budget_never_ends_with_a_smaller_coefficient(plant, ratio, num_steps):
    """Runs of fewer than 20 times the plant's lag may end in mid-swing, and do not promise this."""
    assume(num_steps >= 20 * plant.lag)
    loose, strict = (simulate(plant, num_steps, budget=budget).control for budget in (BUDGET, BUDGET / ratio))
    assert strict.coef >= loose.coef * (1 - 1e-9)


# With noise: the mean KL is what is held, and the coefficient is calm


@pytest.mark.parametrize("skew", ["gamma", "lognormal"])
@pytest.mark.parametrize(("num_steps", "single"), [(300, 0.25), (1000, 0.15)])
def test_noise_of_60_percent_does_not_move_the_mean(skew, num_steps, single):
    """Averaging log KL instead would end 17 to 21% above the budget."""
    plants = [
        Plant(balance=balance, power=power, lag=lag, noise=0.6, skew=skew)
        for balance in (0.3, 1.0, 10.0)
        for power in (0.7, 1.3, 2.0)
        for lag in (3.0, 20.0)
    ]
    ends = [simulate(plant, num_steps, seed=seed).end for seed, plant in enumerate(plants)]
    assert statistics.fmean(ends) == pytest.approx(1, abs=0.05)
    assert max(abs(end - 1) for end in ends) <= single


@pytest.mark.parametrize("num_steps", [1000, 4000])
def test_noise_of_50_percent_swings_the_coefficient_by_less_than_a_factor_of_2(num_steps):
    plants = [Plant(power=power, lag=lag, noise=0.5) for power in (0.7, 1.3, 2.0) for lag in (2.0, 10.0, 40.0)]
    swings = [simulate(plant, num_steps, seed=seed).swing() for seed, plant in enumerate(plants)]
    assert max(swings) < 2
    assert min(swings) > 1.05  # it does follow


def test_a_single_wild_measurement_moves_the_coefficient_little_and_not_for_long():
    run = simulate(Plant(), 1000)
    control, before = run.control, run.control.coef
    assert 1 < control.update(10 * BUDGET) / before < 1.5
    for _ in range(100):
        control.update(BUDGET)
    assert control.coef / before == pytest.approx(1, abs=0.2)


# Bounds


@settings(max_examples=100, deadline=None)
@given(
    kls=st.lists(st.one_of(st.floats(-1e-6, 1e-6), st.floats(0, 10), st.floats(0, 1e308)), max_size=60),
    budget=st.floats(1e-9, 1e6),
    num_steps=st.integers(1, 100),
)
def test_bounds_are_never_left(kls, budget, num_steps):
    control = CoefController(budget, num_steps=num_steps, coef=1.0)
    for kl in kls:
        assert BOUNDS[0] <= control.update(kl) <= BOUNDS[1]
        assert control.smoothed is not None
        assert math.isfinite(control.smoothed)
    json.dumps(control.state_dict(), allow_nan=False)


@pytest.mark.parametrize(("at", "then"), [("high", 0.3), ("low", 3.0)])
def test_nothing_winds_up_at_a_bound(at, then):
    """After 2,000 steps at a bound the coefficient leaves it as soon as KL crosses the budget."""
    control = CoefController(BUDGET, num_steps=4000)
    for _ in range(2000):
        control.update(5 * BUDGET if at == "high" else 0.2 * BUDGET)
    assert control.coef == BOUNDS[at == "high"]
    for _ in range(40):
        control.update(then * BUDGET)
    assert control.at_bound is None


@settings(max_examples=20, deadline=None)
@given(plant=plants, noise=noises)
def test_a_budget_too_strict_for_the_model_is_called_so(plant, noise):
    plant = replace(plant, balance=1e4, noise=noise, decay=False)
    control = simulate(plant, 400).control
    verdict = control.verdict()
    assert (control.at_bound, verdict.kept, verdict.at_bound) == ("high", False, "high")
    assert "no room for both" in verdict.text
    assert "raise the budget" in str(verdict)


@settings(max_examples=20, deadline=None)
@given(plant=plants, noise=noises)
def test_a_budget_that_plain_finetuning_keeps_needs_no_replay(plant, noise):
    """800 steps: the coefficient falls by at most 10 e-folds over a run, and the bound is 7 below the start."""
    plant = replace(plant, balance=1e-4, noise=noise)
    control = simulate(plant, 800).control
    verdict = control.verdict()
    assert (control.at_bound, verdict.kept, verdict.certain) == ("low", True, True)
    assert "hardly any replay was needed" in verdict.text


# Short runs: said honestly


@pytest.mark.parametrize(
    ("num_steps", "from_balance", "least_within", "most_beyond"),
    [
        (24, False, 0.05, 0.2),
        (24, True, 0.0, 0.0),
        (50, False, 0.4, 0.2),
        (50, True, 0.6, 0.3),
        (100, False, 0.7, 0.25),
        (200, False, 0.85, 0.1),
        (400, False, 1.0, 0.0),
    ],
)
def test_what_short_runs_reach(num_steps, from_balance, least_within, most_beyond):
    """Shares of runs that end within 20% of the budget, and beyond; noise of 50%, lags of 2 to 40 steps.

    24 steps are too few to find a coefficient: they brake, and most end below the budget. Begun at the right
    coefficient, none ends beyond it.
    """
    ends = []
    for seed, plant in enumerate(grid(warmup=0.1, noise=0.5)):
        coef = plant.balance if from_balance else 1.0
        ends.append(simulate(plant, num_steps, seed=seed, coef=coef).end)
    assert sum(0.8 <= end <= 1.2 for end in ends) >= least_within * len(ends)
    assert sum(end > 1.2 for end in ends) <= most_beyond * len(ends)


# Resuming


@settings(max_examples=30, deadline=None)
@given(plant=plants, noise=noises, num_steps=st.integers(2, 300), share=st.floats(0, 1), data=st.data())
def test_resuming_gives_exactly_the_same_future(plant, noise, num_steps, share, data):
    kls = [max(0.0, kl) for kl in simulate(replace(plant, noise=noise), num_steps).kls]
    whole = CoefController(BUDGET, num_steps=num_steps)
    cut = int(share * num_steps)
    for kl in kls[:cut]:
        whole.update(kl)
    state = json.loads(json.dumps(whole.state_dict(), allow_nan=False))
    resumed = CoefController(BUDGET, num_steps=num_steps, coef=7.0)
    resumed.load_state_dict(state)
    for kl in kls[cut:]:
        assert resumed.update(kl) == whole.update(kl)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.verdict() == whole.verdict()


def test_a_state_is_a_copy():
    control = simulate(Plant(), 40).control
    state = control.state_dict()
    kept = json.dumps(state)
    other = CoefController(BUDGET, num_steps=40)
    other.load_state_dict(state)
    control.update(1.0)
    other.update(1.0)
    assert json.dumps(state) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.05}, "the checkpoint's budget is 0.05, not 0.02"),
        ({"version": 0}, "the checkpoint's version is 0, not 1"),
    ],
)
def test_a_state_of_another_budget_is_refused(change, message):
    state = simulate(Plant(), 40).control.state_dict() | change
    with pytest.raises(ValueError, match=message):
        CoefController(BUDGET, num_steps=40).load_state_dict(state)
    with pytest.raises(ValueError, match="version is None"):
        CoefController(BUDGET, num_steps=40).load_state_dict({})


# What enters


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf, -1e-3])
def test_a_kl_that_is_none_is_refused_and_changes_nothing(kl):
    control = simulate(Plant(), 40).control
    before = control.state_dict()
    with pytest.raises(ValueError, match=r"^replay/kl: .* does not fit"):
        control.update(kl)
    assert control.state_dict() == before


def test_a_kl_below_0_by_rounding_counts_as_0():
    rounded, exact = (CoefController(BUDGET, num_steps=40) for _ in range(2))
    assert [rounded.update(kl) for kl in (-1e-6, -1e-9, 0.1)] == [exact.update(kl) for kl in (0.0, 0.0, 0.1)]
    assert rounded.state_dict() == exact.state_dict()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"budget": 0.0}, "max_ref_kl"),
        ({"budget": "0.02"}, "max_ref_kl"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10.5}, "num_steps"),
        ({"coef": 2e3}, "replay_coef"),
    ],
)
def test_arguments_that_do_not_fit_are_named_in_one_line(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}: .*; use [^\n]*$"):
        CoefController(**{"budget": 0.02, "num_steps": 100} | arguments)


# The verdict


def fed(kls: list[float], num_steps: int | None = None) -> CoefController:
    control = CoefController(BUDGET, num_steps=num_steps or len(kls))
    for kl in kls:
        control.update(kl)
    return control


def test_the_verdict_is_the_mean_of_the_last_fifth():
    values = [0.03, 0.01, 0.02, 0.05, 0.04]
    verdict = fed([9.0] * 20 + values).verdict()
    assert verdict.num_steps == 5
    assert verdict.ref_kl == pytest.approx(0.03)
    assert verdict.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert not verdict.kept
    assert not verdict.certain


@pytest.mark.parametrize("num_steps", [51, 100, 333, 5000])
def test_long_runs_are_kept_in_batches_of_equal_length(num_steps):
    """The last fifth by hand; only the last batch may be shorter."""
    rng = random.Random(num_steps)
    kls = [rng.gammavariate(4, BUDGET / 4) for _ in range(num_steps)]
    control = fed(kls)
    sums = control.state_dict()["sums"]
    verdict = control.verdict()
    assert 25 <= len(sums) <= 50
    assert sum(sums) == pytest.approx(sum(kls))
    assert verdict.ref_kl == pytest.approx(statistics.fmean(kls[-verdict.num_steps :]))
    assert 0.17 * num_steps <= verdict.num_steps <= 0.25 * num_steps
    assert verdict.standard_error == pytest.approx(0.5 * BUDGET / math.sqrt(verdict.num_steps), rel=0.6)


def test_the_standard_error_counts_autocorrelation():
    """AR(1) around the budget, correlation 0.9: the truth lies within two errors about as often as it should.

    An error that took steps as independent would be 4 times too small, and cover in 4 of 10 runs.
    """
    hits, trials = 0, 100
    for seed in range(trials):
        rng, level, kls = random.Random(seed), 0.0, []
        for _ in range(1200):
            level = 0.9 * level + rng.gauss(0, 0.1)
            kls.append(BUDGET * max(0.0, 1 + level))
        verdict = fed(kls).verdict()
        assert verdict.standard_error is not None
        hits += abs(verdict.ref_kl - BUDGET) <= 2 * verdict.standard_error
    assert 80 <= hits <= 99


@pytest.mark.parametrize(
    ("kls", "kept", "words"),
    [
        ([BUDGET] * 100, True, "0.02 nats per token kept: ref_kl 0.02 ± "),
        ([0.5 * BUDGET] * 30, True, "with room left"),
        ([1.15 * BUDGET] * 30, True, "the coefficient ended at"),
        ([*[0.0] * 80, *[1.5 * BUDGET] * 20], False, "train longer, begin with a larger replay_coef, or use more"),
        ([1.5 * BUDGET] * 50, False, "use more replay rows per step or a lower learning rate"),
        ([0.0] * 3, True, "kept as far as this many steps can tell: ref_kl 0 over the last 1 steps"),
    ],
)
def test_the_verdict_says_what_it_saw(kls, kept, words):
    verdict = fed(kls).verdict()
    assert verdict.kept is kept
    assert words in verdict.text
    assert "the run ended" not in verdict.text
    assert verdict.coef == fed(kls).coef


def test_a_verdict_before_the_end_says_so():
    assert fed([BUDGET] * 30, num_steps=100).verdict().text.endswith("the run ended at step 30 of 100")
