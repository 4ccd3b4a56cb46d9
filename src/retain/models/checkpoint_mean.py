"""The uniform mean of a run's checkpoints, computed and saved tensor by tensor.

LAWA (Kaddour, *Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging*, arXiv
2209.14981) averages the latest ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from retain.files import first_line, read_json, write_json
from retain.models.adapters import ADAPTER_CONFIG

COPIED = (".json", ".py")  # suffixes of files that describe a model: configuration, index of shards, custom code
FACTOR_A, FACTOR_B = (".lora_A.", ".lora_embedding_A"), (".lora_B.", ".lora_embedding_B")
NO_MEAN = ("target_parameters", "lora_bias")  # LoRA options: interleaved factors of experts; a bias


def write_mean(checkpoints: Sequence[Path], folder: Path) -> None:
    """Write the mean of these checkpoints of one run into `folder`, in their dtype, one file in memory at a time.

    For a LoRA it is the mean of the products B·A, not of the factors: the factors are concatenated, so the rank is the
    sum of the ranks. All other tensors are averaged in float64.

    Raises:
        ValueError: if a checkpoint's weights cannot be read, or an adapter has no mean.
    """
    last, count = checkpoints[-1], len(checkpoints)
    files = [file.name for file in sorted(last.glob("*model*.safetensors"))]
    if not files:
        raise ValueError(f"average_checkpoints: {str(last)!r} holds no weights in safetensors; leave it out")
    shutil.copytree(last, folder, ignore=lambda _, names: {name for name in names if Path(name).suffix not in COPIED})
    lora = _widen_lora(folder / ADAPTER_CONFIG, count)
    # B·A is scaled by alpha / r, which the N-fold rank divides by N; with rsLoRA by alpha / √r.
    scale = count**-0.5 if lora.get("use_rslora") else 1.0
    try:
        for file in files:
            readers = [safe_open(path / file, framework="pt") for path in checkpoints]
            keys, weights = readers[-1].keys(), {}
            for name in keys:
                values = [reader.get_tensor(name) for reader in readers]
                if lora and any(part in name for part in FACTOR_A):
                    weights[name] = torch.cat(values, 0)
                elif lora and any(part in name for part in FACTOR_B):
                    weights[name] = torch.cat(values, 1) * scale
                else:
                    total = sum((value.double() for value in values), start=torch.zeros((), dtype=torch.float64))
                    weights[name] = (total / count).to(values[0].dtype)
            save_file(weights, folder / file, readers[-1].metadata())
    except (OSError, SafetensorError) as error:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(f"average_checkpoints: cannot read {file} of {names}: {first_line(error)}") from error


def _widen_lora(path: Path, count: int) -> dict[str, Any]:
    """Multiply the rank in a LoRA's configuration by `count`, and return the configuration; {} for other models."""
    config = read_json(path, "model", "save the adapter again") if path.exists() else {}
    if config.get("peft_type") != "LORA":
        return {}
    if option := next((name for name in NO_MEAN if config.get(name)), None):
        raise ValueError(f"average_checkpoints: an adapter with {option} cannot be averaged; leave it out")
    config["r"] *= count
    config["rank_pattern"] = {name: rank * count for name, rank in config["rank_pattern"].items()}
    write_json(path, config)
    return config
