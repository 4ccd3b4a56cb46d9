"""Adam's beta2 from a half-life in tokens, which means the same at every batch size.

    beta2 = (1/2)^(tokens per step / half-life)

Source: Marek et al., "Small Batch Size Training for Language Models", arXiv 2507.07101: about 10M tokens are best for
a 30M model at every batch size.
"""

from __future__ import annotations

from typing import Any

from retain.checks import check_number

MAX_ROWS_READ = 4096  # to estimate the mean length of a row
DEFAULT_ADAM_BETA2 = 0.999  # in transformers' TrainingArguments; another value was set by the user


def beta2_of_half_life(half_life_tokens: float, tokens_per_step: float) -> float:
    """Adam's beta2 with which the weight of a squared gradient halves every `half_life_tokens` tokens.

    >>> round(beta2_of_half_life(10e6, 16_384), 6)
    0.998865

    Raises:
        ValueError: if a step is far longer than the half-life.
    """
    for name, value in (("half_life_tokens", half_life_tokens), ("tokens_per_step", tokens_per_step)):
        check_number(name, value, low=1e-6)
    beta2 = 0.5 ** (tokens_per_step / half_life_tokens)
    if beta2 < 1e-6:
        raise ValueError(
            f"half_life_tokens: {half_life_tokens:g} is far less than a step of {tokens_per_step:g} tokens; use at "
            "least that many"
        )
    return beta2


def tokens_per_step(args: Any, row_length: float) -> float:
    """Tokens per optimizer step, over micro-batches and processes.

    Args:
        row_length: mean tokens per row, without padding.
    """
    return args.train_batch_size * row_length * args.gradient_accumulation_steps * args.world_size


def mean_row_length(rows: Any, max_length: int | None) -> float:
    """Mean tokens per training row, cut to `max_length`; estimated from evenly spaced rows if there are many.

    Raises:
        ValueError: for a stream, whose rows are not known beforehand.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError("adam_beta2_half_life_tokens: the rows of a stream are unknown; set adam_beta2 instead")
    indices = range(0, len(rows), -(-len(rows) // MAX_ROWS_READ))
    return sum(len(rows[index]["input_ids"][:max_length]) for index in indices) / len(indices)


def apply_half_life(args: Any, half_life_tokens: float | None, row_length: float) -> str | None:
    """Set `adam_beta2` in a trainer's arguments before its optimizer is made; a half-life of None changes nothing.

    Returns:
        A line for the log that says the beta2 and how it was computed.
    """
    if half_life_tokens is None:
        return None
    check_half_life(args, half_life_tokens)
    step = tokens_per_step(args, row_length)
    args.adam_beta2 = beta2_of_half_life(half_life_tokens, step)
    return (
        f"Adam: beta2 {args.adam_beta2:.6g}, a half-life of {half_life_tokens:g} tokens at {step:g} tokens per step "
        f"({row_length:.4g} a row)"
    )


def check_half_life(args: Any, half_life_tokens: float | None) -> None:
    """Raise a `ValueError` for a half-life together with an `adam_beta2`, or with an optimizer that is not Adam."""
    if half_life_tokens is None:
        return
    setting = f"adam_beta2_half_life_tokens: {half_life_tokens:g}"
    if args.adam_beta2 != DEFAULT_ADAM_BETA2:
        raise ValueError(f"{setting} and adam_beta2 {args.adam_beta2:g} exclude each other; drop one")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "adam" not in optimizer:
        raise ValueError(f"{setting}, but optim {optimizer!r} is not an Adam; use optim adamw_torch, or leave it out")
