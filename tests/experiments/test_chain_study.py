"""Study 16: its claims on made-up chains, and that a chain goes on from the stage that a kill left whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.pages import NoReport
from experiments.study_16_chain import run as study


def losses(first: float, others: float, prose: float) -> dict[str, list[float]]:
    """German is learned to 2.0 and ends at `first`; all tasks and prose begin at 4.0."""
    other = [4.0, 4.0, others, others]
    return {"german": [4.0, 2.0, 2.5, first], "verilog": other, "spanish": other, "prose": [4.0, 4.0, 4.0, prose]}


def verdicts(tmp_path: Path, plain: dict[str, Any], protected: dict[str, Any]) -> tuple[list[str], str]:
    results = study.StudyResults(tmp_path / "results.jsonl", "laptop")
    for seed in range(3):
        for arm, found in (("plain", plain), ("protected", protected)):
            shifted = {name: [value + 0.01 * seed for value in values] for name, values in found.items()}
            results.make({"arm": arm, "seed": seed}, lambda shifted=shifted: {"losses": shifted, "chain": {}})
    text, draw = study.report("laptop")
    draw(tmp_path / "figure.png")
    return [line.partition("**")[2].partition("**")[0] for line in text.splitlines() if line.startswith("- ")], text


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)


def test_protection_that_keeps(tmp_path: Path) -> None:
    found, text = verdicts(tmp_path, losses(3.0, 2.0, 4.5), losses(2.2, 2.0, 4.1))
    assert found == ["yes"] * 4
    assert "-0.800 [-0.800, -0.800] nats per token" in text
    assert "+0.400 [+0.400, +0.400] share, from 0.500 [0.500, 0.500] to 0.900" in text
    assert (tmp_path / "figure.png").stat().st_size > 2_000


def test_protection_that_only_learns_less(tmp_path: Path) -> None:
    """It forgets nothing of German, and ends where a reader would be worse off."""
    learned_little = losses(2.0, 3.9, 4.0) | {"german": [4.0, 3.5, 3.5, 3.5]}
    found, _ = verdicts(tmp_path, losses(3.0, 2.0, 4.0), learned_little)
    assert found == ["no", "no", "yes", "equivalent"]


def test_no_report_of_one_seed(tmp_path: Path) -> None:
    results = study.StudyResults(tmp_path / "results.jsonl", "laptop")
    for arm in study.ARMS:
        results.make({"arm": arm, "seed": 0}, lambda: {"losses": losses(3.0, 2.0, 4.0), "chain": {}})
    with pytest.raises(NoReport):
        study.report("laptop")


def test_a_chain_goes_on_after_its_last_whole_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage that a kill broke off is made anew, on the model that the stage before left."""
    made: list[tuple[Any, ...]] = []
    data = {name: (tmp_path / f"{name}.jsonl",) * 2 for name in (*study.TASKS, study.PROSE)}
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "write_data", lambda scale: data)
    monkeypatch.setattr(study, "retain", lambda *given: made.append(given))
    monkeypatch.setattr(study, "read_json", lambda *given: {
        "runs": [{"retention": {name: {"base_loss": {"value": 4.0}, "loss": {"value": 3.0}} for name in data}}] * 3,
        "chain": [{"name": "german"}],
    })  # fmt: skip
    whole = tmp_path / "plain-0" / "german" / "adapter_model.safetensors"
    whole.parent.mkdir(parents=True)
    whole.touch()
    (tmp_path / "plain-0" / "verilog").mkdir()
    found = study.chain(study.Scale(), "plain", 0)
    models = [given[given.index("--model") + 1] for given in made if given[0] == "finetune"]
    assert models == [str(tmp_path / "plain-0" / task) for task in ("german", "verilog")]
    assert not (tmp_path / "plain-0" / "verilog").exists(), "what was broken off is gone"
    assert found["losses"]["german"] == [4.0, 3.0, 3.0, 3.0]
    assert made[-1][0] == "measure"
