"""Every setting of `retain`, described once: dataclasses whose fields carry their own help.

The command line and YAML files are read from these fields (through `trl.TrlParser`, beside TRL's own),
and the library takes the same objects, so a value is checked in one place whichever way it came in.
Only the standard library is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from retain.checks import Unchosen, check_choice, check_name, check_number, check_types, described, setting
from retain.training.config import ReplayConfig

StoreReference = Literal["hidden", "topk"]
SampleEngine = Literal["torch", "vllm", "ray"]
SweepEngine = Literal["local", "ray"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ChatTurn = Literal["user", "assistant", "system"]
ChoiceStyle = Literal["text", "letter"]
ExportFormat = Literal["text", "messages", "tokens"]
ForgettingMetric = Literal["ref_kl", "forgetting", "loss"]


@dataclass(kw_only=True)
class FinetuneConfig(ReplayConfig):
    """What `retain finetune` takes beside the flags of `trl sft`."""

    replay_dataset: str | None = setting(
        None,
        "Replay rows: a folder that `retain sample` wrote, a JSONL, text or Parquet file of real text, or 'self' to "
        "sample from the model first.",
    )
    replay_num_rows: int = setting(256, "Rows to sample before training, with replay_dataset self.", low=1)
    start_token: str | None = setting(
        None, "The token that starts a document in pretraining, as text or id. Default: chosen and shown."
    )
    eval_dataset_name: str | None = setting(
        None, "Held-out rows of the new task: a file or Hub id. Default: the dataset's test split."
    )
    retention: list[str] = setting(list, "Texts on which forgetting is measured, each as name=file; repeatable.")
    retention_max_documents: int = setting(
        64,
        "Documents of each retention text that are measured during training, the first max_length tokens of each; "
        "`retain measure` reads whole documents unless --max_windows is 1.",
        low=1,
    )
    adam_beta2_half_life_tokens: float | None = setting(
        None,
        "Tokens of new rows after which Adam's second moment halves, in place of adam_beta2; e.g. 10e6.",
        low=1e-6,
    )
    stop_at_loss: float | None = setting(
        None, "End at the first evaluation with a new-task loss this low, in nats per token.", low=1e-6
    )
    early_stopping_patience: int | None = setting(
        None,
        "End after this many evaluations without a better metric_for_best_model, e.g. retention/wiki/ref_kl. A resumed "
        "run counts from 0.",
        low=1,
    )


@dataclass(kw_only=True)
class ModelLoadConfig:
    """How a model is loaded; the names are TRL's."""

    dtype: Dtype = field(
        default="auto",
        metadata=described("Weights' dtype. auto: the checkpoint's own on a GPU, float32 on a CPU."),
    )
    attn_implementation: str | None = field(default=None, metadata=described("Attention kernel, e.g. sdpa or eager."))
    model_revision: str = field(default="main", metadata=described("Branch, tag or commit on the Hub."))
    trust_remote_code: bool = field(default=False, metadata=described("Allow model code from the Hub to run."))
    start_token: str | None = field(
        default=None,
        metadata=described(
            "The token that starts a document in pretraining, as text or id. Default: chosen and shown."
        ),
    )
    seed: int = field(default=0, metadata=described("Seed of everything random here."))

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("dtype", self.dtype, Dtype)
        check_number("seed", self.seed, low=0, high=2**63 - 1, integer=True)


@dataclass(kw_only=True)
class SampleConfig(ModelLoadConfig):
    """`retain sample`: draw replay rows from a model's own distribution."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=described("Hub id, folder, GGUF file, or package:NAME for a package that ships a GGUF file."),
    )
    output_dir: str | None = field(default=None, metadata=described("Folder for the replay dataset."))
    num_rows: int = field(default=256, metadata=described("Rows to draw."))
    max_length: int = field(
        default=Unchosen(512),
        metadata=described("Tokens per row, the start token included; by default at most the model's positions."),
    )
    start: str = field(
        default="document",
        metadata=described(
            "How rows begin. document: the start token alone. chat: inside a turn of the chat template. prompts: the "
            "texts of --prompts. Or a mix with shares: document=0.7,chat=0.3."
        ),
    )
    chat_turn: ChatTurn = field(
        default="user", metadata=described("With start chat: the role whose turn the model writes.")
    )
    prompts: str | None = field(
        default=None, metadata=described("With start prompts: a file of texts to continue (rows as in training data).")
    )
    min_ended_turns: float = field(
        default=0.1, metadata=described("With start chat: stop if a smaller share of the first rows ends its turn.")
    )
    per_device_batch_size: int | None = field(
        default=None, metadata=described("Rows drawn together. Default: what fits into half of the free memory.")
    )
    rows_per_shard: int = field(
        default=64, metadata=described("Rows per Parquet file: the work of a process at a time, the most a kill loses.")
    )
    store_reference: StoreReference | None = field(
        default=None,
        metadata=described(
            "Keep the model's predictions beside the rows, so that training needs no reference forward. hidden: the "
            "last hidden state, exact. topk: the 64 likeliest tokens and the mass of the rest, small."
        ),
    )
    engine: SampleEngine = field(
        default="torch",
        metadata=described(
            "What draws. torch: this process, or those of accelerate launch or torchrun. vllm: likewise, by vLLM, for "
            "GPUs and large models. ray: the workers of a Ray cluster (of RAY_ADDRESS, else one of this machine)."
        ),
    )
    tensor_parallel_size: int = field(default=1, metadata=described("With engine vllm: GPUs of each process."))
    num_workers: int | None = field(
        default=None,
        metadata=described(
            "With engine ray: workers that each hold the model. Default: one per GPU, else one per CPU."
        ),
    )
    preview: int = field(default=0, metadata=described("Show so many rows to read, and write preview.html."))
    overwrite_output_dir: bool = field(default=False, metadata=described("Delete another dataset found in output_dir."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("model_name_or_path", self.model_name_or_path)
        check_name("output_dir", self.output_dir)
        check_number("num_rows", self.num_rows, low=1, integer=True)
        check_number("max_length", self.max_length, low=2, integer=True)
        check_choice("chat_turn", self.chat_turn, ChatTurn)
        check_number("min_ended_turns", self.min_ended_turns, low=0, high=1)
        check_number("preview", self.preview, low=0, integer=True)
        if self.per_device_batch_size is not None:
            check_number("per_device_batch_size", self.per_device_batch_size, low=1, integer=True)
        check_number("rows_per_shard", self.rows_per_shard, low=1, integer=True)
        if self.store_reference is not None:
            check_choice("store_reference", self.store_reference, StoreReference)
        check_choice("engine", self.engine, SampleEngine)
        self._check_engine()

    def _check_engine(self) -> None:
        size = self.tensor_parallel_size
        check_number("tensor_parallel_size", size, low=1, integer=True)
        if size > 1 and self.engine != "vllm":
            raise ValueError(f"tensor_parallel_size: {size} needs engine vllm, not {self.engine!r}; set --engine")
        if self.num_workers is not None:
            check_number("num_workers", self.num_workers, low=1, integer=True)
            if self.engine != "ray":
                raise ValueError(f"num_workers: {self.num_workers} needs engine ray, not {self.engine!r}; set --engine")
        for name in ("store_reference", "attn_implementation") if self.engine == "vllm" else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not for engine vllm; leave it out, or use torch")


@dataclass(kw_only=True)
class ExportConfig:
    """`retain export`: replay rows as JSONL for other trainers; the folder comes first, without a flag."""

    replay_dataset: str | None = field(default=None, metadata=described("A folder that `retain sample` wrote."))
    output: str | None = field(default=None, metadata=described("File for the rows, .jsonl."))
    format: ExportFormat = field(
        default="text",
        metadata=described(
            "text: what follows the start token. messages: the whole turns of rows sampled with --start chat. tokens: "
            "input_ids, attention_mask and labels, exactly as drawn."
        ),
    )
    model_name_or_path: str | None = field(
        default=None, metadata=described("Where the tokenizer is. Default: the model that wrote the rows.")
    )
    trust_remote_code: bool = field(default=False, metadata=described("Allow tokenizer code from the Hub to run."))

    def __post_init__(self) -> None:
        check_types(self)
        check_name("replay_dataset", self.replay_dataset)
        check_name("output", self.output)
        check_choice("format", self.format, ExportFormat)


@dataclass(kw_only=True)
class MeasureConfig(ModelLoadConfig):
    """`retain measure`: how much a tuned model forgot of its base."""

    base: str | None = field(default=None, metadata=described("The model before finetuning."))
    model: str | None = field(
        default=None, metadata=described("The model after finetuning: a model or an adapter folder.")
    )
    retention: list[str] = field(
        default_factory=list,
        metadata=described("Texts on which forgetting is measured, each as name=file; may be given several times."),
    )
    new_task: list[str] = field(
        default_factory=list,
        metadata=described(
            "Held-out texts of the new task, each as name=file: shows the gain on what training predicts."
        ),
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata=described(
            "Of the new task's rows with a prompt, count the completion alone (true) or all tokens (false), as in TRL. "
            "Default: as the run was trained, else true."
        ),
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata=described(
            "Of the new task's chats, count the assistant's turns alone, as in TRL. Default: as the run was trained, "
            "else false."
        ),
    )
    choices: list[str] = field(
        default_factory=list,
        metadata=described(
            "Multiple-choice questions, each as name=file with question, choices and answer, or name=arc_challenge, "
            "arc_easy, mmlu or commonsense_qa from the Hub; may be given several times."
        ),
    )
    choice_style: ChoiceStyle = field(
        default="text",
        metadata=described(
            "What is scored after the question. text: each choice's own words. letter: the choices are listed first, "
            "and the letters A, B, … are scored."
        ),
    )
    choice_chat_template: bool = field(
        default=False, metadata=described("Put each question to the model as a user's turn of its chat template.")
    )
    max_questions: int | None = field(
        default=None, metadata=described("Draw only so many questions of each set, with the seed.")
    )
    lm_eval: str | None = field(
        default=None,
        metadata=described(
            "Tasks of lm-evaluation-harness, with commas between, run on both models and paired question by question; "
            "needs pip install 'retain[eval]'."
        ),
    )
    refusals: list[str] = field(
        default_factory=list,
        metadata=described(
            "Harmful requests that both models answer, each as name=file (a column prompt, text or goal), or "
            "name=advbench or jailbreakbench from the Hub; may be given several times."
        ),
    )
    harmless: list[str] = field(
        default_factory=list,
        metadata=described(
            "Harmless requests, for over-refusal, each as name=file, or name=jailbreakbench_harmless from the Hub."
        ),
    )
    max_prompts: int | None = field(
        default=None, metadata=described("Draw only so many requests of each set, with the seed.")
    )
    judge: str | None = field(
        default=None, metadata=described("A chat model that is asked, too, whether each answer refuses.")
    )
    pair: list[str] = field(
        default_factory=list,
        metadata=described(
            "Instead of models: two per-sample files of lm-eval (--log_samples) on one task, the base's first, to be "
            "compared question by question."
        ),
    )
    budget: float | None = field(
        default=None,
        metadata=described(
            "Forgetting (nats per token) that no retention text may exceed. Exit code 0: within; 2: beyond; 3: not "
            "enough evidence, the interval straddles the budget."
        ),
    )
    min_agreement: float | None = field(
        default=None,
        metadata=described(
            "Least share of the base's own top tokens, and of its answers to the questions; exit codes as for budget."
        ),
    )
    prompts: str | None = field(
        default=None,
        metadata=described(
            "File of prompts (rows as in training data) to continue with both models; with expected and updated "
            "answers in the rows, says what was kept, updated and forgotten."
        ),
    )
    sampled: bool = field(
        default=True, metadata=described("Continue every prompt a second time, drawn at temperature 1.")
    )
    max_new_tokens: int = field(
        default=48, metadata=described("Tokens of each continuation and answer. 0: no continuations.")
    )
    train_dataset: list[str] = field(
        default_factory=list,
        metadata=described("Rows that the model was trained on: warns of measured texts that are among them."),
    )
    output_dir: str | None = field(
        default=None, metadata=described("Folder for report.json, report.md and report.html.")
    )
    model_card: str | None = field(
        default=None,
        metadata=described("Model card (README.md) to put the section Forgetting and the model-index into."),
    )
    max_length: int = field(
        default=Unchosen(512),
        metadata=described("Longest window, the start token included; by default at most the model's positions."),
    )
    max_windows: int | None = field(
        default=None,
        metadata=described(
            "Measure only so many windows of each document, from its beginning. Default: all. Retention during "
            "training is measured on 1."
        ),
    )
    max_documents: int | None = field(
        default=None, metadata=described("Use only the first so many documents of each text.")
    )
    ci: float | None = field(
        default=None,
        metadata=described(
            "Wished half-width of the interval of forgetting, in nats per token: draws only as many documents of "
            "each text as that takes."
        ),
    )
    batch_tokens: int = field(
        default=Unchosen(2048),
        metadata=described("Tokens per forward pass; by default fewer where the vocabulary is above 65k."),
    )
    num_resamples: int = field(default=2000, metadata=described("Bootstrap resamples over documents."))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("output_dir",) if self.pair else ("base", "model", "output_dir"):
            check_name(name, getattr(self, name))
        self._check_sources()
        check_choice("choice_style", self.choice_style, ChoiceStyle)
        check_number("max_length", self.max_length, low=2, integer=True)
        check_number("batch_tokens", self.batch_tokens, low=1, integer=True)
        check_number("num_resamples", self.num_resamples, low=100, integer=True)
        check_number("max_new_tokens", self.max_new_tokens, low=0, integer=True)
        if self.ci is not None:
            check_number("ci", self.ci, low=1e-6)
        for name in ("max_windows", "max_documents", "max_questions", "max_prompts"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=1, integer=True)
        if self.budget is not None:
            check_number("budget", self.budget, low=0)
        if self.min_agreement is not None:
            check_number("min_agreement", self.min_agreement, low=0, high=1)

    def _check_sources(self) -> None:
        asked = [name for name in ("retention", "choices", "lm_eval", "refusals", "harmless") if getattr(self, name)]
        models = [name for name in ("base", "model", "new_task") if getattr(self, name)] + asked
        if self.pair and models:
            raise ValueError(f"{models[0]}: {getattr(self, models[0])!r} does not go with pair; leave one of them out")
        if self.pair and len(self.pair) != 2:
            raise ValueError(f"pair: {len(self.pair)} files are not a pair; give two, the base's first")
        if not (asked or self.prompts or self.pair):
            raise ValueError(
                "retention: missing; give at least one text as --retention name=file, or questions as "
                "--choices name=file, or requests as --refusals name=file, or --prompts file"
            )
        for name in ("prompts", "refusals", "harmless") if not self.max_new_tokens else ():
            if getattr(self, name):
                raise ValueError(f"max_new_tokens: 0 writes nothing, and {name} are to be answered; use at least 1")
        if self.judge is not None and not (self.refusals or self.harmless):
            raise ValueError(f"judge: {self.judge!r} has nothing to judge; give --refusals name=file")
        for name, other in (("budget", ", or use min_agreement"), ("ci", "")):
            if getattr(self, name) is not None and not self.retention:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is on forgetting, which needs a text; give --retention name=file"
                    f"{other}"
                )
        if self.min_agreement is not None and not (self.retention or self.choices or self.lm_eval or self.pair):
            raise ValueError(
                f"min_agreement: {self.min_agreement} is on texts and questions; give --retention or --choices"
            )


@dataclass(kw_only=True)
class ReportConfig:
    """`retain report`: one page for several runs of the same base."""

    runs: list[str] = field(
        default_factory=list, metadata=described("Folders that `retain measure` wrote, the plain run first.")
    )
    output_dir: str | None = field(
        default=None, metadata=described("Folder for report.json, report.md and report.html.")
    )
    title: str = field(default="Forgetting report", metadata=described("Title of the page."))
    interactive: bool = field(
        default=False,
        metadata=described(
            "Figures that answer to the pointer; the page carries plotly and grows by 5 MB. Needs "
            "pip install 'retain[interactive]'."
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not self.runs:
            raise ValueError("runs: missing; give at least one folder as --runs DIR")
        check_name("output_dir", self.output_dir)


@dataclass(kw_only=True)
class SweepConfig:
    """`retain sweep`: many runs of one verb, each made once."""

    sweep: str | None = field(
        default=None,
        metadata=described("YAML file with verb, common flags, a grid of lists, and a list of flags together."),
    )
    output_dir: str | None = field(default=None, metadata=described("Folder for results.jsonl, runs/ and logs/."))
    engine: SweepEngine = field(
        default="local",
        metadata=described("local: processes of this machine. ray: the cluster of RAY_ADDRESS, or one begun here."),
    )
    num_workers: int | None = field(
        default=None, metadata=described("Runs at a time. Default: as many as there are cores for.")
    )
    cores_per_run: int = field(default=1, metadata=described("Cores that each run is given, and threads that it uses."))

    def __post_init__(self) -> None:
        check_types(self)
        check_name("sweep", self.sweep)
        check_name("output_dir", self.output_dir)
        check_choice("engine", self.engine, SweepEngine)
        check_number("cores_per_run", self.cores_per_run, low=1, integer=True)
        if self.num_workers is not None:
            check_number("num_workers", self.num_workers, low=1, integer=True)


@dataclass(kw_only=True)
class FitConfig:
    """`retain fit`: a law of forgetting from measured runs; the files come first, without a flag."""

    runs: list[str] = field(
        default_factory=list,
        metadata=described(
            "metrics.jsonl files of finetunes, or tables (.csv, .parquet, .jsonl) with the columns run, num_params, "
            "num_steps, finetuning_loss, forgetting_loss, and dataset where there are several."
        ),
    )
    form: str = field(
        default="joint",
        metadata=described("joint, linear, finetuning, forgetting, injection, size, saturation or quadratic."),
    )
    output: str | None = field(default=None, metadata=described("File for the law, .json."))
    rivals: list[str] = field(
        default_factory=list, metadata=described("Other forms: say which predict held-out runs equally well.")
    )
    retention_name: str | None = field(
        default=None,
        metadata=described("The retention text whose forgetting is fitted, where the finetunes measured several."),
    )
    forgetting_metric: ForgettingMetric = field(
        default="ref_kl",
        metadata=described(
            "What of that text is the forgetting loss: ref_kl, forgetting (loss after - before) or loss."
        ),
    )
    min_steps: float = field(
        default=0.0, metadata=described("Leave out measurements before this step, in which the warm-up still shows.")
    )
    shared_exponents: bool = field(
        default=False, metadata=described("One set of exponents for all data sets; the other parameters for each.")
    )
    num_resamples: int = field(default=1000, metadata=described("Bootstrap resamples over runs; 0 for no intervals."))
    num_starts: int = field(default=32, metadata=described("Random starts of the exponents."))
    plot: str | None = field(default=None, metadata=described("File for a figure of runs, curves and residuals, .png."))
    seed: int = field(default=0, metadata=described("Seed of starts and resamples."))

    def __post_init__(self) -> None:
        check_types(self)
        if not self.runs:
            raise ValueError("runs: missing; name the files first: retain fit runs/*/metrics.jsonl --output law.json")
        check_name("form", self.form)
        check_name("output", self.output)
        if self.plot is not None and not self.plot.lower().endswith(".png"):
            raise ValueError(f"plot: {self.plot!r} is no .png; figures are written as PNG, name it law.png, say")
        check_choice("forgetting_metric", self.forgetting_metric, ForgettingMetric)
        check_number("min_steps", self.min_steps, low=0)
        check_number("num_resamples", self.num_resamples, low=0, integer=True)
        check_number("num_starts", self.num_starts, low=1, integer=True)
        check_number("seed", self.seed, low=0, high=2**63 - 1, integer=True)


@dataclass(kw_only=True)
class PredictConfig:
    """`retain predict`: what a law says of a run not yet made; the law's file comes first, without a flag."""

    law: str | None = field(default=None, metadata=described("A file that `retain fit` wrote."))
    num_params: float | None = field(default=None, metadata=described("Parameters that will be tuned."))
    num_steps: float | None = field(default=None, metadata=described("Update steps."))
    num_tokens: float | None = field(default=None, metadata=described("Tokens of finetuning."))
    replay_share: float | None = field(default=None, metadata=described("Share of old data mixed in."))
    tokens_per_param: float | None = field(default=None, metadata=described("Pretraining tokens per parameter."))
    finetuning_loss: float | None = field(
        default=None, metadata=described("Loss on the new task, for the form linear.")
    )
    ref_kl: float | None = field(default=None, metadata=described("KL(base || model) on the new task."))
    max_forgetting: float | None = field(
        default=None,
        metadata=described("In place of num_steps: the most steps whose forgetting loss stays within this."),
    )
    model: str | None = field(
        default=None,
        metadata=described("In place of num_params: a model, of which only the configuration is read, and ..."),
    )
    lora_r: int | None = field(default=None, metadata=described("... the rank of the LoRA that will be tuned."))
    lora_target_modules: list[str] | None = field(
        default=None, metadata=described("Modules with LoRA, or all-linear. Default: PEFT's for this architecture.")
    )
    model_revision: str = field(default="main", metadata=described("Branch, tag or commit on the Hub."))
    trust_remote_code: bool = field(default=False, metadata=described("Allow model code from the Hub to run."))
    dataset: str | None = field(default=None, metadata=described("The data set, where the law was fitted to several."))
    level: float = field(default=0.95, metadata=described("Coverage of the intervals."))
    json: bool = field(default=False, metadata=described("Print JSON."))

    def __post_init__(self) -> None:
        check_types(self)
        check_name("law", self.law)
        names = ("num_params", "num_steps", "num_tokens", "tokens_per_param", "finetuning_loss", "ref_kl")
        for name in (*names, "replay_share", "max_forgetting"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0, high=1 if name == "replay_share" else math.inf)
        if self.lora_r is not None:
            check_number("lora_r", self.lora_r, low=1, integer=True)
        if (self.model is None) != (self.lora_r is None):
            missing = "lora_r" if self.lora_r is None else "model"
            raise ValueError(f"{missing}: missing; --model and --lora_r go together, in place of --num_params")
        if self.lora_r is not None and self.num_params is not None:
            raise ValueError(f"num_params: {self.num_params:g} does not go with model and lora_r; leave one out")
        if self.max_forgetting is not None and self.num_steps is not None:
            raise ValueError(f"num_steps: {self.num_steps:g} does not go with max_forgetting; leave one of them out")
        check_number("level", self.level, low=1e-6, high=1 - 1e-6)


@dataclass(kw_only=True)
class PlanConfig:
    """`retain plan`: short pilot runs, a law of them, and a setting whose forgetting stays within a budget."""

    model: str | None = field(default=None, metadata=described("Hub id or folder of the model to finetune."))
    dataset_name: str | None = field(default=None, metadata=described("Rows of the new task: a file or Hub id."))
    eval_dataset_name: str | None = field(
        default=None,
        metadata=described(
            "Held-out rows of the new task: a file or Hub id. Default: a tenth of dataset_name, kept apart."
        ),
    )
    retention: list[str] = field(
        default_factory=list,
        metadata=described("Texts on which forgetting is measured, each as name=file; may be given several times."),
    )
    retention_name: str | None = field(
        default=None, metadata=described("The retention text that the budget is for, where there are several.")
    )
    budget: float | None = field(
        default=None,
        metadata=described("Forgetting to stay within: KL(base || model) on the retention text, nats per token."),
    )
    output_dir: str | None = field(
        default=None, metadata=described("Folder for pilots/, pilots.jsonl, plan.json, plan.md, plan.png and law.json.")
    )
    lora_ranks: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32],
        metadata=described("Ranks of the pilots: at least 4, better 6; the recommended rank is one of them."),
    )
    replay_coefs: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 10.0],
        metadata=described(
            "Replay coefficients of the pilots: 0 with every rank, others with the least, middle and most."
        ),
    )
    pilot_steps: int = field(default=60, metadata=described("Steps of each pilot, measured twelve times on the way."))
    max_steps: int | None = field(
        default=None,
        metadata=described(
            "Longest run without replay to consider. Default: pilot_steps; beyond, predictions extrapolate."
        ),
    )
    replay_dataset: str = field(
        default="self",
        metadata=described(
            "Replay rows: a folder that `retain sample` wrote, a file of real text, or 'self' to sample."
        ),
    )
    replay_num_rows: int = field(default=256, metadata=described("With replay_dataset self: how many rows to sample."))
    per_device_replay_batch_size: int | None = field(
        default=None, metadata=described("Replay rows a step. Default: an eighth of the batch, at least 1.")
    )
    per_device_train_batch_size: int = field(default=8, metadata=described("New rows a step."))
    learning_rate: float = field(default=2e-4, metadata=described("Constant after the warm-up, for every pilot."))
    max_length: int = field(
        default=Unchosen(256), metadata=described("Tokens per row; by default at most the model's positions.")
    )
    lora_alpha: int = field(
        default=16, metadata=described("The LoRA's scale is lora_alpha / sqrt(rank) (rank-stabilised), for every rank.")
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata=described("Modules with LoRA, or all-linear.")
    )
    eval_rows: int = field(default=64, metadata=described("Held-out rows of the new task that are measured."))
    retention_max_documents: int = field(default=64, metadata=described("Documents of each retention text."))
    finetune_config: str | None = field(
        default=None,
        metadata=described("A YAML file of `retain finetune` for what is not set here, e.g. dtype or packing."),
    )
    trust_remote_code: bool = field(default=False, metadata=described("Allow model code from the Hub to run."))
    level: float = field(
        default=0.9, metadata=described("Coverage of the intervals; the upper end is held to the budget.")
    )
    num_resamples: int = field(default=1000, metadata=described("Bootstrap resamples over pilots."))
    seed: int = field(default=0, metadata=described("Seed of everything random here."))

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("model", "dataset_name", "output_dir"):
            check_name(name, getattr(self, name))
        if not self.retention:
            raise ValueError("retention: missing; give the text on which forgetting is measured as name=file")
        if self.budget is None:
            raise ValueError("budget: missing; give --budget, in nats per token, such as 0.02")
        check_number("budget", self.budget, low=1e-9)
        for name in ("pilot_steps", "replay_num_rows", "per_device_train_batch_size", "lora_alpha", "eval_rows"):
            check_number(name, getattr(self, name), low=12 if name == "pilot_steps" else 1, integer=True)
        for name in ("per_device_replay_batch_size", "max_steps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=1, integer=True)
        check_number("max_length", self.max_length, low=2, integer=True)
        check_number("retention_max_documents", self.retention_max_documents, low=1, integer=True)
        check_number("learning_rate", self.learning_rate, low=1e-12)
        check_number("level", self.level, low=0.5, high=0.999)
        check_number("num_resamples", self.num_resamples, low=100, integer=True)
        check_number("seed", self.seed, low=0, high=2**32 - 1, integer=True)
        self._check_design()

    def _check_design(self) -> None:
        for rank in self.lora_ranks:
            check_number("lora_ranks", rank, low=1, integer=True)
        for coef in self.replay_coefs:
            check_number("replay_coefs", coef, low=0)
        if len(set(self.lora_ranks)) < 4:
            raise ValueError(f"lora_ranks: {self.lora_ranks} cannot tell what the rank does; give at least 4 ranks")
        if 0 not in self.replay_coefs:
            raise ValueError(f"replay_coefs: {self.replay_coefs} has no 0; the law is of runs without replay, add it")
