"""The replay dataset: Parquet shards of token ids and a manifest that says which model wrote them, and how.

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
# Of a finished folder, what others need of it.
POOL_FILES = (MANIFEST, "shard-*.parquet", "reference-*.safetensors", FISHER_FILE, STATISTICS, "README.md")
MANIFEST_SCHEMA = "retain.replay/1"
SAMPLE_AGAIN = "sample again, into another folder"
MANIFEST_SHAPE = {
    "num_rows": int, "rows_per_shard": int, "batch_size": int, "model": str, "model_fingerprint": str,
    "tokenizer_fingerprint": str, "start_token": {"id": int}, "sampler": {"dtype": str, "engine": str},
    "store_reference?": str,
}  # fmt: skip
# What may differ between the run that began a dataset and the one that resumes it.
NOT_COMPARED = ("created", "versions", "batch_size")


@dataclass(frozen=True)
class ReplayDataset:
    """Replay rows in memory: token ids of all rows in one array, `offsets` of shape (rows + 1,).

    `prefix_lengths`, shape (rows,): tokens of each row that were given rather than drawn; the start token at least.
    `manifest` is None for real text. `cache`: the base's predictions, where they were stored when it sampled.
    `log_probs`, shape (rows,): of the drawn tokens of each row, summed, nats, where the sampler wrote them.

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
        """Gather rows of token ids that begin with their start token, or with `prefix_lengths` given tokens.

        Raises:
            ValueError: for rows of anything else, and for prefixes that are longer than their rows, or of no token.
        """
        arrays = [np.asarray(row) for row in rows]
        ids = (row.ndim == 1 and row.size and row.dtype.kind in "iu" and row.min() >= 0 for row in arrays)
        bad = [at for at, is_row in enumerate(ids) if not is_row]
        if bad or not arrays:
            what = f"row {bad[0]} of {source!r} is" if bad else f"{source!r} has"
            raise ValueError(f"replay_dataset: {what} no token ids; give lists of them, the start token first")
        lengths, tokens = np.array([len(row) for row in arrays]), np.concatenate(arrays).astype(np.int32)
        given = np.ones(len(rows), dtype=np.int64) if prefix_lengths is None else np.asarray(prefix_lengths)
        if given.shape != lengths.shape or not ((given >= 1) & (given <= lengths)).all():
            raise ValueError(
                f"prefix_lengths: {source!r} needs one for each row, from 1, the start token alone, to its length; "
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
        """Predicted tokens of each row, shape (rows,): all but those that were given."""
        return np.diff(self.offsets) - self.prefix_lengths

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` of the named rows, shape (rows, longest row), padded at the right.

        Labels are −100 where nothing is predicted: on given tokens and padding. An `attention_mask` is there where
        lengths differ.
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
    """Rows of optimizer step `step`: a fresh permutation each pass, a pure function of its arguments.

    So a resumed run continues the stream where it stopped, however the step is split over micro-batches.

    >>> sorted([*replay_indices(0, 2, 4, seed=0), *replay_indices(1, 2, 4, seed=0)]) == [0, 1, 2, 3]
    True
    """
    positions = np.arange(step * rows_per_step, (step + 1) * rows_per_step)
    return np.array([_permutation(num_rows, seed, p // num_rows)[p % num_rows] for p in positions], dtype=np.int64)


def replace_rows(new: dict[str, Any], replay: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The batch with its last rows replaced by replay rows, padded to the longer of the two; labels mask padding."""
    if "labels" not in new or "attention_mask" not in new:
        raise ValueError(
            "replay_objective: 'replace' needs padded batches with labels and attention_mask; set packing false, or "
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
        raise ValueError(f"replay_dataset: {str(folder)!r} has no {MANIFEST}; make it with `retain sample`")
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
            raise ValueError(f"{where}: {name!r} is {manifest[name]}, not 1 or more; {SAMPLE_AGAIN}")
    return manifest


def num_shards(manifest: dict[str, Any]) -> int:
    """Files of a dataset with this manifest."""
    return -(-manifest["num_rows"] // manifest["rows_per_shard"])


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"


def write_shard(folder: Path, shard: int, first_row: int, columns: dict[str, np.ndarray]) -> None:
    """Write rows as one Parquet file: `row`, their numbers, and the columns, one value or list of values a row."""
    numbers = np.arange(first_row, first_row + len(columns["input_ids"]))
    arrays = {name: pa.array(list(column) if column.ndim > 1 else column) for name, column in columns.items()}
    with atomic_path(shard_path(folder, shard)) as temporary:
        parquet.write_table(pa.table({"row": numbers, **arrays}), temporary)


def read_shards(
    folder: Path, manifest: dict[str, Any], columns: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """The named columns of all shards on disk, in the order of the rows; optional ones where a shard has them."""
    found: dict[str, list[Any]] = {name: [] for name in (*columns, *optional)}
    for shard in range(num_shards(manifest)):
        path = shard_path(folder, shard)
        if not path.exists():
            continue
        try:
            stored = parquet.read_schema(path).names
            names = [*columns, *(name for name in optional if name in stored)]
            table = parquet.read_table(path, columns=names)
            for name in names:
                found[name] += list(table[name].to_numpy())
        except Exception as error:  # pyarrow raises many kinds
            raise ValueError(
                f"replay_dataset: {str(path)!r} is damaged; delete it and run the same `retain sample`"
            ) from error
    return found


def load_self_generated(folder: Path) -> ReplayDataset:
    """Load a folder that `retain sample` finished."""
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
            f"replay_dataset: the shards in {str(folder)!r} do not hold the rows of their numbers, so one is of "
            f"another place or dataset; {SAMPLE_AGAIN}"
        )
    given = columns["prefix_length"]
    if not all(map(_is_row, rows, given)):
        raise ValueError(
            f"replay_dataset: {str(folder)!r} holds rows that are no token ids behind a prefix; {SAMPLE_AGAIN}"
        )
    found = ReplayDataset.from_rows(rows, str(folder), manifest, given)
    sums = columns["logprob"]
    log_probs = np.array(sums, dtype=np.float64) if len(sums) == len(rows) else None
    return replace(found, cache=open_cache(folder, manifest, found.num_predictions), log_probs=log_probs)


def _is_row(row: Any, given: Any) -> bool:
    """Whether a row is token ids, at least `given` of them."""
    ids = isinstance(row, np.ndarray) and row.dtype.kind in "iu"
    return ids and isinstance(given, np.integer) and 0 <= int(given) <= len(row)


def pool_folder(source: str) -> Path | None:
    """Where rows lie that `retain sample` wrote: the folder itself, or a copy of a dataset on the Hub; None for text.

    Raises:
        ValueError: if the Hub has such rows and does not give them.
    """
    folder = Path(source).expanduser()
    if folder.exists() or source.count("/") != 1:
        return folder if (folder / MANIFEST).is_file() else None
    try:
        hf_hub_download(source, MANIFEST, repo_type="dataset")
    except (OSError, EntryNotFoundError, HFValidationError):  # text, or nothing that is there
        return None
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=list(POOL_FILES)))
    except (OSError, ValueError) as error:  # the Hub client's own are of these kinds
        why = f"cannot load {source!r} from the Hub ({first_line(error)})"
        raise ValueError(f"replay_dataset: {why}; {hub_remedy()}") from error


def on_disk(source: str) -> str:
    """The source itself, or the folder that holds a copy of rows on the Hub that `retain sample` wrote.

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
    """Load self-generated rows from a folder or the Hub, or real text from either, cut into rows of `max_length`."""
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
    """Texts of a file or Hub dataset, or the rows that `retain sample` wrote, in a folder or there, a document each.

    Args:
        field: the setting that named the source, for errors.
        any_tokenizer: take rows of token ids as they are, whichever tokenizer wrote them.

    Raises:
        ValueError: for rows of another tokenizer, whose ids are other text in this one.
    """
    if (folder := pool_folder(source)) is not None:
        rows = load_self_generated(folder)
        written, own = read_manifest(folder)["tokenizer_fingerprint"], tokenizer_fingerprint(tokenizer)
        if written != own and not any_tokenizer:
            raise ValueError(
                f"{field}: the rows of {source!r} were written with another tokenizer (fingerprint {written}; this "
                f"model's is {own}), so their token ids are other text here; sample rows from this model"
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
        None when the rows are the base's own; a warning when they are not and `allow_off_policy` accepts that.
    """
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint:
        what = (
            f"it was written with the tokenizer of {manifest['model']!r} (fingerprint "
            f"{manifest['tokenizer_fingerprint']}), this model's is {tokenizer_fingerprint}: the token ids may mean "
            "other text"
        )
    elif manifest["model_fingerprint"] != model_fingerprint:
        what = (
            f"it was sampled from {manifest['model']!r} (weights {manifest['model_fingerprint']}), "
            f"not from this model (weights {model_fingerprint})"
        )
    else:
        return None
    if not allow_off_policy:
        raise ValueError(f"replay_dataset: {what}; sample from this model, or set allow_off_policy_replay")
    return f"off-policy replay: {what}"
