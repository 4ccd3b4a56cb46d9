"""Retention metrics inside a trainer: forgetting on held-out texts at every evaluation, and in the model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retain import versions
from retain.data.rows import Document
from retain.measuring.tokens import logits_at
from retain.models.reference import Reference
from retain.report.numbers import number
from retain.report.report import ForgettingReport
from retain.training.config import ReplayConfig
from retain.training.evaluation import Sets, Tables, add_to_metrics, evaluated_set, logged, measure_texts
from retain.training.run_files import weights_step

if TYPE_CHECKING:  # what the mixin stands on; at run time the host class comes after it
    from transformers import Trainer as Host
else:
    Host = object


class RetentionMixin(Host):
    """Measure the model being trained against its frozen base on named texts.

    `retention_documents` (name → documents) and `reference` are set by the class that mixes this in.
    """

    replay_config: ReplayConfig
    reference: Reference | None
    retention_documents: dict[str, list[Document]]

    def __init__(self, **kwargs: Any) -> None:
        self._retention_tables: dict[int, Tables] = {}  # by the optimizer step whose weights were measured
        self._retention_sets: Sets = {}
        self._retention_is_logged = True
        super().__init__(**kwargs)

    def prove_reference_again(self) -> None:
        """Show that the reference still gives what it gave when training began."""
        raise NotImplementedError

    def ref_logits(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The base's logits, without gradient or dropout, shape (rows, length, vocab)."""
        assert self.reference is not None
        unwrapped = self.accelerator.unwrap_model(model)
        with self.reference.base(model, unwrapped, self.accelerator.autocast) as base:
            return logits_at(base, inputs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The host's training; what was measured before it is of other weights."""
        self._retention_tables, self._retention_sets = {}, {}
        return super().train(*args, **kwargs)

    @property
    def weights_step(self) -> int:
        """The optimizer step whose weights the model holds: the best one where `load_best_model_at_end` restored it."""
        return weights_step(self.args, self.state, is_in_train=self.is_in_train)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The host's evaluation and, once a step, forgetting on every retention text, with the host's prefix, too."""
        metrics = super().evaluate(*args, **kwargs)
        return {**metrics, **self.evaluate_retention()}

    def evaluate_retention(self) -> dict[str, float]:
        """Measure every retention text against the base, log it, and keep the per-document sums.

        Returns:
            `retention/<name>/loss`, `/forgetting` and `/ref_kl` in nats per token, `/ref_agreement` as a share.
        """
        logs = self._retention_values()
        if not self._retention_is_logged and self.weights_step == self.state.global_step:
            self.log(dict(logs))  # logs belong to the step that the host is at
        self._retention_is_logged = True
        return logs

    def _retention_values(self) -> dict[str, float]:
        step = self.weights_step
        if step not in self._retention_tables and self.retention_documents:
            self._retention_tables[step] = self._measure_all(step)
            self._retention_is_logged = False
        return logged(self._retention_tables.get(step, {}))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The host's; an evaluation's values are then joined by those of retention, before any callback reads them."""
        super().log(logs, start_time)
        if self.retention_documents and evaluated_set(logs) is not None:
            add_to_metrics(logs, self._retention_values(), self.weights_step, self._retention_sets)

    def _measure_all(self, step: int) -> Tables:
        self.prove_reference_again()
        self.model.eval()  # as the host's evaluation leaves it
        texts, point = self.retention_documents, {"args": self.args, "state": self.state, "step": step}
        return measure_texts(lambda **batch: self.ref_logits(self.model, batch), self._logits, texts, **point)

    def _logits(self, **batch: Tensor) -> Tensor:
        with self.accelerator.autocast():  # the dtype of training, even where the host has not wrapped the model yet
            return logits_at(self.model, batch)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The host's model card and a table of forgetting, where it was measured."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        table = self._retention_table()
        if not (self.is_world_process_zero() and table and path.exists()):
            return
        name = self.model.name_or_path or type(self.model).__name__
        data = {
            "name": path.parent.name,
            "base": {"model": name},
            "retention": table,
            "training": {"step": self.weights_step, **dataclasses.asdict(self.replay_config)},
            "settings": {"seed": self.args.seed},
            "versions": versions(),
        }
        ForgettingReport(data).to_model_card(path)

    def _retention_table(self) -> dict[str, Any]:
        """The newest measurement, or that of the weights which the model holds now."""
        newest: dict[str, Any] = next(reversed(self._retention_tables.values()), {})
        return self._retention_tables.get(self.weights_step, newest)

    def retention_lines(self) -> list[str]:
        """What was forgotten, a line for each retention text, with 95% intervals over documents."""
        return [
            f"retention/{name}: "
            + ", ".join(_with_interval(metric, table[metric]) for metric in ("forgetting", "ref_kl"))
            for name, table in self._retention_table().items()
        ]


def _with_interval(name: str, metric: dict[str, Any]) -> str:
    shown = number(metric)
    return f"{name} {shown['value']} {shown['interval']}".rstrip()
