"""Small decoders as ordinary transformers configurations, by name or size, and expansion that keeps the function.

The family is Qwen3: RMSNorm before each sublayer, QK-norm, RoPE, a gated MLP. The MLP is 8/3·D wide, so its three
matrices are as large as two of width 4D, and the size is that of Marek et al. (arXiv 2605.26097): 12·L·D² + D·V.
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

FAMILIES = ("qwen3", "llama")
MIN_SIZE, MAX_SIZE = 4_000, 300_000_000  # parameters
WIDTHS = (*range(16, 256, 16), *range(256, 1537, 64))  # multiples of a head's width
SIZE_TOLERANCE = 0.1  # largest relative difference between a model's size and the requested one
# Matrices that read the residual stream, and those that write to it.
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
WRITERS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Width D, layers L, and the MLP's width as a multiple of D."""

    hidden_size: int
    num_layers: int
    mlp_ratio: float = 8 / 3


# 5.8M to 46M (at a vocabulary of 4,096) and 2M (digits) are the paper's.
SIZES: dict[str, Shape] = {
    "30k": Shape(32, 2),
    "134k": Shape(64, 2, 4),  # digits
    "430k": Shape(96, 3),
    "2M": Shape(256, 2, 4),  # digits
    "5.8M": Shape(256, 6),
    "12M": Shape(384, 6),
    "21M": Shape(512, 6),
    "32M": Shape(640, 6),
    "46M": Shape(768, 6),
    "100M": Shape(768, 12),
    "200M": Shape(1024, 15),
}


def counted_size(hidden_size: int, num_layers: int, vocab_size: int, mlp_ratio: float = 8 / 3) -> int:
    """Parameters of the blocks' matrices and one embedding: 12·L·D² + D·V if the MLP is 8/3·D wide.

    The count of Marek et al. (arXiv 2605.26097); norms and, in an untied model, the second embedding are left out.

    >>> counted_size(hidden_size=256, num_layers=6, vocab_size=4096)
    5754880
    """
    attention, mlp = 4 * hidden_size**2, 3 * hidden_size * _mlp_width(hidden_size, mlp_ratio)
    return num_layers * (attention + mlp) + hidden_size * vocab_size


def counted_size_of(config: Any) -> int:
    """`counted_size` of a configuration, from its actual widths."""
    width, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
    attention = 2 * width * head * (heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size) + width * config.vocab_size


def _mlp_width(hidden_size: int, ratio: float) -> int:
    return max(8, 8 * round(ratio * hidden_size / 8))


def shape_of(size: str | float, vocab_size: int) -> Shape:
    """The shape of a size: a name in `SIZES`, or a number of parameters as in `counted_size`.

    >>> shape_of("430k", vocab_size=1024)
    Shape(hidden_size=96, num_layers=3, mlp_ratio=2.6666666666666665)
    >>> shape_of(1e6, vocab_size=1024).hidden_size
    112

    Raises:
        ValueError: for an unknown name, or a number of parameters that no shape matches within 10%.
    """
    if str(size) in SIZES:
        return SIZES[str(size)]
    try:
        wanted = float(size)
    except ValueError:
        raise ValueError(
            f"model_size: {size!r} is not known; use one of {', '.join(SIZES)}, or a number of parameters"
        ) from None
    if not MIN_SIZE <= wanted <= MAX_SIZE:
        raise ValueError(f"model_size: {wanted:g} does not fit; use {MIN_SIZE:g} to {MAX_SIZE:g} parameters")
    sizes = {
        (width, layers): counted_size(width, layers, vocab_size)
        for width, layers in itertools.product(WIDTHS, range(1, 25))
    }
    near = [shape for shape, count in sizes.items() if abs(count / wanted - 1) <= SIZE_TOLERANCE]
    if not near:
        nearest = min(sizes.values(), key=lambda count: abs(count - wanted))
        raise ValueError(
            f"model_size: no model of {wanted:g} parameters has a vocabulary of {vocab_size}; use {nearest}, the "
            "nearest size, or another vocab_size"
        )

    def oddness(shape: tuple[int, int]) -> float:
        """Distance from usual proportions (one layer per 50 units of width, at least two) and from the size."""
        width, layers = shape
        return abs(math.log(layers / max(2.0, width / 50))) + 20 * abs(math.log(sizes[shape] / wanted))

    return Shape(*min(near, key=oddness))


def make_config(
    size: str | float, *, vocab_size: int, max_length: int, bos_token_id: int = 0, tie_word_embeddings: bool = False
) -> Any:
    """A Qwen3 configuration of this size; heads are 16 wide in narrow models, then 32 and 64."""
    shape = shape_of(size, vocab_size)
    width = shape.hidden_size
    head = 16 if width < 320 else 32 if width < 640 else 64
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=_mlp_width(width, shape.mlp_ratio),
        num_hidden_layers=shape.num_layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        head_dim=head,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=bos_token_id,
        eos_token_id=bos_token_id,
        pad_token_id=bos_token_id,
    )


def make_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A float32 model with fresh weights that depend only on the seed; leaves torch's global generator unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def expand(
    model: PreTrainedModel,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_heads: int | None = None,
    num_layers: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Build a larger model that computes the same function, up to float32 rounding.

    New heads, MLP units and layers (added at the end) have fresh weights but write 0. A wider residual stream holds
    copies of the old one, which keeps its RMS; weights that read the new copies are 0. So every addition gets a
    gradient. (Net2Net, arXiv 1511.05641, with zeros instead of halves.)

    Args:
        hidden_size: a multiple of the old one.
        num_heads: a multiple of the old number; the key-value heads grow by the same factor.

    Raises:
        ValueError: for a smaller size, one that is not a multiple, or a model of another family.
    """
    old = model.config
    config = _expanded_config(
        old, hidden_size=hidden_size, intermediate_size=intermediate_size, num_attention_heads=num_heads,
        num_hidden_layers=num_layers,
    )  # fmt: skip
    larger = make_model(config, seed).to(dtype=model.dtype, device=model.device)
    copies, weights = config.hidden_size // old.hidden_size, model.state_dict()
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            if name in weights:
                _fill(name, parameter, weights[name], copies, tied=config.tie_word_embeddings)
            elif name.split(".")[-2] in WRITERS:  # in a new layer
                parameter.zero_()
    return larger.train(model.training)


def _fill(name: str, new: Tensor, old: Tensor, copies: int, *, tied: bool) -> None:
    """Copy an old parameter into its larger one; `copies`: how often the wider residual stream holds the old one."""
    kind = name.split(".")[-2]
    if kind in READERS:
        new[: old.shape[0], : old.shape[1]] = old
        new[: old.shape[0], old.shape[1] :] = 0
    elif kind in WRITERS:
        new[:, : old.shape[1]] = old.repeat(copies, 1)
        new[:, old.shape[1] :] = 0
    elif kind in ("q_norm", "k_norm"):
        new.copy_(old)
    else:  # embedding and norms of the stream; a tied head reads every copy
        share = copies if tied and name == "model.norm.weight" else 1
        new.copy_(old.repeat(*[1] * (old.ndim - 1), copies) / share)


def _expanded_config(old: Any, **sizes: int | None) -> Any:
    if old.model_type not in FAMILIES:
        raise ValueError(f"model: {old.model_type!r} cannot be expanded; use one of {', '.join(FAMILIES)}")
    if old.attention_bias or getattr(old, "mlp_bias", False):
        raise ValueError("model: expansion does not support biases; use a model without")
    config = copy.deepcopy(old)
    for name, value in sizes.items():
        if value is None:
            continue
        now, multiple = getattr(old, name), name in ("hidden_size", "num_attention_heads")
        if value < now or (multiple and value % now):
            remedy = f"a multiple of {now}" if multiple else f"{now} or more"
            raise ValueError(f"{name}: {value} does not fit a model with {now}; use {remedy}")
        setattr(config, name, value)
    config.head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config.num_key_value_heads = old.num_key_value_heads * config.num_attention_heads // old.num_attention_heads
    if getattr(old, "layer_types", None):
        config.layer_types = old.layer_types + old.layer_types[-1:] * (config.num_hidden_layers - old.num_hidden_layers)
    return config
