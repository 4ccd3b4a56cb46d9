"""Hold forgetting under a budget: the controller that moves the replay coefficient during training.

Dual ascent on the coefficient's logarithm. After every step, with s the smoothed ref_kl and e = log(s / budget),

    log coef += KL_GAIN · (max(e, FAR) − max(e, FAR) of the step before) + max(RATE / horizon · e, −fall)

A PI controller, chosen by simulation (2,400 plants with lags of 2–40 steps, warmup, decay and noise up to 60%). Its
first term answers the lag of model and smoothing, and raises the coefficient while KL still rises towards the budget.
Without it, tuned as well, 63% of runs of 100 steps missed the budget by 20% (with it 34%, most of these below it), and
runs of 1000 peaked at 3.6 times the budget (with it 1.3 times; 90th percentile). The fall is limited, because in a
warmup KL is low for every coefficient. KL is averaged as it is: the mean of its logarithm lies 14–17% below under
noise of 60%. The horizon grows with the steps taken, since a long one from the start leaves no time in a short run.
The coefficient itself is clipped, so nothing winds up behind a bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retain.checks import check_number

# Predictions with fewer tokens before are a row's opening (of a short row, at most its half). All rows share it and
# new text opens otherwise, so the model learns to tell replay by it: on SmolLM2-135M KL was 0.39 nats in the first five
# predictions of 48 and 0.007 behind them, which at few rows a step is noise that no coefficient brings down.
OPENING_LENGTH = 5
BOUNDS = (1e-3, 1e3)  # the least and the largest coefficient
KL_GAIN = 0.7  # e-folds of the coefficient, at once, per e-fold of KL; above 1, a second lag makes it ring
RATE = 0.35  # e-folds of the coefficient per horizon and e-fold of KL away from the budget
FAR = -4.0  # log(KL / budget) from which on a rise of KL raises the coefficient: 2% of the budget
FALL_PER_RUN = 10.0  # e-folds by which the second term lowers the coefficient over a run, at most ...
FALL = (0.005, 0.1)  # ... within these per step
HORIZON_SHARE = 1 / 20  # share of the steps taken over which KL is smoothed ...
HORIZON = (2.0, 20.0)  # ... within these; at 20, noise of 50% swings the coefficient by less than a factor of 2
BUDGET_TOLERANCE = 0.2  # a budget is kept by a mean KL up to 20% above it
NEAR = 1.25  # a coefficient within this factor of a bound is at it: noise lifts it off
MAX_ROUNDING = 1e-6  # nats per token by which a KL may fall below 0
END = 0.2  # share of the steps taken that counts as the end of the run
MAX_BATCHES = 50  # of equal length, in which the run's KL is kept; full, they are merged in pairs
VERSION = 1
STATE = ("coef", "smoothed", "step", "error", "batch_size", "sums")  # all that the future depends on
Bound = Literal["low", "high"]


@dataclass(frozen=True)
class Verdict:
    """Whether the end of a run kept its budget; nats per token.

    Attributes:
        kept: whether `ref_kl` is at most 20% above the budget.
        certain: whether two standard errors do not reach over that line.
        ref_kl: mean over the last `num_steps` steps, a fifth of the run; on replay rows, which are trained on, behind
            their openings.
        standard_error: of that mean, by batch means, so that autocorrelation counts; None up to 5 steps.
        coef, at_bound: the coefficient at the end.
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
    """Moves the coefficient so that the mean KL(base ‖ model) on replay rows ends at the budget, or below it.

    What is held is the KL behind the first `OPENING_LENGTH` predictions of each row: where rows are short, or few,
    these rule the mean, and no coefficient brings them down.

    Args:
        budget: nats per token.
        num_steps: how often KL will be measured: the shorter the run, the faster the coefficient may fall; and the
            verdict says when the run ended before.
        coef: the first coefficient; that at the end of a similar run which kept its budget is a good one.

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
        self.sums: list[float] = []  # of KL, by batch

    @property
    def at_bound(self) -> Bound | None:
        """The bound at which the coefficient is."""
        low, high = BOUNDS
        return "low" if self.coef <= low * NEAR else "high" if self.coef >= high / NEAR else None

    def update(self, kl: float) -> float:
        """Take the KL measured in a step, in nats per token; return the coefficient of the next."""
        check_number("replay/kl", kl, low=-MAX_ROUNDING)
        kl = max(kl, 0.0)
        self.step += 1
        self._keep(kl)
        horizon = min(max(self.step * HORIZON_SHARE, HORIZON[0]), HORIZON[1])
        before = kl if self.smoothed is None else self.smoothed
        self.smoothed = before + (kl - before) / horizon
        excess = math.log(self.smoothed) - math.log(self.budget) if self.smoothed > 0 else FAR
        error = max(excess, FAR)
        move = KL_GAIN * (error - self.error) + max(RATE / horizon * error, -self._fall)
        self.error = error
        self.coef = min(max(self.coef * math.exp(move), BOUNDS[0]), BOUNDS[1])
        return self.coef

    def _keep(self, kl: float) -> None:
        """Add to the sum of the last batch; merge pairs when there are too many."""
        if self.step > self.batch_size * len(self.sums):
            if len(self.sums) == MAX_BATCHES:
                self.sums = [sum(self.sums[i : i + 2]) for i in range(0, MAX_BATCHES, 2)]
                self.batch_size *= 2
            self.sums.append(0.0)
        self.sums[-1] += kl

    @property
    def _sizes(self) -> list[int]:
        """Steps in each batch; only the last may have fewer."""
        whole = len(self.sums) - 1
        return [*[self.batch_size] * whole, self.step - self.batch_size * whole]

    def verdict(self) -> Verdict:
        """Whether the end of the run, so far, kept the budget."""
        mean, error, num_steps = self._end()
        limit = self.budget * (1 + BUDGET_TOLERANCE)
        kept, certain = mean <= limit, error is not None and abs(mean - limit) >= 2 * error
        measured = f"ref_kl {mean:.3g}" + (f" ± {error:.2g}" if error is not None else "")
        text = (
            f"budget {self.budget:g} nats per token {'kept' if kept else 'not kept'}"
            f"{'' if certain else ' as far as this many steps can tell'}: {measured} over the last {num_steps} steps, "
            f"behind the first {OPENING_LENGTH} tokens of replay rows; {self._meaning(kept, mean)}"
        )
        if self.step < self.num_steps:
            text += f"; the run ended at step {self.step} of {self.num_steps}"
        return Verdict(kept, certain, mean, error, num_steps, self.coef, self.at_bound, text)

    def _end(self) -> tuple[float, float | None, int]:
        """Mean KL of the run's end, its standard error and the number of steps."""
        assert self.step, "nothing was measured"
        batches = math.ceil(END * len(self.sums))
        sums, sizes = self.sums[-batches:], self._sizes[-batches:]
        num_steps = sum(sizes)
        mean = sum(sums) / num_steps
        if batches == 1:
            return mean, None, num_steps
        spread = sum((total - mean * size) ** 2 for total, size in zip(sums, sizes, strict=True))
        return mean, math.sqrt(spread * batches / (batches - 1)) / num_steps, num_steps

    def _meaning(self, kept: bool, mean: float) -> str:
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
        """What a checkpoint keeps, as JSON takes it."""
        state = {name: getattr(self, name) for name in STATE}
        return copy.deepcopy({"version": VERSION, "budget": self.budget, **state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume a run of the same version and budget; raise a `ValueError` for the state of another."""
        for name, mine in (("version", VERSION), ("budget", self.budget)):
            if state.get(name) != mine:
                raise ValueError(
                    f"max_ref_kl: the checkpoint's {name} is {state.get(name)}, not {mine}; "
                    "resume it with the settings it was trained with, or start a new run"
                )
        for name in STATE:
            setattr(self, name, copy.copy(state[name]))
