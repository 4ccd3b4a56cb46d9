"""Rows in, token windows out: text, messages or prompt/completion rows from a file or the Hub.

A document is cut into windows of at most `max_length` tokens. Each begins with the document start token, which is only
context. Documents never share a window, so none attends to another.
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
    training_template,
)
from retain.data.row_files import check_path, read_file
from retain.files import first_line, hub_remedy
from retain.models.description import StartToken

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
CHECKED_CHATS = 10_000  # rows, which takes seconds
PREFERENCES = ("chosen", "rejected")  # columns of preference data, for DPO and similar methods


def is_local_file(source: str) -> bool:
    """Whether `source` names an existing file rather than a folder or a Hub id."""
    return Path(source).expanduser().is_file()


def read_rows(source: str, field: str, split: str = "train") -> Dataset:
    """Read rows from a JSONL, JSON, Parquet, CSV or text file, or from the Hub.

    In a text file, blank lines separate documents. JSONL and Parquet rows have `text`, `messages`, or `prompt` and
    `completion`. A Hub dataset with configurations is named `owner/name:configuration`.

    Args:
        field: the setting that names the source, for errors.
    """
    if is_local_file(source):
        return read_file(Path(source).expanduser(), field)
    return load_from_hub(source, field, split=split)


def load_from_hub(source: str, field: str, configuration: str | None = None, **options: Any) -> Any:
    """Load a Hub dataset, OWNER/NAME or OWNER/NAME:CONFIGURATION, with the options of `load_dataset`.

    Raises:
        ValueError: one line, if it cannot be loaded.
    """
    from datasets import load_dataset

    check_path(source, field)
    path = Path(source).expanduser()
    name, _, suffix = source.partition(":")
    try:
        return load_dataset(name, suffix or configuration, **options)
    except Exception as error:  # the Hub client raises many kinds
        place, remedy = "from the Hub", hub_remedy()
        if path.is_dir():
            place, remedy = "as a dataset in a folder", "name one of its files"
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
    """Rows of a dataset in `known`, a file or a Hub dataset, each with its location for errors.

    Args:
        known: name → (Hub id, configuration, split).
        field: the setting that names the source, for errors.
        max_rows: the most rows; if there are more, a random subset drawn with `seed`, in the original order.
    """
    path, configuration, split = known.get(source, (source, None, split))
    rows = read_rows(f"{path}:{configuration}" if configuration else path, field, split)
    indices = np.arange(rows.num_rows)
    if max_rows is not None and max_rows < len(indices):
        indices = np.sort(np.random.default_rng(seed).choice(len(indices), max_rows, replace=False))
    for at in indices.tolist():
        yield rows[at], f"row {at + 1} of {source!r}"


@dataclass(frozen=True)
class Reading:
    """How a row becomes tokens, and which of them are predicted; the others are only context.

    Args:
        completion_only_loss, assistant_only_loss: as in TRL's `SFTConfig`, except that None means: the completion of
            rows with a prompt, and the assistant's turns if the chat template marks them.
        as_trained: add the special tokens that `SFTTrainer` adds; else only the document start.
        dataset_text_field: the text column, as in `SFTConfig`.
    """

    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None
    as_trained: bool = False
    dataset_text_field: str = "text"


OLD_TEXT, WHOLE = Reading(), Reading(completion_only_loss=False, assistant_only_loss=False)
NEW_TASK = Reading(assistant_only_loss=False, as_trained=True)


@dataclass(frozen=True)
class Text:
    """A row that was read: its text, its tokens, which of them are predicted, and a name for those."""

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
    """Read at most `limit` rows of a file or Hub dataset; errors name the setting `field` and the row."""
    for at, row in enumerate(itertools.islice(read_rows(source, field), limit), start=1):
        yield read_text(row, tokenizer, f"{field}: row {at} of {source!r}", reading)


def read_text(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data: a row", reading: Reading = OLD_TEXT
) -> Text:
    """Tokenize a row as `SFTTrainer` of TRL 1.16 does before training (`_prepare_dataset`)."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r:.80}; give a string, or a row with text, messages, or completion")
    if reading.dataset_text_field in row:
        row = {**row, "text": row[reading.dataset_text_field]}
    content, given = _content(row, where)
    chat, pair = isinstance(content, list), given is not None
    completions = pair and reading.completion_only_loss is not False
    turns = chat and reading.assistant_only_loss
    if chat and reading.assistant_only_loss is None and not pair:
        turns = marks_turns(tokenizer) and tokenizer.is_fast  # slow tokenizers have no character offsets
    settings = {**(training_template(tokenizer) if turns else {}), **(row.get("chat_template_kwargs") or {})}
    row = {**row, "chat_template_kwargs": settings}
    words = rendered(content, row, tokenizer, where)
    if reading.as_trained and not chat and not (pair and "text" in row):  # there, TRL adds EOS to the unused text
        words = words.removesuffix(tokenizer.eos_token or "") + (tokenizer.eos_token or "")
    special = {"add_special_tokens": reading.as_trained and not chat, "verbose": False}
    try:
        ids: list[int] = tokenizer(words, **special)["input_ids"]
    except TypeError as error:  # half of a surrogate pair, which JSON allows
        raise ValueError(f"{where} is not valid Unicode ({words!r:.80}); correct or delete it") from error
    predicted = [True] * len(ids)
    if completions:  # from the first token that differs from the prompt's, which is not always at its end
        prompt = rendered(given, row, tokenizer, where, **({"add_generation_prompt": True} if chat else {}))
        pairs = zip(ids, tokenizer(prompt, **special)["input_ids"], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        predicted = [at >= length for at in range(len(ids))]
    if turns:
        masked = apply_template(content, row, tokenizer, where, return_dict=True, return_assistant_tokens_mask=True)
        masks = zip(predicted, masked["assistant_masks"], strict=True)
        predicted = [completion and bool(assistant) for completion, assistant in masks]
    name = "assistant turns" if turns else "completions" if completions else "all"
    return Text(row, words, ids, predicted, name, reading.as_trained)


def check_chats(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, field: str = "data"
) -> None:
    """Refuse chats that the chat template refuses; warn of unusual roles that it does not name. Text rows pass.

    Renders one chat for each order of roles in the first `CHECKED_CHATS` rows: templates refuse roles and their order,
    rarely content. Later rows are checked when they are tokenized.

    Args:
        name: of the rows, for messages.
        field: the setting that names them, for messages.
    """
    orders: set[tuple[str, ...]] = set()
    unusual: dict[str, str] = {}
    for at, row in enumerate(itertools.islice(rows, CHECKED_CHATS), start=1):
        if chat_of(row) is None:  # then none is: a column has one type
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
                unusual.setdefault(role, where)
    template = tokenizer.get_chat_template() if unusual else ""
    for role, where in unusual.items():
        if role not in template:
            logger.warning(
                "%s has the role %r, which the chat template does not name; rename it if it is one of %s",
                where, role, ", ".join(USUAL_ROLES),
            )  # fmt: skip


def row_texts(source: str, tokenizer: PreTrainedTokenizerBase, field: str) -> Iterator[str]:
    """The text of every row of a file or Hub dataset, preference rows once per answer; errors name `field` and row."""
    for at, row in enumerate(read_rows(source, field), start=1):
        for single in _one_row_per_answer(row):
            yield row_text(single, tokenizer, f"{field}: row {at} of {source!r}")


def _one_row_per_answer(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A preference row once with each answer, as its completion, text or messages; other rows unchanged."""
    answers = [row[name] for name in PREFERENCES if row.get(name) is not None]
    if not answers:
        yield row
    for answer in answers:
        column = "completion" if row.get("prompt") is not None else "text" if isinstance(answer, str) else "messages"
        yield {**row, column: answer}


def row_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data: a row") -> str:
    """The text of a row: `prompt` and `completion`, `messages` through the chat template, or `text`.

    A row with several of them is read as TRL would train on it. Chats use their `tools` and `chat_template_kwargs`.
    """
    return rendered(_content(row, where)[0], row, tokenizer, where)


def _content(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """(content, prompt) of a row, each a string or turns; the prompt is None unless the row has a completion."""
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
    raise ValueError(f"{where} has {sorted(row)}; it needs text, messages, or prompt and completion")


def prompt_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data: a row") -> str:
    """The text for a model to continue: `text`, `prompt`, or `messages` up to the opening of the answer's turn."""
    if (messages := chat_of(row)) is not None:
        answered = messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
        return rendered(messages[:-1] if answered else messages, row, tokenizer, where, add_generation_prompt=True)
    return row["prompt"] if isinstance(row.get("prompt"), str) else row_text(row, tokenizer, where)


def user_turn_text(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """A text as a user's turn in the chat template, up to the opening of the answer's turn."""
    turn = {"role": "user", "content": text}
    return rendered([turn], {}, tokenizer, "tokenizer", add_generation_prompt=True, **options)


@dataclass(frozen=True)
class Document:
    """One document as token windows.

    Args:
        num_bytes: UTF-8 bytes of the predicted tokens that are text: see `bytes_of_text`.
        masks: which tokens of each window are predicted; None: all but the first of each, the start token.
        loss_tokens: which tokens are predicted: all, completions or assistant turns.
    """

    windows: list[list[int]]
    num_bytes: int
    masks: list[list[bool]] | None = None
    loss_tokens: str = "all"

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens.

        >>> Document([[0, 5, 6], [0, 7]], num_bytes=9).num_tokens
        3
        """
        return sum(sum(self.mask_of(window)) for window in self.windows)

    def mask_of(self, window: list[int]) -> list[bool]:
        """Which tokens of one of its windows are predicted."""
        if self.masks is None:
            return [at > 0 for at in range(len(window))]
        return next(mask for other, mask in zip(self.windows, self.masks, strict=True) if other is window)


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

    Windows and documents without a predicted token are left out; one prediction is enough to keep a window.

    Args:
        texts: strings, rows, or `Text`; a `Document` passes unchanged.
        max_windows: the most windows of a document, from its beginning.
        reading: for strings and rows.
    """
    documents, special = [], special_spellings(tokenizer)
    for text in texts:
        if isinstance(text, Document):
            documents += [text] if text.num_tokens else []
            continue
        if not isinstance(text, Text):
            text = read_text({"text": text} if isinstance(text, str) else text, tokenizer, reading=reading)
        document = _cut(text, tokenizer, special, start_id, max_length, max_windows)
        if document is not None:
            documents.append(document)
    return documents


def _cut(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    special: Mapping[int, int],
    start_id: int,
    max_length: int,
    max_windows: int | None,
) -> Document | None:
    ids, predicted, words = text.ids, text.predicted, text.words
    if text.as_trained:
        predicted = [False, *predicted[1:]]  # the first token has no context
    else:
        if ids[:1] == [start_id]:  # written by the chat template
            ids, predicted, words = ids[1:], predicted[1:], words.removeprefix(str(tokenizer.decode([start_id])))
        ids, predicted = [start_id, *ids], [False, *predicted]
    parts = [slice(at, at + max_length - 1) for at in range(1, len(ids), max_length - 1)][:max_windows]
    parts = [part for part in parts if any(predicted[part])]
    if not parts:
        return None
    windows = [[ids[0] if part.start == 1 else start_id, *ids[part]] for part in parts]
    masks = [[False, *predicted[part]] for part in parts]
    targets = [token for part in parts for token, keep in zip(ids[part], predicted[part], strict=True) if keep]
    whole = not text.as_trained and len(targets) == len(ids) - 1
    num_bytes = bytes_of_text(targets, tokenizer, special, words if whole else None)
    all_predicted = all(all(mask[1:]) for mask in masks)
    return Document(windows, num_bytes, None if all_predicted else masks, text.loss_tokens)


def special_spellings(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """The tokens that are no text, as the end of a document, and the UTF-8 bytes of what they are decoded to."""
    added = {token: len(str(part).encode()) for token, part in tokenizer.added_tokens_decoder.items() if part.special}
    algorithm = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(algorithm, "unk_token", tokenizer.unk_token) is not None:  # else no text becomes it, as in GPT-2
        added.pop(tokenizer.unk_token_id, None)  # it stands for a piece of text
    return added


def bytes_of_text(
    tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, special: Mapping[int, int], words: str | None = None
) -> int:
    """UTF-8 bytes of these tokens, of which special ones have none.

    Args:
        special: `special_spellings(tokenizer)`, which takes time.
        words: the text of the tokens, as which it counts where decoding them would not restore it.
    """
    text = str(tokenizer.decode(tokens)) if words is None else words
    return len(text.encode("utf-8", "replace")) - sum(special.get(token, 0) for token in tokens)


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
    """Cut texts into windows, at least one document; `field` is the setting that names them, for errors."""
    items = several("texts", name, source)
    documents = tokenize_documents(items, tokenizer, start_id, max_length, max_windows=max_windows, reading=reading)
    if not documents:
        raise ValueError(f"{field}: {name!r} has no text to measure; give documents of at least one token")
    return documents


Item = TypeVar("Item")


def without_copies(name: str, items: Sequence[Item], unit: str) -> tuple[list[Item], list[str]]:
    """The distinct items, and a sentence that counts the copies, if any: a copy is not a second observation.

    >>> without_copies("wiki", [[5, 6], [7], [5, 6]], "documents")
    ([[5, 6], [7]], ['wiki: 3 documents hold 1 copy, left out'])
    """
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(repr(item), item)
    distinct = list(first.values())
    if not (copies := len(items) - len(distinct)):
        return distinct, []
    return distinct, [f"{name}: {len(items):,} {unit} hold {copies:,} {'copies' if copies > 1 else 'copy'}, left out"]


def token_documents(
    rows: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, given: Iterable[int] | None = None
) -> list[Document]:
    """One document for each row of token ids; rows begin with their start token.

    Args:
        given: the number of first tokens of each row that are only context; None: the start token.
    """
    documents, special = [], special_spellings(tokenizer)
    for row, first in zip(rows, itertools.repeat(1) if given is None else map(int, given), strict=False):
        masks = [[at >= first for at in range(len(row))]] if first > 1 else None
        documents.append(Document([list(row)], bytes_of_text(row[first:], tokenizer, special), masks))
    return documents


def named_sources(specs: Iterable[str], field: str) -> dict[str, str]:
    """Parse `name=path` specifications.

    >>> named_sources(["wiki=wiki.txt", "code=owner/code"], "retention")
    {'wiki': 'wiki.txt', 'code': 'owner/code'}
    """
    sources: dict[str, str] = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        if not (name.strip() and path.strip()):
            file = spec.strip("= ") or "wiki.txt"
            raise ValueError(f"{field}: {spec!r} is not name=file; write e.g. --{field} {Path(file).stem}={file}")
        if name in sources:
            raise ValueError(f"{field}: the name {name!r} is given twice; give each text its own name")
        sources[name] = path
    return sources


def packed_rows(texts: list[str], tokenizer: Any, start: StartToken, length: int) -> list[list[int]]:
    """Concatenate texts, each after a document start, and cut them into full rows (TRL's `wrapped` packing)."""
    stream = [token for text in texts for token in (start.id, *tokenizer(text, add_special_tokens=False)["input_ids"])]
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]
