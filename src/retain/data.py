"""Rows in, token windows out: text, messages or prompt/completion rows from a file or the Hub.

A document is cut into windows of at most `max_length` tokens, each opened by the document start token, which is
context only. Documents never share a window, so none attends to another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from retain.row_files import SUFFIXES, read_file
from retain.text import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def is_local_file(source: str) -> bool:
    """Whether `source` names an existing file rather than a folder or a Hub id."""
    return Path(source).expanduser().is_file()


def read_rows(source: str, split: str = "train") -> Dataset:
    """Read rows from a JSONL, JSON, Parquet, CSV or text file, or from the Hub.

    In a text file, blank lines separate documents. JSONL and Parquet rows carry `text`, `messages`, or `prompt`
    and `completion`. A configuration of a data set on the Hub is named as `owner/name:configuration`.

    Raises:
        ValueError: one line naming the file and, for JSONL, the line.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    if path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or source.endswith("/"):
        raise ValueError(f"data: no file {source!r}; check the path")
    name, configuration = hub_name(source)
    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # the Hub's client raises many kinds
        raise ValueError(f"data: cannot load {source!r} from the Hub; {first_line(error)}") from error


def hub_name(source: str) -> tuple[str, str | None]:
    """A data set on the Hub, and its configuration where one is named: `owner/name:configuration`."""
    name, _, configuration = source.partition(":")
    return name, configuration or None


def read_sample(
    source: str,
    known: Mapping[str, tuple[str, str | None, str]],
    field: str,
    *,
    split: str,
    most: int | None,
    seed: int,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with their names for errors: of a name in `known`, a file or a Hub dataset; drawn where there are too many.

    Args:
        known: name → (Hub id, configuration, split).
        field: the setting that an error is about.
        most: draw only so many rows, with `seed`; their order stays.
    """
    if source in known:
        from datasets import load_dataset

        path, configuration, split = known[source]
        try:
            rows = load_dataset(path, configuration, split=split)
        except Exception as error:  # the Hub's client raises many kinds
            raise ValueError(f"{field}: cannot load {path!r} from the Hub; {first_line(error)}") from error
    else:
        rows = read_rows(source, split=split)
    places = np.arange(rows.num_rows)
    if most is not None and most < len(places):
        places = np.sort(np.random.default_rng(seed).choice(len(places), most, replace=False))
    for at in places.tolist():
        yield rows[at], f"row {at + 1} of {source!r}"


def read_texts(source: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Iterator[str]:
    """The text of every row of a file or Hub dataset, or of the first so many; a bad row is named in its error."""
    rows = read_rows(source)
    for at in range(rows.num_rows if limit is None else min(limit, rows.num_rows)):
        yield row_text(rows[at], tokenizer, f"row {at + 1} of {source!r}")


def row_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "a row") -> str:
    """The text of a row: `prompt` and `completion`, `messages` through the chat template, or `text`.

    Of a row that has several, in TRL's order: what it trains on.

    Raises:
        ValueError: if the row has none of these, or they are of the wrong type.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(prompt + completion, tokenizer)
    if isinstance(row.get("messages"), list):
        return _chat(row["messages"], tokenizer)
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(prompt, str) and "completion" not in row:
        return prompt
    raise ValueError(f"data: {where} has {sorted(row)}; it needs text, messages, or prompt and completion, as words")


def prompt_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "a row") -> str:
    """What a model is to continue: `text`, `prompt`, or `messages` up to the answer, with the answer's turn opened.

    Raises:
        ValueError: as `row_text`.
    """
    messages = row.get("messages") if isinstance(row.get("messages"), list) else row.get("prompt")
    if isinstance(messages, list):
        answered = messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
        asked = messages[:-1] if answered else messages
        return _chat(asked, tokenizer, add_generation_prompt=True)
    return row["prompt"] if isinstance(row.get("prompt"), str) else row_text(row, tokenizer, where)


def user_turn_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as a user's turn of the chat template, with the answer's turn opened."""
    return _chat([{"role": "user", "content": text}], tokenizer, add_generation_prompt=True)


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    if not (messages and all(isinstance(turn, dict) and "role" in turn for turn in messages)):
        raise ValueError(f"data: messages {messages!r} are not turns; write [{{role: user, content: …}}, …]")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("data: rows of messages need a chat template and this tokenizer has none; give text rows")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@dataclass(frozen=True)
class Document:
    """One document as token windows, each opened by the start token, and the bytes of what is predicted in them.

    `given`: how many tokens open the first window and are context only, e.g. the opening of a user's turn.
    """

    windows: list[list[int]]
    num_bytes: int
    given: int = 1

    @property
    def num_tokens(self) -> int:
        """Predicted tokens: every token but the given ones of the first window and the first of each other."""
        return sum(len(window) - 1 for window in self.windows) - (self.given - 1)

    def given_in(self, window: list[int]) -> int:
        """How many tokens of one of its windows are context only."""
        return self.given if window is self.windows[0] else 1


def tokenize_documents(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    max_length: int,
    *,
    max_windows: int | None = None,
) -> list[Document]:
    """Cut each text into windows of at most `max_length` tokens, start token included.

    Texts of no token are left out; windows of a lone token are kept (one prediction).

    Args:
        max_windows: keep only so many windows of each document, from its beginning.
    """
    step = max_length - 1
    documents = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids[:1] == [start_id]:  # as chat templates write it; once is enough
            ids = ids[1:]
        windows = [[start_id, *ids[at : at + step]] for at in range(0, len(ids), step)][:max_windows]
        if windows:
            kept = sum(len(window) - 1 for window in windows)
            whole = text if kept == len(ids) else tokenizer.decode(ids[:kept])
            documents.append(Document(windows, len(whole.encode("utf-8", "replace"))))
    return documents


def as_documents(
    name: str,
    source: Iterable[str] | Sequence[Document],
    *,
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    max_length: int,
    max_windows: int | None,
) -> list[Document]:
    """Texts cut into windows, or documents as they are.

    Raises:
        ValueError: if nothing is left to measure.
    """
    items = list(source)
    if items and isinstance(items[0], Document):
        documents: list[Document] = items  # type: ignore[assignment]
    else:
        texts = cast("list[str]", items)
        documents = tokenize_documents(texts, tokenizer, start_id, max_length, max_windows=max_windows)
    if not documents:
        raise ValueError(f"retention: {name!r} has no text to measure; give documents of at least one token")
    return documents


Item = TypeVar("Item")


def without_copies(name: str, items: Sequence[Item], unit: str) -> tuple[list[Item], list[str]]:
    """The first of each set of equal items, and a sentence that counts the others: a copy is no second observation."""
    distinct = list({repr(item): item for item in reversed(items)}.values())[::-1]
    copies, some = len(items) - len(distinct), f"{name}: {len(items):,} {unit} hold"
    return distinct, [f"{some} {copies:,} {'copies' if copies > 1 else 'copy'}, left out"] if copies else []


def token_documents(
    rows: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, given: Iterable[int] | None = None
) -> list[Document]:
    """Rows of token ids that already begin with their start token, one document each.

    Args:
        given: how many tokens of each row are context only; None: the start token alone.
    """
    pairs = zip(rows, itertools.repeat(1) if given is None else given, strict=False)
    return [
        Document([list(row)], len(tokenizer.decode(row[first:]).encode("utf-8", "replace")), first)
        for row, first in ((row, int(first)) for row, first in pairs)
    ]


def named_sources(specs: Iterable[str], field: str) -> dict[str, str]:
    """Parse `name=path` specifications.

    Raises:
        ValueError: if one has no name or path, or a name comes twice.
    """
    sources: dict[str, str] = {}
    for spec in specs:
        name, found, path = spec.partition("=")
        if not (found and name.strip() and path.strip()):
            raise ValueError(f"{field}: {spec!r} is not name=file; write e.g. {field}=wiki=wiki.txt")
        if name in sources:
            raise ValueError(f"{field}: the name {name!r} comes twice; give each text its own name")
        sources[name] = path
    return sources
