"""The verb `pretrain`: train a small model from scratch with `transformers.Trainer` into an ordinary model folder.

The length is set in steps, tokens, tokens per parameter, or by a target loss. Rows come in the order of their numbers,
so a killed run that resumes from its last checkpoint ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from retain import choose_start_token, versions
from retain.checks import setting
from retain.data.rows import is_local_file, packed_rows, read_rows, row_text
from retain.files import write_json
from retain.lab.languages import Language
from retain.lab.models import counted_size_of, make_config, make_model
from retain.lab.streams import RowFunction, Stream, mixture, shuffled
from retain.lab.tasks import TASKS, DigitTask, digit_tokenizer
from retain.lab.tokenizers import train_tokenizer, word_tokenizer
from retain.models.description import num_parameters
from retain.training.beta2_half_life import apply_half_life, check_half_life, tokens_per_step
from retain.training.config import StoppingConfig, check_arguments
from retain.training.run_files import RunFilesCallback
from retain.training.stopping import StopAtLoss, check_same_run, check_stopping, checkpoint_to_resume, train

PRETRAIN_FILE = "pretrain.json"  # the run's results, written last
EVAL_SEED = 2**32  # above every seed of training rows
HELD_OUT_EVERY = 20  # one document in 20, chosen by its hash


@dataclass(kw_only=True)
class PretrainConfig(StoppingConfig):
    """A small model from nothing, on a text, a synthetic language or a digit task."""

    corpus: str = setting(
        "",
        "Text: a file of rows, a Hub dataset (OWNER/NAME), or several with shares (old.jsonl=0.7,new.jsonl=0.3). Or "
        "synthetic: a language of known entropy. Or a digit task: add, reversal, sort, modadd.",
        required=True,
    )
    model_size: str = setting(
        "430k", "30k, 134k, 430k, 2M, 5.8M, 12M, 21M, 32M, 46M, 100M, 200M, or a number of parameters."
    )
    vocab_size: int | None = setting(
        None,
        "Tokens in the vocabulary. Default: 1024 for text, 64 for a synthetic language; digit tasks have 19.",
        low=4,
    )
    tokenizer_corpus: str | None = setting(
        None, "Texts to train the tokenizer on, separated by commas. Default: those of the corpus."
    )
    max_length: int = setting(128, "Tokens per row; digit tasks set their own row length.", low=8)
    max_tokens: float | None = setting(None, "Tokens to train on, rounded up to whole steps.", low=1e-6)
    tokens_per_param: float | None = setting(
        None, "Tokens to train on per parameter, counted as 12 L D^2 + D V.", low=1e-6
    )
    eval_rows: int = setting(256, "Held-out rows per evaluation.", low=1)
    num_states: int = setting(256, "With corpus synthetic: hidden states; more states are more to learn.")
    branching: int = setting(4, "With corpus synthetic: possible next tokens in each state.")
    language_seed: int = setting(0, "With corpus synthetic: which language.")
    digits: int = setting(3, "With a digit task: digits per number.", low=1)

    def __post_init__(self) -> None:
        self.model_size = str(self.model_size)  # YAML gives numbers
        super().__post_init__()
        if self.max_tokens is not None and self.tokens_per_param is not None:
            raise ValueError(f"max_tokens: {self.max_tokens:g} and tokens_per_param exclude each other; leave one out")


@dataclass
class PretrainArguments(TrainingArguments):
    """`TrainingArguments` with defaults for small models."""

    learning_rate: float = field(default=3e-3, metadata={"help": "The peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule after warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1, a share of the run."})
    weight_decay: float = field(default=0.02, metadata={"help": "AdamW's weight decay."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Rows per device of an evaluation."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps between evaluations; below 1, a share."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints; below 1, a share."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=0.05, metadata={"help": "Steps between logs; below 1, a share."})
    report_to: str = field(default="none", metadata={"help": "Trackers beside metrics.jsonl."})


@dataclass(frozen=True)
class Corpus:
    """What a model learns: a tokenizer, training rows, held-out rows, and facts for its files.

    Either `rows` is set, an endless stream, or `parts`, the shares and rows of real texts.
    """

    tokenizer: Any
    length: int
    held_out: np.ndarray
    facts: dict[str, Any]
    rows: RowFunction | None = None
    parts: tuple[tuple[float, np.ndarray], ...] = ()

    def stream(self, num_rows: int, seed: int) -> RowFunction:
        """The training rows, in the order of a seed."""
        if self.rows is not None:
            return self.rows
        streams = [(share, shuffled(rows, seed + at)) for at, (share, rows) in enumerate(self.parts)]
        return streams[0][1] if len(streams) == 1 else mixture(streams, num_rows, seed)

    def passes(self, num_rows: int) -> float:
        """Passes over the part that the run reads most often; 0 for an endless stream."""
        total = sum(share for share, _ in self.parts)
        return max((num_rows * share / total / len(rows) for share, rows in self.parts), default=0.0)


def run_pretrain(args: PretrainArguments, config: PretrainConfig) -> None:
    """Pretrain a model and save it to `args.output_dir`."""
    check_arguments(args)
    known_length = config.max_tokens if config.tokens_per_param is None else config.tokens_per_param
    if (args.max_steps > 0) == (known_length is not None):
        what = "missing" if known_length is None else "given twice"
        raise ValueError(f"max_steps: the length is {what}; give one of max_steps, max_tokens and tokens_per_param")
    if (checkpoint := checkpoint_to_resume(args)) is not None:
        check_same_run(checkpoint, args, {"pretrain": asdict(config)})
    check_stopping(args, config.stop_at_loss)
    check_half_life(args, config.adam_beta2_half_life_tokens)
    seed = args.seed if args.data_seed is None else args.data_seed
    corpus = open_corpus(config, seed)
    tokenizer = corpus.tokenizer
    start = choose_start_token(tokenizer)
    shape = make_config(config.model_size, vocab_size=len(tokenizer), max_length=corpus.length, bos_token_id=start.id)
    shape.eos_token_id, shape.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    say = print if args.process_index == 0 else lambda *parts: None
    size = counted_size_of(shape)
    args.max_steps = steps_of(args, config, corpus.length, size)
    args.train_sampling_strategy = "sequential"
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    if line := apply_half_life(args, config.adam_beta2_half_life_tokens, corpus.length):
        say(line)
    trainer = make_trainer(args, config, corpus, make_model(shape, args.seed), seed)
    num_rows = len(trainer.train_dataset)
    tokens = num_rows * corpus.length
    say(f"model: {size} parameters (12 L D^2 + D V), {shape.num_hidden_layers} layers of width {shape.hidden_size}")
    say(f"tokens: {tokens} in {args.max_steps} steps, {tokens / size:.3g} per parameter; {_source(corpus, num_rows)}")
    _train(trainer, config, corpus, checkpoint, say)


def _source(corpus: Corpus, num_rows: int) -> str:
    if "entropy_rate" in corpus.facts:
        return f"no row twice; no model can go below {corpus.facts['ideal_loss']:.4f} nats per token"
    return f"{corpus.passes(num_rows):.2g} passes over the text" if corpus.parts else "drawn with repetition"


def make_trainer(args: Any, config: PretrainConfig, corpus: Corpus, model: Any, seed: int) -> Trainer:
    """A trainer that runs for `args.max_steps` steps."""
    num_rows = round(args.max_steps * tokens_per_step(args, 1))
    held_out = corpus.held_out
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Stream(corpus.stream(num_rows, seed), num_rows),
        eval_dataset=Stream(lambda numbers: held_out[numbers], len(held_out)),
        data_collator=default_data_collator,
        processing_class=corpus.tokenizer,
    )
    facts = {"num_params": counted_size_of(model.config), "corpus": corpus.facts, "versions": versions()}
    trainer.add_callback(RunFilesCallback({"pretrain": asdict(config), "replay": {}, "reference": None, **facts}))
    if config.stop_at_loss is not None:
        trainer.add_callback(StopAtLoss(config.stop_at_loss))
    return trainer


def _train(trainer: Trainer, config: PretrainConfig, corpus: Corpus, checkpoint: str | None, say: Any) -> None:
    args, size, start_time = trainer.args, counted_size_of(trainer.model.config), time.monotonic()
    if args.resume_from_checkpoint and checkpoint is None:
        say(f"no whole checkpoint in {args.output_dir}: starting from step 0")
    train(trainer, checkpoint)
    loss, steps = trainer.evaluate()["eval_loss"], trainer.state.global_step
    if not math.isfinite(loss):
        raise ValueError(f"loss: {loss} after {steps} steps; lower learning_rate, or use bf16 instead of fp16")
    tokens = steps * tokens_per_step(args, corpus.length)
    results = {
        "num_params": size, "all_params": num_parameters(trainer.model), "num_tokens": tokens,
        "tokens_per_param": tokens / size, "num_steps": steps, "eval_loss": loss,
        "adam_beta2": args.adam_beta2, "seed": args.seed, "seconds": time.monotonic() - start_time,
        "resumed": checkpoint is not None, **corpus.facts,
    }  # fmt: skip
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, StopAtLoss):
            results |= {"stop_at_loss": callback.target, "reached": callback.reached}
            say(callback)
    if args.process_index == 0:
        results |= {"settings": asdict(config), "versions": versions()}
        write_json(Path(args.output_dir) / PRETRAIN_FILE, results)
    say(f"held-out loss: {loss:.4f} nats per token after {tokens:g} tokens ({tokens / size:.3g} per parameter)")
    say(f"model: {args.output_dir}")


def steps_of(args: Any, config: PretrainConfig, length: int, size: int) -> int:
    """Optimizer steps of a run: `max_steps`, or the fewest that reach the set number of tokens."""
    tokens = config.max_tokens if config.tokens_per_param is None else config.tokens_per_param * size
    return args.max_steps if tokens is None else math.ceil(tokens / tokens_per_step(args, length))


def open_corpus(config: PretrainConfig, seed: int) -> Corpus:
    """The corpus that the settings name."""
    if config.corpus == "synthetic":
        return _synthetic(config, seed)
    if config.corpus in TASKS:
        task = DigitTask(config.corpus, config.digits)
        return Corpus(
            digit_tokenizer(task.name), task.length, task.held_out_rows(config.eval_rows),
            {"corpus": config.corpus, "digits": config.digits}, rows=lambda numbers: task.training_rows(numbers, seed),
        )  # fmt: skip
    return _texts(config)


@lru_cache(maxsize=4)  # a large language takes seconds to make, and studies open it for every run
def _language(num_states: int, vocab_size: int, branching: int, seed: int) -> Language:
    return Language(num_states=num_states, vocab_size=vocab_size, branching=branching, seed=seed)


def _synthetic(config: PretrainConfig, seed: int) -> Corpus:
    language = _language(config.num_states, config.vocab_size or 64, config.branching, config.language_seed)
    length = config.max_length
    facts = {"corpus": "synthetic", "entropy_rate": language.entropy_rate, "ideal_loss": language.ideal_loss(length)}
    return Corpus(
        word_tokenizer(language.vocab_size), length, language.rows(range(config.eval_rows), length, EVAL_SEED + seed),
        facts, rows=lambda numbers: language.rows(numbers, length, seed),
    )  # fmt: skip


def _texts(config: PretrainConfig) -> Corpus:
    shares = shares_of(config.corpus)
    sources = shares_of(config.tokenizer_corpus, "tokenizer_corpus") if config.tokenizer_corpus else shares
    fields = dict.fromkeys(sources, "tokenizer_corpus") | dict.fromkeys(shares, "corpus")
    split = {source: split_documents(source, field) for source, field in fields.items()}
    tokenizer = train_tokenizer([text for source in sources for text in split[source][0]], config.vocab_size or 1024)
    start, parts, held_out = choose_start_token(tokenizer), [], []
    for source, share in shares.items():
        texts, held_out_texts = split[source]
        random.Random(0).shuffle(texts)
        rows, held = (packed_rows(part, tokenizer, start, config.max_length) for part in (texts, held_out_texts))
        if not rows or not held:
            raise ValueError(f"corpus: {source!r} is shorter than a row of {config.max_length}; lower max_length")
        parts.append((share, np.array(rows)))
        held_out += held[: max(1, round(config.eval_rows * share / sum(shares.values())))]
    return Corpus(tokenizer, config.max_length, np.array(held_out), {"corpus": config.corpus}, parts=tuple(parts))


def shares_of(corpus: str, field: str = "corpus") -> dict[str, float]:
    """Files or Hub datasets with their shares, by default 1.

    >>> shares_of("wiki.jsonl=0.7,owner/code")
    {'wiki.jsonl': 0.7, 'owner/code': 1.0}
    """
    shares: dict[str, float] = {}
    for part in corpus.split(","):
        source, _, share = part.strip().partition("=")
        if not is_local_file(source) and "/" not in source and not Path(source).suffix:
            known = ", ".join(("synthetic", *TASKS))
            raise ValueError(
                f"{field}: {source!r} is neither a file nor known; use a file, OWNER/NAME of the Hub, or one of {known}"
            )
        try:
            shares[source] = float(share or 1)
        except ValueError:
            shares[source] = 0.0
        if not 0 < shares[source] < math.inf:
            raise ValueError(f"{field}: {part.strip()!r} has no share above 0; write {source}=0.5")
    return shares


def split_documents(source: str, field: str = "corpus") -> tuple[list[str], list[str]]:
    """Training and held-out documents of a file or Hub dataset, split by hash, so copies are on the same side."""
    texts = [
        row_text(row, None, f"{field}: row {at} of {source!r}")
        for at, row in enumerate(read_rows(source, field), start=1)
    ]
    hashes = [int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16) for text in texts]
    training, held_out = (
        [text for text, number in zip(texts, hashes, strict=True) if (number % HELD_OUT_EVERY == 0) is is_held_out]
        for is_held_out in (False, True)
    )
    if not training or not held_out:
        raise ValueError(f"{field}: {len(texts)} documents are too few to hold some out; give a few dozen")
    return training, held_out
