"""Where the hidden states meet the output head: seen from outside, through a hook, in any Hugging Face decoder.

What is computed there needs no logits. The head's own work shrinks to one position, and its weights are at hand
in any wrapper of the model: FSDP2 has gathered them just then.
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

# What configurations call a factor of the logits; some multiply by it, some divide, so both are tried.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class HeadForm(NamedTuple):
    """What a model does to the head's products: softcap · tanh(scale · x / softcap), or scale · x."""

    scale: float = 1.0
    softcap: float | None = None

    def head(self, module: nn.Linear) -> Head:
        """The head with the weights that the module holds now, whole where processes share them out."""
        weight, bias = (one.full_tensor() if isinstance(one, DTensor) else one for one in (module.weight, module.bias))
        return Head(weight, bias, self.scale, self.softcap)

    def frozen(self, module: nn.Linear) -> Head:
        """The head with a copy of these weights, which stays when the module is trained."""
        bias = None if module.bias is None else module.bias.detach().clone()
        return self.head(module)._replace(weight=module.weight.detach().clone(), bias=bias)


def head_input(hidden: Tensor) -> Tensor:
    """Hidden states in the dtype in which the model multiplies them by its head, inside of its forward pass."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


@contextmanager
def seen_by_head(model: Any) -> Iterator[list[Tensor]]:
    """The hidden states of each forward pass, as the output head gets them."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def at_head(model: Any, inputs: Mapping[str, Any], compute: Callable[[Tensor, nn.Linear], Tensor]) -> Tensor:
    """Run the model up to its output head, and there `compute(hidden states, head module)`, in place of the logits.

    Args:
        model: the model as the trainer calls it, wrapped or not.
        compute: of hidden states of shape (rows, length, hidden), at the input's own positions, in the dtype in
            which the model multiplies them by the head.
    """
    length, found = inputs["input_ids"].shape[1], []

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = head_input(args[0][:, -length:])  # prompt tuning puts virtual tokens before the input's
        found.append(compute(hidden, module))
        return (args[0][:, :1], *args[1:])

    handle = extract_model_from_parallel(model).get_output_embeddings().register_forward_pre_hook(hook)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert len(found) == 1, "the model has no output head, or more than one"
    # Nothing is added; FSDP2 and DDP prepare a backward pass by what the model returned.
    return found[0] + 0.0 * logits.sum() if logits.requires_grad else found[0]


def reshard(model: nn.Module) -> None:
    """With FSDP2, share out what a pass without gradient left gathered.

    Else a frozen head is freed between the two forward passes of a step, before the first one's backward pass.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def find_head_form(model: Any) -> HeadForm | None:
    """How a model's logits follow from its head's weights, by trial on probe tokens; None where no form fits.

    None, too, where an adapter sits on the head: its weights alone do not tell what it does.
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
    # What a configuration names comes first: near zero a soft cap looks like none.
    for scale in (*factors, *(1 / factor for factor in factors), 1.0):
        for cap in (float(softcap), None) if softcap else (None,):
            form = HeadForm(scale, cap)
            found = form.head(module).logits(hidden[0])
            if found.shape == logits.shape and float((found.float() - logits).abs().max()) <= tolerance:
                return form
    return None
