"""`retain merge`: interpolate between a finetuned model and its base, and save the chosen point as a model."""

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
from retain.training.run_files import NamedBase, base_of, settings_of_run
from retain.training.stopping import check_no_model, whole_checkpoints

ALPHAS = tuple(tenths / 10 for tenths in range(11))
KEEP_GAIN = 0.95
RULES = ("keep_gain", "max_ref_kl", "alpha")
MERGE_FILE = "merge.json"
MEASURED = ("start_token", "max_length", "max_windows", "batch_tokens", "num_resamples", "seed")  # for `measure`
CONFIGS = ("config.json", "adapter_config.json")  # a folder without one of these is not a model
MERGE_SCHEMA = "retain.merge/1"
CHOSEN = "chosen on these rows, so their numbers are slightly optimistic: measure other rows with `retain measure`"
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
    """Settings of `retain merge`."""

    model: str = setting("", "Model after finetuning: a model or an adapter folder, or a Hub id.", required=True)
    output_dir: str = setting(
        "", "Folder for the merged model or adapter, merge.json, figure.png and alphas.jsonl.", required=True
    )
    base: str | None = setting(
        None,
        "Model before finetuning: a Hub id or folder. Default: the base that the adapter or the run names, or the "
        "model that wrote the run's replay rows.",
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
    """Measure each alpha once, choose one, and write the model at this alpha, with the folder locked."""
    folder, run = Path(config.output_dir), settings_of_run(config.model)
    named = NamedBase(config.base, "given") if config.base else base_of(config.model, run)
    name, config.model_revision = named.model, named.revision or config.model_revision
    checkpoints = last_checkpoints(config)
    with (
        exclusive(folder, "a merged model"),
        TemporaryDirectory(prefix=".mean-", suffix=PART, dir=folder, ignore_cleanup_errors=True) as temporary,
    ):
        is_end = folder.resolve() in [Path(end).resolve() for end in (config.model, name)]
        if is_end or not (folder / MERGE_FILE).exists():  # else an earlier merge wrote it
            check_no_model(folder)
        tokenizer = load_tokenizer(name, field="base", **config.checkpoint)
        tuned_tokenizer = tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
        texts = load_merge_texts(config, run, tokenizer) if config.new_task else None
        model = load_model(name, field="base", device=default_device(), **config.loading)
        dtype = stored_dtype(name, **config.checkpoint) if config.dtype == "auto" else None
        base, ends = MeasuredBase(model), {MODEL: config.model}
        named.check(model, base.fingerprint)
        if checkpoints:
            mean = Path(temporary, "mean")
            write_mean(checkpoints, mean)
            ends[f"mean of {len(checkpoints)} checkpoints"] = str(mean)

        def toward(end: str) -> Interpolation:
            tuned = load_model(ends[end], trust_remote_code=config.trust_remote_code, **loaded_as(model))
            return Interpolation(model, tuned, dtype)

        *_, last = ends
        choice: dict[str, Any] = {"end": last, "alpha": config.alpha, "rule": "as given"}
        report, between = None, None
        if texts is not None:
            reports = {}
            for end in ends:
                between = None  # hold one in memory
                between = toward(end)
                reports[end] = measure_alphas(config, base, between, texts, tuned_tokenizer, end)
            choice = measured_choice(config, reports)
            report = reports[choice["end"]][choice["alpha"]]
        if between is None or choice["end"] != last:
            between = None
            between = toward(choice["end"])
        between.set(choice["alpha"])
        if config.whole and between.is_adapter:
            between.make_whole()
        averaged = [] if choice["end"] == MODEL else list(map(str, checkpoints))
        summary = {"base": name, "model": config.model, "checkpoints": averaged, **choice}
        write_merged(between, tuned_tokenizer, folder, summary, report)
        print(visible(f"model: {folder}"))


def last_checkpoints(config: MergeConfig) -> list[Path]:
    """The last `config.average_checkpoints` checkpoints of the run, or none if that is unset.

    Raises:
        ValueError: if the run kept fewer.
    """
    if (count := config.average_checkpoints) is None:
        return []
    checkpoints = whole_checkpoints(Path(config.model))
    if (kept := len(checkpoints)) < count:
        raise ValueError(
            f"average_checkpoints: {count}, but {config.model!r} holds {quantity(kept, 'whole checkpoint')}; "
            "give a run's folder, or train with save_strategy steps, a shorter save_steps and a larger save_total_limit"
        )
    return checkpoints[-count:]


def load_merge_texts(
    config: MergeConfig, run: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """The texts of the new task and the replay rows, by argument of `measure`."""
    source = config.replay_dataset or (run.get("replay_dataset") or {}).get("source")
    if not source:
        raise ValueError(f"replay_dataset: missing, and {config.model!r} names none; give --replay_dataset")
    new_task = load_new_task(config, config.model, run.get("training_arguments") or {}, tokenizer)
    return {
        "new_task": new_task,
        "retention": {"replay": load_texts(source, tokenizer, config.max_documents, field="replay_dataset")},
    }


def measured_choice(config: MergeConfig, reports: Mapping[str, Mapping[float, ForgettingReport]]) -> dict[str, Any]:
    """Choose an end and an alpha, print the table, draw the figure; return the choice and the front for merge.json."""
    results = {end: {alpha: report.results for alpha, report in alphas.items()} for end, alphas in reports.items()}
    front = InterpolationFront.of(results.pop(MODEL), results)
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
    """The name of a measured point."""
    return f"alpha {alpha:g}" if end == MODEL else f"{end}, alpha {alpha:g}"


def measure_alphas(
    config: MergeConfig,
    base: MeasuredBase,
    between: Interpolation,
    texts: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    end: str,
) -> dict[float, ForgettingReport]:
    """A report of each alpha, cached in alphas.jsonl by weights, texts and settings."""
    settings = {name: getattr(config, name) for name in MEASURED}
    weights = [probe(model).numpy().tobytes() for model in (base.model, between.model)]
    digest = hashlib.sha256(b"".join([*weights, repr(texts).encode()])).hexdigest()
    rows, reports = RunRows(Path(config.output_dir) / "alphas.jsonl"), {}
    for alpha in ALPHAS if config.alpha is None else sorted({float(config.alpha), 1.0}):
        key, name = run_key(digest, settings, versions(), alpha), measured_name(end, alpha)
        if key not in rows.rows:
            between.set(alpha)
            options: dict[str, Any] = {**texts, **settings, "tokenizer": tokenizer, "name": name}
            report = measure(base, between.model, progress=partial(print, f"{name}:", flush=True), **options)
            rows.append({"key": key, "end": end, "alpha": alpha, "report": report.data | {"worst": {}}})
        reports[alpha] = ForgettingReport(rows.rows[key]["report"])
    return reports


def choose_point(config: MergeConfig, front: InterpolationFront) -> tuple[FrontPoint, str]:
    """The point that the rule in `config` chooses, and the rule in words."""
    if config.alpha is not None:
        last = front.points[-1].end
        point = next(point for point in front.points if (point.end, point.alpha) == (last, config.alpha))
        return point, "as given"
    if (limit := config.max_ref_kl) is not None:
        return front.within(limit), f"the lowest loss whose ref_kl stays within {limit:g}"
    share = config.keep_gain or KEEP_GAIN
    return front.keeping_gain(share), f"the lowest ref_kl that keeps {100 * share:g}% of the gain"


def write_merged(
    between: Interpolation,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    summary: dict[str, Any],
    report: ForgettingReport | None,
) -> None:
    """Write the model at its current alpha, with tokenizer, card and merge.json; a kill leaves all or nothing."""
    part = folder / f".model{PART}"
    if between.dtype is not None:
        between.model.to(between.dtype)
    between.model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    head = {"schema": MERGE_SCHEMA, "versions": versions(), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(part / MERGE_FILE, head | summary)
    kind = "peft" if between.is_adapter else "transformers"
    tuned = f"`{summary['model']}`"
    if averaged := summary["checkpoints"]:
        names = ", ".join(f"`{Path(path).name}`" for path in averaged)
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
