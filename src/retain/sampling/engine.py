"""The sampling engine: whole batches in lockstep through any Hugging Face decoder, one uniform a token.

Replay is a special case that general generation does not exploit: every row has the same length, none stops early,
nothing processes the logits. Rows need no padding mask even where their given beginnings differ in length, for a
given token simply takes the place of a drawn one.

Each row has its own stream of uniforms, a pure function of (seed, row), and each token is the inverse of the
cumulative distribution at one of them. So a row depends neither on the rows beside it, nor on where a job was
killed, nor on `generation_config`: with batches of one size it is the same to the last bit. Between batch sizes the
rounding of logits shifts the cumulative distribution a little, which moves one draw in some hundreds at a vocabulary
of 49k (where many tokens share a small mass); the row then goes another way, as good a draw as the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from retain.models.head import seen_by_head
from retain.models.reference import evaluation_mode, probe_tokens
from retain.replay.provenance import check_draws, rope_switch
from retain.replay.stored_predictions import to_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ROWS, MAX_ROWS_ON_CPU = 512, 64  # of a batch; on a CPU 64 rows already fill the matrix products
SHARE_OF_FREE_MEMORY = 0.5
MAX_NARROW = 512  # hidden size up to which a second CPU thread waits for the first longer than it helps
CACHE_NAMES = ("past_key_values", "cache_params", "state")  # of the cache that decoders return, and take again
CHECKED_ROWS = 2  # of a model's first batch that are compared with passes without a cache
PROBE_LENGTH = 8  # tokens that are predicted with the cache and without, before anything is drawn
MAX_PROBE_DRIFT = 0.1  # share of draws that a cache may change: bf16 changes under 0.5 % (SmolLM2), one unused 77 %
STATE_SIZE = 256  # numbers of state per hidden unit and layer, where no `state_size` says it: an xLSTM's, the largest
takes_cache: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # proven models → whether they take a cache of ours
proven_lengths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # models → the longest rows that were proven


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into a buffer of the final length and hands out views of what is filled.

    `DynamicLayer` copies all it holds at every token.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states of shape (rows, heads, new tokens, head size) and return all so far."""
        if self.length == 0:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.key_buffer, self.value_buffer = (
                states.new_empty(*states.shape[:2], self.max_length, states.shape[3])
                for states in (key_states, value_states)
            )
            self.is_initialized = True
        begin, self.length = self.length, self.length + key_states.shape[2]
        self.key_buffer[:, :, begin : self.length] = key_states
        self.value_buffer[:, :, begin : self.length] = value_states
        self.keys, self.values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]
        return self.keys, self.values


def cached_pass(
    model: PreTrainedModel, input_ids: Int[Tensor, "rows new"], cache: dict[str, Any], **options: Any
) -> tuple[Float[Tensor, "rows new vocab"], dict[str, Any]]:
    """Logits of the new tokens, and the cache that now holds them, by the name under which the model takes it."""
    output = model(input_ids=input_ids, use_cache=True, **cache, **options)
    return output.logits, cache | {name: output[name] for name in CACHE_NAMES if output.get(name) is not None}


def new_cache(model: PreTrainedModel, max_length: int) -> dict[str, Any]:
    """An empty cache by its name, its plain layers preallocated; sliding and recurrent layers stay as they are."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}


def proven_cache(model: PreTrainedModel, max_length: int) -> dict[str, Any]:
    """An empty cache of a model that is proven to predict with one as without; nothing where it makes its own.

    Raises:
        ValueError: if it does not, as where the model ignores the cache and sees the last token alone.
    """
    if model not in takes_cache:
        takes_cache[model] = prove_cache(model, min(PROBE_LENGTH, max_length))
    # This empties the states that RecurrentGemma keeps in its modules.
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return new_cache(model, max_length) if takes_cache[model] else {}


def prove_cache(model: PreTrainedModel, length: int) -> bool:
    """Prove that the model predicts a few tokens with a cache as without; whether it takes a cache that we make.

    One that returns a cache of another name or kind, as Mamba and RWKV do, makes its own.
    """
    tokens = probe_tokens(model.get_input_embeddings().weight.shape[0])[:, :length].to(model.device)
    _, own = cached_pass(model, tokens[:, : length // 2], {})
    ours = not own or type(own.get("past_key_values")) is DynamicCache
    _, cache = cached_pass(model, tokens[:, : length // 2], new_cache(model, length) if ours else {})
    steps = []
    for at in range(length // 2, length):
        logits, cache = cached_pass(model, tokens[:, at : at + 1], cache)
        steps.append(logits[:, -1])
    whole = model(input_ids=tokens, use_cache=False).logits[:, length // 2 :]
    with_cache, without = (torch.softmax(logits.float(), dim=-1) for logits in (torch.stack(steps, dim=1), whole))
    drift = float((with_cache - without).abs().sum(-1).mean() / 2)
    if drift > MAX_PROBE_DRIFT:
        raise ValueError(
            f"model: {model.config.model_type!r} does not continue from its cache as transformers' causal models do "
            f"({drift:.0%} of draws would differ), so its rows would not be its own; sample with --engine vllm, or "
            "replay real text"
        )
    return ours


def row_uniforms(seed: int, row: int, num_draws: int) -> np.ndarray:
    """Uniforms in [0, 1) of one row, shape (num_draws,), float64, from the counter-based generator Philox.

    >>> bool((row_uniforms(0, 7, 2) == row_uniforms(0, 7, 3)[:2]).all())
    True
    """
    raw = np.random.Philox(key=[seed, row]).random_raw(num_draws)
    return (raw >> np.uint64(11)) * 2.0**-53


def draw_tokens(probabilities: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, rows]) -> Int[Tensor, rows]:
    """One draw per row: the inverse of the cumulative distribution, summed in float64.

    A token of probability zero is never drawn. Where a row is no distribution (NaN), any token may come out.

    >>> draw_tokens(torch.tensor([[0.2, 0.0, 0.8]] * 2), torch.tensor([0.1, 0.3])).tolist()
    [0, 2]
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    place = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))  # rounding may reach it
    drawn = torch.searchsorted(cumulative, place.unsqueeze(-1), right=True).squeeze(-1)
    return drawn.clamp_(max=probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class DrawnRows:
    """Rows as they were drawn.

    logprobs: log-probability of the drawn tokens, summed, nats. entropies: of the distributions they were drawn from,
    summed, nats; None from an engine without them. reference: what the model predicted at each drawn token, where it
    is stored; row after row, on the CPU: `hidden` (drawn tokens, hidden size), or `log_probs` and `tokens` (drawn
    tokens, TOP_K).
    """

    tokens: Int[np.ndarray, "rows length"]
    prefix_lengths: Int[np.ndarray, " rows"]
    logprobs: Float[np.ndarray, " rows"]
    entropies: Float[np.ndarray, " rows"] | None
    reference: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[DrawnRows]) -> DrawnRows:
        """Batches of rows one after the other."""
        entropies = [part.entropies for part in parts if part.entropies is not None]
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            prefix_lengths=np.concatenate([part.prefix_lengths for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            entropies=np.concatenate(entropies) if entropies else None,
            reference={name: torch.cat([part.reference[name] for part in parts]) for name in parts[0].reference},
        )

    def columns(self) -> dict[str, np.ndarray]:
        """As columns of a shard; `logprob` and `entropy` are summed over the drawn tokens of a row, in nats."""
        given, logprob = self.prefix_lengths.astype(np.int32), self.logprobs.astype(np.float32)
        columns = {"input_ids": self.tokens, "prefix_length": given, "logprob": logprob}
        return columns if self.entropies is None else {**columns, "entropy": self.entropies.astype(np.float32)}


@dataclass(frozen=True)
class Shard:
    """A shard that is to be drawn: the numbers of its rows, and the token ids that each begins with."""

    number: int
    rows: Sequence[int]
    prefixes: Sequence[Sequence[int]]


Progress = Callable[[int], object]  # called with the number of rows just drawn
# (beginnings, row numbers) -> rows.
Draw = Callable[[Sequence[Sequence[int]], Sequence[int]], DrawnRows]
# (shards, batch size, progress) -> each shard with its rows, in any order.
Engine = Callable[[Sequence[Shard], int, Progress], Iterator[tuple[Shard, DrawnRows]]]


def batch_engine(draw: Draw) -> Engine:
    """The engine that draws one shard after the other in this process, each in batches of one size."""

    def engine(shards: Sequence[Shard], batch_size: int, progress: Progress) -> Iterator[tuple[Shard, DrawnRows]]:
        for shard in shards:
            parts = []
            for at in range(0, len(shard.rows), batch_size):
                batch = slice(at, at + batch_size)
                parts.append(draw(shard.prefixes[batch], shard.rows[batch]))
                progress(len(shard.rows[batch]))
            yield shard, DrawnRows.joined(parts)

    return engine


@torch.inference_mode()
def draw_rows(
    model: PreTrainedModel,
    prefixes: Sequence[Sequence[int]],
    rows: Sequence[int],
    max_length: int,
    seed: int,
    store: str | None = None,
) -> DrawnRows:
    """Draw the rows with these numbers, each of `max_length` tokens, behind its given beginning.

    Args:
        prefixes: token ids that each row begins with; at least one, fewer than `max_length`.
        rows: number of each row, which names its stream of uniforms.
        store: what to keep of the model's predictions: "hidden", "topk", or nothing.

    Raises:
        ValueError: if the model's predictions are not finite, as where half precision overflows, or its cache does
            not carry the context.
    """
    given = np.array([len(prefix) for prefix in prefixes])
    assert given.min() >= 1 and given.max() < max_length, (given.min(), given.max(), max_length)  # noqa: PT018
    device = model.device
    uniforms = torch.from_numpy(np.stack([row_uniforms(seed, row, max_length) for row in rows])).to(device)
    tokens = torch.zeros(len(rows), max_length, dtype=torch.long)
    for at, prefix in enumerate(prefixes):
        tokens[at, : len(prefix)] = torch.tensor(prefix)
    tokens, lengths = tokens.to(device), torch.from_numpy(given).to(device)
    logprobs, entropies = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
    done, kept, first_log_probs, switch = 0, [], [], rope_switch(model)
    with evaluation_mode(model), seen_by_head(model) as hidden:  # with dropout it is not the model's own distribution
        cache = proven_cache(model, max_length)
        for at in range(int(given.min()), max_length):
            last_only = {}
            if switch is not None and 0 < done <= switch < at:  # the cache was encoded otherwise
                done, cache, last_only = 0, proven_cache(model, max_length), {"logits_to_keep": 1}
            logits, cache = cached_pass(model, tokens[:, done:at], cache, **last_only)
            done = at
            log_probs = torch.log_softmax(logits[:, -1].float(), dim=-1)
            probabilities = log_probs.exp()
            drawn = draw_tokens(probabilities, uniforms[:, at])
            free = lengths <= at
            tokens[:, at] = torch.where(free, drawn, tokens[:, at])
            chosen = log_probs.gather(-1, tokens[:, at : at + 1]).squeeze(-1)
            logprobs += torch.where(free, chosen, 0.0)
            first_log_probs.append(chosen[:CHECKED_ROWS])
            entropies += torch.where(free, torch.special.entr(probabilities).sum(-1), 0.0)
            if store is not None:
                kept.append(to_stored(store, hidden[-1][:, -1], log_probs))
            hidden.clear()
    if not bool(entropies.isfinite().all()):
        raise ValueError("dtype: the model's predictions are not finite; load it as float32 or bfloat16")
    if proven_lengths.get(model, 0) < max_length:
        first, first_given = tokens[:CHECKED_ROWS], given[:CHECKED_ROWS].tolist()
        with evaluation_mode(model):
            check_draws(model, first, first_given, torch.stack(first_log_probs, dim=1))
        proven_lengths[model] = max_length
    sums = logprobs.cpu().numpy(), entropies.cpu().numpy()
    return DrawnRows(tokens.cpu().numpy().astype(np.int32), given, *sums, _row_after_row(kept, given))


def _row_after_row(kept: list[dict[str, Tensor]], given: np.ndarray) -> dict[str, Tensor]:
    """Predictions by position, each of shape (rows, size), as one array over the drawn tokens of all rows."""
    if not kept:
        return {}
    positions = torch.arange(len(kept)) + int(given.min())
    drawn = positions >= torch.from_numpy(given).unsqueeze(-1)
    return {name: torch.stack([part[name] for part in kept], dim=1)[drawn] for name in kept[0]}


def choose_threads(model: PreTrainedModel) -> int:
    """CPU threads for drawing: one for a narrow model, else what torch or OMP_NUM_THREADS says.

    A rule rather than a trial: the number of threads may change how sums are rounded, and with it the rows.
    """
    narrow = model.config.get_text_config().hidden_size <= MAX_NARROW
    return 1 if narrow and "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()


def choose_batch_size(model: PreTrainedModel, max_length: int) -> int:
    """Rows that fit into half of the free memory with their cache and predictions: a power of two."""
    config, device = model.config.get_text_config(), model.device
    if attending := getattr(config, "num_attention_heads", None):
        heads = getattr(config, "num_key_value_heads", None) or attending
        size = getattr(config, "head_dim", None) or config.hidden_size // attending
        of_cache = 2 * config.num_hidden_layers * heads * size * max_length * model.dtype.itemsize
    else:  # a state of one size at any length, in float32
        of_cache = 8 * config.num_hidden_layers * config.hidden_size * getattr(config, "state_size", STATE_SIZE)
    of_predictions = 32 * config.vocab_size  # logits, log-probabilities, probabilities in float32; sums in float64
    if device.type == "cpu":
        free, most = psutil.virtual_memory().available, MAX_ROWS_ON_CPU
    else:
        free, most = torch.get_device_module(device).mem_get_info(device)[0], MAX_ROWS
    rows = min(int(SHARE_OF_FREE_MEMORY * free / (of_cache + of_predictions)), most)
    return 1 << (max(1, rows).bit_length() - 1)
