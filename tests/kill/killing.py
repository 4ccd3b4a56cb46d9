"""Runs of `retain` that are killed, and what must be equal in the end; shared by the tests of this folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_texts, save_model

CHAIN = 5  # kills of one run before it is let through and compared
FRESH = 5  # every so many kills is of a process that imports everything itself
TIMES = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(\+\d\d:\d\d)?")
TAGS = re.compile(r"(?:^- [\w-]+\n)+", re.MULTILINE)
# Of a log row: what takes time; and transformers' mean over the steps of the last process alone.
NOT_COMPARED = re.compile(r"(_runtime|_per_second)$|^train_")
OF_COMMAND = ("resume_from_checkpoint", "logging_dir", "run_name", "eval_on_start")
TRAIN = {
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_length": 24, "max_steps": 8,
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "logging_steps": 1,
    "save_steps": 2, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 1e-3,
    "disable_tqdm": True,
}  # fmt: skip


@dataclasses.dataclass
class Kind:
    """A command that is killed: its flags without the output folder, and whether it goes on by a flag."""

    name: str
    argv: list[str]
    resumes: bool = False


def flags(**given: Any) -> list[str]:
    words = []
    for name, value in given.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def make_world(root: Path) -> Path:
    """Models and rows for every verb."""
    save_model(root / "model")
    save_model(root / "tuned", seed=1)
    for name, count, seed in (("rows", 24, 1), ("held", 8, 2)):
        texts = make_texts(count, seed)
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "wiki.txt").write_text("\n\n".join(make_texts(8, 3)))
    (root / "news.txt").write_text("\n\n".join(make_texts(8, 4)))
    common = {"model_name_or_path": str(root / "model"), "num_rows": 16, "max_length": 24, "rows_per_shard": 4}
    (root / "sweep.yaml").write_text(json.dumps({"verb": "sample", "common": common, "grid": {"seed": [0, 1]}}))
    return root


def make_kinds(w: Path) -> list[Kind]:
    sample = ["sample", *flags(model_name_or_path=w / "model", num_rows=48, rows_per_shard=4, max_length=64)]
    sample += flags(per_device_batch_size=4, preview=2)
    tune = ["finetune", *flags(model_name_or_path=w / "model", dataset_name=w / "rows.jsonl", **TRAIN)]
    tune += flags(eval_dataset_name=w / "held.jsonl", retention=[f"wiki={w}/wiki.txt", f"news={w}/news.txt"])
    lora = ["--use_peft", *flags(lora_r=4, lora_dropout=0.1, lora_target_modules="all-linear")]
    own = flags(replay_dataset="self", replay_num_rows=16)
    measure = ["measure", *flags(base=w / "model", model=w / "tuned", new_task=f"new={w}/held.jsonl", max_length=48)]
    measure += flags(retention=[f"wiki={w}/wiki.txt", f"news={w}/news.txt"], max_new_tokens=16, num_resamples=200)
    pretrain = ["pretrain", *flags(corpus="synthetic", num_states=16, vocab_size=16, branching=3, max_length=16)]
    pretrain += flags(model_size=20000, max_steps=20, use_cpu=True, disable_tqdm=True, eval_rows=16)
    pretrain += flags(per_device_train_batch_size=4)
    return [
        Kind("sample", [*sample, "--store_reference", "none"]),
        Kind("sample --store_reference hidden", [*sample, "--store_reference", "hidden"]),
        Kind("finetune, full, its own replay", [*tune, *own], resumes=True),
        Kind("finetune, full, beside an unprotected run", [*tune, *own, "--compare_plain", "true"], resumes=True),
        Kind("finetune, LoRA", [*tune, *lora, *flags(replay_dataset=w / "stored")], resumes=True),
        Kind("finetune, LoRA, budget", [*tune, *lora, *own, *flags(max_ref_kl=0.01)], resumes=True),
        Kind("finetune, full, budget, stored predictions",
             [*tune, *flags(replay_dataset=w / "stored", max_ref_kl=0.01)], resumes=True),
        Kind("finetune, full, stored predictions", [*tune, *flags(replay_dataset=w / "stored")], resumes=True),
        Kind("measure", measure),
        Kind("sweep", ["sweep", *flags(sweep=w / "sweep.yaml", num_workers=2)]),
        Kind("pretrain", pretrain, resumes=True),
    ]  # fmt: skip


class Server:
    """One process that has imported everything, and forks those that are killed."""

    def __init__(self, root: Path) -> None:
        self.root, began = root, time.monotonic()
        command = [sys.executable, str(Path(__file__).parent / "server.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"
        self.startup = time.monotonic() - began

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(
        self, argv: list[str], folder: Path, kill_after: float | None = None, number: int = signal.SIGKILL, **job: Any
    ) -> dict[str, Any]:
        """A forked process: `code`, `events`, `seconds`, and `said`; killed after so many seconds."""
        log = self.root / "log.txt"
        job |= {"argv": argv, "folder": str(folder), "log": str(log), "environment": environment(folder)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = json.loads(self._line())["pid"]
        timer = threading.Timer(kill_after, kill, (pid, number)) if kill_after is not None else None
        if timer:
            timer.start()
        found = json.loads(self._line())
        if timer:
            timer.cancel()
        return {**found, "said": log.read_text(errors="replace")}

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def environment(folder: Path) -> dict[str, str]:
    """What is remembered lies within the folder of the run, so that it is killed and compared with it."""
    return {"RETAIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run_fresh(
    argv: list[str], folder: Path, kill_after: float, log: Path, number: int = signal.SIGKILL
) -> dict[str, Any]:
    """`python -m retain …` as a user starts it, killed after so many seconds."""
    command = [sys.executable, "-m", "retain", *argv]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment(folder)}
        )
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    return {"code": process.wait(), "said": log.read_text(errors="replace")}


# What is compared


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file of a run by its path: bytes, or for files that tell times what they say beside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in (".lock", "training_args.bin") or "/logs/" in f"/{name}":
            continue
        assert not path.name.startswith("."), f"a temporary file is left: {name}"
        found[name] = content(path)
    return found


def content(path: Path) -> Any:
    if path.name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        return digest(repr(plain(torch.load(path, weights_only=False))).encode())
    if path.suffix == ".jsonl":
        rows = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        return sorted(rows, key=lambda row: row["key"]) if path.name == "results.jsonl" else rows  # as runs end
    if path.suffix == ".json":
        found = timeless(json.loads(path.read_text()))
        if path.name == "adapter_config.json":  # PEFT keeps these in a set, whose order is each Python's own
            found["target_modules"] = sorted(found["target_modules"])
        return found
    if path.name == "README.md":  # a model card, whose tags TRL keeps in a set, too
        told = TIMES.sub("", path.read_text())
        return TAGS.sub(lambda tags: "".join(sorted(tags[0].splitlines(keepends=True))), told)
    if path.suffix in (".md", ".html", ".txt"):
        return TIMES.sub("", path.read_text())
    return digest(path.read_bytes())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plain(value: Any) -> Any:
    """Tensors and arrays as bytes, so that they compare to the last bit."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), digest(value.contiguous().numpy().tobytes())]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), digest(value.tobytes())]
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        told = {"created", "seconds", "resumed", *OF_COMMAND}
        kept = {name: timeless(entry) for name, entry in value.items() if not NOT_COMPARED.search(name)}
        anew = {name for name, entry in kept.items() if name.endswith("num_tokens") and isinstance(entry, float)}
        return {name: entry for name, entry in kept.items() if name not in told | anew}  # TRL counts a process's tokens
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def differences(one: dict[str, Any], other: dict[str, Any], places: tuple[str, str]) -> list[str]:
    """Names of files that are not the same; the folders' own names are taken out of them."""
    lines = [f"only undisturbed: {name}" for name in one.keys() - other.keys()]
    lines += [f"only killed: {name}" for name in other.keys() - one.keys()]
    for name in one.keys() & other.keys():
        texts = [json.dumps(found[name]).replace(place, "") for found, place in zip((one, other), places, strict=True)]
        if texts[0] != texts[1]:
            at = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
            lines.append(
                f"{name}: {texts[0][max(0, at - 60) : at + 60]!r} against {texts[1][max(0, at - 60) : at + 60]!r}"
            )
    return lines


# Killing


class Killer:
    """Kills one kind of run again and again, and compares what comes of it with an undisturbed run."""

    def __init__(self, server: Server, kind: Kind, root: Path, seed: int) -> None:
        self.server, self.kind, self.root = server, kind, root
        self.rng = np.random.default_rng(seed)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.kills, self.late, self.compared = 0, 0, 0
        self.codes: list[str] = []
        whole = self._run(root / "whole", False)
        assert whole["code"] == 0, whole["said"][-2000:]
        self.seconds, self.events, self.whole = whole["seconds"], whole["events"], snapshot(root / "whole")

    def _argv(self, folder: Path, again: bool) -> list[str]:
        resume = ["--resume_from_checkpoint", "true"] if again and self.kind.resumes else []
        return [*self.kind.argv, *resume, "--output_dir", str(folder / "out")]

    def _run(self, folder: Path, again: bool, **how: Any) -> dict[str, Any]:
        return self.server.run(self._argv(folder, again), folder, **how)

    def kill_once(self, folder: Path, again: bool) -> bool:
        """Begin, or go on; whether the process was killed before it ended."""
        number = self.kills + self.late
        if number % FRESH == FRESH - 1:
            after = self.rng.uniform(0.05, 0.8 * self.server.startup + self.seconds)
            found = run_fresh(self._argv(folder, again), folder, after, self.root / "fresh.txt")
        elif number % 2:
            found = self._run(folder, again, kill_after=self.rng.uniform(0, self.seconds))
        else:
            after = self.rng.choice([0.0, self.rng.uniform(0, 0.005)])
            found = self._run(folder, again, event=int(self.rng.integers(1, self.events + 1)), after=float(after))
        killed = found["code"] == -signal.SIGKILL
        assert killed or found["code"] == 0, found["said"][-3000:]
        self.kills, self.late = self.kills + killed, self.late + (not killed)
        return killed

    def chain(self, most: int) -> None:
        """One run, killed up to so many times, let through in the end, and compared."""
        folder = self.root / f"killed-{self.compared}"
        kills = 0
        while kills < most:
            if not self.kill_once(folder, kills > 0):
                break
            kills += 1
        if kills == most:
            done = self._run(folder, kills > 0)
            assert done["code"] == 0, done["said"][-3000:]
        found = differences(self.whole, snapshot(folder), (str(self.root / "whole"), str(folder)))
        assert not found, (self.kind.name, kills, found[:5])
        self.compared += 1
        shutil.rmtree(folder)
