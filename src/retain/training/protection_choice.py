"""What protects a run of which nobody said what should: all of it stands in `CHOSEN_PROTECTION` and `ANCHORED`."""

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

PROTECTING = ("replay_objective", "replay_coef", "anchor_coef")  # with any of these given, nothing is chosen
UNSET: Any = object()  # the value of one that nobody gave
MAX_ROTATION_COST = 0.05  # of a plain step's operations, for an anchor's rotations
FIRST_ROWS = 64  # of the data, by which tokens are counted
MAX_EVERY = 4  # steps from one with replay to the next, where a batch has few rows


@dataclass(frozen=True)
class ProtectionChoice:
    """Settings of a protected run.

    Attributes:
        share_of_batch: replay rows over new ones, in the mean over the steps that may have some; None is the default
            of `ReplayConfig`.
        min_rows, share_of_draws: the pool has this share of the rows that the run draws, and at least `min_rows`.
        why: what speaks for it, for people to read.
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
        """Replay rows beside `batch_size` new ones, and on every how many of a run's steps.

        >>> [ProtectionChoice("", share_of_batch=1 / 16).rows_and_every(size, steps=100) for size in (64, 16, 8, 1)]
        [(4, 1), (1, 1), (1, 2), (1, 4)]
        """
        if self.share_of_batch is None:
            return None, 1
        wanted = self.share_of_batch * batch_size
        return max(1, round(wanted)), max(1, min(MAX_EVERY, round(1 / wanted), steps // MAX_EVERY))

    def line(self) -> str:
        """What was chosen and why."""
        anchor = f", anchor_coef {self.anchor_coef:g}" * bool(self.anchor_coef)
        late = f", replay after {self.replay_start:.0%} of the steps" * bool(self.replay_start)
        named = f"replay_objective {self.replay_objective}, replay_coef {self.replay_coef:g}{anchor}{late}"
        return f"chosen, since none was given: {named}; {self.why}"

    def num_rows(self, draws: int, *, reads_fisher: bool) -> int:
        """Rows of the pool: no more than the run draws, unless the Fisher information is read from them.

        >>> [ProtectionChoice("").num_rows(draws, reads_fisher=False) for draws in (12, 9000)]
        [12, 900]
        """
        wanted = max(self.min_rows, math.ceil(self.share_of_draws * draws))
        return wanted if reads_fisher or draws < 1 else min(wanted, draws)


CHOSEN_PROTECTION = ProtectionChoice(
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
    """Set what is `UNSET` of the settings in `PROTECTING`: all as chosen, or, where one is given, to their defaults.

    Returns:
        What was chosen; None where something was given.
    """
    missing = [name for name in PROTECTING if getattr(config, name) is UNSET]
    chosen = CHOSEN_PROTECTION if len(missing) == len(PROTECTING) and config.max_ref_kl is None else None
    for name in missing:
        setattr(config, name, getattr(chosen or ReplayConfig, name))
    return chosen


def choose_protection(args: Any, model_args: Any) -> ProtectionChoice:
    """An anchor for full finetuning and plain LoRA by AdamW, before the model is known; else KL alone."""
    adapts = model_args.use_peft and (model_args.use_dora or model_args.lora_modules_to_save)
    held = not (adapts or model_args.load_in_4bit or model_args.load_in_8bit or args.deepspeed_plugin)
    return ANCHORED if held and args.optim in ADAMW else CHOSEN_PROTECTION


def suits_anchor(model: Any, adapter: Any, new_tokens: float) -> bool:
    """Whether all that is trained lies in linear layers, and the anchor's rotations cost little beside a step.

    Args:
        adapter: a PEFT configuration, or None for full finetuning.
        new_tokens: of an optimizer step on a device.
    """
    modules = dict(model.named_modules())
    if adapter is not None and adapter.target_modules not in (None, "all-linear"):
        places = [module for name, module in modules.items() if check_target_module_exists(adapter, name)]
        if not all(isinstance(module, nn.Linear) for module in places):
            return False
    elif any(isinstance(module, Conv1D) for module in modules.values()):
        return False
    if adapter is None and any(weight.ndim > 2 for weight in model.parameters()):  # experts
        return False
    return rotation_cost(model, adapter, new_tokens) <= MAX_ROTATION_COST


def rotation_cost(model: Any, adapter: Any, new_tokens: float) -> float:
    """Operations of an anchor's rotations over those of a plain step of T tokens, at most.

    In full finetuning every matrix is rotated twice: 2/3 · d/T, d the residual stream's width. With LoRA of rank r its
    factors are, on the smaller side, three times: 3/2 · r/T · Σ min(m, n)² / Σ m n over linear layers of m by n.
    """
    if adapter is None:
        return float(2 / 3 * model.config.get_text_config().hidden_size / new_tokens)
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    squares, sizes = (sum(f(*shape) for shape in shapes) for f in (lambda m, n: min(m, n) ** 2, lambda m, n: m * n))
    return float(3 / 2 * adapter.r / new_tokens * squares / sizes)


def settled(choice: ProtectionChoice, model: Any, adapter: Any, new_tokens: float) -> ProtectionChoice:
    """What was chosen before the model was known, or KL alone in the place of an anchor that does not suit it."""
    return choice if choice.anchor_coef and suits_anchor(model, adapter, new_tokens) else CHOSEN_PROTECTION


def new_tokens_per_step(rows: Any, tokenizer: Any, args: Any) -> float:
    """New tokens of an optimizer step on a device, by the first rows of the data; packed rows are full."""
    length = args.max_length
    if not args.packing:
        reading = Reading(assistant_only_loss=False, dataset_text_field=args.dataset_text_field)
        first = itertools.islice(rows, FIRST_ROWS)
        read = [
            row if "input_ids" in row else {"input_ids": read_text(row, tokenizer, "dataset_name: a row", reading).ids}
            for row in first
        ]
        length = max(1.0, mean_row_length(read, length))  # these may be empty, and others not
    return tokens_per_step(args, length) / args.world_size


def rows_drawn(config: ReplayConfig, args: Any, steps: int) -> int:
    """Replay rows that a run draws in its optimizer steps; 0 where nobody knows how many steps there are."""
    if not config.objective.draws_rows:
        return 0
    per_step = config.objective.batch_rows(config, args.train_batch_size) * args.world_size
    due = math.ceil((1 - config.replay_start) * max(0, steps) / config.replay_every)
    return due * per_step * args.gradient_accumulation_steps
