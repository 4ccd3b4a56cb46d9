"""Chats through a tokenizer's chat template, with the row's tools and settings, as in TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from retain.files import first_line

USUAL_ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_SHOWN_ROLES = 6  # in an error about a chat
WRITES_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")  # a template's call, with its date format


def messages_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The turns in a row's `messages` or `conversations`; None if it has neither."""
    if isinstance(row.get("messages"), list):
        return row["messages"]
    if isinstance(row.get("conversations"), list):
        from trl import maybe_convert_to_chatml

        turns = copy.deepcopy(row["conversations"])  # TRL changes them in place
        return list(maybe_convert_to_chatml({"conversations": turns})["messages"])
    return None


def chat_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a row or of its prompt; None if it has none."""
    turns = messages_of(row)
    return row["prompt"] if turns is None and isinstance(row.get("prompt"), list) else turns


def rendered(
    content: Any, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, **options: Any
) -> str:
    """A string unchanged, turns through the chat template; `where` names the row in errors."""
    if isinstance(content, str):
        return content
    return str(apply_template(content, row, tokenizer, where, tokenize=False, **options))


def apply_template(
    turns: list[Any], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, **options: Any
) -> Any:
    """Apply the chat template to turns, with the row's `tools` and `chat_template_kwargs`."""
    if not (turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)):
        raise ValueError(f"{where}: messages {turns!r} are not turns; write [{{role: user, content: …}}, …]")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: messages need a chat template, and this tokenizer has none; give text rows")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where}: tools {tools!r:.80} are not JSON; write a JSON list") from error
    options |= row.get("chat_template_kwargs") or {}
    try:
        return tokenizer.apply_chat_template(turns, tools=tools, **options)
    except Exception as error:  # the template is the checkpoint's program and may raise anything
        roles = [str(turn["role"]) for turn in turns]
        shown = ", ".join(roles[:MAX_SHOWN_ROLES]) + ", …" * (len(roles) > MAX_SHOWN_ROLES)
        raise ValueError(
            f"{where}: the chat template refuses a chat of {shown} ({first_line(error)}); give turns that it accepts"
        ) from error


def keep_date(tokenizer: PreTrainedTokenizerBase, started: str | None) -> None:
    """Make a chat template that writes today's date (Llama 3.2, SmolLM3) write the date on which a job started.

    Otherwise a job that resumes on another day would have other rows. The saved tokenizer keeps its own template.

    Args:
        started: in ISO format, with its time zone; None for a new job.
    """
    if started is None or not WRITES_DATE.search(str(tokenizer.chat_template)):
        return
    date, apply = datetime.fromisoformat(started).astimezone(), tokenizer.apply_chat_template

    def apply_dated(*args: Any, chat_template: str | None = None, tools: Any = None, **options: Any) -> Any:
        template = tokenizer.get_chat_template(chat_template, tools)
        dated = WRITES_DATE.sub(lambda call: repr(date.strftime(call[2])), template)
        return apply(*args, chat_template=dated, tools=tools, **options)

    tokenizer.apply_chat_template = apply_dated


def template_frame(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], **options: Any) -> list[str]:
    """The text that the chat template writes before each turn of a chat with these roles, and after the last.

    Args:
        options: for the template: `tools`, or its own switches.

    Raises:
        ValueError: if there is no template, or it does not write such a chat; the message names no setting.
    """
    if not tokenizer.chat_template:
        raise ValueError("it needs a chat template, and this tokenizer has none")
    placeholders = [f"RETAIN{at}MARK" for at in range(len(roles))]
    turns = [{"role": role, "content": placeholder} for role, placeholder in zip(roles, placeholders, strict=True)]
    try:
        rest = str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # the template is the checkpoint's program and may raise anything
        raise ValueError(f"the chat template fails on a chat of {', '.join(roles)} ({first_line(error)})") from error
    frame = []
    for placeholder in placeholders:
        before, found, rest = rest.partition(placeholder)
        if not found:
            raise ValueError(f"the chat template does not write every turn of a chat of {', '.join(roles)}")
        frame.append(before)
    return [*frame, rest]


def marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks which tokens the assistant wrote."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def training_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """TRL's chat template that marks the assistant's turns, as an option; empty if the tokenizer's marks them."""
    if marks_turns(tokenizer):
        return {}
    from trl import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "assistant_only_loss: the chat template does not mark the assistant's turns with {% generation %}, and TRL "
            "has no template for it that does; mark them in a copy of the tokenizer, or leave the setting out"
        ) from error
    return {} if template is None else {"chat_template": template}
