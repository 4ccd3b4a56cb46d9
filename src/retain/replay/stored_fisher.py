"""The base's Fisher information on its replay rows; `retain sample --store_fisher` stores it with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from retain.models.description import model_fingerprint
from retain.models.fisher import Curvature, load_fisher, measure_fisher, rows_per_batch, save_fisher
from retain.models.reference import Reference
from retain.progress import StageProgress
from retain.replay.dataset import FISHER_FILE, ReplayDataset, replay_indices

FISHER = "Fisher information"  # stage name of the progress bar
FISHER_TOKENS = 65_536  # predictions to measure it on, rounded up to whole rows


def holds_fisher(source: str | None) -> bool:
    """Whether the base's Fisher information is stored with the rows in this folder."""
    return source is not None and (Path(source).expanduser() / FISHER_FILE).is_file()


def fisher_of(
    model: Any, rows: ReplayDataset, weights: Mapping[str, nn.Parameter], seed: int = 0
) -> tuple[dict[str, Curvature], int]:
    """Curvatures of these weights, by name, and the number of predictions that they were measured on.

    Uses the stored ones if this model drew the rows and they include every weight.

    Args:
        model: the base, or the base with an adapter, which is disabled.
        seed: of the choice of rows and of the drawn labels.
    """
    path = Path(rows.source) / FISHER_FILE
    if rows.manifest is not None and path.exists() and rows.manifest["model_fingerprint"] == model_fingerprint(model):
        stored, num_tokens = load_fisher(path, model.device)
        if not weights.keys() - stored.keys():
            return {name: stored[name] for name in weights}, num_tokens
    order = replay_indices(0, len(rows), len(rows), seed)
    chosen = order[: int((rows.num_predictions[order].cumsum() < FISHER_TOKENS).sum()) + 1]
    with Reference().base(model) if hasattr(model, "disable_adapter") else nullcontext():
        fisher = measure_fisher(model, _batches(rows, chosen, model), weights, seed=seed)
    return fisher, int(rows.num_predictions[chosen].sum())


def store_fisher(model: Any, rows: ReplayDataset) -> Path:
    """Measure the Fisher information of every weight of the model that drew the rows; returns the file's path."""
    path = Path(rows.source) / FISHER_FILE
    path.unlink(missing_ok=True)
    save_fisher(path, *fisher_of(model, rows, dict(model.named_parameters())))
    return path


def _batches(rows: ReplayDataset, chosen: Any, model: Any) -> Iterator[dict[str, Tensor]]:
    length = int((rows.num_predictions + rows.prefix_lengths)[chosen].max())
    size = rows_per_batch(model.config.get_text_config().vocab_size, length)
    with StageProgress(FISHER, len(chosen), "rows", work=1) as stage:
        for at in range(0, len(chosen), size):
            batch = chosen[at : at + size]
            yield {name: value.to(model.device) for name, value in rows.batch(batch).items()}
            stage.update(len(batch))
