"""Losses on a device that is not the CPU, in value and gradient; and the products that CUDA alone has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_device import DEVICE, assert_as_on_cpu, on_device

from retain.losses import (
    Head,
    chunked_kl_divergence,
    chunked_next_token_loss,
    chunked_topk_kl_divergence,
    kl_divergence,
    next_token_loss,
    shifted,
    topk_kl_divergence,
)

POSITIONS, SIZE, VOCAB = 9, 8, 31


def parts(device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Hidden states and head of the base, then of the model; the base's likeliest tokens; targets."""
    torch.manual_seed(0)
    ref, hidden = torch.randn(2, POSITIONS, SIZE).to(dtype)
    ref_weight, weight = torch.randn(2, VOCAB, SIZE).to(dtype)
    bias, targets = torch.randn(VOCAB).to(dtype), torch.arange(POSITIONS)
    ref[0], hidden[0] = 3 * ref[0], ref[0]
    given = [one.to(device) for one in (ref, ref_weight, hidden, weight, bias, targets)]
    for one in given[2:5]:
        one.requires_grad_()
    ref, ref_weight, hidden, weight, bias, targets = given
    ref_head = Head(ref_weight, None, 0.7)
    top = ref_head.logits(ref).float().log_softmax(-1).topk(5)
    return [ref, ref_head, hidden, Head(weight, bias, 1.5, softcap=4.0), top, targets]


def losses(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Each loss without its logits and its naive twin: value, terms and gradients."""
    ref, ref_head, hidden, head, top, targets = parts(device, dtype)
    values, top_values = torch.zeros(2, POSITIONS, device=device)
    found = {
        "kl": (
            chunked_kl_divergence(ref, ref_head, hidden, head, values),
            kl_divergence(ref_head.logits(ref), head.logits(hidden)).sum(),
        ),
        "topk": (
            chunked_topk_kl_divergence(top.values, top.indices, hidden, head, top_values),
            topk_kl_divergence(top.values, top.indices, head.logits(hidden)).sum(),
        ),
        "ntp": (
            chunked_next_token_loss(targets, hidden, head),
            next_token_loss(head.logits(hidden), targets).sum(),
        ),
    }
    wanted = [hidden, head.weight, head.bias]
    grads = {name: [torch.autograd.grad(one, wanted) for one in pair] for name, pair in found.items()}
    return {"losses": found, "terms": [values, top_values], "gradients": grads}


@on_device
def test_losses_are_those_of_the_cpu(tmp_path):
    assert_as_on_cpu(losses)


@on_device
def test_targets_are_those_of_the_cpu(tmp_path):
    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert_as_on_cpu(lambda device: [shifted(ids.to(device)), shifted(ids.to(device), mask.to(device))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_device
def test_factors_of_two_bytes_are_multiplied_as_such_on_cuda(dtype, monkeypatch, tmp_path):
    """The products sum in float32, so only the rounding of the factors is seen."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == DEVICE))
    products = []
    original = torch.mm

    def counted(*args, **kwargs):
        products.append(kwargs["out_dtype"])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    found = losses(DEVICE, dtype)
    assert len(products) == 4 + 3  # logits of the base and, thrice, of the model; the head's gradient
    for name, (chunked, naive) in found["losses"].items():
        torch.testing.assert_close(chunked, naive, rtol=2e-2, atol=0.0, msg=name)
        for one, other in zip(*found["gradients"][name], strict=True):
            assert (one - other).norm() <= 2e-2 * other.norm()
            assert one.dtype == other.dtype == dtype
