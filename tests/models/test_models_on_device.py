"""Models on a device that is not the CPU: loading, fingerprint, reference, interpolation, Fisher information."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_model, moved_model, save_model
from peft import LoraConfig, get_peft_model
from simulated_device import DEVICE, assert_as_on_cpu, on_device
from training_runs import LORA, rows_of

from retain.models.base_predictions import HiddenStates, MeasuredBase
from retain.models.description import default_device, model_fingerprint
from retain.models.fisher import load_fisher, save_fisher
from retain.models.head import find_head_form, head_input
from retain.models.interpolation import Interpolation
from retain.models.loading import load_model
from retain.models.reference import Reference, check_same_model, probe, sees_ahead
from retain.replay.stored_fisher import fisher_of
from retain.training.joint_forward import JointForward

IDS, MASK = torch.arange(5, 21).reshape(2, 8), torch.tensor([[1] * 8, [1] * 6 + [0] * 2])


def tuned_adapter(device: str) -> Any:
    torch.manual_seed(0)
    adapter = get_peft_model(make_model().to(device), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02)
    return adapter


@on_device
def test_it_is_chosen_and_a_model_loaded_there_is_the_same_model(tmp_path):
    assert default_device() == DEVICE
    loaded = load_model(str(save_model(tmp_path / "model")), device=default_device())
    assert loaded.device.type == DEVICE
    assert model_fingerprint(loaded) == model_fingerprint(make_model())
    assert not sees_ahead(loaded)


@pytest.mark.parametrize("kind", ["copy", "adapter"])
@on_device
def test_a_reference_is_proven_and_moves_along(kind, tmp_path):
    model = tuned_adapter(DEVICE) if kind == "adapter" else make_model()
    reference = Reference() if kind == "adapter" else Reference.copy_of(model)
    base_probe = probe(make_model())
    model.to(DEVICE)
    reference.to(torch.device(DEVICE))
    reference.prove(model, base_probe)
    if kind == "copy":
        check_same_model(model, base_probe)
    for step in range(2):
        reference.prove_again(model, step)
    with reference.base(model) as base:
        assert base(input_ids=IDS.to(DEVICE)).logits.device.type == DEVICE


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
@on_device
def test_what_a_base_said_is_kept_on_the_cpu_and_said_on_the_device(architecture, tmp_path):
    batch = {"input_ids": IDS, "attention_mask": MASK}

    def work(device: str) -> list[torch.Tensor]:
        model = make_model(architecture).to(device)
        form = find_head_form(model)
        assert form is not None
        kept = HiddenStates.of(model, form.head(model.get_output_embeddings()), [batch])
        assert {one.device.type for one in kept.states.values()} == {"cpu"}
        here = {name: value.to(device) for name, value in batch.items()}
        measured = MeasuredBase(model)
        with torch.no_grad():
            said = [kept(**here).logits, *(measured.logits(**here) for _ in range(2))]
        measured.check_unchanged()
        assert {one.device.type for one in said} == {device}
        return [one[MASK.bool().to(device)] for one in said]

    assert_as_on_cpu(work, tolerance=1e-4)


@on_device
def test_what_enters_a_head_has_the_dtype_of_the_devices_autocast(tmp_path):
    hidden = torch.ones(2, 3, device=DEVICE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head_input(hidden).dtype == torch.float32
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert head_input(hidden).dtype == torch.bfloat16


@on_device
def test_rows_that_join_a_forward_pass_are_those_that_go_alone(tmp_path):
    model = make_model().to(DEVICE)
    assert JointForward(model.base_model)._is_exact(model)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
@on_device
def test_interpolation(kind, tmp_path):
    def work(device: str) -> list[torch.Tensor]:
        tuned = tuned_adapter(device) if kind == "adapter" else moved_model().to(device)
        between, found = Interpolation(make_model().to(device), tuned), []
        for alpha in (0.5, 0.0, 1.0):
            between.set(alpha)
            found.append(probe(between.model))
        between.make_whole() if kind == "adapter" else None
        return [*found, probe(between.model)]

    assert_as_on_cpu(work, tolerance=2e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])  # a head of its own, and a tied one
@on_device
def test_fisher_information_is_measured_kept_and_loaded(architecture, tmp_path):
    model, apart = make_model(architecture).to(DEVICE), make_model(architecture)
    rows = rows_of(model, 6)
    fisher, num_tokens = fisher_of(model, rows, dict(model.named_parameters()), seed=3)
    assert {one.device.type for found in fisher.values() for one in found.tensors()} == {DEVICE}
    save_fisher(tmp_path / "fisher.safetensors", fisher, num_tokens)
    for device in ("cpu", model.device):
        loaded, same_number = load_fisher(tmp_path / "fisher.safetensors", device)
        assert same_number == num_tokens
        for name, found in loaded.items():
            for one, other in zip(found.tensors(), fisher[name].tensors(), strict=True):
                assert one.device == torch.device(device)
                assert torch.equal(one.cpu(), other.cpu())
    of_cpu = fisher_of(apart, rows, dict(apart.named_parameters()), seed=3)[0]
    for name, found in fisher.items():
        torch.testing.assert_close(found.diagonal().cpu(), of_cpu[name].diagonal(), rtol=1e-2, atol=1e-4)
