"""The data of a finetuning run: settings, rows, tokenizer and texts, checked before the model is loaded.

Also the rows that the model samples first with `--replay_dataset self`, to replay and to measure on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
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
from retain.training.objectives import NONE
from retain.training.protection_choice import KL_ALONE, rows_drawn
from retain.training.retention import check_best_metric, retention_names
from retain.training.row_checks import check_columns, row_edges
from retain.training.stopping import check_stopping

OWN_TEXT = "self-generated"  # name of the retention text made of self-generated rows
OWN_ROWS = 64  # in that text
POOL, HELD_OUT = "replay", "held-out"  # folders in output_dir: rows to replay, and rows to measure on
SAMPLING_TITLE = "sampling {} rows"


class TrlArguments(NamedTuple):
    """The dataclasses of `trl sft`."""

    script: Any
    training: Any
    model: Any
    dataset: Any

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The arguments, besides the model's name, that select a checkpoint."""
        return {"revision": self.model.model_revision, "trust_remote_code": self.training.trust_remote_code}


def read_data(
    trl_args: TrlArguments,
    config: FinetuneConfig,
    texts: dict[str, list[Document]] | None = None,
    created: str | None = None,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Check the settings; return new rows, held-out rows, tokenizer and retention texts by name.

    Args:
        texts: the texts of the protected run, if this is the unprotected run to compare it with.
        created: when a resumed run was first started.
    """
    sources = check_settings(trl_args.training, trl_args.model, config)
    train_dataset, eval_dataset = new_rows(trl_args.script, trl_args.dataset, trl_args.training, config)
    tokenizer = load_tokenizer(trl_args.model.model_name_or_path, **trl_args.checkpoint)
    keep_date(tokenizer, created)
    eval_field = "eval_dataset_name" if config.eval_dataset_name else "dataset_name"
    datasets = {"training rows": (train_dataset, "dataset_name"), "held-out rows": (eval_dataset, eval_field)}
    for name, (rows, field) in datasets.items():
        if texts is None and not trl_args.training.chat_template_path and hasattr(rows, "__len__"):  # no stream
            check_chats(rows, tokenizer, name, field)
    load = partial(load_texts, tokenizer=tokenizer, max_documents=config.retention_max_documents, field="retention")
    return train_dataset, eval_dataset, tokenizer, texts or {text: load(path) for text, path in sources.items()}


def check_settings(training_args: Any, model_args: Any, config: FinetuneConfig) -> dict[str, str]:
    """Refuse settings that cannot work, before anything is read; return the sources of the retention texts by name."""
    if training_args.max_steps == 0:  # transformers would make one step
        raise ValueError("max_steps: 0 does not fit; use at least 1, or leave it out to count num_train_epochs")
    if training_args.max_steps < 0:
        check_number("num_train_epochs", training_args.num_train_epochs, low=1e-6)
    if model_args.use_peft:
        check_number("lora_r", model_args.lora_r, low=1, integer=True)
    check_half_life(training_args, config.adam_beta2_half_life_tokens)
    check_stopping(training_args, config.stop_at_loss, config.early_stopping_patience)
    sources = named_sources(config.retention, "retention")
    names = [*sources, *[OWN_TEXT] * (config.replay_dataset == "self")]
    if len(set(names)) < len(names):
        raise ValueError(f"retention: {OWN_TEXT!r} is the name of the rows that the model samples; use another name")
    check_best_metric(training_args, retention_names(names))
    return sources


def unused_settings(trl_args: TrlArguments, config: FinetuneConfig) -> str | None:
    """A line about settings that were given and have no effect; None if there are none."""
    script, _, model, mixture = trl_args
    where = "with datasets" if mixture.datasets else "with a local file"
    from_hub = not (mixture.datasets or is_local_file(script.dataset_name or ""))
    replaces, draws = config.objective.name == "replace", config.objective.draws_rows
    # who holds them, the names' beginnings, whether they have an effect, why not
    groups: list[tuple[Any, tuple[str, ...], object, str]] = [
        (model, ("lora_", "use_rslora", "use_dora"), model.use_peft, "without use_peft true"),
        (model, ("bnb_", "use_bnb_"), model.load_in_4bit, "without load_in_4bit true"),
        (mixture, ("streaming", "test_split_size"), mixture.datasets, "without datasets"),
        (script, ("dataset_config", "dataset_streaming"), from_hub, where),
        (config, ("replay_num_rows",), config.replay_dataset == "self", "without replay_dataset self"),
        (config, ("replay_share",), replaces, "without replay_objective replace"),
        (config, ("replay_every", "replay_start"), config.objective is not NONE, "without replay"),
        (config, ("per_device_replay_batch_size",), draws, "without replay rows"),
        (config, ("replay_reference",), config.objective.uses_reference or config.measures, "without a KL"),
        (config, ("anchor_lr_ratio", "anchor_rank"), config.anchor_coef or config.chosen, "without anchor_coef"),
        (config, ("keep_plain",), config.compare_plain, "without compare_plain true"),
    ]  # fmt: skip
    unused = [
        f"{name} {value} {why}"
        for holder, beginnings, is_used, why in groups
        for name, value in changed(holder)
        if name.startswith(beginnings) and not is_used
    ]
    return f"not used: {', '.join(unused)}" if unused else None


def changed(holder: Any) -> Iterator[tuple[str, Any]]:
    """The settings of a dataclass whose values are not their defaults."""
    for part in fields(holder):
        default = part.default if part.default_factory is MISSING else part.default_factory()
        if (value := getattr(holder, part.name)) != default:
            yield part.name, value


def new_rows(script_args: Any, dataset_args: Any, training_args: Any, config: FinetuneConfig) -> tuple[Any, Any]:
    """Training and held-out rows of the new task, read as `trl sft` does or from local files."""
    name, evaluate = script_args.dataset_name, training_args.eval_strategy != "no"
    if dataset_args.datasets and name:
        raise ValueError(f"dataset_name: {name!r} beside datasets, which would be trained on alone; leave one out")
    if dataset_args.datasets:
        name = " + ".join(part.path for part in dataset_args.datasets)
        try:
            dataset = get_dataset(dataset_args)
        except (OSError, ValueError, DatasetsError) as error:
            remedy = "check path, name, data_files and split"
            raise ValueError(f"datasets: cannot load {name!r} ({first_line(error)}); {remedy}") from error
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
        raise ValueError("max_steps: missing; give it, because the rows are a stream of unknown length")
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
        limit = config.retention_max_documents
        has_length = hasattr(held_out, "__len__")
        held_out = held_out.select(range(min(limit, len(held_out)))) if has_length else held_out.take(limit)
    return dataset[split], held_out


def rows_to_sample(output_dir: Path, training_args: Any, config: FinetuneConfig, steps: int) -> dict[str, int]:
    """The number of rows that the model samples for a run of `steps`, by folder: to replay, and to measure on."""
    if config.replay_dataset != "self":
        return {}
    held_out, pool = {HELD_OUT: min(OWN_ROWS, config.retention_max_documents)}, output_dir / POOL
    if not config.needs_rows:
        return held_out
    if config.replay_num_rows is not None:
        return {POOL: config.replay_num_rows, **held_out}
    if (pool / MANIFEST).exists():  # sampling has started: keep its number
        return {POOL: read_manifest(pool)["num_rows"], **held_out}
    choice, draws = config.chosen or KL_ALONE, rows_drawn(config, training_args, steps)
    return {POOL: choice.num_rows(draws, reads_fisher=config.anchor_coef > 0), **held_out}


def sample_own_rows(
    model: Any, tokenizer: Any, args: Any, config: FinetuneConfig, steps: int
) -> tuple[str | None, list[Document]]:
    """Sample rows from the model to be trained, in one process, on the device of training.

    Returns:
        The folder of the rows to replay, or None, and the documents to measure on, none of which is replayed.
    """
    folder, start = Path(args.output_dir), choose_start_token(tokenizer, config.start_token)
    rows = rows_to_sample(folder, args, config, steps)
    length = config.replay_max_length or args.max_length or Unchosen(512)
    wants_stored = config.objective.takes_stored and config.replay_reference in ("auto", "cache")
    is_placed = getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")
    for name, num_rows in rows.items() if args.process_index == 0 else ():
        store = default_store(model, folder / name, num_rows, length, wanted=wants_stored) if name == POOL else None
        device = model.device
        if not is_placed:
            model.to(args.device)
        sample_with_progress(
            model, tokenizer, str(folder / name), num_rows, SAMPLING_TITLE.format(name), max_length=length,
            seed=args.seed + (name == HELD_OUT), start_token=start, store_reference=store,
        )  # fmt: skip
        if model.device != device:
            model.to(device)
    windows = [row.tolist() for row in load_self_generated(folder / HELD_OUT)]
    replayed = load_self_generated(folder / POOL) if POOL in rows else ()
    repeated = find_rows(windows, replayed, row_edges(tokenizer, start.id))
    documents = token_documents([window for at, window in enumerate(windows) if at not in repeated], tokenizer)
    return str(folder / POOL) if POOL in rows else None, documents
