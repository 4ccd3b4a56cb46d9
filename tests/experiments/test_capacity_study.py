"""Study 07: its loop against ReplayTrainer, and its verdicts on made-up rows that go either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from typing import Any

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from experiments.ensemble import Ensemble
from experiments.study_07_capacity import runs
from experiments.study_07_capacity.settings import Arm, Scale
from retain import ReplayConfig, ReplayDataset, ReplayTrainer
from retain.lab.models import make_model
from retain.lab.pretrain import PretrainArguments
from retain.lab.streams import Stream
from retain.replay.dataset import replay_indices

TINY, STEPS = Scale(held_out=32, tune_rows=2, seeds=1), 8


def tuned(model: Any, streams: Any, arm: Arm, args: PretrainArguments) -> Any:
    """The same finetune by the trainer; the pool lies so that its order is that of the stream."""
    numbers = np.arange(STEPS * TINY.tune_rows)
    order = np.concatenate([replay_indices(step, TINY.tune_rows, len(numbers), args.seed) for step in range(STEPS)])
    pool = streams[arm.rows][0](numbers)[np.argsort(order)]
    args.per_device_train_batch_size, args.learning_rate = TINY.tune_rows, TINY.tune_learning_rate
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.train_sampling_strategy = "sequential"
    trainer = ReplayTrainer(
        model=model, args=args, train_dataset=Stream(streams["new"][0], len(numbers)),
        data_collator=default_data_collator, processing_class=runs.corpora(TINY, 0)[0].tokenizer,
        replay_dataset=ReplayDataset.from_rows(list(pool.astype(np.int64)), "test"),
        replay_config=ReplayConfig(replay_coef=arm.coef, per_device_replay_batch_size=TINY.tune_rows),
    )  # fmt: skip
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("arm", [Arm("self", 0.0), Arm("real", 3.0)])
def test_a_member_is_a_run_of_replay_trainer(arm: Arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights after eight steps beside another member, which goes elsewhere."""
    monkeypatch.setattr(runs, "folder_of", lambda scale: tmp_path)
    flat = runs.Flat.of(TINY.shape("6400"))
    base = flat.vector(make_model(flat.model.config, 5))
    streams = runs._streams(TINY, "tiny", flat, base[None], STEPS * TINY.tune_rows)
    members = [(arm, 0), (Arm("self", 30.0), 0)]
    args = runs.arguments(TINY, STEPS, weight_decay=0.0)
    weights, other = Ensemble(flat, flat.protected_loss, args, fast=False).train(
        base.repeat(2, 1), torch.full((2,), runs.BETA2, dtype=torch.float64),
        runs._rates(args, TINY.tune_learning_rate, members),
        lambda done: runs._batches(TINY, flat, base[None], streams, members, range(done, STEPS)), tmp_path / "tuning",
    )  # fmt: skip
    args.output_dir = str(tmp_path / "alone")
    alone = flat.vector(tuned(flat.model_of(base), streams, arm, args))
    moved = (alone - base).norm()
    assert (weights - alone).norm() < 1e-3 * moved  # Adam enlarges a rounding where a gradient is next to 0
    assert (weights - other).norm() > 0.05 * moved
