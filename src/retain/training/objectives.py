"""The replay objectives: what each one trains on, and what it adds to the loss.

To add one, write a class here and put an instance into `OBJECTIVES`; flags, checks, logs and `protection()` follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from retain.training.config import ReplayConfig
    from retain.training.replay_term import ReplayTerm, TermBatch


class Objective:
    """What one value of `replay_objective` does; this base class protects nothing."""

    name = "none"
    meaning = ""  # a sentence or two for the flag's help
    draws_rows = False  # trains on replay rows
    adds_term = False  # adds `replay_coef` times its mean to the host's loss
    uses_reference = False  # compares the model with its frozen base
    takes_stored = False  # can use the base's predictions that were stored with the rows

    def check_settings(self, config: ReplayConfig) -> None:
        """Raise a `ValueError` for settings that this objective does not support."""

    def check_arguments(self, args: Any) -> None:
        """Raise a `ValueError` for training arguments that this objective does not support."""

    def batch_rows(self, config: ReplayConfig, batch: int) -> int:
        """Replay rows per device and micro-batch of `batch` new rows."""
        return config.per_device_replay_batch_size or max(1, batch // 8)  # experiments/study_01_replay_cost

    def strength(self, config: ReplayConfig) -> str:
        """Its coefficient, budget or share, printed when a run starts."""
        if config.max_ref_kl is not None:
            return f"budget {config.max_ref_kl:g} nats per token (coefficient from {config.replay_coef:g})"
        return f"coefficient {config.replay_coef:g}"

    def total(self, term: ReplayTerm, batch: TermBatch) -> Tensor:
        """Sum over the predicted tokens of a batch, in nats; the trainer divides by the tokens of the step."""
        raise NotImplementedError


class KL(Objective):
    """KL to the base on replay rows: Marek et al., arXiv 2605.26097."""

    name, meaning = "kl", "KL(base || model) on replay rows."
    draws_rows = adds_term = uses_reference = takes_stored = True

    def total(self, term: ReplayTerm, batch: TermBatch) -> Tensor:
        return term.kl(batch)


class NextToken(Objective):
    """Next-token loss on replay rows, as on new ones."""

    name, meaning = "ntp", "next-token loss on replay rows."
    draws_rows = adds_term = True

    def total(self, term: ReplayTerm, batch: TermBatch) -> Tensor:
        return term.next_token_loss(batch)


class Replace(Objective):
    """The host's loss on batches in which replay rows replace some of the new ones."""

    name, meaning = "replace", "replay rows take a share of each batch; no extra term."
    draws_rows = True

    def check_settings(self, config: ReplayConfig) -> None:
        if not 0 < config.replay_share < 1:
            raise ValueError(
                f"replay_share: {config.replay_share} leaves a batch with no replay or no new rows; use a share above "
                "0 and below 1"
            )

    def check_arguments(self, args: Any) -> None:
        if getattr(args, "packing", False):
            raise ValueError(
                "replay_objective: 'replace' needs padded batches; set packing false, or use 'kl' or 'ntp'"
            )

    def batch_rows(self, config: ReplayConfig, batch: int) -> int:
        rows = round(config.replay_share * batch)
        if not 0 < rows < batch:
            raise ValueError(
                f"replay_share: {config.replay_share} of per_device_train_batch_size {batch} is {rows} rows; "
                "use a share that leaves both replay and new rows"
            )
        return rows

    def strength(self, config: ReplayConfig) -> str:
        rows = config.per_device_replay_batch_size
        unused = "" if rows is None else f" (per_device_replay_batch_size {rows} is not used: replay_share is)"
        return f"share {config.replay_share:g} of each batch{unused}"


class KLOnNewRows(KL):
    """KL to the base on the new rows themselves, without replay rows."""

    name, meaning = "kl_new", "KL(base || model) on the new rows; needs no replay rows."
    draws_rows = takes_stored = False


NONE = Objective()
OBJECTIVES = {objective.name: objective for objective in (KL(), NextToken(), Replace(), KLOnNewRows())}
