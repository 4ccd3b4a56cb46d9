"""Write a report into a model card: a section "Forgetting", and Hugging Face's `model-index` in the metadata."""

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
    """A model card, which may be empty, with a report's section added at its end or in place of an earlier one.

    In the metadata, the report's results replace those of an earlier report; other results stay.

    Raises:
        ValueError: if the card's metadata is not YAML.
    """
    before, _, rest = card.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\n")
    section = f"{BEGIN}\n{Page([run], 'Forgetting').model_card().strip()}\n{END}"
    text = f"{before.rstrip()}\n\n{section}\n{after}" if before.strip() else f"---\n{{}}\n---\n\n{section}\n{after}"
    parsed = _parsed(text)
    data = parsed.data  # the parser turns a `model-index` into `eval_results`
    kept = [result for result in data.eval_results or [] if not _is_from_a_report(result)]
    data.eval_results = [*kept, *_eval_results(run)] or None
    data.model_name = data.model_name or harmless(run).name
    return str(parsed)


def _is_from_a_report(result: Any) -> bool:
    """Whether a result in a card's metadata is of a report: one of our metrics with its interval."""
    return result.metric_type in (*INDEXED, *OF_ANSWERS) and "ci" in (result.metric_args or {})


def _parsed(text: str) -> Any:
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text)
    except Exception as error:  # YAML's errors, and the Hub client's own
        raise ValueError("model_card: its metadata between the lines --- is not YAML; correct it") from error


def check_card(path: str) -> None:
    """Refuse a path to which no card can be written, before anything is measured.

    Raises:
        ValueError: if it is a folder, its folder does not exist, it is not text, or its metadata is not YAML.
    """
    card = Path(path)
    if card.is_dir() or not card.absolute().parent.is_dir():
        raise ValueError(f"model_card: {path!r} is not a file in a folder; give the path of a README.md")
    try:
        _parsed(card.read_text(encoding="utf-8-sig") if card.exists() else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"model_card: {path!r} is not UTF-8 text; give another file") from error


def _eval_results(run: RunResults) -> list[Any]:
    """A report's numbers as results in a model card's metadata.

    Texts have the metrics that are `indexed`, question sets agreement and accuracy. Intervals are in the metrics'
    arguments, since the format has no field for them.
    """
    from huggingface_hub.repocard_data import EvalResult

    run = harmless(run)
    rows = [(name, key, key, getattr(result, key)) for name, result in run.texts.items() for key in INDEXED]
    for name, rule, answers in run.rules:
        rows += [(name, kind, f"{kind} ({rule})", getattr(answers, kind)) for kind in OF_ANSWERS]
    return [
        EvalResult(
            task_type="text-generation", dataset_type=_slug(name), dataset_name=name, dataset_config=name,
            metric_type=kind, metric_name=label, metric_value=float(estimate.value),
            metric_args={"ci": [float(end) for end in estimate.ci or ()]},
        )
        for name, kind, label, estimate in rows if estimate
    ]  # fmt: skip


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "text"
