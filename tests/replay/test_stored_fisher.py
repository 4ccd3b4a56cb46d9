"""Fisher information beside the rows: measured once, read by every run, and gone with the rows it was measured on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model

from retain.replay import stored_fisher
from retain.replay.dataset import ReplayDataset, load_self_generated
from retain.replay.stored_fisher import FISHER_FILE, fisher_of
from retain.sampling.write import sample_replay
from retain.training.anchor import Anchor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fisher") / "rows"
    return sample_replay(make_model(), make_tokenizer(), folder, num_rows=12, max_length=16, store_fisher=True)


def unstored(rows: ReplayDataset) -> ReplayDataset:
    return ReplayDataset.from_rows([rows[at] for at in range(len(rows))], "in memory", rows.manifest)


def test_what_is_stored_is_what_would_be_measured(folder: Path) -> None:
    rows, model = load_self_generated(folder), make_model()
    weights = dict(model.named_parameters())
    stored, num_tokens = fisher_of(model, rows, weights)
    measured, as_many = fisher_of(model, unstored(rows), weights)
    assert num_tokens == as_many == 12 * 15
    assert stored.keys() == measured.keys() == weights.keys()
    for name, one in stored.items():
        torch.testing.assert_close(one.diagonal(), measured[name].diagonal())


def test_an_adapter_takes_the_same_as_its_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, base = load_self_generated(folder), make_model()
    fisher_of_base, _ = fisher_of(base, rows, dict(base.named_parameters()))
    adapter = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.nn.init.normal_(adapter.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight)
    measured = Anchor.measure(adapter, unstored(rows), seed=0)  # the adapter is switched off meanwhile
    monkeypatch.setattr(stored_fisher, "measure_fisher", None)  # nothing is measured where it is stored
    stored = Anchor.measure(adapter, rows, seed=0)
    wanted = [name for name in fisher_of_base if name.endswith("proj.weight")]
    assert len(wanted) == len(measured.anchored) == len(stored.anchored)
    for one, other in zip(measured.anchored, stored.anchored, strict=True):
        torch.testing.assert_close(one.curvature.diagonal(), other.curvature.diagonal())


def test_another_model_measures_its_own(folder: Path) -> None:
    """Off-policy rows are allowed; what was stored of them is another model's."""
    rows, model = load_self_generated(folder), make_model(seed=1)
    weights = {"lm_head.weight": model.lm_head.weight}
    found, wanted = (fisher_of(model, of, weights)[0]["lm_head.weight"] for of in (rows, unstored(rows)))
    torch.testing.assert_close(found.diagonal(), wanted.diagonal())


def test_it_comes_to_rows_that_are_finished(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    place = sample_replay(model, tokenizer, tmp_path / "rows", num_rows=4, max_length=10)
    assert not (place / FISHER_FILE).exists()
    sample_replay(model, tokenizer, place, num_rows=4, max_length=10, store_fisher=True)
    assert (place / FISHER_FILE).exists()
