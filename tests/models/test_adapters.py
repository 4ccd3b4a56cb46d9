"""An adapter merged into its base predicts as before, is written once, and is refused where it would not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from retain.models.adapters import MERGED_FILE, adapted_model, merge_adapter, merged_base
from retain.models.loading import load_model
from retain.models.reference import probe


def save_adapted(folder: Path, modules: list[str], seed: int = 0, config: type = LoraConfig, **how: object) -> Path:
    """A base in `base/` and an adapter that changes what it predicts in `adapter/`."""
    base = make_model(tie_word_embeddings="lm_head" in modules)
    for place in (folder / "base", folder / "adapter"):
        make_tokenizer().save_pretrained(place)
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config.name_or_path = str(folder / "base")
    targets = {"r": 2, "target_modules": modules} if config is LoraConfig else how
    tuned = get_peft_model(base, config(task_type="CAUSAL_LM", base_model_name_or_path=str(folder / "base"), **targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def test_the_merged_model_predicts_what_the_adapter_did(tmp_path):
    adapter = save_adapted(tmp_path, ["q_proj", "down_proj"])
    merged_base(str(adapter), tmp_path / "whole")
    expected, found = (probe(load_model(str(folder))) for folder in (adapter, tmp_path / "whole"))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, probe(load_model(str(tmp_path / "base"))), atol=1e-2)
    assert adapted_model(str(adapter)) == str(tmp_path / "base")
    assert adapted_model(str(tmp_path / "whole")) is None


def test_it_is_written_once_and_never_over_another(tmp_path):
    adapter, whole = save_adapted(tmp_path / "one", ["q_proj"]), tmp_path / "whole"
    merged_base(str(adapter), whole)
    written = (whole / "model.safetensors").stat().st_mtime_ns
    merged_base(str(adapter), whole)
    assert (whole / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((whole / MERGED_FILE).read_text())["adapter"] == str(adapter)
    other = save_adapted(tmp_path / "two", ["q_proj"], seed=1)
    with pytest.raises(ValueError, match=r"output_dir: '.*whole' was merged from another adapter; choose another"):
        merged_base(str(other), whole)


def test_an_adapter_on_a_tied_head_would_move_the_embeddings_and_is_refused(tmp_path):
    adapter = save_adapted(tmp_path, ["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="model: merging the adapter into its base changes its predictions"):
        merged_base(str(adapter), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_prompt_is_no_change_of_weights(tmp_path):
    adapter = save_adapted(tmp_path, [], config=PromptTuningConfig, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="model: its adapter cannot be merged into its base"):
        merge_adapter(load_model(str(adapter)))
