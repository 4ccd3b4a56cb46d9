"""The controller that moves the replay coefficient during training, to keep KL within a budget.

Dual ascent on the coefficient's logarithm. After every step, with s the smoothed ref_kl and e = log(s / budget),

    log coef += KL_GAIN · (max(e, FAR) − max(e, FAR) of the step before) + max(RATE / horizon · e, −fall)

A PI controller, chosen by simulation (2,400 plants with lags of 2–40 steps, warmup, decay and noise up to 60%). Its
first term compensates for the lag of model and smoothing: it raises the coefficient while KL is still rising towards
the budget. Without it, tuned as well, 63% of runs of 100 steps missed the budget by 20% (with it 34%, most of these
below it), and runs of 1000 peaked at 3.6 times the budget (with it 1.3 times; 90th percentile). The fall is limited
because during warmup KL is low at every coefficient. KL itself is averaged: under noise of 60% the mean of its
logarithm lies 14–17% lower. The horizon grows with the steps taken; a long one from the start would leave a short run
no time. The coefficient itself is clipped, so there is no windup at a bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retain.checks import check_number

# Predictions with fewer tokens before them are a row's opening (at most half of a short row). All rows share it and
# new text opens differently, so the model learns to recognise replay by it: on SmolLM2-135M KL was 0.39 nats in the
# first five predictions of 48 and 0.007 after them, which with few rows per step is noise that no coefficient reduces.
OPENING_LENGTH = 5
BOUNDS = (1e-3, 1e3)  # the smallest and the largest coefficient
KL_GAIN = 0.7  # e-folds of the coefficient, at once, per e-fold of KL; above 1, a second lag makes it ring
RATE = 0.35  # e-folds of the coefficient per horizon and e-fold of KL away from the budget
FAR = -4.0  # log(KL / budget) above which a rise of KL raises the coefficient: 2% of the budget
FALL_PER_RUN = 10.0  # e-folds by which the second term may lower the coefficient over a run ...
FALL = (0.005, 0.1)  # ... within these limits per step
HORIZON_SHARE = 1 / 20  # share of the steps taken over which KL is smoothed ...
HORIZON = (2.0, 20.0)  # ... within these limits; at 20, noise of 50% moves the coefficient by less than a factor of 2
BUDGET_TOLERANCE = 0.2  # a mean KL up to 20% above the budget still keeps it
NEAR = 1.25  # a coefficient within this factor of a bound counts as at it, since noise lifts it off
MAX_ROUNDING = 1e-6  # nats per token by which a KL may fall below 0
END = 0.2  # share of the steps taken that counts as the end of the run
MAX_BATCHES = 50  # batches of equal length that sum the run's KL; at this number they are merged in pairs
VERSION = 1
STATE = ("coef", "smoothed", "step", "error", "batch_size", "sums")  # all that future updates depend on
Bound = Literal["low", "high"]


@dataclass(frozen=True)
class Verdict:
    """Whether the end of a run kept its budget; nats per token.

    Attributes:
        kept: whether `ref_kl` is at most 20% above the budget.
        certain: whether `ref_kl` is at least two standard errors away from that limit.
        ref_kl: mean over the last `num_steps` steps, a fifth of the run, on replay rows (which are trained on) after
            their openings.
        standard_error: of that mean, from batch means, which accounts for autocorrelation; None up to 5 steps.
        coef, at_bound: the coefficient at the end, and the bound it reached.
        text: all this in one sentence, with the remedy.
    """

    kept: bool
    certain: bool
    ref_kl: float
    standard_error: float | None
    num_steps: int
    coef: float
    at_bound: Bound | None
    text: str

    def __str__(self) -> str:
        return self.text


class CoefController:
    """Moves the coefficient so that the mean KL(base ‖ model) on replay rows ends at the budget or below it.

    It controls the KL after the first `OPENING_LENGTH` predictions of each row: with short or few rows the openings
    dominate the mean, and no coefficient reduces them.

    Args:
        budget: nats per token.
        num_steps: number of updates to come: in a shorter run the coefficient may fall faster, and the verdict says
            whether the run ended early.
        coef: the first coefficient; the last one of a similar run that kept its budget is a good choice.

    >>> budget = CoefController(0.02, num_steps=100)
    >>> budget.update(0.04) > 1.0  # too much KL raises the coefficient of the next step
    True
    """

    def __init__(self, budget: float, *, num_steps: int, coef: float = 1.0) -> None:
        check_number("max_ref_kl", budget, low=1e-9)
        check_number("num_steps", num_steps, low=1, integer=True)
        check_number("replay_coef", coef, low=BOUNDS[0], high=BOUNDS[1])
        self.budget, self.num_steps = float(budget), num_steps
        self.coef = float(coef)
        self._fall = min(max(FALL_PER_RUN / num_steps, FALL[0]), FALL[1])
        self.smoothed: float | None = None
        self.step = 0
        self.error = FAR
        self.batch_size = 1  # steps
        self.sums: list[float] = []  # KL summed over each batch

    @property
    def at_bound(self) -> Bound | None:
        """The bound that the coefficient has reached, if any."""
        low, high = BOUNDS
        return "low" if self.coef <= low * NEAR else "high" if self.coef >= high / NEAR else None

    def update(self, kl: float) -> float:
        """The coefficient of the next step, given the KL measured in this one, in nats per token."""
        check_number("replay/kl", kl, low=-MAX_ROUNDING)
        kl = max(kl, 0.0)
        self.step += 1
        self._add_to_batch(kl)
        horizon = min(max(self.step * HORIZON_SHARE, HORIZON[0]), HORIZON[1])
        previous = kl if self.smoothed is None else self.smoothed
        self.smoothed = previous + (kl - previous) / horizon
        excess = math.log(self.smoothed) - math.log(self.budget) if self.smoothed > 0 else FAR
        error = max(excess, FAR)
        move = KL_GAIN * (error - self.error) + max(RATE / horizon * error, -self._fall)
        self.error = error
        self.coef = min(max(self.coef * math.exp(move), BOUNDS[0]), BOUNDS[1])
        return self.coef

    def _add_to_batch(self, kl: float) -> None:
        """Add to the sum of the last batch; merge batches in pairs when there are too many."""
        if self.step > self.batch_size * len(self.sums):
            if len(self.sums) == MAX_BATCHES:
                self.sums = [sum(self.sums[i : i + 2]) for i in range(0, MAX_BATCHES, 2)]
                self.batch_size *= 2
            self.sums.append(0.0)
        self.sums[-1] += kl

    @property
    def _sizes(self) -> list[int]:
        """Steps in each batch; only the last may have fewer."""
        num_full = len(self.sums) - 1
        return [*[self.batch_size] * num_full, self.step - self.batch_size * num_full]

    def verdict(self) -> Verdict:
        """Whether the last fifth of the steps so far kept the budget."""
        mean, error, num_steps = self._end_statistics()
        limit = self.budget * (1 + BUDGET_TOLERANCE)
        kept, certain = mean <= limit, error is not None and abs(mean - limit) >= 2 * error
        measured = f"ref_kl {mean:.3g}" + (f" ± {error:.2g}" if error is not None else "")
        text = (
            f"budget {self.budget:g} nats per token {'kept' if kept else 'not kept'}"
            f"{'' if certain else ' as far as this many steps can tell'}: {measured} over the last {num_steps} steps, "
            f"behind the first {OPENING_LENGTH} tokens of replay rows; {self._explanation(kept, mean)}"
        )
        if self.step < self.num_steps:
            text += f"; the run ended at step {self.step} of {self.num_steps}"
        return Verdict(kept, certain, mean, error, num_steps, self.coef, self.at_bound, text)

    def _end_statistics(self) -> tuple[float, float | None, int]:
        """Mean KL at the end of the run, its standard error, and the number of steps."""
        assert self.step, "nothing was measured"
        num_batches = math.ceil(END * len(self.sums))
        sums, sizes = self.sums[-num_batches:], self._sizes[-num_batches:]
        num_steps = sum(sizes)
        mean = sum(sums) / num_steps
        if num_batches == 1:
            return mean, None, num_steps
        spread = sum((total - mean * size) ** 2 for total, size in zip(sums, sizes, strict=True))
        return mean, math.sqrt(spread * num_batches / (num_batches - 1)) / num_steps, num_steps

    def _explanation(self, kept: bool, mean: float) -> str:
        """Where the coefficient ended, what that means and what to do."""
        coef = f"the coefficient ended at {self.coef:.3g}"
        if kept and self.at_bound == "low":
            return f"{coef}, its lower bound: hardly any replay was needed"
        if kept:
            return coef + (", with room left" if mean < self.budget * (1 - BUDGET_TOLERANCE) else "")
        if self.at_bound == "high":
            return (
                f"{coef}, its upper bound: this model has no room for both; raise the budget, lower the learning rate, "
                "or use a larger model, a higher rank or more replay rows per step"
            )
        return (
            f"{coef}, too late or without effect: train longer, begin with a larger replay_coef, or use more replay "
            "rows per step or a lower learning rate"
        )

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON types."""
        state = {name: getattr(self, name) for name in STATE}
        return copy.deepcopy({"version": VERSION, "budget": self.budget, **state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state; raise a `ValueError` if it has another version or budget."""
        for name, value in (("version", VERSION), ("budget", self.budget)):
            if state.get(name) != value:
                raise ValueError(
                    f"max_ref_kl: the checkpoint's {name} is {state.get(name)}, not {value}; "
                    "resume it with the settings it was trained with, or start a new run"
                )
        for name in STATE:
            setattr(self, name, copy.copy(state[name]))
