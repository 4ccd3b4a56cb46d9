"""`retain pretrain`: a corpus → a small model, by steps, tokens, tokens per parameter, or to a target loss."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from retain.cli.flags import Verb
from retain.files import exclusive
from retain.lab.pretrain import PretrainArguments, PretrainConfig, run_pretrain
from retain.training.stopping import how_to_resume


def run_alone(args: PretrainArguments, config: PretrainConfig) -> None:
    """`run_pretrain` with its folder locked."""
    with exclusive(Path(args.output_dir), "a training run") if args.process_index == 0 else nullcontext():
        run_pretrain(args, config)


VERB = Verb(
    name="pretrain",
    example="retain pretrain --corpus text.jsonl --model_size 430k --tokens_per_param 10 --output_dir base/",
    settings=(PretrainArguments, PretrainConfig),
    run=run_alone,
    resume=lambda training, *rest: how_to_resume(Path(training.output_dir)),
    groups={
        "max_tokens": "How long (or transformers' --max_steps)",
        "num_states": "Synthetic languages and digit tasks",
    },
    borrowed={
        "output_dir": "Folder for the model, its tokenizer, metrics.jsonl and pretrain.json.",
        "learning_rate": "Peak learning rate. [default: 0.003]",
        "per_device_train_batch_size": "Rows per device and micro-batch. [default: 32]",
    },
)
