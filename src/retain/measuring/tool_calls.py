"""Tool calls in what a model writes, and whether they fit the tools that it was offered.

A tokenizer with a `response_template` says itself how its model writes calls, and transformers reads them. Elsewhere a
call is a JSON object of a name and arguments, with or without text around: as Hermes and Qwen
(`<tool_call>{…}</tool_call>`), Llama 3 (`{"name": …, "parameters": …}`) and Mistral (`[TOOL_CALLS][{…}]`, or
`[TOOL_CALLS]name[ARGS]{…}`) write it.
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
    """The calls in a model's answer, in their order; None for one that cannot be read.

    Args:
        raw: with the tokenizer's special tokens, which may be marks of a call.
        prompt: what it continues.
    """
    if getattr(tokenizer, "response_template", None) is None:
        return written_calls(without_reasoning(raw, prompt))
    try:
        message = tokenizer.parse_response(raw, prefix=prompt, tools=list(tools))
    except ValueError:
        return [None]
    found = message.get("tool_calls") or []
    return [as_call(one) for one in (found if isinstance(found, list) else [found])]


def written_calls(text: str) -> list[Call | None]:
    """The calls that a text holds as JSON.

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
    """A JSON object as a call, also in the form of OpenAI's `{"function": {…}}`; None for any other object."""
    of = value["function"] if isinstance(value.get("function"), dict) else value
    name, arguments = of.get("name"), of.get("arguments", of.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = STRICT_JSON.decode(arguments)
        except ValueError:
            return None
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def fits_tools(call: Call | None, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call names an offered tool, with arguments that its JSON schema allows, and no others."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if call is None or call.name not in schemas:
        return False
    return bool(Draft202012Validator({"additionalProperties": False, **schemas[call.name]}).is_valid(call.arguments))


def are_wanted_calls(
    calls: Sequence[Call | None], wanted: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether calls are those wanted, in any order; neither the case of texts counts, nor a default written out."""
    if None in calls or len(calls) != len(wanted):
        return False
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}

    def key(name: str, arguments: Mapping[str, Any]) -> str:
        properties = schemas.get(name, {}).get("properties") or {}
        defaults = {one: about["default"] for one, about in properties.items() if "default" in about}
        return json.dumps([name, _folded(defaults | dict(arguments))], sort_keys=True)

    return sorted(key(*call) for call in calls if call) == sorted(key(one["name"], one["arguments"]) for one in wanted)


def _folded(value: Any) -> Any:
    """A JSON value with its texts in one case, and whole numbers as integers."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _folded(item) for name, item in value.items()}
    return [_folded(item) for item in value] if isinstance(value, list) else value
