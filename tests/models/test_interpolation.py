"""Weights between a base and a model finetuned from it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from conftest import make_model, moved_model
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

from retain import Interpolation
from retain.models.reference import probe

LINEAR = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LORA = {"r": 2, "lora_alpha": 6, **LINEAR}


def tuned_adapter(config: Any, base: Any = None) -> Any:
    """An adapter on the tiny Llama whose every own weight was moved."""
    torch.manual_seed(0)
    model = get_peft_model(make_model() if base is None else base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_the_ends_are_the_base_and_the_tuned_model_to_the_last_bit(architecture, dtype):
    """qwen3 ties its embeddings."""
    base, tuned = (make_model(architecture, seed).to(dtype) for seed in (0, 1))
    ends = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    between = Interpolation(base, tuned)
    for alpha, end in ((1.0, ends[1]), (0.3, None), (0.0, ends[0]), (0.7, None), (1.0, ends[1]), (0.0, ends[0])):
        between.set(alpha)
        for name, value in tuned.state_dict().items():
            mixed = (ends[0][name].double() * (1 - alpha) + ends[1][name].double() * alpha).to(dtype)
            assert torch.equal(value, mixed if end is None else end[name]) or (
                end is None and torch.allclose(value.double(), mixed.double(), rtol=0.01, atol=1e-6)
            )
    assert all(torch.equal(value, ends[0][name]) for name, value in base.state_dict().items())


def test_weights_are_rounded_as_they_will_be_saved():
    base, tuned = make_model(), moved_model()
    end = tuned.lm_head.weight.detach().clone()
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    Interpolation(base, tuned, torch.bfloat16).set(1.0)
    assert tuned.lm_head.weight.dtype == torch.float32
    assert torch.equal(tuned.lm_head.weight, end.bfloat16().float())


HEAD = {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_rslora=True, alpha_pattern={"q_proj": 9}, rank_pattern={"down_proj": 3}),
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
        LoraConfig(**LORA, **HEAD),
        IA3Config(**LINEAR, feedforward_modules=["down_proj"]),
        IA3Config(**LINEAR, feedforward_modules=["down_proj"], **HEAD),
    ],
    ids=["lora", "rslora", "embeddings", "lora and head", "ia3", "ia3 and head"],
)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_an_adapter_is_what_merged_weights_would_be(config, alpha):
    tuned = tuned_adapter(config)
    end, base = probe(tuned), make_model()
    merged = copy.deepcopy(tuned).merge_and_unload()
    between = Interpolation(base, tuned)
    between.set(alpha)
    Interpolation(base, merged).set(alpha)
    torch.testing.assert_close(probe(tuned), probe(merged), rtol=1e-4, atol=1e-4)
    if alpha != 0.4:
        assert torch.equal(probe(tuned), end if alpha else probe(base))
    else:
        assert (probe(tuned) - end).abs().max() > 0.01 < (probe(tuned) - probe(base)).abs().max()


@pytest.mark.parametrize("trained", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tying", [False, True])
def test_tied_embeddings_of_which_an_adapter_trains_either(trained, tying):
    config = LoraConfig(**LORA, modules_to_save=trained, ensure_weight_tying=tying)
    tuned, base = tuned_adapter(config, make_model("qwen3")), make_model("qwen3")
    end, between = probe(tuned), Interpolation(base, tuned)
    between.set(0.0)
    assert torch.equal(probe(tuned), probe(base))
    assert not torch.equal(probe(base), end)
    between.set(1.0)
    assert torch.equal(probe(tuned), end)


def test_a_head_that_was_tied_in_the_base_alone():
    """As after merging a LoRA of the head."""
    base, tuned = make_model("qwen3"), make_model("qwen3")
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach() * 2)
    end, between = probe(tuned), Interpolation(base, tuned)
    for alpha, factor in ((0.0, 1.0), (0.5, 1.5), (1.0, 2.0)):
        between.set(alpha)
        torch.testing.assert_close(tuned.lm_head.weight, factor * base.lm_head.weight)
        assert torch.equal(tuned.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(probe(tuned), end)


def refusal(base: Any, tuned: Any) -> str:
    with pytest.raises(ValueError, match="^(base|model): ") as caught:
        Interpolation(base, tuned)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(**LORA, use_dora=True), "lora_magnitude_vector"),
        (LoraConfig(**LORA, trainable_token_indices=[5]), "trainable_tokens"),
        (AdaLoraConfig(init_r=2, target_r=1, total_step=9, tinit=1, tfinal=1, **LINEAR), "lora_E"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "prompt_encoder"),
    ],
)
def test_an_adapter_that_is_not_linear_is_refused(config, named):
    assert re.search(f"its adapter has .*{named}.*not a plain LoRA", refusal(make_model(), tuned_adapter(config)))


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_an_adapter_that_rewrites_its_base_is_refused(changes):
    base = make_model(attention_bias="bias" in changes)
    tuned = tuned_adapter(LoraConfig(**LORA, **changes), copy.deepcopy(base))
    assert "its adapter rewrites it" in refusal(base, tuned)


def test_models_that_have_nothing_between_them_are_refused():
    base = make_model()
    message = refusal(base, make_model(vocab_size=321))
    assert "lm_head.weight is [320, 32] in it and [321, 32] in the model" in message
    assert "with the same vocabulary" in message
    assert "model.layers.2.input_layernorm.weight is missing in it and [32]" in refusal(
        base, make_model(num_hidden_layers=3)
    )
    assert "their config.json differ" in refusal(base, make_model(rms_norm_eps=0.5))
    for kind in (torch.uint8, torch.float8_e4m3fn):  # whose values mean nothing without their scales
        quantised = make_model()
        quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(320, 32).to(kind), requires_grad=False)
        assert f"model: lm_head.weight is quantised ({kind})" in refusal(base, quantised)
