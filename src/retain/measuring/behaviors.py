"""Behaviours that a program can verify, for base and tuned model: tool calls, formats, thinking, and ended turns.

Each has its own chat prompts, such as those in `prompt_sets`, which both models answer greedily.
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
from retain.measuring.paired_answers import compare_answers
from retain.measuring.thinking import reasoning_of
from retain.measuring.tokens import Options
from retain.measuring.tool_calls import are_wanted_calls, fits_tools, tool_calls
from retain.models.base_predictions import MeasuredBase

PROMPT_SETS = Path(__file__).parent / "prompt_sets"
MAX_EXAMPLES = 12  # prompts whose answers a report keeps, lost behaviours first
FATES: dict[Any, str] = {(True, True): "kept", (True, False): "lost", (False, True): "gained", (False, False): "never"}
TOOLS_SHAPE = [{"function": {"name": str, "parameters?": MAPPING}}]
CALLS_SHAPE = [{"name": str, "arguments": MAPPING}]

BehaviorRow = Mapping[str, Any]
Flags = dict[str, bool | None]
"""Scorer → whether an answer shows the behaviour; None if its prompt does not ask for it."""


def score_tools(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the calls fit the tools and are the wanted ones, or whether there is none if none is wanted."""
    calls = tool_calls(written.raw, prompt, row["tools"], tokenizer)
    if not row["calls"]:
        return {"right": None, "valid": None, "abstains": not calls}
    valid = bool(calls) and all(fits_tools(call, row["tools"]) for call in calls)
    return {"right": are_wanted_calls(calls, row["calls"], row["tools"]), "valid": valid, "abstains": None}


def score_formats(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the answer passes every check of its row, and those of each kind."""
    kept = kept_checks(written.answer, row["checks"])
    return {"follows": all(kept.values()), **{check.kind: kept.get(check.kind) for check in CHECKS.values()}}


def score_thinking(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the model thinks before its answer, and whether an answer follows."""
    thinks = bool(reasoning_of(written.raw, prompt))
    return {"thinks": thinks, "concludes": thinks and bool(written.answer.strip())}


def score_turn_ends(row: BehaviorRow, prompt: str, written: Written, tokenizer: PreTrainedTokenizerBase) -> Flags:
    """Whether the answer is not empty and ended by itself."""
    return {"ends": written.ended and bool(written.text.strip())}


@dataclass(frozen=True)
class Behavior:
    """A kind of behaviour.

    Args:
        max_new_tokens: default length of an answer, in tokens.
        score: returns the flags of an answer; for scorers outside `report.tables.BEHAVIOR_SCORERS`, reports show only
            the share.
        columns: the columns of a row other than the prompt, and their shapes.
        remedy: what to write in these columns, for errors.
    """

    max_new_tokens: int
    score: Callable[[BehaviorRow, str, Written, Any], Flags]
    columns: Mapping[str, Any]
    remedy: str = ""


BEHAVIORS = {
    "tools": Behavior(128, score_tools, {"tools": TOOLS_SHAPE, "calls": CALLS_SHAPE},
                      "give tools as JSON schemas, and calls as [{name, arguments}], or [] if no call is wanted"),
    "formats": Behavior(256, score_formats, {"checks": MAPPING}, f"choose checks from {', '.join(CHECKS)}"),
    "thinking": Behavior(512, score_thinking, {}),
    "turn_ends": Behavior(128, score_turn_ends, {}),
}  # fmt: skip


def behavior_sources(specs: Sequence[str]) -> dict[str, str]:
    """Behaviour → file of prompts, from specs such as `tools` for `retain`'s own prompts, or `tools=file`.

    >>> behavior_sources(["formats=mine.jsonl"])
    {'formats': 'mine.jsonl'}
    """
    sources: dict[str, str] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if name not in BEHAVIORS or (equals and not path.strip()):
            raise ValueError(
                f"behaviors: {spec!r} is not known; use {', '.join(BEHAVIORS)}, or one of them as name=file"
            )
        if name in sources:
            raise ValueError(f"behaviors: {name!r} is given twice; put its prompts into one file")
        sources[name] = path or str(PROMPT_SETS / f"{name}.jsonl")
    return sources


def load_behavior(
    name: str, source: str | None = None, *, max_prompts: int | None = None, seed: int = 0
) -> list[BehaviorRow]:
    """Read a behaviour's prompts and what to verify in their answers, from a file or from `retain`'s own set.

    Args:
        name: a key of `BEHAVIORS`.
        source: a file or Hub dataset; None for `retain`'s own prompts.
        max_prompts: prompts to draw with `seed`, keeping their order; None for all.
    """
    path = source or behavior_sources([name])[name]
    rows = list(read_sample(path, {}, "behaviors", split="train", max_rows=max_prompts, seed=seed))
    for row, where in rows:
        check_row(name, row, f"behaviors: {where}")
    return [row for row, _ in rows]


def check_row(name: str, row: BehaviorRow, where: str) -> None:
    """Raise a one-line `ValueError` unless a row has what its behaviour needs."""
    behavior = BEHAVIORS[name]
    if not turns_of(row):
        raise ValueError(f"{where} has no prompt; give prompt, a text, or messages up to the answer")
    check_shape(dict(row), behavior.columns, where, behavior.remedy)
    if name == "formats" and not row["checks"]:
        raise ValueError(f"{where} has no checks; {behavior.remedy}")
    for check, value in row["checks"].items() if name == "formats" else ():
        if check not in CHECKS or not CHECKS[check].takes(value):
            raise ValueError(f"{where} has the check {check!r} with {value!r:.80}; {behavior.remedy} (see the docs)")
    schemas = [tool["function"].get("parameters") or {} for tool in row["tools"]] if name == "tools" else []
    schemas += [row["checks"]["json"]] if name == "formats" and isinstance(row["checks"].get("json"), dict) else []
    for schema in schemas:
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"{where} has an invalid JSON schema: {error.message:.200}; correct it") from error
    offered = [tool["function"]["name"] for tool in row["tools"]] if name == "tools" else []
    for call in row["calls"] if name == "tools" else ():
        if call["name"] not in offered:
            raise ValueError(f"{where} wants a call of {call['name']!r}, which is not in tools; add it there")


def turns_of(row: BehaviorRow) -> list[Any]:
    """The turns before the answer; a text prompt is one user turn."""
    prompt = row.get("prompt")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt.strip() else chat_of(row) or []


@dataclass(frozen=True)
class BehaviorPrompts:
    """A behaviour's rows, their prompts in the chat template, and the options for their answers."""

    name: str
    rows: list[BehaviorRow]
    prompts: list[Prompt]
    options: Options


def behavior_prompts(
    behaviors: Mapping[str, Sequence[BehaviorRow]], options: Options
) -> tuple[list[BehaviorPrompts], list[str]]:
    """The prompts of each behaviour, and a note for each that the chat template does not support."""
    ready, notes = [], []
    for name, rows in behaviors.items():
        if name not in BEHAVIORS:
            raise ValueError(f"behaviors: {name!r} is not known; use {', '.join(BEHAVIORS)}")
        if not rows:
            raise ValueError(f"behaviors: {name} has no prompts; give at least one")
        for at, row in enumerate(rows, start=1):
            check_row(name, row, f"behaviors: row {at} of {name}")
        answer_options = options
        if isinstance(options.max_new_tokens, Unchosen):
            answer_options = replace(options, max_new_tokens=Unchosen(BEHAVIORS[name].max_new_tokens))
        try:
            texts = list(chat_texts(rows, options.tokenizer))
        except Exception as error:  # a template is a program of the checkpoint's and may raise anything
            notes.append(f"{name} is not measured: {first_line(error.__cause__ or error)}")
            continue
        ready.append(BehaviorPrompts(name, list(rows), [Prompt(text, chat=True) for text in texts], answer_options))
    return ready, notes


def chat_texts(rows: Sequence[BehaviorRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Render each row with the chat template, its tools and the generation prompt included.

    Raises:
        ValueError: if there is no template, or it omits the tools.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template")
    for row in rows:
        text = prompt_text({**row, "messages": turns_of(row)}, tokenizer)
        if any(tool["function"]["name"] not in text for tool in row.get("tools") or ()):
            raise ValueError("the chat template of this tokenizer does not support tools")
        yield text


def measure_behavior(
    base: PreTrainedModel | MeasuredBase, tuned: PreTrainedModel, behavior: BehaviorPrompts
) -> dict[str, Any]:
    """Compare a behaviour of both models: what `behavior_result` returns, and `thinking` with its lengths."""
    options, rows = behavior.options, behavior.rows
    options.stage(f"behaviour {behavior.name}")
    both = both_texts(MeasuredBase.of(base), tuned, behavior.prompts, options)
    starts = [prompt.text for prompt in behavior.prompts]
    score = BEHAVIORS[behavior.name].score
    scored = [[score(*answer, options.tokenizer) for answer in zip(rows, starts, texts, strict=True)] for texts in both]
    flags = {name: [[answer[name] for answer in of_model] for of_model in scored] for name in scored[0][0]}
    result = behavior_result(behavior.name, [str(turns_of(row)[-1]["content"]) for row in rows], both, flags, options)
    if behavior.name == "thinking":
        result["thinking"] = thinking_lengths(starts, both, options)
    return result


def thinking_lengths(
    starts: Sequence[str], both: Sequence[Sequence[Written]], options: Options
) -> dict[str, Any] | None:
    """Reasoning lengths in tokens, over the prompts on which both models think; None if there are none."""
    tokenize = partial(options.tokenizer, add_special_tokens=False, verbose=False)
    lengths = [
        [len(tokenize(reasoning_of(one.raw, start))["input_ids"]) for one, start in zip(texts, starts, strict=True)]
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
    """A behaviour's entry in a report, from the answers of base and tuned model to the same prompts.

    Args:
        written: the answers of the base, and of the tuned model.
        flags: scorer → for base and tuned model, whether each answer shows the behaviour; None if not asked for.
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
    """The share of answers that show a behaviour in both models, its change, and counts by `FATES`."""
    paired = compare_answers(base, tuned, base, tuned, unit="num_prompts")
    fates = {"kept": "right_right", "lost": "right_wrong", "gained": "wrong_right"}
    counts = {name: paired["counts"][key] for name, key in fates.items()}
    result = {"base_rate": paired["base_accuracy"], "rate": paired["accuracy"], "change": paired["change"]}
    return result | {"counts": counts | {"never": len(base) - sum(counts.values())}, "mcnemar_p": paired["mcnemar_p"]}


def _examples(
    prompts: Sequence[str], written: Sequence[Sequence[Written]], flags: Mapping[str, Sequence[Sequence[bool | None]]]
) -> list[dict[str, Any]]:
    """A few prompts with both answers and their fates by scorer, lost behaviours first."""
    rows: list[dict[str, Any]] = []
    for at, prompt in enumerate(prompts):
        fates = {name: FATES.get((before[at], after[at])) for name, (before, after) in flags.items()}
        fates = {name: fate for name, fate in fates.items() if fate}
        texts = {"prompt": prompt, "base": written[0][at].answer, "tuned": written[1][at].answer}
        rows.append({name: text[:MAX_CHARACTERS] for name, text in texts.items()} | {"fate": fates})
    order = ("lost", "gained", "kept", "never")
    rows.sort(key=lambda row: sorted(map(order.index, row["fate"].values())))
    return rows[:MAX_EXAMPLES]
