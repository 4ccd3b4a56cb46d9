"""`retain measure`: load texts, questions, requests and both models, and measure; then hold it against the limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.data.chats import chat_of
from retain.data.overlap import find_overlap
from retain.data.rows import OLD_TEXT, Document, Reading, Text, named_sources, prompt_text, read_rows, row_texts
from retain.files import CONFIG_FILE, read_settings
from retain.measuring.choices import load_questions
from retain.measuring.generations import Prompt, as_prompt
from retain.measuring.lm_eval import measure_with_lm_eval
from retain.measuring.measure import measure
from retain.measuring.refusals import Judge, load_requests
from retain.models.description import default_device, length_that_fits, with_least_room
from retain.models.loading import find_file, load_model, load_tokenizer, resolve_model_path
from retain.models.reference import Reference, probe
from retain.models.tokenizer_identity import tokenizer_of_tuned
from retain.replay.dataset import load_texts
from retain.report.report import ForgettingReport
from retain.training.run_files import OF_LOSS, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from retain.cli.config import MeasureConfig

# What it means that a measured text was trained on.
MEANING = {
    "new_task": "the gain on them is memory, not learning",
    "retention": "forgetting on them is not of old knowledge",
}
PROMPT_TOKENS = 16  # of the first document of each text, continued where no prompts are given


def run_measure(config: MeasureConfig, say: Callable[[str], object]) -> ForgettingReport:
    """Measure what `config` names.

    Raises:
        ValueError: one line naming the field, the value, and what to do.
    """
    assert config.base is not None
    assert config.model is not None
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
