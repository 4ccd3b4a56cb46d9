"""Replay rows on the Hub: the files that `retain sample` wrote, with a dataset card that names the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from retain.files import first_line, read_json, visible, write_text
from retain.replay.dataset import FISHER_FILE, POOL_FILES, STATISTICS, load_self_generated, read_manifest

POOL_CARD = """---
tags: [retain, replay, self-generated]
size_categories: [{size}]
configs:
- config_name: default
  data_files: shard-*.parquet
---

# Replay rows of {model}

{num_rows:,} rows that `{model}` wrote itself, at temperature 1, by `retain sample`. In a finetune of that model they
keep what it knew:

```bash
retain finetune --model {model} --dataset_name mine.jsonl --output_dir out --replay_dataset {name}
```

Column `input_ids`: token ids of a row, of which the first `prefix_length` were given. Another model refuses them.

| | |
| :-- | :-- |
{facts}
"""


def push_pool(folder: Path, name: str, *, private: bool = False) -> str:
    """Push a finished folder of `retain sample` to the Hub, with a dataset card; returns the dataset's URL.

    Raises:
        ValueError: if rows are missing, or the Hub refuses.
    """
    load_self_generated(folder)
    write_text(folder / "README.md", pool_card(folder, name))
    api = HfApi()
    try:
        url = api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, repo_type="dataset", folder_path=folder, allow_patterns=list(POOL_FILES),
            commit_message="Replay rows",
        )  # fmt: skip
    except (OSError, ValueError) as error:  # bases of the Hub client's errors
        raise ValueError(
            f"push_to_hub: {name!r} was not written: {first_line(error)}; the rows are in {str(folder)!r}; run the "
            "same command to try again"
        ) from error
    return str(url)


def pool_card(folder: Path, name: str) -> str:
    """The dataset card: model, fingerprints, settings and statistics."""
    manifest = read_manifest(folder)
    statistics: Mapping[str, Any] = {}
    if (folder / STATISTICS).exists():
        statistics = read_json(folder / STATISTICS, "push_to_hub", "sample again").get("summary") or {}
    start, sampler = manifest["start_token"], manifest["sampler"]
    facts = {
        "model": f"`{manifest['model']}`, weights `{manifest['model_fingerprint']}`",
        "tokenizer": f"`{manifest['tokenizer_fingerprint']}`",
        "rows begin with": f"`{start.get('token')}` (id {start['id']})",
        "tokens a row": manifest.get("max_length"),
        "seed": manifest.get("seed"),
        "sampler": ", ".join(f"{key} {value}" for key, value in sampler.items()),
        "stored predictions": manifest.get("store_reference") or "none",
        "Fisher information": "stored" if (folder / FISHER_FILE).exists() else "none",
        **{key.replace("_", " "): _format_statistic(value) for key, value in statistics.items() if value is not None},
        "versions": ", ".join(f"{key} {value}" for key, value in manifest.get("versions", {}).items()),
    }
    rows = "\n".join(f"| {key} | {visible(str(value))} |" for key, value in facts.items() if value is not None)
    size = "n<1K" if manifest["num_rows"] < 1000 else "1K<n<10K" if manifest["num_rows"] < 10_000 else "n>10K"
    return POOL_CARD.format(facts=rows, size=size, name=name, model=manifest["model"], num_rows=manifest["num_rows"])


def _format_statistic(value: Any) -> str:
    """A mean with its interval, a share or a count."""
    if isinstance(value, Mapping):
        ci = value.get("ci")
        return f"{value['value']:.4g}" + (f" [{ci[0]:.4g}, {ci[1]:.4g}]" if ci else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
