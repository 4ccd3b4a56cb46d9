"""Sampling on a device that is not the CPU: the CPU's rows and stored predictions, in batches that fit the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simulated_device
from conftest import make_model, make_tokenizer, save_model
from simulated_device import DEVICE, SIMULATED, assert_as_on_cpu, on_device

from retain.cli.main import main
from retain.replay.dataset import load_self_generated
from retain.replay.provenance import check_pool
from retain.sampling import write
from retain.sampling.engine import choose_batch_size, draw_rows
from retain.sampling.write import sample_replay


@pytest.mark.parametrize("store", [None, "hidden", "topk"])
@on_device
def test_rows_and_what_is_stored_are_those_of_the_cpu(store, tmp_path):
    def work(device: str) -> list[Any]:
        drawn = draw_rows(make_model().to(device), [[3], [3, 9, 14]], range(2), 28, seed=4, store=store)
        return [drawn.tokens, drawn.logprobs, drawn.entropies, drawn.reference]

    assert_as_on_cpu(work, tolerance=1e-4)


@on_device
def test_a_pool_is_the_models_own_on_either_device(tmp_path):
    model = make_model().to(DEVICE)
    sample_replay(model, make_tokenizer(), tmp_path / "pool", num_rows=6, max_length=24, store_fisher=True)
    rows = load_self_generated(tmp_path / "pool")
    check_pool(model, rows, half=False)
    check_pool(make_model(), rows, half=False)


@on_device
def test_vllms_rows_get_predictions_and_fisher_on_the_device_when_it_is_closed(monkeypatch, tmp_path):
    """It lay in host memory; vLLM is a stand-in here."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_vllm"))
    seen: list[str] = []

    def noted(module: Any, name: str) -> None:
        work = getattr(module, name)
        monkeypatch.setattr(module, name, lambda model, *rest: (seen.append(model.device.type), work(model, *rest))[1])

    for module, name in ((write, "model_fingerprint"), (write, "predict_rows"), (write.stored_fisher, "store_fisher")):
        noted(module, name)
    save_model(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "pool"), "--engine", "vllm"]
    assert main(["sample", *flags, "--num_rows", "6", "--max_length", "24", "--store_fisher", "true"]) == 0
    assert seen == ["cpu", DEVICE, DEVICE]
    rows = load_self_generated(tmp_path / "pool")
    assert rows.cache is not None
    assert len(rows.cache.batch(range(6))["hidden"]) == 6 * 23


@pytest.mark.skipif(not SIMULATED, reason="says how much memory there is")
@on_device
def test_the_batch_size_fits_the_memory_of_the_device(monkeypatch, tmp_path):
    model, per_row = make_model().to(DEVICE), 2 * 2 * 2 * 8 * 64 * 4 + 32 * 320
    monkeypatch.setattr("psutil.virtual_memory", None)
    assert choose_batch_size(model, 64) == 512
    monkeypatch.setattr(simulated_device, "FREE_MEMORY", 2 * 11 * per_row)
    assert choose_batch_size(model, 64) == 8
