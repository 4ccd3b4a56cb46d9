"""Rows in, token windows out: text, messages or prompt/completion rows from a file or the Hub.

A document is cut into windows of at most `max_length` tokens, each opened by the document start token, which is
context only. Documents never share a window, so none attends to another.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from retain.checks import several
from retain.data.chats import (
    USUAL_ROLES,
    apply_template,
    chat_of,
    marks_turns,
    messages_of,
    rendered,
    template_of_turns,
)
from retain.data.row_files import check_path, read_file
from retain.files import first_line, hub_remedy
from retain.models.description import StartToken

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
CHECKED_CHATS = 10_000  # before training, in seconds
PREFERENCES = ("chosen", "rejected")  # columns of rows for DPO and its like


def is_local_file(source: str) -> bool:
    """Whether `source` names an existing file rather than a folder or a Hub id."""
    return Path(source).expanduser().is_file()


def read_rows(source: str, field: str, split: str = "train") -> Dataset:
    """Read rows from a JSONL, JSON, Parquet, CSV or text file, or from the Hub.

    In a text file, blank lines separate documents. JSONL and Parquet rows carry `text`, `messages`, or `prompt`
    and `completion`. A configuration of a data set on the Hub is named as `owner/name:configuration`.

    Args:
        field: the setting that named the source, for errors.
    """
    if is_local_file(source):
        return read_file(Path(source).expanduser(), field)
    return load_from_hub(source, field, split=split)


def load_from_hub(source: str, field: str, configuration: str | None = None, **options: Any) -> Any:
    """A data set on the Hub, by OWNER/NAME or OWNER/NAME:CONFIGURATION; the options are those of `load_dataset`.

    Raises:
        ValueError: one line, if it cannot be loaded.
    """
    from datasets import load_dataset

    check_path(source, field)
    path = Path(source).expanduser()
    name, _, named = source.partition(":")
    try:
        return load_dataset(name, named or configuration, **options)
    except Exception as error:  # the Hub's client raises many kinds
        place, remedy = "from the Hub", hub_remedy()
        if path.is_dir():
            place, remedy = "as a data set in a folder", "name one of its files"
        raise ValueError(f"{field}: cannot load {name!r} {place} ({first_line(error)}); {remedy}") from error


def read_sample(
    source: str,
    known: Mapping[str, tuple[str, str | None, str]],
    field: str,
    *,
    split: str,
    max_rows: int | None,
    seed: int,
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with their names for errors: of a name in `known`, a file or a Hub dataset.

    Args:
        known: name → (Hub id, configuration, split).
        field: the setting that an error is about.
        max_rows: draw this many of more rows, with `seed`; their order stays.
    """
    path, configuration, split = known.get(source, (source, None, split))
    rows = read_rows(f"{path}:{configuration}" if configuration else path, field, split)
    places = np.arange(rows.num_rows)
    if max_rows is not None and max_rows < len(places):
        places = np.sort(np.random.default_rng(seed).choice(len(places), max_rows, replace=False))
    for at in places.tolist():
        yield rows[at], f"row {at + 1} of {source!r}"


@dataclass(frozen=True)
class Reading:
    """How a row becomes tokens, and which of them are predicted; the others are given, and only context.

    `completion_only_loss`, `assistant_only_loss`: as in TRL's `SFTConfig`, but for None, which is: the completion of
    rows with a prompt, and the assistant's turns where the chat template marks them.
    `as_trained`: opened and ended by the special tokens that `SFTTrainer` puts there; else by the document start.
    `dataset_text_field`: the column of rows that are a text, as there.
    """

    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None
    as_trained: bool = False
    dataset_text_field: str = "text"


OLD_TEXT, WHOLE = Reading(), Reading(completion_only_loss=False, assistant_only_loss=False)
NEW_TASK = Reading(assistant_only_loss=False, as_trained=True)


@dataclass(frozen=True)
class Text:
    """A row that was read: its words, its tokens, which of them are predicted, and a name for those."""

    row: Mapping[str, Any]
    words: str
    ids: list[int]
    predicted: list[bool]
    loss_tokens: str
    as_trained: bool


def read_texts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    reading: Reading = OLD_TEXT,
    *,
    field: str,
) -> Iterator[Text]:
    """The rows of a file or Hub dataset, at most `limit`; errors name the setting `field` and the row."""
    rows = read_rows(source, field)
    for at in range(rows.num_rows if limit is None else min(limit, rows.num_rows)):
        yield read_text(rows[at], tokenizer, f"{field}: row {at + 1} of {source!r}", reading)


def read_text(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data: a row", reading: Reading = OLD_TEXT
) -> Text:
    """Read a row as `SFTTrainer` of TRL 1.16 does before training (`_prepare_dataset`)."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r:.80}; give its words, or a row with text, messages, or completion")
    if reading.dataset_text_field in row:
        row = {**row, "text": row[reading.dataset_text_field]}
    content, given = _content(row, where)
    chat, pair = isinstance(content, list), given is not None
    completions = pair and reading.completion_only_loss is not False
    turns = chat and reading.assistant_only_loss
    if chat and reading.assistant_only_loss is None and not pair:
        turns = marks_turns(tokenizer) and tokenizer.is_fast  # others do not say where a token's characters stand
    settings = {**template_of_turns(tokenizer, turns), **(row.get("chat_template_kwargs") or {})}
    row = {**row, "chat_template_kwargs": settings}
    words = rendered(content, row, tokenizer, where)
    if reading.as_trained and not chat and not (pair and "text" in row):  # of such rows TRL ends the unused text
        words = words.removesuffix(tokenizer.eos_token or "") + (tokenizer.eos_token or "")
    special = {"add_special_tokens": reading.as_trained and not chat, "verbose": False}
    try:
        ids: list[int] = tokenizer(words, **special)["input_ids"]
    except TypeError as error:  # half of a surrogate pair, as JSON may have it
        raise ValueError(f"{where} is no Unicode text ({words!r:.80}); correct or delete it") from error
    predicted = [True] * len(ids)
    if completions:  # from where the prompt alone reads otherwise: not always its end
        alone = rendered(given, row, tokenizer, where, **({"add_generation_prompt": True} if chat else {}))
        both = zip(ids, tokenizer(alone, **special)["input_ids"], strict=False)
        length = sum(1 for _ in takewhile(lambda one: one[0] == one[1], both))
        predicted = [at >= length for at in range(len(ids))]
    if turns:
        masked = apply_template(content, row, tokenizer, where, return_dict=True, return_assistant_tokens_mask=True)
        predicted = [one and bool(other) for one, other in zip(predicted, masked["assistant_masks"], strict=True)]
    name = "assistant turns" if turns else "completions" if completions else "all"
    return Text(row, words, ids, predicted, name, reading.as_trained)


def check_chats(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, field: str = "data"
) -> None:
    """Refuse chats that the chat template does; warn of roles that neither it nor others name. Rows of words pass.

    One chat of each order of roles is rendered, of the first `CHECKED_CHATS`: templates refuse roles and their order,
    hardly words. What comes later is met where rows become tokens.

    Args:
        name: whose rows these are, and `field`: the setting that named them, for the message.
    """
    orders: set[tuple[str, ...]] = set()
    odd: dict[str, str] = {}
    for at, row in enumerate(itertools.islice(rows, CHECKED_CHATS), start=1):
        if chat_of(row) is None:  # as all others, since columns are of one kind
            return
        where = f"{field}: row {at} of the {name}"
        turns = _content(row, where)[0]
        order = tuple(str(turn.get("role")) if isinstance(turn, dict) else "" for turn in turns)
        if order in orders:
            continue
        orders.add(order)
        rendered(turns, row, tokenizer, where)
        for role in order:
            if role not in USUAL_ROLES:
                odd.setdefault(role, where)
    template = tokenizer.get_chat_template() if odd else ""
    for role, where in odd.items():
        if role not in template:
            logger.warning(
                "%s has the role %r, which the chat template does not name; rename it if it is one of %s",
                where, role, ", ".join(USUAL_ROLES),
            )  # fmt: skip


def row_texts(source: str, tokenizer: PreTrainedTokenizerBase, field: str) -> Iterator[str]:
    """The words of every row of a file or Hub dataset, with each answer of preferences; errors name `field`, row."""
    for at, row in enumerate(read_rows(source, field), start=1):
        for answered in _answered(row):
            yield row_text(answered, tokenizer, f"{field}: row {at} of {source!r}")


def _answered(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A row of preferences with each of its answers, as a prompt and completion or a chat; other rows as they are."""
    answers = [row[name] for name in PREFERENCES if row.get(name) is not None]
    if not answers:
        yield row
    for answer in answers:
        whole = "completion" if row.get("prompt") is not None else "text" if isinstance(answer, str) else "messages"
        yield {**row, whole: answer}


def row_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data: a row") -> str:
    """The text of a row: `prompt` and `completion`, `messages` through the chat template, or `text`.

    A row that has several is read as TRL would train on it. Chats come with their `tools` and `chat_template_kwargs`.
    """
    return rendered(_content(row, where)[0], row, tokenizer, where)


def _content(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """The words or turns of a row, and those that were given: the prompt of a prompt and completion."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion, prompt
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion, prompt
    if (turns := messages_of(row)) is not None:
        return turns, None
    if isinstance(row.get("text"), str):
        return row["text"], None
    if isinstance(prompt, str) and not {"completion", *PREFERENCES} & row.keys():
        return prompt, None
    raise ValueError(f"{where} has {sorted(row)}; it needs text, messages, or prompt and completion, as words")


def prompt_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data: a row") -> str:
    """What a model is to continue: `text`, `prompt`, or `messages` up to the answer, with the answer's turn opened."""
    if (messages := chat_of(row)) is not None:
        answered = messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
        return rendered(messages[:-1] if answered else messages, row, tokenizer, where, add_generation_prompt=True)
    return row["prompt"] if isinstance(row.get("prompt"), str) else row_text(row, tokenizer, where)


def user_turn_text(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """A text as a user's turn of the chat template, with the answer's turn opened; options are the template's."""
    turn = {"role": "user", "content": text}
    return rendered([turn], {}, tokenizer, "tokenizer", add_generation_prompt=True, **options)


@dataclass(frozen=True)
class Document:
    """One document as token windows, and the bytes of what is predicted in them.

    `masks`: which tokens of each window are predicted, the others being context; None: all but the first of each, the
    start token. `loss_tokens` names them: all, completions or assistant turns.
    """

    windows: list[list[int]]
    num_bytes: int
    masks: list[list[bool]] | None = None
    loss_tokens: str = "all"

    @property
    def num_tokens(self) -> int:
        """Predicted tokens.

        >>> Document([[0, 5, 6], [0, 7]], num_bytes=9).num_tokens
        3
        """
        return sum(sum(self.mask_of(window)) for window in self.windows)

    def mask_of(self, window: list[int]) -> list[bool]:
        """Which tokens of one of its windows are predicted."""
        if self.masks is None:
            return [at > 0 for at in range(len(window))]
        return next(mask for one, mask in zip(self.windows, self.masks, strict=True) if one is window)


def tokenize_documents(
    texts: Iterable[str | Mapping[str, Any] | Text | Document],
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    max_length: int,
    *,
    max_windows: int | None = None,
    reading: Reading = OLD_TEXT,
) -> list[Document]:
    """Cut each text into windows of at most `max_length` tokens, start token included.

    Texts without a token are left out, and windows and documents without a predicted one; windows of a single token
    are kept (one prediction).

    Args:
        texts: words, rows, rows that were read, or documents, which stay as they are.
        max_windows: the most windows of a document, from its beginning.
        reading: of words and rows.
    """
    documents = []
    for text in texts:
        if isinstance(text, Document):
            documents += [text] if text.num_tokens else []
            continue
        if not isinstance(text, Text):
            text = read_text({"text": text} if isinstance(text, str) else text, tokenizer, reading=reading)
        document = _cut(text, tokenizer, start_id, max_length, max_windows)
        if document is not None:
            documents.append(document)
    return documents


def _cut(
    text: Text, tokenizer: PreTrainedTokenizerBase, start_id: int, max_length: int, max_windows: int | None
) -> Document | None:
    ids, predicted, words = text.ids, text.predicted, text.words
    if text.as_trained:
        predicted = [False, *predicted[1:]]  # nothing stands before the first
    else:
        if ids[:1] == [start_id]:  # as chat templates write it; once is enough
            ids, predicted, words = ids[1:], predicted[1:], words.removeprefix(str(tokenizer.decode([start_id])))
        ids, predicted = [start_id, *ids], [False, *predicted]
    parts = [slice(at, at + max_length - 1) for at in range(1, len(ids), max_length - 1)][:max_windows]
    parts = [part for part in parts if any(predicted[part])]
    if not parts:
        return None
    windows = [[ids[0] if part.start == 1 else start_id, *ids[part]] for part in parts]
    masks = [[False, *predicted[part]] for part in parts]
    counted = [token for part in parts for token, one in zip(ids[part], predicted[part], strict=True) if one]
    whole = not text.as_trained and len(counted) == len(ids) - 1
    num_bytes = len((words if whole else str(tokenizer.decode(counted))).encode("utf-8", "replace"))
    all_predicted = all(all(mask[1:]) for mask in masks)
    return Document(windows, num_bytes, None if all_predicted else masks, text.loss_tokens)


def as_documents(
    name: str,
    source: Iterable[str | Mapping[str, Any] | Text | Document],
    *,
    field: str = "retention",
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    max_length: int,
    max_windows: int | None,
    reading: Reading = OLD_TEXT,
) -> list[Document]:
    """Texts cut into windows, or documents as they are; `field` is the setting that names them, for errors."""
    items = several("texts", name, source)
    documents = tokenize_documents(items, tokenizer, start_id, max_length, max_windows=max_windows, reading=reading)
    if not documents:
        raise ValueError(f"{field}: {name!r} has no text to measure; give documents of at least one token")
    return documents


Item = TypeVar("Item")


def without_copies(name: str, items: Sequence[Item], unit: str) -> tuple[list[Item], list[str]]:
    """The first of each set of equal items, and a sentence that counts the others: a copy is no second observation.

    >>> without_copies("wiki", [[5, 6], [7], [5, 6]], "documents")
    ([[5, 6], [7]], ['wiki: 3 documents hold 1 copy, left out'])
    """
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(repr(item), item)
    distinct = list(first.values())
    copies, some = len(items) - len(distinct), f"{name}: {len(items):,} {unit} hold"
    return distinct, [f"{some} {copies:,} {'copies' if copies > 1 else 'copy'}, left out"] if copies else []


def token_documents(
    rows: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, given: Iterable[int] | None = None
) -> list[Document]:
    """Rows of token ids that already begin with their start token, one document each.

    Args:
        given: the number of tokens of each row that are context only; None: the start token alone.
    """
    documents = []
    for row, first in zip(rows, itertools.repeat(1) if given is None else map(int, given), strict=False):
        masks = [[at >= first for at in range(len(row))]] if first > 1 else None
        documents.append(Document([list(row)], len(tokenizer.decode(row[first:]).encode("utf-8", "replace")), masks))
    return documents


def named_sources(specs: Iterable[str], field: str) -> dict[str, str]:
    """Parse `name=path` specifications.

    >>> named_sources(["wiki=wiki.txt", "code=owner/code"], "retention")
    {'wiki': 'wiki.txt', 'code': 'owner/code'}
    """
    sources: dict[str, str] = {}
    for spec in specs:
        name, found, path = spec.partition("=")
        if not (found and name.strip() and path.strip()):
            file = spec.strip("= ") or "wiki.txt"
            raise ValueError(f"{field}: {spec!r} is not name=file; write e.g. --{field} {Path(file).stem}={file}")
        if name in sources:
            raise ValueError(f"{field}: the name {name!r} comes twice; give each text its own name")
        sources[name] = path
    return sources


def packed_rows(texts: list[str], tokenizer: Any, start: StartToken, length: int) -> list[list[int]]:
    """Texts one after the other, each behind a document start, cut into whole rows (TRL's `wrapped` packing)."""
    stream = [token for text in texts for token in (start.id, *tokenizer(text, add_special_tokens=False)["input_ids"])]
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
