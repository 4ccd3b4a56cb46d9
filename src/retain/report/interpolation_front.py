"""What a model learned and how far it moved, at weights between its base's and its own; and which weights to take.

The mean of a run's checkpoints may be a further end of the interpolation, beside the model. What is chosen is chosen on
the rows it was measured on, so what is measured there is a little better than on others.
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

MODEL = "model"


@dataclass(frozen=True)
class FrontPoint:
    """W(α) toward an end, by text: loss and `ref_kl` in nats per token, and `kept`, the share of the model's gain.

    `kept` is empty for a text on which the model shows no gain.
    """

    end: str
    alpha: float
    loss: dict[str, Estimate]
    kept: dict[str, Estimate]
    ref_kl: dict[str, Estimate]


@dataclass(frozen=True)
class InterpolationFront:
    """Points by end and rising α; `gain` is the model's, at α = 1, by text of the new task, in nats per token.

    Where an interval is at hand, it decides: with fewer than two documents, the value does.
    """

    points: list[FrontPoint]
    gain: dict[str, Estimate]

    @classmethod
    def of(
        cls, runs: Mapping[float, RunResults], means: Mapping[str, Mapping[float, RunResults]] | None = None
    ) -> InterpolationFront:
        """The front of what `measure` found on the same texts.

        Args:
            runs: between base and model, by α, 1 among them.
            means: the same between the base and each further end, by its name; its α = 0 is the base once more.
        """
        gain = {text: result.estimates[GAIN.name] for text, result in runs[1.0].new_task.items()}
        learned = [text for text, one in gain.items() if _low(one) > 0]
        points = []
        for end, found in {MODEL: runs, **(means or {})}.items():
            for alpha, run in sorted(found.items()):
                loss = {text: result.estimates["loss"] for text, result in run.new_task.items()}
                kept = {text: _kept_gain(run, runs[1.0], text) for text in learned}
                moved = {text: result.estimates["ref_kl"] for text, result in run.retention.items()}
                points.append(FrontPoint(end, alpha, loss, kept, moved))
        return cls(points, gain)

    @property
    def _moved(self) -> list[FrontPoint]:
        return [one for one in self.points if one.alpha]

    def keeping_gain(self, share: float) -> FrontPoint:
        """The point that moved least of those that keep this share of the model's gain, from 0 to 1, on every text.

        It has the least `ref_kl` on the text of the replay rows on which its `ref_kl` is largest.

        Raises:
            ValueError: for a text on which no gain is shown.
        """
        for text, gain in self.gain.items():
            if text not in self.points[0].kept:
                raise ValueError(
                    f"new_task: {text!r} shows no gain to keep, {value_cell(gain).with_interval} nats per token on "
                    f"{quantity(gain.num_documents, 'document')}; give more rows, or choose by max_ref_kl or alpha"
                )
        keeping = [one for one in self._moved if min(map(_low, one.kept.values())) >= share]
        return min(keeping, key=lambda one: _farthest(one).value)

    def within(self, max_ref_kl: float) -> FrontPoint:
        """The point of the least loss on the new task, a mean over texts, whose `ref_kl` is within this on every text.

        Raises:
            ValueError: if only the base itself is.
        """
        within = [one for one in self._moved if _high(_farthest(one)) <= max_ref_kl]
        if not within:
            first = min(self._moved, key=lambda one: _high(_farthest(one)))
            raise ValueError(
                f"max_ref_kl: {max_ref_kl:g} is exceeded already at alpha {first.alpha:g}, where ref_kl is "
                f"{value_cell(_farthest(first)).with_interval} nats per token; raise it, or finetune with replay"
            )
        return min(within, key=lambda one: sum(loss.value for loss in one.loss.values()))

    @property
    def table(self) -> Table:
        """A row for each point, by end."""
        parts = [(name, getattr(self.points[0], name)) for name in ("loss", "kept", "ref_kl")]
        sections: dict[str, list[Row]] = {}
        for one in self.points:
            cells = [*map(value_cell, one.loss.values()), *map(share_cell, one.kept.values())]
            cells += map(value_cell, one.ref_kl.values())
            title = "alpha" if one.end == MODEL else f"alpha, {one.end}"
            sections.setdefault(title, []).append(Row(f"{one.alpha:g}", cells))
        columns = [f"{'gain kept' if what == 'kept' else what}, {text}" for what, texts in parts for text in texts]
        return Table(columns, [Section(*section) for section in sections.items()], has_base=False)

    def panels(self, chosen: FrontPoint) -> list[Panel]:
        """Learning against divergence between the base and each end, a figure for each text that it moved on."""
        learned, found = next(iter(self.gain)), []
        paths: dict[str, list[FrontPoint]] = {}
        for one in self.points:
            paths.setdefault(f"between base and {'tuned model' if one.end == MODEL else one.end}", []).append(one)
        for text in self.points[0].ref_kl:
            lines = []
            for place, (name, points) in enumerate({**paths, f"alpha {chosen.alpha:g}": [chosen]}.items()):
                values = [(one.loss[learned].value, one.ref_kl[text].value) for one in points]
                lines.append(PlotLine(name, place, [x for x, _ in values], [y for _, y in values]))
            about = f"Learning against divergence from the base on {text}, between base and tuned model"
            found.append(
                Panel("frontier", text, about, LEARNING, "ref_kl, nats per token", lines=lines, from_zero=True)
            )
        return found


def _low(one: Estimate) -> float:
    return one.ci[0] if one.ci else one.value


def _high(one: Estimate) -> float:
    return one.ci[1] if one.ci else one.value


def _farthest(point: FrontPoint) -> Estimate:
    return max(point.ref_kl.values(), key=_high)


def _kept_gain(run: RunResults, tuned: RunResults, text: str) -> Estimate:
    """Share of the tuned model's gain on a text, its interval over documents; its gain as a whole is above 0."""
    sums = [one.per_document[text] for one in (run, tuned)]
    gains = [np.subtract(one.base_loss, one.loss) for one in sums]  # of each document, in nats
    how = {name: run.settings[name] for name in ("num_resamples", "seed")}
    value, *ends = bootstrap_ratio(*gains, **how)
    return Estimate(value, bounds_of(ends), num_documents=len(gains[0]))
