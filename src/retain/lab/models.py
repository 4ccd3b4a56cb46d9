"""Small decoders as ordinary transformers configurations, by name or budget, and expansion that keeps the function.

The family is Qwen3: RMSNorm before each sublayer, QK-norm, RoPE, a gated MLP. The MLP is 8/3·D wide, so that its three
matrices hold what two of 4D hold, and a model is as large as Marek et al. (arXiv 2605.26097) count: 12·L·D² + D·V.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("qwen3", "llama")
SMALLEST, LARGEST = 4_000, 300_000_000
WIDTHS = (*range(16, 256, 16), *range(256, 1537, 64))  # whole numbers of heads
NEAR = 0.1  # how far the size may lie from the budget, as a share of it
# Matrices that read the residual stream, and those that write to it.
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
WRITERS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Width D, layers L, and the MLP's width as a multiple of D."""

    hidden_size: int
    num_layers: int
    mlp_ratio: float = 8 / 3


# The paper's own (5.8M to 46M at a vocabulary of 4,096; 2M on digits) and ours.
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
    """Parameters of the blocks' matrices and of one embedding: 12·L·D² + D·V where the MLP is 8/3·D wide.

    As Marek et al. count; norms and, in an untied model, the second embedding are left out.
    """
    attention, mlp = 4 * hidden_size**2, 3 * hidden_size * _mlp_width(hidden_size, mlp_ratio)
    return num_layers * (attention + mlp) + hidden_size * vocab_size


def counted_size_of(config: Any) -> int:
    """The same of a configuration of this family, from its own widths."""
    width, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
    attention = 2 * width * head * (heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size) + width * config.vocab_size


def _mlp_width(hidden_size: int, ratio: float) -> int:
    return max(8, 8 * round(ratio * hidden_size / 8))


def shape_of(size: str | float, vocab_size: int) -> Shape:
    """The shape of a size: a name of `SIZES`, or a number of parameters (`counted_size`) that one comes near to.

    Raises:
        ValueError: for an unknown name, or a number that no shape comes near to at this vocabulary.
    """
    if str(size) in SIZES:
        return SIZES[str(size)]
    try:
        budget = float(size)
    except ValueError:
        raise ValueError(
            f"model_size: {size!r} is not known; use one of {', '.join(SIZES)}, or a number of parameters"
        ) from None
    if not SMALLEST <= budget <= LARGEST:
        raise ValueError(f"model_size: {budget:g} does not fit; use {SMALLEST:g} to {LARGEST:g} parameters")
    shapes = [Shape(width, layers) for width in WIDTHS for layers in range(1, 25)]

    def size_of(shape: Shape) -> int:
        return counted_size(shape.hidden_size, shape.num_layers, vocab_size)

    near = [shape for shape in shapes if abs(size_of(shape) - budget) <= NEAR * budget]
    if not near:
        least = counted_size(16, 1, vocab_size)
        raise ValueError(
            f"model_size: a vocabulary of {vocab_size} leaves no model of {budget:g} parameters; use {2 * least:g} or "
            "more, or a smaller vocab_size"
        )
    return min(near, key=lambda shape: _oddness(shape) + 20 * abs(math.log(size_of(shape) / budget)))


def _oddness(shape: Shape) -> float:
    """How far a shape is from the usual proportions: a layer for every 50 units of width, at least two."""
    return abs(math.log(shape.num_layers / max(2.0, shape.hidden_size / 50)))


def make_config(
    size: str | float, *, vocab_size: int, max_length: int, bos_token_id: int = 0, tie_word_embeddings: bool = False
) -> Any:
    """A Qwen3 configuration of this size; heads are 16 wide in narrow models, then 32 and 64.

    Raises:
        ValueError: as `shape_of`.
    """
    from transformers import Qwen3Config

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
    """A float32 model with fresh weights, a function of the seed alone; the global generator is left as it was."""
    from transformers import AutoModelForCausalLM

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
    """A larger model that computes the same function, to float32 rounding.

    New heads and MLP units have fresh weights and write 0; new layers, at the end, likewise. A wider stream holds
    k copies of the old one, whose RMS is the same, and what reads it reads 0 times the new ones. So every addition
    gets a gradient. (Net2Net, arXiv 1511.05641, with zeros in the place of halves.)

    Args:
        hidden_size: a whole multiple of the old one. num_heads: likewise; the key-value heads grow along.

    Raises:
        ValueError: for a smaller size, one that is no multiple, or a model of another family.
    """
    config = _expanded_config(model.config, hidden_size, intermediate_size, num_heads, num_layers)
    larger = make_model(config, seed).to(dtype=model.dtype, device=model.device)
    copies, old, depth = (
        config.hidden_size // model.config.hidden_size,
        model.state_dict(),
        model.config.num_hidden_layers,
    )
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            layer = int(name.split(".")[2]) if ".layers." in name else 0
            if layer >= depth:
                if name.split(".")[-2] in WRITERS:
                    parameter.zero_()
            else:
                _fill(name, parameter, old[name], copies, tied=config.tie_word_embeddings)
    return larger.train(model.training)


def _fill(name: str, new: Tensor, old: Tensor, copies: int, *, tied: bool) -> None:
    """Put an old parameter into its larger place; `copies`: of the stream."""
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


def _expanded_config(old: Any, hidden: int | None, mlp: int | None, heads: int | None, layers: int | None) -> Any:
    if old.model_type not in FAMILIES:
        raise ValueError(f"model: {old.model_type!r} cannot be expanded; use one of {', '.join(FAMILIES)}")
    if (old.model_type == "llama" and (old.attention_bias or old.mlp_bias)) or old.attention_bias:
        raise ValueError("model: one with biases cannot be expanded; use one without")
    config = copy.deepcopy(old)
    asked = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads, "num_hidden_layers": layers
    }  # fmt: skip
    for name, value in asked.items():
        if value is None:
            continue
        now = getattr(old, name)
        if value < now or (name in ("hidden_size", "num_attention_heads") and value % now):
            least = f"a whole multiple of {now}" if name in ("hidden_size", "num_attention_heads") else f"{now} or more"
            raise ValueError(f"{name}: {value} cannot hold what is there; use {least}")
        setattr(config, name, value)
    config.head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config.num_key_value_heads = old.num_key_value_heads * config.num_attention_heads // old.num_attention_heads
    if getattr(old, "layer_types", None):
        config.layer_types = old.layer_types + old.layer_types[-1:] * (config.num_hidden_layers - old.num_hidden_layers)
    return config
