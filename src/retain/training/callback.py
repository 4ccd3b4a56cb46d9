"""A callback that measures forgetting inside any transformers or TRL trainer; it adds no replay and changes nothing.

    callback = ForgettingCallback({"wiki": texts}, choices={"arc": questions}, tokenizer=tokenizer)
    trainer = SFTTrainer(..., callbacks=[callback])
    callback.trainer = trainer  # so that the values go through the trainer's own log, to W&B and the like

Each evaluation adds a point, learning against forgetting, to the files that `retain report` and `retain fit` read.
With `eval_on_start` the first point is the base itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from retain import versions
from retain.checks import check_named, check_number
from retain.data.rows import Document
from retain.files import read_settings
from retain.measuring.choices import Inputs, Question, as_questions, choice_scores, encode_questions, likeliest_choices
from retain.measuring.tokens import Forward
from retain.models.base_predictions import HiddenStates
from retain.models.description import (
    check_predicts_tokens,
    choose_start_token,
    differing_settings,
    max_positions,
    model_fingerprint,
    num_tuned,
)
from retain.models.head import HeadForm, find_head_form
from retain.models.reference import Reference, evaluation_mode, probe
from retain.training.protection import RETENTION_WINDOWS
from retain.training.retention import (
    RetentionMeasurer,
    check_best_metric,
    evaluated_batches,
    retention_documents,
    retention_names,
)
from retain.training.row_checks import check_not_trained_on, row_edges
from retain.training.run_files import named_base
from retain.training.trainer_checks import check_base_is_frozen, check_forward_passes, check_loads_everywhere

GIVE_BASE = "give base=the model before finetuning, as a second copy"


class ForgettingCallback(RetentionMeasurer):
    """Measure forgetting, `ref_kl`, `ref_agreement` and agreement with the base's own answers at each evaluation.

    The base is the model as the trainer receives it: with its adapter switched off, or else its hidden states on these
    texts and a copy of its output head. Training stops if this cannot be proven to be the base. Not for a trainer with
    `ReplayMixin`, which measures by itself.

    Args:
        retention: name → texts (or documents of tokens) on which forgetting is measured.
        choices: name → multiple-choice questions: from `load_questions`, or rows as in its files.
        base: the base, if the trainer does not receive it, e.g. because its adapter was trained before.
        tokenizer: by default the trainer's `processing_class`.
        max_documents: documents of each text, from its beginning; None for all.
        max_length: tokens of a document that are measured, as in `retain finetune`: its first window.
        choices_every: ask the questions at every n-th evaluation.
        choice_style, choice_chat_template: as in `measure`.
        start_token: the document start; chosen from the tokenizer by default.

    Attributes:
        trainer: if set, the values go through `trainer.log`; else only to the files, `log_history` and what `evaluate`
            returns.
        tables: optimizer step whose weights were measured → text → metric → what `measure` finds, with intervals.

    Raises:
        ValueError: in the trainer's constructor or at the start of training, if there is no base to compare with.
    """

    def __init__(
        self,
        retention: Mapping[str, Iterable[str] | Sequence[Document]] | None = None,
        *,
        choices: Mapping[str, Sequence[Question | Mapping[str, Any]]] | None = None,
        base: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_documents: int | None = 64,
        max_length: int = 512,
        choices_every: int = 1,
        choice_style: str = "text",
        choice_chat_template: bool = False,
        start_token: str | int | None = None,
    ) -> None:
        if not retention and not choices:
            raise ValueError("retention: nothing to measure; give texts, or choices")
        check_number("choices_every", choices_every, low=1, integer=True)
        if max_documents is not None:
            check_number("max_documents", max_documents, low=1, integer=True)
        check_named("retention", retention or {})
        super().__init__()
        self.retention, self.base = dict(retention or {}), base
        self.choices = {name: as_questions(name, rows) for name, rows in (choices or {}).items()}
        self.tokenizer, self.start_token = tokenizer, start_token
        self.max_documents, self.max_length, self.choices_every = max_documents, max_length, choices_every
        self.choice_form: dict[str, Any] = {"style": choice_style, "chat_template": choice_chat_template}
        self._inputs: dict[str, Inputs] = {}
        self._base_answers: dict[str, list[int]] = {}
        self._row_edges: set[int] = set()

    # Hooks

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the model as the base, before any checkpoint is loaded into it."""
        self._take_base(args, model, kwargs.get("processing_class"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.prepare(args, state, kwargs["model"], kwargs.get("processing_class"))
        assert self.reference is not None
        if state.global_step and self.reference.kind == "copy" and self.base is None:
            self._check_resumed(Path(args.output_dir), state.global_step)
        self.reference.to(args.device)
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        check_not_trained_on(dataset, self.documents, self._row_edges)
        super().on_train_begin(args, state, control, **kwargs)

    def _measure(self, step: int, args: Any, state: TrainerState, model: Any) -> dict[str, float]:
        is_due = len(self.tables) % self.choices_every == 0
        values = super()._measure(step, args, state, model)
        answers = self._answers(self._forwards(model)[1], args, args.device) if is_due else {}
        for name, chosen in answers.items():
            values[f"choices/{name}/agreement"] = float(np.mean(np.array(chosen) == self._base_answers[name]))
        return values

    # The base

    def prepare(self, args: TrainingArguments, state: TrainerState, model: Any, processing_class: Any) -> None:
        """Take the base now if the callback was added late; after the first step the model is no longer the base."""
        if self.reference is not None:
            return
        if state.global_step and self.base is None:
            raise ValueError(
                f"base: the model was trained for {state.global_step} steps before this callback saw it; give the "
                f"callback to the trainer's constructor (callbacks=[...]), or {GIVE_BASE}"
            )
        self._take_base(args, model, processing_class)

    def _take_base(self, args: TrainingArguments, model: Any, processing_class: Any) -> None:
        check_loads_everywhere(may_change=False)
        check_predicts_tokens(model)
        check_forward_passes(model, args)
        agreements = [f"choices/{name}/agreement" for name in self.choices] if self.choices_every == 1 else []
        check_best_metric(args, [*retention_names(self.retention), *agreements])
        tokenizer = self.tokenizer or getattr(processing_class, "tokenizer", processing_class)
        if tokenizer is None:
            raise ValueError("tokenizer: missing, and the trainer has no processing_class; give one to the callback")
        limit, start = max_positions(model), choose_start_token(tokenizer, self.start_token)
        self._row_edges = row_edges(tokenizer, start.id)
        max_length = min(self.max_length, limit or self.max_length)
        cut = {"tokenizer": tokenizer, "start_id": start.id, "max_length": max_length, "max_windows": RETENTION_WINDOWS}
        for name, source in self.retention.items():
            self.documents[name] = retention_documents(name, source, self.max_documents, **cut)
        for name, questions in self.choices.items():
            self._inputs[name] = encode_questions(questions, tokenizer, limit=limit, **self.choice_form)
        self.reference = self._given_base(model) if self.base is not None else self._proven_base(model, args)
        fingerprint = model_fingerprint(model) if self.base is None and self.reference.kind == "copy" else None
        self.settings = {
            "replay": {},
            "reference": "given" if self.base is not None else self.reference.kind,
            "base": named_base(model if self.base is None else self.base, fingerprint),
            "base_fingerprint": fingerprint,
            "num_params": num_tuned(model),
            "retention_windows": RETENTION_WINDOWS,
            "retention": {name: len(documents) for name, documents in self.documents.items()},
            "versions": versions(),
        }
        device = model.device
        self.reference.to(device)
        forward = self._forwards(model)[1 if fingerprint else 0]  # stored hidden states cover only the texts
        with evaluation_mode(model):
            self._base_answers = self._answers(forward, args, device)

    def _given_base(self, model: Any) -> Reference:
        base: Any = self.base
        if Reference(base).changes_with(model):
            raise ValueError(f"base: it shares weights with the model being trained, so it changes too; {GIVE_BASE}")
        for name, base_value, model_value in differing_settings(base, model):
            raise ValueError(f"base: its {name} is {base_value}, the model's {model_value}; load both alike")
        return Reference(base.eval())

    def _proven_base(self, model: Any, args: TrainingArguments) -> Reference:
        """The base inside the model, proven to predict what the model predicts now."""
        with self._autocast(model.device):
            reference = Reference(None if hasattr(model, "disable_adapter") else self._store_base(model, args))
            try:
                reference.prove(model, probe(model))
                if reference.kind == "adapter":
                    check_base_is_frozen(model)
            except ValueError as error:
                raise ValueError(
                    "base: the trainer's model does not give its base (the base is trained too, or the adapter was "
                    f"trained before); {GIVE_BASE}"
                ) from error
        return reference

    def prove_reference(self, model: Any, state: TrainerState) -> None:
        try:
            super().prove_reference(model, state)
        except ValueError as error:
            raise ValueError(
                f"base: its predictions at step {state.global_step} differ from those when training started (was an "
                f"adapter merged into it?); {GIVE_BASE}"
            ) from error

    def _store_base(self, model: Any, args: TrainingArguments) -> HiddenStates:
        """The base's hidden states, computed in the batches of later comparisons, so that KL starts at exactly 0."""
        form: HeadForm | None = None if is_deepspeed_zero3_enabled() else find_head_form(model)
        if form is None:
            raise ValueError(f"base: stored hidden states need a plain output head and no ZeRO-3; {GIVE_BASE}")
        head = form.frozen(model.get_output_embeddings())
        return HiddenStates.of(model, head, evaluated_batches(args, self.documents))

    def _check_resumed(self, folder: Path, step: int) -> None:
        """Check that the trainer received the base that the run's files name, not a model from the checkpoint."""
        if read_settings(folder).get("base_fingerprint") != self.settings["base_fingerprint"]:
            raise ValueError(
                f"base: training resumes at step {step}, but the trainer's model is not known to be the one that the "
                f"run started with; {GIVE_BASE}"
            )

    def _answers(self, forward: Forward, args: TrainingArguments, device: torch.device) -> dict[str, list[int]]:
        """The model's choice for each question; written-out choices are scored per character, letters are not."""
        rule, num_rows = "acc_norm" if self.choice_form["style"] == "text" else "acc", args.per_device_eval_batch_size
        answers = {}
        for name, inputs in self._inputs.items():
            longest = max(map(len, inputs.rows))
            scores = choice_scores(forward, inputs, batch_tokens=num_rows * longest, device=device)
            answers[name] = likeliest_choices(scores, inputs.lengths, rule)
        return answers
