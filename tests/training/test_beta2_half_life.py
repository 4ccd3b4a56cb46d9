"""Adam's second moment by its half-life: the paper's numbers, and what `finetune` makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from retain.training.beta2_half_life import apply_half_life, beta2_of_half_life


def arguments(**changes) -> SimpleNamespace:
    given = {"adam_beta2": 0.999, "optim": "adamw_torch", "train_batch_size": 4, "gradient_accumulation_steps": 2}
    return SimpleNamespace(**{**given, "world_size": 3, **changes})


def test_a_half_life_is_when_half_is_left():
    """arXiv 2507.07101: beta2 = (1/2)^(tokens per step / half-life); 10M tokens at the paper's 256 × 256."""
    beta2 = beta2_of_half_life(10e6, 256 * 256)
    assert beta2 == pytest.approx(0.5 ** (65536 / 10e6))
    assert beta2 ** (10e6 / 65536) == pytest.approx(0.5)
    assert beta2 == pytest.approx(0.995468, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 16, 512])
def test_the_same_half_life_at_another_batch_size(batch):
    """The paper's rule for other batches: beta2' = beta2^(B'/B)."""
    beta2 = beta2_of_half_life(10e6, 64 * 256)
    assert beta2_of_half_life(10e6, batch * 256) == pytest.approx(beta2 ** (batch / 64))


def test_half_lives_of_usual_settings():
    """beta2 .999 at the paper's batch remembers 45M tokens, .95 0.9M: far from one another and from 10M."""
    assert beta2_of_half_life(45.4e6, 65536) == pytest.approx(0.999, abs=1e-6)
    assert beta2_of_half_life(0.886e6, 65536) == pytest.approx(0.95, abs=1e-4)


def test_it_is_applied_and_said():
    args = arguments()
    line = apply_half_life(args, 1e4, row_length=50.0)
    assert args.adam_beta2 == pytest.approx(0.5 ** (4 * 2 * 3 * 50 / 1e4))
    assert line == "Adam: beta2 0.920188, a half-life of 10000 tokens at 1200 tokens per step (50 a row)"
    args = arguments(adam_beta2=0.95)
    assert apply_half_life(args, None, 50.0) is None
    assert args.adam_beta2 == 0.95


def test_it_does_not_go_with_beta2_or_without_adam():
    with pytest.raises(
        ValueError, match=r"^adam_beta2_half_life_tokens: 1e\+07 and adam_beta2 0.95 exclude each other"
    ):
        apply_half_life(arguments(adam_beta2=0.95), 1e7, 50.0)
    with pytest.raises(ValueError, match="optim 'sgd' is not an Adam"):
        apply_half_life(arguments(optim="sgd"), 1e7, 50.0)


@pytest.mark.parametrize(("half_life", "step"), [(0, 1), (-1, 1), (1e6, 0), (float("nan"), 1), (1, 100)])
def test_numbers_that_do_not_fit_are_refused(half_life, step):
    with pytest.raises(ValueError, match="half_life_tokens|tokens_per_step"):
        beta2_of_half_life(half_life, step)
