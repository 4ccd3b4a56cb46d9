"""Replay inside the user's own trainer: a mixin that overrides `compute_loss`, the extension point that TRL documents.

    loss = host's loss on the new rows + replay_coef · R,     R = mean over replay tokens of the objective

R is normalized by the replay tokens of the whole optimizer step, over micro-batches and processes, so it does not
depend on how a step is split. Source: Marek et al., section "Method".
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
from retain.training.proofs import check_noise, zero_kl_error
from retain.training.protection import RETENTION_WINDOWS, Protection, check_replay_every
from retain.training.replay_term import TermBatch
from retain.training.retention import NEW_TASK_TEXT, RetentionMeasurer, check_best_metric, retention_names
from retain.training.run_files import BUDGET_FILE, weights_step
from retain.training.stopping import check_holds_optimizer
from retain.training.trainer_checks import check_trained, check_weights, load_for_training

if TYPE_CHECKING:  # the mixin's base for type checkers; at run time the host class follows it
    from transformers import Trainer as Host
else:
    Host = object

PATIENCE = 3  # optimizer steps after warmup from which a KL of exactly 0 at the end is an error
BUDGET_STATE = "CoefController"  # its key in a checkpoint's trainer_state.json
JOINT_STATE = "JointForward"  # set once KL is above 0; before, separate passes keep it exactly 0


class ReplayMixin(Host):
    """Add replay to a `transformers.Trainer` class: `class ReplayDPOTrainer(ReplayMixin, DPOTrainer): ...`

    Args:
        model, args: as for the host trainer; a model given by name is loaded here, so that the base is read first.
        replay_config: objective, coefficient, batch size and reference of the replay.
        replay_dataset: a `ReplayDataset`, a folder that `retain sample` wrote, or a file of real text.
        retention_datasets: name → texts (or documents of tokens) measured at every evaluation, never replayed.
        start_token: the document start; chosen from the tokenizer by default.
        new_task_rows: number of `eval_dataset` rows on which `report` measures what was learned.
        kwargs: the host trainer's other arguments.

    Raises:
        ValueError: if protection cannot do what the settings say.
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
            raise ValueError("model: missing; give a model or its name (not model_init: the base must be read first)")
        if isinstance(self, RewardTrainer):
            raise ValueError("model: RewardTrainer trains scores of rows, but replay needs predictions of tokens")
        if isinstance(model, str):
            model = load_for_training(model, args, kwargs)
        check_named("retention_datasets", retention_datasets or {})
        self.replay = Protection(
            self.replay_config, model, args, replay_dataset, retention_datasets or {}, start_token, kwargs
        )
        if args is not None and args.ddp_broadcast_buffers is None:
            # Two forward passes before one backward: a broadcast between them would overwrite what autograd saved.
            args.ddp_broadcast_buffers = False

        super().__init__(model=model, args=args, **kwargs)

        self._queue: list[dict[str, Any] | None] = []  # a replay batch per micro-batch; None: the term is on new rows
        self._drawn_step = -1  # the last step for which replay was drawn
        self._replay_tokens = 0
        self._is_base = True  # until the first step; a retry after running out of memory may start from other weights
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
        """The replay objective of this run."""
        return self.replay_config.objective

    @property
    def _replay_is_due(self) -> bool:
        config, step = self.replay_config, self.state.global_step
        has_started = step >= config.replay_start * self.state.max_steps
        return self.objective is not NONE and has_started and step % config.replay_every == 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Draw the replay rows of an optimizer step together with its new rows."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.forget(self.state.global_step)
        if self.budget is None or self.state.global_step == 0:
            self.budget = self._new_or_resumed_budget()
        if not (self._replay_is_due and samples):
            return samples, num_items
        self._prove_while_kl_is_zero()
        self._drawn_step = self.state.global_step
        batches = self._draw(len(samples)) if self.objective.draws_rows else [None] * len(samples)
        if self.objective.adds_term:
            self._queue = batches
            self._meter.begin_step()
            return samples, num_items
        samples = [replace_rows(new, replay) for new, replay in zip(samples, batches, strict=True)]
        return samples, self._get_num_items_in_batch(samples, device)

    def _draw(self, num_micro_batches: int) -> list[Any]:
        """This process's replay batches for each micro-batch of the next step; they depend on the step alone."""
        dataset = self.replay.rows
        assert dataset is not None
        rows, world = self.replay_batch_size, self.accelerator.num_processes
        per_step = rows * world * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = self.state.global_step // self.replay_config.replay_every
        drawn = replay_indices(step, per_step, len(dataset), seed)
        drawn = drawn[: rows * world * num_micro_batches].reshape(num_micro_batches, world, rows)
        self._replay_tokens = max(1, int(dataset.num_predictions[drawn].sum()))
        of_process = drawn[:, self.accelerator.process_index]
        return [self.replay.batch(indices, self.accelerator.device) for indices in of_process]

    # The anchor

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the host's optimizer, or AdamW with the anchor."""
        if self.replay.anchor is not None:
            self.optimizer_cls_and_kwargs = self.replay.anchor.optimizer(self.args, self.replay_config)
        return super().create_optimizer(model)

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The host's loss plus, in training, the replay term."""
        new = dict(inputs)
        with self._joint_forward() as hidden:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not (self.model.training and self.objective.adds_term):
            return result
        scale = 1.0 if self._host_scales(num_items_in_batch) else self.current_gradient_accumulation_steps
        host_loss = result[0] if return_outputs else result
        self._meter.add_new_task(self.state.global_step, host_loss.detach() / scale)
        if not self._replay_is_due:
            return result
        if not self._queue:
            raise ValueError(
                f"replay: {type(self).__name__} computes a loss for which no rows were drawn; nothing protects it"
            )
        replay = self._queue.pop(0)
        if replay is None:
            term = self._term_on_new_rows(model, new, num_items_in_batch)
        else:
            term = self._term_on_replay(model, replay, *hidden)
        self._meter.add_term(term)
        added = self.replay_coef * self.replay_config.replay_every * scale * term
        return (host_loss + added, result[1]) if return_outputs else host_loss + added

    def _joint_forward(self) -> AbstractContextManager[list[Tensor]]:
        """A context in which the host's forward pass may also run the micro-batch's replay rows."""
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
        # This micro-batch's share of the step's mean; DDP averages gradients, hence the factor num_processes.
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
        """Whether the host's loss is already divided by the number of micro-batches; as in `Trainer.training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step; a loss that is not finite stops the run before the weights change."""
        reshard(self.model)
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None  # prompts come as a list
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss).all()):
            step = f"loss: {loss.item()} at step {self.state.global_step + 1}"
            if labels is not None and not bool((labels[..., 1:] != -100).any()):
                raise ValueError(
                    f"{step}: every label of its new rows is masked (-100), so there is nothing to learn; drop these "
                    "rows, or raise max_length if it cuts answers off"
                )
            raise ValueError(
                f"{step}; lower learning_rate or replay_coef, or use bf16 instead of fp16; checkpoints in "
                f"{self.args.output_dir!r} are kept"
            )
        if self._replay_is_due and not self._queue:
            if self.objective.uses_reference and self._is_base and self.state.global_step == 0:
                kl = float(self._meter.step_term) if self.budget is None else self._meter.kl_after_openings()
                check_noise(kl, self.replay_config.max_ref_kl)
            self._is_base = False
            if not self._meter.kl_stayed_zero():
                self.state.stateful_callbacks[JOINT_STATE] = {"args": {}, "attributes": {}}
            if self.budget is not None:
                self.budget.update(self._meter.kl_after_openings())
                if self.replay.anchor is not None:
                    self.replay.anchor.scale_coef(self.optimizer, self.replay_config, self.budget.coef)
                self.state.stateful_callbacks[BUDGET_STATE] = {"args": {}, "attributes": self.budget.state_dict()}
        return loss

    def stop_if_bypassed(self) -> None:
        """Stop, before the weights change, if the host's step has not used all the replay that was drawn for it."""
        is_used = self._drawn_step == self.state.global_step and not self._queue
        if not is_used and self._replay_is_due:
            raise ValueError(
                f"replay: {type(self).__name__} made step {self.state.global_step + 1} without it, so nothing protects "
                "the model; leave get_batch_samples and compute_loss to ReplayMixin, and the model in training mode"
            )

    def _prove_while_kl_is_zero(self) -> None:
        """While KL is exactly 0, prove that the reference does not move with the model."""
        check_replay_every(self.replay_config, self.state.max_steps)
        if self._drawn_step >= 0 and self._meter.kl_stayed_zero():
            self.measurer.prove_reference(self.model, self.state)

    def stop_if_kl_ended_zero(self) -> None:
        """Stop if training beyond the warmup has not changed the model's predictions on replay rows."""
        is_past_warmup = self._drawn_step >= self.args.get_warmup_steps(self.state.max_steps) + PATIENCE
        if not (is_past_warmup and self.objective.uses_reference):
            return
        is_unchanged = self._meter.kl_stayed_zero()
        if not is_unchanged and self.objective.draws_rows:  # its KL may be noise
            is_unchanged = not self.replay.has_moved(self.model)
            reshard(self.model)
        if is_unchanged:
            raise zero_kl_error(self.state.global_step)

    # The budget

    @property
    def replay_coef(self) -> float:
        """The coefficient of the next step."""
        return self.replay_config.replay_coef if self.budget is None else self.budget.coef

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The host's training; a budget starts anew or from the checkpoint, and its verdict goes to `budget.json`."""
        check_trained(self.model, getattr(self, "train_dataset", None))
        self.budget = None
        folder, writes = Path(self.args.output_dir), self.is_world_process_zero()
        resumed = args[0] if args else kwargs.get("resume_from_checkpoint")
        check_holds_optimizer(self, resumed)
        load_or_save_anchor(self.replay.anchor, folder, resumed, writes=writes)
        result = super().train(*args, **kwargs)
        if self.budget is None:  # resumed after the last step
            self.budget = self._new_or_resumed_budget()
        if self.budget is not None and self.budget.step and writes:
            verdict = {"budget": self.budget.budget, **dataclasses.asdict(self.budget.verdict())}
            write_json(folder / BUDGET_FILE, verdict)
        return result

    def _new_or_resumed_budget(self) -> CoefController | None:
        config, saved = self.replay_config, self.state.stateful_callbacks.get(BUDGET_STATE)
        if config.max_ref_kl is None:
            return None
        steps = -(-self.state.max_steps // config.replay_every)
        budget = CoefController(config.max_ref_kl, num_steps=steps, coef=config.replay_coef)
        if self.state.global_step and saved is not None:
            budget.load_state_dict(saved["attributes"])
        return budget

    # Measurements, reports, files and logs

    def evaluate_retention(self) -> dict[str, float]:
        """Measure every retention text against the base, log the values, and write the per-document sums.

        Returns:
            `retention/<name>/loss`, `/forgetting` and `/ref_kl` in nats per token, `/ref_agreement` as a share.
        """
        return self.measurer.measure_and_log(self.args, self.state, self.control, self.model)

    def report(self, name: str) -> ForgettingReport:
        """A report of what was learned and forgotten so far, in the form that `measure` returns, without a noise floor.

        Args:
            name: the run's name.
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
        """Lines that say what protects this run."""
        return self.replay.lines(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the host's model card, with a table of forgetting if it was measured."""
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
        """Save the model as the host does, if its weights are finite."""
        check_weights(self.model, self.accelerator, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_weights(self.model, self.accelerator, self.args.output_dir)  # before the host writes its model card
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Split the logged training `loss`, the sum, into `new_task/loss` and `replay/coef` · `replay/loss`.

        All are means over the logged steps and processes. A KL is also logged as `replay/kl`, and separately over the
        rows' first predictions (`replay/kl_opening`) and all others (`replay/kl_rest`, which a budget controls).
        `replay/anchor` is the anchor's estimate of KL at the current weights; if no replay rows are drawn to compare it
        with, `replay/kl_fixed` is that KL on two fixed rows.
        """
        if "loss" in logs:
            logs.update(self._meter.logs(self.state.global_step, self.replay_coef))
            if self.replay.anchor is not None:
                kl = logs.get("replay/kl") if self.objective.draws_rows else None
                logs.update(self.replay.anchor.logs(kl, self.model, self.accelerator.device))
        super().log(logs, start_time)


class ProtectedRun(RetentionMeasurer):
    """The measurer of a protected run, which also proves its protection at evaluations, checkpoints and the end."""

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
        """Write TRL's card, with the names of a base and model that are not on the Hub, for which TRL writes None."""
        super().create_model_card(*args, **kwargs)
        card, base = Path(self.args.output_dir, "README.md"), Path(self.model.name_or_path).name
        if self.is_world_process_zero() and base:
            text = card.read_text(encoding="utf-8")
            text = text.replace("[None](https://huggingface.co/None)", f"`{base}`")
            write_text(card, text.replace('model="None"', f'model="{card.parent.name}"'))
