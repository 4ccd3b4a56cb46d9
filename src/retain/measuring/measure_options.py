"""What is the same for every text, question, request and prompt of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Options:
    """Settings of `measure` that all of its parts share; each is described there.

    Args:
        start_id: the token that opens a document.
        progress: called with the name of each stage; None for none.
    """

    tokenizer: PreTrainedTokenizerBase
    start_id: int
    batch_tokens: int = 2048
    max_new_tokens: int = 48
    num_resamples: int = 2000
    seed: int = 0
    progress: Callable[[str], object] | None = None

    def stage(self, name: str) -> None:
        """Tell the user what is being done."""
        if self.progress is not None:
            self.progress(name)
