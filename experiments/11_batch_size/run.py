"""Is the best half-life of Adam's second moment constant in tokens over batch sizes? One command; finished runs stay.

python experiments/11_batch_size/run.py [--scale laptop|gpu|paper] [--report]
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from batch_report import draw, table, verdict  # noqa: E402
from harness import Results  # noqa: E402
from scales import ask, device_name, show  # noqa: E402
from small_base import CACHE  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402

from retain.half_life import apply_half_life, half_life_of_beta2  # noqa: E402
from retain.lab.config import PretrainConfig  # noqa: E402
from retain.lab.models import make_config, make_model  # noqa: E402
from retain.lab.pretrain import PretrainArguments, make_trainer, open_corpus  # noqa: E402

LONGEST_STEP = 8  # half-lives: beta2 is .004 there


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a study takes; the defaults are one GPU's.

    Half-lives go up from that of `first_beta2` at one row a step by the factor between batch sizes, so that a fixed
    beta2 is a diagonal of the same grid. The rates are of one row a step; others have them times √rows.
    """

    corpus: str = "synthetic"
    model_size: str = "430k"
    num_states: int = 256
    vocab_size: int = 64
    branching: int = 4
    max_length: int = 128
    tokens: float = 8.4e6
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256)
    factor: int = 4
    first_beta2: float = 0.95
    half_lives: int = 7
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: int = 3

    def half_lives_at(self, batch_size: int) -> list[float]:
        """Tokens, the same at every batch size but for those far below a step, at which nothing is remembered."""
        least = half_life_of_beta2(self.first_beta2, min(self.batch_sizes) * self.max_length)
        every = [round(least * self.factor**place, 3) for place in range(self.half_lives)]
        return [one for one in every if batch_size * self.max_length <= LONGEST_STEP * one]


SCALES = {
    "laptop": Scale(
        model_size="6400", num_states=32, vocab_size=32, max_length=64, tokens=2**17, batch_sizes=(1, 4, 16),
        half_lives=5, rates=(3e-3, 1e-2),
    ),
    "gpu": Scale(),
    "paper": Scale(
        corpus="english", model_size="32M", vocab_size=4096, max_length=512, tokens=6e8,
        batch_sizes=(1, 4, 16, 64, 256, 1024), half_lives=9, rates=(3e-5, 1e-4, 3e-4, 1e-3),
    ),
}  # fmt: skip


def train(scale: Scale, *, batch_size: int, half_life: float, learning_rate: float, seed: int) -> dict[str, Any]:
    """Pretrain by `retain pretrain`'s own parts and measure the held-out loss at the end."""
    config = PretrainConfig(
        corpus=scale.corpus, model_size=scale.model_size, num_states=scale.num_states, vocab_size=scale.vocab_size,
        branching=scale.branching, max_length=scale.max_length,
    )  # fmt: skip
    folder, corpus = CACHE / f"run-batch-{seed}", open_corpus(config, seed)
    shutil.rmtree(folder, ignore_errors=True)
    args = PretrainArguments(
        output_dir=str(folder), max_steps=round(scale.tokens / batch_size / scale.max_length),
        learning_rate=learning_rate, per_device_train_batch_size=batch_size, eval_strategy="no",
        logging_strategy="no", save_strategy="no",
        disable_tqdm=True, use_cpu=not torch.accelerator.is_available(), seed=seed,
    )  # fmt: skip
    args.train_sampling_strategy = "sequential"
    apply_half_life(args, half_life, scale.max_length)
    shape = make_config(config.model_size, vocab_size=len(corpus.tokenizer), max_length=corpus.length)
    trainer = make_trainer(args, config, corpus, make_model(shape, seed), seed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    shutil.rmtree(folder, ignore_errors=True)
    found = {"loss": round(loss, 5) if math.isfinite(loss) else None, "beta2": args.adam_beta2}
    return found | {"num_steps": args.max_steps, **corpus.facts, "device": device_name()}


def make_cell(scale: Scale, batch_size: int, half_life: float, fixed: dict[str, Any], results: Results) -> None:
    """Every rate with every seed: which is best is a matter of their mean."""
    for rate in scale.rates:
        for seed in range(scale.seeds):
            cell = {"batch_size": batch_size, "half_life": half_life, "seed": seed}
            cell["learning_rate"] = round(rate * math.sqrt(batch_size), 6)
            results.make(cell | fixed, lambda cell=cell: train(scale, **cell))


def main(arguments: Sequence[str] | None = None) -> None:
    asked = ask(__doc__, SCALES, arguments, only="batch_sizes")
    scale = SCALES[asked.scale]
    own = ("seeds", "batch_sizes", "factor", "first_beta2", "half_lives", "rates")
    fixed = {name: value for name, value in asdict(scale).items() if name not in own}
    results = Results(HERE / "results.jsonl", asked.scale)
    for batch_size in () if asked.report else asked.batch_sizes or sorted(scale.batch_sizes, reverse=True):
        for half_life in scale.half_lives_at(batch_size):
            make_cell(scale, batch_size, half_life, fixed, results)
    rows = [row for row in results.rows.values() if fixed.items() <= row["settings"].items()]
    show(HERE, asked.scale, f"{table(rows)}\n\n**{verdict(rows)}**", lambda path: draw(rows, path))


if __name__ == "__main__":
    main()
