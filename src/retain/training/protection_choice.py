"""The default protection of a run whose settings name none: `ANCHORED` or `KL_ALONE`.

Chosen in three steps: `fill_in` by the settings, `choose_protection` by the arguments, and `for_model` once the model
is loaded.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from retain.data.rows import Reading, read_text
from retain.training.anchor import ADAMW
from retain.training.beta2_half_life import mean_row_length, tokens_per_step
from retain.training.config import ReplayConfig

PROTECTING = ("replay_objective", "replay_coef", "anchor_coef")  # if any of these is given, nothing is chosen
FOLLOWING = ("replay_start", "per_device_replay_batch_size", "replay_every")  # a choice leaves those that were given
UNSET: Any = object()  # the value of one of these settings that was not given
MAX_ROTATION_COST = 0.05  # share of a plain step's operations that an anchor's rotations may add
FIRST_ROWS = 64  # rows from which the tokens per row are estimated
MAX_EVERY = 4  # largest `replay_every`, for batches of few rows


@dataclass(frozen=True)
class ProtectionChoice:
    """Settings of a protected run.

    Attributes:
        why: the reason for this choice, printed with it.
        share_of_batch: replay rows per new row, averaged over the steps from `replay_start` on; None for the default of
            `ReplayConfig`.
        min_rows, share_of_draws: the pool has this share of the rows that the run draws, and at least `min_rows`.
    """

    why: str
    replay_objective: str = "kl"
    replay_coef: float = 1.0
    anchor_coef: float = 0.0
    replay_start: float = 0.0
    share_of_batch: float | None = None
    min_rows: int = 256
    share_of_draws: float = 0.1

    def rows_and_every(self, batch_size: int, steps: int) -> tuple[int | None, int]:
        """The replay rows of a batch of `batch_size` new ones, and `replay_every`.

        >>> [ProtectionChoice("", share_of_batch=1 / 16).rows_and_every(size, steps=100) for size in (64, 16, 8, 1)]
        [(4, 1), (1, 1), (1, 2), (1, 4)]
        """
        if self.share_of_batch is None:
            return None, 1
        wanted = self.share_of_batch * batch_size
        return max(1, round(wanted)), max(1, min(MAX_EVERY, round(1 / wanted), steps // MAX_EVERY))

    def line(self) -> str:
        """The chosen settings and the reason, in one line."""
        anchor = f", anchor_coef {self.anchor_coef:g}" * bool(self.anchor_coef)
        late = f", replay after {self.replay_start:.0%} of the steps" * bool(self.replay_start)
        settings = f"replay_objective {self.replay_objective}, replay_coef {self.replay_coef:g}{anchor}{late}"
        return f"chosen, since none was given: {settings}; {self.why}"

    def num_rows(self, draws: int, *, reads_fisher: bool) -> int:
        """Rows of the pool: no more than the run draws, unless the Fisher information is estimated from them.

        >>> [ProtectionChoice("").num_rows(draws, reads_fisher=False) for draws in (12, 9000)]
        [12, 900]
        """
        wanted = max(self.min_rows, math.ceil(self.share_of_draws * draws))
        return wanted if reads_fisher or draws < 1 else min(wanted, draws)

    def for_model(self, model: Any, adapter: Any, new_tokens: float, rank: int | None = None) -> ProtectionChoice:
        """This choice, or KL alone if this is an anchor that does not suit the model: see `suits_anchor`."""
        return self if self.anchor_coef and suits_anchor(model, adapter, new_tokens, rank) else KL_ALONE


KL_ALONE = ProtectionChoice(
    share_of_batch=1 / 16,
    why="apart from an anchor, KL on a sixteenth of the batch prevented most of what takes at most a tenth more time",
)
ANCHORED = ProtectionChoice(
    anchor_coef=100.0,
    replay_coef=5.0,
    replay_start=0.7,
    share_of_batch=1 / 8,
    why="on SmolLM2 an anchor, and replay at the end, prevented most",
)


def fill_in(config: ReplayConfig) -> ProtectionChoice | None:
    """Set the `UNSET` settings in `PROTECTING`: as chosen if nothing else is given, else to their defaults.

    Returns:
        The choice; None if one of these settings, or `max_ref_kl`, was given.
    """
    missing = [name for name in PROTECTING if getattr(config, name) is UNSET]
    chosen = KL_ALONE if len(missing) == len(PROTECTING) and config.max_ref_kl is None else None
    for name in missing:
        setattr(config, name, getattr(chosen or ReplayConfig, name))
    return chosen


def choose_protection(args: Any, model_args: Any) -> ProtectionChoice:
    """The choice before the model is known: an anchor for full finetuning and plain LoRA with AdamW, else KL alone."""
    not_plain_lora = model_args.use_peft and (model_args.use_dora or model_args.lora_modules_to_save)
    unsuitable = not_plain_lora or model_args.load_in_4bit or model_args.load_in_8bit or args.deepspeed_plugin
    return KL_ALONE if unsuitable or args.optim not in ADAMW else ANCHORED


def suits_anchor(model: Any, adapter: Any, new_tokens: float, rank: int | None = None) -> bool:
    """Whether only linear layers are trained, and the anchor's rotations are cheap compared with a step.

    Args:
        adapter: a PEFT configuration, or None for full finetuning.
        new_tokens: per optimizer step and device.
        rank: eigenvectors of the anchor for each matrix; None for all.
    """
    modules = dict(model.named_modules())
    if adapter is not None and adapter.target_modules not in (None, "all-linear"):
        targets = [module for name, module in modules.items() if check_target_module_exists(adapter, name)]
        if not all(isinstance(module, nn.Linear) for module in targets):
            return False
    elif any(isinstance(module, Conv1D) for module in modules.values()):
        return False
    if adapter is None and any(weight.ndim > 2 for weight in model.parameters()):  # experts
        return False
    return rotation_cost(model, adapter, new_tokens, rank) <= MAX_ROTATION_COST


def rotation_cost(model: Any, adapter: Any, new_tokens: float, rank: int | None = None) -> float:
    """Upper bound on the operations of an anchor's rotations, relative to those of a plain step of T tokens.

    Full finetuning rotates every matrix twice: 2/3 · d/T, where d is the residual stream's width; with k eigenvectors
    fewer than d it multiplies by them four times: 4/3 · k/T. LoRA of rank r rotates its factors on the smaller side,
    twice: r/T · Σ min(m, n)² / Σ m n over linear layers of m by n.
    """
    if adapter is None:
        width = model.config.get_text_config().hidden_size
        return float(2 / 3 * (2 * rank if rank and rank < width else width) / new_tokens)
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    squares, sizes = sum(min(m, n) ** 2 for m, n in shapes), sum(m * n for m, n in shapes)
    return float(adapter.r / new_tokens * squares / sizes)


def new_tokens_per_step(rows: Any, tokenizer: Any, args: Any) -> float:
    """New tokens per optimizer step and device, estimated from the first rows of the data; packed rows are full."""
    length = args.max_length
    if not args.packing:
        reading = Reading(assistant_only_loss=False, dataset_text_field=args.dataset_text_field)
        tokenized = [
            row if "input_ids" in row else {"input_ids": read_text(row, tokenizer, "dataset_name: a row", reading).ids}
            for row in itertools.islice(rows, FIRST_ROWS)
        ]
        length = max(1.0, mean_row_length(tokenized, length))  # even if these rows are empty, others may not be
    return tokens_per_step(args, length) / args.world_size


def rows_drawn(config: ReplayConfig, args: Any, steps: int) -> int:
    """Replay rows that a run of this many optimizer steps draws; 0 if their number is unknown."""
    if not config.objective.draws_rows:
        return 0
    per_step = config.objective.batch_rows(config, args.train_batch_size) * args.world_size
    steps_with_replay = math.ceil((1 - config.replay_start) * max(0, steps) / config.replay_every)
    return steps_with_replay * per_step * args.gradient_accumulation_steps
