"""`retain`: finetune a language model without it forgetting, and say how much it forgets.

Public names are resolved on first use, so importing the package loads neither torch nor trl.
"""

from __future__ import annotations

import importlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("retain-llm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = {
    "ReplayConfig": "training.config",
    "ReplayDataset": "replay.dataset",
    "load_replay_dataset": "replay.dataset",
    "ReplayMixin": "training.trainer",
    "ReplayTrainer": "training.trainer",
    "ReplaySFTTrainer": "training.trainer",
    "ForgettingCallback": "training.callback",
    "ForgettingLaw": "laws.law",
    "ForgettingReport": "report.report",
    "fit_forgetting_law": "laws.fit",
    "Question": "measuring.choices",
    "load_questions": "measuring.choices",
    "choose_start_token": "models.description",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "Interpolation": "models.interpolation",
    "InterpolationFront": "report.interpolation_front",
    "MeasuredBase": "models.base_predictions",
    "measure": "measuring.measure",
    "kl_divergence": "losses",
    "next_token_loss": "losses",
    "sample_replay": "sampling.write",
}
__all__ = sorted([*_MODULES, "__version__", "versions"])


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of retain and of the libraries that results depend on, and of the packages in `more`."""
    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    libraries = {name: _version(name) for name in (*names, *more)}
    return {"python": platform.python_version(), "retain": __version__, **libraries}


@cache  # looked up for every file that names versions
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'retain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"retain.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
