"""What goes into a protected run: replay rows, retention texts and the frozen base; and the proof that it protects."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from retain import versions
from retain.checks import Unchosen
from retain.data.overlap import find_rows
from retain.data.rows import as_documents, without_copies
from retain.losses import Head
from retain.models.base_predictions import HiddenStates
from retain.models.description import (
    check_predicts_tokens,
    choose_start_token,
    length_that_fits,
    model_fingerprint,
    num_tuned,
    tokenizer_fingerprint,
)
from retain.models.head import find_head_form, reshard
from retain.models.loading import load_model, load_tokenizer
from retain.models.reference import Reference, check_same_model, evaluation_mode, probe
from retain.replay.dataset import ReplayDataset, load_replay_dataset, verify_replay
from retain.replay.own_rows import check_pool
from retain.report.numbers import quantity
from retain.training.evaluation import evaluated_batches
from retain.training.objectives import NONE
from retain.training.protection import (
    check_base_is_frozen,
    check_devices,
    check_forward_passes,
    check_held_out,
    check_invoked,
    check_not_trained_on,
    check_positions,
    check_rows_fit,
    check_whole,
    expected_steps,
    loaded_whole,
    make_reference,
    row_edges,
    see_the_base_everywhere,
    takes_cache,
    training_rows,
)
from retain.training.replay_term import ReplayTerm, stored_error
from retain.training.retention import RetentionMixin

logger = logging.getLogger(__name__)

RETENTION_WINDOWS = 1  # of each retention text's documents, measured at every evaluation: many documents, at their cost

# Most nats per token by which stored predictions may differ from the model's own before training.
STORED_TOLERANCE, STORED_TOLERANCE_HALF = 1e-4, 2e-2


class ProtectedInputs(RetentionMixin):
    """Rows, texts and reference of a run, checked before the host trainer is built and proven after."""

    replay_dataset: ReplayDataset | None
    replay_term: ReplayTerm

    def take_inputs(
        self, model: Any, args: Any, replay: Any, retention: dict[str, Any], start_token: Any, kwargs: dict[str, Any]
    ) -> None:
        """Load and check everything that needs the model as it was handed over: the base.

        Raises:
            ValueError: whenever protection could not do what was asked.
        """
        config = self.replay_config
        see_the_base_everywhere(may_change=False)
        check_whole(model)
        if config.objective is not NONE or retention:
            check_predicts_tokens(model)
        self.replay_dataset, self.retention_documents, self.reference = None, {}, None
        self._row_edges: set[int] = set()  # tokens that open or close rows
        self._own_rows, self._start_token = True, ""
        if replay is not None or retention:
            tokenizer = _tokenizer(kwargs.get("processing_class"), model)
            self._own_rows = self._load_rows(model, tokenizer, replay, retention, args, start_token)
        self._check_rows(model)
        has_adapter = kwargs.get("peft_config") is not None or hasattr(model, "disable_adapter")
        self.uses_cache = takes_cache(config, self.replay_dataset, own_rows=self._own_rows)
        if config.objective.uses_reference or self.retention_documents:
            self._base_probe = probe(model)
        measured = bool(self.retention_documents)
        if (measured and has_adapter) or ((measured or config.objective.uses_reference) and not self.uses_cache):
            self.reference = make_reference(config, model, has_adapter=has_adapter)

    def prove_reference(self) -> None:
        """Show that the reference, or what was stored of it, is the base, now that the host trainer is built.

        Raises:
            ValueError: if it is not.
        """
        config, model, rows = self.replay_config, self.model, self.replay_dataset
        check_devices(self)
        texts = self.retention_documents.values()
        windows = [len(window) for documents in texts for document in documents for window in document.windows]
        drawn = rows.num_predictions + rows.prefix_lengths if rows is not None and config.objective.draws_rows else []
        check_positions(model, [*windows, *drawn])
        dataset = getattr(self, "train_dataset", None)  # its rows are tokenised by now
        check_not_trained_on(dataset, self.retention_documents, self._row_edges)
        if rows is not None and rows.manifest is None and config.objective.draws_rows:  # real text
            new = find_rows([rows[at] for at in range(len(rows))], training_rows(dataset), self._row_edges)
            if 2 * len(new) > len(rows):
                logger.warning(
                    "replay_dataset: %d of %s are rows of the new task: they hold the model back there and protect "
                    "nothing else; give text that it should keep", len(new), quantity(len(rows), "row"),
                )  # fmt: skip
        if config.objective.uses_reference or self.retention_documents:
            check_same_model(model, self._base_probe)
        if config.objective.adds_term or self.retention_documents:
            check_forward_passes(model, self.args)
        if rows is not None and config.objective.draws_rows:
            check_invoked(model, rows)
        form = find_head_form(model) if config.objective.adds_term else None
        module, ref_head = model.get_output_embeddings(), None
        if self.reference is None and self.retention_documents:
            if form is None:
                raise ValueError(
                    "replay_reference: 'cache' with retention texts needs a plain output head on the model; use adapter"
                    " or copy"
                )
            ref_head = form.frozen(module)
            self.reference = self._remember(ref_head)
        elif self.reference is not None:
            self.reference.to(self.accelerator.device)
            self.reference.prove(model, self._base_probe)
            if self.reference.kind == "adapter":
                check_base_is_frozen(model)
        if self.uses_cache and rows is not None and rows.cache is not None and rows.cache.kind == "hidden":
            if form is None:
                raise ValueError(
                    "replay_reference: stored hidden states need the model's plain output head, and an adapter or "
                    "another form sits there; use adapter or copy, or sample with --store_reference topk"
                )
            if ref_head is None and module.weight.requires_grad:  # a head that is not trained stays the base's
                ref_head = form.frozen(module)
        self.replay_term = ReplayTerm(form, self.reference, ref_head, self.accelerator.autocast)
        if self.uses_cache:
            self._prove_stored()
            self.replay_term.to(self.accelerator.device)
        else:
            self._prove_rows()

    def prove_reference_again(self) -> None:
        """Show that the reference still gives what it gave when training began.

        Raises:
            ValueError: if it was changed since, or follows the model.
        """
        if self.reference is not None:
            with self.accelerator.autocast():
                unwrapped = self.accelerator.unwrap_model(self.model)
                self.reference.prove_again(self.model, unwrapped, self.state.global_step)
            reshard(self.model)

    def _remember(self, head: Head) -> Reference:
        batches = evaluated_batches(self.args, self.retention_documents)
        with self.accelerator.autocast():  # in the precision of its states, the model, which was shown to be the base
            reference = Reference(HiddenStates.of(self.model, head, batches))
            reference.to(self.accelerator.device)
            reference.prove(self.model, probe(self.model))
            return reference

    def _prove_rows(self) -> None:
        """Hold rows that the model is said to have drawn against what it predicts, in the precision of training."""
        rows, model, config = self.replay_dataset, self.model, self.replay_config
        if rows is None or rows.log_probs is None or not (self._own_rows and config.objective.draws_rows):
            return
        as_handed_over = self.reference is not None and self.reference.kind == "copy"
        adapter_off = hasattr(model, "disable_adapter") and not as_handed_over
        base = Reference().base(model, model) if adapter_off else evaluation_mode(model)
        try:
            with base, self.accelerator.autocast():
                check_pool(model, rows, half=self._half)
        except ValueError as error:
            if not config.allow_off_policy_replay:
                raise
            logger.warning("off-policy replay: %s", error)

    @property
    def _half(self) -> bool:
        """Whether the replay rows were drawn, or the model is trained, in half precision."""
        assert self.replay_dataset is not None
        manifest = self.replay_dataset.manifest or {}
        dtypes = {manifest.get("sampler", {}).get("dtype"), str(self.model.dtype).removeprefix("torch.")}
        return bool({"bfloat16", "float16"} & dtypes) or self.accelerator.mixed_precision != "no"

    def _prove_stored(self) -> None:
        """Where the model is now: a host that shards it moves it to the device of training only later."""
        rows, device = self.replay_dataset, self.model.device
        assert rows is not None
        assert rows.cache is not None
        indices = range(min(2, len(rows)))
        batch = self.replay_batch(indices)
        stored = {name: value.to(device) for name, value in batch.pop("stored").items()}
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        with evaluation_mode(self.model), self.accelerator.autocast():
            error = stored_error(self.replay_term, self.model, batch, labels[:, 1:] != -100, stored)
        if not error <= (STORED_TOLERANCE_HALF if self._half else STORED_TOLERANCE):
            raise ValueError(
                f"replay_reference: the predictions stored in {rows.source!r} are not this model's (KL {error:.2g} nats"
                " per token before training); sample again, or set replay_reference to adapter or copy"
            )

    def replay_batch(self, indices: Any) -> dict[str, Any]:
        """Rows on the device of training: `input_ids`, `labels`, and what is `stored` of the base's predictions."""
        assert self.replay_dataset is not None
        device = self.accelerator.device
        batch: dict[str, Any] = {name: value.to(device) for name, value in self.replay_dataset.batch(indices).items()}
        if self.uses_cache:
            assert self.replay_dataset.cache is not None
            stored = self.replay_dataset.cache.batch(indices)
            batch["stored"] = {name: value.to(device) for name, value in stored.items()}
        return batch

    def _load_rows(
        self,
        model: Any,
        tokenizer: Any,
        replay: Any,
        retention: dict[str, Any],
        args: Any,
        start_token: str | int | None,
    ) -> bool:
        """Load replay and retention rows; whether the replay rows are the model's own."""
        config, own_rows = self.replay_config, True
        start = choose_start_token(tokenizer, start_token)
        asked = config.replay_max_length or Unchosen(getattr(args, "max_length", None) or 512)
        max_length = length_that_fits(model, asked, "replay_max_length")
        if isinstance(replay, (str, Path)):
            replay = load_replay_dataset(str(replay), tokenizer, start.id, max_length)
        if not isinstance(replay, ReplayDataset | None):
            raise ValueError(
                f"replay_dataset: {type(replay).__name__} is none; give a folder of `retain sample`, a file of text, "
                "or ReplayDataset.from_rows(token ids)"
            )
        if replay is not None and replay.manifest is not None:
            warning = verify_replay(
                replay.manifest,
                model_fingerprint=model_fingerprint(model),
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                allow_off_policy=config.allow_off_policy_replay,
            )
            if warning:
                own_rows = False
                logger.warning(warning)
        self.replay_dataset = replay
        self._row_edges = row_edges(tokenizer, start.id)
        for name, source in retention.items():
            cut: dict[str, Any] = {"start_id": start.id, "max_length": max_length, "max_windows": RETENTION_WINDOWS}
            documents = as_documents(name, source, tokenizer=tokenizer, **cut)
            self.retention_documents[name], said = without_copies(f"retention/{name}", documents, "documents")
            for sentence in said:
                logger.warning(sentence)
        self._start_token = start.token
        logger.info("document start: %s", start)
        return own_rows

    def _check_rows(self, model: Any) -> None:
        config, rows = self.replay_config, self.replay_dataset
        if config.objective.draws_rows and rows is None:
            raise ValueError(
                f"replay_dataset: missing, and replay_objective {config.replay_objective!r} needs it; give rows, or "
                "set replay_coef 0 to finetune without protection"
            )
        if config.objective is NONE:
            logger.warning("replay_coef is 0: this run is not protected against forgetting")
        if rows is None or not config.objective.draws_rows:
            return
        check_rows_fit(rows, model)
        check_held_out(
            (rows[at] for at in range(len(rows))), self.retention_documents, "replay dataset", self._row_edges
        )

    def settings(self) -> dict[str, Any]:
        """What `retain_config.json` keeps beside the training arguments."""
        rows = self.replay_dataset
        replay = {"source": rows.source, "num_rows": len(rows), "manifest": rows.manifest} if rows is not None else None
        return {
            "replay": dataclasses.asdict(self.replay_config) | self._resolved(),
            "replay_dataset": replay,
            "reference": self.reference_kind,
            "num_params": num_tuned(self.model),
            "loss_tokens": self._loss_tokens(),
            "retention_windows": RETENTION_WINDOWS,
            "retention": {name: len(documents) for name, documents in self.retention_documents.items()},
            "versions": versions(),
        }

    def _resolved(self) -> dict[str, Any]:
        """What was used where a setting was left to its default."""
        rows, config = self.replay_dataset, self.replay_config
        if rows is None or not config.objective.draws_rows:
            return {}
        resolved: dict[str, Any] = {"replay_max_length": int(np.diff(rows.offsets).max())}
        resolved["start_token"] = self._start_token
        if config.objective.adds_term:
            resolved["per_device_replay_batch_size"] = self.replay_batch_size
        if config.objective.uses_reference:
            resolved["replay_reference"] = str(self.reference_kind).split()[0]  # without the cache's kind
        return resolved

    def _loss_tokens(self) -> str | None:
        """Which tokens of a row the loss of TRL's `SFTTrainer` counts; None for hosts with another loss."""
        completions = getattr(self, "completion_only_loss", None)
        if completions is None:
            return None
        return "assistant turns" if self.args.assistant_only_loss else "completions" if completions else "all"

    def protection(self) -> list[str]:
        """What protects this run, a line each, for people to read before it starts."""
        config, rows = self.replay_config, self.replay_dataset
        unused = [f"replay: {quantity(len(rows), 'row')} given, and not used"] if rows is not None else []
        if config.objective is NONE:
            return ["protection: none (replay_coef 0)", *unused]
        if config.objective.uses_reference and expected_steps(self.args, getattr(self, "train_dataset", None)) == 1:
            return ["protection: none (a run of one step: there the model is its base, and KL has no gradient)"]
        lines = [f"protection: {config.replay_objective}, {config.objective.strength(config)}"]
        if config.objective.uses_reference:
            lines[0] += f", reference {self.reference_kind} (proven to be the base)"
        if self.is_fsdp_enabled and self.reference is not None and self.reference.kind == "copy":
            lines.append(
                f"reference: a copy on every device, {self.reference.num_bytes / 1e9:.1f} GB, which FSDP leaves whole; "
                "an adapter, or rows sampled with --store_reference hidden, need none"
            )
        if not config.objective.draws_rows:
            lines += [f"{line} by replay_objective {config.replay_objective}" for line in unused]
        elif rows is not None:
            kind = "real text" if rows.manifest is None else f"self-generated by {rows.manifest['model']}"
            often = f", every {config.replay_every} steps" if config.replay_every > 1 else ""
            share = f"{self.replay_batch_size} per device and micro-batch{often}"
            lines.append(f"replay: {quantity(len(rows), 'row')}, {kind}; {share}")
            if self._opens_otherwise():
                lines.append(
                    "new rows do not open with the document start, and replay rows do: measure forgetting on answers "
                    "to prompts, too (retain measure --prompts)"
                )
        return lines

    def _opens_otherwise(self, most: int = 16) -> bool:
        """Whether no training row opens as replay rows do: the model can tell the two apart by their first token."""
        rows = self.replay_dataset
        assert rows is not None
        opening = {int(rows[at][0]) for at in range(min(most, len(rows)))}
        new = [int(row[0]) for row in itertools.islice(training_rows(getattr(self, "train_dataset", None)), most)]
        return bool(new) and not opening & set(new)

    @property
    def reference_kind(self) -> str | None:
        """Where the base's predictions on replay rows come from: adapter, copy or cache."""
        if self.uses_cache:
            assert self.replay_dataset is not None
            assert self.replay_dataset.cache is not None
            return f"cache ({self.replay_dataset.cache.kind})"
        return self.reference.kind if self.reference is not None else None

    @property
    def replay_batch_size(self) -> int:
        """Replay rows per device and micro-batch."""
        raise NotImplementedError


def _tokenizer(processing_class: Any, model: Any) -> Any:
    if processing_class is not None:
        return getattr(processing_class, "tokenizer", processing_class)
    name = model.config._name_or_path
    if not name:
        raise ValueError("processing_class: missing, and the model has no name to load a tokenizer by; pass one")
    return load_tokenizer(name)


def load_for_training(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Load a model by name as TRL does: float32 unless `model_init_kwargs` says otherwise."""
    see_the_base_everywhere(may_change=True)
    settings = dict(getattr(args, "model_init_kwargs", None) or {})
    quantization = kwargs.pop("quantization_config", None)
    if quantization is not None:
        settings["quantization_config"] = quantization
    if args is not None and hasattr(args, "model_init_kwargs"):
        args.model_init_kwargs = None  # they have done their work
    settings.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    settings["revision"] = settings.get("revision") or "main"
    settings["dtype"] = settings.get("dtype") or "float32"
    if kwargs.get("processing_class") is None:  # from the same revision as the weights
        of_tokenizer = {key: settings[key] for key in ("revision", "trust_remote_code")}
        kwargs["processing_class"] = load_tokenizer(name, **of_tokenizer)
    with loaded_whole(args):
        return load_model(name, **settings)
