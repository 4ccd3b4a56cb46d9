"""Settings that all parts of a measurement share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Options:
    """Settings of `measure`, where they are described, and `start_id`, the token that starts a document."""

    tokenizer: PreTrainedTokenizerBase
    start_id: int
    batch_tokens: int = 2048
    max_new_tokens: int = 48
    num_resamples: int = 2000
    seed: int = 0
    progress: Callable[[str], object] | None = None

    def stage(self, name: str) -> None:
        """Report the name of the stage that begins."""
        if self.progress is not None:
            self.progress(name)
