"""A pool belongs to a model, not to its weights: what a configuration changes is seen before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer, save_model
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from trl import SFTConfig

from retain import ReplayConfig, ReplaySFTTrainer
from retain.cli.main import main
from retain.models.description import model_fingerprint
from retain.replay.dataset import read_manifest, read_shards, shard_path
from retain.sampling.write import sample_replay

LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
LORA = LoraConfig(r=4, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pools")
    for architecture in ("llama", "gemma3_text"):
        for dtype in (torch.float32, torch.bfloat16):
            place = folder / f"{architecture}-{str(dtype)[6:]}"
            model = make_model(architecture).to(dtype)
            sample_replay(model, make_tokenizer(), place, num_rows=16, max_length=64, batch_size=16)
    return str(folder)


def trainer_of(model, pool: str, place: Path, replay=None, peft_config=None, **settings) -> ReplaySFTTrainer:
    from datasets import Dataset

    settings = {"bf16": False, "use_cpu": True, "report_to": "none", "max_length": 24, **settings}
    return ReplaySFTTrainer(
        model=model, args=SFTConfig(str(place), **settings), processing_class=make_tokenizer(),
        train_dataset=Dataset.from_dict({"text": make_texts(8, seed=1)}), peft_config=peft_config,
        replay_dataset=pool, replay_config=replay or ReplayConfig(),
    )  # fmt: skip


OTHERS = {
    "rope_parameters": ("llama", {"rope_parameters": LINEAR}),
    "sliding_window": ("gemma3_text", {"sliding_window": 4}),
    "soft cap": ("gemma3_text", {"final_logit_softcapping": 0.2}),
    "attention scale": ("gemma3_text", {"query_pre_attn_scalar": 16}),
    "norm": ("llama", {"rms_norm_eps": 0.1}),
}


@pytest.mark.parametrize("way", ["kl", "ntp", "replace", "adapter"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_model_of_equal_weights_and_another_configuration_is_refused(what, way, pool, tmp_path):
    """LLaMA-Factory#8664: such a model passed for the base, 0.9 nats from it."""
    architecture, changes = OTHERS[what]
    other = make_model(architecture, **changes)
    assert model_fingerprint(other) == model_fingerprint(make_model(architecture))
    replay = ReplayConfig(replay_objective="kl" if way == "adapter" else way)
    adapter = LORA if way == "adapter" else None
    with pytest.raises(ValueError, match=r"^replay_dataset: the rows in .* are off by .* nats per token") as error:
        trainer_of(other, f"{pool}/{architecture}-float32", tmp_path, replay, adapter)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ["float32", "bf16", "bfloat16", "adapter"])
@pytest.mark.parametrize("drawn", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rounding_is_not_another_model(architecture, drawn, way, pool, tmp_path):
    model = make_model(architecture)
    if drawn == "bfloat16":  # these weights have no more to say in float32
        model = model.to(torch.bfloat16).float()
    if way == "bfloat16":
        model = model.to(torch.bfloat16)
    trainer_of(
        model, f"{pool}/{architecture}-{drawn}", tmp_path, None, LORA if way == "adapter" else None, bf16=way == "bf16"
    )


def test_what_is_allowed_is_said(pool, tmp_path, caplog):
    trainer_of(
        make_model(rope_parameters=LINEAR),
        f"{pool}/llama-float32",
        tmp_path,
        ReplayConfig(allow_off_policy_replay=True),
    )
    assert "off-policy replay: replay_dataset: the rows in" in caplog.text


def test_an_adapter_that_was_handed_over_is_switched_off_unless_it_belongs_to_the_base(pool, tmp_path):
    model = get_peft_model(make_model(), LORA)
    trainer_of(model, f"{pool}/llama-float32", tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    trainer_of(model, f"{pool}/llama-float32", tmp_path, ReplayConfig(replay_objective="ntp"))
    with pytest.raises(ValueError, match="are not this model's own"):
        trainer_of(model, f"{pool}/llama-float32", tmp_path, ReplayConfig(replay_reference="copy"))


def test_rows_without_log_probabilities_are_as_before(tmp_path):
    folder = sample_replay(make_model(), make_tokenizer(), tmp_path / "pool", num_rows=4, max_length=24)
    path = shard_path(folder, 0)
    parquet.write_table(parquet.read_table(path).drop_columns(["logprob"]), path)
    trainer_of(make_model(rope_parameters=LINEAR), str(folder), tmp_path / "out")


def test_own_rows_are_drawn_from_the_very_model_that_is_trained(tmp_path):
    """`model_init_kwargs` was not seen by the sampler: its rows were another model's, 0.9 nats away."""
    model, rows = save_model(tmp_path / "model"), tmp_path / "new.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(8, seed=1)))
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {model}\ndataset_name: {rows}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\n"
        "report_to: none\nreplay_dataset: self\nreplay_num_rows: 8\nmax_length: 64\nsave_strategy: 'no'\n"
        f"model_init_kwargs: {json.dumps({'rope_parameters': LINEAR})}\n"
    )
    assert main(["finetune", "--config", str(tmp_path / "sft.yaml")]) == 0
    folder = tmp_path / "out" / "replay"
    expected = sample_replay(
        make_model(rope_parameters=LINEAR), make_tokenizer(), tmp_path / "pool", num_rows=8, max_length=64, seed=42
    )
    ids, others = (read_shards(one, read_manifest(one), ("input_ids",))["input_ids"] for one in (folder, expected))
    assert [row.tolist() for row in ids] == [row.tolist() for row in others]
