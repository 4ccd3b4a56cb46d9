"""What the base said when it was last measured, kept on disk, so that a second tuned model costs less.

Kept are the base's hidden states at its output head (never its logits, which are a hundred times larger and follow from
them by one product), its answers to questions, and the texts it wrote. Each entry is keyed by a hash of everything that
it follows from: every bit of the base's weights, its configuration, dtype, attention kernel, device, versions, and the
very tokens in their batches. So a result from the cache is the result without it, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retain import versions
from retain.files import PART, hold_together, naming, write_text
from retain.measuring.tokens import Forward, logits_of
from retain.models.description import base_parameter_name, model_fingerprint, sums_of_bits
from retain.models.head import HeadForm, find_head_form, seen_by_head

MOST_BYTES = 2 << 30  # of one text's hidden states; a larger text is measured without the cache
MOST_BYTES_IN_ALL = 8 << 30  # of the folder; what was not used for longest goes first


class BaseCache:
    """Results of one base.

    Args:
        base: the base, in evaluation mode.
        folder: where they are kept; None keeps nothing. Nothing is kept of a base with an adapter, whose weights the
            fingerprint leaves out.
    """

    def __init__(self, base: Any, folder: Path | None) -> None:
        adapted = any(base_parameter_name(name) is None for name, _ in base.named_parameters())
        self.base, self.folder = base, None if adapted else folder
        self.hits, self.identity = 0, ""
        self.form: HeadForm | None = None
        if self.folder is not None:
            weakref.finalize(self, os.close, hold_together(self.folder))
            self.form = find_head_form(base)
            self.identity = _digest(
                bits_of(base),
                config_of(base),
                str(base.dtype),
                base.config._attn_implementation,
                str(base.device),
                torch.get_num_threads(),
                versions(),
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's weights; read once, since that takes a pass over all of them."""
        return model_fingerprint(self.base)

    def _path(self, kind: str, *parts: Any) -> Path:
        assert self.folder is not None
        return self.folder / f"{kind}-{_digest(self.identity, *parts)}"

    def recall(self, kind: str, parts: Sequence[Any], make: Callable[[], Any]) -> Any:
        """`make()`, or what it gave last time; plain data.

        Args:
            parts: everything but the base that the result follows from.
        """
        if self.folder is None:
            return make()
        path = self._path(kind, *parts).with_suffix(".json")
        if path.is_file():
            os.utime(path)
            self.hits += 1
            return json.loads(path.read_text(encoding="utf-8"))
        found = json.loads(json.dumps(make()))
        write_text(path, json.dumps(found))
        return found

    @contextmanager
    def forward(self, windows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[Forward]:
        """The base as a function to logits, for these windows in batches of so many tokens.

        Hidden states come from the cache where they are, and go there otherwise.
        """
        if self.folder is None or self.form is None or self._size(windows) > MOST_BYTES:
            yield logits_of(self.base)
            return
        path = self._path("states", [list(window) for window in windows], batch_tokens)
        if path.is_dir():
            os.utime(path)
            self.hits += 1
            yield self._recalled(path)
            return
        temporary = Path(tempfile.mkdtemp(prefix=".measuring-", suffix=PART, dir=self.folder))
        try:
            yield self._remembering(temporary)
            if not path.exists():
                temporary.rename(path)  # whole or not at all
            self._make_room()
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _size(self, windows: Sequence[Sequence[int]]) -> int:
        module = self.base.get_output_embeddings()
        return sum(map(len, windows)) * module.weight.shape[1] * self.base.dtype.itemsize

    def _remembering(self, folder: Path) -> Forward:
        count = 0

        def forward(**inputs: Tensor) -> Tensor:
            nonlocal count
            with seen_by_head(self.base) as seen:
                logits = logits_of(self.base)(**inputs)
            kept = {"hidden": seen[0].contiguous().cpu(), "tokens": inputs["input_ids"].cpu()}
            with naming(folder.parent):
                save_file(kept, folder / f"{count:06d}.safetensors")
            count += 1
            return logits

        return forward

    def _recalled(self, folder: Path) -> Forward:
        files = iter(sorted(folder.glob("*.safetensors")))
        assert self.form is not None
        head = self.form.head(self.base.get_output_embeddings())

        def forward(**inputs: Tensor) -> Tensor:
            stored = load_file(next(files), device=str(self.base.device))
            assert torch.equal(stored["tokens"], inputs["input_ids"]), "batches are not those that were stored"
            return head.logits(stored["hidden"])

        return forward

    def _make_room(self) -> None:
        """Let the oldest entries go until the folder keeps to its size."""
        assert self.folder is not None
        entries = sorted(self.folder.glob("states-*"), key=lambda entry: entry.stat().st_mtime)
        sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in entries]
        for entry, size in zip(entries, list(sizes), strict=True):
            if sum(sizes) <= MOST_BYTES_IN_ALL:
                return
            sizes.remove(size)
            shutil.rmtree(entry, ignore_errors=True)


@torch.no_grad()
def bits_of(model: Any) -> str:
    """Hash over every bit of parameters and buffers; a `model_fingerprint` is blind below bfloat16's rounding."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        kind = whole[tensor.element_size()]
        sums = sums_of_bits(tensor, lambda values, kind=kind: values.view(kind))  # type: ignore[misc]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{sums}\n".encode())
    return digest.hexdigest()


def config_of(model: Any) -> dict[str, Any]:
    """A model's configuration, but for where it lies and who wrote it."""
    told = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in told.items() if name not in ("_name_or_path", "transformers_version")}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
