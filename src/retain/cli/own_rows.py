"""Rows that the model writes before it is finetuned, with `--replay_dataset self`: to replay, and to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retain.checks import Unchosen
from retain.cli.finetune_config import FinetuneConfig
from retain.cli.sample import sample_with_progress
from retain.data.overlap import find_rows
from retain.data.rows import Document, token_documents
from retain.models.description import choose_start_token
from retain.replay.dataset import MANIFEST, load_self_generated, read_manifest
from retain.sampling.write import default_store
from retain.training.protection_choice import CHOSEN_PROTECTION, rows_drawn
from retain.training.row_checks import row_edges

OWN_TEXT = "self-generated"  # the text of held-out rows
OWN_ROWS = 64
POOL, HELD_OUT = "replay", "held-out"  # folders in the run's, of the rows to replay, and of those to measure on
SAMPLING_TITLE = "sampling {} rows"


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
