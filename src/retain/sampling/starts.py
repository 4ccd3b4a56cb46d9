"""How replay rows start: at the document start, inside a chat turn, after the user's prompts, or a mix of these.

A chat may offer tools or ask for thinking, for models trained for it: the model then writes both the request and its
answer.

A row's prefix depends on its number alone, so a resumed or distributed job gives the same rows.
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
THINKING_SWITCHES = ("enable_thinking", "thinking")  # options of chat templates: Qwen's and SmolLM's, DeepSeek's
# Each row offers a pair of neighbours: name, description, and arguments with their descriptions.
TOOLS = (
    ("search_web", "Search the web and return the first results.", {"query": "What to look for"}),
    ("read_file", "Return the text of a file.", {"path": "Path of the file"}),
    ("create_event", "Put an event into the calendar.", {"title": "What it is", "date": "Day, as YYYY-MM-DD"}),
    ("find_route", "Return the fastest route between two places.", {"origin": "From where", "destination": "To where"}),
    ("run_python", "Run Python code and return what it prints.", {"code": "The code"}),
    ("get_exchange_rate", "Return the rate between two currencies.", {"base": "Its code", "quote": "Its code"}),
)
GOLDEN = 0.6180339887498949  # its multiples mod 1 fill [0, 1) evenly, so any run of consecutive rows keeps the shares


@dataclass(frozen=True)
class Mode:
    """One way to start: its possible prefixes of token ids, and the share of rows that start this way."""

    name: str
    share: float
    prefixes: list[list[int]]
    end_of_turn: int | None = None


@dataclass(frozen=True)
class Starts:
    """The prefixes of all rows."""

    modes: tuple[Mode, ...]

    def of_row(self, row: int) -> tuple[Mode, list[int]]:
        """A row's mode and its prefix."""
        place, cumulative = ((row + 0.5) * GOLDEN) % 1.0, 0.0
        for mode in self.modes:  # ends with the last mode if rounding leaves the shares a little below 1
            cumulative += mode.share
            if place < cumulative:
                break
        return mode, mode.prefixes[row % len(mode.prefixes)]

    def describe(self) -> list[dict[str, Any]]:
        """The description in a manifest: each mode's share, and the number and fingerprint of its prefixes."""
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
    """The starts that `spec` names: `document`, `chat`, `tools`, `think`, `prompts`, or e.g. `document=0.7,chat=0.3`.

    Args:
        chat_turn: the role whose turn a chat row starts; the model writes that turn and what follows.
        prompts: texts that rows of mode `prompts` continue, after the document start.
    """
    modes = []
    for name, share in start_shares(spec).items():
        if name == "document":
            modes.append(Mode(name, share, [[start.id]]))
        elif name in ("chat", "tools", "think"):
            options = template_options(name, tokenizer)
            prefixes, ends = zip(
                *(chat_prefix(tokenizer, chat_turn, name, **chosen) for chosen in options), strict=True
            )
            modes.append(Mode(name, share, list(prefixes), ends[0]))
        else:
            tokenized = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
            if not any(tokenized):
                what = f"all {len(tokenized)} rows are empty; give texts" if prompts else "missing; give --prompts FILE"
                raise ValueError(f"prompts: {what} for rows that begin with prompts")
            modes.append(Mode(name, share, [[start.id, *ids] for ids in tokenized if ids]))
    return Starts(tuple(modes))


def start_shares(spec: str) -> dict[str, float]:
    """The share of rows per mode.

    >>> start_shares("document=0.7,chat=0.3")
    {'document': 0.7, 'chat': 0.3}
    """
    shares: dict[str, float] = {}
    for part in spec.split(","):
        name, equals, share = part.strip().partition("=")
        try:
            value = float(share) if equals else 1.0
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
    """The chat template's options for each prefix of a mode."""
    if name == "chat" or not tokenizer.chat_template:  # without a template `chat_prefix` raises an error
        return [{}]
    template = str(tokenizer.chat_template)
    if name == "tools":
        if "tools" not in template:
            raise ValueError("start: 'tools', but the chat template has no place for tools; use chat")
        pairs = zip(TOOLS, (*TOOLS[1:], TOOLS[0]), strict=True)
        return [{"tools": [tool_schema(*tool) for tool in pair]} for pair in pairs]
    switch = next((option for option in THINKING_SWITCHES if re.search(rf"\b{option}\b", template)), None)
    if switch is None:
        raise ValueError("start: 'think', but the chat template has no switch for thinking; use chat")
    return [{switch: True}]


def tool_schema(name: str, description: str, arguments: dict[str, str]) -> dict[str, Any]:
    """A tool with string arguments, in the form that chat templates take."""
    properties = {argument: {"type": "string", "description": text} for argument, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def chat_prefix(
    tokenizer: PreTrainedTokenizerBase, turn: str, name: str = "chat", **options: Any
) -> tuple[list[int], int]:
    """The tokens that the chat template writes before the content of a first turn, and the token that ends the turn."""
    try:
        before, after = template_frame(tokenizer, [turn], **options)
    except ValueError as error:
        raise ValueError(f"start: {name!r} with chat_turn {turn!r}: {error}; use document or prompts") from error
    prefix = tokenizer(before, add_special_tokens=False)["input_ids"]
    end = tokenizer(after.strip(), add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    if not prefix or end[0] is None:
        raise ValueError("start: the chat template marks no turns; use document or prompts")
    return prefix, int(end[0])
