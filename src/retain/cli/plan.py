"""`retain plan`: run pilots, fit a law to them, recommend a run; finished pilots are kept, so a stop can be resumed."""

from __future__ import annotations

import hashlib
import io
import shlex
import shutil
import time
import zlib
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retain import versions
from retain.checks import Unchosen, check_number, setting
from retain.cli import finetune
from retain.cli.finetune_data import TrlArguments, read_data
from retain.cli.flags import Verb
from retain.cli.sample import SampleConfig, run_sample
from retain.cli.settings import RETENTION_HELP, RemoteCodeSettings, SeedSettings
from retain.data.rows import named_sources, read_rows
from retain.files import exclusive, read_jsonl, write_json, write_text
from retain.lab.runner import RunRows, VerbRun, run_key
from retain.laws.plan import (
    Measurement,
    Pilot,
    PilotRun,
    Plan,
    eval_steps,
    fit_pilots,
    pilot_grid,
    read_pilot,
    recommend,
)
from retain.laws.plan_page import PlanReport, plan_figure
from retain.laws.run_tables import tuned_params
from retain.models.description import default_device, length_that_fits
from retain.models.loading import empty_model, lora_num_params
from retain.replay.dataset import load_self_generated, pool_folder
from retain.report.style import save_png

SCHEMA = "retain.plan/1"
PILOTS = "pilots.jsonl"  # a row for each finished pilot
PILOT_FLAGS = ("save_strategy", "report_to")  # not for the recommended run, which may be long


@dataclass(kw_only=True)
class PlanConfig(RemoteCodeSettings, SeedSettings):
    """Settings of `retain plan`."""

    model: str = setting("", "Hub id or folder of the model to finetune.", required=True)
    dataset_name: str = setting("", "Rows of the new task: a file or Hub id.", required=True)
    retention: list[str] = setting(
        list, RETENTION_HELP,
        required="give the text on which forgetting is measured as --retention name=file",
    )  # fmt: skip
    max_ref_kl: float | None = setting(
        None, "Limit on KL(base || model) on the retention text, in nats per token.",
        low=1e-9, required="give --max_ref_kl, in nats per token, such as 0.02",
    )  # fmt: skip
    output_dir: str = setting("", "Folder for pilots/, pilots.jsonl, plan.* and law.json.", required=True)
    eval_dataset_name: str | None = setting(
        None, "Held-out rows of the new task: a file or Hub id. Default: a tenth of dataset_name, held out."
    )
    retention_name: str | None = setting(None, "Retention text that the limit applies to, if there are several.")
    lora_ranks: list[int] = setting(
        lambda: [1, 2, 4, 8, 16, 32],
        "LoRA ranks of the pilots: at least 4, preferably 6; the recommended rank is one of them.",
        low=1,
    )
    replay_coefs: list[float] = setting(
        lambda: [0.0, 1.0, 10.0],
        "Replay coefficients of the pilots: 0 at every rank, the others at the lowest, middle and highest.",
    )
    pilot_steps: int = setting(60, "Steps per pilot; each pilot is measured twelve times along the way.", low=12)
    max_steps: int | None = setting(
        None, "Longest run without replay to consider. Default: pilot_steps; beyond it, predictions extrapolate.", low=1
    )
    level: float = setting(
        0.9, "Coverage of the intervals; the upper end must stay within the limit.", low=0.5, high=0.999
    )
    num_resamples: int = setting(1000, "Bootstrap resamples over pilots.", low=100)
    replay_dataset: str = setting(
        "self", "Replay rows: a folder written by `retain sample`, a file of real text, or 'self' to sample."
    )
    replay_num_rows: int = setting(256, "Rows to sample, with replay_dataset self.", low=1)
    per_device_replay_batch_size: int | None = setting(
        None, "Replay rows per step. Default: one eighth of the batch, at least 1.", low=1
    )
    per_device_train_batch_size: int = setting(8, "New rows per step.", low=1)
    learning_rate: float = setting(2e-4, "Learning rate of every pilot, constant after the warm-up.", low=1e-12)
    max_length: int = setting(Unchosen(256), "Tokens per row; by default at most the model's positions.", low=2)
    lora_alpha: int = setting(16, "The LoRA's scale is lora_alpha / sqrt(rank) (rank-stabilised).", low=1)
    lora_target_modules: list[str] = setting(lambda: ["all-linear"], "Modules that get a LoRA, or all-linear.")
    eval_rows: int = setting(64, "Held-out rows of the new task to measure.", low=1)
    retention_max_documents: int = setting(64, "Documents of each retention text to measure.", low=1)
    finetune_config: str | None = setting(
        None, "YAML file of `retain finetune` for settings that have no flag here, e.g. dtype or packing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("seed", self.seed, low=0, high=2**32 - 1, integer=True)  # the trainer's limit
        if len(set(self.lora_ranks)) < 4:
            raise ValueError(f"lora_ranks: {self.lora_ranks} are too few to show what the rank does; give at least 4")
        if 0 not in self.replay_coefs:
            raise ValueError(f"replay_coefs: {self.replay_coefs} has no 0; add it, for the law of runs without replay")


def run_plan(config: PlanConfig) -> None:
    """Run the pilots, fit the laws, write and print a recommendation, with the folder locked."""
    with exclusive(Path(config.output_dir), "a plan"):
        assert config.max_ref_kl is not None
        folder, retention = Path(config.output_dir), retention_of(config)
        lora_num_params(  # refuses a model or modules that do not fit, before anything is sampled
            config.model, min(config.lora_ranks), config.lora_target_modules, trust_remote_code=config.trust_remote_code
        )
        model = empty_model(config.model, trust_remote_code=config.trust_remote_code)
        config.max_length = length_that_fits(model, config.max_length)
        check_recipe(config)
        data = prepare_rows(config, folder)
        replay = prepare_replay(config, folder)
        pilots, measurements = make_pilots(config, data, replay, retention)
        print("fitting", flush=True)
        laws = fit_pilots(measurements, num_resamples=config.num_resamples, seed=config.seed)
        plan = recommend(
            laws,
            {run.pilot.rank: run.num_params for run in pilots if not run.pilot.coef},
            max_ref_kl=config.max_ref_kl,
            coefs=config.replay_coefs,
            max_steps=config.max_steps,
            level=config.level,
        )
        report = PlanReport(
            plan,
            command=shlex.join(recommended_command(config, plan, data, replay)),
            pilots=pilots,
            settings=asdict(config),
            replay_share=replay_share(config),
            retention=retention,
        )
        laws.no_replay.settings["forgetting_metric"] = "ref_kl"
        laws.no_replay.to_json(folder / "law.json")
        save_png(plan_figure(laws, plan), folder / "plan.png")
        write_text(folder / "plan.md", report.page())
        write_json(folder / "plan.json", {"schema": SCHEMA, **report.to_dict(), "versions": versions()})
        print(report.summary(folder))


def make_pilots(
    config: PlanConfig, data: Sequence[str], replay: str | None, retention: str
) -> tuple[list[PilotRun], list[Measurement]]:
    """Run the pilots that are not finished; return all of them and their measurements."""
    folder = Path(config.output_dir)
    results = RunRows(folder / PILOTS)
    pilots = pilot_grid(config.lora_ranks, config.replay_coefs, config.pilot_steps)
    runs: list[PilotRun] = []
    measurements: list[Measurement] = []
    for number, pilot in enumerate(pilots, start=1):
        run = finetune_run(config, pilot.rank, pilot.coef, pilot.steps, data, replay, seed_of(config, pilot))
        key = run_key(run.flags, contents_of(config, data))[:10]
        pilot_folder = folder / "pilots" / f"{pilot.name}-{key}"
        found = " (found)" if key in results.rows else ""
        print(f"pilot {number}/{len(pilots)}: {pilot.name}{found}", flush=True)
        row = results.make(key, lambda: {"run": asdict(make_pilot(pilot, run, pilot_folder))})  # noqa: B023
        runs.append(PilotRun(**row["run"] | {"pilot": pilot}))
        measurements += read_pilot(pilot_folder, pilot, retention)
    return runs, measurements


def seed_of(config: PlanConfig, pilot: Pilot) -> int:
    """A seed for each pilot, so that the intervals include the variation between seeds."""
    return (config.seed + zlib.crc32(pilot.name.encode())) % 2**32


def retention_of(config: PlanConfig) -> str:
    """The name of the retention text that the limit applies to."""
    sources = named_sources(config.retention, "retention")
    name = config.retention_name or next(iter(sources))
    if name not in sources or (len(sources) > 1 and config.retention_name is None):
        raise ValueError(f"retention_name: choose one of {', '.join(sources)}; the limit applies to one text")
    return name


def check_recipe(config: PlanConfig) -> None:
    """Refuse unreadable replay rows, and settings that every pilot would refuse, before rows are sampled."""
    if config.replay_dataset != "self":
        folder = pool_folder(config.replay_dataset) or Path(config.replay_dataset).expanduser()
        if folder.is_dir():
            load_self_generated(folder)
        else:
            read_rows(config.replay_dataset, "replay_dataset")
    data = config.dataset_name, config.eval_dataset_name or config.dataset_name
    run = finetune_run(config, min(config.lora_ranks), 0.0, config.pilot_steps, data, None, config.seed)
    *given, ours = finetune.VERB.parse(run.arguments(Path(config.output_dir))[1:])
    read_data(TrlArguments(*given), ours)


def prepare_rows(config: PlanConfig, folder: Path) -> tuple[str, str]:
    """Files or names of training and held-out rows; without held-out rows, a tenth of the rows is held out.

    The split depends only on the seed, so the recommended run is measured on the pilots' rows.
    """
    rows = read_rows(config.dataset_name, "dataset_name")
    training = config.dataset_name
    if config.eval_dataset_name:
        held_out = read_rows(config.eval_dataset_name, "eval_dataset_name", split="test")
    else:
        if len(rows) < 20:
            raise ValueError(f"dataset_name: {len(rows)} rows are too few to hold some out; give --eval_dataset_name")
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
    """Replay rows of the pilots: the given ones, or rows sampled from the model; None if no pilot replays."""
    if not any(config.replay_coefs):
        return None
    if config.replay_dataset != "self":
        return config.replay_dataset
    replay_folder = str(folder / "replay")
    run_sample(
        SampleConfig(
            model=config.model, output_dir=replay_folder, num_rows=config.replay_num_rows,
            max_length=config.max_length, seed=config.seed, trust_remote_code=config.trust_remote_code,
        )
    )  # fmt: skip
    return replay_folder


def finetune_run(
    config: PlanConfig, rank: int, coef: float, steps: int, data: Sequence[str], replay: str | None, seed: int
) -> VerbRun:
    """The `retain finetune` command of a pilot or of the recommended run."""
    batch, every = config.per_device_train_batch_size, eval_steps(config.pilot_steps)
    flags: dict[str, Any] = {
        "config": config.finetune_config,
        "model": config.model, "dataset_name": data[0], "eval_dataset_name": data[1], "retention": config.retention,
        "retention_max_documents": config.retention_max_documents, "max_length": config.max_length,
        "use_peft": True, "lora_r": rank, "lora_alpha": config.lora_alpha, "use_rslora": True, "lora_dropout": 0,
        "lora_target_modules": config.lora_target_modules, "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": every, "max_steps": steps,
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "seed": seed,
        "eval_strategy": "steps", "eval_steps": every, "save_strategy": "no", "report_to": "none", "replay_coef": coef,
        "replay_dataset": replay if coef else None,
        "per_device_replay_batch_size": config.per_device_replay_batch_size if coef else None,
        "trust_remote_code": config.trust_remote_code or None,
    }  # fmt: skip
    if default_device() == "cpu":  # TRL's defaults are for a GPU
        flags |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    return VerbRun("finetune", {name: value for name, value in flags.items() if value is not None})


def recommended_command(config: PlanConfig, plan: Plan, data: Sequence[str], replay: str | None) -> list[str]:
    """The command of the recommended run; if no setting stays within the limit, strongest replay with max_ref_kl."""
    recommended = plan.chosen or plan.fallback
    coef = recommended.replay_coef if plan.chosen else recommended.replay_coef or 1.0
    run = finetune_run(config, recommended.rank, coef, recommended.num_steps, data, replay or "self", config.seed)
    flags = {name: value for name, value in run.flags.items() if name not in PILOT_FLAGS}
    controller = {} if plan.chosen else {"max_ref_kl": plan.max_ref_kl}
    return ["retain", *VerbRun(run.verb, {**flags, **controller}).arguments(Path(config.output_dir) / "run")]


def replay_share(config: PlanConfig) -> float:
    """Share of replay rows in a step."""
    batch = config.per_device_train_batch_size
    rows = config.per_device_replay_batch_size or max(1, batch // 8)
    return rows / (rows + batch)


def contents_of(config: PlanConfig, data: Sequence[str]) -> list[Any]:
    """The contents of the files that a pilot depends on: other rows or another model make it another pilot."""
    texts = named_sources(config.retention, "retention").values()
    files = [config.model, *data, *texts, config.replay_dataset, config.finetune_config]
    return [[str(path), content_of(Path(path))] for path in files if path and Path(path).exists()]


def content_of(path: Path) -> list[Any] | str:
    """The hash of a file; for a folder, such as a model's, the names, sizes and times of its files."""
    if path.is_dir():
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(path.iterdir())]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_pilot(pilot: Pilot, run: VerbRun, folder: Path) -> PilotRun:
    """Run a pilot in `folder`; return its cost and the number of parameters that it tuned."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, log = time.monotonic(), io.StringIO()
    quiet = VerbRun(run.verb, {**run.flags, "disable_tqdm": True, "logging_steps": eval_steps(pilot.steps)})
    with redirect_stdout(log):
        finetune.VERB(quiet.arguments(folder)[1:])
    write_text(folder / "log.txt", log.getvalue())
    tokens = [row["num_tokens"] for row in read_jsonl(folder / "metrics.jsonl") if "num_tokens" in row]
    return PilotRun(
        pilot,
        folder=folder.name,
        num_params=tuned_params(folder),
        steps=pilot.steps,
        tokens=int(max(tokens, default=0)),
        seconds=round(time.monotonic() - start, 1),
    )


VERB = Verb(
    name="plan",
    example="retain plan --model M --dataset_name new.jsonl --retention wiki=wiki.txt --max_ref_kl 0.02 "
    "--output_dir plan/",
    settings=(PlanConfig,),
    run=run_plan,
    resume="finished pilots are kept; run the same command again to resume",
    groups={"lora_ranks": "Pilots", "replay_dataset": "The recipe of every pilot", "seed": "Further settings"},
)
