"""What the study of laws found: fits, the held-out rank, and where the line breaks. Rows in, words and a figure out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from retain import fit_forgetting_law
from retain.forgetting_law import ForgettingLaw

MIN_STEPS = 50  # as in the paper: earlier measurements are left out


def points(rows: Sequence[dict[str, Any]], reading: str) -> list[dict[str, Any]]:
    """Rows for a fit: one per evaluation from `MIN_STEPS` on; each rank and seed is a run."""
    return [
        {
            "run": row["key"],
            "num_params": row["num_params"],
            "num_steps": at["step"],
            "finetuning_loss": at["eval_loss"],
            "forgetting_loss": at[reading],
        }
        for row in rows
        for at in row["trajectory"]
        if at["step"] >= MIN_STEPS
    ]


def fitted(rows: Sequence[dict[str, Any]], reading: str, form: str, **how: Any) -> ForgettingLaw:
    """A law of these runs; what they cannot say is kept in `law.warnings`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_forgetting_law(points(rows, reading), form, **how)


def draw(rows, path): ...


def told(rows): return ""
