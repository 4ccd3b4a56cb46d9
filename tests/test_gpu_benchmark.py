"""`make gpu`, rehearsed at toy sizes: each part's command runs and its result is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def rehearsed(output: Path, *flags: str) -> dict[str, Any]:
    """The rows of the parts, by name."""
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--output", str(output), *flags]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(output.read_text())["parts"]
    return found


@pytest.mark.program
def test_a_part_is_saved_beside_those_of_before_and_none_begins_without_time(tmp_path):
    output = tmp_path / "gpu.json"
    term = rehearsed(output, "--parts", "term")["term"]
    assert term["outcome"] == "done"
    assert set(term["result"]["results"]["term, frozen head of 1,024"]) == {"naive", "chunked", "trl"}
    found = rehearsed(output, "--parts", "step 135M", "demo", "--minutes", "0")
    assert found.pop("term") == term
    assert {row["outcome"] for row in found.values()} == {"not run: no time was left"}


@pytest.mark.slow
def test_every_part_is_rehearsed(tmp_path):
    found = rehearsed(tmp_path / "gpu.json")
    assert "no wheel of" in found.pop("demo")["outcome"]
    assert "torchao" in found.pop("batch 1, 8-bit AdamW")["outcome"]  # is not installed here
    assert "scale gpu: no run is made yet" in found.pop("study 06")["outcome"]
    assert {row["outcome"] for row in found.values()} == {"done"}
    assert found["tests"]["result"]["failed"] == {}
    assert [row["method"] for row in found["cost 1B"]["result"]["cells"] if row["anchor"]] == ["full", "LoRA"]
    assert [line.split()[0] for line in found["batch 1, LoRA"]["result"]] == ["memory:", "a"]
    assert found["sampling"]["result"]["results"][0]["case"] == "135M"
