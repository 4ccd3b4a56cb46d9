"""A report's numbers in a model card: the section "Forgetting", and Hugging Face's `model-index` in the metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from retain.report.metrics import TABLE_METRICS
from retain.report.page import Page, harmless
from retain.report.results import RunResults

OF_ANSWERS = ("agreement", "accuracy")
INDEXED = tuple(name for name, metric in TABLE_METRICS.items() if metric.indexed)
BEGIN, END = "<!-- retain: forgetting -->", "<!-- end of forgetting -->"


def card_with_forgetting(card: str, run: RunResults) -> str:
    """A model card (or nothing yet) with what a report found: put in place of what stood there before, else at its end.

    In the metadata, too, its numbers take the place of an earlier report's; results of others stay.

    Raises:
        ValueError: if the card's metadata is no YAML.
    """
    before, _, rest = card.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\n")
    section = f"{BEGIN}\n{Page([run], 'Forgetting').model_card().strip()}\n{END}"
    text = f"{before.rstrip()}\n\n{section}\n{after}" if before.strip() else f"---\n{{}}\n---\n\n{section}\n{after}"
    found = _parsed(text)
    data = found.data  # of a card with a `model-index`, that is its `eval_results`, and not the key
    kept = [one for one in data.eval_results or [] if not _is_of_a_report(one)]
    data.eval_results = [*kept, *_eval_results(run)] or None
    data.model_name = data.model_name or harmless(run).name
    return str(found)


def _is_of_a_report(result: Any) -> bool:
    """Whether a result in a card's metadata is one that `model_index` writes: a metric of ours with its interval."""
    return result.metric_type in (*INDEXED, *OF_ANSWERS) and "ci" in (result.metric_args or {})


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
        _parsed(card.read_text(encoding="utf-8-sig") if card.exists() else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"model_card: {path!r} is not UTF-8 text; give another file") from error


def model_index(run: RunResults) -> list[dict[str, Any]]:
    """The numbers of a report as Hugging Face's `model-index`, the value of that key in a model card's metadata.

    Per text the metrics that are `indexed`; per set of questions agreement and accuracy. Intervals are
    arguments of each metric: the format has no place of its own for them.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = _eval_results(run)
    return eval_results_to_model_index(harmless(run).name, results) if results else []


def _eval_results(run: RunResults) -> list[Any]:
    from huggingface_hub.repocard_data import EvalResult

    run = harmless(run)
    found = [(name, key, key, getattr(result, key)) for name, result in run.texts.items() for key in INDEXED]
    for name, rule, answers in run.rules:
        found += [(name, kind, f"{kind} ({rule})", getattr(answers, kind)) for kind in OF_ANSWERS]
    return [
        EvalResult(
            task_type="text-generation", dataset_type=_slug(name), dataset_name=name, dataset_config=name,
            metric_type=kind, metric_name=label, metric_value=float(one.value),
            metric_args={"ci": [float(end) for end in one.ci or ()]},
        )
        for name, kind, label, one in found if one
    ]  # fmt: skip


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "text"
