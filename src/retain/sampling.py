"""Draws from a model's own distribution: the start token, temperature 1, no truncation, past end-of-document.

Every row has its own stream of uniforms, a pure function of (seed, row), and each token is the inverse of the
cumulative distribution at one of them. So a row does not depend on the rows beside it, on where a job was killed,
or on `generation_config`; only floating-point ties can move it between batch sizes.
Source: Marek et al., self-generated replay.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retain.files import write_json
from retain.models import (
    StartToken,
    choose_start_token,
    max_positions,
    model_fingerprint,
    tokenizer_fingerprint,
)
from retain.reference import evaluation_mode
from retain.replay import MANIFEST, NOT_COMPARED, SCHEMA, read_manifest, shard_path, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLER = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0, "stop_at_eos": False}


def row_uniforms(seed: int, row: int, num_draws: int) -> np.ndarray:
    """Uniforms in [0, 1) of one row, shape (num_draws,), float64, from the counter-based generator Philox."""
    raw = np.random.Philox(key=[seed, row]).random_raw(num_draws)
    return (raw >> np.uint64(11)) * 2.0**-53


def draw_tokens(logits: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, rows]) -> Int[Tensor, rows]:
    """One draw per row from softmax(logits): the inverse of the cumulative distribution, summed in float64.

    A token of probability zero is never drawn.

    Raises:
        ValueError: if a row of logits is no distribution, as where half precision overflows.
    """
    cumulative = torch.softmax(logits.float(), dim=-1).double().cumsum(-1)
    if not bool(cumulative[:, -1].isfinite().all()):
        raise ValueError("dtype: the model's predictions are not finite; load it as float32 or bfloat16")
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1]).unsqueeze(-1), right=True).squeeze(-1)


@torch.inference_mode()
def sample_rows(
    model: PreTrainedModel, start_id: int, rows: Sequence[int], max_length: int, seed: int
) -> Int[Tensor, "rows length"]:
    """Draw the rows with these numbers, each of `max_length` tokens, the start token first."""
    device = model.device
    uniforms = torch.from_numpy(np.stack([row_uniforms(seed, row, max_length - 1) for row in rows])).to(device)
    tokens = torch.full((len(rows), max_length), start_id, dtype=torch.long, device=device)
    cache = None
    with evaluation_mode(model):  # with dropout it would not be the model's own distribution
        for at in range(1, max_length):
            output = model(input_ids=tokens[:, at - 1 : at], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens[:, at] = draw_tokens(output.logits[:, -1], uniforms[:, at - 1])
    return tokens


def sample_replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    *,
    num_rows: int = 256,
    max_length: int = 512,
    seed: int = 0,
    start_token: StartToken | None = None,
    batch_size: int = 32,
    rows_per_shard: int = 256,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Sample a replay dataset into a folder, or finish one that was interrupted.

    Args:
        max_length: tokens per row, the start token included.
        start_token: the document start; chosen from the tokenizer by default.
        progress: called with 0 when drawing begins, then with the number of rows just finished.

    Returns:
        The folder: Parquet shards with columns `row` and `input_ids`, and `manifest.json`.

    Raises:
        ValueError: if the folder holds another dataset, rows are longer than the model can take, or it has an adapter.
    """
    folder = Path(output_dir)
    if hasattr(model, "peft_config"):  # the fingerprint is the base's, so its rows would pass for the base's own
        raise ValueError("model: it has an adapter; sample from its base, or merge the adapter and sample from that")
    limit = max_positions(model)
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length: {max_length} is more than this model's {limit} positions; use at most {limit}")
    manifest = _manifest(model, tokenizer, start_token or choose_start_token(tokenizer))
    manifest |= {"num_rows": num_rows, "max_length": max_length, "seed": seed}
    manifest |= {"batch_size": batch_size, "rows_per_shard": rows_per_shard}
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        _begin(folder, manifest, overwrite)
        if progress is not None:
            progress(0)
        for shard, first in enumerate(range(0, num_rows, rows_per_shard)):
            rows = range(first, min(first + rows_per_shard, num_rows))
            if shard_path(folder, shard).exists():
                if progress is not None:
                    progress(len(rows))
                continue
            batches = []
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                ids = sample_rows(model, manifest["start_token"]["id"], batch, max_length, seed)
                batches.append(ids.cpu().numpy().astype(np.int32))
                if progress is not None:
                    progress(len(batch))
            write_shard(folder, shard, first, np.concatenate(batches))
    return folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for one writer; the lock goes with the process, however it ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output_dir: another process is writing to {str(folder)!r}; wait for it") from None
        yield


def _manifest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: StartToken) -> dict[str, Any]:
    from retain import versions

    return {
        "schema": SCHEMA,
        "model": model.config._name_or_path,
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "start_token": {"id": start.id, "token": start.token, "reason": start.reason},
        "sampler": {**SAMPLER, "dtype": str(model.dtype).removeprefix("torch.")},
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and not (folder / MANIFEST).exists():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if foreign:
            raise ValueError(f"output_dir: {str(folder)!r} holds other files ({foreign[0]}, …); choose an empty folder")


def _begin(folder: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Write the manifest into an empty folder, or check that the dataset there is this one."""
    if not (folder / MANIFEST).exists():
        write_json(folder / MANIFEST, manifest)
        return
    if overwrite:
        for path in folder.glob("shard-*.parquet"):
            path.unlink()
        write_json(folder / MANIFEST, manifest)
        return
    found = read_manifest(folder)
    for key, value in manifest.items():
        if key not in NOT_COMPARED and found.get(key) != value:
            raise ValueError(
                f"output_dir: {str(folder)!r} holds rows with {key} {found.get(key)!r}, asked {value!r}; "
                "choose another folder, or set overwrite_output_dir"
            )
    for path in folder.glob(".*.parquet.*"):  # half-written by a killed run: never renamed, so never read
        path.unlink()
