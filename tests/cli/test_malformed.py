"""Bad input of every kind to every verb: one line that says what and what to do, exit code 1, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from conftest import make_model, make_texts, make_tokenizer, save_model
from safetensors.numpy import load_file, save_file

from retain.checks import hints_of
from retain.cli.flags import DATA, MODELS, NAMED_DATA
from retain.cli.main import VERBS, load_verb, main
from retain.cli.merge import MERGE_FILE
from retain.cli.plan import PILOTS
from retain.cli.sweep import RESULTS
from retain.files import CONFIG_FILE, OUTPUTS, check_output_dir, read_jsonl
from retain.replay.dataset import MANIFEST, shard_path
from retain.replay.stored_predictions import cache_path
from retain.sampling.write import sample_replay
from retain.training.run_files import read_run

BAD = {
    int: ("abc", "1.5", "nan", "-7"),
    float: ("abc", "nan", "inf", "-7.5"),
    bool: ("maybe", "2"),
}


def kind_of(hint: Any) -> Any:
    """The type behind `X | None`; Literal for choices, None for texts and lists."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        return Literal
    return hint if hint in BAD else None


def bad_flags() -> list[tuple[str, str, str]]:
    found = []
    for verb in VERBS:
        settings = load_verb(verb).settings[-1]
        hints = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            kind = kind_of(hints[field.name])
            values = ("nonsense", "") if kind is Literal else BAD.get(kind, ())
            found += [(verb, field.name, value) for value in values]
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
    for name, kind in (("replay", None), ("stored", "hidden")):
        settings = {"num_rows": 8, "max_length": 24, "rows_per_shard": 4, "batch_size": 4, "store_reference": kind}
        model = make_model()
        model.name_or_path = str(root / "model")
        sample_replay(model, make_tokenizer(), root / name, **settings)
    fit = f"fit {root}/runs.jsonl --form linear --num_resamples 9 --num_starts 1 --output {root}/law.json"
    assert main(shlex.split(fit)) == 0
    return root


def good(verb: str, world: Path, out: Path) -> dict[str, str]:
    """Flags with which a verb would begin to work."""
    return {
        "sample": {"model": world / "model", "output_dir": out},
        "measure": {
            "base": world / "model", "model": world / "tuned", "retention": f"w={world}/wiki.jsonl", "output_dir": out,
        },
        "merge": {
            "base": world / "model", "model": world / "tuned", "new_task": f"w={world}/wiki.jsonl",
            "replay_dataset": world / "replay", "output_dir": out,
        },
        "report": {"runs": world, "output_dir": out},
        "chat": {"base": world / "model", "model": world / "tuned", "prompt": "fox"},
        "fit": {"runs": world / "runs.jsonl", "output": out / "law.json"},
        "predict": {"law": world / "law.json", "num_params": "1e6", "num_steps": "10"},
        "sweep": {"sweep": world / "sweep.yaml", "output_dir": out},
        "export": {"replay_dataset": world / "replay", "output": out.with_suffix(".jsonl")},
        "finetune": {
            "model": world / "model", "dataset_name": world / "wiki.jsonl", "max_length": 24,
            "replay_dataset": world / "replay", "max_steps": 2, **TRAINER, "output_dir": out,
        },
        "plan": {
            "model": world / "model", "dataset_name": world / "wiki.jsonl", "retention": f"w={world}/wiki.jsonl",
            "max_ref_kl": 0.1, "max_length": 24, "output_dir": out,
        },
        "pretrain": {
            "corpus": "synthetic", "num_states": 16, "vocab_size": 16, "branching": 3, "max_length": 16,
            "model_size": 20000, "max_steps": 2, "eval_rows": 4, **TRAINER, "output_dir": out,
        },
    }[verb]  # type: ignore[return-value] # fmt: skip


def command(verb: str, flags: dict[str, Any]) -> list[str]:
    """A command line; a flag has its value, or those of a list, and one of None is left out."""
    words = [verb]
    for name, value in flags.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


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
    line = refused(command(verb, {**good(verb, world, out), flag: value}), capsys)
    assert flag in line, line
    assert value == "" or value in line or str(float(value)) in line, line
    assert not out.exists()


def test_the_report_of_a_model_outlives_what_is_wrong_with_the_next(world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "nan")
    weights = {name: value * np.nan for name, value in load_file(world / "model" / "model.safetensors").items()}
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    flags = {**good("measure", world, tmp_path / "out"), "model": [world / "tuned", tmp_path / "nan"]}
    flags |= {"max_length": 32, "max_new_tokens": 0}
    assert main(command("measure", flags)) == 1
    assert "its loss on document 1" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tuned"}
    assert json.loads((tmp_path / "out" / "tuned" / "report.json").read_text())["name"] == "tuned"


def test_there_are_many_of_them():
    assert len(bad_flags()) >= 120


def test_settings_of_data_and_models_are_settings():
    kinds = [kind for verb in VERBS for kind in load_verb(verb).settings]
    assert {*DATA, *NAMED_DATA, *MODELS} <= {name for kind in kinds for name in hints_of(kind)}


TRAINER = {"use_cpu": "true", "report_to": "none", "per_device_train_batch_size": 2}
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
TEXTS = ("retention", "new_task", "choices", "refusals", "harmless", "behaviors", "prompts", "train_dataset")


@pytest.mark.parametrize("junk", JUNK, ids=[name.replace(" ", "-") for name in JUNK])
@pytest.mark.parametrize("flag", TEXTS)
def test_a_file_of_rows_that_holds_something_else(world, tmp_path, capsys, flag, junk):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JUNK[junk])
    name = "formats" if flag == "behaviors" else "x"
    spec = str(path) if flag in ("prompts", "train_dataset") else f"{name}={path}"
    given = command("measure", good("measure", world, tmp_path / "out"))
    line = refused([*given, f"--{flag}", spec, "--max_length", "32"], capsys)
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
    line = refused(command(verb, flags), capsys)
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
    flags["model" if verb == "sample" else "base"] = str(folder)
    line = refused(command(verb, flags), capsys)
    assert "damaged" in line, line
    assert not list((tmp_path / "out").glob("*"))


# Damaged files of our own, and flags that do not fit together


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused_whole(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which `arguments` are refused; nothing in `folder` is new, gone or another."""
    before = contents(folder)
    line = refused(arguments, capsys)
    assert contents(folder) == before
    assert "RETAIN_DEBUG" not in line, "Python's own words"
    return line


GONE = object()
MANIFESTS: dict[str, tuple[dict[str, Any], str, str]] = {  # changes, verbs that need them, words of the error
    "no num_rows": ({"num_rows": GONE}, "export finetune measure sample", "'num_rows' is missing"),
    "no rows": ({"num_rows": 0}, "export finetune measure sample", "'num_rows' is 0, below 1"),
    "fewer than no rows": ({"num_rows": -1}, "export finetune measure", "'num_rows' is -1"),
    "text rows": ({"num_rows": "8"}, "export finetune measure sample", "'num_rows' is \"8\", not a whole number"),
    "half a row": ({"num_rows": 7.5}, "export finetune measure", "'num_rows' is 7.5, not a whole number"),
    "a yes for rows": ({"num_rows": True}, "export finetune measure", "'num_rows' is true, not a whole number"),
    "more rows": ({"num_rows": 12}, "export finetune measure", "8 of 12 rows; finish it with the same"),
    "no rows_per_shard": ({"rows_per_shard": GONE}, "export finetune measure", "'rows_per_shard' is missing"),
    "empty shards": ({"rows_per_shard": 0}, "export finetune measure sample", "'rows_per_shard' is 0, below 1"),
    "null shards": ({"rows_per_shard": None}, "export finetune measure", "'rows_per_shard' is null"),
    "no schema": ({"schema": GONE}, "export finetune measure", "'schema' is missing"),
    "schema of a law": ({"schema": "retain.law/2"}, "export finetune measure", "retain.law/2"),
    "no model": ({"model": GONE}, "export finetune", "'model' is missing"),
    "model of number": ({"model": 5}, "export finetune measure", "'model' is 5, not text"),
    "no weights": ({"model_fingerprint": GONE}, "finetune", "'model_fingerprint' is missing"),
    "no tokenizer": ({"tokenizer_fingerprint": GONE}, "export finetune", "'tokenizer_fingerprint' is missing"),
    "another tokenizer": ({"tokenizer_fingerprint": "x"}, "finetune", "the token ids may mean other text; sample"),
    "another to export": ({"tokenizer_fingerprint": "x"}, "export", "has another tokenizer than the model that wrote"),
    "another model": ({"model_fingerprint": "x"}, "finetune", "sample from this model, or set allow_off_policy"),
    "no start": ({"start_token": GONE}, "export", "'start_token' is missing"),
    "start of text": ({"start_token": "<s>"}, "export finetune measure", "'start_token' is \"<s>\", not an object"),
    "start without id": ({"start_token": {}}, "export finetune measure", "'start_token.id' is missing"),
    "sampler": ({"sampler": 3}, "export finetune measure", "'sampler' is 3, not an object"),
    "batches": ({"batch_size": "x"}, "export finetune measure sample", "'batch_size' is \"x\""),
    "kind of store": ({"store_reference": "all"}, "export finetune measure", "'store_reference' is 'all', not one of"),
    "store, no dtype": ({"store_reference": "topk", "sampler": {}}, "export finetune", "'sampler.dtype' is missing"),
}


@pytest.mark.parametrize(
    ("label", "verb"), [(label, verb) for label, (_, verbs, _) in MANIFESTS.items() for verb in verbs.split()]
)
def test_a_damaged_manifest(world, tmp_path, capsys, label, verb):
    folder = Path(shutil.copytree(world / "replay", tmp_path / "rows"))
    changes, _, expected = MANIFESTS[label]
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest = {name: value for name, value in manifest.items() if value is not GONE}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    line = refused_whole(command(verb, good(verb, world, tmp_path / "out") | of_rows(verb, folder)), tmp_path, capsys)
    assert expected in line
    assert str(folder) in line or label.startswith("another")  # then what is named is the model


def of_rows(verb: str, folder: Path) -> dict[str, Any]:
    """The flag by which a verb reads a replay dataset, or resumes one."""
    settings = {"num_rows": 8, "max_length": 24, "rows_per_shard": 4}
    name = {"measure": "retention", "sample": "output_dir"}.get(verb, "replay_dataset")
    return {name: f"x={folder}" if verb == "measure" else folder} | (settings if verb == "sample" else {})


def shard_of(**columns: list[Any]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    return lambda path: parquet.write_table(pa.table(columns), path)


SHARDS = {
    "binary": lambda path: path.write_bytes(JUNK["binary"]),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "gone": lambda path: path.unlink(),
    "other columns": shard_of(text=["a"] * 4),
    "words": shard_of(input_ids=[["a", "b"]] * 4, prefix_length=[1] * 4),
    "numbers": shard_of(input_ids=[3] * 4, prefix_length=[1] * 4),
    "nothing": shard_of(input_ids=[None] * 4, prefix_length=[1] * 4),
    "long prefixes": shard_of(input_ids=[[3, 4]] * 4, prefix_length=[9] * 4),
    "null prefixes": shard_of(input_ids=[[3, 4]] * 4, prefix_length=[None] * 4),
    "prefixes of text": shard_of(input_ids=[[3, 4]] * 4, prefix_length=["1"] * 4),
}


@pytest.mark.parametrize("label", SHARDS)
@pytest.mark.parametrize("verb", ["export", "finetune", "measure"])
def test_a_damaged_shard(world, tmp_path, capsys, label, verb):
    folder = Path(shutil.copytree(world / "replay", tmp_path / "rows"))
    SHARDS[label](shard_path(folder, 1))
    line = refused_whole(command(verb, good(verb, world, tmp_path / "out") | of_rows(verb, folder)), tmp_path, capsys)
    assert str(folder) in line
    assert "retain sample" in line or "sample again" in line


STORES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(JUNK["binary"]),
    "half": lambda path: path.write_bytes(path.read_bytes()[:900]),
    "other names": lambda path: save_file({"x": np.zeros((92, 32), np.float32)}, path),
    "fewer rows": lambda path: save_file({"hidden": np.zeros((7, 32), np.float32)}, path),
}


@pytest.mark.parametrize("label", STORES)
def test_damaged_stored_predictions(world, tmp_path, capsys, label):
    folder = Path(shutil.copytree(world / "stored", tmp_path / "rows"))
    STORES[label](cache_path(folder, 0))
    flags = good("finetune", world, tmp_path / "out") | {"replay_dataset": folder, "replay_reference": "cache"}
    line = refused_whole(command("finetune", flags), tmp_path, capsys)
    assert "reference-00000.safetensors' is missing or damaged (" in line
    assert "); delete it and run the same `retain sample` command" in line


REPORT = {"schema": "retain.report/1", "name": "a", "base": {"model": "m"}, "retention": {}}
VALUE = {"value": 0.1, "ci": [0, 1]}
STEP = {"step": 5, "eval_loss": 1, "retention/w/ref_kl": 0.1}
LINEAR = "fit {t}/m/metrics.jsonl --form linear --output {t}/law.json"
JOINT = "fit {t}/m/metrics.jsonl --form joint --output {t}/law.json"
PAGE = "report --runs {t}/report.json --output_dir {t}/out"
# What a law, a report or a log is changed by, or is; a command; words of the error.
FILES: list[tuple[str, dict[str, Any], str, str]] = [
    *((f"report {label}", {"report.json": REPORT | change}, PAGE, expected) for label, change, expected in [
        ("without a name", {"name": None}, "'name' is null, not text"),
        ("named by a number", {"name": 3}, "'name' is 3, not text"),
        ("without retention", {"retention": None}, "'retention' is null, not an object"),
        ("with a list of texts", {"retention": [1]}, "'retention' is [1], not an object"),
        ("with a text of numbers", {"retention": {"w": 3}}, "'retention.w' is 3, not an object"),
        ("with a metric of text", {"retention": {"w": {"ref_kl": "x"}}}, "'retention.w.ref_kl' is \"x\", not an"),
        ("with a value of text", {"retention": {"w": {"loss": {"value": "x"}}}}, "'retention.w.loss.value' is \"x\""),
        ("with half an interval", {"retention": {"w": {"loss": VALUE | {"ci": [0]}}}}, "'retention.w.loss.ci' is [0]"),
        ("with ends of text", {"retention": {"w": {"loss": VALUE | {"ci": ["a", 1]}}}}, "'retention.w.loss.ci.0'"),
        ("with counts of text", {"new_task": {"w": {"gain": {"num_tokens": "x"}}}}, "'new_task.w.gain.num_tokens'"),
        ("with a noise of text", {"noise_floor": {"w": "x"}}, "'noise_floor.w' is \"x\", not an object"),
        ("with a path of text", {"trajectory": "x"}, "'trajectory' is \"x\", not a list"),
        ("with steps of numbers", {"trajectory": [1]}, "'trajectory.0' is 1, not an object"),
        ("with rows of no step", {"trajectory": [{"eval_loss": 1}]}, "'trajectory.0.step' is missing"),
        ("with documents of numbers", {"documents": [1]}, "'documents.0' is 1, not an object"),
        ("with documents of no sums", {"documents": [{"step": 1, "name": "w"}]}, "'documents.0.ref_kl' is missing"),
        ("with sums of text", {"per_document": {"w": {"ref_kl": "x", "loss": [], "base_loss": [], "num_tokens": []}}},
         "'per_document.w.ref_kl' is \"x\""),
        ("with a base of text", {"base": "m"}, "'base' is \"m\", not an object"),
        ("with a training of lists", {"training": [1]}, "'training' is [1], not an object"),
        ("with warnings of numbers", {"warnings": [3]}, "'warnings.0' is 3, not text"),
        ("with choices of no rules", {"choices": {"arc": {}}}, "'choices.arc.num_questions' is missing"),
        ("with behaviours of text", {"behaviors": {"tools": {"thinking": "x"}}}, "'behaviors.tools.thinking' is \"x\""),
        ("with refusals of text", {"refusals": {"adv": {"scorers": "x"}}}, "'refusals.adv.scorers' is \"x\""),
        ("with half a generation", {"generations": [{"prompt": "a"}]}, "'generations.0.base' is missing"),
        ("with worst of numbers", {"worst": {"w": [{"tokens": [1]}]}}, "'worst.w.0.tokens.0' is 1, not an object"),
    ]),
    *((f"log {label}", {"m/metrics.jsonl": rows}, LINEAR, expected) for label, rows, expected in [
        ("without a step", [{"eval_loss": 1}], "metrics.jsonl': line 1 is damaged: 'step' is missing"),
        ("with a step of text", [STEP, {"step": "x"}], "line 2 is damaged: 'step' is \"x\", not a whole number"),
        ("with half a step", [{"step": 1.5}], "line 1 is damaged: 'step' is 1.5, not a whole number"),
        ("with a list", [STEP, STEP, [1]], "line 3 is damaged: it is [1], not an object"),
        ("with a null", [None, STEP], "line 1 is damaged: it is null, not an object"),
        ("with a line of junk", [STEP, b"garbage", STEP], "line 2 is damaged (not JSON: "),
        ("with a line cut off", [b'{"step": 3, "lo{"step": 4}', STEP], "line 1 is damaged (not JSON: "),
        ("with another coding", [STEP, b'{"step": 3, "x": "caf\xe9"}', STEP], "line 2 is damaged (not JSON: "),
        ("with a deep line", [b"[" * 3000, STEP], "line 1 is damaged (not JSON: "),
        ("of several texts", [STEP | {"retention/v/ref_kl": 0.1}], "has v, w; choose one with --retention_name NAME"),
        ("with a loss of text", [STEP | {"eval_loss": "x"}], "finetuning_loss: 'x' in run 'm' is not a finite number"),
        ("of no evaluation", [{"step": 3}], "has no evaluation"),
    ]),
    ("log of other texts", {"m/metrics.jsonl": [STEP]}, f"{LINEAR} --retention_name v", "choose one of w"),
    *((f"settings {label}", {"m/metrics.jsonl": [STEP], "m/retain_config.json": text}, JOINT, expected)
      for label, text, expected in [
        ("cut off", b"{bad", "retain_config.json' (not JSON: "),
        ("of a list", [1], "retain_config.json' is damaged: it is [1], not an object"),
        ("of counts of text", {"num_params": "many"}, "damaged: 'num_params' is \"many\", not a whole number"),
    ]),
]  # fmt: skip


def write(path: Path, value: Any) -> None:
    """Bytes as they are, rows (a list, for a name that ends so) one a line, anything else as JSON."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        rows = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in value]
        value = b"".join(row + b"\n" for row in rows)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize(("files", "line", "expected"), [pytest.param(*row[1:], id=row[0]) for row in FILES])
def test_a_damaged_file_of_ours(world, tmp_path, capsys, files, line, expected):
    for name, value in files.items():
        write(tmp_path / name, value)
    found = refused_whole(shlex.split(line.format(t=tmp_path, w=world)), tmp_path, capsys)
    assert expected in found
    assert str(tmp_path) in found or "run 'm'" in found


LAWS: list[tuple[str, dict[str, Any], str]] = [
    ("no form", {"form": None}, "'form' is null, not text"),
    ("an unknown form", {"form": "nope"}, "form: 'nope' is not known"),
    ("no bounds", {"bounds": None}, "'bounds' is null, not an object"),
    ("one bound", {"bounds": {"rho": [1]}}, "'bounds.rho' is [1], not 2 values"),
    ("bounds of text", {"bounds": {"rho": ["a", "b"]}}, "'bounds.rho.0' is \"a\", not a number"),
    ("no runs", {"runs": None}, "'runs' is null, not an object"),
    ("runs of nothing", {"runs": {}}, "no column 'run'"),
    ("runs of text", {"runs": {"run": "abc"}}, "'runs.run' is \"abc\", not a list"),
    ("no estimate", {"estimate": {}}, "'estimate.exponents' is missing"),
    ("draws of text", {"draws": "x"}, "'draws' is \"x\", not an object"),
    ("draws of words", {"draws": {"exponents": [["a"]], "coefficients": []}}, "'draws.exponents.0.0' is \"a\", not a"),
    ("a spread of nothing", {"spread": [[None]]}, "'spread.0.0' is null, not a number"),
    ("a spread of NaN", {"spread": [[float("nan")]]}, "'spread' holds a number that is not finite"),
    ("a spread of one", {"spread": [[1.0]]}, "does not have the shape of the runs"),
    ("a number held out", {"held_out": 3}, "'held_out' is 3, not an object"),
    ("words held out", {"held_out": {"run": {"x": "y"}}}, "'held_out.run.x' is \"y\", not a number"),
    ("no warnings", {"warnings": None}, "'warnings' is null, not a list"),
    ("warnings of numbers", {"warnings": [1]}, "'warnings.0' is 1, not text"),
    ("no settings", {"settings": None}, "'settings' is null, not an object"),
    ("another schema", {"schema": "retain.law/1"}, "is not a retain.law/2 file"),
]


@pytest.mark.parametrize(("changes", "expected"), [pytest.param(*row[1:], id=row[0]) for row in LAWS])
def test_a_damaged_law(world, tmp_path, capsys, changes, expected):
    path = tmp_path / "l.json"
    path.write_text(json.dumps(json.loads((world / "law.json").read_text()) | changes))
    line = refused_whole(["predict", str(path), "--finetuning_loss", "3"], tmp_path, capsys)
    assert expected in line
    assert str(path) in line or "form" in changes


RUN = {"replay": {"replay_coef": 1.0}, "reference": "copy", "training_arguments": {
    "learning_rate": 1e-4, "max_steps": 3, "num_train_epochs": 1, "per_device_train_batch_size": 2, "seed": 0,
}}  # fmt: skip
OF_A_RUN: list[tuple[str, dict[str, Any], str]] = [
    ("settings cut off", {"retain_config.json": b"{bad"}, "retain_config.json' (not JSON: "),
    ("settings of a list", {"retain_config.json": []}, "retain_config.json' is damaged: it is [], not an object"),
    ("no arguments", {"retain_config.json": {"replay": {}}}, "'training_arguments' is missing"),
    ("replay of text", {"retain_config.json": RUN | {"replay": "x"}}, "'replay' is \"x\", not an object"),
    ("budget of a list", {"retain_config.json": RUN, "budget.json": []}, "budget.json' is damaged: it is []"),
    (
        "budget without words",
        {"retain_config.json": RUN, "budget.json": {}},
        "budget.json' is damaged: 'text' is missing",
    ),
    (
        "no step",
        {"retain_config.json": RUN, "metrics.jsonl": [{"loss": 1}]},
        "metrics.jsonl': line 1 is damaged: 'step'",
    ),
    ("documents without a name", {"retain_config.json": RUN, "documents.jsonl": [{"step": 1}]}, "'name' is missing"),
]


@pytest.mark.parametrize(("files", "expected"), [pytest.param(*row[1:], id=row[0]) for row in OF_A_RUN])
def test_damaged_files_of_a_run(tmp_path, files, expected):
    for name, value in files.items():
        write(tmp_path / name, value)
    with pytest.raises(ValueError, match=r"^[^\n]+; [^\n]+$") as caught:
        read_run(tmp_path)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_only_a_last_line_without_an_end_is_taken_for_torn(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"st\n')
    with pytest.raises(ValueError, match=r"log.jsonl': line 2 is damaged"):
        read_jsonl(path)


# Files for the flags below, by name.
OTHERS: dict[str, Any] = {
    "empty.jsonl": [],
    "cut.jsonl": [{"text": "a"}, b'{"text": "b"'],
    "latin.txt": b"caf\xe9",
    "broken.yaml": b"seed: 1\nnum_rows: 2: 3\n",
    "list.yaml": [1, 2],
    "none.jsonl": [{"text": ""}, {"text": ""}],
    "long.jsonl": [{"text": "fox " * 50}],
    "numbers.jsonl": [{"text": 3}],
    "chat.jsonl": [{"messages": [{"role": "user", "content": "a"}]}],
    "other.jsonl": [{"a": 1}],
    "longer.jsonl": [{"text": "fox " * 150}] * 4,
    "ids.jsonl": [{"input_ids": [3, 10, 400]}] * 4,
    "one.jsonl": [{"input_ids": [3]}] * 4,
}
FLAGS: list[tuple[str, dict[str, Any], str]] = [
    ("sample", {"model": "{t}/no"}, "no folder or file"),
    ("sample", {"model": "nowhere/"}, "model: no folder or file 'nowhere/'; give a folder, a GGUF file or a Hub id"),
    ("sample", {"model": "nobody/nothing"}, "check the name, and unset HF_HUB_OFFLINE"),
    ("sample", {"model": None}, "model: missing; give --model"),
    ("sample", {"output_dir": None}, "output_dir: missing; give --output_dir"),
    ("sample", {"output_dir": "{w}/wiki.jsonl"}, "output_dir: '{w}/wiki.jsonl' is a file; choose a folder"),
    ("sample", {"output_dir": "{w}/replay", "max_length": 24}, "num_rows 8, not 256; choose another folder"),
    ("sample", {"num_rows": 0}, "num_rows: 0 does not fit; use a whole number of at least 1"),
    ("sample", {"num_row": 3}, "--num_row: unknown argument"),
    ("sample", {"seed": []}, "argument --seed: expected one argument"),
    ("sample", {"seed": "ten"}, "seed: 'ten' does not fit; use a whole number"),
    ("sample", {"config": []}, "config: --config needs a file"),
    ("sample", {"config": "{t}/no.yaml"}, "config: no file '{t}/no.yaml'; check the path"),
    ("sample", {"config": "{t}/broken.yaml"}, "config: not YAML at line 2"),
    ("sample", {"config": "{t}/list.yaml"}, "must contain a YAML mapping"),
    ("sample", {"start": "document=0.7,chat=x"}, "start: 'document=0.7,chat=x' does not fit"),
    ("sample", {"start": "document=0.5,document=0.5"}, "start: "),
    ("sample", {"start": "document=0.5"}, "add up to 0.5"),
    ("sample", {"start": "prompts"}, "prompts: missing; give --prompts FILE"),
    ("sample", {"start": "prompts", "prompts": "{t}/none.jsonl"}, "prompts: all 2 rows are empty; give texts"),
    ("sample", {"start": "prompts", "prompts": "{t}/long.jsonl", "max_length": 16}, "no room behind a beginning of"),
    ("sample", {"start": "prompts", "prompts": "{t}/numbers.jsonl"}, "row 1"),
    ("sample", {"start": "chat"}, "needs a chat template"),
    ("sample", {"max_length": 4096}, "at most 128"),
    ("sample", {"start_token": "zzz"}, "start_token: 'zzz' is not in the vocabulary"),
    ("sample", {"output_dir": "{w}", "model": "nobody/nothing"}, "holds other files"),
    ("export", {"replay_dataset": "{w}/model"}, "has no manifest.json"),
    ("export", {"replay_dataset": "{t}/no"}, "replay_dataset: no file '{t}/no'; check the path"),
    ("export", {"replay_dataset": None}, "replay_dataset: missing"),
    ("export", {"output": None}, "output: missing"),
    ("export", {"output": "{w}/replay/shard-00000.parquet"}, "is in the folder of replay_dataset"),
    ("export", {"output": "{w}/replay/rows.jsonl"}, "is in the folder of replay_dataset"),
    ("export", {"output": "{w}/replay/../replay/manifest.json"}, "is in the folder of replay_dataset"),
    ("export", {"output": "{w}/model"}, "is a folder; name a file"),
    ("export", {"output": "{t}/no/rows.jsonl"}, "make it first"),
    ("export", {"model": "{t}/no"}, "no folder or file"),
    ("export", {"format": "messages"}, "needs a chat template"),
    ("fit", {"output": "{w}"}, "output: "),
    ("fit", {"output": "{t}/no/law.json"}, "output: no folder"),
    ("fit", {"output": "{t}/l.json", "plot": "{t}/no/f.png"}, "plot: no folder"),
    ("fit", {"output": "{t}/l.json", "plot": "{w}"}, "plot: "),
    ("fit", {"output": "{t}/l.json", "plot": "{t}/f.pdf"}, "f.pdf' is no .png; give a name"),
    ("fit", {"output": "{t}/l.json", "form": "nope"}, "form: 'nope' is not known"),
    ("fit", {"output": "{t}/l.json", "runs": "{t}/other.jsonl"}, "no column 'run'"),
    ("fit", {"output": "{t}/l.json", "runs": "{t}/no"}, "no file"),
    ("finetune", {"model": "{t}/no"}, "no folder or file"),
    ("finetune", {"model": None}, "model: missing; give --model"),
    ("finetune", {"dataset_name": None}, "dataset_name: missing; give --dataset_name"),
    (
        "finetune",
        {"dataset_name": "nobody/nothing"},
        "on the Hub (OfflineModeIsEnabled)); check the name, and unset HF_",
    ),
    ("finetune", {"dataset_name": "{t}/no.jsonl"}, "no.jsonl"),
    ("finetune", {"dataset_name": "{t}/empty.jsonl"}, "empty.jsonl' is empty; give a file"),
    ("finetune", {"dataset_name": "{t}/cut.jsonl"}, "cut.jsonl' line 2 is not JSON"),
    ("finetune", {"dataset_name": "{t}/other.jsonl"}, "other.jsonl' has columns a; it needs text, messages, or"),
    ("finetune", {"dataset_name": "{t}/chat.jsonl"}, "chat template"),
    ("finetune", {"eval_dataset_name": "{t}/no.jsonl"}, "no.jsonl"),
    ("finetune", {"eval_strategy": "steps"}, "give --eval_dataset_name FILE, or eval_strategy no"),
    ("finetune", {"eval_strategy": "epoch", "dataset_test_split": "x"}, "split 'x'"),
    ("finetune", {"retention": "own={w}/replay"}, "retention: 'own' shares 8 rows with the replay"),
    ("finetune", {"retention": "wiki"}, "retention: 'wiki'"),
    ("finetune", {"retention": "w={t}/no.txt"}, "no.txt"),
    ("finetune", {"retention": "w={t}/none.jsonl"}, "retention: 'w' has no text to measure"),
    ("finetune", {"replay_dataset": "{w}/model"}, "'{w}/model' has no manifest.json"),
    ("finetune", {"replay_dataset": None}, "replay_dataset: missing, and replay_objective 'kl' needs it; give rows"),
    ("finetune", {"replay_dataset": "nowhere/"}, "replay_dataset: no file 'nowhere/'; check the path"),
    ("finetune", {"dataset_name": "{t}/no.jsonl"}, "dataset_name: no file '{t}/no.jsonl'; check the path"),
    ("finetune", {"dataset_name": "{t}/ids.jsonl"}, "train_dataset: token id 400, but this model has 320 tokens; use"),
    ("finetune", {"dataset_name": "{t}/one.jsonl"}, "train_dataset: its rows have at most 1 tokens, and nothing to"),
    (
        "finetune",
        {"dataset_name": "{t}/longer.jsonl", "max_length": 199},
        "max_length: rows of 152 tokens, but this model has 128 positions; use at most 128",
    ),
    ("finetune", {"output_dir": "{w}/replay", "dry_run": "true"}, "/replay' already holds replay rows (manifest.json)"),
    ("finetune", {"max_steps": 0}, "max_steps: 0 does not fit; use at least 1, or leave it out to count"),
    ("finetune", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs: 0.0 does not fit"),
    *(
        ("finetune", {name: "nan"}, f"{name}: nan does not fit; use a number")
        for name in ("warmup_steps", "adam_beta1")
    ),
    ("finetune", {"use_peft": "true", "lora_modules_to_save": "nope"}, "lora_modules_to_save: 'nope' is no module of"),
    ("finetune", {"replay_dataset": ""}, "replay_dataset: '' is empty; give a value, or leave it out"),
    ("finetune", {"model": "{t}/bare"}, "model: '{t}/bare' holds no tokenizer; copy the tokenizer files"),
    ("measure", {"model": "{t}/chain"}, "model: '{t}/chain', the base of the adapter '{t}/chain', is itself"),
    ("report", {"runs": "{t}/two"}, "runs: '{t}/two/report.json' compares several models; give the folder of each"),
    ("finetune", {"replay_dataset": "{t}/no"}, "{t}/no"),
    ("finetune", {"replay_dataset": "{t}/empty.jsonl"}, "empty.jsonl' is empty"),
    ("finetune", {"replay_dataset": "{t}/none.jsonl"}, "none.jsonl"),
    ("finetune", {"replay_dataset": "{t}/other.jsonl"}, "it needs text, messages, or prompt"),
    ("finetune", {"replay_dataset": "{t}/numbers.jsonl"}, "numbers.jsonl"),
    ("finetune", {"replay_reference": "cache"}, "replay_reference: 'cache'"),
    ("finetune", {"replay_reference": "adapter"}, "but there is no adapter; use copy, or --use_peft"),
    ("finetune", {"replay_objective": "replace", "replay_share": 1}, "use a share above 0 and below 1"),
    (
        "finetune",
        {"replay_objective": "replace", "per_device_train_batch_size": 1},
        "use a share that leaves both replay and new rows",
    ),
    ("finetune", {"report_to": ["none", "wandb"]}, "wandb: unknown argument"),
    ("finetune", {"start_token": "zzz"}, "start_token: 'zzz'"),
    ("finetune", {"max_length": 0}, "max_length: 0"),
    ("finetune", {"max_length": -5}, "max_length: -5"),
    ("finetune", {"learning_rate": "fast"}, "learning_rate: 'fast' does not fit; use a number"),
    ("finetune", {"learning_rate": "nan"}, "learning_rate"),
    ("finetune", {"resume_from_checkpoint": "{t}/no"}, "is not a whole checkpoint; give a checkpoint-N folder"),
    ("finetune", {"use_peft": "true", "lora_target_modules": "nonsense"}, "nonsense"),
    ("finetune", {"lr_scheduler_type": "foo"}, "foo"),
    ("finetune", {"optim": "foo"}, "foo"),
    ("finetune", {"no_such_flag": 3}, "no_such_flag: unknown argument"),
    ("plan", {"model": "{t}/no"}, "no folder or file"),
    ("plan", {"dataset_name": "{t}/no.jsonl"}, "no.jsonl"),
    ("plan", {"eval_dataset_name": "{t}/no.jsonl"}, "no.jsonl"),
    ("plan", {"retention": "w={t}/no.txt"}, "retention: no file '{t}/no.txt'; check the path"),
    ("plan", {"retention": ["w={w}/wiki.jsonl", "a={w}/wiki.jsonl"]}, "retention_name: choose one of w, a"),
    ("plan", {"max_ref_kl": 0}, "max_ref_kl: 0.0 does not fit; use a number of at least 1e-09"),
    ("plan", {"max_ref_kl": None}, "max_ref_kl: missing; give --max_ref_kl"),
    ("plan", {"lora_ranks": [1, 2, 4]}, "lora_ranks: [1, 2, 4] are too few"),
    ("plan", {"replay_coefs": 1}, "replay_coefs: [1.0] has no 0"),
    ("plan", {"retention": "w="}, "retention: 'w='"),
    ("plan", {"retention_name": "zz"}, "retention_name: choose one of w"),
    ("plan", {"replay_dataset": "{t}/no/"}, "{t}/no"),
    ("plan", {"replay_dataset": "{w}/model"}, "{w}/model"),
    ("plan", {"lora_ranks": 0}, "lora_ranks"),
    ("plan", {"dataset_name": "{t}/other.jsonl"}, "dataset_name: '{t}/other.jsonl' has columns a; it needs text, mess"),
    ("plan", {"eval_dataset_name": "{t}/numbers.jsonl"}, "eval_dataset_name: '{t}/numbers.jsonl' has int64 in 'text'"),
    ("plan", {"dataset_name": "{t}/chat.jsonl"}, "dataset_name: row 1 of the training rows"),
    ("plan", {"retention": "w={t}/other.jsonl"}, "retention: row 1 of '{t}/other.jsonl' has ['a']; it needs text"),
    ("plan", {"lora_target_modules": "nonsense"}, "lora_target_modules: ['nonsense'] does not fit"),
    ("plan", {"replay_coefs": -1}, "replay_coefs"),
    ("plan", {"finetune_config": "{t}/no.yaml"}, "finetune_config: no file '{t}/no.yaml'; check the path"),
    ("pretrain", {"corpus": "nonsense"}, "corpus: 'nonsense' is neither a file nor known; use"),
    ("pretrain", {"corpus": None}, "corpus: missing; give --corpus"),
    ("pretrain", {"corpus": "a.txt=none"}, "corpus: 'a.txt=none' has no share above 0"),
    (
        "pretrain",
        {"corpus": "{t}/chat.jsonl"},
        "corpus: row 1 of '{t}/chat.jsonl': messages need a chat template, and this tokenizer",
    ),
    ("pretrain", {"max_steps": None}, "max_steps: the length is missing; give one of"),
    ("pretrain", {"model_size": "huge"}, "model_size: 'huge' is not known"),
    (
        "pretrain",
        {"adam_beta2_half_life_tokens": 1e6, "adam_beta2": 0.9},
        "adam_beta2_half_life_tokens: 1e+06 and adam_beta2 0.9 exclude each other; drop one",
    ),
    *(
        ("pretrain", {name: 0}, f"{name}: 0 does not fit; use a whole")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    ),
    ("pretrain", {"corpus": "{t}/no.jsonl"}, "no.jsonl"),
    ("pretrain", {"corpus": "synthetic=0.5"}, "corpus: "),
    ("pretrain", {"corpus": "add", "digits": 0}, "digits: 0"),
    ("pretrain", {"model_size": 3}, "model_size: 3"),
    ("pretrain", {"model_size": "1e30"}, "model_size: 1e+30"),
    ("pretrain", {"branching": 99}, "branching: 99"),
    ("pretrain", {"max_tokens": 5}, "max_steps: the length is given twice"),
    ("pretrain", {"resume_from_checkpoint": "{t}/no"}, "resume_from_checkpoint"),
    ("pretrain", {"stop_at_loss": 2, "eval_strategy": "no"}, "stop_at_loss: 2 needs evaluations; set eval_strategy"),
    ("measure", {"retention": "w={w}/model"}, "cannot load '{w}/model' as a dataset in a folder"),
    ("measure", {"retention": None}, "retention: missing; give at least one text as --retention"),
    ("measure", {"retention": "wiki.txt"}, "retention: 'wiki.txt' is not name=file; write e.g."),
    ("measure", {"retention": ["w=a", "w=b"]}, "the name 'w' is given twice; give each text its own"),
    ("measure", {"retention": "w={t}/no.txt"}, "no.txt'; check the path"),
    ("measure", {"retention": "w={t}/latin.txt"}, "latin.txt' is not UTF-8 at byte 3; convert it"),
    ("measure", {"retention": "w={t}/none.jsonl"}, "retention: 'w' has no text to measure; give documents"),
    ("measure", {"new-task": "w={t}/no.txt"}, "no.txt'; check the path"),
    ("measure", {"prompts": "{t}/no.txt"}, "no.txt'; check the path"),
    ("measure", {"model": "{t}/no"}, "model: no folder or file"),
    ("measure", {"output_dir": None}, "output_dir: missing; give --output_dir"),
    ("measure", {"max_length": 4096}, "max_length: 4096"),
    ("measure", {"start_token": "zzz", "max_length": 24}, "start_token: 'zzz'"),
    ("measure", {"base": "{w}/wiki.jsonl"}, "is a file but not a .gguf"),
    ("measure", {"judge": "{t}/no", "refusals": "x={w}/wiki.jsonl"}, "no folder or file"),
    ("measure", {"model_card": "{t}/no/README.md"}, "model_card: "),
    ("report", {"runs": None}, "runs: missing; give at least one folder as --runs"),
    ("report", {"runs": "{t}/no"}, "runs: cannot read '{t}/no' (No such file or directory); give what"),
    ("report", {"runs": "{w}/replay/manifest.json"}, "make it with `retain measure`"),
    ("predict", {"law": "{t}/no.json"}, "law: no file '{t}/no.json'; check the path"),
    ("sweep", {"sweep": "{t}/no.yaml"}, "sweep: no file '{t}/no.yaml'; check the path"),
    ("predict", {"level": 1}, "level: 1"),
    ("predict", {"dataset": "zz", "finetuning_loss": 3}, "takes finetuning_loss"),
]


@pytest.mark.parametrize(
    ("verb", "changes", "expected"),
    [pytest.param(*row, id=f"{row[0]}-{'-'.join(row[1])}-{at}") for at, row in enumerate(FLAGS)],
)
def test_flags_that_cannot_be(world, tmp_path, capsys, verb, changes, expected):
    for name, value in OTHERS.items():
        write(tmp_path / name, value)
    flags = good(verb, world, tmp_path / "out") | changes
    (tmp_path / "bare").mkdir()
    shutil.copy(world / "model" / "config.json", tmp_path / "bare")
    (tmp_path / "chain").mkdir()
    write(
        tmp_path / "chain" / "adapter_config.json",
        {"peft_type": "LORA", "base_model_name_or_path": f"{tmp_path}/chain"},
    )
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "report.json", {"title": "Forgetting report", "runs": []})
    before = contents(world)
    words = [word.format(t=tmp_path, w=world) for word in command(verb, flags)]
    line = refused_whole(words, tmp_path, capsys)
    assert expected.format(t=tmp_path, w=world) in line, line
    assert contents(world) == before


ROW_FILES = [
    *[("sample", "prompts", "{}"), ("plan", "dataset_name", "{}"), ("plan", "eval_dataset_name", "{}")],
    *[("finetune", "dataset_name", "{}"), ("finetune", "eval_dataset_name", "{}"), ("finetune", "retention", "w={}")],
    *[("finetune", "replay_dataset", "{}"), ("plan", "replay_dataset", "{}"), ("merge", "replay_dataset", "{}")],
    *[("measure", "retention", "w={}"), ("measure", "new_task", "n={}"), ("merge", "new_task", "n={}")],
    *[("measure", "prompts", "{}"), ("measure", "train_dataset", "{}"), ("measure", "behaviors", "formats={}")],
    *[("measure", name, "q={}") for name in ("choices", "refusals", "harmless")],
    *[("pretrain", "corpus", "{}"), ("pretrain", "tokenizer_corpus", "{}")],
]


@pytest.mark.parametrize(
    ("verb", "flag", "value", "name"),
    [
        (*row, name)
        for row in ROW_FILES
        for name in ("missing.jsonl", "empty.jsonl", "cut.jsonl", "latin.txt", "other.jsonl")
        if (row[0], name) != ("plan", "other.jsonl")  # which columns rows need its pilots say
    ],
)
def test_an_error_about_rows_names_their_flag(world, tmp_path, capsys, verb, flag, value, name):
    for file, rows in OTHERS.items():
        write(tmp_path / file, rows)
    more = {"sample": {"start": "prompts"}, "pretrain": {"corpus": world / "wiki.jsonl"}}.get(verb, {})
    flags = good(verb, world, tmp_path / "out") | more | {flag: value.format(tmp_path / name)}
    line = refused_whole(command(verb, flags), tmp_path, capsys)
    assert line.startswith(f"retain {verb}: {flag}: ")
    assert name in line


WRITES = {
    "sample": "replay rows", "finetune": "a training run", "pretrain": "a training run", "measure": "a report",
    "report": "a report", "merge": "a merged model", "plan": "a plan", "sweep": "a sweep",
}  # fmt: skip


def test_every_verb_with_a_folder_says_what_it_writes():
    verbs = {name for name in VERBS for kind in load_verb(name).settings if "output_dir" in get_type_hints(kind)}
    assert verbs == WRITES.keys()
    assert set(WRITES.values()) == OUTPUTS.keys()
    files = {file for of_kind in OUTPUTS.values() for file in of_kind}
    assert files >= {MANIFEST, CONFIG_FILE, MERGE_FILE, PILOTS, RESULTS}


def written(file: str) -> Any:
    """The beginning of what a verb writes into a file."""
    return [{"key": "a1"}] if file.endswith(".jsonl") else {"schema": "retain.x/1"}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("verb", WRITES)
def test_the_folder_of_another_verb_is_refused(world, tmp_path, capsys, verb, kind):
    out = tmp_path / "out"
    for file in OUTPUTS[kind]:
        write(out / file, written(file))
        if kind == WRITES[verb]:  # its own, whatever else lies there
            for other in OUTPUTS.values():
                write(out / other[0], written(other[0]))
            check_output_dir(out, kind)
        else:
            line = refused_whole(command(verb, good(verb, world, out)), tmp_path, capsys)
            held = f"already holds {kind} ({file}); choose another folder for {WRITES[verb]}"
            assert line == f"retain {verb}: output_dir: {str(out)!r} {held}"
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("kind", "file"), [(kind, file) for kind in OUTPUTS for file in OUTPUTS[kind] if file != CONFIG_FILE]
)
def test_a_file_of_the_user_is_no_output_and_is_not_written_over(tmp_path, kind, file):
    write(tmp_path / file, [{"accuracy": 0.9}] if file.endswith(".jsonl") else {"name": "site"})
    check_output_dir(tmp_path, next(other for other in OUTPUTS if other != kind))
    with pytest.raises(ValueError, match=f"holds a {file} that retain did not write; choose another folder"):
        check_output_dir(tmp_path, kind)


def test_a_row_that_a_killed_sweep_began_is_its_own(tmp_path):
    (tmp_path / RESULTS).write_bytes(b'{"ke')
    check_output_dir(tmp_path, "a sweep")
    with pytest.raises(ValueError, match="holds a sweep"):
        check_output_dir(tmp_path, "a plan")


def test_a_comparison_is_not_written_over_one_of_its_runs(world, tmp_path, capsys):
    write(tmp_path / "out" / "report.json", {})
    flags = good("report", world, tmp_path / "out") | {"runs": [world, tmp_path / "out"]}
    assert "is one of runs, and its report would be" in refused_whole(command("report", flags), tmp_path, capsys)


BAD_ROWS = [
    [{"text": 3}],
    [{"text": None}],
    [{"text": "a"}, {"text": None}],
    [{"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}],
    [{"messages": "hi"}],
    [{"prompt": "a"}],
    [{"prompt": "a", "completion": 1}],
    [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
    [{"text": ""}, {"text": ""}],
    [{"messages": []}],
]


@pytest.mark.parametrize("rows", BAD_ROWS, ids=str)
def test_training_rows_of_the_wrong_type(world, tmp_path, capsys, rows):
    write(tmp_path / "rows.jsonl", rows)
    flags = good("finetune", world, tmp_path / "out") | {"dataset_name": tmp_path / "rows.jsonl"}
    assert "rows.jsonl" in refused_whole(command("finetune", flags), tmp_path, capsys)


YAMLS: list[tuple[str, dict[str, Any], str]] = [
    ("finetune", {"replay_dataset": ["replay"]}, "replay_dataset: ['replay'] is not"),
    ("finetune", {"replay_dataset": 5}, "replay_dataset: 5 is not text; write it in quotes"),
    ("finetune", {"replay_dataset": True}, "replay_dataset: True is not"),
    ("finetune", {"output_dir": 5}, "output_dir: 5 is not"),
    ("finetune", {"max_steps": 2.5}, "max_steps: 2.5 is not a whole number"),
    ("finetune", {"use_peft": 3}, "use_peft: 3 is not true or false"),
    ("finetune", {"allow_off_policy_replay": 1}, "allow_off_policy_replay: 1 is not"),
    ("finetune", {"adam_beta2_half_life_tokens": True}, "adam_beta2_half_life_tokens: True is not"),
    ("finetune", {"eval_dataset_name": 5}, "eval_dataset_name: 5 is not"),
    ("finetune", {"retention": {"w": "wiki.jsonl"}}, "retention: {'w': 'wiki.jsonl'} is not a list"),
    ("finetune", {"retention": [3]}, "retention"),
    ("finetune", {"start_token": [3]}, "start_token: [3] is not"),
    ("finetune", {"replay_coef": "strong"}, "replay_coef"),
    ("finetune", {"replay_coef": [1]}, "replay_coef"),
    ("finetune", {"replay_coef": True}, "replay_coef"),
    ("finetune", {"replay_objective": 3}, "replay_objective"),
    ("finetune", {"replay_objective": None}, "replay_objective"),
    ("finetune", {"per_device_replay_batch_size": 1.5}, "per_device_replay_batch_size"),
    ("finetune", {"max_ref_kl": {"w": 1}}, "max_ref_kl"),
    ("finetune", {"stop_at_loss": "x"}, "stop_at_loss"),
    ("finetune", {"learning_rate": [1e-3]}, "learning_rate: [0.001] is not a number"),
    ("finetune", {"learning_rate": "fast"}, "learning_rate: 'fast' does not fit; use a number"),
    ("finetune", {"max_length": "24.5"}, "max_length"),
    ("finetune", {"model_name_or_path": 5}, "model_name_or_path"),
    ("finetune", {"dataset_name": ["rows.jsonl"]}, "dataset_name"),
    ("finetune", {"replay_config": 1}, "replay_config"),
    ("finetune", {"packing": "maybe"}, "packing"),
    ("sample", {"num_rows": 2.5}, "num_rows: 2.5 is not"),
    ("sample", {"num_rows": "many"}, "num_rows"),
    ("sample", {"output_dir": {"a": 1}}, "output_dir"),
    ("sample", {"output_dir": 5}, "output_dir"),
    ("sample", {"start": 3}, "start: 3 is not"),
    ("sample", {"start_token": [1]}, "start_token"),
    ("sample", {"prompts": 3, "start": "prompts"}, "prompts: 3 is not"),
    ("sample", {"attn_implementation": 5}, "attn_implementation"),
    ("sample", {"trust_remote_code": "perhaps"}, "trust_remote_code"),
    ("sample", {"env": 5}, "env"),
    ("export", {"replay_dataset": 5}, "replay_dataset"),
    ("export", {"output": ["x"]}, "output"),
    ("export", {"format": ["text"]}, "format"),
    ("measure", {"retention": [1]}, "retention: [1] is not"),
    ("measure", {"model": [3]}, "model: [3] is not a list"),
    ("measure", {"max_length": "long"}, "max_length"),
    ("measure", {"max_forgetting": [1]}, "max_forgetting"),
    ("plan", {"model": 5}, "model"),
    ("plan", {"max_ref_kl": "small"}, "max_ref_kl"),
    ("plan", {"lora_ranks": ["a", 2]}, "lora_ranks: ['a', 2] is not"),
    ("plan", {"lora_ranks": "4"}, "lora_ranks: 4 is not a list; write [a, b]"),
    ("sweep", {"cores_per_run": 1.5}, "cores_per_run: 1.5 is not"),
    ("pretrain", {"corpus": 3}, "corpus: 3 is not"),
    ("pretrain", {"model_size": [1]}, "model_size"),
    ("pretrain", {"num_states": "x"}, "num_states"),
    ("fit", {"runs": [3]}, "runs"),
    ("report", {"runs": 3}, "runs"),
    ("report", {"title": ["a"]}, "title"),
]


@pytest.mark.parametrize(
    ("verb", "changes", "expected"),
    [pytest.param(*row, id=f"{row[0]}-{'-'.join(row[1])}-{at}") for at, row in enumerate(YAMLS)],
)
def test_yaml_of_another_type(world, tmp_path, capsys, verb, changes, expected):
    flags = good(verb, world, tmp_path / "out")
    flags = {name: value if isinstance(value, (int, float)) else str(value) for name, value in flags.items()}
    write(tmp_path / "config.yaml", flags | changes)
    line = refused_whole([verb, "--config", str(tmp_path / "config.yaml")], tmp_path, capsys)
    assert expected in line, line
