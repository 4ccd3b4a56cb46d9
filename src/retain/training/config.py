"""The settings of replay and of stopping, each described and checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from retain.checks import Settings, check_number, setting
from retain.training.objectives import NONE, OBJECTIVES, Objective

if TYPE_CHECKING:
    ReplayObjective = str
else:
    ReplayObjective = Literal[tuple(OBJECTIVES)]
ReplayReference = Literal["auto", "adapter", "copy", "cache"]


@dataclass(kw_only=True)
class ReplayConfig(Settings):
    """How replay protects a finetune: Marek et al., arXiv 2605.26097; docs/replay.md has the formulas.

    >>> config = ReplayConfig(replay_objective="kl", replay_coef=2.0)
    >>> config.objective.uses_reference, config.objective.draws_rows
    (True, True)
    """

    replay_objective: ReplayObjective = setting(
        "kl", " ".join(f"{name}: {objective.meaning}" for name, objective in OBJECTIVES.items())
    )
    replay_coef: float = setting(
        1.0, "Weight of the replay term relative to the new-task loss. 0 switches protection off."
    )
    per_device_replay_batch_size: int | None = setting(
        None,
        "Replay rows per device and micro-batch. Default: one eighth of per_device_train_batch_size, at least 1.",
        low=1,
    )
    replay_every: int = setting(
        1,
        "Replay on every k-th optimizer step, with the term weighted by k: cheaper, with the same pull in the long "
        "run.",
        low=1,
    )
    replay_start: float = setting(
        0.0,
        "Share of the run's steps before replay starts; with an anchor, replay is worth most at the end.",
        high=0.99,
    )
    replay_share: float = setting(
        0.25, "Share of each batch that is replaced by replay rows, with replay_objective replace.", high=1
    )
    replay_max_length: int | None = setting(
        None,
        "Tokens per replay row, for rows that are still to be made (replay_dataset self, or real text). Default: the "
        "trainer's max_length, or 512, or the model's positions if fewer. Rows sampled earlier keep their length.",
        low=2,
    )
    replay_reference: ReplayReference = setting(
        "auto",
        "Where the base's predictions come from. adapter: the model with its adapter switched off. copy: a frozen "
        "copy. cache: what `retain sample --store_reference` stored with the rows. auto: cache if the rows have one, "
        "else adapter if there is one, else copy.",
    )
    max_ref_kl: float | None = setting(
        None,
        "Target for KL(base || model) on replay rows at the end of training, in nats per token, leaving out the first "
        "five of each row. The coefficient starts at replay_coef and adapts, and anchor_coef with it; at the end the "
        "run reports whether the limit was kept. Needs replay_objective kl.",
        low=1e-9,
    )
    anchor_coef: float = setting(
        0.0,
        "Weight of the anchor: KL(base || model) to second order, from the base's Fisher information on the replay "
        "rows (K-FAC), which AdamW solves for at every step. It adds to replay, or stands alone with replay_coef 0. "
        "0: no anchor.",
    )
    anchor_rank: int | None = setting(
        None,
        "Eigenvectors that the anchor keeps for each matrix; outside their span it holds all directions alike. Fewer "
        "make a step cheaper: they add about 4/3 rank / tokens to its operations with full finetuning. Default: all.",
        low=1,
    )
    anchor_lr_ratio: float = setting(
        10.0,
        "With an anchor, learning_rate is multiplied by this: what the anchor does not hold has to move faster to "
        "learn as much in the same steps. Give the learning_rate of a run without an anchor.",
        low=1e-3,
    )
    allow_off_policy_replay: bool = setting(
        False, "Accept replay rows written by another model or tokenizer; the log says so."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_ref_kl is not None:
            if not (self.objective.uses_reference and self.objective.draws_rows):
                raise ValueError(
                    f"max_ref_kl: {self.max_ref_kl} needs replay_objective kl and a replay_coef above 0, "
                    f"not {self.replay_objective!r} and {self.replay_coef:g}"
                )
            if self.replay_start:
                raise ValueError(
                    f"replay_start: {self.replay_start:g} leaves max_ref_kl no KL to control; set replay_start 0, or "
                    "leave max_ref_kl out"
                )
            check_number("replay_coef", self.replay_coef, low=1e-3, high=1e3)  # the bounds within which it adapts
        self.objective.check_settings(self)

    is_baseline = False  # whether the run is unprotected on purpose, to compare others with it

    @property
    def protects(self) -> bool:
        """Whether the run has an objective or an anchor."""
        return self.objective is not NONE or self.anchor_coef > 0

    @property
    def needs_rows(self) -> bool:
        """Whether the run uses replay rows."""
        return self.objective.draws_rows or self.anchor_coef > 0

    @property
    def objective(self) -> Objective:
        """The replay objective; `NONE` if its term has a coefficient of 0."""
        chosen = OBJECTIVES[self.replay_objective]
        return NONE if chosen.adds_term and not self.replay_coef else chosen


@dataclass(kw_only=True)
class StoppingConfig(Settings):
    """Settings for any run, with or without replay, that transformers lacks."""

    adam_beta2_half_life_tokens: float | None = setting(
        None,
        "Half-life of Adam's second moment in tokens (without replay rows), e.g. 10e6; replaces adam_beta2.",
        low=1e-6,
    )
    stop_at_loss: float | None = setting(
        None, "Stop at the first evaluation with a new-task loss this low, in nats per token.", low=1e-6
    )


def check_arguments(args: Any, replay_objective: str | None = None) -> None:
    """Raise a `ValueError` for training arguments that torch or transformers would reject late, or not at all."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_number(name, getattr(args, name), low=1, integer=True)
    for name in ("learning_rate", "weight_decay"):
        check_number(name, getattr(args, name), low=0)
    check_number("seed", args.seed, low=0, high=2**32 - 1, integer=True)
    if replay_objective is not None:
        OBJECTIVES[replay_objective].check_arguments(args)
    if (length := getattr(args, "max_length", None)) is not None:  # only TRL's configs have one
        check_number("max_length", length, low=2, integer=True)
    if args.neftune_noise_alpha is not None:
        check_number("neftune_noise_alpha", args.neftune_noise_alpha, low=0)
