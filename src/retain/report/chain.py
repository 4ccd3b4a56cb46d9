"""A chain of finetunes, each continuing the model of the one before: what later stages forgot of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retain.report.comparison import mismatch
from retain.report.figures import Panel, PlotLine
from retain.report.numbers import Estimate, enumeration, share_cell, value_cell
from retain.report.results import ReportRuns
from retain.report.sentences import MAX_NAMED
from retain.statistics import bootstrap_ratio


@dataclass(frozen=True)
class ChainedText:
    """A retention text over the stages of a chain; losses are in nats per token.

    Attributes:
        changes: the loss after each stage minus that of the first base.
        lowest: the stage after which the loss was lowest, from 1; 0 is the base.
        lost: rise of the loss from there to the end of the chain; None if it was lowest at the end.
        kept: the share of what had been learned by then that is left; None if nothing was lost or nothing learned.
    """

    name: str
    changes: list[Estimate]
    lowest: int
    lost: Estimate | None = None
    kept: Estimate | None = None


def over_chain(runs: ReportRuns) -> list[ChainedText]:
    """Every text that all stages were measured on, the one that lost most first.

    Intervals are bootstrapped over documents, with the same resampled documents at both ends of a difference. Since the
    lowest loss is chosen among all stages, `lost` is a little too large if stages hardly differ.

    Args:
        runs: the stages in order, each measured against the base of the first.

    Raises:
        ValueError: if there is only one stage, the bases differ, or the stages were measured differently.
    """
    if len(runs) < 2:
        raise ValueError("chain: true needs at least two stages; give them in order")
    if len({str(run.base.get("fingerprint")) for run in runs}) > 1:
        raise ValueError("chain: the stages were measured against different bases; measure all against the first")
    shared = [text for text in runs[0].retention if all(text in run.per_document for run in runs)]
    if not shared:
        raise ValueError("chain: no text was measured on every stage; give each stage's task as --retention name=file")
    for text in shared:
        for run in runs[1:]:
            if why := mismatch(runs[0], run, text):
                raise ValueError(f"chain: {text} of {run.name!r} was {why}; measure all stages with one command")
    texts = [_chained(runs, text) for text in shared]
    return sorted(texts, key=lambda text: -text.lost.value if text.lost else 0.0)


def _chained(runs: ReportRuns, text: str) -> ChainedText:
    sums = [run.per_document[text] for run in runs]
    sizes = np.asarray(sums[0].num_tokens)
    losses = [np.asarray(losses) for losses in (sums[0].base_loss, *(stage.loss for stage in sums))]

    def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
        value, low, high = bootstrap_ratio(numerator, denominator)
        ends = (low, high) if np.isfinite([low, high]).all() else None
        return Estimate(value, ends, num_documents=len(sizes), num_tokens=int(sizes.sum()))

    changes = [ratio(after - losses[0], sizes) for after in losses[1:]]
    lowest = int(np.argmin([loss.sum() for loss in losses]))
    if lowest == len(runs):
        return ChainedText(text, changes, lowest)
    lost, kept = ratio(losses[-1] - losses[lowest], sizes), None
    if lowest and changes[lowest - 1].sign < 0:
        kept = ratio(losses[0] - losses[-1], losses[0] - losses[lowest])
    return ChainedText(text, changes, lowest, lost, kept)


def chain_sentences(runs: ReportRuns, texts: Sequence[ChainedText]) -> list[str]:
    """A sentence for each text on when its loss was lowest, and how much it has risen since."""
    return [f"{text.name}: {_course(runs, text)}." for text in texts]


def _course(runs: ReportRuns, text: ChainedText) -> str:
    if text.lost is None:
        return f"lowest at the end, {value_cell(text.changes[-1]).with_interval} nats per token against the base"
    since = f"after “{runs[text.lowest - 1].name}”" if text.lowest else "in the base"
    words = f"its loss was lowest {since}, and has risen by {value_cell(text.lost).with_interval} nats per token since"
    return words + (f"; {_kept(text.kept)}" if text.kept else "")


def _kept(share: Estimate) -> str:
    """How much of what was learned is kept; nothing if the loss is above the base's."""
    if share.sign < 0:
        return "nothing of what was learned is kept, and the loss is above the base's"
    return f"{share_cell(share).with_interval} of what was learned is kept"


def chain_verdict(runs: ReportRuns, texts: Sequence[ChainedText]) -> str:
    """One sentence: how much the loss rose on the texts that lost most, if the interval of the rise excludes 0."""
    risen = [text for text in texts if text.lost]
    if not risen:
        return f"After {len(runs)} stages no text has lost anything: the loss of each is lowest at the end."
    lost = [text for text in risen if (rise := text.lost) and rise.sign > 0][:MAX_NAMED]
    if not lost:
        names = enumeration([text.name for text in risen])
        return f"After {len(runs)} stages no text shows a loss: the intervals of the rise on {names} include 0."
    words = [
        f"by {value_cell(text.lost).with_interval}{'' if at else ' nats per token'} on {text.name}"
        + (f" ({_kept(text.kept)})" if text.kept else "")
        for at, text in enumerate(lost)
    ]
    return f"After {len(runs)} stages the loss is above its lowest {enumeration(words)}."


def chain_panel(runs: ReportRuns, texts: Sequence[ChainedText]) -> Panel:
    """A figure of each text's loss over the stages, relative to the base."""
    names, steps = ["base", *(run.name for run in runs)], list(range(len(runs) + 1))
    lines = [
        PlotLine(text.name, at, steps, [0.0, *(change.value for change in text.changes)],
                 ranges=[(0.0, 0.0), *(change.range for change in text.changes)])
        for at, text in enumerate(texts)
    ]  # fmt: skip
    described = "; ".join(f"{text.name}: {', '.join(map(str, text.changes))}" for text in texts)
    title = "Loss against the base, after each stage"
    return Panel(
        "curve",
        title,
        f"{title} (nats per token): {described}.",
        "",
        "nats per token, 95% interval",
        lines,
        ticks=names,
    )
