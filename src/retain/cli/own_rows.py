"""Rows that the model writes before it is finetuned, with `--replay_dataset self`: to replay, and to measure on."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class OwnRows:
    """Rows of the model that will be trained; one process draws them, and the others read them then."""

    model: Any
    tokenizer: Any
    training_args: Any
    config: FinetuneConfig

    def sample(self, steps: int) -> tuple[str | None, list[Document]]:
        """The folder of the rows to replay, if there are any, and those to measure on."""
        rows = rows_to_sample(self._folder(), self.training_args, self.config, steps)
        return self._pool(rows[POOL]) if POOL in rows else None, self._held_out(rows[HELD_OUT])

    def _pool(self, num_rows: int) -> str:
        if self.training_args.process_index == 0:
            wanted = self.config.objective.takes_stored and self.config.replay_reference in ("auto", "cache")
            store = default_store(self.model, self._folder(POOL), num_rows, self._length, wanted=wanted)
            self._draw(POOL, num_rows=num_rows, store_reference=store)
        return str(self._folder(POOL))

    def _held_out(self, num_rows: int) -> list[Document]:
        """Rows drawn with another seed; without those that are in the pool, too."""
        if self.training_args.process_index == 0:
            self._draw(HELD_OUT, num_rows=num_rows, seed=self.training_args.seed + 1)
        pool = self._folder(POOL)
        windows = [row.tolist() for row in load_self_generated(self._folder(HELD_OUT))]
        replayed = load_self_generated(pool) if (pool / MANIFEST).exists() else ()
        edges = row_edges(self.tokenizer, choose_start_token(self.tokenizer, self.config.start_token).id)
        twice = find_rows(windows, replayed, edges)
        return token_documents([window for at, window in enumerate(windows) if at not in twice], self.tokenizer)

    def _draw(self, name: str, **settings: Any) -> None:
        """Draw on the device of training; the model moves back afterwards."""
        model, args, found = self.model, self.training_args, self.model.device
        if not (getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")):  # these stay where they are
            model.to(args.device)
        start = choose_start_token(self.tokenizer, self.config.start_token)
        settings = {"max_length": self._length, "seed": args.seed, "start_token": start, **settings}
        folder, title = str(self._folder(name)), SAMPLING_TITLE.format(name)
        sample_with_progress(model, self.tokenizer, folder, title=title, **settings)
        if model.device != found:
            model.to(found)

    def _folder(self, name: str = "") -> Path:
        return Path(self.training_args.output_dir) / name

    @property
    def _length(self) -> int:
        """Tokens of a row."""
        return self.config.replay_max_length or self.training_args.max_length or Unchosen(512)
