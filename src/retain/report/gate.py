"""A gate: whether the forgetting in a report is within a limit, beyond it, or undecided.

The 95% interval decides, never the value alone: a check is within or beyond its limit if the whole interval is, and
undecided if the interval straddles the limit. The worst check decides for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from retain.report.metrics import METRICS
from retain.report.numbers import Estimate, quantity, share_cell, value_cell
from retain.report.results import Judgement, RunResults

WITHIN, BEYOND, UNDECIDED = 0, 2, 3
CODE_WORDS = {WITHIN: "within", BEYOND: "beyond", UNDECIDED: "not enough evidence"}
WHY = {
    WITHIN: "the whole interval is within it",
    BEYOND: "the whole interval is beyond it",
    UNDECIDED: "the interval does not decide",
}
SEVERITY = (WITHIN, UNDECIDED, BEYOND)
LIMITED = {"max_forgetting": "forgetting", "max_ref_kl": "ref_kl", "min_agreement": "ref_agreement"}  # a text's metrics
MIN_DOCUMENTS = 10  # documents or questions; the coverage of intervals over fewer is unknown, so they decide nothing
MAX_TIMES = 1000  # times as much text: if more were needed, the value lies practically on the limit


@dataclass(frozen=True)
class Check:
    """One number and its limit, which is a minimum for a `share` and a maximum for nats.

    Args:
        unit: what the interval resamples, documents or questions.
    """

    name: str
    what: str
    found: Estimate | None
    limit: float
    share: bool = False
    unit: str = "documents"

    @property
    def size(self) -> int:
        return getattr(self.found, f"num_{self.unit}") if self.found else 0

    @property
    def excess(self) -> tuple[float, float, float] | None:
        """(value, low, high) relative to the limit, where positive is bad; None without an interval."""
        if self.found is None or self.found.ci is None:
            return None
        value, low, high = (number - self.limit for number in (self.found.value, *self.found.ci))
        return (-value, -high, -low) if self.share else (value, low, high)

    @property
    def code(self) -> int:
        if self.excess is None or self.size < MIN_DOCUMENTS:
            return UNDECIDED
        _, low, high = self.excess
        return WITHIN if high <= 0 else BEYOND if low > 0 else UNDECIDED

    @property
    def needed(self) -> int | None:
        """Documents that would decide if the value stays, as the interval's width falls with 1/sqrt(documents).

        None if that takes more than `MAX_TIMES` as many.
        """
        if self.excess is None or self.size < MIN_DOCUMENTS:
            return MIN_DOCUMENTS
        value, low, high = self.excess
        half_width = high - value if value <= 0 else value - low
        times = (half_width / value) ** 2 if value else math.inf
        return max(self.size + 1, math.ceil(self.size * times)) if times <= MAX_TIMES else None

    def __str__(self) -> str:
        limit = f"at least {100 * self.limit:.6g}%" if self.share else f"at most {self.limit:g} nats per token"
        number = (share_cell if self.share else value_cell)(self.found).with_interval
        size = quantity(self.size, self.unit.removesuffix("s"))
        return f"{self.name}, {self.what} {number} on {size}, against {limit}: {WHY[self.code]}"

    @property
    def advice(self) -> str:
        """How many documents or questions would decide, in words."""
        if self.needed is None:
            return f"the value lies so near the limit that more {self.unit} would hardly decide"
        if self.size < MIN_DOCUMENTS:
            were = "1 was" if self.size == 1 else f"{self.size} were"
            return f"at least {MIN_DOCUMENTS} {self.unit} are needed for an interval that can decide, {were} measured"
        return (f"about {self.needed:,} {self.unit} of this kind, {self.needed - self.size:,} more, would decide "
                "if the value stays")  # fmt: skip


def checks_of(run: RunResults, limits: Mapping[str, float | None]) -> Iterator[Check]:
    """A check for every number in a report that has a limit."""
    for text, result in run.retention.items():
        for name, metric in LIMITED.items():
            if (limit := limits[name]) is not None:
                share = METRICS[metric].is_share
                what = METRICS[metric].label if share else metric
                yield Check(text, what, getattr(result, metric), limit, share)
    if (limit := limits["min_agreement"]) is not None:
        for name, rule, answers in run.rules:
            yield Check(f"{name} ({rule})", "same answer", answers.agreement, limit, True, "questions")


def judge(
    run: RunResults,
    *,
    max_forgetting: float | None = None,
    max_ref_kl: float | None = None,
    min_agreement: float | None = None,
) -> Judgement:
    """Check a report against limits: the code (0 within, 2 beyond, 3 not enough evidence), a verdict, all checks.

    Args:
        max_forgetting: largest allowed forgetting on any retention text, in nats per token.
        max_ref_kl: largest allowed divergence from the base on any retention text, in nats per token.
        min_agreement: smallest allowed share of the base's top tokens and answers that the model shares.
    """
    limits = {"max_forgetting": max_forgetting, "max_ref_kl": max_ref_kl, "min_agreement": min_agreement}
    checks = list(checks_of(run, limits))
    assert checks, "no limit applies to this report"
    code = max((check.code for check in checks), key=SEVERITY.index)
    worst = [check for check in checks if check.code == code]
    deciding = max(worst, key=lambda check: (check.what == "forgetting", (check.excess or (0.0,))[0]))
    more = f" (and {quantity(len(worst) - 1, 'more check')})" if len(worst) > 1 and code != WITHIN else ""
    hint = f"; {deciding.advice}" if code == UNDECIDED else ""
    verdict = f"gate: {CODE_WORDS[code]} (exit code {code}), decided by {deciding}{hint}{more}"
    return Judgement(code, verdict, list(map(str, checks)), **limits)
