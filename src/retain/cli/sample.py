"""The verb `sample`: a model → a replay dataset, by one process or by several, with a look at what was drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from retain.cli.config import SampleConfig
from retain.data.rows import prompt_text, read_rows
from retain.files import write_json, write_text
from retain.models.description import choose_start_token, default_device, length_that_fits
from retain.models.loading import load_model, load_tokenizer
from retain.replay.dataset import load_self_generated, read_manifest, read_shards
from retain.replay.predictions import bytes_per_token
from retain.report.numbers import quantity
from retain.sampling.engine import Engine, choose_threads
from retain.sampling.preview import describe, preview_html, preview_text
from retain.sampling.quality import pool_statistics
from retain.sampling.starts import Starts, plan_starts
from retain.sampling.write import sample_replay
from retain.training.replay_term import describe_store

STATISTICS = "statistics.json"
PREVIEW = "preview.html"


def run_sample(config: SampleConfig) -> Path:
    """Sample as configured; under `accelerate launch` every process draws its share of the shards.

    Raises:
        ValueError: one line, before anything is written, for input that cannot work.
    """
    open_engine = engine_of(config)
    on_cpu = config.engine != "torch" or default_device() == "cpu"  # other engines hold the model that draws
    state = PartialState(cpu=on_cpu) if launched() else None
    device = state.device if state is not None else "cpu" if on_cpu else default_device()
    assert config.model_name_or_path is not None
    assert config.output_dir is not None
    options: dict[str, Any] = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    options["field"] = "model_name_or_path"
    tokenizer = load_tokenizer(config.model_name_or_path, **options)
    start = choose_start_token(tokenizer, config.start_token)
    rows = enumerate(read_rows(config.prompts), start=1) if config.prompts else ()
    prompts = [prompt_text(row, tokenizer, f"row {at} of {config.prompts!r}") for at, row in rows]
    starts = plan_starts(config.start, tokenizer, start, chat_turn=config.chat_turn, prompts=prompts)
    attention = config.attn_implementation
    model = load_model(
        config.model_name_or_path, dtype=config.dtype, attn_implementation=attention, device=device, **options
    )
    if model.device.type == "cpu":
        torch.set_num_threads(choose_threads(model))
    main = state is None or state.is_main_process
    if main:
        print(f"document start: {start}")
    max_length = length_that_fits(model, config.max_length)
    names = ("seed", "min_ended_turns", "store_reference", "rows_per_shard")
    settings = {"max_length": max_length} | {name: getattr(config, name) for name in names}
    settings |= {"overwrite": config.overwrite_output_dir, "batch_size": config.per_device_batch_size}
    if config.engine == "vllm":  # it schedules rows itself: it gets whole shards
        settings |= {"engine_name": "vllm", "batch_size": config.per_device_batch_size or config.rows_per_shard}
    settings |= {"start_token": start, "starts": starts, "state": state}
    with open_engine(model, max_length) as engine:
        folder = sample_with_bar(model, tokenizer, config.output_dir, config.num_rows, engine=engine, **settings)
    if main:
        shared = f", drawn by {state.num_processes} processes" if state is not None else ""
        print(f"{quantity(config.num_rows, 'row')} of {max_length} tokens in {folder}{shared}")
        look_at_pool(folder, tokenizer, starts, config.preview)
        if config.store_reference:
            look_at_store(folder, model)
    return folder


def launched() -> bool:
    """Whether this is one of several processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def engine_of(config: SampleConfig) -> Callable[[Any, int], AbstractContextManager[Engine | None]]:
    """What opens the engine that was asked for, given the model and tokens per row; None is the engine of this process.

    Raises:
        ValueError: if it is not installed, or is Ray's and other processes were launched beside this one.
    """
    if config.engine == "torch":
        return lambda model, length: nullcontext()
    if config.engine == "ray" and launched():
        raise ValueError("engine: 'ray' starts its own workers; run it without accelerate or torchrun")
    assert config.model_name_or_path is not None
    path = Path(config.model_name_or_path).expanduser()
    name = str(path.resolve()) if path.exists() else config.model_name_or_path  # workers have their own folder
    options: dict[str, Any] = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    settings: dict[str, Any] = {"seed": config.seed}
    if config.engine == "vllm":
        from retain.sampling.vllm_engine import vllm_engine

        settings["tensor_parallel_size"] = config.tensor_parallel_size
        return lambda model, length: vllm_engine(name, dtype=model.dtype, max_length=length, **settings, **options)
    from retain.sampling.ray_engine import ray_engine

    options["attn_implementation"] = config.attn_implementation
    settings |= {"store_reference": config.store_reference, "num_workers": config.num_workers}

    def of_model(model: Any, length: int) -> AbstractContextManager[Engine]:
        return ray_engine(partial(load_model, name, dtype=model.dtype, **options), max_length=length, **settings)

    return of_model


def sample_with_bar(model: Any, tokenizer: Any, output_dir: str, num_rows: int, **settings: Any) -> Path:
    """`sample_replay` with a progress bar, which begins when drawing does: a refusal is one line and no bar."""
    state = settings.get("state")
    processes = 1 if state is None else state.num_processes
    bars: list[Any] = []

    def progress(rows: int) -> None:
        if not bars:
            hidden = state is not None and not state.is_main_process
            bars.append(tqdm(total=num_rows, unit="row", desc="sampling replay", disable=hidden))
        bars[0].update(min(rows * processes, num_rows - bars[0].n))

    try:
        return sample_replay(model, tokenizer, output_dir, num_rows=num_rows, progress=progress, **settings)
    finally:
        for bar in bars:
            bar.close()


def look_at_pool(folder: Path, tokenizer: Any, starts: Starts, preview: int) -> None:
    """Write `statistics.json`, print its summary and warnings, and show rows to read where asked."""
    manifest = read_manifest(folder)
    says_entropy = ("entropy",) if manifest["sampler"]["engine"] != "vllm" else ()
    columns = read_shards(folder, manifest, ("input_ids", "prefix_length", "logprob", *says_entropy))
    rows, given = columns["input_ids"], [int(length) for length in columns["prefix_length"]]
    texts = [tokenizer.decode(row[length:]) for row, length in zip(rows, given, strict=True)]
    statistics = pool_statistics(
        rows,
        prefix_lengths=given,
        logprob_sums=columns["logprob"],
        entropy_sums=columns.get("entropy"),
        end_ids=end_ids(tokenizer, manifest["start_token"]["id"], starts),
        num_requested=manifest["num_rows"],
    )
    write_json(folder / STATISTICS, asdict(statistics))
    for name, value in describe(statistics):
        print(f"  {name}: {value}")
    for warning in statistics.warnings:
        print(f"warning: {warning}")
    if preview:
        print(preview_text(texts, statistics, preview))
        write_text(folder / PREVIEW, preview_html(texts, statistics, preview))
        print(f"preview: {folder / PREVIEW}")


def look_at_store(folder: Path, model: Any) -> None:
    """Say what the stored predictions cost on disk and keep of the model's own, here and in `statistics.json`."""
    rows = load_self_generated(folder)
    assert rows.cache is not None
    told: dict[str, Any] = {"kind": rows.cache.kind, **describe_store(model, rows)}
    told["bytes_per_token"] = round(bytes_per_token(folder, int(rows.num_predictions.sum())), 1)
    statistics = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    write_json(folder / STATISTICS, {**statistics, "stored": told})
    error = told["stored_kl"] - told["exact_kl"]
    print(f"  stored predictions: {told['kind']}, {told['bytes_per_token']:g} bytes per token")
    print(
        f"    KL to a probe, nats per token: {told['stored_kl']:.5f} from what is stored, {told['exact_kl']:.5f} exact "
        f"(error {error:+.2g}, {told['num_tokens']} tokens); mass outside of the stored tokens {told['rest']:.2g}"
    )


def end_ids(tokenizer: Any, start_id: int, starts: Starts) -> Sequence[int]:
    """Tokens that end a document or a turn."""
    separator = {start_id} if start_id != tokenizer.bos_token_id else set()
    ends = {tokenizer.eos_token_id, *separator, *(mode.end_of_turn for mode in starts.modes)}
    return sorted(token for token in ends if token is not None)
