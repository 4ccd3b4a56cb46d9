"""A fitted law as a JSON file, and back with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retain.files import MAPPING, NUMBER, check_shape, read_json, write_json
from retain.laws.forms import Array, Form, form_of
from retain.laws.law import ForgettingLaw, plain
from retain.laws.problem import Draws
from retain.laws.runs import as_runs

SCHEMA = "retain.law/2"
REMEDY = "fit it again"
FITS = {"exponents": list, "coefficients": list}
SHAPE = {
    "form": str, "bounds": {str: [NUMBER, NUMBER]}, "runs": {str: list}, "estimate": FITS, "draws": FITS,
    "spread": list, "held_out": {str: {str: NUMBER}}, "condition": NUMBER, "warnings": [str], "settings": MAPPING,
}  # fmt: skip


def write_law(law: ForgettingLaw, path: Path) -> None:
    """Write the law whole or not at all. `params`, `ci` and `r_squared` are for readers; the rest is read back."""
    table = {"run": law.runs.run, "dataset": law.runs.dataset}
    fits = {"estimate": law.estimate, "draws": law.draws}
    content = {
        "schema": SCHEMA,
        "form": law.form.name,
        "equation": law.form.equation,
        "params": {name: plain(value) for name, value in law.params.items()},
        "ci": {name: plain(interval) for name, interval in law.conf_int().items()},
        "r_squared": law.r_squared,
        "held_out": law.held_out,
        "condition": law.condition,
        "warnings": law.warnings,
        "settings": law.settings,
        "bounds": law.form.exponents,
        "runs": table | {name: column.tolist() for name, column in law.runs.columns.items()},
        **{name: {key: array.tolist() for key, array in vars(draws).items()} for name, draws in fits.items()},
        "spread": law.spread.tolist(),
    }
    write_json(path, content)


def read_law(path: Path, form: Form | None = None) -> ForgettingLaw:
    """Read what `write_law` wrote, or raise a `ValueError` of one line."""
    data = read_json(path, "law", "give a file that `retain fit` wrote")
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"law: {str(path)!r} is not a {SCHEMA} file; give one that `retain fit` wrote")
    check_shape(data, SHAPE, f"law: {str(path)!r} is damaged", REMEDY)
    found = form_of(form or data["form"], {name: tuple(pair) for name, pair in data["bounds"].items()})
    try:
        law = _from_dict(data, found)
        _check_shapes(law)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"law: {str(path)!r} is damaged ({error}); {REMEDY}") from error
    return law


def _from_dict(data: Mapping[str, Any], found: Form) -> ForgettingLaw:
    estimate = _draws(data["estimate"])
    return ForgettingLaw(
        form=found,
        runs=as_runs(data["runs"], found.columns),
        estimate=estimate,
        draws=_draws(data["draws"]) if data["draws"]["coefficients"] else estimate[:0],
        spread=_numbers(data, "spread"),
        held_out={group: {**errors} for group, errors in data["held_out"].items()},
        condition=float(data["condition"]),
        warnings=[str(text) for text in data["warnings"]],
        settings={**data["settings"]},
    )


def _numbers(data: Mapping[str, Any], name: str) -> Array:
    try:
        array = np.asarray(data[name], dtype=np.float64)
    except ValueError:  # ragged, or text
        array = np.array(np.nan)
    if not np.isfinite(array).all():
        raise ValueError(f"{name!r} holds what is no number")
    return array


def _draws(data: Mapping[str, Any]) -> Draws:
    return Draws(**{name: _numbers(data, name) for name in ("exponents", "coefficients")})


def _check_shapes(law: ForgettingLaw) -> None:
    problem, sets = law.problem, len(law.problem.datasets)
    width = (len(problem.slots), len(law.form.coefficients) * sets)
    whole = law.spread.shape == (problem.num_outputs, problem.num_points) and len(law.estimate) == 1
    for draws in (law.estimate, law.draws):
        shapes = [array.shape for array in vars(draws).values()]
        whole = whole and shapes == [(len(draws), numbers) for numbers in width]
    if not whole:
        raise ValueError("'estimate', 'draws' or 'spread' does not fit the runs")
