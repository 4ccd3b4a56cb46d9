"""The tables of a report, as plain strings: metrics down, runs across. Takes plain dicts."""

from __future__ import annotations

from typing import Any

from retain.metrics import METRICS, TABLE_METRICS, Metric
from retain.report.numbers import cell, is_number, quantity

KINDS = ("new_task", "retention")  # of texts


def metric_table(runs: list[dict], *, main: bool) -> dict[str, Any]:
    """Metrics down, runs across: the main ones, or the others.

    The column `base` is the base's own value, or base against base: the noise floor.
    """
    sections = []
    for kind, suffix in (("new_task", " (new task)"), ("retention", "")):
        for text in dict.fromkeys(text for run in runs for text in run.get(kind) or {}):
            measured = [(run.get(kind) or {}).get(text) or {} for run in runs]
            floor: dict = next(filter(None, ((run.get("noise_floor") or {}).get(text) for run in runs)), {})
            rows = []
            for name, metric in TABLE_METRICS.items():
                if (kind in metric.main) == main and any(name in metrics for metrics in measured):
                    own = f"base_{name}"
                    bases = [m.get(own) for m in measured] if own in METRICS else [floor.get(name)]
                    base = next(filter(None, bases), None)
                    cells = [_cell(metrics.get(name), metric) for metrics in measured]
                    rows.append({"label": metric.label, "base": _cell(base, metric), "cells": cells})
            sections += [{"title": text + suffix, "rows": rows}] if rows else []
    return {"columns": [run["name"] for run in runs], "has_base": True, "sections": sections, "notes": []}


def _cell(entry: dict | None, metric: Metric) -> dict[str, str]:
    return cell((entry or {}).get("value"), (entry or {}).get("ci"), percent=metric.is_share)


def comparison_table(compared: dict, place: str) -> dict[str, Any]:
    """The runs side by side, at matched new-task loss or at their ends."""
    runs, notes = compared["runs"], []
    if place == "matched":
        losses = [cell(compared["matched_loss"]) for _ in runs]
        head = [("loss", losses), ("reached at step", [_plain(run["matched_step"], ".1f") for run in runs])]
        if any(run["learning_rate"] is not None for run in runs):
            head.append(("learning rate there", [_plain(run["learning_rate"], ".2g") for run in runs]))
        notes += [f"{text} was measured at the end only; give it to `retain finetune` as --retention to have it here"
                  for text in compared["end"] if text not in compared["matched"]]  # fmt: skip
    else:
        relative = [_plain(run["relative_loss_difference"], "+.1%") for run in runs]
        head = [("loss", [cell(run["final_loss"]) for run in runs]), ("against the first", relative)]
    sections = [("new task", head)]
    for text, entries in compared[place].items():
        keys = (("ref_kl", METRICS["ref_kl"].label), ("forgetting", "forgetting"), ("prevented", "prevented"))
        rows = [(name, [cell(e[key], e[f"{key}_ci"], key == "prevented") for e in entries]) for key, name in keys]
        sections.append((text, rows))
        notes += [f"{text}, {entry['name']}: {entry['note']}" for entry in entries if entry["note"]]
    filled = [
        {"title": title, "rows": [{"label": label, "base": None, "cells": cells} for label, cells in rows]}
        for title, rows in sections
    ]
    return {"columns": [run["name"] for run in runs], "has_base": False, "sections": filled, "notes": notes}


def _plain(value: float | None, form: str) -> dict[str, str]:
    return {"value": "–" if value is None else format(value, form), "interval": ""}


def sizes(runs: list[dict]) -> list[str]:
    """How much text stands behind each row."""
    found = {}
    for of, text, metrics in [(run, *item) for run in runs for kind in KINDS for item in (run.get(kind) or {}).items()]:
        counted = ((of.get("settings") or {}).get("loss_tokens") or {}).get(text, "all")
        entry = next((m for m in metrics.values() if is_number((m or {}).get("num_documents"))), None)
        if entry:
            tokens = quantity(entry.get("num_tokens") or 0, "token")
            found[text] = f"{text}: {quantity(entry['num_documents'], 'document')}, {tokens}"
            found[text] += "" if counted == "all" else f" of {counted}"
    return list(found.values())


def facts(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """(key, a value per run, or one value where all agree) of models, settings, training and versions."""
    groups = ("base", "tuned", "settings", "training", "versions")
    tables = [
        {"created": run.get("created")}
        | {f"{group}: {key}": value for group in groups for key, value in (run.get(group) or {}).items()}
        for run in runs
    ]
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = ["–" if table.get(key) is None else str(table[key]) for table in tables]
        rows.append((key, values if len(set(values)) > 1 else values[:1]))
    return rows
