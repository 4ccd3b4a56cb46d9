"""Verbs on a device that is not the CPU, which they choose themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import make_texts, save_model
from simulated_device import DEVICE, FREE_MEMORY, SIMULATED, on_device
from test_one_command import run, write_rows

from retain.cli.main import main

pytestmark = pytest.mark.program
CHANGES = {"use_cpu": False, "max_steps": 2, "bf16": True}


def world(folder: Path) -> Path:
    save_model(folder / "model")
    write_rows(folder / "new.jsonl", 1, 24)
    return folder


@on_device
def test_a_dry_run_names_the_device_and_reads_its_memory(tmp_path):
    assert run(world(tmp_path), tmp_path / "out", "--dry_run", "true", **CHANGES) == 0
    said = (tmp_path / "said.txt").read_text()
    assert re.search(rf"device: {DEVICE} \(.+\), weights in float32, computing in bf16", said)
    assert f"memory: {FREE_MEMORY / 2 / 1e9:.1f} GB" in said or not SIMULATED


@on_device
def test_one_command_protects_there_and_another_measures(tmp_path):
    out, wiki = tmp_path / "out", tmp_path / "wiki.txt"
    wiki.write_text("\n\n".join(make_texts(3, seed=3)))
    assert run(world(tmp_path), out, "--compare_plain", "false", **CHANGES) == 0
    flags = ["--base", str(tmp_path / "model"), "--model", str(out), "--retention", f"wiki={wiki}"]
    assert main(["measure", *flags, "--max_length", "24", "--output_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["settings"]["device"] == f"{DEVICE}:0"
