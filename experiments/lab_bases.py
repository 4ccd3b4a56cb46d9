"""Bases of the laboratory, pretrained once into the cache, and benches that finetune them on another language or text.

A base is the result of `retain pretrain`'s own parts; checkpoints on the way stand for shorter runs where the learning
rate is constant. A bench is what `finetunes.finetune` takes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from experiments.corpora import CACHE
from experiments.finetunes import Bench, Rows, written_by
from retain import ReplayDataset, load_model, load_tokenizer
from retain.data.rows import token_documents
from retain.files import write_json
from retain.lab.models import counted_size_of, make_config, make_model
from retain.lab.pretrain import Corpus, PretrainArguments, PretrainConfig, make_trainer, open_corpus
from retain.lab.runner import locked
from retain.lab.streams import RowFunction, Stream, mixture
from retain.models.description import default_device, model_fingerprint
from retain.training.beta2_half_life import tokens_per_step

logger = logging.getLogger("experiments")
LAB = CACHE / "lab"
FACTS = "lab_base.json"  # written last into a base's folder


class Snapshots(TrainerCallback):
    """Evaluates and keeps the model at some steps."""

    def __init__(self, steps: dict[int, Path], tokenizer: Any) -> None:
        self.steps, self.tokenizer = steps, tokenizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step in self.steps

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if folder := self.steps.get(state.global_step):
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def pretrain(
    config: PretrainConfig,
    tokens_per_param: Sequence[float],
    *,
    seed: int = 0,
    mixed_with: tuple[float, PretrainConfig] | None = None,
    **arguments: Any,
) -> dict[float, dict[str, Any]]:
    """A base at each number of tokens per parameter, from one run: its `folder`, `loss`, `num_params`, `curve`.

    Args:
        config: corpus, size and rows; its own length is not read.
        mixed_with: the share of rows that come from another corpus of endless rows; held-out rows are the first's.
        arguments: of `PretrainArguments`; the learning rate is constant after warm-up unless they say otherwise.
    """
    settings = [asdict(config), sorted(tokens_per_param), seed, arguments]
    if mixed_with is not None:
        settings.append([mixed_with[0], asdict(mixed_with[1])])
    key = json.dumps(settings, sort_keys=True, default=str)
    root = LAB / hashlib.sha256(key.encode()).hexdigest()[:12]
    with locked(root):  # the process that comes first makes it, the others wait
        if not (root / FACTS).exists():
            _pretrain(config, sorted(tokens_per_param), seed, root, arguments, mixed_with)
    found = json.loads((root / FACTS).read_text())
    return {row["tokens_per_param"]: row | {"folder": root / row["folder"], "curve": found["curve"]}
            for row in found["bases"]}  # fmt: skip


def _pretrain(
    config: PretrainConfig, wanted: list[float], seed: int, root: Path, arguments: dict[str, Any], mixed_with: Any
) -> None:
    corpus = open_corpus(config, seed)
    shape = make_config(config.model_size, vocab_size=len(corpus.tokenizer), max_length=corpus.length)
    size = counted_size_of(shape)
    how = {"lr_scheduler_type": "constant_with_warmup", "eval_steps": 0.02, "save_strategy": "no", "disable_tqdm": True}
    how["use_cpu"] = default_device() == "cpu"
    args = PretrainArguments(output_dir=str(root / "run"), seed=seed, **(how | arguments))
    args.train_sampling_strategy = "sequential"
    steps = {tpp: max(1, round(tpp * size / tokens_per_step(args, corpus.length))) for tpp in wanted}
    args.max_steps = max(steps.values())
    if mixed_with is not None:
        share, other = mixed_with[0], open_corpus(mixed_with[1], seed)
        parts = [(1 - share, corpus.rows), (share, other.rows)]
        corpus = replace(corpus, rows=mixture(parts, round(args.max_steps * tokens_per_step(args, 1)), seed))
    trainer = make_trainer(args, config, corpus, make_model(shape, seed), seed)
    trainer.add_callback(Snapshots({step: root / f"at-{step}" for step in steps.values()}, corpus.tokenizer))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = {row["step"]: round(row["eval_loss"], 6) for row in trainer.state.log_history if "eval_loss" in row}
    per_param = tokens_per_step(args, corpus.length) / size
    bases = [
        {"tokens_per_param": tpp, "folder": f"at-{step}", "loss": losses[step], "num_params": size,
         "num_steps": step, **corpus.facts}
        for tpp, step in steps.items()
    ]  # fmt: skip
    curve = [[round(step * per_param, 4), loss] for step, loss in sorted(losses.items())]
    write_json(root / FACTS, {"bases": bases, "curve": curve})
    shutil.rmtree(root / "run", ignore_errors=True)
    logger.info("%s: %d parameters, losses %s", config.corpus, size, [base["loss"] for base in bases])


def open_lab_bench(
    folder: Path, new: Corpus, old: Corpus, *, num_train: int, num_replay: int, held_out: int = 128, seed: int = 0
) -> Bench:
    """A base with the rows of a new language or text, the old one's held-out rows, and replay that the base writes.

    Args:
        num_train: rows of the new text, none twice unless it is short.
        num_replay: rows that the base writes from its document start at temperature 1; none where 0.
    """
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder), dtype="float32", device=default_device())
    drawn = written_by(model, [tokenizer.bos_token_id] * num_replay, new.length, 7_000 + seed)
    stream: RowFunction = new.stream(num_train, 1_000 + seed)
    documents = token_documents([row.tolist() for row in old.held_out[:held_out]], tokenizer)
    return Bench(
        folder=folder,
        tokenizer=tokenizer,
        train=Stream(stream, num_train),
        new_task=Rows(new.held_out[:held_out].tolist()),
        retention={"old": documents},
        replay=ReplayDataset.from_rows(drawn, "self-generated") if drawn else None,
        fingerprint=model_fingerprint(model),
    )
