"""Forgetting as colour: texts against runs, and the worst documents token by token. The number always stands beside.

Takes plain dicts; colours are shares of full strength in percent, which the page mixes into its own background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from retain.report.numbers import cell, is_number
from retain.text import visible, visible_text

FULL = 3.0  # nats: a token's divergence from which its colour is full, the same in every report
MOST_TOKENS = 20_000  # on a page; a token costs some 150 bytes of it


def heat_map(runs: Sequence[dict]) -> list[dict[str, Any]]:
    """Texts down, the one that some run forgot most first; per run forgetting and ref_kl, each with its heat."""
    texts = dict.fromkeys(text for run in runs for text in run.get("retention") or {})
    measured = {text: [(run.get("retention") or {}).get(text) or {} for run in runs] for text in texts}
    if len(runs) < 2 and len(texts) < 3:
        return []
    values = {
        metric: {text: [_value(of_run, metric) for of_run in measured[text]] for text in texts}
        for metric in ("forgetting", "ref_kl")
    }
    most = {metric: max((abs(v) for row in rows.values() for v in row), default=0.0) for metric, rows in values.items()}
    order = sorted(texts, key=lambda text: -max(values["forgetting"][text]))
    return [
        {"text": text, "cells": [[_hot(of_run, metric, most[metric]) for metric in most] for of_run in measured[text]]}
        for text in order
    ]


def _value(metrics: dict, metric: str) -> float:
    return _number((metrics.get(metric) or {}).get("value"))


def _number(value: Any) -> float:
    return value if is_number(value) else 0.0


def _hot(metrics: dict, metric: str, most: float) -> dict[str, Any]:
    entry, value = metrics.get(metric) or {}, _value(metrics, metric)
    shown = cell(entry.get("value"), entry.get("ci"))
    sign = "+" if metric == "forgetting" and value > 0 else ""
    return {"value": sign + shown["value"], "interval": shown["interval"], "cool": value < 0, "heat": heat(value, most)}


def heat(value: float, full: float) -> int:
    """Percent of full strength; by the square root, so that small values are told apart."""
    return round(100 * math.sqrt(min(abs(value) / full, 1.0))) if full else 0


def worst_documents(runs: Sequence[dict]) -> tuple[list[dict[str, Any]], int]:
    """The documents that moved most, by text and run, as tokens to write out; and how many were left out for room.

    `runs` as they were read: a token's line break has to be seen and obeyed.
    """
    shown: dict[str, list[dict[str, Any]]] = {}
    room, left_out = MOST_TOKENS, 0
    for text in dict.fromkeys(text for run in runs for text in run.get("worst") or {}):
        for place, run in enumerate(runs):
            for row in (run.get("worst") or {}).get(text) or []:
                if len(row["tokens"]) > room:
                    left_out += 1
                else:
                    room -= len(row["tokens"])
                    shown.setdefault(text, []).append(_document(row, place))
    return [{"text": visible(text), "documents": documents} for text, documents in shown.items()], left_out


def _document(row: dict, place: int) -> dict[str, Any]:
    facts = {key: cell(row.get(key))["value"] for key in ("ref_kl", "forgetting")}
    tokens = [_token(token) for token in row["tokens"]]
    return {
        "run": place,
        "document": row.get("document"),
        "num_tokens": row.get("num_tokens"),
        "tokens": tokens,
        **facts,
    }


def _token(token: dict) -> dict[str, Any]:
    """A token to write out, its heat, whether the two models put different tokens first, and what the mouse reads."""
    losses = [cell(token.get(key))["value"] for key in ("base_loss", "loss", "ref_kl")]
    tops = [visible(str(token.get(key, ""))[:40]).replace("\\n", "⏎") for key in ("base_top", "tuned_top")]
    told = f"loss {losses[0]} → {losses[1]}, ref_kl {losses[2]}; first for the base: “{tops[0]}”, tuned: “{tops[1]}”"
    piece = visible_text(str(token.get("text", ""))[:200]).replace("\n", "⏎\n")
    return {"piece": piece, "heat": heat(_number(token.get("ref_kl")), FULL), "other": tops[0] != tops[1], "told": told}
