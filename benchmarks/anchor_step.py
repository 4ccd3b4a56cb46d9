"""Time and memory of a step of an anchor, by its eigenvectors, and of fused AdamW, on the weights of SmolLM2-135M.

    python benchmarks/anchor_step.py [--rounds 5] [--layers 30] [--output benchmarks/anchor_step.json]

Weights, gradients and Fisher information are random: a step's time depends on shapes alone. `state_megabytes`: the
base, the move from it and Adam's moments; `fisher_megabytes`: eigenvectors and diagonals. The optimizers take turns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from replay_step import in_turns
from torch import nn

from retain import versions
from retain.models.fisher import Curvature, num_bytes
from retain.training.anchored_adamw import AnchoredAdamW, AnchoredWeight

EMBEDDING, OF_A_LAYER = (
    (49_152, 576),
    ((576, 576), (192, 576), (192, 576), (576, 576), *((1536, 576),) * 2, (576, 1536)),
)


def weights(layers: int, device: str) -> list[nn.Parameter]:
    made = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in (EMBEDDING, *OF_A_LAYER * layers)]
    for parameter in made:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return made


def random_curvature(parameter: nn.Parameter, rank: int | None) -> Curvature:
    outputs, inputs = parameter.shape
    vectors = torch.linalg.qr(torch.randn(min(outputs, inputs), min(outputs, inputs), device=parameter.device))[0]
    sides = [(torch.rand(outputs, device=parameter.device), torch.rand(inputs, device=parameter.device))]
    whole = Curvature(None, vectors, sides) if inputs <= outputs else Curvature(vectors, None, sides)
    return whole if rank is None else whole.truncated(rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for rank in (None, 32, 8):
        plain, own = weights(options.layers, device), weights(options.layers, device)
        anchored = [AnchoredWeight(parameter, random_curvature(parameter, rank)) for parameter in own]
        adamw, anchor = torch.optim.AdamW(plain, lr=1e-4, fused=True), AnchoredAdamW(own, anchored, lr=1e-4, coef=100.0)
        forms = {"adamw": adamw.step, f"anchor, {rank or 'all'} eigenvectors": anchor.step}
        found |= in_turns(forms, options.rounds, device, "adamw")
        for one in found.values():
            one.pop("memory_ratio", None)  # fused AdamW takes none
        state = [value for values in anchor.state.values() for value in values.values() if torch.is_tensor(value)]
        found[f"anchor, {rank or 'all'} eigenvectors"] |= {
            "state_megabytes": round(sum(one.nbytes for one in [*state, *(of.base for of in anchored)]) / 2**20, 1),
            "fisher_megabytes": round(num_bytes(of.curvature for of in anchored) / 2**20, 1),
        }
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu, 1 thread"
    facts = {"device": name, "layers": options.layers, "rounds": options.rounds, "seed": 0, "versions": versions()}
    text = json.dumps({**facts, "results": found}, indent=2) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
