"""The anchor's step against Adam and against the penalty it solves for; runs with it, and their resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from training_runs import LORA, TOKENS, config, difference, logged, rows_of, train, weights
from transformers import AutoConfig, AutoModelForCausalLM

from retain import ReplayConfig, ReplaySFTTrainer, ReplayTrainer
from retain.losses import kl_divergence
from retain.models.fisher import Curvature, measure_fisher
from retain.replay.dataset import ReplayDataset
from retain.training.anchor import ANCHOR_FILE, check_anchor
from retain.training.anchored_adamw import AnchoredAdamW, AnchoredLoRA, AnchoredWeight

ALONE = {"replay_coef": 0.0, "anchor_coef": 10.0}


def make_experts() -> Any:
    """A tiny mixture of experts."""
    settings = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=320, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=3, eos_token_id=2, pad_token_id=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings).eval()


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def curvature(outputs: int = 6, inputs: int = 4) -> Curvature:
    generator = torch.Generator().manual_seed(7)
    sides = [torch.rand(size, generator=generator) for size in (outputs, inputs)]
    return Curvature(None, orthogonal(inputs, 1), [(sides[0], sides[1])])


def exact(of: Curvature) -> torch.Tensor:
    """The Fisher information as one matrix over the flattened weight."""
    ((outputs, inputs),) = of.parts
    assert of.right is not None
    assert inputs is not None
    return torch.kron(torch.diag(outputs), of.right @ torch.diag(inputs) @ of.right.T)


def penalty_of(move: torch.Tensor, of: Curvature) -> torch.Tensor:
    return move.flatten() @ exact(of) @ move.flatten() / 2


def test_without_a_coefficient_and_a_rotation_it_is_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    flat = Curvature(None, None, [(torch.ones(3), torch.ones(2))])
    optimizers = (
        AnchoredAdamW([ours], [AnchoredWeight(ours, flat)], lr=0.1, coef=0.0),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0),
    )
    for _ in range(5):
        gradient = torch.randn(3, 2)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_ratio_is_a_higher_rate_that_schedulers_do_not_see() -> None:
    ends = []
    for rate, ratio in ((0.02, 1.0), (0.002, 10.0)):
        weight = nn.Parameter(torch.ones(6, 4))
        optimizer = AnchoredAdamW([weight], [AnchoredWeight(weight, curvature())], lr=rate, lr_ratio=ratio, coef=3.0)
        for seed in range(3):
            weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        ends.append(weight.detach())
        assert optimizer.param_groups[0]["lr"] == rate
    assert torch.allclose(*ends, atol=1e-7)


def test_its_penalty_and_pull_are_those_of_the_whole_matrix_and_its_gradient() -> None:
    of, weight = curvature(), nn.Parameter(torch.zeros(6, 4))
    anchored = AnchoredWeight(weight, of)
    with torch.no_grad():
        weight.normal_()
    by_hand = penalty_of(weight, of)
    (gradient,) = torch.autograd.grad(by_hand, weight)
    assert anchored.penalty().item() == pytest.approx(by_hand.item())
    (offset,) = anchored.read([{}])
    assert torch.allclose(of.rotate_back(of.diagonal() * offset), gradient, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_eigenvectors_of_half_precision_turn_nothing_that_does_not_move(lora: bool) -> None:
    """bfloat16 rounds them by 0.4%, which a hundred rotations there and back would multiply."""
    rounded = replace(of := curvature(), right=of.right.bfloat16())  # type: ignore[union-attr]
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(6, 3))
    anchored = (
        AnchoredLoRA(a, b, 1.0, rounded) if lora else AnchoredWeight(a := nn.Parameter(torch.randn(6, 4)), rounded)
    )
    optimizer = AnchoredAdamW(anchored.parameters, [anchored], lr=0.0)
    before = [parameter.detach().clone() for parameter in anchored.parameters]
    for _ in range(100):
        for parameter in anchored.parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for was, parameter in zip(before, anchored.parameters, strict=True):
        assert torch.equal(was, parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_coordinates_stay_those_of_the_parameters(dtype: torch.dtype) -> None:
    """They are kept between steps, unless the parameters' rounding would lose part of a step."""
    of = curvature()
    a, b = nn.Parameter(torch.randn(3, 4, dtype=dtype)), nn.Parameter(torch.randn(6, 3, dtype=dtype))
    anchored = AnchoredLoRA(a, b, 1.0, of)
    optimizer = AnchoredAdamW(anchored.parameters, [anchored], lr=1e-4)
    for _ in range(100):
        for parameter in anchored.parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    states = [optimizer.state[parameter] for parameter in anchored.parameters]
    for known, actual in zip(anchored.read(states), anchored.read([{}, {}]), strict=True):
        assert torch.allclose(known, actual, atol=1e-5)


def test_lora_is_held_as_the_whole_weight_would_be_at_the_same_move() -> None:
    of, scale = curvature(), 2.0
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(6, 3))
    anchored = AnchoredLoRA(a, b, scale, of)
    by_hand = penalty_of(scale * b @ a, of)
    gradients = torch.autograd.grad(by_hand, [a, b])
    assert anchored.penalty().item() == pytest.approx(by_hand.item(), rel=1e-5)
    coordinates = anchored.read([{}, {}])
    for at, gradient in enumerate(gradients):
        pull = anchored.pull(at, coordinates)[0]
        back = pull @ of.right.T if at == 0 else pull  # type: ignore[union-attr]
        assert torch.allclose(back, gradient, rtol=1e-4, atol=1e-5)


def test_the_stiffness_of_lora_bounds_what_its_penalty_does() -> None:
    """diag(stiffness) - F is positive for each factor, so no coefficient makes a step overshoot."""
    of = curvature()
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(6, 3))
    anchored = AnchoredLoRA(a, b, 1.0, of)
    coordinates = anchored.read([{}, {}])
    for at, size in enumerate((3 * 4, 6 * 3)):
        stiffness = anchored.pull(at, coordinates)[1]
        columns = []
        for unit in torch.eye(size):
            probe = list(coordinates)
            probe[at] = unit.reshape(coordinates[at].shape)
            columns.append(anchored.pull(at, probe)[0].flatten())
        slack = torch.diag(stiffness.flatten()) - torch.stack(columns, 1)
        assert torch.linalg.eigvalsh((slack + slack.T) / 2).min() > -1e-5


@pytest.mark.parametrize("coef", [1.0, 1e6])
def test_a_step_ends_where_the_penalty_in_adams_metric_is_least(coef: float) -> None:
    """x + = argmin of sqrt(v) (x - x_adam)^2 / 2 lr + coef * penalty, in the curvature's coordinates."""
    of, weight = curvature(), nn.Parameter(torch.zeros(6, 4))
    anchored = AnchoredWeight(weight, of)
    with torch.no_grad():
        weight.normal_()
    (before,), gradient = [one.clone() for one in anchored.read([{}])], torch.randn(6, 4)
    weight.grad = gradient.clone()
    AnchoredAdamW([weight], [anchored], lr=0.1, coef=coef).step()
    metric = of.rotate(gradient).abs()  # sqrt of the second moment after one step
    adam = before - 0.1 * of.rotate(gradient).sign()
    wanted = metric * adam / (metric + 0.1 * coef * of.diagonal())
    (after,) = AnchoredWeight(weight, of).read([{"offset": of.rotate(weight.detach())}])
    assert torch.allclose(after, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", ["in place", "through .data", "at once"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (5, 3)])
def test_weights_that_are_set_between_two_steps_stay_set(change: str, lora: bool, shape: tuple[int, int]) -> None:
    """As by weight averaging. The next step had put a whole weight back, and held LoRA's at the old place."""
    of, (outputs, inputs) = curvature(*shape), shape
    a, b = nn.Parameter(torch.randn(3, inputs)), nn.Parameter(torch.randn(outputs, 3))
    anchored = (
        AnchoredLoRA(a, b, 1.0, of) if lora else AnchoredWeight(a := nn.Parameter(torch.randn(outputs, inputs)), of)
    )
    parameters = anchored.parameters
    optimizer = AnchoredAdamW(parameters, [anchored], lr=1e-3, coef=3.0)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if step == 2:
            for parameter in parameters:
                if change == "in place":
                    parameter.detach().mul_(0.5)
                elif change == "through .data":
                    parameter.data.copy_(parameter * 0.5)
                else:
                    parameter.data = parameter.data * 0.5
            was = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
    for before, parameter in zip(was, parameters, strict=True):
        assert (parameter - before).abs().max() < 0.03  # a step, and no more
    known = anchored.read([optimizer.state[parameter] for parameter in parameters])
    for ours, actual in zip(known, anchored.read([{} for _ in known]), strict=True):
        assert torch.allclose(ours, actual, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_come_back_between_two_steps_leave_the_coordinates(dtype: torch.dtype) -> None:
    """An average that is swapped in to evaluate and out again: half precision would lose its small steps."""
    weight = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    optimizer = AnchoredAdamW([weight], [AnchoredWeight(weight, curvature())], lr=1e-4)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        offset = optimizer.state[weight]["offset"]
        kept = weight.detach().clone()
        weight.data.zero_()
        weight.data.copy_(kept)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["offset"] is offset


def test_its_state_keeps_its_bits_beside_weights_of_half_precision() -> None:
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    anchored = [AnchoredWeight(weight, curvature())]
    optimizer = AnchoredAdamW([weight], anchored, lr=0.1)
    for step in range(3):
        weight.grad = torch.full_like(weight, float(step + 1))
        optimizer.step()
    resumed = AnchoredAdamW([weight], anchored, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state[weight].items():
        assert torch.equal(torch.as_tensor(resumed.state[weight][name]), torch.as_tensor(value)), name
    assert resumed.state[weight]["offset"].dtype == torch.float32


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("side", ["left", "right", "none", "scalar"])
def test_a_weight_that_is_moved_in_pieces_ends_where_it_does_whole(
    side: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, shape = curvature().truncated(rank), (6, 4)
    if side == "left":
        ((outputs, inputs),), shape = of.parts, (4, 6)
        assert inputs is not None
        of = Curvature(of.right, None, [(inputs, outputs)])
    elif side != "right":
        shape = (6, 4) if side == "none" else ()
        of = Curvature(None, None, [(torch.rand(shape, generator=torch.Generator().manual_seed(1)), None)])
    ends = []
    for piece in (2**18, 5):
        monkeypatch.setattr("retain.training.anchored_adamw.PIECE_ON_CPU", piece)
        weight = nn.Parameter(torch.ones(shape))
        optimizer = AnchoredAdamW([weight], [AnchoredWeight(weight, of)], lr=0.1, coef=3.0, weight_decay=0.1)
        for seed in range(3):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        ends.append(weight.detach())
    assert torch.allclose(*ends, atol=1e-6)
    assert not torch.allclose(ends[0], torch.ones(shape))


def test_outside_its_eigenvectors_a_truncated_anchor_without_a_coefficient_is_adamw() -> None:
    """Along the eigenvectors Adam has moments of its own, so the rest of the step is that of what lies outside."""
    of = curvature().truncated(2)
    weight, other = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    optimizer = AnchoredAdamW([weight], [AnchoredWeight(weight, of)], lr=0.1, coef=0.0)
    adam, outside = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0), torch.eye(4) - of.right @ of.right.T
    for _ in range(3):
        gradient = torch.randn(6, 4)
        weight.grad, other.grad = gradient.clone(), gradient @ outside
        optimizer.step()
        adam.step()
    assert torch.allclose((weight - 1) @ outside, (other - 1) @ outside, atol=1e-5)
    assert (weight - 1).norm() > ((weight - 1) @ outside).norm(), "it moves along the eigenvectors, too"


# In a trainer


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_it_holds_the_model_without_any_replay_row(
    tmp_path: Path, replay: ReplayDataset, lora: bool, rank: int | None
) -> None:
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
    held = {}
    for coef in (1.0, 1e4):
        settings = ReplayConfig(replay_coef=0.0, anchor_coef=coef, anchor_rank=rank)
        trainer = train(tmp_path / f"{coef:g}", replay, replay_config=settings, **adapter)
        held[coef] = logged(trainer, "replay/anchor")[-1]
        assert len(logged(trainer, "replay/kl_fixed")) == len(logged(trainer, "replay/anchor"))
        assert trainer.protection()[0].startswith(f"anchor: coefficient {coef:g}, inside AdamW, at 10 times the rate")
    assert held[1e4] < 0.2 * held[1.0]


@pytest.mark.parametrize("lora", [False, True])
def test_micro_batches_change_nothing(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
    settings = ReplayConfig(replay_coef=1.0, per_device_replay_batch_size=2, anchor_coef=10.0)
    whole = train(tmp_path / "whole", replay, replay_config=settings, **adapter)
    one = ReplayConfig(replay_coef=1.0, per_device_replay_batch_size=1, anchor_coef=10.0)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    split = train(tmp_path / "split", replay, replay_config=one, changes=changes, **adapter)
    assert difference(weights(whole.model), weights(split.model)) < 2e-4


@pytest.mark.parametrize("lora", [False, True])
def test_under_autocast_a_run_is_the_one_of_float32_but_for_rounding(
    tmp_path: Path, replay: ReplayDataset, lora: bool
) -> None:
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
    settings = ReplayConfig(replay_coef=1.0, per_device_replay_batch_size=2, anchor_coef=10.0, replay_start=0.5)
    whole, half = (
        train(tmp_path / str(bf16), replay, replay_config=settings, changes={"bf16": bf16}, **adapter)
        for bf16 in (False, True)
    )
    for name in ("replay/anchor", "replay/kl_fixed"):
        assert logged(half, name) == pytest.approx(logged(whole, name), rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in weights(half.model).values())


def test_a_mixture_of_experts_is_held(tmp_path: Path) -> None:
    """Experts that are one tensor have the diagonal of F; LoRA of them is refused."""
    held, rows = {}, rows_of(make_experts())
    for coef in (1.0, 1e4):
        settings = ReplayConfig(replay_coef=0.0, anchor_coef=coef)
        trainer = train(tmp_path / f"{coef:g}", rows, make_experts(), replay_config=settings)
        held[coef] = logged(trainer, "replay/anchor")[-1]
    assert held[1e4] < 0.2 * held[1.0]
    adapter = LoraConfig(**LORA | {"target_modules": ["q_proj"]}, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="^anchor_coef: the adapter at '.*experts' is not plain LoRA"):
        train(tmp_path, rows, make_experts(), replay_config=settings, peft_config=adapter)


@pytest.mark.parametrize(("lora", "rank"), [(True, None), (True, 4), (False, 4)])
def test_a_resumed_run_ends_as_an_unbroken_one(
    tmp_path: Path, replay: ReplayDataset, lora: bool, rank: int | None
) -> None:
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
    settings = ReplayConfig(replay_coef=1.0, anchor_coef=10.0, anchor_rank=rank, max_ref_kl=1e-3)
    run: dict[str, Any] = {"changes": {"save_strategy": "steps", "save_steps": 2}, "replay_config": settings}
    unbroken, resumed = (
        train(tmp_path, replay, resume=checkpoint, **adapter, **run)
        for checkpoint in (None, str(tmp_path / "checkpoint-2"))
    )
    assert difference(weights(unbroken.model), weights(resumed.model)) == 0.0


@pytest.mark.parametrize("lora", [False, True])
def test_a_second_training_starts_from_weights_that_were_changed_since(
    tmp_path: Path, replay: ReplayDataset, lora: bool
) -> None:
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA)} if lora else {}
    trainer = train(tmp_path, replay, replay_config=ReplayConfig(**ALONE), **adapter)
    with torch.no_grad():
        for anchored in trainer.replay.anchor.anchored:
            for parameter in anchored.parameters:
                parameter.mul_(0.9)
    changed = {name: weight.clone() for name, weight in weights(trainer.model).items()}
    for group in trainer.optimizer.param_groups:
        group["lr_ratio"] = 0.0  # steps of no length
    trainer.train()
    assert difference(weights(trainer.model), changed) < 1e-5
    for anchored in trainer.replay.anchor.anchored:
        known = anchored.read([trainer.optimizer.state[parameter] for parameter in anchored.parameters])
        for ours, actual in zip(known, anchored.read([{} for _ in known]), strict=True):
            assert torch.allclose(ours, actual, atol=1e-5)


@pytest.mark.parametrize("began", [0.0, 10.0])
def test_a_run_is_resumed_with_the_anchor_it_began_with_or_without(
    tmp_path: Path, replay: ReplayDataset, began: float
) -> None:
    """The optimizer's state is another."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings = [ReplayConfig(replay_coef=1.0, anchor_coef=coef) for coef in (began, 10.0 - began)]
    train(tmp_path, replay, replay_config=settings[0], changes=saving)
    resume: dict[str, Any] = {"changes": saving, "resume": str(tmp_path / "checkpoint-1")}
    with pytest.raises(ValueError, match=f"^anchor_coef: the run in .* started with{'' if began else 'out'} an anchor"):
        train(tmp_path / "other", replay, replay_config=settings[1], **resume)


def test_a_run_that_moved_house_takes_its_anchor_along(tmp_path: Path, replay: ReplayDataset) -> None:
    settings = ReplayConfig(replay_coef=1.0, anchor_coef=10.0)
    saving = {"save_strategy": "steps", "save_steps": 2}
    began = train(tmp_path / "began", replay, replay_config=settings, changes=saving)
    resume = str(tmp_path / "began" / "checkpoint-2")
    moved = train(tmp_path / "moved", replay, replay_config=settings, changes=saving, resume=resume)
    assert difference(weights(began.model), weights(moved.model)) == 0.0
    assert (tmp_path / "moved" / ANCHOR_FILE).read_bytes() == (tmp_path / "began" / ANCHOR_FILE).read_bytes()


@pytest.mark.parametrize("reference", ["auto", "copy"])
@pytest.mark.parametrize("init", ["pissa", True])
def test_an_adapter_whose_zero_is_not_the_base_is_refused(
    tmp_path: Path, replay: ReplayDataset, init: str | bool, reference: str
) -> None:
    """PiSSA rewrites the base; another adapter was trained before. The anchor would pull both to their zero."""
    model = get_peft_model(make_model(), LoraConfig(**LORA, init_lora_weights=init))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    coef = 0.0 if reference == "auto" else 1.0
    settings = ReplayConfig(replay_coef=coef, anchor_coef=10.0, replay_reference=reference)
    rows = ReplayDataset.from_rows([replay[at] for at in range(len(replay))], "real")
    with pytest.raises(
        ValueError, match="^anchor_coef: without its adapter the model is not the one that was passed in"
    ):
        train(tmp_path, rows, model, replay_config=settings)


def test_a_lora_of_a_tied_head_is_held_as_a_head(tmp_path: Path) -> None:
    model = make_model("qwen3")
    rows, adapter = rows_of(model), LoraConfig(**LORA | {"target_modules": ["lm_head"]})
    held = train(
        tmp_path, rows, get_peft_model(model, adapter), ReplayTrainer, ReplayConfig(**ALONE), train_dataset=TOKENS
    )
    kl = kl_by_hand(held.model, rows, make_model("qwen3"))  # with an adapter on it the head is no plain one
    assert logged(held, "replay/kl_fixed")[-1] == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-5
    (lora,), untied = held.replay.anchor.anchored, make_model("qwen3")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    measured = measure_fisher(untied, [rows.batch(range(len(rows)))], {"head": untied.lm_head.weight})["head"]
    for ours, theirs in zip(lora._sides(), measured.parts[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_replay_may_begin_late(tmp_path: Path, replay: ReplayDataset) -> None:
    settings = ReplayConfig(replay_coef=1.0, anchor_coef=10.0, replay_start=0.5)
    trainer = train(tmp_path, replay, replay_config=settings, changes={"max_steps": 6})
    steps = [row["step"] for row in trainer.state.log_history if "replay/kl" in row]
    assert steps == [4, 5, 6]
    assert min(logged(trainer, "replay/kl")) > 0
    fixed = {row["step"]: row["replay/kl_fixed"] for row in trainer.state.log_history if "replay/kl_fixed" in row}
    assert list(fixed) == [1, 2, 3]
    assert min(fixed.values()) > 1e-5


def test_a_limit_of_the_kl_moves_the_anchor_with_the_replay(tmp_path: Path, replay: ReplayDataset) -> None:
    settings = ReplayConfig(replay_coef=0.5, anchor_coef=10.0, max_ref_kl=1e-4)
    trainer = train(tmp_path, replay, replay_config=settings)
    (group,) = {group["coef"] for group in trainer.optimizer.param_groups}
    assert group == pytest.approx(20 * trainer.replay_coef)
    assert group > 10


def test_a_move_that_the_anchor_no_longer_sees_is_said_once(
    tmp_path: Path, replay: ReplayDataset, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ReplayConfig(replay_coef=1.0, anchor_coef=10.0)
    trainer = train(tmp_path, replay, replay_config=settings)
    anchor = trainer.replay.anchor
    warnings = lambda: [message for message in caplog.messages if "too far for the anchor to hold it" in message]  # noqa: E731
    where = trainer.model, trainer.accelerator.device
    penalty = anchor.logs(None, *where)["replay/anchor"]
    anchor.logs(9 * penalty, *where)
    assert warnings() == []
    for _ in range(2):
        anchor.logs(max(0.02, 20 * penalty), *where)
    (line,) = warnings()
    assert line.startswith("anchor_coef: KL(base || model) on replay rows is ")


def kl_by_hand(model: Any, rows: ReplayDataset, base: Any = None) -> float:
    """KL(base || model) on the two longest rows by whole logits, nats per token."""
    batch = rows.batch(np.argsort(-rows.num_predictions, kind="stable")[:2].tolist())
    mask = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        logits = [one.eval()(**batch).logits[:, :-1][mask] for one in (base or make_model(), model)]
    return float(kl_divergence(*logits).mean())


@pytest.mark.parametrize("objective", ["none", "ntp", "replace", "kl_new"])
@pytest.mark.parametrize("lora", [False, True])
def test_where_no_rows_are_compared_the_true_kl_is_logged(
    tmp_path: Path, replay: ReplayDataset, objective: str, lora: bool
) -> None:
    """Without dropout; of rows of different lengths."""
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA, lora_dropout=0.5)} if lora else {}
    rows = ReplayDataset.from_rows([replay[at][: 3 + at] for at in range(len(replay))], "real")
    term = {"replay_coef": 0.0} if objective == "none" else {"replay_objective": objective}
    trainer = train(tmp_path, rows, replay_config=ReplayConfig(**term, anchor_coef=10.0), **adapter)  # type: ignore[arg-type]
    kl = logged(trainer, "replay/kl_fixed")
    assert len(kl) == 3
    assert kl[-1] == pytest.approx(kl_by_hand(trainer.model, rows), rel=1e-4)
    assert kl[-1] > 1e-4


def test_the_anchor_alone_says_once_that_the_model_moved_beyond_it(
    tmp_path: Path, replay: ReplayDataset, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ReplayConfig(replay_coef=0.0, anchor_coef=100.0)
    trainer = train(tmp_path, replay, replay_config=settings, changes={"learning_rate": 0.03, "max_steps": 9})
    kl, anchor = (logged(trainer, name) for name in ("replay/kl_fixed", "replay/anchor"))
    assert sum(one > 10 * other for one, other in zip(kl, anchor, strict=True)) > 1
    assert len([message for message in caplog.messages if "too far for the anchor to hold it" in message]) == 1


@pytest.mark.parametrize("lora", [False, True])
def test_the_kl_of_fixed_rows_changes_nothing_but_the_log(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    """No random state, gradient or mode of the model: with dropout, checkpointing, micro-batches, after a resume."""
    adapter: dict[str, Any] = {"peft_config": LoraConfig(**LORA, lora_dropout=0.5)} if lora else {}
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_checkpointing": True}
    saving |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs: dict[str, dict[str, Any]] = {
        "never": {"changes": saving | {"logging_strategy": "no"}},
        "always": {"changes": saving},
        "resumed": {"changes": saving, "resume": str(tmp_path / "always" / "checkpoint-2")},
    }
    found = {
        name: train(tmp_path / name, replay, replay_config=ReplayConfig(**ALONE), **run, **adapter)  # type: ignore[arg-type]
        for name, run in runs.items()
    }
    assert not logged(found["never"], "replay/kl_fixed")
    for name in ("always", "resumed"):
        assert difference(weights(found["never"].model), weights(found[name].model)) == 0.0
        assert len(logged(found[name], "replay/kl_fixed")) == 4
    assert logged(found["resumed"], "replay/kl_fixed") == logged(found["always"], "replay/kl_fixed")


# Refusals


@pytest.mark.parametrize(
    ("changes", "adapter", "words"),
    [
        ({"optim": "adafactor"}, None, "optim: the anchor does not work with 'adafactor'; use adamw_torch"),
        ({}, LoraConfig(**LORA, use_dora=True), "not plain LoRA on a linear layer"),
        ({}, LoraConfig(**LORA, modules_to_save=["lm_head"]), "'base_model.model.lm_head.*is trained, but the anchor"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    tmp_path: Path, replay: ReplayDataset, changes: dict[str, Any], adapter: Any, words: str
) -> None:
    given = {"peft_config": adapter} if adapter is not None else {}
    with pytest.raises(ValueError, match=words):
        train(tmp_path, replay, replay_config=ReplayConfig(**ALONE), changes=changes, **given)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"is_deepspeed_enabled": True}, "anchor_coef: DeepSpeed brings its own optimizer; use DDP or FSDP2"),
        ({"optimizer": object()}, "optimizers: the anchor brings its own AdamW; pass none"),
        ({"optimizer_cls_and_kwargs": (object, {})}, "optimizers: the anchor brings its own AdamW; pass none"),
    ],
)
def test_a_host_with_an_optimizer_of_its_own_is_refused(host: dict[str, Any], words: str) -> None:
    free = {"is_deepspeed_enabled": False, "optimizer": None, "optimizer_cls_and_kwargs": None}
    check_anchor(SimpleNamespace(optim="adamw_torch"), SimpleNamespace(**free))
    with pytest.raises(ValueError, match=f"^{words}"):
        check_anchor(SimpleNamespace(optim="adamw_torch"), SimpleNamespace(**free | host))


def test_it_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replay_dataset: missing, and anchor_coef needs it"):
        ReplaySFTTrainer(model=make_model(), args=config(tmp_path), replay_config=ReplayConfig(**ALONE))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replay_start": 0.5, "max_ref_kl": 0.1}, "replay_start: 0.5 leaves max_ref_kl no KL to control"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReplayConfig(**settings)
