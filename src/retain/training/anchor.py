"""The anchor of a run: the base's Fisher information on the replay rows, and the optimizer built on it."""

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
from retain.replay.stored_fisher import fisher_of
from retain.training.anchored_adamw import AnchoredAdamW, AnchoredLoRA, AnchoredWeight
from retain.training.config import ReplayConfig
from retain.training.fixed_rows import FixedRows

logger = logging.getLogger(__name__)

ANCHOR_FILE = "anchor.safetensors"  # the curvatures; a resumed run needs them bit for bit
MAX_KL_RATIO = 10.0  # measured KL over the anchor's estimate; above it the estimate is no longer valid
MIN_KL = 0.01  # nats per token; a smaller measured KL is not compared
ADAMW = ("adamw_torch", "adamw_torch_fused")  # transformers' optimizers that the anchor can replace


@dataclass
class Anchor:
    """Curvature of every weight that a run trains.

    Attributes:
        anchored: the trained weights, with their values in the base.
        num_tokens: predictions from which the Fisher information was estimated.
        seconds: time the estimate took.
        fixed: rows on which KL is measured when no replay rows are drawn.
    """

    anchored: list[AnchoredWeight | AnchoredLoRA]
    num_tokens: int
    seconds: float
    fixed: FixedRows
    warned: bool = False

    @classmethod
    def measure(
        cls,
        model: Any,
        rows: ReplayDataset,
        seed: int,
        autocast: Callable[[], Any] = nullcontext,
        rank: int | None = None,
    ) -> Anchor:
        """Estimate the Fisher information on replay rows, while the model is still the base.

        Args:
            rank: eigenvectors to keep for each matrix; None for all.
            autocast: makes the context in which training runs its forward passes.

        Raises:
            ValueError: if anything but whole weights, or anything but LoRA on linear layers, is trained.
        """
        start_time = time.monotonic()
        lora = {name: (adapter, layer) for name, adapter, layer in _lora_layers(model)}
        weights: dict[str, nn.Parameter] = {name: layer.get_base_layer().weight for name, (_, layer) in lora.items()}
        if not lora:
            weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        fisher, num_tokens = fisher_of(model, rows, weights, seed)
        if rank is not None:
            fisher = {name: curvature.truncated(rank) for name, curvature in fisher.items()}
        for tensor in distinct_tensors(fisher.values()):
            broadcast(tensor)  # kernels may round differently on each process, which changes the eigenvectors
        anchored: list[AnchoredWeight | AnchoredLoRA] = [
            AnchoredLoRA(
                layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter], fisher[name]
            )
            for name, (adapter, layer) in lora.items()
        ] or [AnchoredWeight(weights[name], curvature) for name, curvature in fisher.items()]
        anchored_ids = {id(parameter) for weight in anchored for parameter in weight.parameters}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in anchored_ids:
                raise ValueError(
                    f"anchor_coef: {name!r} is trained, but the anchor supports only whole models or LoRA on linear "
                    "layers; do not train it, or set anchor_coef 0 and use replay alone"
                )
        seconds = time.monotonic() - start_time
        return cls(anchored, num_tokens, seconds, FixedRows(model, rows, anchored, autocast))

    def optimizer(self, args: Any, config: ReplayConfig) -> tuple[type[AnchoredAdamW], dict[str, Any]]:
        """The run's optimizer in transformers' form: its class, and all arguments but the parameter groups."""
        return AnchoredAdamW, {
            "anchored": self.anchored, "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon, "coef": config.anchor_coef, "lr_ratio": config.anchor_lr_ratio,
        }  # fmt: skip

    @staticmethod
    def scale_coef(optimizer: Any, config: ReplayConfig, replay_coef: float) -> None:
        """Scale the anchor's coefficient with the replay coefficient, which adapts to `max_ref_kl`."""
        for group in optimizer.param_groups:
            group["coef"] = config.anchor_coef * replay_coef / config.replay_coef

    def penalty(self) -> float:
        """½ ΔᵀFΔ at the current weights: KL(base ‖ model) to second order, nats per token of the base's own text."""
        with torch.no_grad():
            return float(torch.stack([weight.penalty() for weight in self.anchored]).sum())

    def logs(self, kl: float | None, model: Any, device: torch.device) -> dict[str, float]:
        """The penalty for the logs; warns once if the KL on replay rows far exceeds it.

        Args:
            kl: on the drawn replay rows, nats per token; None if none were drawn: KL on the fixed rows is logged then.
        """
        logs = {"replay/anchor": (penalty := self.penalty())}
        if kl is None:
            kl = logs["replay/kl_fixed"] = self.fixed.kl(model, device)
        if not self.warned and kl > max(MIN_KL, MAX_KL_RATIO * penalty):
            self.warned = True
            logger.warning(
                "anchor_coef: KL(base || model) on replay rows is %.3g nats per token, but the anchor estimates %.2g "
                "(replay/anchor): the model has moved too far for the anchor to hold it; lower learning_rate, add "
                "replay (replay_coef), or start replay earlier (replay_start)",
                kl, penalty,
            )  # fmt: skip
        return logs

    def save(self, folder: Path) -> None:
        """Write the curvatures for a resumed run: Adam's state is in their coordinates."""
        curvatures = {str(index): weight.curvature for index, weight in enumerate(self.anchored)}
        save_fisher(folder / ANCHOR_FILE, curvatures, self.num_tokens)

    def load(self, folder: Path) -> None:
        """Read the curvatures of the run that is resumed."""
        curvatures, self.num_tokens = load_fisher(folder / ANCHOR_FILE, self.anchored[0].parameters[0].device)
        for index, weight in enumerate(self.anchored):
            weight.curvature = curvatures[str(index)]

    def line(self, config: ReplayConfig) -> str:
        """The anchor in one line, printed when the run starts."""
        size = num_bytes(weight.curvature for weight in self.anchored) / 1e6
        return (
            f"anchor: coefficient {config.anchor_coef:g}, inside AdamW, at {config.anchor_lr_ratio:g} times the rate; "
            f"Fisher information of {self.num_tokens:,} tokens of replay rows took {self.seconds:.0f} s, {size:.0f} MB"
        )


def load_or_save_anchor(anchor: Anchor | None, folder: Path, resumed: Any, *, writes: bool) -> None:
    """Load the curvatures of the run that is resumed, and save those of this one.

    Args:
        resumed: `resume_from_checkpoint` as transformers takes it: a path, True for the last checkpoint, or nothing.
        writes: whether this process writes files.

    Raises:
        ValueError: if the resumed run started with an anchor and has none now, or the reverse.
    """
    if resumed:
        resumed_folder = Path(resumed).parent if isinstance(resumed, str | Path) else folder
        if (resumed_folder / ANCHOR_FILE).exists() != (anchor is not None):
            how = "without an anchor" if anchor is not None else "with an anchor"
            raise ValueError(
                f"anchor_coef: the run in {str(resumed_folder)!r} started {how}, so its optimizer state does not fit; "
                "resume it the same way, or start a new run in another folder"
            )
        if anchor is not None:
            anchor.load(resumed_folder)
    if writes and anchor is not None:
        anchor.save(folder)
    elif writes:
        (folder / ANCHOR_FILE).unlink(missing_ok=True)  # of an earlier run


def check_anchor(args: Any, trainer: Any) -> None:
    """Raise a `ValueError` for trainers and settings that the anchor does not support."""
    if args.optim not in ADAMW:
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(f"optim: the anchor does not work with {name!r}; use adamw_torch, or set anchor_coef 0")
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("optimizers: the anchor brings its own AdamW; pass none, or set anchor_coef 0")
    if trainer.is_deepspeed_enabled:
        raise ValueError("anchor_coef: DeepSpeed brings its own optimizer; use DDP or FSDP2, or set anchor_coef 0")


def _lora_layers(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Each adapted weight's name in the base, the name of its adapter, and its layer."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for adapter in module.active_adapters:
            plain = isinstance(module, LoraLayer) and adapter in module.lora_A and not len(module.lora_magnitude_vector)
            if not (plain and isinstance(module.get_base_layer(), nn.Linear)):
                raise ValueError(
                    f"anchor_coef: the adapter at {name!r} is not plain LoRA on a linear layer; use LoRA without DoRA, "
                    "full finetuning, or anchor_coef 0"
                )
            yield str(base_parameter_name(f"{name}.base_layer.weight")), adapter, module
