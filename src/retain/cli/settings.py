"""Settings that verbs share, each described once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from retain.checks import Settings, Unchosen, setting

RETENTION_HELP = "Text on which forgetting is measured, as name=file; repeatable."
CHAIN_HELP = (
    "Treat the models as stages of a chain, in order, each finetuned from the one before and all measured against the "
    "first one's base: show what each text has lost since its loss was lowest."
)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class SeedSettings(Settings):
    """Random seed."""

    seed: int = setting(0, "Random seed.", high=2**63 - 1)


@dataclass(kw_only=True)
class RemoteCodeSettings(Settings):
    """Whether a checkpoint's own code may run."""

    trust_remote_code: bool = setting(False, "Allow the checkpoint's own code, from the Hub or a folder, to run.")


@dataclass(kw_only=True)
class RevisionSettings(RemoteCodeSettings):
    """Version of a model, and whether its own code may run."""

    model_revision: str = setting("main", "Branch, tag or commit on the Hub.")

    @property
    def checkpoint(self) -> dict[str, Any]:
        """These settings as arguments of the functions in `models.loading`."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass(kw_only=True)
class StartTokenSettings(Settings):
    """How documents begin."""

    start_token: str | None = setting(
        None, "Token that starts a document in pretraining, as text or id. Default: chosen automatically and printed."
    )


@dataclass(kw_only=True)
class ModelLoadSettings(RevisionSettings, StartTokenSettings, SeedSettings):
    """How a model is loaded; the names are TRL's."""

    dtype: Dtype = setting("auto", "Dtype of the weights. auto: the checkpoint's own on a GPU, float32 on a CPU.")
    attn_implementation: str | None = setting(
        None, "Attention kernel, e.g. sdpa or eager. Default: what transformers chooses."
    )

    @property
    def loading(self) -> dict[str, Any]:
        """These settings as arguments of `load_model`."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation, **self.checkpoint}


@dataclass(kw_only=True)
class TextSettings(ModelLoadSettings):
    """How texts are read and a model is measured on them."""

    new_task: list[str] = setting(
        list,
        "Held-out text of the new task, as name=file, to measure the gain on the tokens that are trained on; "
        "repeatable.",
    )
    completion_only_loss: bool | None = setting(
        None,
        "In new-task rows with a prompt, count only the completion (true) or all tokens (false), as in TRL. Default: "
        "as in training, else true.",
    )
    assistant_only_loss: bool | None = setting(
        None,
        "In new-task chats, count only the assistant's turns, as in TRL. Default: as in training, else false.",
    )
    max_documents: int | None = setting(None, "Read only the first N documents of each text. Default: all.", low=1)
    max_windows: int | None = setting(
        None,
        "Measure only the first N windows of each document. Default: all; during training, retention is measured on 1.",
        low=1,
    )
    max_length: int = setting(
        Unchosen(512), "Longest window in tokens, including the start token; at most the model's positions.", low=2
    )
    batch_tokens: int = setting(
        Unchosen(2048), "Tokens per forward pass; the default is lowered for vocabularies above 65k.", low=1
    )
    num_resamples: int = setting(2000, "Bootstrap resamples over documents.", low=100)
