"""Replay inside the user's own trainer: a mixin over `compute_loss`, the seam that TRL documents.

    loss = host's loss on the new rows + replay_coef · R,     R = mean over replay tokens of the objective

R is normalised by the replay tokens of the whole optimizer step, over micro-batches and processes, so splitting a
step differently changes nothing. Source: Marek et al., section "Method".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer
from trl import RewardTrainer, SFTTrainer

from retain.checks import check_named
from retain.files import write_json, write_text
from retain.models.head import reshard
from retain.replay.dataset import ReplayDataset, replace_rows, replay_indices
from retain.report.report import ForgettingReport
from retain.training.anchor import load_or_save_anchor
from retain.training.coef_controller import CoefController
from retain.training.config import ReplayConfig
from retain.training.loss_meter import LossMeter
from retain.training.objectives import NONE, Objective
from retain.training.protection import RETENTION_WINDOWS, Protection, check_noise, check_replay_every, zero_kl_error
from retain.training.replay_term import TermBatch
from retain.training.retention import NEW_TASK_TEXT, RetentionMeasurer, check_best_metric, retention_names
from retain.training.run_files import BUDGET_FILE, weights_step
from retain.training.trainer_checks import check_trained, check_weights, load_for_training

if TYPE_CHECKING:  # what the mixin stands on; at run time the host class comes after it
    from transformers import Trainer as Host
else:
    Host = object

PATIENCE = 3  # optimizer steps behind the warm-up after which a KL that is still exactly 0 at the end is a fault
BUDGET_STATE = "CoefController"  # its place in a checkpoint's trainer_state.json
JOINT_STATE = "JointForward"  # there once the KL has risen: until then it must be exactly 0, so its passes are alike


class ReplayMixin(Host):
    """Add replay to a `transformers.Trainer` class: `class ReplayDPOTrainer(ReplayMixin, DPOTrainer): ...`

    Args:
        model, args: as for the host trainer; a model name is loaded here, so that the base is seen first.
        replay_config: objective, coefficient, batch size and reference of the replay.
        replay_dataset: a `ReplayDataset`, a folder that `retain sample` wrote, or a file of real text.
        retention_datasets: name → texts (or documents of tokens) measured at every evaluation, never replayed.
        start_token: the document start; chosen from the tokenizer by default.
        new_task_rows: rows of `eval_dataset` on which `report` says what was learned, beside the retention texts.
        kwargs: everything else that the host trainer takes.

    Raises:
        ValueError: whenever protection could not do what the settings say.
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
        new_task_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        self.replay_config = replay_config or ReplayConfig()
        if model is None:
            raise ValueError("model: missing; give a model or its name (not model_init: the base must be seen first)")
        if isinstance(self, RewardTrainer):
            raise ValueError("model: RewardTrainer trains a score of rows, and replay needs predictions of tokens")
        if isinstance(model, str):
            model = load_for_training(model, args, kwargs)
        check_named("retention_datasets", retention_datasets or {})
        self.replay = Protection(
            self.replay_config, model, args, replay_dataset, retention_datasets or {}, start_token, kwargs
        )
        if args is not None and args.ddp_broadcast_buffers is None:
            # Two forwards before one backward: a broadcast between them would overwrite what autograd saved.
            args.ddp_broadcast_buffers = False

        super().__init__(model=model, args=args, **kwargs)

        self._queue: list[dict[str, Any] | None] = []  # replay batches of the step's micro-batches; None: on new rows
        self._ready_for = -1  # the step for which replay was last drawn
        self._replay_tokens = 0
        self._is_the_base = True  # until its first step; a try that ran out of memory leaves it moved
        self._meter = LossMeter(self.accelerator, compared=self.objective.uses_reference)
        self.budget: CoefController | None = None
        self.replay.prove(self, new_task_rows)
        self.measurer = ProtectedRun(self)
        check_best_metric(self.args, retention_names(self.replay.documents))
        self.add_callback(self.measurer)

    # The stream of replay rows

    @property
    def replay_batch_size(self) -> int:
        """Replay rows per device and micro-batch."""
        config = self.replay_config
        return config.objective.batch_rows(config, self._train_batch_size)  # auto_find_batch_size makes it smaller

    @property
    def objective(self) -> Objective:
        """What protects this run."""
        return self.replay_config.objective

    @property
    def _replay_is_due(self) -> bool:
        config, step = self.replay_config, self.state.global_step
        begun = step >= config.replay_start * self.state.max_steps
        return self.objective is not NONE and begun and step % config.replay_every == 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Draw the replay rows of an optimizer step together with its new rows."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.forget(self.state.global_step)
        if self.budget is None or self.state.global_step == 0:
            self.budget = self._begin_budget()
        if not (self._replay_is_due and samples):
            return samples, num_items
        self._stop_if_unprotected()
        self._ready_for = self.state.global_step
        batches = self._draw(len(samples)) if self.objective.draws_rows else [None] * len(samples)
        if self.objective.adds_term:
            self._queue = batches
            self._meter.begin_step()
            return samples, num_items
        samples = [replace_rows(new, old) for new, old in zip(samples, batches, strict=True)]
        return samples, self._get_num_items_in_batch(samples, device)

    def _draw(self, num_micro_batches: int) -> list[Any]:
        """Replay batches of this process for the micro-batches of the coming step; a function of the step alone."""
        dataset = self.replay.rows
        assert dataset is not None
        rows, world = self.replay_batch_size, self.accelerator.num_processes
        per_step = rows * world * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = self.state.global_step // self.replay_config.replay_every
        drawn = replay_indices(step, per_step, len(dataset), seed)
        drawn = drawn[: rows * world * num_micro_batches].reshape(num_micro_batches, world, rows)
        self._replay_tokens = max(1, int(dataset.num_predictions[drawn].sum()))
        mine = drawn[:, self.accelerator.process_index]
        return [self.replay.batch(indices, self.accelerator.device) for indices in mine]

    # The anchor

    def create_optimizer(self, model: Any = None) -> Any:
        """The host's optimizer, or AdamW with the anchor."""
        if self.replay.anchor is not None:
            self.optimizer_cls_and_kwargs = self.replay.anchor.optimizer(self.args, self.replay_config)
        return super().create_optimizer(model)

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The host's loss and, in training, the replay term."""
        new = dict(inputs)
        with self._rows_taken_along() as hidden:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not (self.model.training and self.objective.adds_term):
            return result
        scale = 1.0 if self._host_scales(num_items_in_batch) else self.current_gradient_accumulation_steps
        own = result[0] if return_outputs else result
        self._meter.add_new_task(self.state.global_step, own.detach() / scale)
        if not self._replay_is_due:
            return result
        if not self._queue:
            raise ValueError(
                f"replay: {type(self).__name__} computes a loss for which no rows were drawn; nothing protects it"
            )
        old, num_items = self._queue.pop(0), num_items_in_batch
        if old is None:
            term = self._term_on_new_rows(model, new, num_items)
        else:
            term = self._term_on_replay(model, old, *hidden)
        self._meter.add_term(term)
        added = self.replay_coef * self.replay_config.replay_every * scale * term
        return (result[0] + added, result[1]) if return_outputs else result + added

    def _rows_taken_along(self) -> AbstractContextManager[list[Tensor]]:
        """A context in which the host's forward pass may take the micro-batch's replay rows along."""
        joint = self.replay.joint if JOINT_STATE in self.state.stateful_callbacks and self.model.training else None
        rows = self._queue[0] if self._queue else None
        return nullcontext([]) if joint is None or rows is None else joint.with_rows(rows)

    def _term_on_replay(self, model: Any, batch: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
        labels, stored = batch.pop("labels"), batch.pop("stored", None)
        rows = TermBatch(model, batch, labels, stored, hidden=hidden)
        values = torch.zeros(int(rows.mask.sum()), device=labels.device)
        total = self.objective.total(self.replay.term, rows._replace(values=values))
        if self.objective.uses_reference:
            self._meter.add_values(values, rows.mask)
        # This micro-batch's part of the step's mean; DDP averages gradients, hence the processes.
        return total / self._replay_tokens * self.accelerator.num_processes

    def _term_on_new_rows(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        if "labels" not in inputs:
            raise ValueError(
                f"replay_objective: {self.objective.name!r} needs batches with labels; use 'kl' with this trainer"
            )
        inputs.pop("use_cache", None)
        rows = TermBatch(model, inputs, inputs.pop("labels"))
        total = self.objective.total(self.replay.term, rows)
        if num_items is None:
            return total / rows.mask.sum().clamp(min=1) / self.current_gradient_accumulation_steps
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items * world

    def _host_scales(self, num_items: Any) -> bool:
        """Whether the host's loss is already divided by the step's micro-batches; as in `Trainer.training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step; a loss that is not finite stops the run before the weights are touched."""
        reshard(self.model)
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None  # prompts come as a list
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss).all()):
            step = f"loss: {loss.item()} at step {self.state.global_step + 1}"
            if labels is not None and not bool((labels[..., 1:] != -100).any()):
                raise ValueError(
                    f"{step}: every label of its new rows is masked (-100), so nothing is to be learned; drop them, or "
                    "raise max_length if it cuts answers off"
                )
            raise ValueError(
                f"{step}; lower learning_rate or replay_coef, or use bf16 instead of fp16; checkpoints in "
                f"{self.args.output_dir!r} are kept"
            )
        if self._replay_is_due and not self._queue:
            if self.objective.uses_reference and self._is_the_base and self.state.global_step == 0:
                kl = float(self._meter.step_term) if self.budget is None else self._meter.kl_after_openings()
                check_noise(kl, self.replay_config.max_ref_kl)
            self._is_the_base = False
            if not self._meter.kl_stayed_zero():
                self.state.stateful_callbacks[JOINT_STATE] = {"args": {}, "attributes": {}}
            if self.budget is not None:  # whose state the next checkpoint keeps
                self.budget.update(self._meter.kl_after_openings())
                if self.replay.anchor is not None:
                    self.replay.anchor.scale_coef(self.optimizer, self.replay_config, self.budget.coef)
                self.state.stateful_callbacks[BUDGET_STATE] = {"args": {}, "attributes": self.budget.state_dict()}
        return loss

    def stop_if_bypassed(self) -> None:
        """A step of the host must have met all the replay that was drawn for it, before the weights are touched."""
        met = self._ready_for == self.state.global_step and not self._queue
        if not met and self._replay_is_due:
            raise ValueError(
                f"replay: {type(self).__name__} made step {self.state.global_step + 1} without it, so nothing protects "
                "the model; leave get_batch_samples and compute_loss to ReplayMixin, and the model in training mode"
            )

    def _stop_if_unprotected(self) -> None:
        """While the KL is exactly 0, either no weight has moved measurably, or the reference moves along."""
        check_replay_every(self.replay_config, self.state.max_steps)
        if self._ready_for >= 0 and self._meter.kl_stayed_zero():
            self.measurer.prove_reference(self.model, self.state)

    def stop_if_kl_ended_zero(self) -> None:
        """Behind a warm-up, what was trained must have moved what the base says of replay rows."""
        tried = self._ready_for >= self.args.get_warmup_steps(self.state.max_steps) + PATIENCE
        if not (tried and self.objective.uses_reference):
            return
        stayed = self._meter.kl_stayed_zero()
        if not stayed and self.objective.draws_rows:  # noise keeps its KL from being 0
            stayed = not self.replay.has_moved(self.model, self.accelerator)
            reshard(self.model)
        if stayed:
            raise zero_kl_error(self.state.global_step)

    # The budget

    @property
    def replay_coef(self) -> float:
        """The coefficient of the coming step."""
        return self.replay_config.replay_coef if self.budget is None else self.budget.coef

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The host's training; a budget begins anew, or where the checkpoint left it, and its verdict is kept."""
        check_trained(self.model, getattr(self, "train_dataset", None))
        self.budget = None
        folder, writes = Path(self.args.output_dir), self.is_world_process_zero()
        resumed = args[0] if args else kwargs.get("resume_from_checkpoint")
        load_or_save_anchor(self.replay.anchor, folder, resumed, writes=writes)
        result = super().train(*args, **kwargs)
        if self.budget is None:  # it resumed at its last step
            self.budget = self._begin_budget()
        if self.budget is not None and self.budget.step and writes:
            verdict = {"budget": self.budget.budget, **dataclasses.asdict(self.budget.verdict())}
            write_json(folder / BUDGET_FILE, verdict)
        return result

    def _begin_budget(self) -> CoefController | None:
        config, kept = self.replay_config, self.state.stateful_callbacks.get(BUDGET_STATE)
        if config.max_ref_kl is None:
            return None
        steps = -(-self.state.max_steps // config.replay_every)
        budget = CoefController(config.max_ref_kl, num_steps=steps, coef=config.replay_coef)
        if self.state.global_step and kept is not None:
            budget.load_state_dict(kept["attributes"])
        return budget

    # What is measured, kept and shown

    def evaluate_retention(self) -> dict[str, float]:
        """Measure every retention text against the base, log it, and keep the per-document sums.

        Returns:
            `retention/<name>/loss`, `/forgetting` and `/ref_kl` in nats per token, `/ref_agreement` as a share.
        """
        return self.measurer.measure_and_log(self.args, self.state, self.control, self.model)

    def report(self, name: str) -> ForgettingReport:
        """What was learned and forgotten by now, of the same form as what `measure` returns, without a noise floor.

        Args:
            name: of the run.
        """
        args, config, measurer = self.args, self.model.config, self.measurer
        return ForgettingReport.new(
            name,
            base=self._named_base,
            retention=measurer.table(args, self.state),
            new_task=measurer.measure_new_task(args, self.model),
            per_document=dict(measurer.sums),
            settings={
                "seed": args.seed,
                "max_windows": RETENTION_WINDOWS,
                "loss_tokens": {NEW_TASK_TEXT: measurer.settings["loss_tokens"] or "all"},
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "attn_implementation": config._attn_implementation,
            },
        )

    @property
    def _named_base(self) -> dict[str, str]:
        """The base as a report names it."""
        return {"model": self.model.name_or_path or type(self.model).__name__}

    def protection(self) -> list[str]:
        """What protects this run, a line each, for people to read before it starts."""
        return self.replay.lines(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The host's model card and a table of forgetting, where it was measured."""
        super().create_model_card(*args, **kwargs)
        path, table = Path(self.args.output_dir) / "README.md", self.measurer.table(self.args, self.state)
        if not (self.is_world_process_zero() and table and path.exists()):
            return
        step = weights_step(self.args, self.state, is_in_train=self.is_in_train)
        ForgettingReport.new(
            path.parent.name,
            base=self._named_base,
            retention=table,
            training={"step": step, **dataclasses.asdict(self.replay_config)},
            settings={"seed": self.args.seed},
        ).to_model_card(path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The host's, for weights that are finite."""
        check_weights(self.model, self.accelerator, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_weights(self.model, self.accelerator, self.args.output_dir)  # before a host writes its model card
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Split `loss` in the training logs, the sum, into `new_task/loss` and `replay/coef` · `replay/loss`.

        All are means over the logged steps and processes. A KL is logged as `replay/kl`, too, and apart over the first
        predictions of the rows (`replay/kl_opening`) and all others (`replay/kl_rest`, which a budget holds).
        `replay/anchor` is what the anchor takes for the KL of the weights as they are; where no replay rows were drawn
        to compare it with, `replay/kl_fixed` is that KL on two rows, the same ones every time.
        """
        if "loss" in logs:
            logs.update(self._meter.logs(self.state.global_step, self.replay_coef))
            if self.replay.anchor is not None:
                kl = logs.get("replay/kl") if self.objective.draws_rows else None
                logs.update(self.replay.anchor.logs(kl, self.model, self.accelerator.device))
        super().log(logs, start_time)


class ProtectedRun(RetentionMeasurer):
    """The measurer of a protected run, which checks it at each point that the host passes."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer, self.settings = trainer, trainer.replay.settings(trainer)
        self.documents, self.reference = trainer.replay.documents, trainer.replay.reference
        self.new_task = trainer.replay.new_task

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_bypassed()
        super().on_pre_optimizer_step(args, state, control, model, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.prove_reference(kwargs["model"], state)
        super().on_evaluate(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.prove_reference(model, state)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_end(args, state, control)
        self.prove_reference(model, state)
        self.trainer.stop_if_kl_ended_zero()


class ReplayTrainer(ReplayMixin, Trainer):
    """`transformers.Trainer` with replay."""


class ReplaySFTTrainer(ReplayMixin, SFTTrainer):
    """`trl.SFTTrainer` with replay."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL does; but a base or model that is not on the Hub is named, where TRL writes None."""
        super().create_model_card(*args, **kwargs)
        card, base = Path(self.args.output_dir, "README.md"), Path(self.model.name_or_path).name
        if self.is_world_process_zero() and base:
            text = card.read_text(encoding="utf-8")
            text = text.replace("[None](https://huggingface.co/None)", f"`{base}`")
            write_text(card, text.replace('model="None"', f'model="{card.parent.name}"'))
