"""The frozen base: the model with its adapter switched off, or a copy taken before any trainer touched it.

That the reference *is* the base is not assumed but shown: its logits on probe tokens must be those of the model
as it was handed over. Adapters whose initialisation rewrites the base weights (PiSSA, OLoRA, CorDA), adapters that
were trained or merged before, and a copy that shares a patched forward are so found before the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retain.losses import kl_divergence

PROBE_SHAPE = (2, 16)
# Largest difference of log-probabilities, relative to their spread, that kernels and devices may cause.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Largest KL, nats per token, between predictions of one reference at two moments of a run: in float32, and in less.
MAX_DRIFT, MAX_DRIFT_HALF = 1e-5, 1e-3


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and every other training-time noise off; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen_as_found(model: nn.Module) -> Iterator[None]:
    """What is frozen stays frozen: PEFT makes the whole adapter trainable when it switches it on again."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def probe_tokens(vocab_size: int) -> Int[Tensor, "rows length"]:
    """The same few token ids every time, spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, PROBE_SHAPE, generator=generator)


@torch.no_grad()
def probe(model: Any, tokens: Int[Tensor, "rows length"] | None = None) -> Float[Tensor, "rows length vocab"]:
    """A model's log-probabilities on the probe tokens, or on others; without dropout, on the CPU in float32."""
    if tokens is None:
        tokens = probe_tokens(model.config.get_text_config().vocab_size)  # a shard of weights has no size
    with evaluation_mode(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1).cpu()


def sees_ahead(model: Any) -> bool:
    """Whether predictions after the first tokens depend on those behind them, as BERT's do: it predicts none."""
    tokens = probe_tokens(model.config.get_text_config().vocab_size)
    half = tokens.shape[1] // 2
    tokens[1, :half] = tokens[0, :half]
    one, other = probe(model, tokens)[:, :half]
    # at every one of them: rounding may send a token to another expert here and there
    return rounding_tolerance(model) < min(map(prediction_difference, one, other)) < torch.inf


class Reference:
    """Predictions of the frozen base.

    Args:
        ref_model: a frozen copy; None to switch off the adapter of the model being trained.
    """

    def __init__(self, ref_model: nn.Module | None = None) -> None:
        self.ref_model = ref_model
        self._begun: Tensor | None = None  # its probe when training began

    @classmethod
    def copy_of(cls, model: nn.Module) -> Reference:
        """Freeze a copy of `model` as it is now.

        Raises:
            ValueError: if the copy still runs the model itself.
        """
        copied = copy.deepcopy(model).eval().requires_grad_(False)
        if runs_through(copied, model):  # an earlier trainer patched the forward, bound to this very model
            for module in copied.modules():
                vars(module).pop("forward", None)
            if runs_through(copied, model):
                raise ValueError("replay_reference: a copy of this model still runs the model itself; load it anew")
        return cls(copied)

    @property
    def kind(self) -> str:
        return "adapter" if self.ref_model is None else "copy"

    @property
    def num_bytes(self) -> int:
        """Memory of a copy's weights on this device: its part, where processes share them out."""
        weights = () if self.ref_model is None else self.ref_model.parameters()
        return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in weights)

    def to(self, device: torch.device) -> None:
        """Move a copy to the device of the model being trained."""
        if self.ref_model is not None:
            self.ref_model.to(device)

    def settle(self, accelerator: Any) -> None:
        """Put a copy where the accelerator puts the model: on its device, or under FSDP2 shared out over its mesh.

        From then on all processes run a shared one together.
        """
        if self.ref_model is not None and accelerator.is_fsdp2:
            self.ref_model = fsdp2_prepare_model(accelerator, self.ref_model)
        self.to(accelerator.device)

    @contextmanager
    def base(self, model: Any, autocast: Any = nullcontext) -> Iterator[Any]:
        """The base as a callable, in evaluation mode and without gradient, while the context lasts.

        Args:
            model: the model as the trainer calls it, wrapped or not.
            autocast: makes the context in which a copy must run to use the dtype of the model being trained.
        """
        with torch.no_grad():
            if self.ref_model is not None:
                with autocast():
                    yield self.ref_model
                return
            tuned = extract_model_from_parallel(model)  # the PEFT model inside
            with evaluation_mode(tuned), frozen_as_found(tuned), tuned.disable_adapter():
                yield model

    def moves_with(self, model: Any) -> bool:
        """Whether a copy is not one: it holds the model's own parameters, or runs the model itself."""
        if self.ref_model is None:
            return False
        shared = {id(one) for one in self.ref_model.parameters()} & {id(one) for one in model.parameters()}
        return bool(shared) or runs_through(self.ref_model, model)

    def prove(self, model: Any, base_probe: Float[Tensor, "rows length vocab"], tolerance: float | None = None) -> None:
        """Refuse a reference that does not give the base's predictions, or moves with the model.

        Args:
            tolerance: of `prediction_difference`; by default that of the model's dtype.
        """
        if self.moves_with(model):
            raise ValueError(
                "replay_reference: the reference moves with the model (they share weights or a forward pass), so "
                "nothing protects it; load the model anew and give it to one trainer"
            )
        with self.base(model) as base:
            found = probe(base)
        if found.shape != base_probe.shape:  # virtual tokens of a prompt that was handed over
            raise ValueError(
                f"replay_reference: {self.kind!r} does not give the base's predictions; hand over the base, and the "
                "adapter as peft_config"
            )
        if (difference := prediction_difference(found, base_probe)) > (tolerance or rounding_tolerance(model)):
            raise ValueError(
                f"replay_reference: {self.kind!r} is not the base (log-probabilities differ by {difference:.2g} of "
                f"their spread): {_why(model)}; use replay_reference copy, or an adapter that leaves the base as it is"
            )

    def prove_again(self, model: Any, step: int) -> None:
        """Show that the reference gives what it gave at the first call, when training began, in the same precision.

        Args:
            model: the model as the trainer calls it.
            step: the optimizer step, for the message.

        Raises:
            ValueError: if it was changed, or follows the model.
        """
        with self.base(model) as base:
            found = probe(base)
        if self._begun is None:
            self._begun = found
        kind, changed = model.device.type, float(kl_divergence(self._begun, found).mean())
        half = torch.is_autocast_enabled(kind) or model.dtype != torch.float32
        if not changed <= (MAX_DRIFT_HALF if half else MAX_DRIFT) or self.moves_with(model):
            cause = {
                "adapter": "a merge into the base? use replay_reference copy",
                "copy": "a callback that renews it?",
            }
            raise ValueError(
                f"replay_reference: {self.kind!r} gives other predictions at step {step} than when training began (KL "
                f"{changed:.2g} nats per token), so it is not the base: its weights were changed ({cause[self.kind]}), "
                "so leave them as they are"
            )


def check_same_model(model: Any, base_probe: Float[Tensor, "rows length vocab"]) -> None:
    """Show that the host trainer is about to train the model that was handed to it: the base.

    What an adapter adds may differ from nothing at first (a prompt); the base under it is shown by the reference.

    Raises:
        ValueError: if the host changed its vocabulary or, without an adapter, its predictions.
    """
    found = probe(model)
    if (now := found.shape[-1]) != (given := base_probe.shape[-1]):
        raise ValueError(
            f"replay_reference: the trainer changed the vocabulary from {given} to {now} tokens, so base and model "
            "cannot be compared; change it first (for chat_template_path by trl.clone_chat_template), save the model, "
            "and sample and finetune that one"
        )
    if hasattr(model, "disable_adapter"):
        return
    if (difference := prediction_difference(found, base_probe)) > rounding_tolerance(model):
        raise ValueError(
            "replay_reference: the model handed over is not what the trainer made of it (log-probabilities differ by "
            f"{difference:.2g} of their spread); hand over the model as it is to be trained"
        )


def prediction_difference(found: Tensor, base_probe: Tensor) -> float:
    """Largest difference of log-probabilities in units of their spread; infinite for NaN or other tokens at −∞."""
    finite = base_probe.isfinite()
    if bool(base_probe.isnan().any() or found.isnan().any()) or not torch.equal(finite, found.isfinite()):
        return torch.inf
    return float((found[finite] - base_probe[finite]).abs().max() / base_probe[finite].std())


def rounding_tolerance(model: Any) -> float:
    """The largest such difference that kernels and devices may cause in this model's dtype."""
    return TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


def runs_through(copied: Any, model: Any) -> bool:
    """Whether a forward pass of the copy goes through the model: as after a trainer has patched its forward."""
    passes: list[Any] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: passes.append(args))
    try:
        probe(copied)
    finally:
        handle.remove()
    return bool(passes)


def _why(model: Any) -> str:
    configs = getattr(model, "peft_config", {})
    for config in configs.values():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "milora", "loftq", "lora_ga")):
            return f"init_lora_weights={init!r} rewrites the base's weights"
    return "the adapter already held something other than the identity when it was handed over"
