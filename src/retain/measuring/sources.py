"""What is read from the measured texts themselves: prompts to continue, and warnings where they were trained on."""

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

# What it means that a measured text was trained on.
OVERLAP_MEANINGS = {
    "new_task": "the gain on them is memory, not learning",
    "retention": "forgetting on them is not of old knowledge",
}
PROMPT_TOKENS = 16  # of the first document of each text, continued where no prompts are given


def document_tokens(document: Document | Text) -> list[int]:
    """A document's tokens, whole."""
    if isinstance(document, Text):
        return document.ids
    return [token for window in document.windows for token in window[1:]]


def overlap_warnings(
    sources: dict[str, Any], rows: dict[str, Iterable[list[int]]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A line for every measured text that is also among the rows (token ids) that the model was trained on."""
    measured = [(kind, name, one) for kind in OVERLAP_MEANINGS for name in sources[kind] for one in sources[kind][name]]
    windows = [document_tokens(document) for *_, document in measured] if rows else []
    edges, lines = set(tokenizer.all_special_ids), []
    for where, of_where in rows.items():
        found = Counter(measured[at][:2] for at in sorted(find_rows(windows, of_where, edges)))
        for (kind, name), count in found.items():
            documents = f"{count} of {len(sources[kind][name])} documents {'is' if count == 1 else 'are'}"
            lines.append(f"{name}: {documents} also in {where}: {OVERLAP_MEANINGS[kind]}; leave them out")
    return lines


def default_prompts(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, room: int) -> list[Prompt]:
    """What both models continue of each text where no prompts are given: of the first document a few first tokens.

    A chat is continued where its first answer begins, if that is within `room` tokens.
    """
    prompts = []
    for source in texts:
        document, chat = source[0], False
        if isinstance(document, Document):
            ids = document.windows[0][1:]
        elif chat := (turns := chat_of(document.row)) is not None:
            question = list(takewhile(lambda turn: turn["role"] != "assistant", turns))
            text = prompt_text({**document.row, "messages": question or turns}, tokenizer, "prompts: a first chat")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(document.words, add_special_tokens=False, verbose=False)["input_ids"]
        if not chat or len(ids) <= room:
            prompts.append(Prompt(text if chat else str(tokenizer.decode(ids[:PROMPT_TOKENS])), chat))
    return prompts
