"""What the baselines of study 02 add to a finetune, against their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from experiments import finetunes
from experiments.finetunes import Bench, Run
from experiments.small_base import Rows
from experiments.study_02_baselines import methods
from retain import ReplayDataset
from retain.lab.models import make_model

ROWS = torch.randint(1, 50, (40, 8), generator=torch.Generator().manual_seed(0)).tolist()
RUN = Run(max_steps=2, batch_size=4, warmup_steps=0, eval_steps=0, strength=2.0)


class SmallBench(Bench):
    def base(self) -> Any:
        config = AutoConfig.for_model(
            "qwen3", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            intermediate_size=32, vocab_size=50, max_position_embeddings=16, tie_word_embeddings=True,
        )  # fmt: skip
        return make_model(config, 0)


@pytest.fixture
def small(tmp_path: Path) -> Bench:
    rows = ReplayDataset.from_rows(ROWS, "forty rows")
    return SmallBench(tmp_path, None, Rows(ROWS), Rows(ROWS[:4]), {}, rows, "")


def test_fisher_is_the_mean_squared_gradient_of_rows(small: Bench) -> None:
    base = small.base().eval()
    wanted = torch.zeros_like(base.model.embed_tokens.weight)
    for row in ROWS:
        log_probs = base(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        base.zero_grad()
        log_probs[range(7), row[1:]].sum().backward()
        wanted += base.model.embed_tokens.weight.grad**2
    found = methods.true_fisher(base, small.replay)
    assert len(found) == len(list(base.parameters()))
    torch.testing.assert_close(found[0], wanted / (40 * 7))


def test_a_penalty_counts_by_importance(small: Bench, tmp_path: Path) -> None:
    base = small.base()
    importance = [torch.full_like(weight, 0.5 + at) for at, weight in enumerate(base.parameters())]

    def penalised(**how: Any) -> Any:
        return methods.PenaltyTrainer(strength=3.0, importance=importance, **how)

    trainer = finetunes.make_trainer(RUN, small, tmp_path, kind=penalised, model=base)
    batch = {name: value[None] for name, value in small.train[0].items()}
    weight = list(base.parameters())[2]
    base.train()
    before = trainer.compute_loss(base, batch).item()
    assert before == pytest.approx(base(**batch).loss.item())  # nothing has moved
    weight.data += 0.1
    added = trainer.compute_loss(base, batch).item() - base(**batch).loss.item()
    assert added == pytest.approx(3.0 * 2.5 * 0.01 * weight.numel(), rel=1e-3)
    base.eval()
    assert trainer.compute_loss(base, batch).item() == pytest.approx(base(**batch).loss.item()), "in training alone"


def test_entropy_weighs_sure_tokens_less() -> None:
    logits = torch.stack([torch.zeros(50), torch.arange(50.0)])
    sure = torch.arange(20.0).softmax(-1)
    entropy = -float((sure * sure.log()).sum()) / math.log(20)
    weights = methods.entropy_weights(logits, 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, entropy**2]))


def test_tokens_that_the_base_hardly_knows_are_masked(small: Bench) -> None:
    base, rows = small.base().eval(), torch.tensor(ROWS)
    log_probs = base(input_ids=rows).logits[:, :-1].log_softmax(-1)
    known = -log_probs.gather(-1, rows[:, 1:, None])[..., 0] <= math.log(50)
    weights = methods.known_tokens(base, rows, 50.0)
    assert 0.1 < known.float().mean() < 0.9
    assert ((weights > 0) == known).all()
    assert weights.mean().item() == pytest.approx(1)


def test_a_gate_weighs_the_loss_in_training_alone(small: Bench, tmp_path: Path) -> None:
    base = small.base()

    def gated(**how: Any) -> Any:
        return methods.GatedTrainer(gate=lambda rows, logits: torch.full(logits.shape[:2], 0.25), **how)

    trainer = finetunes.make_trainer(RUN, small, tmp_path, kind=gated, model=base)
    batch = {name: value[None] for name, value in small.train[0].items()}
    loss = base(**batch).loss.item()
    base.train()
    assert trainer.compute_loss(base, batch).item() == pytest.approx(loss / 4)
    base.eval()
    assert trainer.compute_loss(base, batch).item() == pytest.approx(loss)


@pytest.mark.parametrize(
    ("method", "embeddings", "others"),
    [("frozen_embeddings", False, True), ("embeddings", True, False), ("osf_embeddings", True, True)],
)
def test_embeddings_are_trained_or_not(
    small: Bench, method: str, embeddings: bool, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(methods, "finetune", lambda run, bench, end, model: found.append(model) or {})
    methods.SPECIAL[method](Run(method=method, lora_rank=2), small, None)
    trained = {name for name, weight in found[0].named_parameters() if weight.requires_grad}
    assert any("embed_tokens" in name for name in trained) == embeddings
    assert any("embed_tokens" not in name for name in trained) == others
