"""The simulated device itself: models on it give what they give on the CPU, and it refuses what a GPU refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from peft import LoraConfig, get_peft_model
from simulated_device import DEVICE, SETTINGS, on_device

IDS = torch.arange(5, 29).reshape(2, 12)
MASK = torch.ones_like(IDS).index_fill_(1, torch.tensor([11]), 0)


def step(model: Any, device: str) -> list[torch.Tensor]:
    """Loss, logits, weights after a step of AdamW, and tokens written greedily."""
    model = model.to(device)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-3, eps=1e-3)
    ids, mask = IDS.to(device), MASK.to(device)
    found = model(input_ids=ids, attention_mask=mask, labels=ids)
    found.loss.backward()
    optimizer.step()
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert {value.device.type for value in (found.logits, written, *model.state_dict().values())} == {device}
    return [value.detach().cpu() for value in (found.loss, found.logits, written, *model.parameters())]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "lora"])
@on_device
def test_a_step_on_the_device_is_one_on_the_cpu(architecture, tmp_path):
    if architecture == "lora":
        model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        model = make_model(architecture)
    for one, other in zip(step(copy.deepcopy(model), "cpu"), step(model, DEVICE), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


TABLE = torch.ones(4, 5)


MIXED = [
    lambda here: here * TABLE,
    lambda here: TABLE + here[0, 0],
    lambda here: here.masked_fill(TABLE > 0, 0.0),
    lambda here: here.masked_fill_(TABLE > 0, 0.0),
    lambda here: here[:, :3].mul_(TABLE[:, :3]),
    lambda here: torch.where(TABLE > 0, here, here),
    lambda here: torch.cat([here, TABLE]),
    lambda here: here.gather(1, torch.zeros(4, 1, dtype=torch.long)),
    lambda here: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), here),
    lambda here: torch.nn.functional.cross_entropy(here, torch.zeros(4, dtype=torch.long)),
    lambda here: here @ TABLE.T,
    lambda here: torch.multinomial(here, 1, generator=torch.Generator()),
    lambda here: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    lambda here: torch.rand(3, generator=torch.Generator(DEVICE)),
    lambda here: here.cpu().normal_(generator=torch.Generator(DEVICE)),
]


@on_device
def test_tensors_and_generators_of_two_devices_do_not_mix(tmp_path):
    for mix in MIXED:
        with pytest.raises(
            RuntimeError, match="^(aten.*)?Expected (all tensors to be on the same device|a '.*' device type)"
        ):
            mix(torch.ones(4, 5, device=DEVICE))


@on_device
def test_what_a_gpu_takes_from_the_cpu_is_taken(tmp_path):
    here = torch.arange(6.0, device=DEVICE).reshape(2, 3)
    assert (here * torch.tensor(2.0))[torch.tensor([1])].tolist() == [[6.0, 8.0, 10.0]]
    drawn = [torch.rand(3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1]


@on_device
def test_views_and_copies_share_memory_or_do_not(tmp_path):
    here = torch.zeros(2, 3, device=DEVICE)
    row, apart = here.T[1], copy.deepcopy(here)
    row += 1
    assert here.cpu().tolist() == [[0.0, 1.0, 0.0]] * 2
    assert not apart.any()
    torch.save(here, tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt").device.type == DEVICE


IN_FLOAT64 = [
    lambda here: here.double(),
    lambda here: here.sum(dtype=torch.float64),
    lambda here: here.cumsum(-1, dtype=torch.float64),
    lambda here: torch.zeros(2, dtype=torch.float64, device=DEVICE),
    lambda here: torch.zeros(2, dtype=torch.float64).to(DEVICE),
]


@on_device
def test_float64_is_refused_where_the_device_has_none(tmp_path):
    here = torch.ones(4, device=DEVICE)
    assert {make(here).dtype for make in IN_FLOAT64} == {torch.float64}
    SETTINGS.has_float64 = False
    for make in IN_FLOAT64:
        with pytest.raises(TypeError, match="float64"):
            make(here)


@on_device
def test_autocast_is_the_devices_own(tmp_path):
    left = torch.ones(2, 2, device=DEVICE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left @ left).dtype == torch.float32
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert (left @ left).dtype == torch.bfloat16
