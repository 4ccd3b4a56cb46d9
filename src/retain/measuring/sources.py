"""Derived from the measured texts: prompts to continue, and warnings about texts that were trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from retain.data.chats import chat_of
from retain.data.overlap import find_rows
from retain.data.rows import Document, Text, prompt_text
from retain.measuring.generations import Prompt

# What it means if a measured text was trained on.
OVERLAP_MEANINGS = {
    "new_task": "the gain on them is memory, not learning",
    "retention": "forgetting on them is not of old knowledge",
}
PROMPT_TOKENS = 16  # length of a default prompt, from the first document of each text


def document_tokens(document: Document | Text) -> list[int]:
    """All tokens of a document, without start tokens."""
    if isinstance(document, Text):
        return document.ids
    return [token for window in document.windows for token in window[1:]]


def overlap_warnings(
    sources: dict[str, Any], rows: dict[str, Iterable[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A warning for each measured text with documents that are also in training rows.

    Args:
        sources: `new_task` and `retention` → name → documents.
        rows: where the rows are from → their token ids.
    """
    measured = [(kind, name, row) for kind in OVERLAP_MEANINGS for name in sources[kind] for row in sources[kind][name]]
    windows = [document_tokens(document) for *_, document in measured] if rows else []
    special_ids, lines = set(tokenizer.all_special_ids), []
    for where, trained in rows.items():
        counts = Counter(measured[at][:2] for at in sorted(find_rows(windows, trained, special_ids)))
        for (kind, name), count in counts.items():
            documents = f"{count} of {len(sources[kind][name])} documents {'is' if count == 1 else 'are'}"
            lines.append(f"{name}: {documents} also in {where}: {OVERLAP_MEANINGS[kind]}; leave them out")
    return lines


def default_prompts(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, room: int) -> list[Prompt]:
    """A prompt from each text for runs without prompts: the first `PROMPT_TOKENS` tokens of its first document.

    The prompt from a chat is everything before its first answer; chats longer than `room` tokens are left out.
    """
    prompts = []
    for source in texts:
        document, chat = source[0], False
        if isinstance(document, Document):
            ids = document.windows[0][1:]
        elif chat := (turns := chat_of(document.row)) is not None:
            before = list(takewhile(lambda turn: turn["role"] != "assistant", turns))
            text = prompt_text({**document.row, "messages": before or turns}, tokenizer, "prompts: a first chat")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(document.words, add_special_tokens=False, verbose=False)["input_ids"]
        if not chat or len(ids) <= room:
            prompts.append(Prompt(text if chat else str(tokenizer.decode(ids[:PROMPT_TOKENS])), chat))
    return prompts
