"""AdamW with an anchor: a penalty ½ · coef · ΔᵀFΔ on the move Δ from the base, F the base's Fisher information.

Adam runs in coordinates in which F is diagonal, and each step solves for the penalty in Adam's own metric,

    x ← (x − lr · m̂ / √v̂) / (1 + lr · coef · F / √v̂),

so that no coefficient makes it unstable, and what the base's predictions depend on is held without slowing the rest.
Added to the new task's gradient instead, as elastic weight consolidation has it, the same penalty takes over Adam's
second moment and the clipped update. Adam in the eigenvectors of Kronecker factors: SOAP, Vyas et al.,
arXiv 2409.11321; here these are the base's, and stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from retain.models.fisher import Curvature


class AnchoredWeight:
    """A weight that is trained whole. `offset`, its move from the base, is kept in the curvature's coordinates.

    Where FSDP2 shards it, base, offset and Adam's moments are sharded, too, and each process rotates its own part: the
    weight is cut along the side that is not rotated.
    """

    def __init__(self, parameter: nn.Parameter, curvature: Curvature) -> None:
        self.parameters = [parameter]
        self.curvature, self.base = curvature, parameter.detach().clone()

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the parameter that a host has put in this one's place."""
        (found,), (known,) = parameters, self.parameters
        if found is known:
            return
        self.parameters = [found]
        if isinstance(found, DTensor):
            self.base = _part(self.base, found)
            self.curvature = self._shared_out(found)

    def _shared_out(self, like: DTensor) -> Curvature:
        """The curvature as the processes hold the weight: eigenvectors whole, the diagonal in parts."""
        left, right, parts = self.curvature.left, self.curvature.right, self.curvature.parts

        def cut(outputs: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if inputs is None or left is None:
                return _part(outputs, like), inputs if inputs is None else _same(inputs, like)
            return _same(outputs, like), _part(inputs, like)

        whole = [side if side is None else _same(side, like) for side in (left, right)]
        return Curvature(whole[0], whole[1], [cut(*part) for part in parts])

    def _cut(self, weight: Any) -> Any:
        """The weight, cut along the side that is not rotated."""
        return weight if self.curvature.left is None else _cut_along(1, weight)

    def read(self, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The coordinates of each parameter."""
        if "offset" not in states[0]:
            states[0]["offset"] = self._offset()
        return [states[0]["offset"]]

    def _offset(self) -> Tensor:
        return self.curvature.rotate(self._cut((self.parameters[0] - self.base).float()))

    def gradients(self) -> list[Tensor]:
        """The gradient of each, in these coordinates."""
        return [self.curvature.rotate(self._cut(_gradient(self.parameters[0])))]

    def pull(self, at: int, coordinates: list[Tensor]) -> tuple[Tensor, Tensor]:
        """F x of a parameter's coordinates x, and a diagonal that is at least F."""
        diagonal = self.curvature.diagonal()
        return diagonal * coordinates[0], diagonal

    def write(self, coordinates: list[Tensor]) -> None:
        """Set the parameters."""
        self.parameters[0].copy_(self.base + _cut_along(0, self.curvature.rotate_back(coordinates[0])))

    def penalty(self) -> Tensor:
        """½ ΔᵀFΔ at the parameters as they are, nats per token."""
        return whole((self.curvature.diagonal() * self._offset().square()).sum() / 2)


class AnchoredLoRA:
    """The factors of a LoRA update Δ = scale · B A, each in the curvature's coordinates of its side.

    Where FSDP2 shards them, every process computes with the whole factors, which are small.
    """

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float, curvature: Curvature) -> None:
        self.parameters, self.scale, self.curvature = [a, b], scale, curvature
        self._found: list[Tensor] = []  # as last read

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the parameters that a host has put in the place of these."""
        self.parameters = list(parameters)

    def _sides(self) -> tuple[Tensor, Tensor]:
        """The diagonal of F over the outputs and over the inputs; of a tied head as a head, which alone is moved."""
        outputs, inputs = self.curvature.parts[0]
        assert inputs is not None
        return outputs, inputs

    def _rotations(self) -> Iterable[tuple[nn.Parameter, Curvature]]:
        """Each factor with the coordinates of its side."""
        sides = replace(self.curvature, left=None), replace(self.curvature, right=None)
        return zip(self.parameters, sides, strict=True)

    def read(self, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        self._found = [side.rotate(whole(parameter).float()) for parameter, side in self._rotations()]
        return [found.clone() for found in self._found]

    def gradients(self) -> list[Tensor]:
        return [side.rotate(whole(_gradient(parameter))) for parameter, side in self._rotations()]

    def pull(self, at: int, coordinates: list[Tensor]) -> tuple[Tensor, Tensor]:
        (a, b), (outputs, inputs), square = coordinates, self._sides(), self.scale**2
        # the sums of a symmetric matrix's absolute values bound it: with them as the diagonal the step stays stable
        if at == 0:
            of_b = square * (b.T * outputs) @ b
            return (of_b @ a) * inputs, torch.outer(of_b.abs().sum(1), inputs)
        of_a = square * (a * inputs) @ a.T
        return outputs[:, None] * (b @ of_a), torch.outer(outputs, of_a.abs().sum(1))

    def write(self, coordinates: list[Tensor]) -> None:
        # only the step is rotated back: rounded eigenvectors would distort the whole a little each time
        for (parameter, side), found, moved in zip(self._rotations(), self._found, coordinates, strict=True):
            parameter.add_(_part(side.rotate_back(moved - found), parameter))

    def penalty(self) -> Tensor:
        coordinates = self.read([{}, {}])
        return (coordinates[0] * self.pull(0, coordinates)[0]).sum() / 2


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad.float()


def whole(tensor: Tensor) -> Tensor:
    """All of what processes hold in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _same(tensor: Tensor, like: DTensor) -> Tensor:
    """What every process has whole, to compute with what they hold in parts."""
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of what all have, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _cut_along(side: int, tensor: Tensor) -> Tensor:
    """The same tensor; where processes hold it in parts, cut along this side."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Shard(side) if one.is_shard() else one for one in tensor.placements])


class AnchoredAdamW(Optimizer):
    """AdamW around a base, which an anchor holds.

    Args:
        params: parameters or groups of them, as for any optimizer; all belong to one of `anchored`.
        anchored: the weights, at the base.
        coef: of the penalty; 0 is Adam in the curvature's coordinates.
        lr_ratio: the rate over `lr`, which schedulers set and logs show.
        weight_decay: decoupled; of whole weights it shrinks the move from the base, of LoRA's factors these.

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
        groups = enumerate(self.param_groups)
        places = {id(parameter): (at, of) for at, group in groups for of, parameter in enumerate(group["params"])}
        known = [[id(parameter) for parameter in one.parameters] for one in anchored]
        if places.keys() - {one for ids in known for one in ids}:
            raise ValueError("params: one of them belongs to no anchored weight; give it a curvature")
        self._places = [[places[one] for one in ids] for ids in known]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of Adam and of the penalty."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for one, places in zip(self.anchored, self._places, strict=True):
            one.follow([self.param_groups[group]["params"][at] for group, at in places])
            states = [self.state[parameter] for parameter in one.parameters]
            coordinates, gradients = one.read(states), one.gradients()
            for at, (group, _) in enumerate(places):
                pull, stiffness = one.pull(at, coordinates)
                _move(coordinates[at], gradients[at], pull, stiffness, states[at], self.param_groups[group])
            if any(
                self.param_groups[group]["lr"] for group, _ in places
            ):  # not where torch asks for a checkpoint's state
                one.write(coordinates)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; but state stays in float32 where parameters are of half precision."""
        super().load_state_dict(state_dict)
        saved = [at for group in state_dict["param_groups"] for at in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for at, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(at, {}).items():
                if torch.is_tensor(value):
                    self.state[parameter][name] = value.to(parameter.device)


def _move(x: Tensor, gradient: Tensor, pull: Tensor, stiffness: Tensor, state: dict[str, Any], group: Any) -> None:
    """Adam's step of coordinates x, and the penalty's, in place."""
    if "step" not in state:
        state.update(step=0, mean=torch.zeros_like(x), square=torch.zeros_like(x))
    state["step"] += 1
    (beta1, beta2), lr, step = group["betas"], group["lr"] * group["lr_ratio"], state["step"]
    state["mean"].lerp_(gradient, 1 - beta1)
    state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight = lr * group["coef"]
    moved = state["mean"] * (lr / (1 - beta1**step)) + weight * pull
    x.mul_(1 - lr * group["weight_decay"]).sub_(moved.div_(scale.add_(stiffness, alpha=weight)))
