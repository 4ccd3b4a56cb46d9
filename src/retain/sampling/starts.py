"""How replay rows begin: from the document start, inside a chat turn, behind the user's prompts, or a mix of these.

A chat may offer tools or ask for thinking, for models that call tools or think: then the model writes the request and
what it answers to such a request.

Which beginning a row gets is a function of its number alone, so a resumed or distributed job gives the same rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from retain.data.chats import template_frame
from retain.models.description import StartToken

MODES = ("document", "chat", "tools", "think", "prompts")
THINKING_SWITCHES = ("enable_thinking", "thinking")  # of chat templates: Qwen's and SmolLM's, DeepSeek's
# Offered in turn, in pairs: name, description, and its arguments with their descriptions.
TOOLS = (
    ("search_web", "Search the web and return the first results.", {"query": "What to look for"}),
    ("read_file", "Return the text of a file.", {"path": "Path of the file"}),
    ("create_event", "Put an event into the calendar.", {"title": "What it is", "date": "Day, as YYYY-MM-DD"}),
    ("find_route", "Return the fastest route between two places.", {"origin": "From where", "destination": "To where"}),
    ("run_python", "Run Python code and return what it prints.", {"code": "The code"}),
    ("get_exchange_rate", "Return the rate between two currencies.", {"base": "Its code", "quote": "Its code"}),
)
GOLDEN = 0.6180339887498949  # fractional parts of its multiples fill [0, 1) evenly, so every stretch keeps the shares


@dataclass(frozen=True)
class Mode:
    """One way to begin: the token ids that may be given, and the share of rows that begin so."""

    name: str
    share: float
    prefixes: list[list[int]]
    end_of_turn: int | None = None


@dataclass(frozen=True)
class Starts:
    """The beginnings of all rows."""

    modes: tuple[Mode, ...]

    def of_row(self, row: int) -> tuple[Mode, list[int]]:
        """The mode of a row and the token ids it begins with."""
        place, reached = ((row + 0.5) * GOLDEN) % 1.0, 0.0
        for mode in self.modes:  # the last, where rounding leaves the shares a little below 1
            reached += mode.share
            if place < reached:
                break
        return mode, mode.prefixes[row % len(mode.prefixes)]

    def describe(self) -> list[dict[str, Any]]:
        """What a manifest keeps: each mode's share, how many beginnings it has, and their fingerprint."""
        return [
            {
                "mode": mode.name,
                "share": mode.share,
                "num_prefixes": len(mode.prefixes),
                "fingerprint": hashlib.sha256(json.dumps(mode.prefixes).encode()).hexdigest()[:16],
            }
            for mode in self.modes
        ]


def plan_starts(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    start: StartToken,
    *,
    chat_turn: str = "user",
    prompts: Sequence[str] = (),
) -> Starts:
    """Read `document`, `chat`, `tools`, `think`, `prompts`, or a mix such as `document=0.7,chat=0.3`.

    Args:
        chat_turn: role whose turn a chat row begins inside; the model writes that turn and what follows.
        prompts: texts that rows of mode `prompts` continue, behind the document start.
    """
    modes = []
    for name, share in start_shares(spec).items():
        if name == "document":
            modes.append(Mode(name, share, [[start.id]]))
        elif name in ("chat", "tools", "think"):
            found = [
                chat_prefix(tokenizer, chat_turn, name, **options) for options in template_options(name, tokenizer)
            ]
            modes.append(Mode(name, share, [ids for ids, _ in found], found[0][1]))
        else:
            cut = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
            if not any(cut):
                what = f"all {len(cut)} rows are empty; give texts" if cut else "missing; give --prompts FILE"
                raise ValueError(f"prompts: {what} for rows that begin with prompts")
            modes.append(Mode(name, share, [[start.id, *ids] for ids in cut if ids]))
    return Starts(tuple(modes))


def start_shares(spec: str) -> dict[str, float]:
    """The share of rows that begin in each way.

    >>> start_shares("document=0.7,chat=0.3")
    {'document': 0.7, 'chat': 0.3}
    """
    shares: dict[str, float] = {}
    for part in spec.split(","):
        name, found, share = part.strip().partition("=")
        try:
            value = float(share) if found else 1.0
        except ValueError:
            value = -1.0
        if name not in MODES or not 0 < value <= 1 or name in shares:
            raise ValueError(
                f"start: {spec!r} does not fit; use one of {', '.join(MODES)}, or a mix like document=0.7,chat=0.3"
            )
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"start: the shares in {spec!r} add up to {sum(shares.values()):g}; make them add up to 1")
    return shares


def template_options(name: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Options of the chat template, for each beginning of such rows."""
    if name == "chat" or not tokenizer.chat_template:  # without one `chat_prefix` refuses
        return [{}]
    template = str(tokenizer.chat_template)
    if name == "tools":
        if "tools" not in template:
            raise ValueError("start: 'tools', but the chat template has no place for tools; use chat")
        offers = zip(TOOLS, (*TOOLS[1:], TOOLS[0]), strict=True)
        return [{"tools": [tool_schema(*tool) for tool in offer]} for offer in offers]
    switch = next((word for word in THINKING_SWITCHES if re.search(rf"\b{word}\b", template)), None)
    if switch is None:
        raise ValueError("start: 'think', but the chat template has no switch for thinking; use chat")
    return [{switch: True}]


def tool_schema(name: str, description: str, arguments: dict[str, str]) -> dict[str, Any]:
    """A tool whose arguments are all strings, as chat templates take it."""
    properties = {argument: {"type": "string", "description": words} for argument, words in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def chat_prefix(
    tokenizer: PreTrainedTokenizerBase, turn: str, name: str = "chat", **options: Any
) -> tuple[list[int], int]:
    """What the chat template writes before the content of a first turn, and the token it ends that turn with."""
    try:
        before, after = template_frame(tokenizer, [turn], **options)
    except ValueError as error:
        raise ValueError(f"start: {name!r} with chat_turn {turn!r}: {error}; use document or prompts") from error
    prefix = tokenizer(before, add_special_tokens=False)["input_ids"]
    end = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    if not prefix or end[0] is None:
        raise ValueError("start: the chat template marks no turns; use document or prompts")
    return prefix, int(end[0])
