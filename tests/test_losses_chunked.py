"""The forms that hold no logits, each against its naive twin in value and gradient; and heads found from outside."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import retain.losses
from retain.losses import (
    Head,
    chunked_kl_divergence,
    chunked_next_token_loss,
    chunked_topk_kl_divergence,
    kl_divergence,
    next_token_loss,
    topk_kl_divergence,
)
from retain.models.head import HeadForm, at_head, find_head_form
from retain.models.reference import Reference
from retain.training.coef_controller import OPENING_LENGTH
from retain.training.loss_meter import in_opening
from retain.training.replay_term import ReplayTerm, TermBatch

POSITIONS, SIZE, VOCAB = 37, 16, 211


def parts(
    seed: int = 0, scale: float = 1.0, softcap: float | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Head, Tensor, Head]:
    """Reference and live hidden states with their heads; the reference is wider, has no bias, and its own scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    hidden, weight, bias = normal(POSITIONS, SIZE), normal(VOCAB, SIZE), normal(VOCAB)
    for value in (hidden, weight, bias):
        value.requires_grad_()
    ref = normal(POSITIONS, SIZE + 3), Head(normal(VOCAB, SIZE + 3), None, 0.7)
    return *ref, hidden, Head(weight, bias, scale, softcap)


def gradients(value: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    assert head.bias is not None
    return list(torch.autograd.grad(0.3 * value, [hidden, head.weight, head.bias]))


def assert_same(naive: Tensor, chunked: Tensor, hidden: Tensor, head: Head, rtol: float = 2e-5) -> None:
    torch.testing.assert_close(chunked, naive.float(), rtol=rtol, atol=0.0)
    for one, other in zip(gradients(naive, hidden, head), gradients(chunked, hidden, head), strict=True):
        assert float((one - other).abs().max()) <= rtol * float(one.abs().max())


FORMS = [(1.0, None), (0.3, None), (1.0, 4.0), (2.0, 3.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain.losses, "CHUNK_BYTES", 4 * VOCAB * 10)  # 10 positions at a time, 7 in the last


@pytest.mark.parametrize(("scale", "softcap"), FORMS)
def test_chunked_kl_is_the_naive_one(scale: float, softcap: float | None) -> None:
    ref_hidden, ref_head, hidden, head = parts(1, scale, softcap)
    every, values = kl_divergence(ref_head.logits(ref_hidden), head.logits(hidden)), torch.zeros(POSITIONS)
    assert_same(every.sum(), chunked_kl_divergence(ref_hidden, ref_head, hidden, head, values), hidden, head)
    torch.testing.assert_close(values, every.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scale", "softcap"), FORMS)
@pytest.mark.parametrize("k", [1, 20, VOCAB])
def test_chunked_topk_kl_is_the_naive_one(scale: float, softcap: float | None, k: int) -> None:
    """Pitfall 11: the rest is one bucket, neither dropped nor spread over the k."""
    ref_hidden, ref_head, hidden, head = parts(2, scale, softcap)
    log_probs, tokens = torch.log_softmax(ref_head.logits(ref_hidden), -1).topk(k)
    every, values = topk_kl_divergence(log_probs, tokens, head.logits(hidden)), torch.zeros(POSITIONS)
    chunked = chunked_topk_kl_divergence(log_probs, tokens, hidden, head, values)
    assert_same(every.sum(), chunked, hidden, head)
    torch.testing.assert_close(values, every.detach(), rtol=1e-4, atol=1e-6)
    full = float(kl_divergence(ref_head.logits(ref_hidden), head.logits(hidden)).detach().sum())
    value = float(chunked.detach())
    assert value == pytest.approx(full, rel=1e-4) if k == VOCAB else 0 < value < full


@pytest.mark.parametrize(("scale", "softcap"), FORMS)
def test_chunked_next_token_loss_is_the_naive_one(scale: float, softcap: float | None) -> None:
    _, _, hidden, head = parts(3, scale, softcap)
    targets = torch.arange(POSITIONS) * 5 % VOCAB
    naive = next_token_loss(head.logits(hidden), targets).sum()
    assert_same(naive, chunked_next_token_loss(targets, hidden, head), hidden, head)


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_topk_kl_is_a_kl_of_two_distributions(seed: int, k: int, vocab: int) -> None:
    """Against the sum written out over k tokens and one bucket, in float64."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(3 * torch.randn(2, vocab, generator=generator, dtype=torch.float64), -1)
    top, tokens = p.topk(min(k, vocab))
    coarse_p = torch.cat([top, (1 - top.sum()).clamp(min=0)[None]])
    coarse_q = torch.cat([q[tokens], (q.sum() - q[tokens].sum()).clamp(min=0)[None]])
    wanted = float(torch.special.xlogy(coarse_p, coarse_p / coarse_q.clamp(min=1e-300)).sum()) if k < vocab else None
    found = float(topk_kl_divergence(top.log(), tokens, q.log()))
    if wanted is not None:
        assert found == pytest.approx(wanted, rel=1e-3, abs=2e-6)
    assert -1e-6 <= found <= float((p * (p / q).log()).sum()) + 1e-5


@pytest.mark.parametrize("k", [5, VOCAB - 2, VOCAB])
def test_vocabulary_that_neither_model_can_say_plays_no_part(k: int) -> None:
    """A bias of −∞ on unused tokens: value and gradients of those that are left, and none of those that are not."""
    ref, ref_head, hidden, head = parts(seed=4)
    assert head.bias is not None
    unused = torch.zeros(VOCAB).index_fill(0, torch.tensor([3, 77]), -torch.inf)
    left = torch.tensor([at for at in range(VOCAB) if at not in (3, 77)])
    ref_head, masked = ref_head._replace(bias=unused), head._replace(bias=head.bias + unused)

    def expected() -> Tensor:
        small = Head(head.weight[left], head.bias[left])
        return kl_divergence(ref_head.logits(ref)[:, left], small.logits(hidden)).sum()

    assert_same(expected(), chunked_kl_divergence(ref, ref_head, hidden, masked), hidden, head)
    top = torch.log_softmax(ref_head.logits(ref), dim=-1).detach().topk(k)
    naive = topk_kl_divergence(*top, masked.logits(hidden)).sum()
    assert_same(naive, chunked_topk_kl_divergence(*top, hidden, masked), hidden, head)
    if k > 5:
        assert_same(expected(), chunked_topk_kl_divergence(*top, hidden, masked), hidden, head)


def test_a_frozen_head_gets_no_gradient_and_none_is_made() -> None:
    ref_hidden, ref_head, hidden, head = parts(4)
    frozen = Head(head.weight.detach(), None)
    value = chunked_kl_divergence(ref_hidden, ref_head, hidden, frozen)
    _, of_weight, of_bias = value.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert of_weight is None
    assert of_bias is None
    (grad,) = torch.autograd.grad(value, [hidden])
    naive = kl_divergence(ref_head.logits(ref_hidden), frozen.logits(hidden)).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(naive, [hidden])[0], rtol=1e-4, atol=1e-6)


def test_where_no_gradient_is_asked_for_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be as large as the head; torch does not say so inside of a function of its own."""
    of_both = parts(4)
    value = chunked_kl_divergence(*of_both)
    monkeypatch.delattr(retain.losses, "_add_product")
    with torch.no_grad():
        hidden = of_both[2].detach()  # as a model gives it there
        assert torch.equal(chunked_kl_divergence(*of_both[:2], hidden, of_both[3]), value)


def test_the_reference_head_gets_no_gradient_even_where_it_is_trained() -> None:
    """With an adapter the base's head is the model's own: only the model's side of the KL may pull on it."""
    _, _, hidden, head = parts(5)
    ref_hidden = hidden.detach() * 0.9
    naive = kl_divergence(head.logits(ref_hidden).detach(), head.logits(hidden)).sum()
    assert_same(naive, chunked_kl_divergence(ref_hidden, head, hidden, head), hidden, head)


def test_half_precision_is_accumulated_in_float32() -> None:
    """Pitfall 12: against float64 on the same rounded inputs, far closer than bfloat16 logits would be."""
    ref_hidden, ref_head, hidden, head = parts(6, dtype=torch.bfloat16)
    found = chunked_kl_divergence(ref_hidden, ref_head, hidden, head)

    def double(head: Head) -> Head:
        bias = None if head.bias is None else head.bias.detach().double()
        return head._replace(weight=head.weight.detach().double(), bias=bias)

    exact = ref_head_kl(double(ref_head), ref_hidden.double(), double(head), hidden.detach().double())
    naive = float(kl_divergence(ref_head.logits(ref_hidden), head.logits(hidden)).detach().sum())
    value = float(found.detach())
    assert value == pytest.approx(exact, rel=2e-6)
    assert abs(naive - exact) > 20 * abs(value - exact)
    grads = gradients(found, hidden, head)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def ref_head_kl(ref_head: Head, ref_hidden: Tensor, head: Head, hidden: Tensor) -> float:
    ref = torch.log_softmax(ref_head.logits(ref_hidden), -1)
    return float((ref.exp() * (ref - torch.log_softmax(head.logits(hidden), -1))).sum())


def test_autocast_does_not_round_what_is_summed() -> None:
    ref_hidden, ref_head, hidden, head = parts(7)
    plain = chunked_kl_divergence(ref_hidden, ref_head, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        under = chunked_kl_divergence(ref_hidden, ref_head, hidden, head)
    assert torch.equal(under, plain)


def test_no_array_of_all_logits_is_ever_made() -> None:
    """The largest tensor that any operation returns is a chunk, or the head's own size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found._base is None:
                Largest.seen = max(Largest.seen, found.numel())
            return found

    ref_hidden, ref_head, hidden, head = parts(8)
    with Largest():
        chunked_kl_divergence(ref_hidden, ref_head, hidden, head).backward()
    assert 0 < Largest.seen <= max(10 * VOCAB, VOCAB * (SIZE + 3)) < POSITIONS * VOCAB
    with Largest():
        kl_divergence(ref_head.logits(ref_hidden), head.logits(hidden)).sum().backward()
    assert Largest.seen >= POSITIONS * VOCAB


def test_it_is_trls_chunked_divergence() -> None:
    """TRL's own kernel as an oracle; it is no public name, so only tests and benchmarks know it."""
    kernel = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    ref_hidden, ref_head, hidden, head = parts(9, 0.5, 4.0)
    trl = kernel.apply(
        hidden, head.weight, head.bias, ref_hidden, ref_head.weight, None, 0.0, 1.0, 0.5, 4.0, ref_head.scale, None
    )[0].sum()
    assert_same(trl, chunked_kl_divergence(ref_hidden, ref_head, hidden, head), hidden, head, rtol=1e-4)


# Heads, from outside

ODD = {
    "gemma2": {**ARCHITECTURES["gemma3_text"], "final_logit_softcapping": 5.0},
    "cohere": {**ARCHITECTURES["llama"], "logit_scale": 0.25},
    "granite": {**ARCHITECTURES["llama"], "logits_scaling": 4.0},
}


def odd_model(architecture: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ODD[architecture])
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 3, 2, 4
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_of_ordinary_models_is_plain(architecture: str) -> None:
    assert find_head_form(make_model(architecture)) == HeadForm(1.0, None)


@pytest.mark.parametrize(
    ("architecture", "form"),
    [("gemma2", HeadForm(1.0, 5.0)), ("cohere", HeadForm(0.25)), ("granite", HeadForm(0.25))],
)
def test_scales_and_soft_caps_are_found(architecture: str, form: HeadForm) -> None:
    assert find_head_form(odd_model(architecture)) == form


@pytest.mark.parametrize("scale", [6.0, 0.001])
def test_a_soft_cap_is_found_where_logits_are_too_small_to_show_it(scale: float) -> None:
    model = odd_model("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale / 6.0)
    assert find_head_form(model) == HeadForm(1.0, 5.0)


def test_an_adapter_on_the_head_is_no_plain_head() -> None:
    """Pitfall 3: the head's weight alone is not what the head does."""
    for kind in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", **kind))
        assert find_head_form(model) is None
    assert find_head_form(get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))


def test_a_model_that_does_something_of_its_own_is_no_plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    forward = model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found.logits = found.logits + 0.1 * found.logits.square()
        return found

    monkeypatch.setattr(model, "forward", odd)
    assert find_head_form(model) is None


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_the_term_at_the_head_is_the_term_of_the_logits(name: str) -> None:
    """The same number and the same gradients in every weight, with and without a plain head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = odd_model(name) if name in ODD else make_model(name)
    reference = Reference.copy_of(base)
    model = Reference.copy_of(base).ref_model.requires_grad_(True)  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    tokens = torch.randint(5, 320, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, 7:] = False
    found = []
    form = find_head_form(model)
    assert form is not None
    for used in (form, None):
        term = ReplayTerm(used, reference)
        values = torch.zeros(int(mask.sum()))
        labels = torch.cat([tokens[:, :1], tokens[:, 1:].masked_fill(~mask, -100)], dim=1)
        batch = TermBatch(model, {"input_ids": tokens}, labels, values=values)
        kl = term.kl(batch)
        assert float(values.sum()) == pytest.approx(float(kl.detach()), rel=1e-5)
        loss = term.next_token_loss(batch)
        model.zero_grad()
        (kl + 0.1 * loss).backward()
        found.append((float(kl.detach()), float(loss.detach()), [parameter.grad for parameter in model.parameters()]))
    (kl, loss, grads), (naive_kl, naive_loss, naive_grads) = found
    assert kl > 0.01
    assert kl == pytest.approx(naive_kl, rel=2e-4)
    assert loss == pytest.approx(naive_loss, rel=2e-5)
    for one, other in zip(grads, naive_grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).abs().max()) <= 2e-3 * float(other.abs().max()) + 1e-6


def test_the_opening_of_a_row_is_its_first_predictions_and_at_most_half_of_them() -> None:
    """Given tokens count as context: a row that continues a prompt has no opening."""
    lengths, width = (0, 1, 2, 3, 2 * OPENING_LENGTH - 1, 2 * OPENING_LENGTH, 30), 40
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = in_opening(mask)
    assert found.sum(-1).tolist() == [0, 0, 1, 1, OPENING_LENGTH - 1, OPENING_LENGTH, OPENING_LENGTH]
    assert all(bool(row[:count].all()) for row, count in zip(found, found.sum(-1).tolist(), strict=True))
    prompted = mask & (torch.arange(width) >= 3)
    assert in_opening(prompted)[-1].nonzero().flatten().tolist() == list(range(3, OPENING_LENGTH))
    prompted = mask & (torch.arange(width) >= 20)
    assert not in_opening(prompted).any()


def test_the_head_itself_does_one_position_only() -> None:
    model, widths = make_model(), []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1]))
    tokens = torch.randint(5, 320, (2, 9))
    shape = at_head(model, {"input_ids": tokens}, lambda hidden, module: torch.tensor(hidden.shape))
    handle.remove()
    assert shape.tolist() == [2, 9, 32]
    assert widths == [1]
