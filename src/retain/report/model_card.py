"""A report's numbers in a model card: the section "Forgetting", and Hugging Face's `model-index` in the metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retain.metrics import TABLE_METRICS
from retain.report import tables
from retain.report.answers import rules_of
from retain.report.numbers import bounds_of, is_number
from retain.report.report import model_card_section, shortened
from retain.text import visible

BEGIN, END = "<!-- retain: forgetting -->", "<!-- end of forgetting -->"


def card_with_forgetting(card: str, data: dict) -> str:
    """A model card (or nothing yet) with what a report found: put in place of what stood there before, else at its end.

    Raises:
        ValueError: if the card's metadata is no YAML.
    """
    before, _, rest = card.partition(BEGIN)
    after = rest.partition(END)[2]
    section = f"{BEGIN}\n{model_card_section(data).strip()}\n{END}"
    text = f"{before.rstrip()}\n\n{section}\n{after}" if before.strip() else f"---\n{{}}\n---\n\n{section}\n{after}"
    found = _parsed(text)
    found.data["model-index"] = model_index(data)
    return str(found)


def _parsed(text: str) -> Any:
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text)
    except Exception as error:  # YAML's errors, and the Hub client's own
        raise ValueError("model_card: its metadata between the lines --- is no YAML; mend it") from error


def check_card(path: str) -> None:
    """Refuse a path where no card can be written, before anything is measured.

    Raises:
        ValueError: if it is a folder, lies in none, is not text, or holds metadata that is no YAML.
    """
    card = Path(path)
    if card.is_dir() or not card.absolute().parent.is_dir():
        raise ValueError(f"model_card: {path!r} is not a file in a folder; give the path of a README.md")
    try:
        _parsed(card.read_text(encoding="utf-8") if card.exists() else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"model_card: {path!r} is not UTF-8 text; give another file") from error


def model_index(data: dict) -> list[dict[str, Any]]:
    """The numbers of a report as Hugging Face's `model-index`, the value of that key in a model card's metadata.

    Per text the metrics that are `indexed`; per set of questions agreement and accuracy. Intervals are
    arguments of each metric: the format has no place of its own for them.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    data = visible(shortened(data))
    texts = [(name, metrics) for kind in tables.KINDS for name, metrics in (data.get(kind) or {}).items()]
    found = [
        (name, key, key, metrics[key])
        for name, metrics in texts
        for key, metric in TABLE_METRICS.items()
        if metric.indexed and metrics.get(key)
    ]
    found += [(name, key, f"{key} ({rule})", asked[key]) for name, rule, asked in rules_of(data)
              for key in ("agreement", "accuracy") if asked.get(key)]  # fmt: skip
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=_slug(name), dataset_name=name, dataset_config=name,
            metric_type=kind, metric_name=words, metric_value=float(entry["value"]),
            metric_args={"ci": [float(end) for end in bounds_of(entry.get("ci")) or ()]},
        )
        for name, kind, words, entry in found if is_number(entry.get("value"))
    ]  # fmt: skip
    return eval_results_to_model_index(data["name"], results) if results else []


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "text"
