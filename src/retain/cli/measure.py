"""`retain measure`: load texts, questions, requests and both models, and measure; then judge by the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from retain.checks import Unchosen, setting
from retain.cli.flags import Verb
from retain.cli.settings import ModelLoadSettings, RetentionSettings
from retain.data.chats import chat_of
from retain.data.overlap import find_overlap
from retain.data.rows import OLD_TEXT, Document, Reading, Text, named_sources, prompt_text, read_rows, row_texts
from retain.files import CONFIG_FILE, exclusive, read_settings
from retain.measuring.choices import load_questions
from retain.measuring.generations import Prompt, as_prompt
from retain.measuring.lm_eval import measure_with_lm_eval, paired_report
from retain.measuring.measure import measure
from retain.measuring.refusals import Judge, load_requests
from retain.models.description import default_device, length_that_fits, with_least_room
from retain.models.loading import find_file, load_model, load_tokenizer, resolve_model_path
from retain.models.reference import Reference, probe
from retain.models.tokenizer_identity import tokenizer_of_tuned
from retain.replay.dataset import load_texts
from retain.report.gate import judge
from retain.report.model_card import check_card
from retain.report.report import ForgettingReport
from retain.text import visible
from retain.training.run_files import OF_LOSS, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What it means that a measured text was trained on.
MEANING = {
    "new_task": "the gain on them is memory, not learning",
    "retention": "forgetting on them is not of old knowledge",
}
PROMPT_TOKENS = 16  # of the first document of each text, continued where no prompts are given


@dataclass(kw_only=True)
class MeasureConfig(ModelLoadSettings, RetentionSettings):
    """`retain measure`: how much a tuned model forgot of its base."""

    base: str = setting("", "Model before finetuning: a Hub id or folder. [required, unless --pair]")
    model: str = setting("", "Model after finetuning: a model or an adapter folder. [required, unless --pair]")
    output_dir: str = setting("", "Folder for report.json, report.md and report.html.", required=True)
    model_card: str | None = setting(
        None, "Model card (README.md) that receives the section Forgetting and the model-index."
    )
    retention: list[str] = setting(list, "Text on which forgetting is measured, as name=file; repeatable.")
    new_task: list[str] = setting(
        list, "Held-out text of the new task, as name=file, for the gain on what training predicts; repeatable."
    )
    completion_only_loss: bool | None = setting(
        None,
        "Of the new task's rows with a prompt, count the completion alone (true) or all tokens (false), as in TRL. "
        "Default: as the run was trained, else true.",
    )
    assistant_only_loss: bool | None = setting(
        None,
        "Of the new task's chats, count the assistant's turns alone, as in TRL. Default: as the run was trained, else "
        "false.",
    )
    max_documents: int | None = setting(None, "Read only the first N documents of each text. Default: all.", low=1)
    max_windows: int | None = setting(
        None,
        "Measure only the first N windows of each document. Default: all; retention during training is measured on 1.",
        low=1,
    )
    ci: float | None = setting(
        None,
        "Target half-width of the interval of forgetting, in nats per token; reads only as many documents of each text "
        "as needed.",
        low=1e-6,
    )
    train_dataset: list[str] = setting(
        list, "Rows that the model was trained on: warns of measured texts among them; repeatable."
    )
    choices: list[str] = setting(
        list,
        "Multiple-choice questions, as name=file with question, choices and answer, or name=arc_challenge, arc_easy, "
        "mmlu or commonsense_qa from the Hub; repeatable.",
    )
    choice_style: Literal["text", "letter"] = setting(
        "text",
        "What is scored after the question. text: each choice's own words. letter: the choices are listed first, and "
        "the letters A, B, … are scored.",
    )
    choice_chat_template: bool = setting(False, "Put each question as a user's turn of the chat template.")
    max_questions: int | None = setting(None, "Draw only N questions of each set, with the seed. Default: all.", low=1)
    lm_eval: str | None = setting(
        None,
        "Tasks of lm-evaluation-harness, separated by commas, run on both models and paired question by question; "
        "needs pip install 'retain[eval]'.",
    )
    pair: list[str] = setting(
        list,
        "Two per-sample files of lm-eval (--log_samples) on one task, the base's first, to compare question by "
        "question in place of models.",
    )
    prompts: str | None = setting(
        None,
        "File of prompts (rows as in training data) to continue with both models; with expected and updated answers in "
        "the rows, shows what was kept, updated and forgotten.",
    )
    sampled: bool = setting(True, "Continue every prompt a second time, drawn at temperature 1.")
    max_new_tokens: int = setting(48, "Tokens of each continuation and answer; 0 for no continuations.")
    refusals: list[str] = setting(
        list,
        "Harmful requests that both models answer, as name=file (a column prompt, text or goal), or name=advbench or "
        "jailbreakbench from the Hub; repeatable.",
    )
    harmless: list[str] = setting(
        list,
        "Harmless requests, for over-refusal, as name=file, or name=jailbreakbench_harmless from the Hub; repeatable.",
    )
    max_prompts: int | None = setting(None, "Draw only N requests of each set, with the seed. Default: all.", low=1)
    judge: str | None = setting(None, "Chat model that also judges whether each answer refuses.")
    max_forgetting: float | None = setting(
        None,
        "Most forgetting (rise of the loss) of any retention text, in nats per token. Exit code 0: within; 2: beyond; "
        "3: not enough evidence, the interval straddles the limit.",
    )
    max_ref_kl: float | None = setting(
        None, "Most KL(base || model) on any retention text, in nats per token; exit codes as for max_forgetting."
    )
    min_agreement: float | None = setting(
        None,
        "Least share of the base's own top tokens, and of its answers to the questions; exit codes as for "
        "max_forgetting.",
        high=1,
    )
    max_length: int = setting(
        Unchosen(512), "Longest window in tokens, the start token included; at most the model's positions.", low=2
    )
    batch_tokens: int = setting(
        Unchosen(2048), "Tokens per forward pass; by default fewer where the vocabulary is above 65k.", low=1
    )
    num_resamples: int = setting(2000, "Bootstrap resamples over documents.", low=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in () if self.pair else ("base", "model"):
            if not getattr(self, name):
                raise ValueError(f"{name}: missing; give --{name}")
        self._check_sources()
        self._check_limits()

    def _check_sources(self) -> None:
        sources = [name for name in ("retention", "choices", "lm_eval", "refusals", "harmless") if getattr(self, name)]
        models = [name for name in ("base", "model", "new_task") if getattr(self, name)] + sources
        if self.pair and models:
            raise ValueError(f"{models[0]}: {getattr(self, models[0])!r} does not go with pair; leave one of them out")
        if self.pair and len(self.pair) != 2:
            raise ValueError(f"pair: {len(self.pair)} files are not a pair; give two, the base's first")
        if not (sources or self.prompts or self.pair):
            raise ValueError(
                "retention: missing; give at least one text as --retention name=file, or questions as "
                "--choices name=file, or requests as --refusals name=file, or --prompts file"
            )
        for name in ("prompts", "refusals", "harmless") if not self.max_new_tokens else ():
            if getattr(self, name):
                raise ValueError(f"max_new_tokens: 0 writes nothing, and {name} are to be answered; use at least 1")
        if self.judge is not None and not (self.refusals or self.harmless):
            raise ValueError(f"judge: {self.judge!r} has nothing to judge; give --refusals name=file")

    def _check_limits(self) -> None:
        for name, other in (("max_forgetting", ", or use min_agreement"), ("max_ref_kl", ""), ("ci", "")):
            if getattr(self, name) is not None and not self.retention:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is about texts, and there are none; give --retention name=file"
                    f"{other}"
                )
        if self.min_agreement is not None and not (self.retention or self.choices or self.lm_eval or self.pair):
            raise ValueError(
                f"min_agreement: {self.min_agreement} is about texts and questions, and there are none; give "
                "--retention or --choices"
            )


def run_measure(config: MeasureConfig) -> int:
    """Write a report; with a limit, print and return the exit code of the gate."""
    if config.model_card:
        check_card(config.model_card)
    with exclusive(Path(config.output_dir)):  # made before long work, so that one that cannot be made is known
        if config.pair:
            result = paired_report(config.pair)
        else:
            result = measure_models(config, say=lambda stage: print(f"{visible(stage)} …", flush=True))
        limits = {name: getattr(config, name) for name in ("max_forgetting", "max_ref_kl", "min_agreement")}
        if set(limits.values()) != {None}:
            result.data["gate"] = asdict(judge(result.results, **limits))
        result.write(config.output_dir)
        print(f"{result.summary()}\n\nreport: {Path(config.output_dir) / 'report.html'}")
        if config.model_card:
            result.to_model_card(config.model_card)
    gate = result.data.get("gate")
    if gate is None:
        return 0
    checks = gate["checks"] if len(gate["checks"]) > 1 else []
    print(*map(visible, ["", *checks, gate["verdict"]]), sep="\n")
    return gate["code"]


def measure_models(config: MeasureConfig, say: Callable[[str], object]) -> ForgettingReport:
    """Measure what `config` names.

    Raises:
        ValueError: one line naming the field, the value, and what to do.
    """
    trust = config.trust_remote_code
    named = {
        name: named_sources(getattr(config, name), name)
        for name in ("retention", "new_task", "choices", "refusals", "harmless")
    }
    tokenizer = load_tokenizer(config.base, revision=config.model_revision, trust_remote_code=trust, field="base")
    run = read_run(Path(config.model))
    own = tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=trust)
    training = settings_of_run(config.model).get("training_arguments") or {}
    sources = load_sources(config, named, tokenizer, own, training)
    base, tuned = load_both(config)
    texts = (sources["new_task"] | sources["retention"]).values()
    if texts and config.max_new_tokens and not config.prompts:
        room = length_that_fits(with_least_room(base, tuned), config.max_length) - config.max_new_tokens
        sources["prompts"] = default_prompts(texts, tokenizer, room)
    judge = load_judge(config, base) if config.judge else None
    names = (
        *("choice_style", "choice_chat_template", "start_token", "max_length", "max_windows", "batch_tokens"),
        *("max_new_tokens", "num_resamples", "seed", "ci", "sampled"),
    )
    options: dict[str, Any] = {name: getattr(config, name) for name in names} | {"tokenizer": tokenizer, "judge": judge}
    options |= {"name": Path(config.model).name, "progress": say}
    if rows := trained_rows(config, tokenizer):
        say("looking for the texts in the training rows")
    warnings = overlap_warnings(sources, rows, tokenizer)
    harness = ask_harness(config, base, tuned, tokenizer, say) if config.lm_eval else {}
    report = measure(base, tuned, sources.pop("retention"), **sources, **options)
    report.data.update(run)
    report.data["choices"] |= harness
    report.data["warnings"] = other_base(config, base, tuned) + warnings + report.data["warnings"]
    return report


def ask_harness(
    config: MeasureConfig,
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """The tasks of lm-evaluation-harness that were named, on both models."""
    tasks = [task.strip() for task in str(config.lm_eval).split(",") if task.strip()]
    say(f"lm-evaluation-harness: {', '.join(tasks)}")
    options: dict[str, Any] = {"limit": config.max_questions, "chat_template": config.choice_chat_template}
    batch_size = max(1, config.batch_tokens // config.max_length)
    return measure_with_lm_eval(base, tuned, tokenizer, tasks, batch_size=batch_size, seed=config.seed, **options)


def trained_rows(config: MeasureConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Iterable[str]]:
    """Texts that the model was trained on: the given rows, and the replay rows that the run itself names."""
    found: dict[str, Iterable[str]] = {}
    for source in config.train_dataset:
        found[f"the training rows of {source!r}"] = row_texts(source, tokenizer)
    replay = replay_folder(str(config.model))
    if replay is not None:
        found["the replay rows"] = (as_text(row, tokenizer) for row in load_texts(replay, tokenizer))
    return found


def settings_of_run(model: str) -> dict[str, Any]:
    """What the run that made a model was set to: told beside it, on the Hub too, or above one of its checkpoints."""
    path = resolve_model_path(model)
    beside, above = find_file(path, CONFIG_FILE), Path(path).resolve().parent
    of_checkpoint = beside is None and Path(path).is_dir() and Path(path).resolve().name.startswith("checkpoint-")
    folder = above if of_checkpoint else Path(path) if beside is None else beside.parent
    return read_settings(folder, {"training_arguments?": dict, "replay_dataset?": {"source?": str}})


def replay_folder(model: str) -> str | None:
    """Where the replay rows of a run lie, if it tells and they are still there."""
    source = (settings_of_run(model).get("replay_dataset") or {}).get("source")
    return source if source and Path(source).exists() else None


def as_text(document: Document | Text, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document's text, whole."""
    if isinstance(document, Text):
        return document.words
    return "".join(str(tokenizer.decode(window[1:])) for window in document.windows)


def overlap_warnings(
    sources: dict[str, Any], rows: dict[str, Iterable[str]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A line for every measured text that is also among the rows that the model was trained on."""
    texts = {
        name: [as_text(document, tokenizer) for document in source]
        for kind in MEANING
        for name, source in (sources[kind] if rows else {}).items()
    }
    lines = []
    for where, of_where in rows.items():
        found = find_overlap(texts, of_where)
        lines += [found[name].warning(name, where, MEANING[kind]) for kind in MEANING for name in sources[kind]]
    return [line for line in lines if line]


def load_sources(
    config: MeasureConfig,
    named: dict[str, dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    trained: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is put to the models, by the name of `measure`'s argument, each by the user's own names.

    Args:
        trained: the tokenizer of the tuned model, by which the new task's rows are read.
        training: the arguments that the run was trained with, as far as it tells.
    """
    drawn: dict[str, Any] = {"seed": config.seed}
    of_new_task = new_task_reading(config, training)
    texts = {
        name: {text: load_texts(source, reader, config.max_documents, how) for text, source in named[name].items()}
        for name, reader, how in (("retention", tokenizer, OLD_TEXT), ("new_task", trained, of_new_task))
    }
    questions = {
        name: load_questions(source, max_questions=config.max_questions, **drawn)
        for name, source in named["choices"].items()
    }
    drawn["max_prompts"] = config.max_prompts
    requests = {
        kind: {name: load_requests(source, **drawn) for name, source in named[kind].items()}
        for kind in ("refusals", "harmless")
    }
    rows = read_rows(config.prompts) if config.prompts else ()
    prompts = [as_prompt(row, tokenizer, f"row {at} of {config.prompts!r}") for at, row in enumerate(rows, start=1)]
    return {**texts, "choices": questions, **requests, "prompts": prompts}


def new_task_reading(config: MeasureConfig, training: Mapping[str, Any]) -> Reading:
    """Which tokens of the new task count: as the flags say, else as the run's own loss did, else as TRL's would."""
    asked = {name: getattr(config, name, None) for name in OF_LOSS}
    told = {name: training.get(name) if value is None else value for name, value in asked.items()}
    told |= {"assistant_only_loss": bool(told["assistant_only_loss"])}
    return Reading(as_trained=True, **{name: value for name, value in told.items() if value is not None})


def default_prompts(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, room: int) -> list[Prompt]:
    """What both models continue of each text where no prompts are given: of the first document a few first tokens.

    A chat is continued where its first answer begins, if that is within `room` tokens.
    """
    prompts = []
    for source in texts:
        document, chat = source[0], False
        if isinstance(document, Document):
            ids = document.windows[0][1:]
        elif chat := (turns := chat_of(document.row)) is not None:
            asked = list(takewhile(lambda turn: turn["role"] != "assistant", turns))
            text = prompt_text({**document.row, "messages": asked or turns}, tokenizer)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(document.words, add_special_tokens=False, verbose=False)["input_ids"]
        if not chat or len(ids) <= room:
            prompts.append(Prompt(text if chat else str(tokenizer.decode(ids[:PROMPT_TOKENS])), chat))
    return prompts


def load_both(config: MeasureConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base as asked for, and the tuned model with the same dtype, kernel and device."""
    base = load_model(
        str(config.base),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        device=default_device(),
        field="base",
    )
    tuned = load_model(
        str(config.model),
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        trust_remote_code=config.trust_remote_code,
        device=base.device,
    )
    return base, tuned


def other_base(config: MeasureConfig, base: PreTrainedModel, tuned: Any) -> list[str]:
    """Says so where an adapter, switched off, leaves another model than the base."""
    if not hasattr(tuned, "disable_adapter"):
        return []
    try:
        Reference().prove(tuned, probe(base))
    except ValueError:
        return [
            f"the adapter {config.model!r} switched off is not {config.base!r}: it was trained on another base, or "
            "rewrites its own; what is measured is that difference, too"
        ]
    return []


def load_judge(config: MeasureConfig, base: PreTrainedModel) -> Judge:
    """The judge, on the device of the base."""
    name, trust = str(config.judge), config.trust_remote_code
    of_judge: dict[str, Any] = {"trust_remote_code": trust, "field": "judge"}
    model = load_model(name, dtype=config.dtype, device=base.device, **of_judge)
    return Judge(model, load_tokenizer(name, **of_judge))


VERB = Verb(
    name="measure",
    example="retain measure --base M --model out/ --retention wiki=wiki.txt --output_dir report/ --max_forgetting 0.02",
    settings=(MeasureConfig,),
    run=run_measure,
    groups={
        "retention": "Texts",
        "choices": "Questions",
        "prompts": "Continuations",
        "refusals": "Refusals",
        "max_forgetting": "Gate: limits that the whole interval must keep",
        "max_length": "How it is measured",
        "dtype": "How models are loaded",
    },
    renamed={"budget": "--max_forgetting (rise of the loss) or --max_ref_kl (divergence from the base)"},
)
