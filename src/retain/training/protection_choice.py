"""What protects a run of which nobody said what should: all of it stands in `CHOSEN_PROTECTION` and `ANCHORED`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from retain.training.anchor import ADAMW
from retain.training.config import ReplayConfig

PROTECTING = ("replay_objective", "replay_coef", "anchor_coef")  # with any of these given, nothing is chosen
UNSET: Any = object()  # the value of one that nobody gave


@dataclass(frozen=True)
class ProtectionChoice:
    """Settings of a protected run.

    Attributes:
        share_of_batch: replay rows over new ones, in steps that have some; None is the default of `ReplayConfig`.
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


CHOSEN_PROTECTION = ProtectionChoice(why="a KL to the base prevented most wherever it was studied")
ANCHORED = ProtectionChoice(
    anchor_coef=300.0,
    replay_coef=5.0,
    replay_start=0.7,
    why="with LoRA on SmolLM2 an anchor, and replay at the end, prevented most",
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
    """An anchor for plain LoRA, on which it was studied with a real model, where it can hold it; else KL alone."""
    plain_lora = model_args.use_peft and not (
        model_args.use_dora or model_args.lora_modules_to_save or model_args.load_in_4bit or model_args.load_in_8bit
    )
    return ANCHORED if plain_lora and args.optim in ADAMW and not args.deepspeed_plugin else CHOSEN_PROTECTION


def has_linear_places(model: Any, adapter: Any) -> bool:
    """Whether all places of an adapter, or of none, are linear layers, which an anchor can hold."""
    if adapter is None:
        return True
    modules = dict(model.named_modules())
    if adapter.target_modules in (None, "all-linear"):
        return not any(isinstance(module, Conv1D) for module in modules.values())
    places = [module for name, module in modules.items() if check_target_module_exists(adapter, name)]
    return all(isinstance(module, nn.Linear) for module in places)


def rows_drawn(config: ReplayConfig, args: Any, steps: int) -> int:
    """Replay rows that a run draws in its optimizer steps; 0 where nobody knows how many steps there are."""
    if not config.objective.draws_rows:
        return 0
    per_step = config.objective.batch_rows(config, args.train_batch_size) * args.world_size
    due = math.ceil((1 - config.replay_start) * max(0, steps) / config.replay_every)
    return due * per_step * args.gradient_accumulation_steps
