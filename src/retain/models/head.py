"""The output head and the hidden states that it gets, through a hook that works in any Hugging Face decoder.

A loss computed in the hook needs no logits: the head itself runs on one position only. Its weights are available under
any wrapper of the model, because FSDP2 has just gathered them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from retain.losses import Head
from retain.models.reference import TOLERANCE, evaluation_mode, probe_tokens

# Names of a factor of the logits in configurations; some models multiply by it, some divide, so both are tried.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class HeadForm(NamedTuple):
    """What a model does to the head's products x: softcap · tanh(scale · x / softcap), or scale · x."""

    scale: float = 1.0
    softcap: float | None = None

    def head(self, module: nn.Linear) -> Head:
        """The head with the module's current weights, gathered if they are sharded."""
        weight, bias = (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (module.weight, module.bias)
        )
        return Head(weight, bias, self.scale, self.softcap)

    def frozen(self, module: nn.Linear) -> Head:
        """The head with a copy of the current weights, which training does not change."""
        bias = None if module.bias is None else module.bias.detach().clone()
        return self.head(module)._replace(weight=module.weight.detach().clone(), bias=bias)


def head_input(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype in which the model multiplies them by its head during its forward pass."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


@contextmanager
def seen_by_head(model: Any) -> Iterator[list[Tensor]]:
    """Collects the input of the output head in each forward pass."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def at_head(model: Any, inputs: Mapping[str, Any], compute: Callable[[Tensor, nn.Linear], Tensor]) -> Tensor:
    """Run the model up to its output head and return `compute(hidden states, head module)` instead of logits.

    Args:
        model: the model as the trainer calls it, wrapped or not.
        compute: takes hidden states of shape (rows, length, hidden), at the positions of `input_ids`, in the dtype in
            which the model multiplies them by the head.
    """
    length, results = inputs["input_ids"].shape[1], []

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = head_input(args[0][:, -length:])  # prompt tuning prepends virtual tokens
        results.append(compute(hidden, module))
        return (args[0][:, :1], *args[1:])

    handle = extract_model_from_parallel(model).get_output_embeddings().register_forward_pre_hook(hook)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert len(results) == 1, "the model has no output head, or more than one"
    # Adds 0: FSDP2 and DDP prepare the backward pass from what the model returned.
    return results[0] + 0.0 * logits.sum() if logits.requires_grad else results[0]


def reshard(model: nn.Module) -> None:
    """With FSDP2, reshard what a pass without gradient left gathered.

    Otherwise a frozen head is freed between the two forward passes of a step, before the backward pass of the first.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def find_head_form(model: Any) -> HeadForm | None:
    """The form that gives the model's own logits on probe tokens, found by trial; None if none does.

    None, too, if an adapter sits on the head: then the head's weights alone do not determine the logits.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return None
    inputs = {"input_ids": probe_tokens(model.get_input_embeddings().weight.shape[0]).to(model.device)}
    with evaluation_mode(model), seen_by_head(model) as hidden:
        logits = model(**inputs, use_cache=False).logits.float()
    if len(hidden) != 1:
        return None
    config = model.config.get_text_config()
    factors = [float(value) for name in FACTORS if (value := getattr(config, name, None))]
    softcap = getattr(config, "final_logit_softcapping", None)
    tolerance = TOLERANCE.get(module.weight.dtype, TOLERANCE[torch.bfloat16]) * float(logits.std())
    # The configuration's own values come first: near zero a soft cap looks like none.
    for scale in (*factors, *(1 / factor for factor in factors), 1.0):
        for cap in (float(softcap), None) if softcap else (None,):
            form = HeadForm(scale, cap)
            candidate = form.head(module).logits(hidden[0])
            if candidate.shape == logits.shape and float((candidate.float() - logits).abs().max()) <= tolerance:
                return form
    return None
