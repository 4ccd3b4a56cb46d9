"""`retain merge`: weights between a finetuned model's and its base's, chosen on rows, written as an ordinary model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain import versions
from retain.checks import setting
from retain.cli.flags import Verb
from retain.cli.measure import load_new_task
from retain.cli.settings import TextSettings
from retain.data.rows import named_sources
from retain.files import PART, exclusive, visible, write_json, write_text
from retain.lab.runner import RunRows, run_key
from retain.measuring.measure import measure
from retain.models.adapters import adapted_model
from retain.models.base_predictions import MeasuredBase
from retain.models.description import default_device
from retain.models.interpolation import Interpolation
from retain.models.loading import load_model, load_tokenizer, loaded_as, stored_dtype
from retain.models.reference import probe
from retain.models.tokenizer_identity import tokenizer_of_tuned
from retain.replay.dataset import load_texts
from retain.report.interpolation_front import InterpolationFront
from retain.report.page import terminal_table
from retain.report.report import ForgettingReport
from retain.report.style import frontier_row, save_png
from retain.training.run_files import settings_of_run
from retain.training.stopping import check_no_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPHAS = tuple(tenths / 10 for tenths in range(11))
KEEP_GAIN = 0.95
RULES = ("keep_gain", "max_ref_kl", "alpha")
MERGE_FILE = "merge.json"
MEASURED = ("start_token", "max_length", "max_windows", "batch_tokens", "num_resamples", "seed")  # of `measure`
CONFIGS = ("config.json", "adapter_config.json")  # without one of these a folder holds no model
MERGE_SCHEMA = "retain.merge/1"
CHOSEN = "chosen on these rows, which makes their numbers slightly optimistic: measure others with `retain measure`"
CARD = """---
base_model: {name}
library_name: {kind}
tags: [merge]
---

# Weights between a base and its finetune

`W_base + {alpha:g} · (W_tuned - W_base)` of the base `{base}` and `{model}`, by `retain merge` (WiSE-FT, arXiv
2109.01903). This share is {rule}.
"""


@dataclass(kw_only=True)
class MergeConfig(TextSettings):
    """`retain merge`: weights between a finetuned model's and its base's."""

    model: str = setting("", "Model after finetuning: a model or an adapter folder, or a Hub id.", required=True)
    output_dir: str = setting(
        "", "Folder for the merged model or adapter, merge.json, figure.png and alphas.jsonl.", required=True
    )
    base: str | None = setting(
        None,
        "Model before finetuning: a Hub id or folder. Default: the one that the adapter names, or that wrote the run's "
        "replay rows.",
    )
    replay_dataset: str | None = setting(
        None,
        "Rows on which ref_kl is measured: a folder that `retain sample` wrote, or a file of text. Default: the replay "
        "rows of the run.",
    )
    keep_gain: float | None = setting(
        None,
        "Take the smallest alpha that keeps at least this share of the gain on new_task, by the lower end of its "
        "interval. Default: 0.95, unless max_ref_kl or alpha is given.",
        low=1e-9,
        high=1,
    )
    max_ref_kl: float | None = setting(
        None,
        "Take the largest alpha whose KL(base || model) on replay_dataset is at most this, by the upper end of its "
        "interval, in nats per token.",
    )
    alpha: float | None = setting(
        None, "Take this alpha, from 0 (base) to 1 (model); without new_task nothing is measured.", high=1
    )

    whole: bool = setting(
        False, "Of an adapter, write the whole model with it merged in, to sample from, to serve, or to finetune again."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: {getattr(self, given[0]):g} does not go with {given[1]}; leave one out")
        if not self.new_task and self.alpha is None:
            raise ValueError("new_task: missing; give held-out rows as --new_task name=file, or --alpha")
        named_sources(self.new_task, "new_task")


def run_merge(config: MergeConfig) -> None:
    """Measure each alpha once, choose one, and write the model with these weights; alone in the folder."""
    folder, run = Path(config.output_dir), settings_of_run(config.model)
    name, fingerprint = (config.base, None) if config.base else base_of(config.model, run)
    with exclusive(folder, "a merged model"):
        ends = [Path(end).resolve() for end in (config.model, name)]
        if folder.resolve() in ends or not (folder / MERGE_FILE).exists():  # else what is there was merged before
            check_no_model(folder)
        tokenizer = load_tokenizer(name, field="base", **config.checkpoint)
        own = tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
        texts = load_merge_texts(config, run, tokenizer) if config.new_task else None
        model = load_model(name, field="base", device=default_device(), **config.loading)
        tuned = load_model(config.model, trust_remote_code=config.trust_remote_code, **loaded_as(model))
        dtype = stored_dtype(name, **config.checkpoint) if config.dtype == "auto" else None
        base, between = MeasuredBase(model), Interpolation(model, tuned, dtype)
        if fingerprint not in (None, base.fingerprint):
            raise ValueError(f"base: {name!r} is no longer the model that wrote the run's replay rows; give --base")
        found: dict[str, Any] = {"alpha": config.alpha, "rule": "as given"}
        report = None
        if texts is not None:
            reports = measure_alphas(config, base, between, texts, own)
            found = measured_choice(config, reports)
            report = reports[found["alpha"]]
        between.set(found["alpha"])
        if config.whole and between.is_adapter:
            between.make_whole()
        write_merged(between, own, folder, {"base": name, "model": config.model, **found}, report)
        print(visible(f"model: {folder}"))


def base_of(model: str, run: Mapping[str, Any]) -> tuple[str, str | None]:
    """The base that an adapter names; else the model that wrote the replay rows of its run, and its fingerprint.

    Raises:
        ValueError: if neither is known.
    """
    if name := adapted_model(model):
        return name, None
    manifest = (run.get("replay_dataset") or {}).get("manifest") or {}
    if not (name := manifest.get("model")):
        raise ValueError(f"base: {model!r} does not name its base; give --base")
    return name, manifest.get("model_fingerprint")


def load_merge_texts(
    config: MergeConfig, run: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """The texts of the new task, and the replay rows, by the names of `measure`'s arguments."""
    source = config.replay_dataset or (run.get("replay_dataset") or {}).get("source")
    if not source:
        raise ValueError(f"replay_dataset: missing, and {config.model!r} names none; give --replay_dataset")
    new_task = load_new_task(config, config.model, run.get("training_arguments") or {}, tokenizer)
    return {
        "new_task": new_task,
        "retention": {"replay": load_texts(source, tokenizer, config.max_documents, field="replay_dataset")},
    }


def measured_choice(config: MergeConfig, reports: Mapping[float, ForgettingReport]) -> dict[str, Any]:
    """What merge.json says of the chosen alpha and the others; shown and drawn as well."""
    front = InterpolationFront.of({alpha: report.results for alpha, report in reports.items()})
    print(*map(visible, terminal_table(front.table)), sep="\n")
    alpha, rule = choose_alpha(config, front)
    figure = frontier_row(front.panels(alpha), 2)  # learning against divergence
    assert figure is not None
    save_png(figure, Path(config.output_dir) / "figure.png")
    if config.alpha is None:
        rule = f"{rule}, {CHOSEN}"
    print(f"alpha {alpha:g}: {rule}")
    return {"alpha": alpha, "rule": rule, **asdict(front), "settings": reports[alpha].data["settings"]}


def measure_alphas(
    config: MergeConfig,
    base: MeasuredBase,
    between: Interpolation,
    texts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[float, ForgettingReport]:
    """A report of each alpha, kept in alphas.jsonl: what was measured alike is not measured again."""
    settings = {name: getattr(config, name) for name in MEASURED}
    weights = [probe(model).numpy().tobytes() for model in (base.model, between.model)]
    digest = hashlib.sha256(b"".join([*weights, repr(texts).encode()])).hexdigest()
    rows, found = RunRows(Path(config.output_dir) / "alphas.jsonl"), {}
    for alpha in ALPHAS if config.alpha is None else sorted({float(config.alpha), 1.0}):
        key = run_key(digest, settings, versions(), alpha)
        if key not in rows.rows:
            between.set(alpha)
            how: dict[str, Any] = {**texts, **settings, "tokenizer": tokenizer, "name": f"alpha {alpha:g}"}
            report = measure(base, between.model, progress=partial(print, f"alpha {alpha:g}:", flush=True), **how)
            rows.append({"key": key, "alpha": alpha, "report": report.data | {"worst": {}}})
        found[alpha] = ForgettingReport(rows.rows[key]["report"])
    return found


def choose_alpha(config: MergeConfig, front: InterpolationFront) -> tuple[float, str]:
    """An alpha by the rule that was asked for, and the rule in words."""
    if config.alpha is not None:
        return config.alpha, "as given"
    if (limit := config.max_ref_kl) is not None:
        return front.within(limit), f"the largest whose ref_kl stays within {limit:g}"
    share = config.keep_gain or KEEP_GAIN
    return front.keeping_gain(share), f"the smallest that keeps {100 * share:g}% of the gain"


def write_merged(
    between: Interpolation,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    summary: dict[str, Any],
    report: ForgettingReport | None,
) -> None:
    """Write the model as it is set now, with tokenizer, card and merge.json; a kill leaves none or the whole."""
    part = folder / f".model{PART}"
    if between.dtype is not None:
        between.model.to(between.dtype)
    between.model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    head = {"schema": MERGE_SCHEMA, "versions": versions(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(part / MERGE_FILE, head | summary)
    kind = "peft" if between.is_adapter else "transformers"
    write_text(part / "README.md", CARD.format(kind=kind, name=json.dumps(summary["base"]), **summary))
    if report is not None:
        report.to_model_card(part / "README.md")
    for old in [*(folder / name for name in CONFIGS), *folder.glob("*.safetensors*")]:
        old.unlink(missing_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: (file.name in CONFIGS, file.name != MERGE_FILE)):
        file.replace(folder / file.name)
    part.rmdir()


VERB = Verb(
    name="merge",
    example="retain merge --model out/ --new_task sql=held.jsonl --output_dir merged/",
    settings=(MergeConfig,),
    run=run_merge,
    resume="run the same command again to resume",
    groups={
        "keep_gain": "Which alpha: one of three",
        "new_task": "The new task, and how texts are measured",
        "dtype": "How models are loaded",
    },
)
