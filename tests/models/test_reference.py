"""The frozen base is the base: shown for adapters and copies, refused where it is not (pitfalls 1, 3, 4)."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from retain.models.reference import Reference, check_same_model, evaluation_mode, probe, probe_tokens

IDS = torch.arange(5, 25).reshape(2, 10)
QUIET = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning:peft"),
]
pytestmark = QUIET


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def move(model: torch.nn.Module) -> None:
    """As training would: every trainable weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits_of(reference: Reference, model: torch.nn.Module) -> torch.Tensor:
    with reference.base(model) as base:
        return base(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": r".*(q_proj|c_attn|lm_head)", "lora_dropout": 0.5},
        {"init_lora_weights": "gaussian", "use_rslora": True},
    ],
    ids=["lora", "dora", "head saved", "head adapted", "rslora"],
)
def test_an_adapter_switched_off_is_the_base_to_the_bit(architecture, settings):
    base = make_model(architecture)
    base_probe, expected = probe(base), base(input_ids=IDS).logits
    model = get_peft_model(base, lora(**settings)).train()
    reference = Reference()
    reference.prove(model, base_probe)
    move(model)
    assert torch.equal(logits_of(reference, model), expected)
    assert not torch.equal(model.eval()(input_ids=IDS).logits, expected)
    reference.prove(model, base_probe)


def test_another_kind_of_adapter_switched_off_is_the_base_too():
    base = make_model()
    base_probe = probe(base)
    settings = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = get_peft_model(base, IA3Config(task_type="CAUSAL_LM", **settings))
    move(model)
    Reference().prove(model, base_probe)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_rewrites_the_base_is_refused(init):
    base = make_model()
    base_probe, before = probe(base), Reference.copy_of(base)
    model = get_peft_model(base, lora(init_lora_weights=init, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=f"replay_reference: 'adapter' is not the base .* init_lora_weights='{init}' "):
        Reference().prove(model, base_probe)
    with pytest.raises(ValueError, match="use replay_reference copy, or an adapter that leaves the base as it is"):
        Reference().prove(model, base_probe)
    before.prove(model, base_probe)  # the remedy it names


def pretrained() -> PeftModel:
    return get_peft_model(make_model(), lora(init_lora_weights=False))


def test_an_adapter_that_was_trained_before_is_refused_and_a_copy_of_it_accepted():
    model = pretrained()
    base_probe = probe(model)  # what the model said when it was handed over
    with pytest.raises(ValueError, match="the adapter already held something other than the identity"):
        Reference().prove(model, base_probe)
    reference = Reference.copy_of(model)
    expected = model.eval()(input_ids=IDS).logits
    reference.prove(model, base_probe)
    move(model)
    reference.prove(model, base_probe)
    assert torch.equal(logits_of(reference, model), expected)


def test_an_adapter_that_was_merged_before_is_refused():
    model = pretrained()
    model.merge_adapter()
    with pytest.raises(ValueError, match="the adapter already held something other than the identity"):
        Reference().prove(model, probe(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_stays_while_the_model_moves(architecture):
    model = make_model(architecture)
    base_probe, expected = probe(model), model(input_ids=IDS).logits
    reference = Reference.copy_of(model.train())
    move(model)
    assert torch.equal(logits_of(reference, model), expected)
    assert not torch.equal(model.eval()(input_ids=IDS).logits, expected)
    assert not any(parameter.requires_grad for parameter in reference.ref_model.parameters())
    assert not any(module.training for module in reference.ref_model.modules())
    reference.prove(model, base_probe)


def test_a_copy_shares_no_memory_with_the_model():
    model = make_model("qwen3")  # with a tied head, which stays tied in the copy
    reference = Reference.copy_of(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in reference.ref_model.parameters())
    copied = reference.ref_model
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight


def test_a_copy_of_another_model_is_refused():
    with pytest.raises(ValueError, match="replay_reference: 'copy' is not the base"):
        Reference.copy_of(make_model(seed=1)).prove(make_model(), probe(make_model()))


def test_one_changed_weight_matrix_is_seen():
    model = make_model()
    base_probe = probe(model)
    model.model.layers[1].self_attn.v_proj.weight.data *= 1.05
    with pytest.raises(ValueError, match="is not the base"):
        Reference.copy_of(model).prove(model, base_probe)


@pytest.mark.parametrize("unused", [-torch.inf, torch.nan])
def test_vocabulary_at_minus_infinity_hides_nothing_and_nan_proves_nothing(unused):
    model = make_model()
    mask = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([5, 9]), unused)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + mask)
    reference, base_probe = Reference.copy_of(model), probe(model)
    if unused == -torch.inf:
        reference.prove(model, base_probe)
        with torch.no_grad():
            reference.ref_model.model.norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="is not the base"):
        reference.prove(model, base_probe)


def test_a_vocabulary_that_grew_is_refused():
    model = make_model()
    base_probe = probe(model)
    model.resize_token_embeddings(324, mean_resizing=False)
    with pytest.raises(ValueError, match="the trainer changed the vocabulary from 320 to 324 tokens"):
        check_same_model(model, base_probe)


def test_a_prompt_that_was_handed_over_is_named():
    """Its virtual tokens were taken for a vocabulary that grew, from 320 to 320."""
    model = get_peft_model(make_model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="'adapter' does not predict what the base does; give the trainer the base"):
        Reference().prove(model, probe(model))


def test_dropout_is_off_in_the_reference_and_on_again_afterwards():
    base = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = base(input_ids=IDS).logits
    model = get_peft_model(base, lora(lora_dropout=0.5)).train()
    frozen = model.base_model.model.transformer.h[0]
    frozen.eval()  # a module that the user keeps in evaluation mode
    modes = [module.training for module in model.modules()]
    assert torch.equal(logits_of(Reference(), model), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.training
    assert not frozen.training
    assert not torch.equal(model(input_ids=IDS).logits, expected)


def test_an_error_inside_leaves_modes_and_adapter_as_they_were():
    model = pretrained().train()
    expected = model.eval()(input_ids=IDS).logits
    model.train()
    with pytest.raises(RuntimeError, match="out of memory"), Reference().base(model):
        raise RuntimeError("out of memory")
    assert model.training
    assert torch.equal(model.eval()(input_ids=IDS).logits, expected)


def test_the_reference_carries_no_gradient():
    for reference, model in ((Reference(), pretrained()), (Reference.copy_of(make_model()), make_model())):
        assert not logits_of(reference, model).requires_grad
        assert model(input_ids=IDS).logits.requires_grad


def test_the_probe_is_the_same_every_time_and_draws_no_random_number():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = make_model("gpt2", resid_pdrop=0.5).train()
    torch.manual_seed(5)
    assert torch.equal(probe(model), probe(model))
    assert torch.equal(torch.rand(3), expected)
    assert probe_tokens(320).max() < 320
    assert model.training


def test_evaluation_mode_nests():
    model = make_model().train()
    with evaluation_mode(model):
        with evaluation_mode(model):
            assert not model.training
        assert not model.training
    assert model.training
