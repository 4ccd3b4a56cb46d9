"""What protects a run: replay rows, and the frozen base or its stored predictions."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from retain import versions
from retain.checks import Unchosen
from retain.data.overlap import find_rows
from retain.data.rows import Document
from retain.losses import Head
from retain.models.base_predictions import HiddenStates
from retain.models.description import (
    StartToken,
    check_predicts_tokens,
    choose_start_token,
    length_that_fits,
    model_fingerprint,
    num_tuned,
    tokenizer_fingerprint,
)
from retain.models.head import HeadForm, find_head_form
from retain.models.loading import load_tokenizer
from retain.models.reference import Reference, check_same_model, probe
from retain.replay.dataset import ReplayDataset, load_replay_dataset, verify_replay
from retain.replay.stored_predictions import ReferenceCache
from retain.report.numbers import quantity
from retain.training.anchor import Anchor, check_anchor
from retain.training.config import ReplayConfig
from retain.training.joint_forward import JointForward
from retain.training.objectives import NONE
from retain.training.proofs import has_moved, prove_adapter_off, prove_own_rows, prove_stored
from retain.training.replay_term import ReplayTerm
from retain.training.retention import NEW_TASK_TEXT, evaluated_batches, new_task_documents, retention_documents
from retain.training.row_checks import (
    check_held_out,
    check_invoked,
    check_not_trained_on,
    check_positions,
    check_rows_fit,
    row_edges,
    rows_fingerprint,
    training_rows,
    warn_of_trained_rows,
)
from retain.training.run_files import named_base
from retain.training.trainer_checks import (
    check_base_is_frozen,
    check_devices,
    check_forward_passes,
    check_loads_everywhere,
    check_unsharded,
    expected_steps,
)

logger = logging.getLogger(__name__)

RETENTION_WINDOWS = 1  # windows measured per retention document: many documents say more than many windows
ONE_STEP = "protection: none (a run of one step: there the model is its base, and KL has no gradient)"


class Protection:
    """Rows, texts and reference of a run: checked before the host trainer is built, and proven once it is.

    Args:
        model: the base, as the user passed it in.
        args: the host's training arguments.
        rows: a `ReplayDataset`, the path of one or of real text, or None.
        retention: name → texts, or documents of tokens.
        host: the host trainer's other arguments; `processing_class` and `peft_config` are read.

    Attributes:
        base: how the run's files name the base.
        documents: retention documents by the name of their text.
        new_task: held-out rows of the new task, measured like the documents.
        reference: the frozen base; None if nothing is compared with it, or its stored predictions suffice.
        cache: the base's predictions stored with the rows, if training uses them in place of the reference.
        term: the sums that the objective is built from, once the reference is proven.
        joint: runs replay rows through the host's forward pass, if its model allows it.
        anchor: the base's Fisher information, once it is estimated from the rows.
    """

    term: ReplayTerm
    _kl_before: dict[int, Tensor] | None = None  # `stored_kl` before training
    joint: JointForward | None = None
    anchor: Anchor | None = None

    def __init__(
        self,
        config: ReplayConfig,
        model: Any,
        args: Any,
        rows: Any,
        retention: Mapping[str, Any],
        start_token: str | int | None,
        host: Mapping[str, Any],
    ) -> None:
        self.config, self.objective = config, config.objective
        check_loads_everywhere(may_change=False)
        check_unsharded(model)
        if config.protects or retention:
            check_predicts_tokens(model)
        self.rows: ReplayDataset | None = None
        self.documents: dict[str, list[Document]] = {}
        self.new_task: list[Document] = []
        self.reference: Reference | None = None
        self._row_edges: set[int] = set()  # tokens that open or close rows
        self._rows_are_own, self._start_token = True, ""  # whether the model itself wrote the rows
        fingerprint = model_fingerprint(model)
        self.base = named_base(model, fingerprint)
        if rows is not None or retention:
            tokenizer = _tokenizer(host.get("processing_class"), model)
            start = choose_start_token(tokenizer, start_token)
            self._load(model, fingerprint, args, rows, retention, tokenizer, start)
        self._check_rows(model)
        has_adapter = host.get("peft_config") is not None or hasattr(model, "disable_adapter")
        self.cache = self._stored_predictions()
        measured, compared = bool(self.documents), self.objective.uses_reference
        if compared or measured or config.anchor_coef:
            self._base_probe = probe(model)
        if (measured and has_adapter) or ((measured or compared) and self.cache is None):
            self.reference = self._make_reference(model, has_adapter=has_adapter)

    def _load(
        self,
        model: Any,
        fingerprint: str,
        args: Any,
        rows: Any,
        retention: Mapping[str, Any],
        tokenizer: Any,
        start: StartToken,
    ) -> None:
        max_length = self.config.replay_max_length or Unchosen(getattr(args, "max_length", None) or 512)
        max_length = length_that_fits(model, max_length, "replay_max_length")
        if isinstance(rows, (str, Path)):
            rows = load_replay_dataset(str(rows), tokenizer, start.id, max_length)
        if not isinstance(rows, ReplayDataset | None):
            raise ValueError(
                f"replay_dataset: got a {type(rows).__name__}; give a folder of `retain sample`, a file of text, "
                "or ReplayDataset.from_rows(token ids)"
            )
        if rows is not None and rows.manifest is not None:
            warning = verify_replay(
                rows.manifest,
                model_fingerprint=fingerprint,
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                allow_off_policy=self.config.allow_off_policy_replay,
            )
            if warning:
                self._rows_are_own = False
                logger.warning(warning)
        self.rows, self._row_edges, self._start_token = rows, row_edges(tokenizer, start.id), start.token
        cut = {"start_id": start.id, "max_length": max_length, "max_windows": RETENTION_WINDOWS}
        for name, source in retention.items():
            self.documents[name] = retention_documents(name, source, tokenizer=tokenizer, **cut)
        logger.info("document start: %s", start)

    def _check_rows(self, model: Any) -> None:
        if not (self.config.protects or self.config.is_baseline):
            logger.warning("replay_coef is 0: this run is not protected against forgetting")
        if not self.config.needs_rows:
            return
        if self.rows is None:
            needed = f"replay_objective {self.objective.name!r}" if self.objective.draws_rows else "anchor_coef"
            zero = "replay_coef and anchor_coef" if self.config.anchor_coef else "replay_coef"
            raise ValueError(
                f"replay_dataset: missing, and {needed} needs it; give rows, or set {zero} 0 to finetune without "
                "protection"
            )
        check_rows_fit(self.rows, model)
        check_held_out(self.rows, self.documents, "replay dataset", self._row_edges)

    def _stored_predictions(self) -> ReferenceCache | None:
        """The base's predictions stored with the replay rows, if they can take the place of the reference."""
        objective, source = self.objective, self.config.replay_reference
        if not objective.uses_reference or source not in ("auto", "cache"):
            return None
        if objective.takes_stored and self.rows is not None and self.rows.cache is not None and self._rows_are_own:
            self.rows.cache.check_whole()
            return self.rows.cache
        if source == "auto":
            return None
        why = "no usable predictions are stored" if objective.takes_stored else f"{objective.name!r} reads none stored"
        raise ValueError(
            f"replay_reference: 'cache', but {why}; use auto, or rows that this model drew with "
            "`retain sample --store_reference hidden`"
        )

    def _make_reference(self, model: Any, *, has_adapter: bool) -> Reference:
        """The model with its present or future adapter switched off, else a frozen copy of it."""
        chosen = self.config.replay_reference
        if chosen == "adapter" and not has_adapter:
            raise ValueError("replay_reference: 'adapter', but there is no adapter; use copy, or --use_peft")
        if chosen != "copy" and has_adapter:
            return Reference()
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "replay_reference: a copy under DeepSpeed ZeRO-3 is not supported; use an adapter or FSDP2"
            )
        return Reference.copy_of(model)

    # Once the host trainer is built

    def prove(self, trainer: Any, new_task_rows: int = 0) -> None:
        """Prove that the reference, or what was stored of it, is the base; set up the replay term and the anchor."""
        model, rows, accelerator = trainer.model, self.rows, trainer.accelerator
        self._check_host(trainer)
        if self.documents and new_task_rows:
            tokenizer = _tokenizer(trainer.processing_class, model)
            self.new_task = new_task_documents(trainer.eval_dataset, new_task_rows, tokenizer)
        form = find_head_form(model) if self.objective.adds_term else None
        if form is None and self._can_use_adapter_instead(model):
            self.cache, self.reference = None, Reference()
        ref_head = self._prove_reference(trainer, form)
        self.term = ReplayTerm(form, self.reference, ref_head, accelerator.autocast)
        if form is not None and self.objective.draws_rows:
            self.joint = JointForward.of(trainer)
        if self.cache is not None:
            assert rows is not None
            self._kl_before = prove_stored(self.term, rows, model, accelerator)
            self.term.to(accelerator.device)
        elif rows is not None and rows.log_probs is not None and self._rows_are_own and self.config.needs_rows:
            off_policy = self.config.allow_off_policy_replay
            prove_own_rows(rows, model, accelerator, self.reference, allow_off_policy=off_policy)
        if self.config.anchor_coef:
            assert rows is not None
            check_anchor(trainer.args, trainer)
            if hasattr(model, "disable_adapter"):
                prove_adapter_off(model, self._base_probe)
            rank = self.config.anchor_rank
            self.anchor = Anchor.measure(model, rows, trainer.args.seed, accelerator.autocast, rank)

    def _prove_reference(self, trainer: Any, form: HeadForm | None) -> Head | None:
        """Prove the reference, stored now if texts need it; the base's own head, if stored hidden states need it."""
        model, accelerator = trainer.model, trainer.accelerator
        measured = self.documents | ({NEW_TASK_TEXT: self.new_task} if self.new_task else {})
        ref_head, texts = None, evaluated_batches(trainer.args, measured) if self.reference is None else []
        if texts or (self.cache is not None and self.cache.kind == "hidden"):
            if form is None:
                raise ValueError(
                    "replay_reference: stored predictions need a plain output head, and this one has an adapter or "
                    "another form; use adapter or copy, or sample with --store_reference topk and measure no texts"
                )
            module = model.get_output_embeddings()
            ref_head = form.frozen(module) if texts or module.weight.requires_grad else None
        if texts:
            assert ref_head is not None
            with accelerator.autocast():  # in the precision of training; the model was proven to be the base
                self.reference = Reference(HiddenStates.of(model, ref_head, texts))
                self.reference.to(accelerator.device)
                self.reference.prove(model, probe(model))
        elif self.reference is not None:
            self.reference.to(model.device)
            self.reference.prove(model, self._base_probe)
            self.reference.settle(accelerator)
            if self.reference.kind == "adapter":
                check_base_is_frozen(model)
        return ref_head

    def _can_use_adapter_instead(self, model: Any) -> bool:
        """Whether stored hidden states were chosen automatically and the model's adapter can be switched off."""
        stored = self.cache is not None and self.cache.kind == "hidden"
        return stored and self.config.replay_reference == "auto" and hasattr(model, "disable_adapter")

    def _check_host(self, trainer: Any) -> None:
        model, rows, objective = trainer.model, self.rows, self.objective
        check_devices(trainer)
        drawn = rows.num_predictions + rows.prefix_lengths if rows is not None and self.config.needs_rows else []
        texts = self.documents.values()
        windows = [len(window) for documents in texts for document in documents for window in document.windows]
        check_positions(model, [*windows, *drawn])
        dataset = getattr(trainer, "train_dataset", None)  # tokenised by now
        check_not_trained_on(dataset, self.documents, self._row_edges)
        if not self.config.is_baseline:  # the protected run has warned already
            warn_of_trained_rows(getattr(trainer, "eval_dataset", None), dataset, self._row_edges)
        if rows is not None and rows.manifest is None and self.config.needs_rows:  # real text
            new = find_rows(list(rows), training_rows(dataset), self._row_edges)
            if 2 * len(new) > len(rows):
                logger.warning(
                    "replay_dataset: %d of %s are rows of the new task: they slow its learning and protect nothing "
                    "else; give text that the model should not forget", len(new), quantity(len(rows), "row"),
                )  # fmt: skip
        if objective.uses_reference or self.documents:
            check_same_model(model, self._base_probe)
        if objective.adds_term or self.documents:
            check_forward_passes(model, trainer.args)
        if rows is not None and objective.draws_rows:
            check_invoked(model, rows)

    # What the trainer asks for

    def has_moved(self, model: Any) -> bool:
        """Whether the model predicts any replay row differently from its base: see `proofs.has_moved`."""
        assert self.rows is not None
        return has_moved(self.term, self.rows, model, self._kl_before)

    def batch(self, indices: Any, device: torch.device) -> dict[str, Any]:
        """Rows as tensors: `input_ids`, `labels`, and the base's predictions as `stored`, if training uses them."""
        assert self.rows is not None
        batch: dict[str, Any] = {name: value.to(device) for name, value in self.rows.batch(indices).items()}
        if self.cache is not None:
            batch["stored"] = {name: value.to(device) for name, value in self.cache.batch(indices).items()}
        return batch

    @property
    def reference_kind(self) -> str | None:
        """Where the base's predictions on replay rows come from: adapter, copy or cache."""
        if self.cache is not None:
            return f"cache ({self.cache.kind})"
        return self.reference.kind if self.reference is not None else None

    def settings(self, trainer: Any) -> dict[str, Any]:
        """What `retain_config.json` holds besides the training arguments."""
        rows, resolved = self.rows, {}
        if rows is not None and self.objective.draws_rows:  # the values that defaults resolved to
            resolved = {"replay_max_length": int(np.diff(rows.offsets).max()), "start_token": self._start_token}
            if self.objective.adds_term:
                resolved["per_device_replay_batch_size"] = trainer.replay_batch_size
            if self.objective.uses_reference:
                resolved["replay_reference"] = str(self.reference_kind).split()[0]  # without the cache's kind
        dataset = None
        if rows is not None:
            dataset = {"source": rows.source, "num_rows": len(rows), "manifest": rows.manifest}
        return {
            "replay": dataclasses.asdict(self.config) | resolved,
            "replay_dataset": dataset,
            "new_rows": rows_fingerprint(getattr(trainer, "train_dataset", None)),
            "base": self.base,
            "reference": self.reference_kind,
            "num_params": num_tuned(trainer.model),
            "loss_tokens": _loss_tokens(trainer),
            "retention_windows": RETENTION_WINDOWS,
            "retention": {name: len(documents) for name, documents in self.documents.items()},
            "versions": versions(),
        }

    def lines(self, trainer: Any) -> list[str]:
        """Lines that say what protects the run, printed before it starts."""
        rows, objective, config = self.rows, self.objective, self.config
        unused = [f"replay: {quantity(len(rows), 'row')} given, and not used"] if rows is not None else []
        dataset = getattr(trainer, "train_dataset", None)
        anchor = [self.anchor.line(config)] if self.anchor is not None else []
        if objective is NONE:
            return anchor or ["protection: none (replay_coef 0)", *unused]
        if objective.uses_reference and expected_steps(trainer.args, dataset) == 1:
            return [ONE_STEP]
        lines = [f"protection: {objective.name}, {objective.strength(config)}", *anchor]
        if objective.uses_reference:
            lines[0] += f", reference {self.reference_kind} (proven to be the base)"
        if trainer.is_fsdp_enabled and self.reference is not None and self.reference.kind == "copy":
            lines.append(
                f"reference: a copy, sharded like the model, {self.reference.num_bytes / 1e9:.1f} GB a device; an "
                "adapter, or rows sampled with --store_reference hidden, need none"
            )
        if not objective.draws_rows:
            return [*lines, *(f"{line} by replay_objective {objective.name}" for line in unused)]
        assert rows is not None
        kind = "real text" if rows.manifest is None else f"self-generated by {rows.manifest['model']}"
        when = f", every {config.replay_every} steps" if config.replay_every > 1 else ""
        when += f", after {config.replay_start:.0%} of the steps" if config.replay_start else ""
        per_step = f"{trainer.replay_batch_size} per device and micro-batch{when}"
        lines.append(f"replay: {quantity(len(rows), 'row')}, {kind}; {per_step}")
        if _openings_differ(dataset, rows):
            lines.append(
                "new rows do not open with the document start, and replay rows do: measure forgetting on answers to "
                "prompts, too (retain measure --prompts)"
            )
        return lines


def check_replay_every(config: ReplayConfig, steps: int) -> None:
    """Raise a `ValueError` if only the first step would have replay, at which the model is still its base."""
    if config.objective.uses_reference and 1 < config.replay_every >= steps:
        raise ValueError(
            f"replay_every: {config.replay_every} of {steps} steps is the first one only, where the model is its "
            "base and KL has no gradient; use a smaller one"
        )


def _openings_differ(dataset: Any, rows: ReplayDataset) -> bool:
    """Whether no training row opens like a replay row, among the first 16 of each: the model can tell them apart."""
    new, replayed = ({int(row[0]) for row in itertools.islice(some, 16)} for some in (training_rows(dataset), rows))
    return bool(new) and not new & replayed


def _loss_tokens(trainer: Any) -> str | None:
    """The tokens of a row that the loss of TRL's `SFTTrainer` counts; None for hosts with another loss."""
    completions = getattr(trainer, "completion_only_loss", None)
    if completions is None:
        return None
    return "assistant turns" if trainer.args.assistant_only_loss else "completions" if completions else "all"


def _tokenizer(processing_class: Any, model: Any) -> Any:
    if processing_class is not None:
        return getattr(processing_class, "tokenizer", processing_class)
    name = model.config._name_or_path
    if not name:
        raise ValueError("processing_class: missing, and the model has no name to load a tokenizer by; pass one")
    return load_tokenizer(name)
