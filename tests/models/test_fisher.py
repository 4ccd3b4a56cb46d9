"""The Fisher information against models small enough to write it down, and against the KL that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import nn

from retain.losses import kl_divergence
from retain.models.fisher import Curvature, load_fisher, measure_fisher, num_bytes, rows_per_batch, save_fisher
from retain.models.reference import evaluation_mode
from retain.training.anchored_adamw import AnchoredWeight

VOCAB, SIZE = 5, 3


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    scale = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.scale


class Bigram(nn.Module):
    """Predicts a token from the one before: an embedding, a layer and a head, with nothing between."""

    def __init__(self, tied: bool = False, logits: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = logits
        self.embed, self.layer = ScaledEmbedding(VOCAB, SIZE), nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.down, self.head = nn.Linear(4 * SIZE, SIZE), nn.Linear(SIZE, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    device = torch.device("cpu")

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.logits(self.head(self.down(self.layer(self.embed(input_ids))))))


def bigram_rows(count: int = 2000) -> list[dict[str, torch.Tensor]]:
    """Rows of two tokens: one prediction each, so that no sum over positions stands in between."""
    rows = torch.randint(0, VOCAB, (count, 2), generator=torch.Generator().manual_seed(1))
    labels = rows.clone()
    labels[:, 0] = -100
    return [{"input_ids": rows[at : at + 4], "labels": labels[at : at + 4]} for at in range(0, count, 4)]


def exact_fisher(model: nn.Module, weight: nn.Parameter, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """E[∇ log p ∇ log pᵀ] over all tokens that the model could say, not over drawn ones; (weights, weights)."""
    inputs = torch.cat([row["input_ids"][:, 0] for row in rows])
    total = torch.zeros(weight.numel(), weight.numel())
    for token, count in zip(*inputs.unique(return_counts=True), strict=True):
        log_probs = model(token.reshape(1, 1)).logits[0, 0].log_softmax(-1)
        for log_prob in log_probs:
            (gradient,) = torch.autograd.grad(log_prob, weight, retain_graph=True)
            total += count * log_prob.exp().detach() * torch.outer(gradient.flatten(), gradient.flatten())
    return total / len(inputs)


@pytest.mark.parametrize("name", ["layer.weight", "down.weight", "head.weight"])
def test_each_factor_is_that_of_the_exact_fisher(name: str) -> None:
    model, rows = Bigram(), bigram_rows()
    weights = dict(model.named_parameters())
    curvature = measure_fisher(model, rows, {name: weights[name]})[name]
    weight = weights[name]
    exact = exact_fisher(model, weight, rows).reshape(*weight.shape, *weight.shape)
    ((outputs, inputs),) = curvature.parts
    assert inputs is not None
    # Summed over one side, the Kronecker product says exactly what the other side's marginal is.
    by_output, by_input = exact.diagonal(dim1=1, dim2=3).sum(-1), exact.diagonal(dim1=0, dim2=2).sum(-1)
    if curvature.right is not None:
        assert weight.shape[1] <= weight.shape[0]
        measured = curvature.right @ torch.diag(inputs) @ curvature.right.T
        assert torch.allclose(measured / measured.trace(), by_input / by_input.trace(), atol=0.08)
    else:
        assert curvature.left is not None
        measured = curvature.left @ torch.diag(outputs) @ curvature.left.T
        assert torch.allclose(measured / measured.trace(), by_output / by_output.trace(), atol=0.08)


@pytest.mark.parametrize(
    "logits", [lambda x: x, lambda x: 0.2 * x, lambda x: x.div(0.5).tanh() * 0.5], ids=["plain", "scaled", "capped"]
)
def test_the_head_of_a_model_of_one_token_is_exact(logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """With one input all factors are constants, so that K-FAC is the Fisher information itself."""
    model = Bigram(logits=logits)
    rows = [{"input_ids": torch.tensor([[2, 1]]), "labels": torch.tensor([[-100, 1]])}] * 3
    curvature = measure_fisher(model, rows, {"head.weight": model.head.weight})["head.weight"]
    exact = exact_fisher(model, model.head.weight, rows).reshape(VOCAB, SIZE, VOCAB, SIZE)
    of_rows = torch.stack([exact[at, :, at, :] for at in range(VOCAB)])  # the diagonal over the outputs, as is said
    ((outputs, inputs),) = curvature.parts
    assert curvature.right is not None
    assert inputs is not None
    inner = curvature.right @ torch.diag(inputs) @ curvature.right.T
    assert torch.allclose(outputs[:, None, None] * inner, of_rows, atol=1e-5)


def kl_gradient(model: nn.Module, name: str, move: torch.Tensor) -> torch.Tensor:
    """The gradient of KL(base || model) in a weight, behind a move of it from the base; float64."""
    base, moved, token = copy.deepcopy(model).double(), copy.deepcopy(model).double(), torch.tensor([[2]])
    weight = moved.get_parameter(name)
    with torch.no_grad():
        weight.add_(move)
        ref_log_probs = base(token).logits.log_softmax(-1)
    kl = (ref_log_probs.exp() * (ref_log_probs - moved(token).logits.log_softmax(-1))).sum()
    return torch.autograd.grad(kl, weight)[0]


@pytest.mark.parametrize(("name", "error"), [("layer.weight", 0.1), ("down.weight", 0.1), ("head.weight", 1e-4)])
def test_the_anchors_gradient_is_that_of_the_exact_fisher_and_of_the_kls_hessian(name: str, error: float) -> None:
    """With one input, in a line of the side that is kept as its diagonal: nothing else is left out of F there.

    The errors are those of drawn labels; the head has none.
    """
    model = Bigram()
    pairs = torch.tensor([[2, 1]] * 4)
    rows = [{"input_ids": pairs, "labels": torch.tensor([[-100, 1]] * 4)}] * 1000
    weight = model.get_parameter(name)
    anchored = AnchoredWeight(weight, measure_fisher(model, rows, {name: weight})[name])
    move, generator = torch.zeros_like(weight), torch.Generator().manual_seed(5)
    line = move[1] if anchored.curvature.right is not None else move[:, 1]
    line.normal_(generator=generator)
    exact = (exact_fisher(model, weight, rows[:1]) @ move.flatten()).reshape(weight.shape)
    small = 1e-4
    hessian = (kl_gradient(model, name, small * move) - kl_gradient(model, name, -small * move)) / (2 * small)
    with torch.no_grad():
        weight.add_(move)
    (offset,) = anchored.read([{}])
    pull = anchored.curvature.rotate_back(anchored.curvature.diagonal() * offset)
    moved = move != 0
    assert torch.allclose(exact.double(), hessian, atol=1e-6)
    assert (pull - exact)[moved].norm() <= error * exact[moved].norm()
    assert anchored.penalty().item() == pytest.approx(float((move * exact).sum()) / 2, rel=error)


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_the_embedding_is_what_is_looked_up_and_not_what_a_model_makes_of_it(scale: float) -> None:
    model, rows = Bigram(), bigram_rows()
    model.embed.scale = scale
    curvature = measure_fisher(model, rows, {"embed.weight": model.embed.weight})["embed.weight"]
    exact = exact_fisher(model, model.embed.weight, rows).trace()
    assert float(curvature.diagonal().sum()) == pytest.approx(float(exact), rel=0.1)


def test_any_other_weight_has_the_diagonal_of_the_exact_fisher() -> None:
    model, rows = Bigram(), bigram_rows(8000)
    curvature = measure_fisher(model, rows, {"down.bias": model.down.bias})["down.bias"]
    exact = exact_fisher(model, model.down.bias, rows).diagonal()
    assert torch.allclose(curvature.diagonal(), exact, rtol=0.15)


def test_a_tied_embedding_has_the_parts_of_both_its_uses() -> None:
    model, rows = Bigram(tied=True), bigram_rows()
    weights = {"embed.weight": model.embed.weight}
    tied = measure_fisher(model, rows, weights)["embed.weight"]
    untied = Bigram()
    untied.load_state_dict({**model.state_dict(), "head.weight": model.embed.weight.detach()})
    parts = measure_fisher(untied, rows, {"e": untied.embed.weight, "h": untied.head.weight})
    move = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(3))

    def trace(curvature: Curvature) -> float:
        return float(curvature.diagonal().sum())

    assert trace(tied) == pytest.approx(trace(parts["e"]) + trace(parts["h"]), rel=0.05)
    assert torch.allclose(tied.rotate_back(tied.rotate(move)), move, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncated_it_is_the_matrix_of_the_largest_eigenvalues_and_the_mean_of_the_others(
    side: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    values, other, move = torch.rand(6, generator=generator), torch.rand(4, generator=generator), torch.randn(6, 4)
    whole = Curvature(vectors, None, [(values, other)])
    if side == "right":
        whole, move = Curvature(None, vectors, [(other, values)]), move.T
    rounded = [one if one is None else one.to(dtype) for one in (whole.left, whole.right)]
    cut = Curvature(*rounded, whole.parts).truncated(2)
    top = values.argsort(descending=True)
    levels = values.clone()
    levels[top[2:]] = values[top[2:]].mean()
    matrix = vectors @ torch.diag(levels) @ vectors.T
    rows = move.T if side == "left" else move
    wanted = float((other[:, None] * rows * (rows @ matrix)).sum())
    assert float((cut.diagonal() * cut.rotate(move).square()).sum()) == pytest.approx(
        wanted, rel=1e-5 if dtype == torch.float32 else 0.01
    )
    assert torch.allclose(cut.rotate_back(cut.rotate(move)), move, atol=1e-6)
    assert num_bytes([cut]) < num_bytes([whole])
    assert torch.equal(whole.truncated(6).rotate(move), whole.rotate(move))


def test_a_tied_embedding_is_truncated_in_both_its_parts() -> None:
    model, rows = Bigram(tied=True), bigram_rows()
    tied = measure_fisher(model, rows, {"embed.weight": model.embed.weight})["embed.weight"]
    move = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(3))
    for rank in range(1, SIZE):
        cut = tied.truncated(rank)
        assert torch.allclose(cut.rotate_back(cut.rotate(move)), move, atol=1e-6)
        assert float(cut.diagonal()[:, rank:].std(1).max()) < 1e-6, "outside the eigenvectors all directions are alike"
        assert float(cut.diagonal()[:, :rank].sum() + cut.diagonal()[:, rank].sum() * (SIZE - rank)) == pytest.approx(
            float(tied.diagonal().sum()), rel=1e-5
        )


def test_in_a_small_move_of_one_matrix_it_is_the_kl_to_second_order() -> None:
    model = make_model()
    ids = torch.randint(5, 200, (64, 12), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": ids[at : at + 4], "labels": ids[at : at + 4]} for at in range(0, 64, 4)]
    weights = {n: w for n, w in model.named_parameters() if n.endswith("down_proj.weight")}
    fisher = measure_fisher(model, rows, weights, seed=1)
    with evaluation_mode(model), torch.no_grad():
        before = model(ids).logits[:, :-1]
        for name, weight in weights.items():
            curvature, moved = fisher[name], copy.deepcopy(model)
            move = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
            dict(moved.named_parameters())[name].add_(move)
            kl = float(kl_divergence(before, moved(ids).logits[:, :-1]).mean())
            said = float((curvature.diagonal() * curvature.rotate(move).square()).sum()) / 2
            assert said == pytest.approx(kl, rel=0.35), name


def test_padding_says_nothing() -> None:
    """Rows of two lengths in one padded batch are worth what each is alone."""
    model = make_model()
    long, short = torch.randint(5, 200, (2, 12)), torch.randint(5, 200, (2, 8))
    padded = torch.cat([long, torch.cat([short, torch.zeros(2, 4, dtype=torch.long)], 1)])
    mask = torch.ones_like(padded)
    mask[2:, 8:] = 0
    labels = padded.masked_fill(mask == 0, -100)
    together = [{"input_ids": padded, "attention_mask": mask, "labels": labels}]
    alone = [{"input_ids": rows, "labels": rows} for rows in (long, short)]
    weights = {"embedding": model.get_input_embeddings().weight}
    of_padded, of_whole = (measure_fisher(model, batches, weights)["embedding"] for batches in (together, alone))
    (padded_share, _), (share, _) = of_padded.parts[-1], of_whole.parts[-1]
    assert float(padded_share[0]) == 0.0
    assert torch.allclose(padded_share, share)
    assert float(share.sum()) == pytest.approx(1.0)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = make_model()
    model.train()
    frozen = model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)
    ids = torch.randint(5, 200, (4, 8))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    measure_fisher(model, [{"input_ids": ids, "labels": ids}], dict(model.named_parameters()))
    assert model.training
    assert not frozen.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_see_the_same_inputs_share_their_eigenvectors(tmp_path: Any) -> None:
    model = make_model()
    ids = torch.randint(5, 200, (8, 16))
    mlp = model.model.layers[0].mlp
    weights = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight}
    fisher = measure_fisher(model, [{"input_ids": ids, "labels": ids}], weights)
    assert fisher["gate"].right is fisher["up"].right is not None
    assert num_bytes(fisher.values()) < sum(num_bytes([one]) for one in fisher.values())
    save_fisher(tmp_path / "fisher.safetensors", fisher, 120)
    loaded, num_tokens = load_fisher(tmp_path / "fisher.safetensors")
    assert num_tokens == 120
    assert all(torch.equal(loaded[name].diagonal(), one.diagonal()) for name, one in fisher.items())
    assert num_bytes(loaded.values()) == num_bytes(fisher.values())


def test_a_model_of_half_precision_has_eigenvectors_of_half_the_size() -> None:
    model = make_model()
    ids = torch.randint(5, 200, (16, 16), generator=torch.Generator().manual_seed(2))
    batches = [{"input_ids": ids, "labels": ids}]
    name = "model.layers.0.mlp.up_proj.weight"
    whole = measure_fisher(model, batches, {name: model.get_parameter(name)})[name]
    model.bfloat16()
    half = measure_fisher(model, batches, {name: model.get_parameter(name)})[name]
    assert half.right is not None
    assert half.right.dtype == torch.bfloat16
    move = torch.randn(whole.diagonal().shape, generator=torch.Generator().manual_seed(4))
    sums = [float((of.diagonal() * of.rotate(move).square()).sum()) for of in (whole, half)]
    assert sums[1] == pytest.approx(sums[0], rel=0.05)


def test_a_damaged_file_is_refused_in_one_line(tmp_path: Any) -> None:
    (tmp_path / "fisher.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"anchor_coef: .*fisher.safetensors' is damaged; delete it"):
        load_fisher(tmp_path / "fisher.safetensors")


def test_a_backward_pass_holds_few_rows_and_few_logits() -> None:
    assert rows_per_batch(1000, 64) == 4
    assert rows_per_batch(256_000, 512) == 1
