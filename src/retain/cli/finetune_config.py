"""The settings that `retain finetune` adds to the flags of `trl sft`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from retain.checks import setting
from retain.cli.settings import RETENTION_HELP, StartTokenSettings
from retain.training.config import ReplayConfig, StoppingConfig
from retain.training.protection_choice import FOLLOWING, PROTECTING, UNSET, ProtectionChoice, fill_in


@dataclass(kw_only=True)
class FinetuneConfig(ReplayConfig, StoppingConfig, StartTokenSettings):
    """Settings of `retain finetune` in addition to those of `trl sft`."""

    replay_dataset: str | None = setting(
        None,
        "Replay rows: a folder written by `retain sample`, or a Hub dataset that it pushed; a JSONL, text or Parquet "
        "file of real text; or 'self' to sample from the model first. [required, unless replay_objective is kl_new or "
        "replay_coef 0]",
    )
    replay_num_rows: int | None = setting(
        None,
        "Rows to sample before training, with replay_dataset self. Default: a tenth of the replay rows that the run "
        "draws, but at least 256, and no more than it draws unless an anchor reads them.",
        low=1,
    )
    compare_plain: bool = setting(
        False,
        "Also train without protection on the same rows, with the same seed and steps, in output_dir/plain, and show "
        "both runs on one page.",
    )
    dry_run: bool = setting(
        False,
        "Train nothing: show the device, the rows, the replay pool and the protection, then measure over a few steps, "
        "with protection and without, how much memory and time the run would take.",
    )
    keep_plain: bool = setting(False, "Keep the unprotected run's model and checkpoints.")
    eval_dataset_name: str | None = setting(
        None, "Held-out rows of the new task: a file or Hub id. Default: the dataset's test split."
    )
    retention: list[str] = setting(list, RETENTION_HELP)
    retention_max_documents: int = setting(
        64,
        "Documents of each retention text to measure during training, the first max_length tokens of each; `retain "
        "measure` reads whole documents unless --max_windows is 1.",
        low=1,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after this many evaluations without a better metric_for_best_model, e.g. retention/wiki/ref_kl. A "
        "resumed run starts counting at 0.",
        low=1,
    )

    def __post_init__(self) -> None:
        self.given = [name for name in PROTECTING if getattr(self, name) is not UNSET]
        self.chosen = fill_in(self)
        self._following = {name: value for name in FOLLOWING if (value := getattr(self, name)) is not UNSET}
        for name in FOLLOWING - self._following.keys():
            setattr(self, name, getattr(ReplayConfig, name))
        super().__post_init__()
        if self.compare_plain and not (self.protects and self.measures):
            missing = "a text to measure (retention, or replay_dataset self)" if self.protects else "a protected run"
            raise ValueError(f"compare_plain: true needs {missing}; give one, or leave it out")

    def choose(self, choice: ProtectionChoice, batch_size: int, steps: int) -> None:
        """Take the protection of `choice`, but the start, batch and frequency of replay that the user set, if any."""
        start = self._following.get("replay_start", choice.replay_start)
        rows = self._following.get("per_device_replay_batch_size")
        every = self._following.get("replay_every")
        if rows is None and every is None:
            rows, every = choice.rows_and_every(batch_size, steps)
        self.chosen = replace(choice, replay_start=start)
        self.replay_start, self.per_device_replay_batch_size, self.replay_every = start, rows, every or 1
        for name in PROTECTING:
            setattr(self, name, getattr(choice, name))

    @property
    def measures(self) -> bool:
        """Whether there is a text to measure."""
        return bool(self.retention) or self.replay_dataset == "self"

    def unprotected(self) -> FinetuneConfig:
        """These settings without protection, for the run to compare with."""
        off: dict[str, Any] = {"replay_coef": 0.0, "anchor_coef": 0.0, "max_ref_kl": None, "compare_plain": False}
        config = replace(self, replay_objective="kl", replay_reference="auto", **off)
        config.is_baseline = True
        return config
