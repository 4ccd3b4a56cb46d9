"""Every example runs as it stands, on a tiny model, and stays short."""

from __future__ import annotations

import ast
import importlib
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from conftest import forked, make_texts, save_model
from test_docs import OF_EXTRAS

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["sft_replay", "lora_replay", "transformers_trainer", "dpo_replay"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    save_model(folder / "model")
    texts = make_texts(30, seed=3)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(10, seed=4)))
    pairs = [{"prompt": t[:20], "chosen": t[20:60], "rejected": t[60:100]} for t in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def run(name: str, *arguments: object, folder: Path) -> str:
    def program() -> None:
        os.chdir(folder)
        sys.argv = [name, *map(str, arguments)]
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    process = forked(folder / f"{name}.txt", program)
    process.join(200)
    assert process.exitcode == 0, (folder / f"{name}.txt").read_text()[-3000:]
    return (folder / f"{name}.txt").read_text()


@pytest.mark.program
@pytest.mark.parametrize("name", NAMES)
def test_trainer_example(name: str, workplace: Path) -> None:
    out = workplace / name
    rows = workplace / ("pairs.jsonl" if name == "dpo_replay" else "rows.jsonl")
    wiki = [workplace / "wiki.txt"] if name == "sft_replay" else []
    stdout = run(name, workplace / "model", rows, *wiki, out, folder=workplace)
    assert (out / "metrics.jsonl").exists()
    assert "replay/kl" in (out / "metrics.jsonl").read_text()
    assert (out / ("adapter_model.safetensors" if name == "lora_replay" else "model.safetensors")).exists()
    if name == "sft_replay":
        assert "the top token differs at" in stdout


@pytest.mark.program
def test_measure_example(workplace: Path) -> None:
    other = save_model(workplace / "other", seed=1)
    stdout = run(
        "measure_two_models", workplace / "model", other, workplace / "wiki.txt", workplace / "r", folder=workplace
    )
    assert "95% interval" in stdout
    assert (workplace / "r" / "report.html").exists()


@pytest.mark.program
def test_cloud_job_example(workplace: Path) -> None:
    small = ["--max_steps", "4", "--max_length", "32", "--replay_num_rows", "8", "--report_to", "none"]
    names = [workplace / name for name in ("model", "rows.jsonl", "wiki.txt", "job")]
    stdout = run("cloud_job", *names, *small, folder=workplace)
    assert "protection: kl, coefficient 5" in stdout
    assert "anchor: coefficient 100" in stdout
    assert (workplace / "job" / "adapter_model.safetensors").exists()
    assert (workplace / "job" / "report" / "report.html").exists()
    assert "## Forgetting" in (workplace / "job" / "README.md").read_text()


@pytest.mark.parametrize(
    "path",
    [EXAMPLES / f"{name}.py" for name in (*NAMES, "measure_two_models", "cloud_job")],
    ids=lambda path: path.stem,
)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


OUTSIDE = [path for folder in ("examples", "benchmarks") for path in sorted((EXAMPLES.parent / folder).glob("*.*"))]
CODE = [path for path in OUTSIDE if path.suffix in (".py", ".ipynb")]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_every_name_that_is_imported_from_retain_exists(path: Path) -> None:
    """Examples and benchmarks stand outside the package: a name that moves in it would be missed here."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = (cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        text = "\n".join("".join(lines) for lines in cells)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "retain":
            for alias in node.names if node.module not in OF_EXTRAS else ():
                assert hasattr(importlib.import_module(str(node.module)), alias.name), alias.name
