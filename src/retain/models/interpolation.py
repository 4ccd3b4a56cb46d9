"""Weights between a base and a model finetuned from it: W(α) = W_base + α (W_tuned − W_base).

WiSE-FT (Wortsman et al., *Robust Fine-Tuning of Zero-Shot Models*, arXiv 2109.01903): models between the two ends often
keep most of what was learned, and their predictions change less than in proportion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from retain.models.adapters import merge_adapter
from retain.models.description import base_parameter_name
from retain.models.reference import prediction_difference, probe, rounding_tolerance

# Factors of PEFT's LoRA and IA3 in which the merged weights are linear, and the value at which they have no effect.
NEUTRAL = {".lora_B.": 0.0, ".lora_embedding_B.": 0.0, ".ia3_l.": 1.0}
OTHER_FACTORS = (".lora_A.", ".lora_embedding_A.")  # left as they are


class Interpolation:
    """A tuned model whose weights can be set to W(α), anywhere between the base's and its own.

    Each time, the weights are computed from both ends in float32: at α = 0 they are the base's, at α = 1 the tuned
    model's, bit for bit in `dtype`. A LoRA or IA3 stays an adapter: only the factor in which W(α) is linear is changed.

    Args:
        base: the model before finetuning; it is not changed.
        tuned: the model or adapter after finetuning; it is changed, and a copy of its weights is kept on the CPU.
        dtype: round the weights of a whole model to this dtype, in which it will be saved. Default: its own.

    Raises:
        ValueError: if the weights differ in name or shape or are quantised, if the adapter is not a LoRA or IA3, or if
            the model at α = 0 does not predict what the base does.

    >>> from retain.lab.models import make_config, make_model
    >>> base, tuned = (make_model(make_config(20_000, vocab_size=8, max_length=8), seed) for seed in (0, 1))
    >>> Interpolation(base, tuned).set(0.0)
    >>> torch.equal(tuned.lm_head.weight, base.lm_head.weight)
    True
    """

    def __init__(self, base: Any, tuned: Any, dtype: torch.dtype | None = None) -> None:
        self.model, self.is_adapter = tuned, hasattr(tuned, "peft_config")
        ends = adapter_ends(tuned) if self.is_adapter else weight_ends(base, tuned)
        self.dtype, self._whole_dtype = None if self.is_adapter else dtype, dtype
        self.ends = [(live, start, live.detach().to("cpu", copy=True)) for live, start in ends]
        self.set(0.0)
        log_probs, base_probe = probe(tuned), probe(base)
        same_shape = log_probs.shape == base_probe.shape
        difference = prediction_difference(log_probs, base_probe) if same_shape else torch.inf
        if difference > rounding_tolerance(base):
            why = "its adapter rewrites it (PiSSA, OLoRA, biases)" if self.is_adapter else "their config.json differ"
            raise ValueError(
                f"base: the model at alpha 0 does not predict what the base does (log-probabilities differ by "
                f"{difference:.2g} of their spread): it was finetuned from another base, or {why}; give that base"
            )
        self.set(1.0)

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Set the model's weights to W(α)."""
        for live, start, end in self.ends:
            mixed = torch.lerp(start.to(live.device).float(), end.to(live.device).float(), alpha)
            live.copy_(mixed.to(self.dtype or live.dtype))

    def make_whole(self) -> None:
        """Merge the adapter at its current α into its base; `set` has no effect afterwards."""
        self.model, self.is_adapter, self.dtype, self.ends = merge_adapter(self.model), False, self._whole_dtype, []


def weight_ends(base: Any, tuned: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of the tuned model, with the base's."""
    of_base, of_tuned = _weights(base, tied=True), _weights(tuned, tied=True)
    for name in sorted(of_base.keys() | of_tuned.keys()):
        shapes = [list(weights[name].shape) if name in weights else "missing" for weights in (of_base, of_tuned)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"base: {name} is {shapes[0]} in it and {shapes[1]} in the model, so they cannot be interpolated; give "
                "the base that the model was finetuned from, with the same vocabulary (resize_token_embeddings)"
            )
    for name, weight in _weights(tuned).items():
        for model, tensor in (("base", of_base[name]), ("model", weight)):
            if not tensor.is_floating_point() or tensor.itemsize < 2:
                raise ValueError(
                    f"{model}: {name} is quantised ({tensor.dtype}); merge first, then quantise the result"
                )
        yield weight, of_base[name].detach()


def _weights(model: Any, *, tied: bool = False) -> dict[str, Tensor]:
    """Parameters and saved floating-point buffers by name; tied parameters once, or with `tied` by each name."""
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved and value.is_floating_point()}
    return {**dict(model.named_parameters(remove_duplicate=not tied)), **buffers}


def adapter_ends(tuned: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of an adapter in which W(α) is linear, each with the value at which it has no effect."""
    weights = dict(tuned.named_parameters(remove_duplicate=False))  # the original of a tied head is the embedding's
    for name, value in tuned.named_parameters():
        if base_parameter_name(name) is not None or any(part in name for part in OTHER_FACTORS):
            continue
        neutral = next((number for part, number in NEUTRAL.items() if part in name), None)
        if neutral is not None:
            yield value, torch.full_like(value, neutral).detach()
        elif ".modules_to_save." in name:
            yield value, weights[re.sub(r"\.modules_to_save\.[^.]+\.", ".original_module.", name)].detach()
        else:
            raise ValueError(
                f"model: its adapter has {name}, so it is not a plain LoRA or IA3; if it can be merged into its base "
                "(merge_and_unload, save_pretrained), give the merged model"
            )
