"""Behaviours that a program can verify: tool calls, formats, thinking, and turns that end; base against tuned model.

Each is measured on prompts of its own, of which `prompt_sets` has some, put as a chat that both models answer greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retain.checks import Unchosen
from retain.data.chats import chat_of
from retain.data.rows import prompt_text, read_sample
from retain.files import MAPPING, check_shape, first_line
from retain.measuring.choices import MAX_CHARACTERS
from retain.measuring.drift import length_entries
from retain.measuring.format_checks import CHECKS, kept_checks
from retain.measuring.generations import Prompt, Written, both_texts, unanswered_notes
from retain.measuring.measure_options import Options
from retain.measuring.paired_answers import compare_answers
from retain.measuring.thinking import reasoning_of
from retain.measuring.tool_calls import are_wanted_calls, fits_tools, tool_calls
from retain.models.base_predictions import MeasuredBase

PROMPT_SETS = Path(__file__).parent / "prompt_sets"
MAX_EXAMPLES = 12  # prompts whose answers a report keeps, what was lost first
FATES: dict[Any, str] = {(True, True): "kept", (True, False): "lost", (False, True): "gained", (False, False): "never"}
TOOLS_SHAPE = [{"function": {"name": str, "parameters?": MAPPING}}]
CALLS_SHAPE = [{"name": str, "arguments": MAPPING}]

BehaviorRow = Mapping[str, Any]
Flags = dict[str, bool | None]
"""By scorer whether an answer shows the behaviour; None where its prompt does not ask for it."""


def score_tools(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the calls fit the tools and are those wanted; where none is wanted, whether there is none."""
    calls = tool_calls(written.raw, prompt, row["tools"], tokenizer)
    if not row["calls"]:
        return {"right": None, "valid": None, "abstains": not calls}
    valid = bool(calls) and all(fits_tools(call, row["tools"]) for call in calls)
    return {"right": are_wanted_calls(calls, row["calls"], row["tools"]), "valid": valid, "abstains": None}


def score_formats(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the answer keeps every check of its row, and those of each kind."""
    kept = kept_checks(written.answer, row["checks"])
    return {"follows": all(kept.values()), **{check.kind: kept.get(check.kind) for check in CHECKS.values()}}


def score_thinking(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the model thinks before its answer, and whether an answer follows."""
    thinks = bool(reasoning_of(written.raw, prompt))
    return {"thinks": thinks, "concludes": thinks and bool(written.answer.strip())}


def score_turn_ends(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the answer ended by itself, having said something."""
    return {"ends": written.ended and bool(written.text.strip())}


@dataclass(frozen=True)
class Behavior:
    """A kind of behaviour.

    Args:
        max_new_tokens: of an answer, where the user chose nothing.
        columns: what its rows have beside the prompt, and what these hold.
        remedy: what to write there.
        score: the flags of an answer; of scorers that are not in `BEHAVIOR_SCORERS` only the share is shown.
    """

    max_new_tokens: int
    score: Callable[[BehaviorRow, str, Written, Any], Flags]
    columns: Mapping[str, Any]
    remedy: str = ""


BEHAVIORS = {
    "tools": Behavior(128, score_tools, {"tools": TOOLS_SHAPE, "calls": CALLS_SHAPE},
                      "give tools as their JSON schemas, and calls as [{name, arguments}], [] where none is wanted"),
    "formats": Behavior(256, score_formats, {"checks": MAPPING}, f"give checks of {', '.join(CHECKS)}"),
    "thinking": Behavior(512, score_thinking, {}),
    "turn_ends": Behavior(128, score_turn_ends, {}),
}  # fmt: skip


def behavior_sources(specs: Sequence[str]) -> dict[str, str]:
    """The file of each behaviour, from `tools` for the prompts that come with `retain` or `tools=file`.

    >>> behavior_sources(["formats=mine.jsonl"])
    {'formats': 'mine.jsonl'}
    """
    sources: dict[str, str] = {}
    for spec in specs:
        name, given, path = spec.partition("=")
        if name not in BEHAVIORS or (given and not path.strip()):
            raise ValueError(
                f"behaviors: {spec!r} is not known; use {', '.join(BEHAVIORS)}, or one of them as name=file"
            )
        if name in sources:
            raise ValueError(f"behaviors: {name!r} comes twice; put its prompts into one file")
        sources[name] = path or str(PROMPT_SETS / f"{name}.jsonl")
    return sources


def load_behavior(
    name: str, source: str | None = None, *, max_prompts: int | None = None, seed: int = 0
) -> list[BehaviorRow]:
    """Prompts for a behaviour with what is to be verified, from a file or, without one, those that come with `retain`.

    Args:
        name: of `BEHAVIORS`.
        max_prompts: how many to draw with `seed`, in their own order; None for all.
    """
    path = source or behavior_sources([name])[name]
    rows = list(read_sample(path, {}, "behaviors", split="train", max_rows=max_prompts, seed=seed))
    for row, where in rows:
        check_row(name, row, f"behaviors: {where}")
    return [row for row, _ in rows]


def check_row(name: str, row: BehaviorRow, where: str) -> None:
    """Raise a `ValueError`, one line, unless a row holds what its behaviour needs."""
    behavior = BEHAVIORS[name]
    if not turns_of(row):
        raise ValueError(f"{where} has no prompt; give prompt, a text, or messages, up to the answer")
    check_shape(dict(row), behavior.columns, where, behavior.remedy)
    if name == "formats" and not row["checks"]:
        raise ValueError(f"{where} has no checks; {behavior.remedy}")
    for check, value in row["checks"].items() if name == "formats" else ():
        if check not in CHECKS or not CHECKS[check].takes(value):
            raise ValueError(f"{where} has the check {check!r} with {value!r:.80}; {behavior.remedy}, see the docs")
    schemas = [tool["function"].get("parameters") or {} for tool in row["tools"]] if name == "tools" else []
    schemas += [row["checks"]["json"]] if name == "formats" and isinstance(row["checks"].get("json"), dict) else []
    for schema in schemas:
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"{where} has a JSON schema that is none: {error.message:.200}; mend it") from error
    offered = [tool["function"]["name"] for tool in row["tools"]] if name == "tools" else []
    for call in row["calls"] if name == "tools" else ():
        if call["name"] not in offered:
            raise ValueError(f"{where} wants a call of {call['name']!r}, which is not offered; add it to tools")


def turns_of(row: BehaviorRow) -> list[Any]:
    """The chat up to the answer; a prompt that is a text is the user's turn."""
    prompt = row.get("prompt")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else chat_of(row) or []


@dataclass(frozen=True)
class BehaviorPrompts:
    """A behaviour's rows as prompts of a tokenizer, and the options of their answers."""

    name: str
    rows: list[BehaviorRow]
    prompts: list[Prompt]
    options: Options


def behavior_prompts(
    behaviors: Mapping[str, Sequence[BehaviorRow]], options: Options
) -> tuple[list[BehaviorPrompts], list[str]]:
    """The prompts of each behaviour, and a line for each that the tokenizer's chat template cannot put."""
    found, notes = [], []
    for name, rows in behaviors.items():
        if name not in BEHAVIORS:
            raise ValueError(f"behaviors: {name!r} is not known; use {', '.join(BEHAVIORS)}")
        if not rows:
            raise ValueError(f"behaviors: {name} has no prompts; give at least one")
        for at, row in enumerate(rows, start=1):
            check_row(name, row, f"behaviors: row {at} of {name}")
        own = options
        if isinstance(options.max_new_tokens, Unchosen):
            own = replace(options, max_new_tokens=Unchosen(BEHAVIORS[name].max_new_tokens))
        try:
            texts = list(chat_texts(rows, options.tokenizer))
        except Exception as error:  # a template is the checkpoint's own program and may fail in any way
            notes.append(f"{name} is not measured: {first_line(error.__cause__ or error)}")
            continue
        found.append(BehaviorPrompts(name, list(rows), [Prompt(text, chat=True) for text in texts], own))
    return found, notes


def chat_texts(rows: Sequence[BehaviorRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each row through the chat template, with its tools, and the answer's turn opened.

    Raises:
        ValueError: if there is no template, or it leaves the tools out.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template")
    for row in rows:
        text = prompt_text({**row, "messages": turns_of(row)}, tokenizer)
        if any(tool["function"]["name"] not in text for tool in row.get("tools") or ()):
            raise ValueError("the chat template of this tokenizer has no place for tools")
        yield text


def measure_behavior(
    base: PreTrainedModel | MeasuredBase, tuned: PreTrainedModel, given: BehaviorPrompts
) -> dict[str, Any]:
    """Put the prompts of a behaviour to both models; see `behavior_result`, and with thinking also its length."""
    options, behavior = given.options, BEHAVIORS[given.name]
    both = both_texts(MeasuredBase.of(base), tuned, given.prompts, options)
    starts = [prompt.text for prompt in given.prompts]
    scored = [
        [
            behavior.score(row, start, one, options.tokenizer)
            for row, start, one in zip(given.rows, starts, texts, strict=True)
        ]
        for texts in both
    ]
    flags = {name: [[one[name] for one in of_model] for of_model in scored] for name in scored[0][0]}
    result = behavior_result(
        given.name, [str(turns_of(row)[-1]["content"]) for row in given.rows], both, flags, options
    )
    if given.name == "thinking":
        result["thinking"] = thinking_lengths(starts, both, options)
    return result


def thinking_lengths(
    starts: Sequence[str], both: Sequence[Sequence[Written]], options: Options
) -> dict[str, Any] | None:
    """Lengths of thinking, in tokens, over the prompts on which both models think; None without any."""
    cut = partial(options.tokenizer, add_special_tokens=False, verbose=False)
    lengths = [
        [len(cut(reasoning_of(one.raw, start))["input_ids"]) for one, start in zip(texts, starts, strict=True)]
        for texts in both
    ]
    pairs = [pair for pair in zip(*lengths, strict=True) if all(pair)]
    if not pairs:
        return None
    before, after = zip(*pairs, strict=True)
    return length_entries(before, after, seed=options.seed, num_resamples=options.num_resamples)


def behavior_result(
    kind: str,
    prompts: Sequence[str],
    written: Sequence[Sequence[Written]],
    flags: Mapping[str, Sequence[Sequence[bool | None]]],
    options: Options,
) -> dict[str, Any]:
    """What a report holds of a behaviour, from the answers of base and tuned model to the same prompts.

    Args:
        flags: by scorer, of base and tuned, whether each answer shows the behaviour; None: its prompt does not ask.
    """
    scorers: dict[str, Any] = {}
    for name, both in flags.items():
        pairs = [pair for pair in zip(*both, strict=True) if None not in pair]
        scorers |= {name: compare_shares(*zip(*pairs, strict=True))} if pairs else {}
    return {
        "kind": kind,
        "num_prompts": len(prompts),
        "chat_template": bool(options.tokenizer.chat_template),
        "max_new_tokens": int(options.max_new_tokens),
        "scorers": scorers,
        "notes": unanswered_notes("answers", written),
        "examples": _examples(prompts, written, flags),
    }


def compare_shares(base: Sequence[bool], tuned: Sequence[bool]) -> dict[str, Any]:
    """The share of answers of both that show a behaviour, its change, and what became of it, prompt by prompt."""
    found = compare_answers(base, tuned, base, tuned, unit="num_prompts")
    fates = {"kept": "right_right", "lost": "right_wrong", "gained": "wrong_right"}
    counts = {name: found["counts"][key] for name, key in fates.items()}
    result = {"base_rate": found["base_accuracy"], "rate": found["accuracy"], "change": found["change"]}
    return result | {"counts": counts | {"never": len(base) - sum(counts.values())}, "mcnemar_p": found["mcnemar_p"]}


def _examples(
    prompts: Sequence[str], written: Sequence[Sequence[Written]], flags: Mapping[str, Sequence[Sequence[bool | None]]]
) -> list[dict[str, Any]]:
    """A few prompts with both answers: those whose behaviour was lost in the eyes of most scorers first."""
    rows = []
    for at, prompt in enumerate(prompts):
        found = {name: FATES.get((before[at], after[at])) for name, (before, after) in flags.items()}
        texts = {"prompt": prompt, "base": written[0][at].answer, "tuned": written[1][at].answer}
        known = {name: fate for name, fate in found.items() if fate}
        rows.append((known, {name: text[:MAX_CHARACTERS] for name, text in texts.items()}))
    order = ("lost", "gained", "kept", "never")
    rows.sort(key=lambda row: sorted(order.index(one) for one in row[0].values()))
    return [{**texts, "fate": found} for found, texts in rows[:MAX_EXAMPLES]]
