"""The mathematics, each against a naive twin in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retain.losses import kl_divergence, next_token_loss, shifted


def naive_probs(logits: Tensor) -> list[float]:
    exponentials = [math.exp(value) for value in logits.double().tolist()]
    return [value / sum(exponentials) for value in exponentials]


def naive_next_token(logits: Tensor, target: int) -> float:
    return -math.log(naive_probs(logits)[target])


def naive_kl(ref: Tensor, live: Tensor) -> float:
    return sum(p * math.log(p / q) for p, q in zip(naive_probs(ref), naive_probs(live), strict=True))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 11, generator=generator) * 3, torch.randn(2, 5, 11, generator=generator) * 3


TWINS = {
    kl_divergence: naive_kl,
    next_token_loss: naive_next_token,
}


@pytest.mark.parametrize("loss", TWINS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_naive_twin(loss, dtype, pair):
    """In bfloat16 too: only the inputs are rounded, what is computed from them is float32."""
    first, second = (logits.to(dtype) for logits in pair)
    if loss is next_token_loss:
        second = torch.arange(10).reshape(2, 5)
    found = loss(first, second)
    assert found.dtype == torch.float32
    assert found.shape == (2, 5)
    expected = [[TWINS[loss](first[i, t], second[i, t]) for t in range(5)] for i in range(2)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=2e-6)


def test_kl_direction_by_hand():
    """KL((1/2, 1/2) ‖ (3/4, 1/4)) = ½ ln(2/3) + ½ ln 2, and the other way round is another number (pitfall 7)."""
    base, model = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert forward == pytest.approx(0.143841, abs=1e-6)
    assert reverse == pytest.approx(0.130812, abs=1e-6)
    assert kl_divergence(base, model).item() == pytest.approx(forward, abs=1e-6)
    assert kl_divergence(model, base).item() == pytest.approx(reverse, abs=1e-6)


def test_kl_punishes_a_model_that_loses_what_the_base_knew():
    """Forward KL is large where the base puts mass and the model none, not the other way round."""
    base, narrow = torch.tensor([0.0, 0.0, -30.0]), torch.tensor([0.0, -30.0, -30.0])
    assert kl_divergence(base, narrow) > 10
    assert kl_divergence(narrow, base) == pytest.approx(math.log(2), abs=1e-6)


def test_kl_is_zero_exactly_where_the_distributions_are_the_same(pair):
    ref, live = pair
    assert torch.equal(kl_divergence(ref, ref), torch.zeros(2, 5))
    torch.testing.assert_close(kl_divergence(ref, ref + 7.0), torch.zeros(2, 5), atol=2e-6, rtol=0)
    assert (kl_divergence(ref, live) > 1e-3).all()
    one_moved = ref.clone()
    one_moved[0, 2, 4] += 1.0
    values = kl_divergence(ref, one_moved)
    assert values[0, 2] > 0
    values[0, 2] = 0
    assert torch.equal(values, torch.zeros(2, 5))


def test_large_logits_do_not_overflow():
    ref, live = torch.tensor([1e4, 0.0, -1e4]), torch.tensor([0.0, 1e4, -1e4])
    assert kl_divergence(ref, live).item() == pytest.approx(1e4)
    assert next_token_loss(live, torch.tensor(0)).item() == pytest.approx(1e4)


def test_gradient_of_kl_with_respect_to_the_logits_is_the_difference_of_the_distributions(pair):
    ref, live = pair[0], pair[1].requires_grad_()
    kl_divergence(ref, live).sum().backward()
    torch.testing.assert_close(live.grad, live.softmax(-1) - ref.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("unused", [-torch.inf, -1e4])
def test_vocabulary_that_neither_model_can_say_plays_no_part(unused, pair):
    """As where a model's forward pass masks unused tokens: 0 · (−∞ − −∞) is 0, in value and gradient."""
    ref, live = pair
    live.requires_grad_()
    rest = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    expected = kl_divergence(ref[..., rest], live[..., rest])
    (gradient,) = torch.autograd.grad(expected.sum(), live)
    masked = torch.zeros(11).index_fill(0, torch.tensor([3, 7]), unused)
    found = kl_divergence(ref + masked, live + masked)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), live)[0], gradient)


def test_what_only_the_model_can_never_say_is_infinitely_far():
    ref, live = torch.zeros(3), torch.tensor([0.0, 0.0, -torch.inf])
    assert kl_divergence(ref, live) == torch.inf
    assert kl_divergence(live, ref).item() == pytest.approx(math.log(1.5))
    assert next_token_loss(live, torch.tensor(2)) == torch.inf


def test_shifted_gives_one_prediction_less_than_tokens():
    """Pitfall 6: T tokens have T − 1 predictions, and the logits at t are scored on the token at t + 1."""
    ids = torch.tensor([[7, 8, 9, 10], [5, 6, 0, 0]])
    targets, mask = shifted(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert targets.tolist() == [[8, 9, 10], [6, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    targets, mask = shifted(ids)
    assert targets.tolist() == [[8, 9, 10], [6, 0, 0]]
    assert mask.all()


def test_shifted_leaves_out_predictions_made_from_padding_on_the_left():
    _, mask = shifted(torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
    assert mask.tolist() == [[False, False, True]]


def test_shift_finds_what_an_unshifted_loss_would_miss():
    """Logits that predict the next token perfectly have loss 0 only if aligned as `shifted` says."""
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    perfect = torch.nn.functional.one_hot(ids.roll(-1, dims=1), 6).float() * 100
    targets, mask = shifted(ids)
    assert next_token_loss(perfect[:, :-1], targets)[mask].max() == 0
    assert next_token_loss(perfect, ids)[:, :-1].min() > 50
