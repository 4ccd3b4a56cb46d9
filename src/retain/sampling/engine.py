"""The sampling engine: draws whole batches in lockstep with any Hugging Face decoder, one uniform number per token.

It exploits what general generation cannot: every row has the same length, none stops early, and nothing processes the
logits. Rows need no padding mask even if their prefixes differ in length: a given token replaces the drawn one.

Each row has its own stream of uniforms, a pure function of (seed, row), and each token is the inverse of the
cumulative distribution at one of them. So a row depends neither on the other rows of its batch, nor on where a job was
killed, nor on `generation_config`: with batches of one size it is the same to the last bit. Between batch sizes,
rounding of the logits shifts the cumulative distribution a little, which changes about one draw in some hundreds at a
vocabulary of 49k (where many tokens share a small mass); the row then continues differently, but is as good a draw.
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
from retain.replay.provenance import check_draws
from retain.replay.stored_predictions import to_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ROWS, MAX_ROWS_ON_CPU = 512, 64  # per batch; on a CPU 64 rows already fill the matrix products
SHARE_OF_FREE_MEMORY = 0.5
MAX_NARROW = 512  # hidden size up to which a second CPU thread costs more than it helps
CACHE_NAMES = ("past_key_values", "cache_params", "state")  # under which decoders return and take their cache
CHECKED_ROWS = 2  # rows of a model's first batch that are compared with passes without a cache
PROBE_LENGTH = 8  # tokens predicted with and without the cache before anything is drawn
MAX_PROBE_DRIFT = 0.1  # share of draws that a cache may change: bf16 changes < 0.5 % (SmolLM2), an ignored cache 77 %
STATE_SIZE = 256  # values of state per hidden unit and layer, if no `state_size` is set: xLSTM's, the largest
takes_cache: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # proven models → whether they take our cache
proven_lengths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # models → the longest rows proven


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into a buffer of the final length and returns views of its filled part.

    `DynamicLayer` copies its whole content at every token.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states of shape (rows, heads, new tokens, head size); return all states so far."""
        if self.length == 0:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.key_buffer, self.value_buffer = (
                states.new_empty(*states.shape[:2], self.max_length, states.shape[3])
                for states in (key_states, value_states)
            )
            self.is_initialized = True
        start, self.length = self.length, self.length + key_states.shape[2]
        self.key_buffer[:, :, start : self.length] = key_states
        self.value_buffer[:, :, start : self.length] = value_states
        self.keys, self.values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]
        return self.keys, self.values


def cached_pass(
    model: PreTrainedModel, input_ids: Int[Tensor, "rows new"], cache: dict[str, Any]
) -> tuple[Float[Tensor, "rows new vocab"], dict[str, Any]]:
    """Logits of the new tokens, and the cache that now includes them, as a keyword argument of the model."""
    output = model(input_ids=input_ids, use_cache=True, **cache)
    return output.logits, cache | {name: output[name] for name in CACHE_NAMES if output.get(name) is not None}


def new_cache(model: PreTrainedModel, max_length: int) -> dict[str, Any]:
    """An empty cache as a keyword argument; plain layers are preallocated, sliding and recurrent layers are not."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"past_key_values": cache}


def proven_cache(model: PreTrainedModel, max_length: int) -> dict[str, Any]:
    """An empty cache, after proving once that the model predicts the same with a cache; {} if it makes its own.

    Raises:
        ValueError: if the predictions differ, e.g. because the model ignores the cache and sees only the last token.
    """
    if model not in takes_cache:
        takes_cache[model] = prove_cache(model, min(PROBE_LENGTH, max_length))
    # This resets the states that RecurrentGemma keeps in its modules.
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return new_cache(model, max_length) if takes_cache[model] else {}


def prove_cache(model: PreTrainedModel, length: int) -> bool:
    """Prove that the model predicts a few tokens equally with and without a cache; whether it takes our cache.

    A model that returns a cache of another name or type, like Mamba and RWKV, makes its own.
    """
    tokens = probe_tokens(model.get_input_embeddings().weight.shape[0])[:, :length].to(model.device)
    _, returned_cache = cached_pass(model, tokens[:, : length // 2], {})
    takes_ours = not returned_cache or type(returned_cache.get("past_key_values")) is DynamicCache
    _, cache = cached_pass(model, tokens[:, : length // 2], new_cache(model, length) if takes_ours else {})
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
    return takes_ours


def row_uniforms(seed: int, row: int, num_draws: int) -> np.ndarray:
    """A row's uniforms in [0, 1), shape (num_draws,), float64, from the counter-based generator Philox.

    >>> bool((row_uniforms(0, 7, 2) == row_uniforms(0, 7, 3)[:2]).all())
    True
    """
    raw = np.random.Philox(key=[seed, row]).random_raw(num_draws)
    return (raw >> np.uint64(11)) * 2.0**-53


def draw_tokens(probabilities: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, rows]) -> Int[Tensor, rows]:
    """One token per row, by inverting the cumulative distribution, which is summed in float64.

    A token of probability zero is never drawn. A row of NaN gives an arbitrary token.

    >>> draw_tokens(torch.tensor([[0.2, 0.0, 0.8]] * 2), torch.tensor([0.1, 0.3])).tolist()
    [0, 2]
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    target = torch.minimum(
        uniforms * total, torch.nextafter(total, torch.zeros_like(total))
    )  # rounding may reach total
    drawn = torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)
    return drawn.clamp_(max=probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class DrawnRows:
    """Drawn rows with their statistics.

    Attributes:
        logprobs: each row's log-probability, summed over the drawn tokens, nats.
        entropies: each row's entropies of the distributions drawn from, summed, nats; None from an engine without them.
        reference: the model's stored predictions at each drawn token, row after row, on the CPU: `hidden` (drawn
            tokens, hidden size), or `log_probs` and `tokens` (drawn tokens, TOP_K).
    """

    tokens: Int[np.ndarray, "rows length"]
    prefix_lengths: Int[np.ndarray, " rows"]
    logprobs: Float[np.ndarray, " rows"]
    entropies: Float[np.ndarray, " rows"] | None
    reference: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[DrawnRows]) -> DrawnRows:
        """Concatenate batches of rows."""
        entropies = [part.entropies for part in parts if part.entropies is not None]
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            prefix_lengths=np.concatenate([part.prefix_lengths for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            entropies=np.concatenate(entropies) if entropies else None,
            reference={name: torch.cat([part.reference[name] for part in parts]) for name in parts[0].reference},
        )

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of a shard; `logprob` and `entropy` are summed over the drawn tokens of a row, in nats."""
        lengths, logprob = self.prefix_lengths.astype(np.int32), self.logprobs.astype(np.float32)
        columns = {"input_ids": self.tokens, "prefix_length": lengths, "logprob": logprob}
        return columns if self.entropies is None else {**columns, "entropy": self.entropies.astype(np.float32)}


@dataclass(frozen=True)
class Shard:
    """A shard to be drawn: the numbers of its rows, and each row's prefix of token ids."""

    number: int
    rows: Sequence[int]
    prefixes: Sequence[Sequence[int]]


Progress = Callable[[int], object]  # called with the number of rows just drawn
# (prefixes, row numbers) -> rows
Draw = Callable[[Sequence[Sequence[int]], Sequence[int]], DrawnRows]
# (shards, batch size, progress) -> each shard with its rows, in any order
Engine = Callable[[Sequence[Shard], int, Progress], Iterator[tuple[Shard, DrawnRows]]]


def batch_engine(draw: Draw) -> Engine:
    """An engine that draws one shard after the other in this process, each in batches of one size."""

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
    """Draw the rows with these numbers, each continued from its prefix to `max_length` tokens.

    Args:
        prefixes: token ids that each row begins with; at least one, fewer than `max_length`.
        rows: number of each row, which selects its stream of uniforms.
        store: the predictions to keep: "hidden", "topk", or None.

    Raises:
        ValueError: if the model's predictions are not finite, e.g. because half precision overflows, or its cache does
            not carry the context.
    """
    prefix_lengths = np.array([len(prefix) for prefix in prefixes])
    assert 1 <= prefix_lengths.min() <= prefix_lengths.max() < max_length, (prefix_lengths, max_length)
    device = model.device
    uniforms = torch.from_numpy(np.stack([row_uniforms(seed, row, max_length) for row in rows])).to(device)
    tokens = torch.zeros(len(rows), max_length, dtype=torch.long)
    for at, prefix in enumerate(prefixes):
        tokens[at, : len(prefix)] = torch.tensor(prefix)
    tokens, lengths = tokens.to(device), torch.from_numpy(prefix_lengths).to(device)
    logprobs, entropies = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
    done, stored, first_log_probs = 0, [], []
    with evaluation_mode(model), seen_by_head(model) as hidden:  # dropout would change the distribution
        cache = proven_cache(model, max_length)
        for at in range(int(prefix_lengths.min()), max_length):
            logits, cache = cached_pass(model, tokens[:, done:at], cache)
            done = at
            log_probs = torch.log_softmax(logits[:, -1].float(), dim=-1)
            probabilities = log_probs.exp()
            drawn = draw_tokens(probabilities, uniforms[:, at])
            is_drawn = lengths <= at
            tokens[:, at] = torch.where(is_drawn, drawn, tokens[:, at])
            chosen = log_probs.gather(-1, tokens[:, at : at + 1]).squeeze(-1)
            logprobs += torch.where(is_drawn, chosen, 0.0)
            first_log_probs.append(chosen[:CHECKED_ROWS])
            entropies += torch.where(is_drawn, torch.special.entr(probabilities).sum(-1), 0.0)
            if store is not None:
                stored.append(to_stored(store, hidden[-1][:, -1], log_probs))
            hidden.clear()
    if not bool(entropies.isfinite().all()):
        raise ValueError("dtype: the model's predictions are not finite; load it as float32 or bfloat16")
    if proven_lengths.get(model, 0) < max_length:
        with evaluation_mode(model):
            first_lengths = prefix_lengths[:CHECKED_ROWS].tolist()
            check_draws(model, tokens[:CHECKED_ROWS], first_lengths, torch.stack(first_log_probs, dim=1))
        proven_lengths[model] = max_length
    sums = logprobs.cpu().numpy(), entropies.cpu().numpy()
    predictions = _by_row(stored, prefix_lengths)
    return DrawnRows(tokens.cpu().numpy().astype(np.int32), prefix_lengths, *sums, predictions)


def _by_row(stored: list[dict[str, Tensor]], prefix_lengths: np.ndarray) -> dict[str, Tensor]:
    """Predictions by position, each of shape (rows, size), as one tensor over the drawn tokens, row after row."""
    if not stored:
        return {}
    positions = torch.arange(len(stored)) + int(prefix_lengths.min())
    is_drawn = positions >= torch.from_numpy(prefix_lengths).unsqueeze(-1)
    return {name: torch.stack([part[name] for part in stored], dim=1)[is_drawn] for name in stored[0]}


def choose_threads(model: PreTrainedModel) -> int:
    """CPU threads for drawing: one for a narrow model, else the number set in torch or OMP_NUM_THREADS.

    A rule, not a trial: the number of threads may change how sums are rounded, and with it the rows.
    """
    narrow = model.config.get_text_config().hidden_size <= MAX_NARROW
    return 1 if narrow and "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()


def choose_batch_size(model: PreTrainedModel, max_length: int) -> int:
    """The largest power of two of rows that, with cache and predictions, fit into half of the free memory."""
    config, device = model.config.get_text_config(), model.device
    if num_heads := getattr(config, "num_attention_heads", None):
        heads = getattr(config, "num_key_value_heads", None) or num_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        cache_bytes = 2 * config.num_hidden_layers * heads * size * max_length * model.dtype.itemsize
    else:  # a float32 state, of the same size at every length
        cache_bytes = 8 * config.num_hidden_layers * config.hidden_size * getattr(config, "state_size", STATE_SIZE)
    prediction_bytes = 32 * config.vocab_size  # logits, log-probabilities, probabilities in float32; sums in float64
    if device.type == "cpu":
        free, max_rows = psutil.virtual_memory().available, MAX_ROWS_ON_CPU
    else:
        free, max_rows = torch.get_device_module(device).mem_get_info(device)[0], MAX_ROWS
    rows = min(int(SHARE_OF_FREE_MEMORY * free / (cache_bytes + prediction_bytes)), max_rows)
    return 1 << (max(1, rows).bit_length() - 1)
