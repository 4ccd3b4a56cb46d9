"""`retain plan` on the small base, by its command line, and the recommended runs made afterwards."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.corpora import Texts, passages
from experiments.finetunes import StudyResults
from experiments.study_05_law.runs import now
from retain.cli.main import main
from retain.training.run_files import read_run

BUDGETS = (0.1, 0.3, 0.04)
SEEDS = (11, 12, 13)  # no pilot had them, and none was seen when pilots got seeds of their own
ROWS_OF_A_FILE = 8
PLAN = [
    *("--pilot_steps", "60", "--learning_rate", "5e-3", "--lora_alpha", "4", "--max_length", "64", "--eval_rows", "64"),
    *("--per_device_train_batch_size", "16", "--per_device_replay_batch_size", "4", "--retention_max_documents", "48"),
]


@dataclass(frozen=True)
class Files:
    """The case's data as a user would have them."""

    train: Path
    held_out: Path
    prose: Path


def write_files(texts: Texts, folder: Path) -> Files:
    """Verilog to train on and held out, and prose: JSONL of texts."""
    folder.mkdir(parents=True, exist_ok=True)

    def cut(files: list[str]) -> list[str]:
        return [row for text in files for row in passages(text, r"\n", "\n", 300)[1 : 1 + ROWS_OF_A_FILE]]

    rows = {
        "verilog": cut(texts.new_task),
        "held-out": cut(texts.held_out_new_task),
        "prose": texts.held_out_prose[:48],
    }
    for name, of in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in of))
    return Files(*(folder / f"{name}.jsonl" for name in rows))


def planned(base: Path, files: Files, folder: Path, budget: float) -> dict[str, Any]:
    """What `retain plan` says; a second budget finds the pilots made."""
    flags = ["--model", str(base), "--dataset_name", str(files.train), "--eval_dataset_name", str(files.held_out),
            "--retention", f"prose={files.prose}", "--replay_dataset", str(base / "replay-2560x64-0"),
            "--output_dir", str(folder), "--max_ref_kl", f"{budget:g}", *PLAN]  # fmt: skip
    if main(["plan", *flags]):
        raise ValueError("plan: failed; see the line above")
    found = json.loads((folder / "plan.json").read_text())
    keep = ("feasible", "recommendation", "best_of_each_coefficient", "not_identified", "cost", "command", "level")
    return {"predicted": now(), "budget": budget, **{name: found[name] for name in keep}}


def made(plan: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """The recommended command with a seed; what it ended at."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [*shlex.split(plan["command"])[1:], "--output_dir", str(folder), "--disable_tqdm", "true"]
    began = now()
    if main([*command, "--seed", str(seed)]):
        raise ValueError("finetune: failed; see the line above")
    last = [row for row in read_run(folder)["trajectory"] if "eval_loss" in row][-1]
    one = plan["recommendation"]
    replay = f"coefficient {one['replay_coef']:g}" if one["replay_coef"] else "no replay"
    said = {name: one[name] for name in ("finetuning_loss", "forgetting_loss")}
    words = f"rank {one['rank']}, {one['num_steps']} steps, {replay}"
    return {
        "began": began,
        "planned": {"predicted": plan["predicted"], "budget": plan["budget"], "words": words, **said},
        "measured": {"finetuning_loss": last["eval_loss"], "forgetting_loss": last["retention/prose/ref_kl"]},
    }


def plan_and_run(base: Path, texts: Texts, results: StudyResults, cache: Path) -> None:
    """Every budget is planned, then its recommendation is run, with seeds that no pilot had."""
    files = write_files(texts, cache / "plan-law" / "texts")
    for budget in BUDGETS:
        key = {"plan": budget, "flags": PLAN}
        plan = results.make(key, lambda budget=budget: planned(base, files, cache / "plan-law" / "plan", budget))
        for seed in SEEDS if plan["feasible"] else ():
            results.make(
                {**key, "seed": seed}, lambda plan=plan, seed=seed: made(plan, seed, cache / "plan-law" / "run")
            )
