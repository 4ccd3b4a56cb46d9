"""The base's Fisher information: how much a change of its weights changes its predictions, to second order.

    KL(base ‖ base + Δ) ≈ ½ ΔᵀFΔ,    F = E[∇ log p ∇ log pᵀ]

In a weight matrix F ≈ G ⊗ A, with A = E[x xᵀ] over its inputs and G = E[g gᵀ] over the gradients at its outputs, per
predicted token (K-FAC: Martens and Grosse, arXiv 1503.05671). The factor of the smaller side, in a transformer that of
the residual stream, is kept whole, as eigenvectors; of the other factor only the diagonal is kept. Weights that are no
such matrix get the diagonal of F. Labels are sampled from the model's own predictions, so this is the true Fisher
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
from retain.models.reference import evaluation_mode, restored_requires_grad

MAX_BATCH_LOGITS = 2**27  # in one backward pass: 0.5 GB in float32
MAX_BATCH_ROWS = 4  # in one backward pass: each pass gives a diagonal one squared gradient


@dataclass(frozen=True)
class Curvature:
    """The Fisher information of one weight, per predicted token, in coordinates in which it is diagonal.

    With fewer eigenvectors than the side has, the coordinates are those along the eigenvectors, followed by the rest of
    the weight as it is: what lies outside their span.

    Args:
        left, right: eigenvectors, as columns, of the output and the input side, in the weight's dtype, or in float32 if
            `truncated`; None for a side that is not rotated.
        parts: the diagonal as a sum of outer products (output side, input side); for other weights, one pair (diagonal
            of the weight's shape, None).
    """

    left: Float[Tensor, "outputs left_rank"] | None
    right: Float[Tensor, "inputs right_rank"] | None
    parts: Sequence[tuple[Tensor, Tensor | None]]

    def rotate(self, weight: Tensor) -> Tensor:
        """A weight, a gradient or a change of the weight in these coordinates, in float32."""
        if self._vectors is None:
            return weight.float()
        along = self._project(weight)
        if self._rank is None:
            return along.float()
        return torch.cat([along, weight - self._lift(along)], self._dim).float()

    def rotate_back(self, coordinates: Tensor) -> Tensor:
        """The inverse of `rotate`, up to rounding of the eigenvectors."""
        if self._vectors is None:
            return coordinates.float()
        if self._rank is None:
            return self._lift(coordinates).float()
        along, rest = coordinates.split([self._rank, len(self._vectors)], self._dim)
        return (rest + self._lift(along - self._project(rest))).float()  # of the rest, what lies outside their span

    @property
    def _vectors(self) -> Tensor | None:
        return self.right if self.left is None else self.left

    @property
    def _dim(self) -> int:
        return int(self.left is None)

    @property
    def _rank(self) -> int | None:
        """The number of eigenvectors; None for all."""
        assert self._vectors is not None
        rank = self._vectors.shape[1]
        return None if rank == len(self._vectors) else rank

    def _project(self, weight: Tensor) -> Tensor:
        """Along the eigenvectors."""
        if self.left is not None:
            return self.left.T @ weight.to(self.left.dtype)
        assert self.right is not None
        return weight.to(self.right.dtype) @ self.right

    def _lift(self, along: Tensor) -> Tensor:
        """The weight that has these coordinates along the eigenvectors, and nothing outside their span."""
        if self.left is not None:
            return self.left @ along.to(self.left.dtype)
        assert self.right is not None
        return along.to(self.right.dtype) @ self.right.T

    def narrow(self, dim: int, start: int, length: int) -> Curvature:
        """Of a piece of the weight, along the side that is not rotated: dimension 0, or 1 if `left` is."""
        sides: list[list[Any]] = [list(part) for part in self.parts]
        for part in sides:
            part[dim] = part[dim].narrow(0, start, length)
        return Curvature(self.left, self.right, [(part[0], part[1]) for part in sides])

    def truncated(self, rank: int) -> Curvature:
        """With the eigenvectors of the `rank` largest eigenvalues alone; for the rest, the mean of the others.

        The eigenvectors become float32 and orthonormal: what is rounded in large coordinates would drown the rest.
        """
        vectors, at = self._vectors, self._dim
        if vectors is None or rank >= vectors.shape[1]:
            return self
        parts: list[list[Any]] = [list(part) for part in self.parts]
        order = parts[0][at].argsort(descending=True)
        for part in parts:
            top, others = part[at][order[:rank]], part[at][order[rank:]]
            part[at] = torch.cat([top, others.mean().expand(len(vectors))])
        cut = torch.linalg.qr(vectors[:, order[:rank]].float())[0].contiguous()
        left, right = (None, cut) if at else (cut, None)
        return Curvature(left, right, [(part[0], part[1]) for part in parts])

    def diagonal(self) -> Tensor:
        """The diagonal of F in these coordinates, in the weight's shape."""
        return reduce(torch.add, (left if right is None else torch.outer(left, right) for left, right in self.parts))

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        tensors = [self.left, self.right, *(side for part in self.parts for side in part)]
        return [tensor for tensor in tensors if tensor is not None]


def distinct_tensors(curvatures: Iterable[Curvature]) -> list[Tensor]:
    """All tensors in them; eigenvectors that weights share occur once."""
    return list({id(tensor): tensor for curvature in curvatures for tensor in curvature.tensors()}.values())


def num_bytes(curvatures: Iterable[Curvature]) -> int:
    """Their memory."""
    return sum(tensor.nbytes for tensor in distinct_tensors(curvatures))


def save_fisher(path: Path, fisher: Mapping[str, Curvature], num_tokens: int) -> None:
    """Save curvatures by weight name, and the number of predictions that they were measured on, as safetensors."""
    tensors = distinct_tensors(fisher.values())
    keys = {id(tensor): str(at) for at, tensor in enumerate(tensors)} | {id(None): None}
    weights = {
        name: [keys[id(curvature.left)], keys[id(curvature.right)],
               [[keys[id(side)] for side in part] for part in curvature.parts]]
        for name, curvature in fisher.items()
    }  # fmt: skip
    with atomic_path(path) as temporary:
        metadata = json.dumps({"num_tokens": num_tokens, "weights": weights})
        # One entry of metadata: safetensors writes several in random order.
        save_file({str(at): tensor.contiguous() for at, tensor in enumerate(tensors)}, temporary, {"fisher": metadata})


def load_fisher(path: Path, device: Any = "cpu") -> tuple[dict[str, Curvature], int]:
    """The curvatures and the number of predictions that `save_fisher` saved.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str | None, Any] = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads(file.metadata()["fisher"])
        weights, num_tokens = metadata["weights"], int(metadata["num_tokens"])
        tensors[None] = None
        return {
            name: Curvature(tensors[left], tensors[right], [(tensors[a], tensors[b]) for a, b in parts])
            for name, (left, right, parts) in weights.items()
        }, num_tokens
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"anchor_coef: {str(path)!r} is damaged; delete it to measure it again") from error


def measure_fisher(
    model: Any, batches: Iterable[Mapping[str, Tensor]], weights: Mapping[str, nn.Parameter], *, seed: int = 0
) -> dict[str, Curvature]:
    """The Fisher information of a model at its current weights, by weight name.

    Args:
        batches: `input_ids` and `labels` of shape (rows, length), and other inputs of the model; predictions count
            where the label is not −100. The label's token does not matter.
        weights: the weights to measure, by name; matrices of linear layers may be frozen.
        seed: seed of the sampled labels.

    Raises:
        ValueError: if the model's predictions are not finite.
    """
    with evaluation_mode(model), restored_requires_grad(model), ExitStack() as hooks:
        modules = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # Gradients must reach every layer although most weights are frozen.
        handle = embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
        hooks.callback(handle.remove)
        measured: dict[str, _Measured] = {}
        positions = _Positions()
        for name, weight in weights.items():
            roles: list[_Measured] = []
            if id(weight) in modules:
                module = modules[id(weight)]
                is_head = weight is head.weight
                roles.append(_Head(module, positions, model) if is_head else _Linear(module, positions))
            if weight is embedding.weight:
                roles.append(_Embedding(embedding, positions))
            measured[name] = _Tied(*roles) if len(roles) > 1 else roles[0] if roles else _Diagonal(weight)
            measured[name].register(hooks)
        count, generator = 0, torch.Generator(model.device).manual_seed(seed)
        for batch in batches:
            count += _backward(model, dict(batch), generator, positions)
            for sums in measured.values():
                sums.add_gradient()
        eigenvectors = _Eigenvectors(embedding.weight.dtype)
        return {name: sums.curvature(count, eigenvectors) for name, sums in measured.items()}


class _Positions:
    """Masks of a batch, (rows, length): positions whose inputs count, and positions whose predictions count."""

    def __init__(self) -> None:
        self.inputs = self.predictions = torch.zeros(0)


def _backward(model: Any, batch: dict[str, Tensor], generator: torch.Generator, positions: _Positions) -> int:
    """Backpropagate Σ −log p of tokens sampled from the model's own predictions; return their number."""
    mask = batch.pop("labels")[:, 1:] != -100
    last = torch.zeros_like(mask[:, :1])  # the last position predicts nothing
    attended = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]) > 0
    positions.predictions = torch.cat([mask, last], 1)
    positions.inputs = attended & torch.cat([attended[:, 1:], last], 1)
    with torch.enable_grad():
        log_probs = model(**batch, use_cache=False).logits[:, :-1][mask].float().log_softmax(-1)
        sampled = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        loss = -log_probs.gather(-1, sampled).sum()
    loss.backward()
    if not math.isfinite(loss.item()):
        raise ValueError("anchor_coef: the model's predictions on its replay rows are not finite; load it in bfloat16")
    return int(mask.sum())


def rows_per_batch(vocab_size: int, length: int) -> int:
    """Number of rows for one backward pass."""
    return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_LOGITS // (vocab_size * length)))


class _Measured:
    """Sums over tokens from which the Fisher information of one weight follows."""

    def register(self, hooks: ExitStack) -> None:
        """Register hooks on the weight's module that add to the sums until `hooks` closes."""

    def add_gradient(self) -> None:
        """Called after each backward pass."""

    def curvature(self, count: int, eigenvectors: _Eigenvectors) -> Curvature:
        """The Fisher information by the sums over `count` predictions."""
        raise NotImplementedError


def _tokens(tensor: Tensor, mask: Tensor | None = None) -> Tensor:
    """The vectors at the masked positions, (tokens, size); an expert of a mixture gets tokens without positions."""
    if mask is not None and tensor.shape[:-1] == mask.shape:
        tensor = tensor[mask]
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()


class _Linear(_Measured):
    """A linear layer: Σ x xᵀ and Σ g², or Σ x² and Σ g gᵀ."""

    def __init__(self, module: nn.Linear, positions: _Positions) -> None:
        self.module, self.positions, self.num_inputs = module, positions, 0
        self.by_input = module.in_features <= module.out_features
        self.inputs: Tensor | float = 0.0
        self.outputs: Tensor | float = 0.0

    def register(self, hooks: ExitStack) -> None:
        def add_inputs(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = _tokens(args[0], self._mask())
            self.num_inputs += len(x)
            self.inputs = self.inputs + (x.T @ x if self.by_input else x.square().sum(0))
            self._on_output(output)

        hooks.callback(self.module.register_forward_hook(add_inputs).remove)

    def _mask(self) -> Tensor:
        return self.positions.inputs

    def _on_output(self, output: Tensor) -> None:
        output.register_hook(self._add_outputs)

    def _add_outputs(self, gradient: Tensor) -> None:
        g = _tokens(gradient)
        self.outputs = self.outputs + (g.square().sum(0) if self.by_input else g.T @ g)

    def curvature(self, count: int, eigenvectors: _Eigenvectors) -> Curvature:
        inputs, outputs = torch.as_tensor(self.inputs) / max(self.num_inputs, 1), torch.as_tensor(self.outputs) / count
        values, vectors = eigenvectors.eigh(inputs if self.by_input else outputs)
        if self.by_input:
            return Curvature(None, vectors, [(outputs, values)])
        return Curvature(vectors, None, [(values, inputs)])


class _Head(_Linear):
    """The output head; the mean square of its gradients is exact, over all labels, not sampled ones: f'² p (1 − p).

    f' is the derivative of the logits by the head's products: 1, except in models that scale or cap them.
    """

    def __init__(self, module: nn.Linear, positions: _Positions, model: nn.Module) -> None:
        super().__init__(module, positions)
        self.by_input, self.model = True, model

    def register(self, hooks: ExitStack) -> None:
        super().register(hooks)
        hooks.callback(self.model.register_forward_hook(self._add_slopes).remove)

    def _mask(self) -> Tensor:
        return self.positions.predictions

    def _on_output(self, output: Tensor) -> None:
        self.products = output

    def _add_slopes(self, _model: nn.Module, _args: Any, output: Any) -> None:
        (slopes,) = torch.autograd.grad(output.logits.sum(), self.products, retain_graph=True)
        slopes, probs = _tokens(slopes, self._mask()), _tokens(output.logits, self._mask()).softmax(-1)
        self.outputs = self.outputs + (slopes.square() * probs * (1 - probs)).sum(0)


class _Embedding(_Measured):
    """The input embedding: the frequency of each token, and Σ g gᵀ, with g at the embeddings before they are scaled."""

    def __init__(self, module: nn.Embedding, positions: _Positions) -> None:
        self.module, self.positions, size = module, positions, module.embedding_dim
        self.frequency = torch.zeros(module.num_embeddings, device=module.weight.device)
        self.outputs = torch.zeros(size, size, device=module.weight.device)

    def register(self, hooks: ExitStack) -> None:
        def add_tokens(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.frequency += torch.bincount(args[0][self.positions.inputs], minlength=len(self.frequency))
            looked_up = nn.functional.embedding(args[0], self.module.weight)
            scale = output.detach().norm() / looked_up.norm()  # Gemma's module multiplies by √size
            output.register_hook(lambda gradient: add_outputs(_tokens(gradient) * scale))

        def add_outputs(g: Tensor) -> None:
            self.outputs += g.T @ g

        hooks.callback(self.module.register_forward_hook(add_tokens).remove)

    def curvature(self, count: int, eigenvectors: _Eigenvectors) -> Curvature:
        values, vectors = eigenvectors.eigh(self.outputs / count)
        return Curvature(None, vectors, [(self.share, values)])

    @property
    def share(self) -> Tensor:
        """Share of each token among the inputs."""
        return self.frequency / self.frequency.sum().clamp(min=1)


class _Tied(_Measured):
    """An output head tied to the input embedding: rotated as the head; the diagonal is the sum of both."""

    def __init__(self, head: _Measured, embedding: _Measured) -> None:
        assert isinstance(embedding, _Embedding)
        self.head, self.embedding = head, embedding

    def register(self, hooks: ExitStack) -> None:
        self.head.register(hooks)
        self.embedding.register(hooks)

    def curvature(self, count: int, eigenvectors: _Eigenvectors) -> Curvature:
        head = self.head.curvature(count, eigenvectors)
        assert head.right is not None
        diagonal = head.right.float().mul(self.embedding.outputs / count @ head.right.float()).sum(0)
        return Curvature(None, head.right, [*head.parts, (self.embedding.share, diagonal)])


class _Diagonal(_Measured):
    """Any other weight: Σ over backward passes of its squared gradient; rows' gradients are independent with mean 0."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.sum = weight, torch.zeros_like(weight, dtype=torch.float32)

    def register(self, hooks: ExitStack) -> None:
        self.weight.requires_grad_()
        hooks.callback(setattr, self.weight, "grad", self.weight.grad)
        self.weight.grad = None

    def add_gradient(self) -> None:
        if self.weight.grad is not None:
            self.sum += self.weight.grad.float().square()
            self.weight.grad = None

    def curvature(self, count: int, eigenvectors: _Eigenvectors) -> Curvature:
        return Curvature(None, None, [(self.sum / count, None)])


class _Eigenvectors:
    """Eigenvectors, shared by weights with the same inputs, such as those of q, k and v.

    Args:
        dtype: the dtype to keep them in: that of the weights, so that rotations run at the model's speed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.computed: list[tuple[Tensor, Tensor, Tensor]] = []

    def eigh(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues, none below 0, and eigenvectors; reused if one of the last two matrices is the same."""
        for earlier, values, vectors in self.computed[-2:]:
            if earlier.shape == matrix.shape and torch.equal(earlier, matrix):
                return values, vectors
        values, vectors = torch.linalg.eigh(matrix)
        self.computed.append((matrix, values.clamp(min=0), vectors.to(self.dtype)))
        return self.computed[-1][1:]
