"""Turns through a tokenizer's chat template, with what else of a row TRL's `SFTTrainer` hands to it."""

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
MAX_SHOWN_ROLES = 6  # of a chat that is refused
WRITES_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")  # a template's call, with its format


def messages_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The turns of a row of messages, also where it has them in the form of `conversations`."""
    if not isinstance(row.get("messages"), list) and isinstance(row.get("conversations"), list):
        from trl import maybe_convert_to_chatml

        turns = copy.deepcopy(row["conversations"])  # which TRL changes in place
        return list(maybe_convert_to_chatml({"conversations": turns})["messages"])
    return row["messages"] if isinstance(row.get("messages"), list) else None


def chat_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The turns that a row has, or that its prompt is; None where it has none."""
    turns = messages_of(row)
    return row["prompt"] if turns is None and isinstance(row.get("prompt"), list) else turns


def rendered(
    content: Any, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, **options: Any
) -> str:
    """Words as they are, turns through the chat template; `where` they are from, for errors."""
    if isinstance(content, str):
        return content
    return str(apply_template(content, row, tokenizer, where, tokenize=False, **options))


def apply_template(
    turns: list[Any], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, **options: Any
) -> Any:
    """The chat template on turns, with what else of the row TRL hands to it."""
    if not (turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)):
        raise ValueError(f"{where}: messages {turns!r} are not turns; write [{{role: user, content: …}}, …]")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: rows of messages need a chat template and this tokenizer has none; give text rows")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where}: tools {tools!r:.80} are not JSON; write a list of them") from error
    options |= row.get("chat_template_kwargs") or {}
    try:
        return tokenizer.apply_chat_template(turns, tools=tools, **options)
    except Exception as error:  # a template is the checkpoint's own program and may refuse turns in any way
        roles = [str(turn["role"]) for turn in turns]
        shown = ", ".join(roles[:MAX_SHOWN_ROLES]) + ", …" * (len(roles) > MAX_SHOWN_ROLES)
        raise ValueError(
            f"{where}: the chat template refuses a chat of {shown} ({first_line(error)}); give the turns that it takes"
        ) from error


def keep_date(tokenizer: PreTrainedTokenizerBase, began: str | None) -> None:
    """Let a chat template that writes today's date (Llama 3.2, SmolLM3) write that of the moment when a job began.

    Else a job that resumes on another day has other rows. What the tokenizer saves stays as it is.

    Args:
        began: in ISO format, with its time zone; None for a job that begins.
    """
    if began is None or not WRITES_DATE.search(str(tokenizer.chat_template)):
        return
    then, apply = datetime.fromisoformat(began).astimezone(), tokenizer.apply_chat_template

    def dated(*args: Any, chat_template: str | None = None, tools: Any = None, **options: Any) -> Any:
        template = tokenizer.get_chat_template(chat_template, tools)
        written = WRITES_DATE.sub(lambda call: repr(then.strftime(call[2])), template)
        return apply(*args, chat_template=written, tools=tools, **options)

    tokenizer.apply_chat_template = dated


def template_frame(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], **options: Any) -> list[str]:
    """What the chat template writes before the content of each turn of a chat with these roles, and behind the last.

    Args:
        options: of the template, as `tools` or a switch of its own.

    Raises:
        ValueError: if there is no template, or it does not write such a chat; without the setting's name.
    """
    if not tokenizer.chat_template:
        raise ValueError("it needs a chat template and this tokenizer has none")
    marks = [f"RETAIN{at}MARK" for at in range(len(roles))]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        rest = str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # a template is the checkpoint's own program and may fail in any way
        raise ValueError(f"the chat template fails on a chat of {', '.join(roles)} ({first_line(error)})") from error
    frame = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(f"the chat template does not write every turn of a chat of {', '.join(roles)}")
        frame.append(before)
    return [*frame, rest]


def marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which tokens the assistant wrote."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def template_of_turns(tokenizer: PreTrainedTokenizerBase, turns: bool | None) -> dict[str, str]:
    """TRL's own template where only the assistant's turns count and the tokenizer's does not mark them."""
    if not turns or marks_turns(tokenizer):
        return {}
    from trl import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "assistant_only_loss: the chat template does not mark the assistant's turns with {% generation %}, and TRL "
            "knows no such template for it; mark them in a copy of the tokenizer, or leave the setting out"
        ) from error
    return {} if template is None else {"chat_template": template}
