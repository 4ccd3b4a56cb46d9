"""The table of text metrics: how each is computed, and where it is shown.

A metric is a ratio of sums over documents. To add one, add a row to `METRICS` and a test of its value; its interval,
the training log, tables, pages and model cards follow from the row. `base_<name>` is the base's own value of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NATS, SHARE, BITS_PER_BYTE = "nats per token", "share of tokens", "bits per byte"
KEPT_SUMS = ("ref_kl", "loss", "base_loss")  # sums that files keep per document


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a text, whose numerator is the sum of `per_token` or `total` over documents.

    Args:
        label: the name in tables; empty for a value of the base, which is shown next to the model's.
        meaning: one clause that explains it to readers of a report.
        per_token: (base, model, tokens) → values of shape (*batch), from the `measuring.tokens.Predictions` of both and
            the tokens that follow.
        total: name → sums of metrics with `per_token` → numerator of shape (documents,).
        unit: also sets the denominator, tokens or bytes.
        least, most: bounds of the value.
        main: kinds of text (`new_task`, `retention`) for which it is in the main table, not among the further metrics.
        logged: whether training logs it as `retention/<text>/<name>`.
        indexed: whether it is in the `model-index` of a model card.
    """

    name: str
    label: str = ""
    meaning: str = ""
    per_token: Callable[[Any, Any, Any], Any] | None = None
    total: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None
    unit: str = NATS
    least: float = 0.0
    most: float = math.inf
    higher_is_better: bool = False
    main: tuple[str, ...] = ()
    logged: bool = False
    indexed: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it is a share, shown as a percentage."""
        return self.unit == SHARE


# fmt: off
# Forgetting on the new task with the opposite sign, its interval included.
GAIN = Metric(
    name="gain", label="gain", meaning="new-task loss of the base minus that of the tuned model; positive is learning",
    least=-math.inf, higher_is_better=True, main=("new_task",), indexed=True,
)
METRICS = {metric.name: metric for metric in (
    Metric(
        name="forgetting", label="forgetting", meaning="loss on the text after tuning minus before; positive is bad",
        total=lambda sums: sums["loss"] - sums["base_loss"],
        least=-math.inf, main=("retention",), logged=True, indexed=True,
    ),
    Metric(
        name="ref_kl", label="divergence (ref_kl)",
        meaning="KL(base ‖ tuned): how far the next-token distribution moved from the base's, 0 is not at all; shows "
                "changes that average out in the loss",
        per_token=lambda base, model, tokens: base.expectation(base.log_probs - model.log_probs),
        main=("retention",), logged=True, indexed=True,
    ),
    Metric(
        name="ref_agreement", label="same top token", unit=SHARE,
        meaning="share of positions where both models put the same token first",
        per_token=lambda base, model, tokens: (base.top == model.top).float(),
        most=1.0, higher_is_better=True, main=("retention",), logged=True, indexed=True,
    ),
    Metric(
        name="loss", label="loss", meaning="next-token loss on the text",
        per_token=lambda base, model, tokens: model.loss(tokens),
        main=("new_task", "retention"), logged=True,
    ),
    Metric(name="base_loss", per_token=lambda base, model, tokens: base.loss(tokens)),
    Metric(
        name="bits_per_byte", label="bits per byte", unit=BITS_PER_BYTE,
        meaning="loss per byte of text, comparable across tokenizers",
        total=lambda sums: sums["loss"],
    ),
    Metric(name="base_bits_per_byte", unit=BITS_PER_BYTE, total=lambda sums: sums["base_loss"]),
    Metric(
        name="ref_cross_entropy", label="cross-entropy to base, soft",
        meaning="targets are the base's next-token distributions (Kalajdzievski 2024)",
        total=lambda sums: sums["base_ref_cross_entropy"] + sums["ref_kl"],
    ),
    Metric(
        name="base_ref_cross_entropy",  # the base's entropy
        per_token=lambda base, model, tokens: -base.expectation(base.log_probs),
    ),
    Metric(
        name="ref_argmax_cross_entropy", label="cross-entropy to base, hard",
        meaning="targets are the base's most likely tokens (Kalajdzievski 2024)",
        per_token=lambda base, model, tokens: model.loss(base.top),
    ),
    Metric(name="base_ref_argmax_cross_entropy", per_token=lambda base, model, tokens: base.loss(base.top)),
)}
# fmt: on
SUMS = tuple(name for name, metric in METRICS.items() if metric.per_token)
LOGGED = tuple(name for name, metric in METRICS.items() if metric.logged)
TABLE_METRICS = {metric.name: metric for metric in (GAIN, *METRICS.values()) if metric.label}  # in table order
