"""What a finetuning run reads, and refuses, before its model is loaded: settings, new rows, tokenizer and texts.

And the rows that its model writes first, with `--replay_dataset self`, to replay and to measure on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets.exceptions import DatasetsError
from trl import get_dataset

from retain.checks import Unchosen, check_number
from retain.cli.finetune_config import FinetuneConfig
from retain.cli.sample import sample_with_progress
from retain.data.chats import keep_date
from retain.data.overlap import find_rows
from retain.data.rows import (
    Document,
    check_chats,
    is_local_file,
    load_from_hub,
    named_sources,
    read_rows,
    token_documents,
)
from retain.files import first_line
from retain.models.description import choose_start_token
from retain.models.loading import load_tokenizer
from retain.replay.dataset import MANIFEST, load_self_generated, load_texts, read_manifest
from retain.sampling.write import default_store
from retain.training.beta2_half_life import check_half_life
from retain.training.protection_choice import CHOSEN_PROTECTION, rows_drawn
from retain.training.retention import check_best_metric, retention_names
from retain.training.row_checks import check_columns, row_edges
from retain.training.stopping import check_stopping

OWN_TEXT = "self-generated"  # the text of held-out rows
OWN_ROWS = 64
POOL, HELD_OUT = "replay", "held-out"  # folders in the run's, of the rows to replay, and of those to measure on
SAMPLING_TITLE = "sampling {} rows"


class TrlArguments(NamedTuple):
    """The dataclasses that `trl sft` takes."""

    script: Any
    training: Any
    model: Any
    dataset: Any

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What names a checkpoint beside its model."""
        return {"revision": self.model.model_revision, "trust_remote_code": self.training.trust_remote_code}


def read_data(
    given: TrlArguments,
    config: FinetuneConfig,
    texts: dict[str, list[Document]] | None = None,
    began: str | None = None,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """New and held-out rows, tokenizer and retention texts, all that is refused before a model is loaded.

    Args:
        texts: of the protected run, beside which this is the unprotected one.
        began: when the run began that is resumed.
    """
    sources = check_settings(given.training, given.model, config)
    train_dataset, eval_dataset = new_rows(given.script, given.dataset, given.training, config)
    tokenizer = load_tokenizer(given.model.model_name_or_path, **given.checkpoint)
    keep_date(tokenizer, began)
    held_out = "eval_dataset_name" if config.eval_dataset_name else "dataset_name"
    named = {"training rows": (train_dataset, "dataset_name"), "held-out rows": (eval_dataset, held_out)}
    for name, (rows, field) in named.items():
        if texts is None and not given.training.chat_template_path and hasattr(rows, "__len__"):  # streams are not read
            check_chats(rows, tokenizer, name, field)
    load = partial(load_texts, tokenizer=tokenizer, max_documents=config.retention_max_documents, field="retention")
    return train_dataset, eval_dataset, tokenizer, texts or {text: load(path) for text, path in sources.items()}


def check_settings(training_args: Any, model_args: Any, config: FinetuneConfig) -> dict[str, str]:
    """Refuse settings that could not work, before anything is read; the sources of the retention texts by name."""
    if training_args.max_steps == 0:  # of which transformers makes one step
        raise ValueError("max_steps: 0 does not fit; use at least 1, or leave it out to count num_train_epochs")
    if training_args.max_steps < 0:
        check_number("num_train_epochs", training_args.num_train_epochs, low=1e-6)
    if model_args.use_peft:
        check_number("lora_r", model_args.lora_r, low=1, integer=True)
    check_half_life(training_args, config.adam_beta2_half_life_tokens)
    check_stopping(training_args, config.stop_at_loss, config.early_stopping_patience)
    sources = named_sources(config.retention, "retention")
    own = [OWN_TEXT] if config.replay_dataset == "self" else []
    if OWN_TEXT in sources and own:
        raise ValueError(f"retention: {OWN_TEXT!r} is the name of the rows that the model writes; use another name")
    check_best_metric(training_args, retention_names([*sources, *own]))
    return sources


def new_rows(script_args: Any, dataset_args: Any, training_args: Any, config: FinetuneConfig) -> tuple[Any, Any]:
    """Training and evaluation rows of the new task: as `trl sft` reads them, or from a local file."""
    name, evaluate = script_args.dataset_name, training_args.eval_strategy != "no"
    if dataset_args.datasets:
        name = " + ".join(one.path for one in dataset_args.datasets)
        try:
            dataset = get_dataset(dataset_args)
        except (OSError, ValueError, DatasetsError) as error:
            why = first_line(error)
            raise ValueError(
                f"datasets: cannot load {name!r} ({why}); check path, name, data_files and split"
            ) from error
    elif not name:
        raise ValueError("dataset_name: missing; give --dataset_name FILE or a Hub id")
    elif is_local_file(name):
        dataset = {script_args.dataset_train_split: read_rows(name, "dataset_name")}
    else:
        options = {"configuration": script_args.dataset_config, "streaming": script_args.dataset_streaming}
        dataset = load_from_hub(name, "dataset_name", **options)
    split = script_args.dataset_train_split
    if split not in dataset:
        raise ValueError(f"dataset_train_split: {split!r} is not in {name!r}, which has {', '.join(dataset)}")
    check_columns(name, dataset[split], training_args.dataset_text_field)
    if training_args.max_steps < 0 and not hasattr(dataset[split], "__len__"):
        raise ValueError("max_steps: missing, and the rows are a stream, which does not say how many it has; give it")
    if config.eval_dataset_name:
        held_out = read_rows(config.eval_dataset_name, "eval_dataset_name", split=script_args.dataset_test_split)
        check_columns(config.eval_dataset_name, held_out, training_args.dataset_text_field, "eval_dataset_name")
    elif evaluate and script_args.dataset_test_split not in dataset:
        raise ValueError(
            f"eval_strategy: {str(training_args.eval_strategy.value)!r}, but {name!r} has no split "
            f"{script_args.dataset_test_split!r}; give --eval_dataset_name FILE, or eval_strategy no"
        )
    else:
        held_out = dataset.get(script_args.dataset_test_split) if evaluate or config.measures else None
    if held_out is not None and not evaluate:
        most = config.retention_max_documents
        held_out = (
            held_out.select(range(min(most, len(held_out)))) if hasattr(held_out, "__len__") else held_out.take(most)
        )
    return dataset[split], held_out


def rows_to_sample(output_dir: Path, training_args: Any, config: FinetuneConfig, steps: int) -> dict[str, int]:
    """Rows of each folder in the run's that the model writes for its `steps`: to replay, and to measure on."""
    if config.replay_dataset != "self":
        return {}
    held_out, pool = {HELD_OUT: min(OWN_ROWS, config.retention_max_documents)}, output_dir / POOL
    if not config.needs_rows:
        return held_out
    if config.replay_num_rows is not None:
        return {POOL: config.replay_num_rows, **held_out}
    if (pool / MANIFEST).exists():  # as it was begun
        return {POOL: read_manifest(pool)["num_rows"], **held_out}
    draws = rows_drawn(config, training_args, steps)
    return {POOL: (config.chosen or CHOSEN_PROTECTION).num_rows(draws, reads_fisher=config.anchor_coef > 0), **held_out}


def sample_own_rows(
    model: Any, tokenizer: Any, args: Any, config: FinetuneConfig, steps: int
) -> tuple[str | None, list[Document]]:
    """Let the model that will be trained write rows: one process draws them, on the device of training.

    Returns:
        The folder of the rows to replay, if there are any, and those to measure on, none of which is replayed.
    """
    folder, start = Path(args.output_dir), choose_start_token(tokenizer, config.start_token)
    rows = rows_to_sample(folder, args, config, steps)
    length = config.replay_max_length or args.max_length or Unchosen(512)
    wanted = config.objective.takes_stored and config.replay_reference in ("auto", "cache")
    stays = getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")
    for name, num_rows in rows.items() if args.process_index == 0 else ():
        store = default_store(model, folder / name, num_rows, length, wanted=wanted) if name == POOL else None
        found = model.device
        if not stays:
            model.to(args.device)
        sample_with_progress(
            model, tokenizer, str(folder / name), num_rows, SAMPLING_TITLE.format(name), max_length=length,
            seed=args.seed + (name == HELD_OUT), start_token=start, store_reference=store,
        )  # fmt: skip
        if model.device != found:
            model.to(found)
    windows = [row.tolist() for row in load_self_generated(folder / HELD_OUT)]
    replayed = load_self_generated(folder / POOL) if POOL in rows else ()
    twice = find_rows(windows, replayed, row_edges(tokenizer, start.id))
    kept = token_documents([window for at, window in enumerate(windows) if at not in twice], tokenizer)
    return str(folder / POOL) if POOL in rows else None, kept
