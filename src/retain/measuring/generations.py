"""What base and tuned model write to the same prompts, greedily and at temperature 1 with the same seed.

Only prompts of the same length share a batch, so nothing is padded. The models' own `generation_config`, which may
truncate the distribution or penalise repetition, is ignored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from retain.checks import Unchosen
from retain.data.chats import chat_of
from retain.data.rows import Document, prompt_text, user_turn_text
from retain.measuring.drift import MARKERS, drift, knowledge, knowledge_fate, knows, words_in
from retain.measuring.thinking import without_reasoning
from retain.measuring.tokens import Options, check_finite
from retain.models.base_predictions import MeasuredBase
from retain.models.description import max_positions, with_least_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHO = ("base", "tuned model")
PROMPT_TOKENS = 16  # length of a default prompt, from the first document of each text


@dataclass(frozen=True)
class Prompt:
    """A text for both models to continue. The start token is put before it, unless a chat template rendered it."""

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
    """A continuation: its text, its length in tokens, whether it ended by itself, and whether it has chat markers."""

    text: str
    num_tokens: int
    ended: bool
    markers: bool
    answer: str
    """The text after the reasoning; empty if the reasoning did not end."""
    raw: str
    """The text with special tokens."""


def as_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Prompt:
    """Convert a row (`text`, `prompt` or `messages`, optionally `expected` and `updated` answers) to a `Prompt`."""
    answers = {name: row.get(name) for name in ("expected", "updated")}
    for name, value in answers.items():
        if value is not None and (not isinstance(value, str) or not words_in(value)):
            raise ValueError(f"prompts: {where} has {name} {value!r:.80}; give the answer's words, or leave it out")
    return Prompt(prompt_text(row, tokenizer, f"prompts: {where}"), chat_of(row) is not None, **answers)


def default_prompts(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, room: int) -> list[Prompt]:
    """A prompt from each text for runs without prompts: the first `PROMPT_TOKENS` tokens of its first document.

    The prompt from a chat is everything before its first answer; chats longer than `room` tokens are left out.
    """
    prompts = []
    for source in texts:
        document, chat = source[0], False
        if isinstance(document, Document):
            ids = document.windows[0][1:]
        elif chat := (turns := chat_of(document.row)) is not None:
            before = list(takewhile(lambda turn: turn["role"] != "assistant", turns))
            text = prompt_text({**document.row, "messages": before or turns}, tokenizer, "prompts: a first chat")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(document.words, add_special_tokens=False, verbose=False)["input_ids"]
        if not chat or len(ids) <= room:
            prompts.append(Prompt(text if chat else str(tokenizer.decode(ids[:PROMPT_TOKENS])), chat))
    return prompts


def user_turn(text: str, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> Prompt:
    """A text as a user turn, with the generation prompt after it; unchanged without a chat template."""
    if not chat_template:
        return Prompt(text)
    return Prompt(user_turn_text(text, tokenizer), chat=True)


def stop_tokens(models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, start_id: int) -> list[int]:
    """Tokens that end a text: the EOS tokens of the models and of the tokenizer, and the document start.

    All models stop at the same tokens, so their lengths are comparable.
    """
    tokens = [tokenizer.eos_token_id, start_id]
    for model in models:
        eos = model.generation_config.eos_token_id if model.generation_config is not None else None
        tokens += eos if isinstance(eos, list) else [eos]
    return sorted({int(token) for token in tokens if token is not None})


@contextmanager
def default_generation_config(model: Any) -> Iterator[None]:
    """Replace the model's `generation_config`, from which `generate` takes options that are not given."""
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
def continue_prompts(
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
        batch_tokens: tokens per batch, prompts and continuations together.
        seed: sample at temperature 1 from the whole distribution with this seed; None decodes greedily.

    Raises:
        ValueError: if a prediction is NaN, of which any token could be the likeliest.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(prompts):
        groups[len(ids)].append(index)
    written: dict[int, Written] = {}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": list(stop), "pad_token_id": stop[0]}
    options["logits_processor"] = LogitsProcessorList([_numbers_only])
    options |= {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    unbatched = model.config.model_type == "rwkv"  # transformers continues a row from another row's state
    with default_generation_config(model), torch.random.fork_rng():
        for length, indices in sorted(groups.items()):
            rows = 1 if unbatched else max(1, batch_tokens // (length + max_new_tokens))
            for at in range(0, len(indices), rows):
                batch = indices[at : at + rows]
                if seed is not None:
                    torch.manual_seed(seed + batch[0])
                input_ids = torch.tensor([list(prompts[index]) for index in batch], device=model.device)
                output = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)
                for index, row in zip(batch, output[:, length:].tolist(), strict=True):
                    written[index] = _read(row, tokenizer, set(stop), str(tokenizer.decode(prompts[index])))
    return [written[index] for index in range(len(prompts))]


def _numbers_only(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if bool(scores.isnan().any()):
        check_finite(math.nan, f"model: its predictions after {input_ids.shape[1]} tokens of a prompt are")
    return scores


def options_that_fit(models: Sequence[PreTrainedModel], prompts: Iterable[Prompt], options: Options) -> Options:
    """The options, with a default `max_new_tokens` reduced to what the models' positions allow after every prompt.

    Raises:
        ValueError: if a chosen `max_new_tokens` does not fit, or a prompt leaves no room at all.
    """
    limit = max_positions(with_least_room(*models))
    lengths = [len(prompt.tokens(options.tokenizer, options.start_id)) for prompt in prompts]
    longest, wanted = max(lengths, default=0), options.max_new_tokens
    if not lengths or limit is None or longest + wanted <= limit:
        return options
    if isinstance(wanted, Unchosen) and longest < limit:
        return replace(options, max_new_tokens=Unchosen(limit - longest))
    raise ValueError(
        f"max_new_tokens: {wanted} after a prompt of {longest} tokens exceeds this model's {limit} positions; "
        "use fewer, or shorter prompts"
    )


def both_texts(
    base: MeasuredBase, tuned: PreTrainedModel, prompts: Sequence[Prompt], options: Options, seed: int | None = None
) -> tuple[list[Written], list[Written]]:
    """Continuations by base and tuned model; the base writes once for several tuned models."""
    tokenizer, ids = options.tokenizer, [prompt.tokens(options.tokenizer, options.start_id) for prompt in prompts]
    settings: dict[str, Any] = {"stop": stop_tokens([base.model, tuned], tokenizer, options.start_id), "seed": seed}
    settings |= {"max_new_tokens": options.max_new_tokens, "batch_tokens": options.batch_tokens}
    options.stage("the base writes")
    of_base = base.recall("texts", [ids, settings], lambda: continue_prompts(base.model, tokenizer, ids, **settings))
    options.stage("the tuned model writes")
    return of_base, continue_prompts(tuned, tokenizer, ids, **settings)


def _read(row: list[int], tokenizer: PreTrainedTokenizerBase, stop: set[int], prompt: str) -> Written:
    end = next((at for at, token in enumerate(row) if token in stop), None)
    kept = row[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    markers = bool(set(kept) & set(tokenizer.all_special_ids)) or bool(MARKERS.search(text))
    raw = str(tokenizer.decode(kept))
    if (answer := without_reasoning(raw, prompt)) == raw:
        return Written(text, len(kept), end is not None, markers, text, raw)
    for token in tokenizer.all_special_tokens:
        answer = answer.replace(token, "")
    return Written(text, len(kept), end is not None, markers, answer.strip(), raw)


def unanswered_notes(where: str, texts: Sequence[Sequence[Written]]) -> list[str]:
    """A note for each model with texts that are unfinished reasoning, in which there is no answer to score."""
    notes = []
    for who, written in zip(WHO, texts, strict=True):
        if count := sum(bool(one.text.strip()) and not one.answer for one in written):
            unfinished = f"{where}: {count} of {len(written)} texts of the {who} are reasoning that did not end"
            notes.append(f"{unfinished}, so their answers are unknown; raise max_new_tokens")
    return notes


def measure_generations(
    base: PreTrainedModel | MeasuredBase,
    tuned: PreTrainedModel,
    prompts: Sequence[Prompt],
    options: Options,
    *,
    sampled: bool = False,
) -> dict[str, Any]:
    """The parts of a report on continuations: `generations`, `drift` of greedy and sampled ones, and `knowledge`."""
    rows: list[dict[str, Any]] = []
    drifts: dict[str, Any] = {}
    notes: list[str] = []
    options.stage("continuations")
    for how, seed in (("greedy", None), ("sampled", options.seed))[: 1 + sampled]:
        texts = both_texts(MeasuredBase.of(base), tuned, prompts, options, seed)
        written = [_row(prompt, how, *both) for prompt, *both in zip(prompts, *texts, strict=True)]
        drifts[how] = drift(written, seed=options.seed, num_resamples=options.num_resamples)
        rows += written
        notes += unanswered_notes(f"prompts, {how}", texts)
    questions = [row for row in rows if row["fate"] is not None]
    known = [knows(row["answers"]["base"], row["expected"]) for row in questions]
    facts = knowledge([row["fate"] for row in questions], known)
    return {"generations": rows, "drift": drifts, "notes": notes, **({"knowledge": facts} if facts else {})}


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
        "fate": knowledge_fate(base.answer, tuned.answer, prompt.expected, prompt.updated) if how == "greedy" else None,
    }
