"""Bad input of every kind to every verb: one line that says what and what to do, exit code 1, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import make_texts, save_model

import retain.config as config
from retain.cli import main

VERBS = {
    "sample": config.SampleConfig,
    "measure": config.MeasureConfig,
    "report": config.ReportConfig,
    "fit": config.FitConfig,
    "predict": config.PredictConfig,
    "sweep": config.SweepConfig,
    "demo": config.DemoConfig,
}
BAD = {
    int: ("abc", "1.5", "nan", "-7"),
    float: ("abc", "nan", "inf", "-7.5"),
    bool: ("maybe", "2"),
}
# Flags for which one of these values is a good one.
FINE: dict[tuple[str, str], set[str]] = {}


def kind_of(hint: Any) -> Any:
    """The type behind `X | None`; Literal for choices, None for texts and lists."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        return Literal
    return hint if hint in BAD else None


def bad_flags() -> list[tuple[str, str, str]]:
    found = []
    for verb, settings in VERBS.items():
        hints = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            kind = kind_of(hints[field.name])
            values = ("nonsense", "") if kind is Literal else BAD.get(kind, ())
            found += [(verb, field.name, value) for value in values if value not in FINE.get((verb, field.name), ())]
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Good input for every verb."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_model(root / "tuned", seed=1)
    (root / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(4)))
    (root / "sweep.yaml").write_text("verb: sample\n")
    rows = [{"run": run, "num_params": 10.0**run, "num_steps": step, "finetuning_loss": 3 - step / 99 - run / 9,
             "forgetting_loss": 1 + step / 99 + run / 9} for run in (3, 4, 5) for step in (10, 20, 30, 40)]  # fmt: skip
    (root / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "law.json").write_text("{}")
    return root


def good(verb: str, world: Path, out: Path) -> dict[str, str]:
    """Flags with which a verb would begin to work."""
    return {
        "sample": {"model_name_or_path": world / "model", "output_dir": out},
        "measure": {
            "base": world / "model", "model": world / "tuned", "retention": f"w={world}/wiki.jsonl", "output_dir": out,
        },
        "report": {"runs": world, "output_dir": out},
        "fit": {"runs": world / "runs.jsonl", "output": out / "law.json"},
        "predict": {"law": world / "law.json", "num_params": "1e6", "num_steps": "10"},
        "sweep": {"sweep": world / "sweep.yaml", "output_dir": out},
        "demo": {"output_dir": out},
    }[verb]  # type: ignore[return-value] # fmt: skip


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `arguments` are refused."""
    capsys.readouterr()
    assert main(arguments) == 1
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err[-800:]
    assert "Traceback" not in output.err + output.out
    assert lines[0].startswith(f"retain {arguments[0]}: ")
    return lines[0]


@pytest.mark.parametrize(("verb", "flag", "value"), bad_flags())
def test_a_flag_with_a_bad_value(world, tmp_path, capsys, verb, flag, value):
    out = tmp_path / "out"
    flags = {**good(verb, world, out), flag: value}
    line = refused([verb, *(word for name, given in flags.items() for word in (f"--{name}", str(given)))], capsys)
    assert flag in line, line
    assert value == "" or value in line or str(float(value)) in line, line
    assert not out.exists()


def test_there_are_many_of_them():
    assert len(bad_flags()) >= 120


JUNK: dict[str, bytes] = {
    "empty": b"",
    "spaces": b" \n\n ",
    "not JSON": b"{'text': 'x'}\n",
    "cut off": b'{"text": "a"}\n{"text": "b',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "latin-1": b'{"text": "caf\xe9"}\n',
    "binary": bytes(range(256)) * 8,
    "wrong key": b'{"txet": "a"}\n',
    "text is a number": b'{"text": 3}\n',
    "text is null": b'{"text": null}\n',
    "deep": b"[" * 3000 + b"]" * 3000,
    "mixed": b'{"text": "a"}\n{"messages": 3}\n',
}
TEXTS = ("retention", "new_task", "choices", "refusals", "harmless", "prompts", "train_dataset")


@pytest.mark.parametrize("junk", JUNK, ids=[name.replace(" ", "-") for name in JUNK])
@pytest.mark.parametrize("flag", TEXTS)
def test_a_file_of_rows_that_holds_something_else(world, tmp_path, capsys, flag, junk):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JUNK[junk])
    spec = str(path) if flag in ("prompts", "train_dataset") else f"x={path}"
    flags = {**good("measure", world, tmp_path / "out")}
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    line = refused(["measure", *given, f"--{flag}", spec, "--max_length", "32"], capsys)
    assert "rows.jsonl" in line or "row 1" in line, line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("junk", ["empty", "not JSON", "cut off", "a list", "a number", "null", "binary", "deep"])
@pytest.mark.parametrize(("verb", "flag", "name"), [
    ("report", "runs", "report.json"), ("predict", "law", "law.json"), ("sweep", "sweep", "s.yaml"),
    ("fit", "runs", "rows.jsonl"), ("fit", "runs", "rows.csv"), ("fit", "runs", "rows.parquet"),
    ("measure", "retention", "rows.parquet"), ("measure", "retention", "rows.csv"),
])  # fmt: skip
def test_a_file_of_another_kind_that_holds_something_else(world, tmp_path, capsys, verb, flag, name, junk):
    path = tmp_path / name
    path.write_bytes(JUNK[junk])
    flags = {**good(verb, world, tmp_path / "out"), flag: f"x={path}" if verb == "measure" else path}
    if verb == "fit":
        (tmp_path / "out").mkdir()
    line = refused([verb, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))], capsys)
    assert name in line, line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("junk", ["empty", "not JSON", "a list", "binary", "half"])
@pytest.mark.parametrize("verb", ["sample", "measure"])
def test_a_damaged_checkpoint(world, tmp_path, capsys, verb, name, junk):
    folder = save_model(tmp_path / "damaged")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if junk == "half" else JUNK[junk])
    flags = good(verb, world, tmp_path / "out")
    flags["model_name_or_path" if verb == "sample" else "base"] = str(folder)
    line = refused([verb, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))], capsys)
    assert "damaged" in line, line
    assert not list((tmp_path / "out").glob("*"))
