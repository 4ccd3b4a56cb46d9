"""What is read from the measured texts themselves: prompts to continue, and warnings where they were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from retain.data.chats import chat_of
from retain.data.overlap import find_overlap
from retain.data.rows import Document, Text, prompt_text
from retain.measuring.generations import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What it means that a measured text was trained on.
OVERLAP_MEANINGS = {
    "new_task": "the gain on them is memory, not learning",
    "retention": "forgetting on them is not of old knowledge",
}
PROMPT_TOKENS = 16  # of the first document of each text, continued where no prompts are given


def document_text(document: Document | Text, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document's text, whole."""
    if isinstance(document, Text):
        return document.words
    return "".join(str(tokenizer.decode(window[1:])) for window in document.windows)


def overlap_warnings(
    sources: dict[str, Any], rows: dict[str, Iterable[str]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A line for every measured text that is also among the rows that the model was trained on."""
    texts = {
        name: [document_text(document, tokenizer) for document in source]
        for kind in OVERLAP_MEANINGS
        for name, source in (sources[kind] if rows else {}).items()
    }
    lines = []
    for where, of_where in rows.items():
        found = find_overlap(texts, of_where)
        for kind, meaning in OVERLAP_MEANINGS.items():
            lines += [found[name].warning(name, where, meaning) for name in sources[kind]]
    return [line for line in lines if line]


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
            text = prompt_text({**document.row, "messages": question or turns}, tokenizer)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(document.words, add_special_tokens=False, verbose=False)["input_ids"]
        if not chat or len(ids) <= room:
            prompts.append(Prompt(text if chat else str(tokenizer.decode(ids[:PROMPT_TOKENS])), chat))
    return prompts
