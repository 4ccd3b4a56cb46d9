"""What a model learned and how far it moved, at weights between its base's and its own; and which weights to take.

A share is chosen on the rows it was measured on, so what is measured there is a little better than on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from retain.report.figures import LEARNING, Panel, PlotLine
from retain.report.metrics import GAIN
from retain.report.numbers import Estimate, bounds_of, quantity, share_cell, value_cell
from retain.report.results import RunResults
from retain.report.tables import Row, Section, Table
from retain.statistics import bootstrap_ratio


@dataclass(frozen=True)
class FrontPoint:
    """W(α), by text: its loss and `ref_kl` in nats per token, and `kept`, its share of the gain at α = 1.

    `kept` is empty for a text on which no gain is shown at α = 1.
    """

    alpha: float
    loss: dict[str, Estimate]
    kept: dict[str, Estimate]
    ref_kl: dict[str, Estimate]


@dataclass(frozen=True)
class InterpolationFront:
    """Points by rising α, the last at 1; `gain` is the whole model's by text of the new task, in nats per token.

    Where an interval is at hand, it decides: with fewer than two documents, the value does.
    """

    points: list[FrontPoint]
    gain: dict[str, Estimate]

    @classmethod
    def of(cls, runs: Mapping[float, RunResults]) -> InterpolationFront:
        """The front of what `measure` found at each α, 1 among them, on the same texts."""
        gain = {text: result.estimates[GAIN.name] for text, result in runs[1.0].new_task.items()}
        learned = [text for text, one in gain.items() if _low(one) > 0]
        points = []
        for alpha, run in sorted(runs.items()):
            loss = {text: result.estimates["loss"] for text, result in run.new_task.items()}
            kept = {text: _kept_gain(run, runs[1.0], text) for text in learned}
            moved = {text: result.estimates["ref_kl"] for text, result in run.retention.items()}
            points.append(FrontPoint(alpha, loss, kept, moved))
        return cls(points, gain)

    def keeping_gain(self, share: float) -> float:
        """The smallest α above 0 that keeps this share of the gain on every text of the new task, from 0 to 1.

        Raises:
            ValueError: for a text on which no gain is shown.
        """
        for text, gain in self.gain.items():
            if text not in self.points[-1].kept:
                raise ValueError(
                    f"new_task: {text!r} shows no gain to keep, {value_cell(gain).with_interval} nats per token on "
                    f"{quantity(gain.num_documents, 'document')}; give more rows, or choose by max_ref_kl or alpha"
                )
        return next(one.alpha for one in self.points if one.alpha and min(map(_low, one.kept.values())) >= share)

    def within(self, max_ref_kl: float) -> float:
        """The largest α at which the divergence from the base stays within this on every text, in nats per token.

        Raises:
            ValueError: if only the base itself does.
        """
        first, *_ = above = [one for one in self.points if one.alpha]
        within = [one.alpha for one in above if max(map(_high, one.ref_kl.values())) <= max_ref_kl]
        if not within:
            worst = max(first.ref_kl.values(), key=_high)
            raise ValueError(
                f"max_ref_kl: {max_ref_kl:g} is exceeded already at alpha {first.alpha:g}, where ref_kl is "
                f"{value_cell(worst).with_interval} nats per token; raise it, or finetune with replay"
            )
        return max(within)

    @property
    def table(self) -> Table:
        """A row for each α."""
        last = self.points[-1]
        parts = (("loss", last.loss), ("gain kept", last.kept), ("ref_kl", last.ref_kl))
        rows = []
        for one in self.points:
            cells = [*map(value_cell, one.loss.values()), *map(share_cell, one.kept.values())]
            cells += map(value_cell, one.ref_kl.values())
            rows.append(Row(f"{one.alpha:g}", cells))
        columns = [f"{what}, {text}" for what, texts in parts for text in texts]
        return Table(columns, [Section("alpha", rows)], has_base=False)

    def panels(self, chosen: float) -> list[Panel]:
        """Learning against divergence between base and tuned model, a figure for each text on which it moved."""
        learned, found = next(iter(self.gain)), []
        for text in self.points[-1].ref_kl:
            path = {one.alpha: (one.loss[learned].value, one.ref_kl[text].value) for one in self.points}
            named = {"between base and tuned model": path.values(), f"alpha {chosen:g}": [path[chosen]]}
            lines = [
                PlotLine(name, place, [x for x, _ in points], [y for _, y in points])
                for place, (name, points) in enumerate(named.items())
            ]
            about = f"Learning against divergence from the base on {text}, between base and tuned model"
            found.append(
                Panel("frontier", text, about, LEARNING, "ref_kl, nats per token", lines=lines, from_zero=True)
            )
        return found


def _low(one: Estimate) -> float:
    return one.ci[0] if one.ci else one.value


def _high(one: Estimate) -> float:
    return one.ci[1] if one.ci else one.value


def _kept_gain(run: RunResults, tuned: RunResults, text: str) -> Estimate:
    """Share of the tuned model's gain on a text, its interval over documents; its gain as a whole is above 0."""
    sums = [one.per_document[text] for one in (run, tuned)]
    gains = [np.subtract(one.base_loss, one.loss) for one in sums]  # of each document, in nats
    how = {name: run.settings[name] for name in ("num_resamples", "seed")}
    value, *ends = bootstrap_ratio(*gains, **how)
    return Estimate(value, bounds_of(ends), num_documents=len(gains[0]))
