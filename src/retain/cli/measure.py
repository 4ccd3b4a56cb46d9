"""`retain measure`: load texts, questions, requests and models, measure, and judge the result by limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retain.checks import Unchosen, setting
from retain.cli.flags import Verb
from retain.cli.job_summary import LEVELS, SUMMARY_VARIABLE, annotation, append_summary, errors_annotated
from retain.cli.settings import CHAIN_HELP, RETENTION_HELP, TextSettings
from retain.data.overlap import document_tokens, overlap_warnings
from retain.data.rows import Reading, named_sources, read_rows, row_texts
from retain.files import check_model_path, exclusive, short_names, visible
from retain.measuring.answer_files import read_log, read_samples
from retain.measuring.behaviors import behavior_sources, load_behavior
from retain.measuring.choices import load_questions
from retain.measuring.generations import as_prompt, default_prompts
from retain.measuring.measure import check_apart, measure
from retain.measuring.paired_answers import pair_answers
from retain.measuring.refusals import Judge, load_requests
from retain.models.adapters import adapted_model
from retain.models.base_predictions import MeasuredBase
from retain.models.description import default_device, length_that_fits, with_least_room
from retain.models.loading import load_model, load_tokenizer, loaded_as, tokenizer_of_tuned
from retain.models.reference import TOLERANCE, Reference, probe
from retain.replay.dataset import load_texts
from retain.report.gate import SEVERITY, Judgement, judge
from retain.report.model_card import check_card
from retain.report.report import ForgettingReport, write_comparison
from retain.training.run_files import LOSS_ARGUMENTS, NamedBase, base_of, read_run, settings_of_run

OPTIONS = (
    *("choice_style", "choice_chat_template", "start_token", "max_length", "max_windows", "batch_tokens"),
    *("max_new_tokens", "num_resamples", "seed", "sampled"),
)  # arguments of `measure` with the same names here
TITLE = "Forgetting report"
INSPECT_SUFFIXES = (".eval", ".json")  # of Inspect's logs; all other files are lm-eval's
ANSWERED = ("refusals", "harmless", "behaviors")  # settings whose prompts both models answer


@dataclass(kw_only=True)
class MeasureConfig(TextSettings):
    """Settings of `retain measure`."""

    base: str = setting(
        "", "Model before finetuning: a Hub id or folder. Default: the base that the adapter or the run of model names."
    )
    model: list[str] = setting(
        list, "Model after finetuning: a model or an adapter folder; repeatable, to compare. [required, unless --pair]"
    )
    output_dir: str = setting(
        "",
        "Folder for report.json, report.md and report.html; with several models, also one folder for each.",
        required=True,
    )
    chain: bool = setting(False, CHAIN_HELP)
    model_card: str | None = setting(
        None, "Model card (README.md) to write the Forgetting section and the model-index into."
    )
    retention: list[str] = setting(list, RETENTION_HELP)
    train_dataset: list[str] = setting(
        list, "Rows that the model was trained on; warns if measured texts are among them; repeatable."
    )
    choices: list[str] = setting(
        list,
        "Multiple-choice questions: name=file with question, choices and answer, or name=arc_challenge, arc_easy, "
        "mmlu or commonsense_qa from the Hub; repeatable.",
    )
    choice_style: Literal["text", "letter"] = setting(
        "text",
        "What is scored after the question. text: the words of each choice. letter: the choices are listed first, and "
        "the letters A, B, … are scored.",
    )
    choice_chat_template: bool = setting(False, "Format each question as a user turn of the chat template.")
    max_questions: int | None = setting(
        None, "Draw only N questions from each set, with the seed. Default: all.", low=1
    )
    pair: list[str] = setting(
        list,
        "Two per-sample files of lm-eval (--log_samples), or two logs of Inspect, on one task, the base's first; "
        "compared question by question instead of models.",
    )
    prompts: str | None = setting(
        None,
        "File of prompts (rows as in training data) for both models to continue; if its rows hold expected and "
        "updated answers, shows what was kept, updated and forgotten.",
    )
    sampled: bool = setting(True, "Continue every prompt a second time, sampled at temperature 1.")
    max_new_tokens: int = setting(
        Unchosen(48),
        "Tokens per continuation and answer; 0 for no continuations. Behaviors have longer defaults.",
    )
    refusals: list[str] = setting(
        list,
        "Harmful requests for both models to answer: name=file (a column prompt, text or goal), or name=advbench or "
        "jailbreakbench from the Hub; repeatable.",
    )
    harmless: list[str] = setting(
        list,
        "Harmless requests, to measure over-refusal: name=file, or name=jailbreakbench_harmless from the Hub; "
        "repeatable.",
    )
    behaviors: list[str] = setting(
        list,
        "Behaviours that a program verifies: tools (calls), formats, thinking or turn_ends, on retain's own prompts, "
        "or one of these as name=file, on the prompts of that file; repeatable.",
    )
    max_prompts: int | None = setting(
        None, "Draw only N requests or prompts from each set, with the seed. Default: all.", low=1
    )
    judge: str | None = setting(None, "Chat model that also judges whether each answer is a refusal.")
    max_forgetting: float | None = setting(
        None,
        "Highest forgetting (increase in loss) allowed on any retention text, in nats per token. Exit code 0: within; "
        "2: beyond; 3: not enough evidence, the interval straddles the limit.",
    )
    max_ref_kl: float | None = setting(
        None,
        "Highest KL(base || model) allowed on any retention text, in nats per token; exit codes as for max_forgetting.",
    )
    min_agreement: float | None = setting(
        None,
        "Lowest allowed agreement with the base, as a share of its top tokens and of its answers to the questions; "
        "exit codes as for max_forgetting.",
        high=1,
    )
    github: bool = setting(
        False,
        "In a GitHub Actions job: append the report to the job summary, and annotate the job with every verdict.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.pair or self.model):
            raise ValueError("model: missing; give --model")
        if self.model_card and len(self.model) > 1:
            raise ValueError(f"model_card: {self.model_card!r} describes a single model; give one --model")
        if self.chain and not (len(self.model) > 1 and self.retention):
            raise ValueError("chain: true needs at least two stages as --model, in order, and --retention; give them")
        if self.github and not os.environ.get(SUMMARY_VARIABLE):
            raise ValueError(f"github: {SUMMARY_VARIABLE} is not set, as it is in GitHub Actions; leave github out")
        self._check_sources()
        self._check_limits()

    def _check_sources(self) -> None:
        sources = [name for name in ("retention", "choices", *ANSWERED) if getattr(self, name)]
        models = [name for name in ("base", "model", "new_task") if getattr(self, name)] + sources
        if self.pair and models:
            raise ValueError(f"{models[0]}: {getattr(self, models[0])!r} does not go with pair; leave one of them out")
        if self.pair and len(self.pair) != 2:
            raise ValueError(f"pair: {len(self.pair)} files are not a pair; give two, the base's first")
        if not (sources or self.prompts or self.pair):
            raise ValueError(
                "retention: missing; give at least one text as --retention name=file, or questions as "
                "--choices name=file, or requests as --refusals name=file, or --behaviors formats, or --prompts file"
            )
        for name in ("prompts", *ANSWERED) if not self.max_new_tokens else ():
            if getattr(self, name):
                raise ValueError(f"max_new_tokens: 0 leaves {name} without answers; use at least 1")
        kinds = ("retention", "new_task", "choices", "refusals", "harmless")
        named = {kind: named_sources(getattr(self, kind), kind) for kind in kinds}  # fail before a model is loaded
        check_apart("new_task", named["new_task"], named["retention"], "a retention text")
        check_apart("harmless", named["harmless"], named["refusals"], "a set of refusals")
        behavior_sources(self.behaviors)
        if self.judge is not None and not (self.refusals or self.harmless):
            raise ValueError(f"judge: {self.judge!r} has nothing to judge; give --refusals name=file")

    def _check_limits(self) -> None:
        for name, other in (("max_forgetting", ", or use min_agreement"), ("max_ref_kl", "")):
            if getattr(self, name) is not None and not self.retention:
                raise ValueError(
                    f"{name}: {getattr(self, name)} needs texts to judge; give --retention name=file{other}"
                )
        if self.min_agreement is not None and not (self.retention or self.choices or self.pair):
            raise ValueError(
                f"min_agreement: {self.min_agreement} needs texts or questions to judge; give --retention or --choices"
            )


def run_measure(config: MeasureConfig) -> int:
    """Write a report of each model and one that compares several; return the exit code of the gate."""
    with errors_annotated() if config.github else nullcontext():
        gates = write_reports(config)
    for name, gate in gates.items():
        if config.github:
            print(annotation(LEVELS[gate.code], name, gate.verdict))
        checks = gate.checks if len(gate.checks) > 1 else []
        print(*map(visible, ["", *[name] * (len(gates) > 1), *checks, gate.verdict]), sep="\n")
    return max((gate.code for gate in gates.values()), key=SEVERITY.index, default=0)


def write_reports(config: MeasureConfig) -> dict[str, Judgement]:
    """Measure the models and write the reports; return the gate's judgement of each, empty without a limit."""
    if config.model_card:
        check_card(config.model_card)
    folder = Path(config.output_dir)

    def say(stage: str) -> None:
        print(f"{visible(stage)} …", flush=True)

    with exclusive(folder, "a report"):  # first of all: it fails if the folder is not writable
        measured = iter([paired_report(config.pair)]) if config.pair else measure_models(config, say)
        reports: list[ForgettingReport] = []
        gates: dict[str, Judgement] = {}
        for report in measured:  # each is written before the next model is measured
            gates |= judge_report(config, report)
            report.write(folder / report.data["name"] if len(config.model) > 1 else folder)
            reports.append(report)
        several = len(reports) > 1
        page = write_comparison(folder, reports, title=TITLE, chain=config.chain) if several else reports[0]
        print(f"{page.summary()}\n\nreport: {folder / 'report.html'}")
        if config.model_card:
            reports[0].to_model_card(config.model_card)
        if config.github:
            append_summary((folder / "report.md").read_text(encoding="utf-8"))
    return gates


def judge_report(config: MeasureConfig, report: ForgettingReport) -> dict[str, Judgement]:
    """Judge a report, and store the judgement in it; returns {name: judgement}, empty without a limit."""
    limits = {name: getattr(config, name) for name in ("max_forgetting", "max_ref_kl", "min_agreement")}
    if set(limits.values()) == {None}:
        return {}
    gate = judge(report.results, **limits)
    report.data["gate"] = asdict(gate)
    return {report.data["name"]: gate}


def paired_report(paths: list[str]) -> ForgettingReport:
    """A report on two result files of one evaluation program, the base's first."""
    files = list(map(Path, paths))
    base, tuned = (read_log(path) if path.suffix.lower() in INSPECT_SUFFIXES else read_samples(path) for path in files)
    if base.program != tuned.program:
        raise ValueError(f"pair: the files are from {base.program} and {tuned.program}; give two from one program")
    sides = {"base": {"model": base.model}, "tuned": {"model": tuned.model}}
    return ForgettingReport.new(tuned.name, **sides, choices={tuned.task: pair_answers(base, tuned)})


@dataclass(frozen=True)
class Start:
    """The model that an adapter should leave when switched off: the base, or the previous stage of a chain.

    Attributes:
        name: its name in warnings.
        probe: its log-probabilities on the probe tokens.
        what: its role, in words.
        tolerance: limit on the difference; larger for a stage that was merged and rounded to its checkpoint's dtype.
    """

    name: str
    probe: Tensor
    what: str = "the base"
    tolerance: float | None = None


def measure_models(config: MeasureConfig, say: Callable[[str], object]) -> Iterator[ForgettingReport]:
    """Yield a report of each model in `config.model`; the base is evaluated once."""
    named = None if config.base else common_base(config)
    if named is not None:
        config.base, config.model_revision = named.model, named.revision or config.model_revision
        say(f"base: {config.base}, {named.source}")
    tokenizer = load_tokenizer(config.base, field="base", **config.checkpoint)
    paths = list(map(Path, config.model))
    names, runs = short_names(paths, "model"), list(map(read_run, paths))
    settings = list(map(settings_of_run, config.model))
    sources = load_sources(config, tokenizer)
    training = [run_settings.get("training_arguments") or {} for run_settings in settings]
    new_tasks = [load_new_task(config, *pair, tokenizer) for pair in zip(config.model, training, strict=True)]
    loaded = load_model(config.base, device=default_device(), field="base", **config.loading)
    base = MeasuredBase(loaded) if len(config.model) > 1 else MeasuredBase.of(loaded)
    if named is not None:
        named.check(loaded, base.fingerprint)
    options: dict[str, Any] = {name: getattr(config, name) for name in OPTIONS} | {"tokenizer": tokenizer}
    options |= {"judge": load_judge(config, loaded) if config.judge else None, "progress": say}
    start, adapted = Start(config.base, probe(loaded)), adapted_model(config.base, revision=config.model_revision)
    for model, name, run, run_settings, new_task in zip(config.model, names, runs, settings, new_tasks, strict=True):
        if len(config.model) > 1:
            say(f"model {name}")
        rows = trained_rows(config, (run_settings.get("replay_dataset") or {}).get("source"), tokenizer)
        tuned = load_model(model, trust_remote_code=config.trust_remote_code, **loaded_as(loaded))
        measured = sources | {"new_task": new_task}
        texts = (new_task | sources["retention"]).values()
        if texts and config.max_new_tokens and not config.prompts:
            room = length_that_fits(with_least_room(loaded, tuned), config.max_length) - config.max_new_tokens
            measured["prompts"] = default_prompts(texts, tokenizer, room)
        if rows:
            say("looking for the texts in the training rows")
        warnings = swapped(config.base, adapted, model) + other_base(model, tuned, start)
        warnings += overlap_warnings(measured, rows, tokenizer)
        report = measure(base, tuned, name=name, **measured, **options)
        report.data |= {"warnings": warnings + report.data["warnings"], **run}
        if config.chain:
            start = Start(model, probe(tuned), "the stage before it", TOLERANCE[torch.bfloat16])
        del tuned  # free memory for the next
        yield report


def common_base(config: MeasureConfig) -> NamedBase:
    """The base that the files of all models name; in a chain, of the first one.

    Raises:
        ValueError: if a model names none, or two name different ones.
    """
    named = [base_of(model, settings_of_run(model)) for model in config.model[: 1 if config.chain else None]]
    if other := next((base for base in named if base.differs_from(named[0])), None):
        raise ValueError(
            f"base: {named[0].model!r} is {named[0].source}, and {other.model!r} {other.source}; give --base"
        )
    check_model_path(named[0].model, "base")
    return named[0]


def trained_rows(
    config: MeasureConfig, replay: str | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Iterable[list[int]]]:
    """Tokens that a model was trained on: `config.train_dataset`, and its run's replay rows if they still exist."""
    rows: dict[str, Iterable[list[int]]] = {}
    cut = partial(tokenizer, add_special_tokens=False, verbose=False)
    for source in config.train_dataset:
        rows[f"the training rows of {source!r}"] = (
            cut(text)["input_ids"] for text in row_texts(source, tokenizer, "train_dataset")
        )
    if replay and Path(replay).exists():
        rows["the replay rows"] = map(
            document_tokens, load_texts(replay, tokenizer, field="replay_dataset", any_tokenizer=True)
        )
    return rows


def load_sources(config: MeasureConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Texts, questions, requests and prompts for all models, by argument of `measure`, each by the user's names."""
    requests = partial(load_requests, max_prompts=config.max_prompts, seed=config.seed)
    readers: dict[str, Callable[[str], Any]] = {
        "retention": lambda source: load_texts(source, tokenizer, config.max_documents, field="retention"),
        "choices": lambda source: load_questions(source, max_questions=config.max_questions, seed=config.seed),
        "refusals": requests,
        "harmless": partial(requests, field="harmless"),
    }
    sources: dict[str, Any] = {
        kind: {name: read(source) for name, source in named_sources(getattr(config, kind), kind).items()}
        for kind, read in readers.items()
    }
    sources["behaviors"] = {
        name: load_behavior(name, source, max_prompts=config.max_prompts, seed=config.seed)
        for name, source in behavior_sources(config.behaviors).items()
    }
    rows = read_rows(config.prompts, "prompts") if config.prompts else ()
    prompts = [as_prompt(row, tokenizer, f"row {at} of {config.prompts!r}") for at, row in enumerate(rows, start=1)]
    return {**sources, "prompts": prompts}


def load_new_task(
    config: TextSettings, model: str, training: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The texts of the new task, tokenized and masked as in the tuned model's training."""
    own = tokenizer_of_tuned(model, tokenizer, trust_remote_code=config.trust_remote_code)
    reading = new_task_reading(config, training)
    named = named_sources(config.new_task, "new_task")
    return {
        text: load_texts(source, own, config.max_documents, reading, field="new_task") for text, source in named.items()
    }


def new_task_reading(config: TextSettings, training: Mapping[str, Any]) -> Reading:
    """Which tokens of the new task count: by the flags, else as in the run's loss, else by TRL's defaults."""
    flags = {name: getattr(config, name, None) for name in LOSS_ARGUMENTS}
    chosen = {name: training.get(name) if value is None else value for name, value in flags.items()}
    chosen |= {"assistant_only_loss": bool(chosen["assistant_only_loss"])}
    return Reading(as_trained=True, **{name: value for name, value in chosen.items() if value is not None})


def other_base(model: str, tuned: Any, start: Start) -> list[str]:
    """A warning if switching the adapter off does not give the model that it should have been trained on."""
    if not hasattr(tuned, "disable_adapter"):
        return []
    try:
        Reference().prove(tuned, start.probe, start.tolerance)
    except ValueError:
        return [
            f"the adapter {model!r} switched off is not {start.name!r}, {start.what}: it was trained on another base, "
            "or rewrites its own; the measured differences include that one"
        ]
    return []


def swapped(base: str, adapted: str | None, model: str) -> list[str]:
    """A warning if the base is an adapter of the tuned model: the two may be swapped."""
    if adapted is None or (model != adapted and os.path.realpath(model) != os.path.realpath(adapted)):
        return []
    return [
        f"{base!r}, given as the base, is an adapter of {model!r}, given as the tuned model: unless that is meant, "
        "swap them, or forgetting and gain have the wrong sign"
    ]


def load_judge(config: MeasureConfig, base: PreTrainedModel) -> Judge:
    """Load the judge on the device of the base."""
    name, trust = str(config.judge), config.trust_remote_code
    model = load_model(name, dtype=config.dtype, device=base.device, trust_remote_code=trust, field="judge")
    return Judge(model, load_tokenizer(name, trust_remote_code=trust, field="judge"))


VERB = Verb(
    name="measure",
    example="retain measure --base M --model out/ --retention wiki=wiki.txt --output_dir report/ --max_forgetting 0.02",
    settings=(MeasureConfig,),
    run=run_measure,
    groups={
        "retention": "Texts",
        "choices": "Questions",
        "prompts": "Continuations",
        "refusals": "Refusals and other behaviours",
        "max_forgetting": "Gate: limits that the whole interval must stay within",
        "new_task": "The new task, and how texts are measured",
        "dtype": "How models are loaded",
    },
)
