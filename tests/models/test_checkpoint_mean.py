"""The mean of checkpoints against the mean of merged weights, computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, save_model
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file

from retain import load_model
from retain.models.checkpoint_mean import write_mean

LINEAR = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LORA = {"r": 2, "lora_alpha": 6, **LINEAR}
SEEDS = (1, 2, 3)


def saved(folder: Path, make: Callable[[int], Any], **options: Any) -> list[Path]:
    """A checkpoint of each seed."""
    paths = [folder / f"checkpoint-{seed}" for seed in SEEDS]
    for seed, path in zip(SEEDS, paths, strict=True):
        make(seed).save_pretrained(path, **options)
    return paths


def whole(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a model, its adapter merged into it, in float64."""
    model: Any = load_model(str(path), dtype="float32").double()
    return (model.merge_and_unload() if hasattr(model, "peft_config") else model).state_dict()


def mean_by_hand(paths: list[Path]) -> dict[str, torch.Tensor]:
    weights = [whole(path) for path in paths]
    return {name: torch.stack([one[name] for one in weights]).mean(0) for name in weights[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # qwen3 ties its embeddings
def test_whole_models_to_the_last_bit_of_their_dtype(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    """Also in several files; a weight that was not trained stays as it is."""

    def make(seed: int) -> Any:
        model = make_model(architecture, seed).to(dtype)
        model.model.norm.weight.data.fill_(0.1)
        return model

    paths = saved(tmp_path, make, max_shard_size="40KB")
    assert len(list(paths[0].glob("model-*.safetensors"))) > 1
    write_mean(paths, tmp_path / "mean")
    found, expected = whole(tmp_path / "mean"), mean_by_hand(paths)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].to(dtype), expected[name].to(dtype)) for name in expected)
    assert torch.equal(found["model.norm.weight"], whole(paths[0])["model.norm.weight"])
    assert load_file(next((tmp_path / "mean").glob("model-*.safetensors"))).popitem()[1].dtype == dtype


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_rslora=True, alpha_pattern={"q_proj": 9}, rank_pattern={"down_proj": 3}),
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(**LORA, modules_to_save=["lm_head"]),
        IA3Config(**LINEAR, feedforward_modules=["down_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["lora", "rslora", "embeddings", "lora and head", "ia3 and head"],
)
def test_an_adapter_is_the_mean_of_merged_weights_and_not_of_its_factors(config: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "base")

    def make(seed: int) -> Any:
        model = get_peft_model(load_model(str(tmp_path / "base"), dtype="float32"), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape)
        return model

    paths = saved(tmp_path, make)
    write_mean(paths, tmp_path / "mean")
    found, expected, start = whole(tmp_path / "mean"), mean_by_hand(paths), whole(tmp_path / "base")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    assert any((expected[name] - start[name]).abs().max() > 0.01 for name in expected)


def test_what_has_no_mean_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    base: Any = load_model(str(tmp_path / "base"), dtype="float32")
    paths = saved(tmp_path, lambda seed: base)
    (paths[1] / "model.safetensors").write_bytes(b"short")
    message = "^average_checkpoints: cannot read model.safetensors of checkpoint-1, checkpoint-2, checkpoint-3: "
    with pytest.raises(ValueError, match=message):
        write_mean(paths, tmp_path / "one")
    (paths[2] / "model.safetensors").rename(paths[2] / "sharded.distcp")
    with pytest.raises(ValueError, match=f"^average_checkpoints: '{re.escape(str(paths[2]))}' holds no weights"):
        write_mean(paths, tmp_path / "two")
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(paths[2])
    settings = json.loads((paths[2] / "adapter_config.json").read_text()) | {"lora_bias": True}
    (paths[2] / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="^average_checkpoints: an adapter with lora_bias cannot be averaged"):
        write_mean(paths, tmp_path / "three")
