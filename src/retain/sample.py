"""The verb `sample`: a model → a replay dataset, by one process or by several, with a look at what was drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from retain.config import SampleConfig
from retain.data import prompt_text, read_rows
from retain.files import write_json, write_text
from retain.models import choose_start_token, default_device, load_model, load_tokenizer
from retain.pool import pool_statistics
from retain.preview import describe, preview_html, preview_text
from retain.replay import read_manifest, read_shards
from retain.sampling import sample_replay
from retain.starts import Starts, plan_starts

STATISTICS = "statistics.json"
PREVIEW = "preview.html"


def run_sample(config: SampleConfig) -> Path:
    """Sample as configured; under `accelerate launch` every process draws its share of the shards.

    Raises:
        ValueError: one line, before anything is written, for input that cannot work.
    """
    state = PartialState(cpu=default_device() == "cpu") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    device = state.device if state is not None else default_device()
    assert config.model_name_or_path is not None
    assert config.output_dir is not None
    options: dict[str, Any] = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model_name_or_path, **options)
    start = choose_start_token(tokenizer, config.start_token)
    prompts = [prompt_text(row, tokenizer) for row in read_rows(config.prompts)] if config.prompts else []
    starts = plan_starts(config.start, tokenizer, start, chat_turn=config.chat_turn, prompts=prompts)
    attention = config.attn_implementation
    model = load_model(
        config.model_name_or_path, dtype=config.dtype, attn_implementation=attention, device=device, **options
    )
    main = state is None or state.is_main_process
    if main:
        print(f"document start: {start}")
    folder = sample_with_bar(
        model,
        tokenizer,
        config.output_dir,
        config.num_rows,
        max_length=config.max_length,
        seed=config.seed,
        start_token=start,
        starts=starts,
        min_ended_turns=config.min_ended_turns,
        batch_size=config.per_device_batch_size,
        rows_per_shard=config.rows_per_shard,
        overwrite=config.overwrite_output_dir,
        state=state,
    )
    if main:
        shared = f", drawn by {state.num_processes} processes" if state is not None else ""
        print(f"{config.num_rows} rows of {config.max_length} tokens in {folder}{shared}")
        look_at_pool(folder, tokenizer, starts, config.preview)
    return folder


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
    columns = read_shards(folder, manifest, ("input_ids", "prefix_length", "logprob", "entropy"))
    rows, given = columns["input_ids"], [int(length) for length in columns["prefix_length"]]
    drawn = [len(row) - length for row, length in zip(rows, given, strict=True)]
    texts = [tokenizer.decode(row[length:]) for row, length in zip(rows, given, strict=True)]
    statistics = pool_statistics(
        rows,
        prefix_lengths=given,
        logprob_sums=columns["logprob"],
        mean_entropies=[float(total) / count for total, count in zip(columns["entropy"], drawn, strict=True)],
        end_ids=end_ids(tokenizer, manifest["start_token"]["id"], starts),
        texts=texts,
        num_asked=manifest["num_rows"],
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


def end_ids(tokenizer: Any, start_id: int, starts: Starts) -> Sequence[int]:
    """Tokens that end a document or a turn."""
    separator = {start_id} if start_id != tokenizer.bos_token_id else set()
    ends = {tokenizer.eos_token_id, *separator, *(mode.end_of_turn for mode in starts.modes)}
    return sorted(token for token in ends if token is not None)
