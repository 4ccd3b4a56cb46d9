"""A plugin that adds replay to Axolotl; its settings stand under `retain` in Axolotl's YAML file.

    plugins: [retain.training.axolotl_plugin.RetainPlugin]
    retain: {replay_dataset: replay/, replay_coef: 1, retention: [wiki=wiki.txt]}

Written for axolotl 0.19.0; of its plugin interface (`axolotl.integrations.base`) it uses the trainer class, the
settings class, and the hook that receives the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, field_validator

from retain.checks import setting
from retain.data.rows import named_sources
from retain.replay.dataset import load_texts
from retain.training.config import ReplayConfig
from retain.training.trainer import ReplayMixin

LOG = get_logger("axolotl.retain")  # Axolotl shows only what its own loggers write
OTHER_TRAINERS = ("rl", "reward_model", "process_reward_model", "trainer_cls")  # settings that choose another trainer


@dataclass(kw_only=True)
class AxolotlReplayConfig(ReplayConfig):
    """The settings under `retain`."""

    replay_dataset: str | None = setting(None, "Replay rows: a folder written by `retain sample`, or a file of text.")
    retention: list[str] = setting(list, "Texts to measure at every evaluation, as name=file.")
    retention_max_documents: int = setting(64, "Documents of each of these texts to measure.", low=1)
    start_token: str | None = setting(
        None, "Token that starts a document in pretraining. Default: chosen automatically."
    )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> AxolotlReplayConfig:
        """The settings of a mapping from a YAML file.

        Raises:
            ValueError: for an unknown setting, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(f"retain: {unknown[0]!r} is no setting; use one of {', '.join(known)}")
        return cls(**given)


class RetainArgs(BaseModel):
    """The plugin's part of Axolotl's settings; Axolotl checks it with its own."""

    retain: dict[str, Any]

    @field_validator("retain")
    @classmethod
    def check_retain(cls, given: dict[str, Any]) -> dict[str, Any]:
        named_sources(AxolotlReplayConfig.of(given).retention, "retention")
        return given


class RetainPlugin(BasePlugin):
    """Puts `ReplayMixin` before Axolotl's own trainer; stops a run whose trainer lacks it."""

    def get_input_args(self) -> str:
        return f"{RetainArgs.__module__}.{RetainArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type:
        from axolotl.core.trainers import AxolotlTrainer

        for name in OTHER_TRAINERS:
            if cfg.get(name):
                raise ValueError(f"{name}: {cfg[name]!r} brings another trainer; put ReplayMixin before it in Python")
        return replay_trainer_class(AxolotlTrainer, AxolotlReplayConfig.of(cfg["retain"]))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not isinstance(trainer, ReplayMixin):
            raise ValueError(f"plugins: another one chose {type(trainer).__name__}; name RetainPlugin first")
        for line in trainer.protection():
            LOG.info(line)


def replay_trainer_class(host: type, config: AxolotlReplayConfig) -> type:
    """A subclass of the host trainer with these settings bound: Axolotl passes only its own arguments."""

    class ReplayAxolotlTrainer(ReplayMixin, host):
        def __init__(self, **kwargs: Any) -> None:
            sources, cut = named_sources(config.retention, "retention"), config.retention_max_documents
            texts = {
                name: load_texts(path, kwargs["processing_class"], cut, field="retention")
                for name, path in sources.items()
            }
            ours = {name: getattr(config, name) for name in ("replay_dataset", "start_token")}
            super().__init__(replay_config=config, retention_datasets=texts, **ours, **kwargs)

    return ReplayAxolotlTrainer
