"""The frozen base: the model with its adapter switched off, or a copy taken before any trainer touched it.

The reference is proven to be the base: its logits on probe tokens must equal those of the model that was handed over.
Before the first step, this finds adapters whose initialisation rewrites the base weights (PiSSA, OLoRA, CorDA),
adapters that were trained or merged before, and copies that share a patched forward.
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
# Largest difference of log-probabilities, as a share of their spread, that kernels and devices may cause.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Largest KL, nats per token, between one reference's predictions at two steps of a run: float32, half precision.
MAX_DRIFT, MAX_DRIFT_HALF = 1e-5, 1e-3


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; restore each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def restored_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` afterwards: PEFT makes the whole adapter trainable when it switches it on again."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def probe_tokens(vocab_size: int) -> Int[Tensor, "rows length"]:
    """A few fixed pseudorandom token ids, spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, PROBE_SHAPE, generator=generator)


@torch.no_grad()
def probe(model: Any, tokens: Int[Tensor, "rows length"] | None = None) -> Float[Tensor, "rows length vocab"]:
    """A model's log-probabilities on `tokens`, by default the probe tokens; in eval mode, float32 on the CPU."""
    if tokens is None:
        tokens = probe_tokens(model.config.get_text_config().vocab_size)  # sharded weights do not show it
    with evaluation_mode(model):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1).cpu()


def sees_ahead(model: Any) -> bool:
    """Whether predictions depend on later tokens, as BERT's do."""
    tokens = probe_tokens(model.config.get_text_config().vocab_size)
    half = tokens.shape[1] // 2
    tokens[1, :half] = tokens[0, :half]
    first, second = probe(model, tokens)[:, :half]  # the same tokens, followed by different ones
    # At every position: rounding may send a token to another expert here and there.
    return rounding_tolerance(model) < min(map(prediction_difference, first, second)) < torch.inf


class Reference:
    """Predictions of the frozen base.

    Args:
        ref_model: a frozen copy; None: the model being trained, with its adapter switched off.
    """

    def __init__(self, ref_model: nn.Module | None = None) -> None:
        self.ref_model = ref_model
        self._first_probe: Tensor | None = None  # when training began

    @classmethod
    def copy_of(cls, model: nn.Module) -> Reference:
        """A frozen copy of `model` as it is now.

        Raises:
            ValueError: if the copy still runs the model itself.
        """
        copied = copy.deepcopy(model).eval().requires_grad_(False)
        if runs_through(copied, model):  # an earlier trainer patched the forward and bound it to `model`
            for module in copied.modules():
                vars(module).pop("forward", None)
            if runs_through(copied, model):
                raise ValueError("replay_reference: a copy of this model still runs the model itself; load it again")
        return cls(copied)

    @property
    def kind(self) -> str:
        return "adapter" if self.ref_model is None else "copy"

    @property
    def num_bytes(self) -> int:
        """Memory of the copy's weights on this device; its own shard if they are sharded."""
        weights = () if self.ref_model is None else self.ref_model.parameters()
        return sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)

    def to(self, device: torch.device) -> None:
        """Move the copy, if any, to `device`."""
        if self.ref_model is not None:
            self.ref_model.to(device)

    def settle(self, accelerator: Any) -> None:
        """Move the copy to the accelerator's device; under FSDP2, shard it over the accelerator's mesh.

        All processes must then run a sharded copy together.
        """
        if self.ref_model is not None and accelerator.is_fsdp2:
            self.ref_model = fsdp2_prepare_model(accelerator, self.ref_model)
        self.to(accelerator.device)

    @contextmanager
    def base(self, model: Any, autocast: Any = nullcontext) -> Iterator[Any]:
        """The base as a callable, in eval mode and without gradient, inside this context.

        Args:
            model: the model as the trainer calls it, wrapped or not.
            autocast: returns the context in which a copy computes in the dtype of the model being trained.
        """
        with torch.no_grad():
            if self.ref_model is not None:
                with autocast():
                    yield self.ref_model
                return
            tuned = extract_model_from_parallel(model)  # the PEFT model inside
            with evaluation_mode(tuned), restored_requires_grad(tuned), tuned.disable_adapter():
                yield model

    def changes_with(self, model: Any) -> bool:
        """Whether the copy changes with the model: it shares parameters with it, or runs its forward."""
        if self.ref_model is None:
            return False
        shared = set(map(id, self.ref_model.parameters())) & set(map(id, model.parameters()))
        return bool(shared) or runs_through(self.ref_model, model)

    def prove(self, model: Any, base_probe: Float[Tensor, "rows length vocab"], tolerance: float | None = None) -> None:
        """Raise a `ValueError` unless the reference predicts what the base does and cannot change with the model.

        Args:
            model: the model as the trainer calls it.
            base_probe: `probe` of the base.
            tolerance: limit on `prediction_difference`. Default: that of the model's dtype.
        """
        if self.changes_with(model):
            raise ValueError(
                "replay_reference: the reference changes with the model (they share weights or a forward pass), so "
                "it protects nothing; load the model again and give it to one trainer"
            )
        with self.base(model) as base:
            log_probs = probe(base)
        if log_probs.shape != base_probe.shape:  # virtual tokens of a prompt that the model came with
            raise ValueError(
                f"replay_reference: {self.kind!r} does not predict what the base does; give the trainer the base, and "
                "the adapter as peft_config"
            )
        if (difference := prediction_difference(log_probs, base_probe)) > (tolerance or rounding_tolerance(model)):
            raise ValueError(
                f"replay_reference: {self.kind!r} is not the base (log-probabilities differ by {difference:.2g} of "
                f"their spread): {_adapter_cause(model)}; use replay_reference copy, or an adapter that leaves the "
                "base as it is"
            )

    def prove_again(self, model: Any, step: int) -> None:
        """Check that the reference still predicts what it did at the first call, when training began.

        Args:
            model: the model as the trainer calls it.
            step: the optimizer step, for the error.

        Raises:
            ValueError: if the reference was changed, or changes with the model.
        """
        with self.base(model) as base:
            log_probs = probe(base)
        if self._first_probe is None:
            self._first_probe = log_probs
        drift = float(kl_divergence(self._first_probe, log_probs).mean())
        is_half = torch.is_autocast_enabled(model.device.type) or model.dtype != torch.float32
        if not drift <= (MAX_DRIFT_HALF if is_half else MAX_DRIFT) or self.changes_with(model):
            cause = {
                "adapter": "was it merged into the base? use replay_reference copy",
                "copy": "did a callback update them?",
            }
            raise ValueError(
                f"replay_reference: {self.kind!r} gives other predictions at step {step} than when training began (KL "
                f"{drift:.2g} nats per token), so it is not the base; leave its weights unchanged ({cause[self.kind]})"
            )


def check_same_model(model: Any, base_probe: Float[Tensor, "rows length vocab"]) -> None:
    """Check that the host trainer is about to train the base that it was given.

    A new adapter may change predictions (a prompt does); then `Reference.prove` checks the base under it.

    Raises:
        ValueError: if the host trainer changed the vocabulary or, without an adapter, the predictions.
    """
    log_probs = probe(model)
    if (now := log_probs.shape[-1]) != (given := base_probe.shape[-1]):
        raise ValueError(
            f"replay_reference: the trainer changed the vocabulary from {given} to {now} tokens, so base and model "
            "cannot be compared; change it first (for chat_template_path by trl.clone_chat_template), save the model, "
            "and sample and finetune that one"
        )
    if hasattr(model, "disable_adapter"):
        return
    if (difference := prediction_difference(log_probs, base_probe)) > rounding_tolerance(model):
        raise ValueError(
            "replay_reference: the trainer changed the model that it was given (log-probabilities differ by "
            f"{difference:.2g} of their spread); give it the model as it is to be trained"
        )


def prediction_difference(log_probs: Tensor, base_probe: Tensor) -> float:
    """Largest difference of log-probabilities over their spread; infinite for NaN, or if −∞ is at other tokens."""
    finite = base_probe.isfinite()
    if bool(base_probe.isnan().any() or log_probs.isnan().any()) or not torch.equal(finite, log_probs.isfinite()):
        return torch.inf
    return float((log_probs[finite] - base_probe[finite]).abs().max() / base_probe[finite].std())


def rounding_tolerance(model: Any) -> float:
    """The largest `prediction_difference` that kernels and devices may cause in this model's dtype."""
    return TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])


def runs_through(copied: Any, model: Any) -> bool:
    """Whether a forward pass of the copy runs the model, as after a trainer has patched the forward."""
    passes: list[Any] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: passes.append(args))
    try:
        probe(copied)
    finally:
        handle.remove()
    return bool(passes)


def _adapter_cause(model: Any) -> str:
    """Why a model without its adapter is not the base."""
    configs = getattr(model, "peft_config", {})
    for config in configs.values():
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "milora", "loftq", "lora_ga")):
            return f"init_lora_weights={init!r} rewrites the base's weights"
    return "the adapter already held something other than the identity when it was handed over"
