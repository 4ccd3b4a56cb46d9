"""Read tool calls from a model's text, and check them against the tools that it was offered.

If the tokenizer has a `response_template`, transformers parses the calls. Otherwise a call is a JSON object with a name
and arguments, with or without text around it, as Hermes and Qwen (`<tool_call>{…}</tool_call>`), Llama 3
(`{"name": …, "parameters": …}`) and Mistral (`[TOOL_CALLS][{…}]` or `[TOOL_CALLS]name[ARGS]{…}`) write it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerBase

from retain.measuring.format_checks import STRICT_JSON
from retain.measuring.thinking import without_reasoning

_MARK = re.compile(r"<tool_call>")
_BEGINS = re.compile(r'\{\s*"(?:name|function|type)"\s*:')
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*\Z")


class Call(NamedTuple):
    """A tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


def tool_calls(
    raw: str, prompt: str, tools: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[Call | None]:
    """The calls in a model's answer, in order; None for each malformed one.

    Args:
        raw: the answer with special tokens, which may mark a call.
        prompt: the text before it.
    """
    if getattr(tokenizer, "response_template", None) is None:
        return written_calls(without_reasoning(raw, prompt))
    try:
        message = tokenizer.parse_response(raw, prefix=prompt, tools=list(tools))
    except ValueError:
        return [None]
    calls = message.get("tool_calls") or []
    return [as_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def written_calls(text: str) -> list[Call | None]:
    """The JSON calls in a text, in order; None for each malformed one.

    >>> written_calls('Sure. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> {"name": "add", "argu')
    [Call(name='add', arguments={'a': 1}), None]
    """
    calls, at = list[Call | None](), 0
    while (at := text.find("{", at)) >= 0:
        named = _NAMED.search(text, 0, at)
        try:
            value, end = STRICT_JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            calls += [None] * bool(named or _BEGINS.match(text, at))
            at += 1
            continue
        call = Call(named[1], value) if named else as_call(value)
        calls += [call] * (call is not None)
        at = end
    return calls + list[Call | None]([None]) * (len(_MARK.findall(text)) - len(calls))


def as_call(value: dict[str, Any]) -> Call | None:
    """Convert a JSON object to a call, also in OpenAI's form `{"function": {…}}`; None for any other object."""
    call = value["function"] if isinstance(value.get("function"), dict) else value
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = STRICT_JSON.decode(arguments)
        except ValueError:
            return None
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def fits_tools(call: Call | None, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call names an offered tool, and its arguments conform to the tool's JSON schema, without extra ones."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if call is None or call.name not in schemas:
        return False
    return bool(Draft202012Validator({"additionalProperties": False, **schemas[call.name]}).is_valid(call.arguments))


def are_wanted_calls(
    calls: Sequence[Call | None], wanted: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the calls are the wanted ones, in any order, ignoring case and arguments equal to their defaults."""
    if None in calls or len(calls) != len(wanted):
        return False
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def key(name: str, arguments: Mapping[str, Any]) -> str:
        properties = schemas.get(name, {}).get("properties") or {}
        defaults = {argument: about["default"] for argument, about in properties.items() if "default" in about}
        return json.dumps([name, _folded(defaults | dict(arguments))], sort_keys=True)

    return sorted(key(*call) for call in calls if call) == sorted(
        key(call["name"], call["arguments"]) for call in wanted
    )


def _folded(value: Any) -> Any:
    """A JSON value with case-folded texts, single spaces, and whole floats as integers."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _folded(item) for name, item in value.items()}
    return [_folded(item) for item in value] if isinstance(value, list) else value
