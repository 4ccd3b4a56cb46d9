"""`retain merge`: weights between a finetuned model's and its base's, chosen on rows, written as an ordinary model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

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
from retain.models.checkpoint_mean import write_mean
from retain.models.description import default_device
from retain.models.interpolation import Interpolation
from retain.models.loading import load_model, load_tokenizer, loaded_as, stored_dtype, tokenizer_of_tuned
from retain.models.reference import probe
from retain.replay.dataset import load_texts
from retain.report.interpolation_front import MODEL, FrontPoint, InterpolationFront
from retain.report.numbers import quantity
from retain.report.page import terminal_table
from retain.report.report import ForgettingReport
from retain.report.style import frontier_row, save_png
from retain.training.run_files import settings_of_run
from retain.training.stopping import check_no_model, whole_checkpoints

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

`W_base + {alpha:g} · (W_tuned - W_base)` of the base `{base}` and {tuned}, by `retain merge` (WiSE-FT, arXiv
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
        "Model before finetuning: a Hub id or folder. Default: the base that the adapter names, or the model that "
        "wrote the run's replay rows.",
    )
    replay_dataset: str | None = setting(
        None,
        "Rows on which ref_kl is measured: a folder written by `retain sample`, or a file of text. Default: the run's "
        "own replay rows.",
    )
    average_checkpoints: int | None = setting(
        None,
        "Also measure the mean of the weights of the run's last N checkpoints (LAWA), and use it if it is the better "
        "end; with alpha, always use it. For a LoRA this is the mean of B·A, with N times the rank.",
        low=2,
    )
    keep_gain: float | None = setting(
        None,
        "Choose the lowest ref_kl that keeps at least this share of the model's gain on new_task, by the lower end of "
        "its interval. Default: 0.95, unless max_ref_kl or alpha is given.",
        low=1e-9,
        high=1,
    )
    max_ref_kl: float | None = setting(
        None,
        "Choose the lowest loss on new_task whose KL(base || model) on replay_dataset is at most this, by the upper "
        "end of its interval, in nats per token.",
    )
    alpha: float | None = setting(
        None, "Use this alpha, from 0 (base) to 1 (model); without new_task nothing is measured.", high=1
    )

    whole: bool = setting(
        False,
        "For an adapter, write the whole model with the adapter merged in, to sample from, serve or finetune again.",
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
    averaged = last_checkpoints(config)
    with (
        exclusive(folder, "a merged model"),
        TemporaryDirectory(prefix=".mean-", suffix=PART, dir=folder, ignore_cleanup_errors=True) as temporary,
    ):
        is_end = folder.resolve() in [Path(end).resolve() for end in (config.model, name)]
        if is_end or not (folder / MERGE_FILE).exists():  # else what is there was merged before
            check_no_model(folder)
        tokenizer = load_tokenizer(name, field="base", **config.checkpoint)
        own = tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
        texts = load_merge_texts(config, run, tokenizer) if config.new_task else None
        model = load_model(name, field="base", device=default_device(), **config.loading)
        dtype = stored_dtype(name, **config.checkpoint) if config.dtype == "auto" else None
        base, ends = MeasuredBase(model), {MODEL: config.model}
        if fingerprint not in (None, base.fingerprint):
            raise ValueError(f"base: {name!r} is no longer the model that wrote the run's replay rows; give --base")
        if averaged:
            mean = Path(temporary, "mean")
            write_mean(averaged, mean)
            ends[f"mean of {len(averaged)} checkpoints"] = str(mean)

        def toward(end: str) -> Interpolation:
            tuned = load_model(ends[end], trust_remote_code=config.trust_remote_code, **loaded_as(model))
            return Interpolation(model, tuned, dtype)

        *_, last = ends
        found: dict[str, Any] = {"end": last, "alpha": config.alpha, "rule": "as given"}
        report, between = None, None
        if texts is not None:
            reports = {}
            for end in ends:
                between = None  # one at a time in memory
                between = toward(end)
                reports[end] = measure_alphas(config, base, between, texts, own, end)
            found = measured_choice(config, reports)
            report = reports[found["end"]][found["alpha"]]
        if between is None or found["end"] != last:
            between = None
            between = toward(found["end"])
        between.set(found["alpha"])
        if config.whole and between.is_adapter:
            between.make_whole()
        used = [] if found["end"] == MODEL else [str(path) for path in averaged]
        write_merged(between, own, folder, {"base": name, "model": config.model, "checkpoints": used, **found}, report)
        print(visible(f"model: {folder}"))


def last_checkpoints(config: MergeConfig) -> list[Path]:
    """The checkpoints of the run that are averaged; none where that is not asked for.

    Raises:
        ValueError: if the run kept fewer.
    """
    if (count := config.average_checkpoints) is None:
        return []
    found = whole_checkpoints(Path(config.model))
    if len(found) < count:
        raise ValueError(
            f"average_checkpoints: {count}, but {config.model!r} holds {quantity(len(found), 'whole checkpoint')}; "
            "give a run's folder, or train with save_strategy steps, a shorter save_steps and a larger save_total_limit"
        )
    return found[-count:]


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


def measured_choice(config: MergeConfig, reports: Mapping[str, Mapping[float, ForgettingReport]]) -> dict[str, Any]:
    """What merge.json says of the chosen end and alpha, and of the others; shown and drawn as well."""
    found = {end: {alpha: report.results for alpha, report in of.items()} for end, of in reports.items()}
    front = InterpolationFront.of(found.pop(MODEL), found)
    print(*map(visible, terminal_table(front.table)), sep="\n")
    point, rule = choose_point(config, front)
    figure = frontier_row(front.panels(point), len(reports) + 1)  # learning against divergence
    assert figure is not None
    save_png(figure, Path(config.output_dir) / "figure.png")
    if config.alpha is None:
        rule = f"{rule}, {CHOSEN}"
    print(f"{measured_name(point.end, point.alpha)}: {rule}")
    settings = reports[point.end][point.alpha].data["settings"]
    return {"end": point.end, "alpha": point.alpha, "rule": rule, **asdict(front), "settings": settings}


def measured_name(end: str, alpha: float) -> str:
    """What a measured point is called."""
    return f"alpha {alpha:g}" if end == MODEL else f"{end}, alpha {alpha:g}"


def measure_alphas(
    config: MergeConfig,
    base: MeasuredBase,
    between: Interpolation,
    texts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    end: str,
) -> dict[float, ForgettingReport]:
    """A report of each alpha, kept in alphas.jsonl: what was measured alike is not measured again."""
    settings = {name: getattr(config, name) for name in MEASURED}
    weights = [probe(model).numpy().tobytes() for model in (base.model, between.model)]
    digest = hashlib.sha256(b"".join([*weights, repr(texts).encode()])).hexdigest()
    rows, found = RunRows(Path(config.output_dir) / "alphas.jsonl"), {}
    for alpha in ALPHAS if config.alpha is None else sorted({float(config.alpha), 1.0}):
        key, name = run_key(digest, settings, versions(), alpha), measured_name(end, alpha)
        if key not in rows.rows:
            between.set(alpha)
            how: dict[str, Any] = {**texts, **settings, "tokenizer": tokenizer, "name": name}
            report = measure(base, between.model, progress=partial(print, f"{name}:", flush=True), **how)
            rows.append({"key": key, "end": end, "alpha": alpha, "report": report.data | {"worst": {}}})
        found[alpha] = ForgettingReport(rows.rows[key]["report"])
    return found


def choose_point(config: MergeConfig, front: InterpolationFront) -> tuple[FrontPoint, str]:
    """An end and its alpha by the rule that was asked for, and the rule in words."""
    if config.alpha is not None:
        last = front.points[-1].end
        return next(one for one in front.points if (one.end, one.alpha) == (last, config.alpha)), "as given"
    if (limit := config.max_ref_kl) is not None:
        return front.within(limit), f"the least loss whose ref_kl stays within {limit:g}"
    share = config.keep_gain or KEEP_GAIN
    return front.keeping_gain(share), f"the least ref_kl that keeps {100 * share:g}% of the gain"


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
    tuned = f"`{summary['model']}`"
    if used := summary["checkpoints"]:
        names = ", ".join(f"`{Path(path).name}`" for path in used)
        tuned = f"the mean of {names} of {tuned} (LAWA, arXiv 2209.14981)"
    card = CARD.format(kind=kind, name=json.dumps(summary["base"]), tuned=tuned, **summary)
    write_text(part / "README.md", card)
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
        "keep_gain": "How alpha is chosen: one of three",
        "new_task": "The new task, and how texts are measured",
        "dtype": "How models are loaded",
    },
)
