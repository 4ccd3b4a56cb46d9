"""What base and tuned model write to the same prompts: greedily, and drawn at temperature 1 with one seed for both.

Prompts of one length go through together, so that padding plays no part. The models' own `generation_config`, which
may cut the distribution or punish repetition, is set aside for both alike.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from retain.data.chats import chat_of
from retain.data.rows import prompt_text, user_turn_text
from retain.measuring.base_cache import BaseCache
from retain.measuring.drift import MARKERS, drift, fate, knowledge
from retain.measuring.reasoning import without_reasoning
from retain.measuring.tokens import not_finite
from retain.models.description import max_positions, with_least_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WHO = ("base", "tuned model")


@dataclass(frozen=True)
class Prompt:
    """What both models continue; a chat's text opens its own document, any other is opened by the start token."""

    text: str
    chat: bool = False
    expected: str | None = None
    updated: str | None = None

    def tokens(self, tokenizer: PreTrainedTokenizerBase, start_id: int) -> list[int]:
        """Token ids of the prompt."""
        ids = list(tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids if self.chat and ids else [start_id, *ids]


@dataclass(frozen=True)
class Written:
    """A continuation: its text, its length in tokens, whether it ended by itself, and whether it holds marks."""

    text: str
    num_tokens: int
    ended: bool
    markers: bool
    answer: str
    """The text without reasoning before it; empty where that did not end."""


def as_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Prompt:
    """A row (`text`, `prompt` or `messages`; optionally `expected` and `updated` answers) as a `Prompt`.

    Raises:
        ValueError: one line naming the row, for answers that are not text.
    """
    answers = {name: row.get(name) for name in ("expected", "updated")}
    for name, value in answers.items():
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"prompts: {where} has {name} {value!r:.80}; give the answer's text, or leave it out")
    return Prompt(prompt_text(row, tokenizer, where), chat_of(row) is not None, **answers)


def user_turn(text: str, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> Prompt:
    """A text as a user's turn of the chat template, with the answer's turn opened; or as it is."""
    if not chat_template:
        return Prompt(text)
    return Prompt(user_turn_text(text, tokenizer), chat=True)


def stop_tokens(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, start_id: int) -> list[int]:
    """Tokens that end a text: those of any of the models, the tokenizer's, and the document start.

    The same for base and tuned model, so that lengths compare, though a chat model ends its turns by one of its own.
    """
    found = [tokenizer.eos_token_id, start_id]
    for model in models:
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        found += own if isinstance(own, list) else [own]
    return sorted({int(token) for token in found if token is not None})


@contextmanager
def own_settings_aside(model: Any) -> Iterator[None]:
    """The model's own `generation_config` set aside: `generate` fills from it whatever was not asked for."""
    from transformers import GenerationConfig

    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    saved = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in zip(holders, saved, strict=True):
            holder.generation_config = config


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
    seed: int | None = None,
) -> list[Written]:
    """Continue every prompt (token ids) by at most `max_new_tokens`.

    Args:
        stop: tokens that end a text.
        batch_tokens: tokens of a batch, prompts and continuations together.
        seed: draw at temperature 1 from the whole distribution; None writes greedily.

    Raises:
        ValueError: if what the model predicts is no number: the likeliest token of it would be any.
    """
    from transformers import LogitsProcessorList

    groups: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        groups[len(ids)].append(index)
    found: dict[int, Written] = {}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": list(stop), "pad_token_id": stop[0]}
    options["logits_processor"] = LogitsProcessorList([_numbers_only])
    options |= {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    alone = model.config.model_type == "rwkv"  # in transformers a row goes on from the state of another in its batch
    with own_settings_aside(model), torch.random.fork_rng():
        for length, indices in sorted(groups.items()):
            rows = 1 if alone else max(1, batch_tokens // (length + max_new_tokens))
            for at in range(0, len(indices), rows):
                taken = indices[at : at + rows]
                if seed is not None:
                    torch.manual_seed(seed + taken[0])
                given = torch.tensor([list(prompts[index]) for index in taken], device=model.device)
                output = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)
                for index, row in zip(taken, output[:, length:].tolist(), strict=True):
                    found[index] = _read(row, tokenizer, set(stop), str(tokenizer.decode(prompts[index])))
    return [found[index] for index in range(len(prompts))]


def _numbers_only(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if bool(scores.isnan().any()):
        raise ValueError(
            f"model: its predictions after {input_ids.shape[1]} tokens of a prompt are nan; {not_finite(math.nan)}"
        )
    return scores


def write_both(
    tuned: PreTrainedModel,
    cache: BaseCache,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[str], object] | None = None,
    **asked: Any,
) -> tuple[list[Written], list[Written]]:
    """What base and tuned model write; the base's texts from the cache where they are. Arguments as of `write`."""
    say = progress or (lambda stage: None)
    say("the base writes")
    parts = [[list(ids) for ids in prompts], sorted((name, value) for name, value in asked.items())]
    of_base = partial(write, cache.base, tokenizer, prompts, **asked)
    rows = cache.recall("texts", parts, lambda: [astuple(one) for one in of_base()])
    say("the tuned model writes")
    return [Written(*row) for row in rows], write(tuned, tokenizer, prompts, **asked)


def _read(row: list[int], tokenizer: PreTrainedTokenizerBase, stop: set[int], prompt: str) -> Written:
    end = next((at for at, token in enumerate(row) if token in stop), None)
    kept = row[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    marks = bool(set(kept) & set(tokenizer.all_special_ids)) or bool(MARKERS.search(text))
    raw = str(tokenizer.decode(kept))
    if (answer := without_reasoning(raw, prompt)) == raw:
        return Written(text, len(kept), end is not None, marks, text)
    for mark in tokenizer.all_special_tokens:
        answer = answer.replace(mark, "")
    return Written(text, len(kept), end is not None, marks, answer.strip())


def unanswered_note(where: str, written: Sequence[Written], who: str) -> list[str]:
    """How many texts are reasoning that did not end: there is no answer in them to be judged."""
    count = sum(bool(one.text.strip()) and not one.answer for one in written)
    some = f"{where}: {count} of {len(written)} texts of the {who} are reasoning that did not end"
    return [f"{some}, so nothing is known of those answers; raise max_new_tokens"] * bool(count)


def measure_generations(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    cache: BaseCache | None = None,
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    max_new_tokens: int,
    batch_tokens: int,
    seed: int = 0,
    num_resamples: int = 2000,
    sampled: bool = False,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """The parts of a report on what the models write: `generations`, `drift` by how it was written, `knowledge`."""
    check_room(with_least_room(base, tuned), prompts, max_new_tokens, tokenizer, start_id)
    ids = [prompt.tokens(tokenizer, start_id) for prompt in prompts]
    stop = stop_tokens([base, tuned], tokenizer, start_id)
    asked: dict[str, Any] = {"stop": stop, "max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    notes: list[str] = []
    for how, draw in (("greedy", None), ("sampled", seed))[: 1 + sampled]:
        texts = write_both(tuned, cache or BaseCache(base, None), tokenizer, ids, progress, seed=draw, **asked)
        written = [_row(prompt, how, *both) for prompt, *both in zip(prompts, *texts, strict=True)]
        found[how] = drift(written, seed=seed, num_resamples=num_resamples)
        rows += written
        notes += [
            note for who, of in zip(WHO, texts, strict=True) for note in unanswered_note(f"prompts, {how}", of, who)
        ]
    known = knowledge([row["fate"] for row in rows if row["fate"] is not None])
    return {"generations": rows, "drift": found, "notes": notes, **({"knowledge": known} if known else {})}


def check_room(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
) -> None:
    """Raise a `ValueError` where a prompt and its continuation have no room in the model's positions."""
    limit = max_positions(model)
    longest = max((len(prompt.tokens(tokenizer, start_id)) for prompt in prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens are more than this model's {limit} "
            "positions; use fewer, or shorter prompts"
        )


def _row(prompt: Prompt, how: str, base: Written, tuned: Written) -> dict[str, Any]:
    both = {"base": base, "tuned": tuned}
    return {
        "prompt": prompt.text,
        "base": base.text,
        "tuned": tuned.text,
        "answers": {"base": base.answer, "tuned": tuned.answer},
        "how": how,
        **{name: {who: getattr(one, name) for who, one in both.items()} for name in ("num_tokens", "ended", "markers")},
        "expected": prompt.expected,
        "updated": prompt.updated,
        "fate": fate(base.answer, tuned.answer, prompt.expected, prompt.updated) if how == "greedy" else None,
    }
