"""`retain plan`: make the pilots, fit them, recommend; everything is kept, so the same command goes on after a stop."""

from __future__ import annotations

import hashlib
import io
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retain import versions
from retain.cli.config import PlanConfig, SampleConfig
from retain.data.rows import named_sources, read_rows
from retain.files import read_jsonl, write_json, write_text
from retain.lab.runner import Results, run_key
from retain.laws.plan import (
    EVALUATIONS,
    Pilot,
    PilotRun,
    Plan,
    eval_steps,
    first_step,
    fit_pilots,
    pilot_grid,
    recommend,
)
from retain.laws.plan_page import PlanReport, plan_figure
from retain.laws.runs import read_metrics, tuned_params
from retain.models.description import default_device, length_that_fits
from retain.models.loading import empty_model, lora_num_params
from retain.replay.dataset import load_self_generated
from retain.report.style import save_png

SCHEMA = "retain.plan/1"
PILOTS = "pilots.jsonl"  # a row of each finished pilot
COLUMNS = ("num_params", "num_steps", "finetuning_loss", "forgetting_loss")
Say = Callable[[str], None]


def run_plan(config: PlanConfig, finetune: Callable[[list[str]], Any], say: Say) -> str:
    """Pilots, laws and a recommendation in `config.output_dir`; returns the summary.

    Args:
        finetune: `retain finetune` as a function of its flags.
        say: told what is being done.

    Raises:
        ValueError: one line, before any pilot, for input that cannot work.
    """
    assert config.output_dir is not None
    assert config.budget is not None
    folder, retention = Path(config.output_dir), retention_of(config)
    lora_num_params(  # names a model or modules that do not fit, before anything is sampled
        str(config.model),
        min(config.lora_ranks),
        config.lora_target_modules,
        trust_remote_code=config.trust_remote_code,
    )
    model = empty_model(str(config.model), trust_remote_code=config.trust_remote_code)
    config.max_length = length_that_fits(model, config.max_length)
    check_sources(config)
    data = prepare_rows(config, folder)
    replay = prepare_replay(config, folder)
    pilots = pilot_grid(config.lora_ranks, config.replay_coefs, config.pilot_steps)
    rows, made, results = [], [], Results(folder / PILOTS)
    for number, pilot in enumerate(pilots, start=1):
        flags = flags_of(config, pilot.rank, pilot.coef, pilot.steps, data, replay)
        key = run_key(flags, contents_of(sources_of(config, data)))[:10]
        place = folder / "pilots" / f"{pilot.name}-{key}"
        say(f"pilot {number}/{len(pilots)}: {pilot.name}{' (found)' if key in results.rows else ''}")
        row = results.make(key, lambda: {"run": asdict(make_pilot(pilot, flags, place, finetune))})  # noqa: B023
        made.append(PilotRun(**row["run"] | {"pilot": pilot}))
        rows += read_pilot(place, pilot, retention)
    say("fitting")
    laws = fit_pilots(rows, num_resamples=config.num_resamples, seed=config.seed)
    sizes = {one.pilot.rank: one.num_params for one in made if not one.pilot.coef}
    plan = recommend(
        laws, sizes, max_ref_kl=config.budget, coefs=config.replay_coefs, max_steps=config.max_steps, level=config.level
    )
    report = PlanReport(
        plan,
        command=shlex.join(recommended_command(config, plan, data, replay)),
        pilots=made,
        settings=asdict(config),
        replay_share=replay_share(config),
        retention=retention,
    )
    laws.no_replay.to_json(folder / "law.json")
    save_png(plan_figure(laws, plan), folder / "plan.png")
    write_text(folder / "plan.md", report.page())
    write_json(folder / "plan.json", {"schema": SCHEMA, **report.to_dict(), "versions": versions()})
    return report.summary(folder)


def retention_of(config: PlanConfig) -> str:
    """The name of the text that the budget is for."""
    sources = named_sources(config.retention, "retention")
    for path in sources.values():
        if not Path(path).exists():
            raise ValueError(f"retention: no file {path!r}; check the path")
    name = config.retention_name or next(iter(sources))
    if name not in sources or (len(sources) > 1 and config.retention_name is None):
        raise ValueError(f"retention_name: choose one of {', '.join(sources)}; the budget is for one text")
    return name


def check_sources(config: PlanConfig) -> None:
    """Refuse a recipe or replay rows that cannot be read."""
    if config.finetune_config and not Path(config.finetune_config).is_file():
        raise ValueError(f"finetune_config: no file {config.finetune_config!r}; check the path")
    source = Path(str(config.replay_dataset)).expanduser()
    if source.is_dir():
        load_self_generated(source)
    elif config.replay_dataset not in (None, "self"):
        read_rows(str(config.replay_dataset))


def sources_of(config: PlanConfig, data: Sequence[str]) -> list[str | None]:
    """Whatever files decide a pilot beside its flags."""
    texts = named_sources(config.retention, "retention").values()
    return [config.model, *data, *texts, config.replay_dataset, config.finetune_config]


def prepare_rows(config: PlanConfig, folder: Path) -> tuple[str, str]:
    """Files or names of training and held-out rows; a tenth is kept apart where none are given.

    The rows depend on the seed alone, so that the recommended run is measured on the pilots' own.
    """
    assert config.dataset_name is not None
    rows = read_rows(config.dataset_name)
    training = config.dataset_name
    if config.eval_dataset_name:
        held_out = read_rows(config.eval_dataset_name, split="test")
    else:
        if len(rows) < 20:
            raise ValueError(f"dataset_name: {len(rows)} rows are too few to keep some apart; give --eval_dataset_name")
        cut = rows.train_test_split(test_size=0.1, seed=config.seed)
        rows, held_out = cut["train"], cut["test"]
        training = str(folder / "data" / "train.jsonl")
    if len(held_out) > config.eval_rows:
        held_out = held_out.shuffle(seed=config.seed).select(range(config.eval_rows))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if training != config.dataset_name:
        rows.to_json(training)
    held_out.to_json(folder / "data" / "eval.jsonl")
    return training, str(folder / "data" / "eval.jsonl")


def prepare_replay(config: PlanConfig, folder: Path) -> str | None:
    """Replay rows for every pilot that wants them: the given ones, or some that the model writes first."""
    if config.replay_dataset != "self" or not any(config.replay_coefs):
        return config.replay_dataset if any(config.replay_coefs) else None
    from retain.cli.sample import run_sample

    place = folder / "replay"
    run_sample(
        SampleConfig(
            model_name_or_path=config.model, output_dir=str(place), num_rows=config.replay_num_rows,
            max_length=config.max_length, seed=config.seed, trust_remote_code=config.trust_remote_code,
        )
    )  # fmt: skip
    return str(place)


def flags_of(
    config: PlanConfig, rank: int, coef: float, steps: int, data: Sequence[str], replay: str | None
) -> list[str]:
    """`retain finetune` of one setting, but for its folder: the pilots' recipe, and that of what is recommended."""
    batch = str(config.per_device_train_batch_size)
    flags = ["--config", config.finetune_config] if config.finetune_config else []
    flags += ["--model_name_or_path", str(config.model), "--dataset_name", data[0], "--eval_dataset_name", data[1]]
    flags += [part for text in config.retention for part in ("--retention", text)]
    flags += ["--retention_max_documents", str(config.retention_max_documents), "--max_length", str(config.max_length)]
    flags += ["--use_peft", "--lora_r", str(rank), "--lora_alpha", str(config.lora_alpha), "--use_rslora", "true"]
    flags += ["--lora_dropout", "0", "--lora_target_modules", *config.lora_target_modules]
    flags += ["--learning_rate", f"{config.learning_rate:g}", "--lr_scheduler_type", "constant_with_warmup"]
    flags += ["--warmup_steps", str(eval_steps(config.pilot_steps)), "--max_steps", str(steps)]
    flags += ["--per_device_train_batch_size", batch, "--per_device_eval_batch_size", batch, "--seed", str(config.seed)]
    flags += ["--eval_strategy", "steps", "--eval_steps", str(eval_steps(config.pilot_steps))]
    flags += ["--save_strategy", "no", "--report_to", "none", "--replay_coef", f"{coef:g}"]
    if coef:
        flags += ["--replay_dataset", str(replay or "self")]
        if config.per_device_replay_batch_size:
            flags += ["--per_device_replay_batch_size", str(config.per_device_replay_batch_size)]
    if config.trust_remote_code:
        flags += ["--trust_remote_code", "true"]
    if default_device() == "cpu":  # TRL's defaults are for a GPU
        flags += ["--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False"]
    return flags


def recommended_command(config: PlanConfig, plan: Plan, data: Sequence[str], replay: str | None) -> list[str]:
    """The recommended run; where no setting keeps the budget, the strongest replay with the budget's controller."""
    one = plan.chosen or plan.fallback
    coef = one.replay_coef if plan.chosen else one.replay_coef or 1.0
    flags = flags_of(config, one.rank, coef, one.num_steps, data, replay)
    controller = [] if plan.chosen else ["--max_ref_kl", f"{plan.max_ref_kl:g}"]
    return ["retain", "finetune", *flags, *controller, "--output_dir", str(Path(str(config.output_dir)) / "run")]


def replay_share(config: PlanConfig) -> float:
    """The share of replay rows among the rows of a step."""
    batch = config.per_device_train_batch_size
    rows = config.per_device_replay_batch_size or max(1, batch // 8)
    return rows / (rows + batch)


def contents_of(sources: Sequence[str | None]) -> list[Any]:
    """What tells the files that flags name from others: a pilot of other rows or another model is another pilot."""
    return [[str(path), _content(Path(path))] for path in sources if path and Path(path).exists()]


def _content(path: Path) -> list[Any] | str:
    if path.is_dir():  # a model: its files by name, size and time
        return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in sorted(path.iterdir())]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_pilot(pilot: Pilot, flags: Sequence[str], place: Path, finetune: Callable[[list[str]], Any]) -> PilotRun:
    """Run a pilot; what it cost, and how many parameters it tuned."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    began, log = time.monotonic(), io.StringIO()
    every = str(eval_steps(pilot.steps))
    with redirect_stdout(log):
        finetune([*flags, "--output_dir", str(place), "--disable_tqdm", "true", "--logging_steps", every])
    write_text(place / "log.txt", log.getvalue())
    told = [row["num_tokens"] for row in read_jsonl(place / "metrics.jsonl") if "num_tokens" in row]
    return PilotRun(
        pilot,
        folder=place.name,
        num_params=tuned_params(place),
        steps=pilot.steps,
        tokens=int(max(told, default=0)),
        seconds=round(time.monotonic() - began, 1),
    )


def read_pilot(place: Path, pilot: Pilot, retention: str) -> list[dict[str, Any]]:
    """Measurements of a pilot after its first ones."""
    rows, _ = read_metrics(place / "metrics.jsonl", place.name, COLUMNS, retention, "ref_kl")
    kept = [row for row in rows if row["num_steps"] >= first_step(pilot.steps)]
    assert len(kept) <= 2 * EVALUATIONS
    return [row | {"replay_coef": pilot.coef} for row in kept]
