"""Safe by default: nothing is unpickled or evaluated, no remote code runs, and local work needs no network."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_texts, save_model

SOURCE = Path(__file__).parents[1] / "src" / "retain"
FILES = sorted(SOURCE.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls that may run what a file says.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "pd.read_pickle", "os.system", "os.popen", "safe_globals", "torch.serialization.add_safe_globals",
}  # fmt: skip


def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_nothing_is_unpickled_or_evaluated(path):
    tree = ast.parse(path.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert imported.isdisjoint(UNPICKLERS)
    assert calls(path).isdisjoint(FORBIDDEN)
    shells = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and any(word.arg == "shell" for word in node.keywords)
    ]
    assert not shells


def test_the_check_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\nx = torch.load('a')\neval('1')\n")
    assert calls(bad) & FORBIDDEN == {"torch.load", "eval"}


def test_remote_code_is_run_only_where_asked(tmp_path, capsys):
    """A checkpoint that names code of its own is refused in one line; its code does not run."""
    from retain.cli.main import main

    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    arguments = ["--model", str(folder), "--num_rows", "2", "--output_dir", str(tmp_path / "out")]
    assert main(["sample", *arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "brings its own code; read it, and give --trust_remote_code true if you trust it" in error
    assert not (tmp_path / "ran").exists()


class Makes:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickled_checkpoint_with_code_in_it_does_not_run(tmp_path, capsys):
    """`pytorch_model.bin` is a pickle: transformers reads it with weights only, or not at all."""
    import pickle

    from retain.cli.main import main

    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Makes(tmp_path / "ran")}))
    arguments = ["--model", str(folder), "--num_rows", "2", "--output_dir", str(tmp_path / "out")]
    assert main(["sample", *arguments]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run with a checkpoint after its first step of two, and the command that made it, but for its folder."""
    from retain.cli.main import main

    root = tmp_path_factory.mktemp("begun")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(8)))
    flags = {"model_name_or_path": save_model(root / "model"), "dataset_name": root / "rows.jsonl", "max_length": 24}
    flags |= {"max_steps": 2, "save_steps": 1, "use_cpu": "true", "bf16": "false", "report_to": "none"}
    flags |= {"replay_coef": 0, "disable_tqdm": "true", "per_device_train_batch_size": 2}
    arguments = ["finetune", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))]
    assert main([*arguments, "--output_dir", str(root / "out")]) == 0
    return root / "out", arguments


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_run_that_goes_on_runs_no_code_of_its_checkpoint(begun, tmp_path, capsys, name):
    """What the trainer itself keeps beside the weights is pickled by torch; it is read as data, or not at all."""
    import torch

    from retain.cli.main import main

    shutil.copytree(begun[0], tmp_path / "out")
    arguments = [*begun[1], "--output_dir", str(tmp_path / "out")]
    file = tmp_path / "out" / "checkpoint-1" / name
    assert file.exists()
    torch.save({"x": Makes(tmp_path / "ran")}, file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "it would run"
    (tmp_path / "ran").rmdir()
    capsys.readouterr()
    code = main([*arguments, "--resume_from_checkpoint", str(file.parent)])
    assert code == (0 if name == "training_args.bin" else 1)
    assert not (tmp_path / "ran").exists()
    if code:
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


# Read by every Python that begins.
NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError(f"the network was asked for: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""


def without_network(folder: Path) -> dict[str, str]:
    """Environment of Pythons that are refused the network."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return {"PYTHONPATH": str(folder)}


EVERY_LINE = """
import sys
from retain.cli.main import main

for line in sys.argv[1:]:
    code = main(line.split("|"))
    if code:
        sys.exit(f"{line}: exit code {code}")
"""


def run_python(code: str, environment: dict[str, str]) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stderr


@pytest.mark.program
def test_local_work_asks_for_no_network(tmp_path):
    """Every verb but `plan` and `sweep` (tests/cli/test_sweep.py), with every way out closed and no HF_HUB_OFFLINE."""
    folder = save_model(tmp_path / "model")
    for name, seed in (("train", 0), ("wiki", 1)):
        rows = [json.dumps({"text": text}) for text in make_texts(16, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    flags = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 32, "report_to": "none", "bf16": "false"}
    flags |= {"use_cpu": "true", "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1}
    train = "|".join(f"--{name}|{value}" for name, value in flags.items())
    work = tmp_path
    lines = [
        f"sample|--model|{folder}|--num_rows|4|--max_length|32|--output_dir|{work}/replay",
        f"finetune|--model|{folder}|--dataset_name|{work}/train.jsonl|--output_dir|{work}/out|{train}"
        f"|--replay_dataset|{work}/replay|--retention|wiki={work}/wiki.jsonl|--eval_dataset_name|{work}/wiki.jsonl",
        f"measure|--base|{folder}|--model|{work}/out|--retention|wiki={work}/wiki.jsonl|--output_dir|{work}/report"
        "|--max_length|32|--max_new_tokens|4",
        f"report|--runs|{work}/report|--output_dir|{work}/page",
        f"export|{work}/replay|--output|{work}/replay.jsonl",
        f"fit|{work}/out/metrics.jsonl|--form|linear|--num_resamples|9|--output|{work}/law.json",
        f"predict|{work}/law.json|--finetuning_loss|3",
        f"pretrain|--corpus|synthetic|--model_size|20000|--max_steps|2|--use_cpu|true|--output_dir|{work}/small",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= without_network(tmp_path / "path")
    command = [sys.executable, "-c", EVERY_LINE, *lines]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the network was asked for" not in done.stdout + done.stderr
    assert (work / "page" / "report.html").exists()
    asks = "import socket; socket.create_connection(('localhost', 9))"
    assert "the network was asked for" in run_python(asks, environment)  # the check can fail
