"""Replay inside the user's own trainer: a mixin over `compute_loss`, the seam that TRL documents.

    loss = host's loss on the new rows + replay_coef · R,     R = mean over replay tokens of the objective

R is normalised by the replay tokens of the whole optimizer step, over micro-batches and processes, so splitting a
step differently changes nothing. Source: Marek et al., section "Method".
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl import SFTTrainer

from retain import versions
from retain.callbacks import RunFilesCallback
from retain.config import ReplayConfig
from retain.data import as_documents
from retain.losses import kl_divergence, next_token_loss
from retain.metrics import logits_at
from retain.models import (
    choose_start_token,
    load_model,
    load_tokenizer,
    max_positions,
    model_fingerprint,
    tokenizer_fingerprint,
)
from retain.protection import check_held_out, check_rows_fit, make_reference
from retain.reference import probe
from retain.replay import ReplayDataset, load_replay_dataset, replace_rows, replay_indices, verify_replay
from retain.retention import RetentionMixin

logger = logging.getLogger(__name__)

PATIENCE = 3  # optimizer steps with a learning rate above 0 after which a KL of exactly 0 is a fault


class ReplayMixin(RetentionMixin):
    """Add replay to a `transformers.Trainer` class: `class ReplayDPOTrainer(ReplayMixin, DPOTrainer): ...`

    Args:
        model, args: as for the host trainer; a model name is loaded here, so that the base is seen first.
        replay_config: objective, coefficient, batch size and reference of the replay.
        replay_dataset: a `ReplayDataset`, a folder that `retain sample` wrote, or a file of real text.
        retention_datasets: name → texts (or documents of tokens) measured at every evaluation, never replayed.
        start_token: the document start; chosen from the tokenizer by default.
        kwargs: everything else that the host trainer takes.

    Raises:
        ValueError: whenever protection could not do what was asked.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        replay_config: ReplayConfig | None = None,
        replay_dataset: ReplayDataset | str | Path | None = None,
        retention_datasets: dict[str, Any] | None = None,
        start_token: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        self.replay_config = replay_config or ReplayConfig()
        if model is None:
            raise ValueError("model: missing; give a model or its name (not model_init: the base must be seen first)")
        if isinstance(model, str):
            model = _load_for_training(model, args, kwargs)
        self.replay_dataset: ReplayDataset | None = None
        self.retention_documents = {}
        if replay_dataset is not None or retention_datasets:
            tokenizer = _tokenizer(kwargs.get("processing_class"), model)
            self._load_rows(model, tokenizer, replay_dataset, retention_datasets or {}, args, start_token)
        self._check_protection(model)
        self.reference = None
        if self.replay_config.uses_reference or self.retention_documents:
            self.reference = make_reference(self.replay_config, model, kwargs.get("peft_config"))
        base_probe = probe(model) if self.reference is not None else None
        if args is not None and args.ddp_broadcast_buffers is None:
            # Two forwards before one backward: a broadcast between them would overwrite what autograd saved.
            args.ddp_broadcast_buffers = False

        super().__init__(model=model, args=args, **kwargs)

        self._queue: list[dict[str, Tensor] | None] = []
        self._replay_tokens = 0
        self._logged: list[Tensor] = []
        self._logged_steps = 0
        self._steps_learned = 0
        self._largest_kl = torch.zeros(())
        if self.reference is not None and base_probe is not None:
            self.reference.to(self.accelerator.device)
            self.reference.prove(self.model, base_probe)
        self.add_callback(RunFilesCallback(self._settings()))

    # What goes in, and whether it protects

    def _load_rows(
        self,
        model: Any,
        tokenizer: Any,
        replay: Any,
        retention: dict[str, Any],
        args: Any,
        start_token: str | int | None,
    ) -> None:
        config = self.replay_config
        start = choose_start_token(tokenizer, start_token)
        asked = config.replay_max_length or getattr(args, "max_length", None) or 512
        max_length = min(asked, max_positions(model) or asked)  # rows that the model can take
        if isinstance(replay, (str, Path)):
            replay = load_replay_dataset(str(replay), tokenizer, start.id, max_length)
        if replay is not None and replay.manifest is not None:
            warning = verify_replay(
                replay.manifest,
                model_fingerprint=model_fingerprint(model),
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                allow_off_policy=config.allow_off_policy_replay,
            )
            if warning:
                logger.warning(warning)
        self.replay_dataset = replay
        for name, source in retention.items():
            self.retention_documents[name] = as_documents(
                name, source, tokenizer=tokenizer, start_id=start.id, max_length=max_length, max_windows=1
            )
        logger.info("document start: %s", start)

    def _check_protection(self, model: Any) -> None:
        config, rows = self.replay_config, self.replay_dataset
        if self.replay_config.draws_replay and rows is None:
            raise ValueError(
                f"replay_dataset: missing, and replay_objective {config.replay_objective!r} needs it; give rows, or "
                "set replay_coef 0 to finetune without protection"
            )
        if not self.replay_config.draws_replay and not self.replay_config.adds_replay_term:
            logger.warning("replay_coef is 0: this run is not protected against forgetting")
        if rows is None or not self.replay_config.draws_replay:
            return
        check_rows_fit(rows, model)
        check_held_out(rows, self.retention_documents)

    def _settings(self) -> dict[str, Any]:
        rows = self.replay_dataset
        replay = {"source": rows.source, "num_rows": len(rows), "manifest": rows.manifest} if rows is not None else None
        return {
            "replay": dataclasses.asdict(self.replay_config),
            "replay_dataset": replay,
            "reference": self.reference.kind if self.reference is not None else None,
            "retention": {name: len(documents) for name, documents in self.retention_documents.items()},
            "versions": versions(),
        }

    def protection(self) -> list[str]:
        """What protects this run, a line each, for people to read before it starts."""
        config, rows = self.replay_config, self.replay_dataset
        if not self.replay_config.draws_replay and not self.replay_config.adds_replay_term:
            return ["protection: none (replay_coef 0)"]
        lines = [f"protection: {config.replay_objective}, coefficient {config.replay_coef:g}"]
        if self.replay_config.uses_reference and self.reference is not None:
            lines[0] += f", reference {self.reference.kind} (proven to be the base)"
        if self.replay_config.draws_replay and rows is not None:
            kind = "real text" if rows.manifest is None else f"self-generated by {rows.manifest['model']}"
            lines.append(f"replay: {len(rows)} rows, {kind}; {self.replay_batch_size} per device and micro-batch")
        return lines

    # The stream of replay rows

    @property
    def replay_batch_size(self) -> int:
        """Replay rows per device and micro-batch."""
        config, batch = self.replay_config, self.args.per_device_train_batch_size
        if config.replay_objective != "replace":
            return config.per_device_replay_batch_size or max(1, batch // 4)
        rows = round(config.replay_share * batch)
        if not 0 < rows < batch:
            raise ValueError(
                f"replay_share: {config.replay_share} of per_device_train_batch_size {batch} is {rows} rows; "
                "use a share that leaves both replay and new rows"
            )
        return rows

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Draw the replay rows of an optimizer step together with its new rows."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._stop_if_unprotected()
        if self.replay_config.adds_replay_term:
            self._queue = [None] * len(samples)
            self._logged_steps += 1
        if self.replay_config.draws_replay and samples:
            batches = self._draw(len(samples))
            if self.replay_config.adds_replay_term:
                self._queue = list(batches)
            else:
                samples = [replace_rows(new, old) for new, old in zip(samples, batches, strict=True)]
                num_items = self._get_num_items_in_batch(samples, device)
        return samples, num_items

    def _draw(self, num_micro_batches: int) -> list[dict[str, Tensor]]:
        """Replay batches of this process for the micro-batches of the coming step; a function of the step alone."""
        assert self.replay_dataset is not None
        rows, world = self.replay_batch_size, self.accelerator.num_processes
        per_step = rows * world * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        drawn = replay_indices(self.state.global_step, per_step, len(self.replay_dataset), seed)
        drawn = drawn[: rows * world * num_micro_batches].reshape(num_micro_batches, world, rows)
        self._replay_tokens = int(self.replay_dataset.num_predictions[drawn].sum())
        mine = drawn[:, self.accelerator.process_index]
        return [
            {name: value.to(self.accelerator.device) for name, value in self.replay_dataset.batch(indices).items()}
            for indices in mine
        ]

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The host's loss and, in training, the replay term."""
        new = dict(inputs)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not (self.model.training and self.replay_config.adds_replay_term):
            return result
        if not self._queue:
            raise ValueError(
                f"replay: {type(self).__name__} asked for a loss without drawing rows; nothing protects it"
            )
        batch = self._queue.pop(0)
        if batch is None:
            term = self._term_on_new_rows(model, new, num_items_in_batch)
        else:
            term = self._term_on_replay(model, batch)
        scale = 1.0 if self._host_scales(num_items_in_batch) else self.current_gradient_accumulation_steps
        added = self.replay_config.replay_coef * scale * term
        return (result[0] + added, result[1]) if return_outputs else result + added

    def _term_on_replay(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        targets = batch.pop("labels")[:, 1:]
        mask, targets = targets != -100, targets.clamp(min=0)
        ref_logits = self.ref_logits(model, batch) if self.replay_config.uses_reference else None
        logits = logits_at(model, batch)[:, :-1]
        values = next_token_loss(logits, targets) if ref_logits is None else kl_divergence(ref_logits[:, :-1], logits)
        # This micro-batch's part of the step's mean; DDP averages gradients, hence the processes.
        part = values.masked_fill(~mask, 0.0).sum() / self._replay_tokens
        return self._note(part * self.accelerator.num_processes)

    def _term_on_new_rows(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        if "labels" not in inputs:
            raise ValueError("replay_objective: 'kl_new' needs batches with labels; use 'kl' with this trainer")
        labels = inputs.pop("labels")
        inputs.pop("use_cache", None)
        mask = labels[:, 1:] != -100
        values = kl_divergence(self.ref_logits(model, inputs)[:, :-1], logits_at(model, inputs)[:, :-1])
        total = values.masked_fill(~mask, 0.0).sum()
        if num_items is None:
            return self._note(total / mask.sum().clamp(min=1) / self.current_gradient_accumulation_steps)
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self._note(total / num_items * world)

    def _note(self, term: Tensor) -> Tensor:
        """Keep a micro-batch's part of the step's mean for the log."""
        self._logged.append(term.detach())
        if self.replay_config.uses_reference:
            self._largest_kl = torch.maximum(self._largest_kl.to(term.device), term.detach().abs())
        return term

    def _host_scales(self, num_items: Any) -> bool:
        """Whether the host's loss is already divided by the step's micro-batches; as in `Trainer.training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step; a loss that is not finite stops the run before the weights are touched."""
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss).all()):
            raise ValueError(
                f"loss: {loss.item()} at step {self.state.global_step + 1}; lower learning_rate or replay_coef, or "
                f"use bf16 instead of fp16; checkpoints in {self.args.output_dir!r} are kept"
            )
        return loss

    def _stop_if_unprotected(self) -> None:
        """After the first steps, a reference that moved along with the model shows as a KL of exactly 0."""
        if not self.replay_config.uses_reference:
            return
        if self._steps_learned == PATIENCE and float(self._largest_kl) == 0.0:
            raise ValueError(
                f"replay/kl: exactly 0 after {PATIENCE} steps: either the reference moves with the model, so nothing "
                "protects it, or the weights do not move at this learning_rate and dtype; check both"
            )
        self._steps_learned += any(rate > 0 for rate in self.lr_scheduler.get_last_lr())

    # What is measured and kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `replay/loss`, `replay/kl` and `replay/coef` to the training logs; means over steps and processes."""
        if "loss" in logs and self._logged:
            total = torch.stack(self._logged).sum() / self._logged_steps
            mean = self.accelerator.reduce(total, reduction="mean").item()
            logs["replay/loss"] = mean
            if self.replay_config.uses_reference:
                logs["replay/kl"] = mean
            logs["replay/coef"] = self.replay_config.replay_coef
            self._logged, self._logged_steps = [], 0
        super().log(logs, start_time)


def _tokenizer(processing_class: Any, model: Any) -> Any:
    if processing_class is not None:
        return getattr(processing_class, "tokenizer", processing_class)
    name = model.config._name_or_path
    if not name:
        raise ValueError("processing_class: missing, and the model has no name to load a tokenizer by; pass one")
    return load_tokenizer(name)


def _load_for_training(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Load a model by name as TRL does: float32 unless `model_init_kwargs` says otherwise."""
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
    return load_model(name, **settings)


class ReplayTrainer(ReplayMixin, Trainer):
    """`transformers.Trainer` with replay."""


class ReplaySFTTrainer(ReplayMixin, SFTTrainer):
    """`trl.SFTTrainer` with replay."""
