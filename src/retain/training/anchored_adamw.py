"""AdamW with an anchor: a penalty ½ · coef · ΔᵀFΔ on the move Δ from the base; F is the base's Fisher information.

Adam runs in coordinates in which F is diagonal, and each step solves for the penalty in Adam's own metric,

    x ← (x − lr · m̂ / √v̂) / (1 + lr · coef · F / √v̂),

so it is stable at every coefficient, and holds what the base's predictions depend on without slowing the rest.
Added to the new task's gradient, as in elastic weight consolidation, the same penalty would dominate Adam's second
moment and the clipped update. Adam in the eigenvectors of Kronecker factors: SOAP, Vyas et al., arXiv 2409.11321;
here the eigenvectors are the base's and stay fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from retain.models.fisher import Curvature

Cut = Callable[[Tensor], Tensor]
PIECE, PIECE_ON_CPU = 2**24, 2**18  # numbers of a weight that are moved together; on a CPU they stay in its cache


class Adam:
    """Adam's step number and moments of one tensor, in the optimizer's state."""

    def __init__(self, state: dict[str, Any], group: Any, like: Tensor) -> None:
        if "step" not in state:
            state.update(step=0, mean=torch.zeros_like(like), square=torch.zeros_like(like))
        state["step"] += 1
        self.mean, self.square, self.number, self.group = state["mean"], state["square"], state["step"], group

    def move(
        self, x: Tensor, gradient: Tensor, stiffness: Tensor, pull: Tensor | None = None, cut: Cut = lambda of: of
    ) -> None:
        """Move the coordinates x of a piece by Adam's step and the penalty's, in place, in few passes over memory.

        Args:
            stiffness: a diagonal that is at least F.
            pull: F x; None if F is this diagonal.
            cut: gives the piece of a tensor.
        """
        (beta1, beta2), lr = self.group["betas"], self.group["lr"] * self.group["lr_ratio"]
        mean, square = cut(self.mean).lerp_(gradient, 1 - beta1), cut(self.square)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # both sides of the quotient are multiplied by the root of the second moment's correction
        root = math.sqrt(1 - beta2**self.number)
        weight = lr * self.group["coef"] * root
        scale = square.sqrt().add_(stiffness, alpha=weight).add_(self.group["eps"] * root)
        moved = mean * (lr * root / (1 - beta1**self.number))
        moved = moved.addcmul_(stiffness, x, value=weight) if pull is None else moved.add_(pull, alpha=weight)
        if self.group["weight_decay"]:
            x.mul_(1 - lr * self.group["weight_decay"])
        x.addcdiv_(moved, scale, value=-1)


class AnchoredWeight:
    """A weight that is trained whole. `offset`, its move from the base, is kept in the curvature's coordinates.

    Under FSDP2 the base is sharded like the weight. The offset and Adam's moments are sharded along the side that is
    not rotated, so each process rotates its own shard.
    """

    def __init__(self, parameter: nn.Parameter, curvature: Curvature) -> None:
        self.parameters = [parameter]
        self.curvature, self.base = curvature, parameter.detach().clone()

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Switch to the parameter that the trainer has put in this one's place."""
        (new,), (current,) = parameters, self.parameters
        if new is current:
            return
        self.parameters = [new]
        if isinstance(new, DTensor):
            self.base = _shard(self.base, new)
            self.curvature = self._sharded_curvature(new)

    def _sharded_curvature(self, like: DTensor) -> Curvature:
        """The curvature distributed like the weight: eigenvectors replicated, the diagonal sharded."""
        left, right, parts = self.curvature.left, self.curvature.right, self.curvature.parts

        def distributed(outputs: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if inputs is None or left is None:
                return _shard(outputs, like), inputs if inputs is None else _replicate(inputs, like)
            return _replicate(outputs, like), _shard(inputs, like)

        left, right = (side if side is None else _replicate(side, like) for side in (left, right))
        return Curvature(left, right, [distributed(*part) for part in parts])

    def _reshard(self, weight: Any) -> Any:
        """The weight, sharded along the side that is not rotated."""
        return weight if self.curvature.left is None else _shard_along(1, weight)

    def step(self, states: Sequence[dict[str, Any]], groups: Sequence[Any]) -> None:
        """Move the parameter by Adam's step and the penalty's, a piece at a time.

        Args:
            states, groups: the optimizer's state and group of each of `parameters`.
        """
        (parameter,), (state,), (group,), (offset,) = self.parameters, states, groups, self.read(states)
        adam, gradient = Adam(state, group, offset), self._reshard(_gradient(parameter))
        for cut, curvature in self._pieces():
            x = cut(offset)
            adam.move(x, curvature.rotate(cut(gradient)), curvature.diagonal(), cut=cut)
            if group["lr"]:  # torch makes a checkpoint's state with lr 0
                cut(parameter).copy_(cut(self.base) + _shard_along(0, curvature.rotate_back(x)))

    def _pieces(self) -> Iterator[tuple[Cut, Curvature]]:
        """Cuts along the side that is not rotated, and the curvature there; one piece if sharded, or a scalar."""
        parameter, dim = self.parameters[0], 0 if self.curvature.left is None else 1
        if isinstance(parameter, DTensor) or not parameter.ndim:
            yield lambda tensor: tensor, self.curvature
            return
        size, most = parameter.shape[dim], PIECE_ON_CPU if parameter.device.type == "cpu" else PIECE
        length = max(1, most * size // max(1, parameter.numel()))
        for start in range(0, size, length):
            where = dim, start, min(length, size - start)
            yield lambda tensor, where=where: tensor.narrow(*where), self.curvature.narrow(*where)  # type: ignore[misc]

    def read(self, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The coordinates of each parameter."""
        if "offset" not in states[0]:
            states[0]["offset"] = self._offset()
        return [states[0]["offset"]]

    def _offset(self) -> Tensor:
        return self.curvature.rotate(self._reshard((self.parameters[0] - self.base).float()))

    def penalty(self) -> Tensor:
        """½ ΔᵀFΔ at the current parameters, nats per token."""
        return gathered((self.curvature.diagonal() * self._offset().square()).sum() / 2)


class AnchoredLoRA:
    """The factors of a LoRA update Δ = scale · B A, each in the curvature's coordinates of its side.

    Under FSDP2 every process computes with the whole factors, which are small.
    """

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float, curvature: Curvature) -> None:
        self.parameters, self.scale, self.curvature = [a, b], scale, curvature

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Switch to the parameters that the trainer has put in the place of these."""
        self.parameters = list(parameters)

    def _sides(self) -> tuple[Tensor, Tensor]:
        """The diagonal of F over outputs and over inputs; for a tied weight its part as the head, which LoRA moves."""
        outputs, inputs = self.curvature.parts[0]
        assert inputs is not None
        return outputs, inputs

    def _rotations(self) -> Iterable[tuple[nn.Parameter, Curvature]]:
        """Each factor with the rotation of its side."""
        sides = replace(self.curvature, left=None), replace(self.curvature, right=None)
        return zip(self.parameters, sides, strict=True)

    def step(self, states: Sequence[dict[str, Any]], groups: Sequence[Any]) -> None:
        """Move both parameters by Adam's step and the penalty's; see `AnchoredWeight.step`."""
        coordinates, gradients = self.read(states), self.gradients()
        for index, ((parameter, side), state, group) in enumerate(zip(self._rotations(), states, groups, strict=True)):
            x, before = coordinates[index], coordinates[index].clone()
            pull, stiffness = self.pull(index, coordinates)
            Adam(state, group, x).move(x, gradients[index], stiffness, pull)
            # rotate only the step back: rounding in the eigenvectors would distort the whole factor a little each time
            if group["lr"]:
                parameter.add_(_shard(side.rotate_back(x - before), parameter))

    def read(self, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The coordinates of each parameter."""
        for (parameter, side), state in zip(self._rotations(), states, strict=True):
            if "coordinates" not in state or parameter.dtype != torch.float32:  # half precision loses part of a step
                state["coordinates"] = side.rotate(gathered(parameter).float()).clone()  # a side may need no rotation
        return [state["coordinates"] for state in states]

    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter in these coordinates."""
        return [side.rotate(gathered(_gradient(parameter))) for parameter, side in self._rotations()]

    def pull(self, index: int, coordinates: list[Tensor]) -> tuple[Tensor, Tensor]:
        """F x for the coordinates x of one parameter, and a diagonal that is at least F."""
        (a, b), (outputs, inputs), square = coordinates, self._sides(), self.scale**2
        # a diagonal of its rows' absolute sums bounds a symmetric matrix from above, so the step stays stable
        if index == 0:
            of_b = square * (b.T * outputs) @ b
            return (of_b @ a) * inputs, torch.outer(of_b.abs().sum(1), inputs)
        of_a = square * (a * inputs) @ a.T
        return outputs[:, None] * (b @ of_a), torch.outer(outputs, of_a.abs().sum(1))

    def penalty(self) -> Tensor:
        coordinates = self.read([{}, {}])
        return (coordinates[0] * self.pull(0, coordinates)[0]).sum() / 2


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad.float()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _replicate(tensor: Tensor, like: DTensor) -> Tensor:
    """A tensor that every process holds, replicated over the mesh of `like`."""
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _shard(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds, sharded like `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _shard_along(dim: int, tensor: Tensor) -> Tensor:
    """A sharded tensor, sharded along this dimension instead; other tensors as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = [Shard(dim) if placement.is_shard() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=placements)


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Sums of the tensors' bits: exact, at a hundredth of a rotation's time; the same on each process if sharded."""
    sums = torch.stack(
        [_sum_of_bits(tensor.to_local() if isinstance(tensor, DTensor) else tensor) for tensor in tensors]
    )
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        torch.distributed.all_reduce(sums)
    return sums


def _sum_of_bits(tensor: Tensor) -> Tensor:
    size, first = tensor.element_size(), tensor.storage_offset()
    if tensor.is_contiguous() and tensor.numel() * size % 8 == first * size % 8 == 0:
        return tensor.detach().view(-1).view(torch.int64).sum()
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).sum()


class AnchoredAdamW(Optimizer):
    """AdamW with an anchor at the base.

    Args:
        params: parameters or parameter groups, as for any optimizer; each belongs to one of `anchored`.
        anchored: the trained weights, with their values in the base.
        coef: weight of the penalty; with 0 this is Adam in the curvature's coordinates.
        lr_ratio: the rate of the step over `lr`, which schedulers set and logs show.
        weight_decay: decoupled; it shrinks a whole weight's move from the base, or LoRA's factors.

    Raises:
        ValueError: if a parameter belongs to none of `anchored`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        anchored: Sequence[AnchoredWeight | AnchoredLoRA],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        coef: float = 1.0,
        lr_ratio: float = 1.0,
    ) -> None:
        self.anchored = anchored
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "coef": coef}
        defaults["lr_ratio"] = lr_ratio
        super().__init__(params, defaults)
        places = {
            id(parameter): (group_index, index)
            for group_index, group in enumerate(self.param_groups)
            for index, parameter in enumerate(group["params"])
        }
        anchored_ids = [[id(parameter) for parameter in weight.parameters] for weight in anchored]
        if places.keys() - {parameter_id for ids in anchored_ids for parameter_id in ids}:
            raise ValueError("params: a parameter belongs to no anchored weight; give it a curvature")
        self._places = [[places[parameter_id] for parameter_id in ids] for ids in anchored_ids]
        self._checksums: Tensor | None = None  # of the parameters after the last step

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of Adam and the penalty."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, places in zip(self.anchored, self._places, strict=True):
            weight.follow([self.param_groups[group]["params"][index] for group, index in places])
        self._forget_coordinates_of_changed_weights()
        for weight, places in zip(self.anchored, self._places, strict=True):
            states = [self.state[parameter] for parameter in weight.parameters]
            weight.step(states, [self.param_groups[group] for group, _ in places])
        self._checksums = checksums(self._parameters())
        return loss

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for weight in self.anchored for parameter in weight.parameters]

    def _forget_coordinates_of_changed_weights(self) -> None:
        """Let this step read the coordinates of parameters that were changed since the last step, as by averaging."""
        if self._checksums is None:
            return
        changed = checksums(self._parameters()) != self._checksums
        for parameter, is_changed in zip(self._parameters(), changed.tolist(), strict=True):
            if is_changed:
                for name in ("offset", "coordinates"):
                    self.state[parameter].pop(name, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, but keep it in float32 even if the parameters are in half precision."""
        super().load_state_dict(state_dict)
        saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if torch.is_tensor(value):
                    self.state[parameter][name] = value.to(parameter.device)
        self._checksums = None
