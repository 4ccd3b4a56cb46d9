"""The anchor of a run: the base's Fisher information on the replay rows, and the optimizer that is built on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from retain.models.description import base_parameter_name
from retain.models.fisher import distinct_tensors, load_fisher, num_bytes, save_fisher
from retain.replay.dataset import ReplayDataset
from retain.replay.fisher import fisher_of
from retain.training.anchored_adamw import AnchoredAdamW, AnchoredLoRA, AnchoredWeight
from retain.training.config import ReplayConfig
from retain.training.fixed_rows import FixedRows

logger = logging.getLogger(__name__)

ANCHOR_FILE = "anchor.safetensors"  # the curvatures of a run, which a resumed one needs to the last bit
MAX_BEYOND, MIN_KL = (
    10.0,
    0.01,
)  # KL over the anchor's value at which that says little of it, and nats from which it counts
ADAMW = ("adamw_torch", "adamw_torch_fused")  # of transformers' optimizers, those that it takes the place of


@dataclass
class Anchor:
    """Curvatures of every weight that a run trains.

    Attributes:
        anchored: the weights, at the base.
        num_tokens: predictions that were read.
        seconds: that it took.
        fixed: rows on which the KL is measured where none are drawn.
    """

    anchored: list[AnchoredWeight | AnchoredLoRA]
    num_tokens: int
    seconds: float
    fixed: FixedRows
    warned: bool = False

    @classmethod
    def measure(cls, model: Any, rows: ReplayDataset, seed: int, autocast: Callable[[], Any] = nullcontext) -> Anchor:
        """Read replay rows with the base that the model still is.

        Args:
            autocast: makes the context of the training's forward passes.

        Raises:
            ValueError: if something is trained besides whole weights, or besides LoRA of linear layers.
        """
        began = time.monotonic()
        lora = {name: (of, layer) for name, of, layer in _lora_layers(model)}
        weights: dict[str, nn.Parameter] = {name: layer.get_base_layer().weight for name, (_, layer) in lora.items()}
        if not lora:
            weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        fisher, num_tokens = fisher_of(model, rows, weights, seed)
        for tensor in distinct_tensors(fisher.values()):
            broadcast(tensor)  # kernels may differ in rounding, and with it eigenvectors
        anchored: list[AnchoredWeight | AnchoredLoRA] = [
            AnchoredLoRA(layer.lora_A[of].weight, layer.lora_B[of].weight, layer.scaling[of], fisher[name])
            for name, (of, layer) in lora.items()
        ] or [AnchoredWeight(weights[name], curvature) for name, curvature in fisher.items()]
        known = {id(parameter) for one in anchored for parameter in one.parameters}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise ValueError(
                    f"anchor_coef: {name!r} is trained, and the anchor holds whole models or LoRA of linear layers "
                    "alone; leave it out, or set anchor_coef 0 and use replay alone"
                )
        seconds = time.monotonic() - began
        return cls(anchored, num_tokens, seconds, FixedRows(model, rows, anchored, autocast))

    def optimizer(self, args: Any, config: ReplayConfig) -> tuple[type[AnchoredAdamW], dict[str, Any]]:
        """The run's optimizer as transformers takes one: its class, and all but the groups of parameters."""
        return AnchoredAdamW, {
            "anchored": self.anchored, "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon, "coef": config.anchor_coef, "lr_ratio": config.anchor_lr_ratio,
        }  # fmt: skip

    @staticmethod
    def weigh(optimizer: Any, config: ReplayConfig, replay_coef: float) -> None:
        """Let the anchor's coefficient grow and fall with that of replay, which a limit of the KL moves."""
        for group in optimizer.param_groups:
            group["coef"] = config.anchor_coef * replay_coef / config.replay_coef

    def penalty(self) -> float:
        """½ ΔᵀFΔ of the weights in place: KL(base ‖ model) to second order, nats per token of the base's own text."""
        with torch.no_grad():
            return float(torch.stack([one.penalty() for one in self.anchored]).sum())

    def logs(self, kl: float | None, model: Any, device: torch.device) -> dict[str, float]:
        """The penalty, for the logs, and a warning, once, where the KL on replay rows has outgrown it.

        Args:
            kl: on rows that were drawn, nats per token; None where none were: then that on the fixed ones is logged.
        """
        found = {"replay/anchor": (penalty := self.penalty())}
        if kl is None:
            kl = found["replay/kl_fixed"] = self.fixed.kl(model, device)
        if not self.warned and kl > max(MIN_KL, MAX_BEYOND * penalty):
            self.warned = True
            logger.warning(
                "anchor_coef: the model has moved so far that KL(base || model) on replay rows is %.3g nats per token, "
                "where the anchor sees %.2g (replay/anchor): it no longer holds what moves; lower learning_rate, or "
                "add replay (replay_coef) or let it begin earlier (replay_start)",
                kl, penalty,
            )  # fmt: skip
        return found

    def save(self, folder: Path) -> None:
        """Keep the curvatures for a run that resumes: Adam's state is in their coordinates."""
        kept = {str(at): one.curvature for at, one in enumerate(self.anchored)}
        save_fisher(folder / ANCHOR_FILE, kept, self.num_tokens)

    def load(self, folder: Path) -> None:
        """Take what the run that is resumed kept."""
        kept, self.num_tokens = load_fisher(folder / ANCHOR_FILE, self.anchored[0].parameters[0].device)
        for at, one in enumerate(self.anchored):
            one.curvature = kept[str(at)]

    def line(self, config: ReplayConfig) -> str:
        """What it does, for people to read."""
        size = num_bytes(one.curvature for one in self.anchored) / 1e6
        return (
            f"anchor: coefficient {config.anchor_coef:g}, inside AdamW, at {config.anchor_lr_ratio:g} times the rate; "
            f"Fisher information of {self.num_tokens:,} tokens of replay rows took {self.seconds:.0f} s, {size:.0f} MB"
        )


def begin_anchor(anchor: Anchor | None, folder: Path, resumed: Any, *, writes: bool) -> None:
    """Take the curvatures that a resumed run began with, and keep those of this one.

    Args:
        resumed: `resume_from_checkpoint` as transformers takes it: a path, True for the last one, or nothing.
        writes: whether this process is the one that writes.

    Raises:
        ValueError: if the run that is resumed began with an anchor and has none now, or the other way round.
    """
    if resumed:
        began = Path(resumed).parent if isinstance(resumed, str | Path) else folder
        if (began / ANCHOR_FILE).exists() != (anchor is not None):
            how = "without an anchor" if anchor is not None else "with an anchor"
            raise ValueError(
                f"anchor_coef: the run in {str(began)!r} began {how}, whose optimizer's state fits no other; resume it "
                "so, or begin anew in another folder"
            )
        if anchor is not None:
            anchor.load(began)
    if writes and anchor is not None:
        anchor.save(folder)
    elif writes:
        (folder / ANCHOR_FILE).unlink(missing_ok=True)  # of an earlier run


def check_anchor(args: Any, trainer: Any) -> None:
    """Raise a `ValueError` for hosts and settings with which the anchor could not work."""
    if args.optim not in ADAMW:
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(f"optim: {name!r} cannot hold the anchor; use adamw_torch, or set anchor_coef 0")
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("optimizers: the anchor brings its own AdamW; leave them out, or set anchor_coef 0")
    if trainer.is_deepspeed_enabled:
        raise ValueError("anchor_coef: DeepSpeed brings an optimizer of its own; use DDP or FSDP2, or set it 0")


def _lora_layers(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Name in the base of each weight with an adapter, name of the adapter that is trained, and the layer."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for of in module.active_adapters:
            plain = isinstance(module, LoraLayer) and of in module.lora_A and not len(module.lora_magnitude_vector)
            if not (plain and isinstance(module.get_base_layer(), nn.Linear)):
                raise ValueError(
                    f"anchor_coef: the adapter at {name!r} is no plain LoRA of a linear layer; use LoRA without DoRA, "
                    "full finetuning, or anchor_coef 0"
                )
            yield str(base_parameter_name(f"{name}.base_layer.weight")), of, module
