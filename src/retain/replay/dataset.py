"""The replay dataset: Parquet shards of token ids, and a manifest with the model and settings that wrote them.

Shards and manifest are written whole or not at all, so a killed job resumes without repeating or losing a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from retain.data.rows import OLD_TEXT, WHOLE, Document, Reading, Text, read_texts, token_documents, tokenize_documents
from retain.files import atomic_path, check_shape, first_line, hub_remedy, read_json
from retain.models.description import tokenizer_fingerprint
from retain.replay.stored_predictions import ReferenceCache, open_cache

MANIFEST, STATISTICS, FISHER_FILE = "manifest.json", "statistics.json", "fisher.safetensors"
# The files of a finished folder that the Hub gets.
POOL_FILES = (MANIFEST, "shard-*.parquet", "reference-*.safetensors", FISHER_FILE, STATISTICS, "README.md")
MANIFEST_SCHEMA = "retain.replay/1"
SAMPLE_AGAIN = "sample again into another folder"
MANIFEST_SHAPE = {
    "num_rows": int, "rows_per_shard": int, "batch_size": int, "model": str, "model_fingerprint": str,
    "tokenizer_fingerprint": str, "start_token": {"id": int}, "sampler": {"dtype": str, "engine": str},
    "store_reference?": str,
}  # fmt: skip
# Fields that may differ between the run that started a dataset and one that resumes it.
NOT_COMPARED = ("created", "versions", "batch_size")


@dataclass(frozen=True)
class ReplayDataset:
    """Replay rows in memory: `tokens` of all rows one after the other, and where each starts, `offsets` (rows + 1,).

    Args:
        prefix_lengths: given (not drawn) tokens of each row, at least the start token, shape (rows,).
        manifest: None for real text.
        cache: the base's predictions, if the sampler stored them.
        log_probs: summed log-probabilities of each row's drawn tokens, nats, shape (rows,), if the sampler stored them.

    >>> rows = ReplayDataset.from_rows([[0, 5, 6], [0, 7]], "two rows")
    >>> rows.batch([1, 0])["labels"].tolist()
    [[-100, 7, -100], [-100, 5, 6]]
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prefix_lengths: np.ndarray
    source: str
    manifest: dict[str, Any] | None = None
    cache: ReferenceCache | None = None
    log_probs: np.ndarray | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Any],
        source: str,
        manifest: dict[str, Any] | None = None,
        prefix_lengths: Sequence[int] | None = None,
    ) -> ReplayDataset:
        """Gather rows of token ids that begin with the start token, or with `prefix_lengths` given tokens.

        Raises:
            ValueError: if rows are not token ids, or a prefix is empty or longer than its row.
        """
        arrays = [np.asarray(row) for row in rows]
        valid = (row.ndim == 1 and row.size and row.dtype.kind in "iu" and row.min() >= 0 for row in arrays)
        bad = [at for at, is_row in enumerate(valid) if not is_row]
        if bad or not arrays:
            what = f"row {bad[0]} of {source!r} is not a list of token ids" if bad else f"{source!r} has no rows"
            raise ValueError(f"replay_dataset: {what}; give lists of token ids that begin with the start token")
        lengths, tokens = np.array([len(row) for row in arrays]), np.concatenate(arrays).astype(np.int32)
        given = np.ones(len(rows), dtype=np.int64) if prefix_lengths is None else np.asarray(prefix_lengths)
        if given.shape != lengths.shape or not ((given >= 1) & (given <= lengths)).all():
            raise ValueError(
                f"prefix_lengths: {source!r} needs one per row, from 1 (only the start token) to the row's length; "
                "give the number of tokens that are context"
            )
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths)]), given, source, manifest)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    @property
    def num_predictions(self) -> np.ndarray:
        """Number of predicted tokens of each row, all but the given ones, shape (rows,)."""
        return np.diff(self.offsets) - self.prefix_lengths

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` of the rows with these indices, shape (rows, longest row), padded on the right.

        Labels are −100 on given tokens and padding. There is an `attention_mask` if lengths differ.
        """
        rows = [self[int(index)] for index in indices]
        width = max(len(row) for row in rows)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full_like(input_ids, -100)
        mask = torch.zeros_like(input_ids)
        for at, (row, index) in enumerate(zip(rows, indices, strict=True)):
            given = int(self.prefix_lengths[index])
            input_ids[at, : len(row)] = torch.from_numpy(row.astype(np.int64))
            labels[at, given : len(row)] = input_ids[at, given : len(row)]
            mask[at, : len(row)] = 1
        batch = {"input_ids": input_ids, "labels": labels}
        return batch if bool(mask.all()) else {**batch, "attention_mask": mask}


def replay_indices(step: int, rows_per_step: int, num_rows: int, seed: int) -> np.ndarray:
    """Indices of the rows of optimizer step `step`, shape (rows_per_step,); each pass is a new permutation.

    A pure function of its arguments, so a resumed run continues the stream, however steps are split into micro-batches.

    >>> sorted([*replay_indices(0, 2, 4, seed=0), *replay_indices(1, 2, 4, seed=0)]) == [0, 1, 2, 3]
    True
    """
    positions = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
    return np.array([_permutation(num_rows, seed, p // num_rows)[p % num_rows] for p in positions], dtype=np.int64)


def replace_rows(new: dict[str, Any], replay: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Replace the last rows of a batch by replay rows, keeping at least one; padded to the longer of the two."""
    if "labels" not in new or "attention_mask" not in new:
        raise ValueError(
            "replay_objective: 'replace' needs padded batches with labels and attention_mask; set packing to false, or "
            "use 'kl' or 'ntp'"
        )
    count = min(len(replay["input_ids"]), len(new["input_ids"]) - 1)
    width = max(new["input_ids"].shape[1], replay["input_ids"].shape[1])

    def joined(name: str, old: torch.Tensor, fill: int) -> torch.Tensor:
        parts = [new[name][: len(new[name]) - count], old[:count].to(new[name].device)]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])

    mask = replay.get("attention_mask", torch.ones_like(replay["input_ids"]))
    return {
        "input_ids": joined("input_ids", replay["input_ids"], 0),
        "attention_mask": joined("attention_mask", mask, 0),
        "labels": joined("labels", replay["labels"], -100),
    }


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a replay dataset's manifest."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"replay_dataset: {str(folder)!r} has no {MANIFEST}; create the rows with `retain sample`")
    manifest: dict[str, Any] = read_json(folder / MANIFEST, "replay_dataset", SAMPLE_AGAIN)
    where = f"replay_dataset: {str(folder / MANIFEST)!r} is damaged"
    check_shape(manifest, {"schema": str}, where, SAMPLE_AGAIN)
    if (schema := manifest["schema"]) != MANIFEST_SCHEMA:
        raise ValueError(
            f"replay_dataset: {str(folder)!r} has schema {schema!r}, not {MANIFEST_SCHEMA!r}; sample again"
        )
    check_shape(manifest, MANIFEST_SHAPE, where, SAMPLE_AGAIN)
    for name in ("num_rows", "rows_per_shard"):
        if manifest[name] < 1:
            raise ValueError(f"{where}: {name!r} is {manifest[name]}, below 1; {SAMPLE_AGAIN}")
    return manifest


def num_shards(manifest: dict[str, Any]) -> int:
    """Number of shards of a complete dataset with this manifest."""
    return -(-manifest["num_rows"] // manifest["rows_per_shard"])


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"


def write_shard(folder: Path, shard: int, first_row: int, columns: dict[str, np.ndarray]) -> None:
    """Write rows as one Parquet file; column `row` has their indices, counted from `first_row`."""
    indices = np.arange(first_row, first_row + len(columns["input_ids"]))
    arrays = {name: pa.array(list(column) if column.ndim > 1 else column) for name, column in columns.items()}
    with atomic_path(shard_path(folder, shard)) as temporary:
        parquet.write_table(pa.table({"row": indices, **arrays}), temporary)


def read_shards(
    folder: Path, manifest: dict[str, Any], columns: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Read columns of all shards on disk, in row order; `optional` columns only from shards that have them."""
    values: dict[str, list[Any]] = {name: [] for name in (*columns, *optional)}
    for shard in range(num_shards(manifest)):
        path = shard_path(folder, shard)
        if not path.exists():
            continue
        try:
            stored = parquet.read_schema(path).names
            names = [*columns, *(name for name in optional if name in stored)]
            table = parquet.read_table(path, columns=names)
            for name in names:
                values[name] += list(table[name].to_numpy())
        except Exception as error:  # pyarrow raises many kinds
            raise ValueError(
                f"replay_dataset: {str(path)!r} is damaged; delete it and run the same `retain sample` command"
            ) from error
    return values


def load_self_generated(folder: Path) -> ReplayDataset:
    """Load a finished folder of `retain sample`."""
    manifest = read_manifest(folder)
    columns = read_shards(folder, manifest, ("row", "input_ids", "prefix_length"), optional=("logprob",))
    rows = columns["input_ids"]
    if len(rows) != manifest["num_rows"]:
        raise ValueError(
            f"replay_dataset: {str(folder)!r} holds {len(rows)} of {manifest['num_rows']} rows; "
            "finish it with the same `retain sample` command"
        )
    if columns["row"] != list(range(len(rows))):
        raise ValueError(
            f"replay_dataset: the shards in {str(folder)!r} do not hold the rows of their numbers, so one was moved or "
            f"belongs to another dataset; {SAMPLE_AGAIN}"
        )
    prefix_lengths = columns["prefix_length"]
    if not all(map(_is_row, rows, prefix_lengths)):
        raise ValueError(
            f"replay_dataset: {str(folder)!r} holds rows that are not token ids, or shorter than their prefix; "
            f"{SAMPLE_AGAIN}"
        )
    dataset = ReplayDataset.from_rows(rows, str(folder), manifest, prefix_lengths)
    sums = columns["logprob"]
    log_probs = np.array(sums, dtype=np.float64) if len(sums) == len(rows) else None
    return replace(dataset, cache=open_cache(folder, manifest, dataset.num_predictions), log_probs=log_probs)


def _is_row(row: Any, given: Any) -> bool:
    """Whether a row is an array of token ids, at least `given` of them."""
    ids = isinstance(row, np.ndarray) and row.dtype.kind in "iu"
    return ids and isinstance(given, np.integer) and 0 <= int(given) <= len(row)


def pool_folder(source: str) -> Path | None:
    """The folder of rows that `retain sample` wrote, downloaded if the source is on the Hub; None for text.

    Raises:
        ValueError: if the Hub has such rows and the download fails.
    """
    folder = Path(source).expanduser()
    if folder.exists() or source.count("/") != 1:
        return folder if (folder / MANIFEST).is_file() else None
    try:
        hf_hub_download(source, MANIFEST, repo_type="dataset")
    except (OSError, EntryNotFoundError, HFValidationError):  # text, or no such dataset
        return None
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=list(POOL_FILES)))
    except (OSError, ValueError) as error:  # bases of the Hub client's errors
        raise ValueError(
            f"replay_dataset: cannot load {source!r} from the Hub ({first_line(error)}); {hub_remedy()}"
        ) from error


def local_source(source: str) -> str:
    """The folder of rows that `retain sample` wrote, downloaded if they are on the Hub; any other source unchanged.

    Raises:
        ValueError: if the manifest of such rows is unreadable.
    """
    if (folder := pool_folder(source)) is None:
        return source
    read_manifest(folder)
    return str(folder)


def load_replay_dataset(
    source: str, tokenizer: PreTrainedTokenizerBase, start_id: int, max_length: int
) -> ReplayDataset:
    """Load self-generated rows, or real text cut into rows of `max_length`, from local files or the Hub."""
    folder = pool_folder(source) or Path(source).expanduser()
    if folder.is_dir():
        return load_self_generated(folder)
    documents = tokenize_documents(
        read_texts(source, tokenizer, None, WHOLE, field="replay_dataset"), tokenizer, start_id, max_length
    )
    if not documents:
        raise ValueError(f"replay_dataset: {source!r} has no text; give rows with at least one token")
    return ReplayDataset.from_rows([window for document in documents for window in document.windows], source)


def load_texts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_documents: int | None = None,
    reading: Reading = OLD_TEXT,
    *,
    field: str = "data",
    any_tokenizer: bool = False,
) -> list[Text] | list[Document]:
    """Load the texts of a file or Hub dataset, or each row that `retain sample` wrote as a document.

    Args:
        field: the setting that names the source, for errors.
        any_tokenizer: accept token ids that another tokenizer wrote.

    Raises:
        ValueError: for rows of another tokenizer, unless `any_tokenizer`.
    """
    if (folder := pool_folder(source)) is not None:
        rows = load_self_generated(folder)
        written, expected = read_manifest(folder)["tokenizer_fingerprint"], tokenizer_fingerprint(tokenizer)
        if written != expected and not any_tokenizer:
            raise ValueError(
                f"{field}: the rows of {source!r} were written with another tokenizer (fingerprint {written}; this "
                f"model's is {expected}), so their token ids mean other text; sample rows from this model"
            )
        count = len(rows) if max_documents is None else min(max_documents, len(rows))
        given = rows.prefix_lengths[:count].tolist()
        return token_documents([rows[index].tolist() for index in range(count)], tokenizer, given)
    return list(read_texts(source, tokenizer, max_documents, reading, field=field))


def verify_replay(
    manifest: dict[str, Any], *, model_fingerprint: str, tokenizer_fingerprint: str, allow_off_policy: bool
) -> str | None:
    """Refuse replay rows that another model or tokenizer wrote.

    Returns:
        None if the base wrote the rows; a warning if it did not and `allow_off_policy` is set.
    """
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint:
        mismatch = (
            f"it was written with the tokenizer of {manifest['model']!r} (fingerprint "
            f"{manifest['tokenizer_fingerprint']}), this model's is {tokenizer_fingerprint}: the token ids may mean "
            "other text"
        )
    elif manifest["model_fingerprint"] != model_fingerprint:
        mismatch = (
            f"it was sampled from {manifest['model']!r} (weights {manifest['model_fingerprint']}), "
            f"not from this model (weights {model_fingerprint})"
        )
    else:
        return None
    if not allow_off_policy:
        raise ValueError(f"replay_dataset: {mismatch}; sample from this model, or set allow_off_policy_replay")
    return f"off-policy replay: {mismatch}"
