"""The base's Fisher information: what it costs its predictions to move its weights, to second order.

    KL(base ‖ base + Δ) ≈ ½ ΔᵀFΔ,    F = E[∇ log p ∇ log pᵀ]

In a weight matrix F ≈ G ⊗ A, with A = E[x xᵀ] over its inputs and G = E[g gᵀ] over the gradients at its outputs, per
predicted token (K-FAC: Martens and Grosse, arXiv 1503.05671). Of the two the one on the smaller side, in a
transformer that of the residual stream, is kept whole, as its eigenvectors; of the other the diagonal. All other
weights have the diagonal of F. Labels are drawn from the model's own predictions, so this is the true Fisher
information, not the empirical one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from retain.files import atomic_path
from retain.models.reference import evaluation_mode, frozen_as_found

LOGITS_TOGETHER = 2**27  # of one backward pass: 0.5 GB in float32
ROWS_TOGETHER = 4  # of one backward pass: a diagonal is estimated from the squared gradient of each


@dataclass(frozen=True)
class Curvature:
    """The Fisher information of one weight, per predicted token, in coordinates in which it is diagonal.

    Args:
        left, right: eigenvectors, as columns, of its output and of its input side, in the weight's own dtype; None
            where that side stays as it is.
        parts: the diagonal, as a sum of outer products (of the output side, of the input side); for weights that are
            no matrices one pair (diagonal of the weight's own shape, None).
    """

    left: Float[Tensor, "outputs outputs"] | None
    right: Float[Tensor, "inputs inputs"] | None
    parts: Sequence[tuple[Tensor, Tensor | None]]

    def rotate(self, weight: Tensor) -> Tensor:
        """A weight, its gradient or its move in these coordinates, in float32."""
        return self._between(self.left if self.left is None else self.left.T, weight, self.right)

    def rotate_back(self, weight: Tensor) -> Tensor:
        """The inverse of `rotate`, but for the rounding of the eigenvectors."""
        return self._between(self.left, weight, self.right if self.right is None else self.right.T)

    @staticmethod
    def _between(left: Tensor | None, weight: Tensor, right: Tensor | None) -> Tensor:
        weight = weight if left is None else left @ weight.to(left.dtype)
        return (weight if right is None else weight.to(right.dtype) @ right).float()

    def diagonal(self) -> Tensor:
        """The diagonal of F in these coordinates, of the weight's shape."""
        return reduce(torch.add, (left if right is None else torch.outer(left, right) for left, right in self.parts))

    def tensors(self) -> list[Tensor]:
        """All that it keeps."""
        found = [self.left, self.right, *(side for part in self.parts for side in part)]
        return [tensor for tensor in found if tensor is not None]


def kept_tensors(curvatures: Iterable[Curvature]) -> list[Tensor]:
    """All that they keep; eigenvectors that weights share stand there once."""
    return list({id(tensor): tensor for curvature in curvatures for tensor in curvature.tensors()}.values())


def num_bytes(curvatures: Iterable[Curvature]) -> int:
    """What they take in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in kept_tensors(curvatures))


def save_fisher(path: Path, fisher: Mapping[str, Curvature], num_tokens: int) -> None:
    """Keep curvatures by the name of their weight, and how many predictions they were measured on: safetensors."""
    tensors = kept_tensors(fisher.values())
    places = {id(tensor): str(at) for at, tensor in enumerate(tensors)} | {id(None): None}
    names = {
        name: [places[id(one.left)], places[id(one.right)], [[places[id(side)] for side in part] for part in one.parts]]
        for name, one in fisher.items()
    }
    with atomic_path(path) as temporary:
        kept = {str(at): tensor.contiguous() for at, tensor in enumerate(tensors)}
        about = json.dumps({"num_tokens": num_tokens, "weights": names})
        save_file(kept, temporary, {"fisher": about})  # one entry: safetensors writes several in any order


def load_fisher(path: Path, device: Any = "cpu") -> tuple[dict[str, Curvature], int]:
    """What `save_fisher` kept.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str | None, Any] = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["fisher"])
        names, num_tokens = about["weights"], int(about["num_tokens"])
        tensors[None] = None
        return {
            name: Curvature(tensors[left], tensors[right], [(tensors[a], tensors[b]) for a, b in parts])
            for name, (left, right, parts) in names.items()
        }, num_tokens
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"anchor_coef: {str(path)!r} is damaged; delete it, and it is measured again") from error


def measure_fisher(
    model: Any, batches: Iterable[Mapping[str, Tensor]], weights: Mapping[str, nn.Parameter], *, seed: int = 0
) -> dict[str, Curvature]:
    """The Fisher information of a model at its weights as they are.

    Args:
        batches: `input_ids` and `labels` of shape (rows, length), and what else the model takes; a prediction counts
            where its label is not −100. Which token the label names does not matter.
        weights: those to measure, by name; matrices of linear layers may be frozen.
        seed: of the labels that are drawn.

    Raises:
        ValueError: if the model's predictions are not finite.
    """
    with evaluation_mode(model), frozen_as_found(model), ExitStack() as hooks:
        modules = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # gradients must reach every layer, though most weights are frozen here
        handle = embedding.register_forward_hook(lambda _module, _args, found: found.requires_grad_())
        hooks.callback(handle.remove)
        measured: dict[str, _Measured] = {}
        positions = _Positions()
        for name, weight in weights.items():
            kinds: list[_Measured] = []
            if id(weight) in modules:
                module = modules[id(weight)]
                is_head = weight is head.weight
                kinds.append(_Head(module, positions, model) if is_head else _Linear(module, positions))
            if weight is embedding.weight:
                kinds.append(_Embedding(embedding, positions))
            measured[name] = _Tied(*kinds) if len(kinds) > 1 else kinds[0] if kinds else _Diagonal(weight)
            measured[name].listen(hooks)
        count, generator = 0, torch.Generator(model.device).manual_seed(seed)
        for batch in batches:
            count += _backward(model, dict(batch), generator, positions)
            for one in measured.values():
                one.take_gradient()
        shared = _Shared(embedding.weight.dtype)
        return {name: one.curvature(count, shared) for name, one in measured.items()}


class _Positions:
    """Which positions of a batch count: as those of inputs, and as those of predictions; both (rows, length)."""

    def __init__(self) -> None:
        self.inputs = self.predictions = torch.zeros(0)


def _backward(model: Any, batch: dict[str, Tensor], generator: torch.Generator, positions: _Positions) -> int:
    """Backward from Σ −log p of tokens drawn from the model's own predictions; how many there were."""
    mask = batch.pop("labels")[:, 1:] != -100
    last = torch.zeros_like(mask[:, :1])  # nothing depends on what stands there
    attended = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]) > 0
    positions.predictions = torch.cat([mask, last], 1)
    positions.inputs = attended & torch.cat([attended[:, 1:], last], 1)
    with torch.enable_grad():
        log_probs = model(**batch, use_cache=False).logits[:, :-1][mask].float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        loss = -log_probs.gather(-1, drawn).sum()
    loss.backward()
    if not math.isfinite(loss.item()):
        raise ValueError("anchor_coef: the model's predictions on its replay rows are not finite; load it in bfloat16")
    return int(mask.sum())


def rows_per_batch(vocab_size: int, length: int) -> int:
    """Rows of which the logits fit into memory at once."""
    return max(1, min(ROWS_TOGETHER, LOGITS_TOGETHER // (vocab_size * length)))


class _Measured:
    """Sums over the tokens of one weight's Fisher information."""

    def listen(self, until: ExitStack) -> None:
        """Hear what passes through the weight's module, until the stack closes."""

    def take_gradient(self) -> None:
        """After each backward pass."""

    def curvature(self, count: int, shared: _Shared) -> Curvature:
        """What `count` tokens say; `shared` keeps eigenvectors."""
        raise NotImplementedError


def _tokens(tensor: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What stands at the chosen positions, (tokens, size); an expert of a mixture sees tokens without positions."""
    if chosen is not None and tensor.shape[:-1] == chosen.shape:
        tensor = tensor[chosen]
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()


class _Linear(_Measured):
    """A linear layer: Σ x xᵀ and Σ g², or Σ x² and Σ g gᵀ."""

    def __init__(self, module: nn.Linear, positions: _Positions) -> None:
        self.module, self.positions, self.num_inputs = module, positions, 0
        self.by_input = module.in_features <= module.out_features
        self.inputs: Tensor | float = 0.0
        self.outputs: Tensor | float = 0.0

    def listen(self, until: ExitStack) -> None:
        def hear(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = _tokens(args[0], self._chosen())
            self.num_inputs += len(x)
            self.inputs = self.inputs + (x.T @ x if self.by_input else x.square().sum(0))
            self._hear_outputs(output)

        until.callback(self.module.register_forward_hook(hear).remove)

    def _chosen(self) -> Tensor:
        return self.positions.inputs

    def _hear_outputs(self, output: Tensor) -> None:
        output.register_hook(self._add_outputs)

    def _add_outputs(self, gradient: Tensor) -> None:
        g = _tokens(gradient)
        self.outputs = self.outputs + (g.square().sum(0) if self.by_input else g.T @ g)

    def curvature(self, count: int, shared: _Shared) -> Curvature:
        inputs, outputs = torch.as_tensor(self.inputs) / max(self.num_inputs, 1), torch.as_tensor(self.outputs) / count
        values, vectors = shared.eigh(inputs if self.by_input else outputs)
        if self.by_input:
            return Curvature(None, vectors, [(outputs, values)])
        return Curvature(vectors, None, [(values, inputs)])


class _Head(_Linear):
    """The output head: of its gradients the mean square over all labels, not over drawn ones: f'² p (1 − p).

    f' is the slope of the logits over the head's products: 1, but for models that scale or cap them.
    """

    def __init__(self, module: nn.Linear, positions: _Positions, model: nn.Module) -> None:
        super().__init__(module, positions)
        self.by_input, self.model = True, model

    def listen(self, until: ExitStack) -> None:
        super().listen(until)
        until.callback(self.model.register_forward_hook(self._hear_logits).remove)

    def _chosen(self) -> Tensor:
        return self.positions.predictions

    def _hear_outputs(self, output: Tensor) -> None:
        self.products = output

    def _hear_logits(self, _model: nn.Module, _args: Any, found: Any) -> None:
        (slopes,) = torch.autograd.grad(found.logits.sum(), self.products, retain_graph=True)
        slopes, probs = _tokens(slopes, self._chosen()), _tokens(found.logits, self._chosen()).softmax(-1)
        self.outputs = self.outputs + (slopes.square() * probs * (1 - probs)).sum(0)


class _Embedding(_Measured):
    """The input embedding: how often each token comes, and Σ g gᵀ, g of what is looked up, before it is scaled."""

    def __init__(self, module: nn.Embedding, positions: _Positions) -> None:
        self.module, self.positions, size = module, positions, module.embedding_dim
        self.frequency = torch.zeros(module.num_embeddings, device=module.weight.device)
        self.outputs = torch.zeros(size, size, device=module.weight.device)

    def listen(self, until: ExitStack) -> None:
        def hear(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.frequency += torch.bincount(args[0][self.positions.inputs], minlength=len(self.frequency))
            looked_up = nn.functional.embedding(args[0], self.module.weight)
            scale = output.detach().norm() / looked_up.norm()  # Gemma's module multiplies by √size
            output.register_hook(lambda gradient: add(_tokens(gradient) * scale))

        def add(g: Tensor) -> None:
            self.outputs += g.T @ g

        until.callback(self.module.register_forward_hook(hear).remove)

    def curvature(self, count: int, shared: _Shared) -> Curvature:
        values, vectors = shared.eigh(self.outputs / count)
        return Curvature(None, vectors, [(self.share, values)])

    @property
    def share(self) -> Tensor:
        """Of the inputs, that of each token."""
        return self.frequency / self.frequency.sum().clamp(min=1)


class _Tied(_Measured):
    """An output head that is the input embedding, too: the head's coordinates, and both parts of the diagonal."""

    def __init__(self, head: _Measured, embedding: _Measured) -> None:
        assert isinstance(embedding, _Embedding)
        self.head, self.embedding = head, embedding

    def listen(self, until: ExitStack) -> None:
        self.head.listen(until)
        self.embedding.listen(until)

    def curvature(self, count: int, shared: _Shared) -> Curvature:
        head = self.head.curvature(count, shared)
        assert head.right is not None
        inside = head.right.float().mul(self.embedding.outputs / count @ head.right.float()).sum(0)
        return Curvature(None, head.right, [*head.parts, (self.embedding.share, inside)])


class _Diagonal(_Measured):
    """Any other weight: Σ over backward passes of its squared gradient; rows' gradients are independent, of mean 0."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.sum = weight, torch.zeros_like(weight, dtype=torch.float32)

    def listen(self, until: ExitStack) -> None:
        self.weight.requires_grad_()
        until.callback(setattr, self.weight, "grad", self.weight.grad)
        self.weight.grad = None

    def take_gradient(self) -> None:
        if self.weight.grad is not None:
            self.sum += self.weight.grad.float().square()
            self.weight.grad = None

    def curvature(self, count: int, shared: _Shared) -> Curvature:
        return Curvature(None, None, [(self.sum / count, None)])


class _Shared:
    """Eigenvectors, which weights with the same inputs share, such as those of q, k and v.

    Args:
        dtype: in which they are kept: that of the weights, so that rotations run at the model's own speed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def eigh(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, none below 0, and eigenvectors."""
        for known, values, vectors in self.found[-2:]:
            if known.shape == matrix.shape and torch.equal(known, matrix):
                return values, vectors
        values, vectors = torch.linalg.eigh(matrix)
        self.found.append((matrix, values.clamp(min=0), vectors.to(self.dtype)))
        return self.found[-1][1:]
