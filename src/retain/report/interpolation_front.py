"""Learning and divergence at weights interpolated between a base and its tuned model, and which weights to choose.

Besides the model, the mean of a run's checkpoints may be another end of the interpolation. The choice is made on the
rows that were measured, so the chosen point looks a little better on them than on other rows.
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

    `kept` omits texts on which the model shows no gain.
    """

    end: str
    alpha: float
    loss: dict[str, Estimate]
    kept: dict[str, Estimate]
    ref_kl: dict[str, Estimate]


@dataclass(frozen=True)
class InterpolationFront:
    """Points by end and increasing α; `gain` is the model's at α = 1, by new-task text, in nats per token.

    Choices depend on intervals, or on values where fewer than two documents give none.
    """

    points: list[FrontPoint]
    gain: dict[str, Estimate]

    @classmethod
    def of(
        cls, runs: Mapping[float, RunResults], means: Mapping[str, Mapping[float, RunResults]] | None = None
    ) -> InterpolationFront:
        """The front of models that `measure` measured on the same texts.

        Args:
            runs: α → the model there, between base and model, with α = 1.
            means: end → the same between the base and another end, where α = 0 is the base again.
        """
        gain = {text: result.estimates[GAIN.name] for text, result in runs[1.0].new_task.items()}
        learned = [text for text, estimate in gain.items() if estimate.range[0] > 0]
        points = []
        for end, of_end in {MODEL: runs, **(means or {})}.items():
            for alpha, run in sorted(of_end.items()):
                loss = {text: result.estimates["loss"] for text, result in run.new_task.items()}
                kept = {text: _kept_gain(run, runs[1.0], text) for text in learned}
                moved = {text: result.estimates["ref_kl"] for text, result in run.retention.items()}
                points.append(FrontPoint(end, alpha, loss, kept, moved))
        return cls(points, gain)

    @property
    def _moved(self) -> list[FrontPoint]:
        return [point for point in self.points if point.alpha]

    def keeping_gain(self, share: float) -> FrontPoint:
        """The point that moved least among those that keep this share (0 to 1) of the model's gain on every text.

        How far a point moved is its largest `ref_kl` over the retention texts.

        Raises:
            ValueError: if a text shows no gain.
        """
        for text, gain in self.gain.items():
            if text not in self.points[0].kept:
                raise ValueError(
                    f"new_task: {text!r} shows no gain to keep, {value_cell(gain).with_interval} nats per token on "
                    f"{quantity(gain.num_documents, 'document')}; give more rows, or choose by max_ref_kl or alpha"
                )
        keeping = [point for point in self._moved if min(kept.range[0] for kept in point.kept.values()) >= share]
        return min(keeping, key=lambda point: _farthest(point).value)

    def within(self, max_ref_kl: float) -> FrontPoint:
        """The point with the lowest mean new-task loss whose `ref_kl` is at most `max_ref_kl` on every text.

        Raises:
            ValueError: if only the base is within it.
        """
        within = [point for point in self._moved if _farthest(point).range[1] <= max_ref_kl]
        if not within:
            first = min(self._moved, key=lambda point: _farthest(point).range[1])
            raise ValueError(
                f"max_ref_kl: {max_ref_kl:g} is already exceeded at alpha {first.alpha:g}, where ref_kl is "
                f"{value_cell(_farthest(first)).with_interval} nats per token; raise it, or finetune with replay"
            )
        return min(within, key=lambda point: sum(loss.value for loss in point.loss.values()))

    @property
    def table(self) -> Table:
        """A row for each point, and a section for each end."""
        parts = [(name, getattr(self.points[0], name)) for name in ("loss", "kept", "ref_kl")]
        sections: dict[str, list[Row]] = {}
        for point in self.points:
            cells = [*map(value_cell, point.loss.values()), *map(share_cell, point.kept.values())]
            cells += map(value_cell, point.ref_kl.values())
            title = "alpha" if point.end == MODEL else f"alpha, {point.end}"
            sections.setdefault(title, []).append(Row(f"{point.alpha:g}", cells))
        columns = [f"{'gain kept' if what == 'kept' else what}, {text}" for what, texts in parts for text in texts]
        return Table(columns, [Section(*section) for section in sections.items()], has_base=False)

    def panels(self, chosen: FrontPoint) -> list[Panel]:
        """Learning against divergence between the base and each end, in one figure per retention text."""
        learned, panels = next(iter(self.gain)), []
        paths: dict[str, list[FrontPoint]] = {}
        for point in self.points:
            paths.setdefault(f"between base and {'tuned model' if point.end == MODEL else point.end}", []).append(point)
        for text in self.points[0].ref_kl:
            lines = []
            for place, (name, points) in enumerate({**paths, f"alpha {chosen.alpha:g}": [chosen]}.items()):
                losses = [point.loss[learned].value for point in points]
                lines.append(PlotLine(name, place, losses, [point.ref_kl[text].value for point in points]))
            about = f"Learning against divergence from the base on {text}, between base and tuned model"
            panels.append(
                Panel("frontier", text, about, LEARNING, "ref_kl, nats per token", lines=lines, from_zero=True)
            )
        return panels


def _farthest(point: FrontPoint) -> Estimate:
    return max(point.ref_kl.values(), key=lambda moved: moved.range[1])


def _kept_gain(run: RunResults, tuned: RunResults, text: str) -> Estimate:
    """The share of the tuned model's gain on a text that `run` keeps, with its interval over documents."""
    sums = [each.per_document[text] for each in (run, tuned)]
    gains = [np.subtract(losses.base_loss, losses.loss) for losses in sums]  # per document, in nats
    value, *ends = bootstrap_ratio(*gains, **{name: run.settings[name] for name in ("num_resamples", "seed")})
    return Estimate(value, bounds_of(ends), num_documents=len(gains[0]))
