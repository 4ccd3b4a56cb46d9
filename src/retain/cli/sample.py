"""`retain sample`: a model → a replay dataset, in one process or several, with statistics of the rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState

from retain.checks import Unchosen, setting
from retain.cli.flags import Verb
from retain.cli.settings import ModelLoadSettings
from retain.data.chats import keep_date
from retain.data.rows import prompt_text, read_rows
from retain.models.description import choose_start_token, default_device, launched, length_that_fits
from retain.models.loading import load_model, load_tokenizer
from retain.progress import StageProgress, progress_line
from retain.replay.dataset import MANIFEST, read_manifest
from retain.replay.hub import push_pool
from retain.report.numbers import quantity
from retain.sampling.engine import Engine, choose_threads
from retain.sampling.quality import pool_lines
from retain.sampling.starts import plan_starts
from retain.sampling.write import check_pool_folder, check_same_rows, default_store, sample_replay

SAMPLING_STAGE = "sampling"  # kind of progress stage


@dataclass(kw_only=True)
class SampleConfig(ModelLoadSettings):
    """Settings of `retain sample`."""

    model: str = setting(
        "", "Hub id, folder, GGUF file, or package:NAME for an installed package that ships a GGUF file.", required=True
    )
    output_dir: str = setting("", "Folder for the replay dataset.", required=True)
    num_rows: int = setting(256, "Rows to sample.", low=1)
    max_length: int = setting(
        Unchosen(512), "Tokens per row, the start token included; at most the model's positions.", low=2
    )
    push_to_hub: str | None = setting(
        None, "Hub dataset, as OWNER/NAME, to push the rows and a card to, for use with --replay_dataset OWNER/NAME."
    )
    hub_private_repo: bool = setting(False, "Make that dataset private.")
    preview: int = setting(0, "Print this many rows, spread over the pool.")
    start: str = setting(
        "document",
        "How rows begin. document: with the start token alone. chat: inside a turn of the chat template. tools, "
        "think: the same, with tools offered, or with the template's thinking switched on. prompts: with the texts of "
        "--prompts. Or a mix with shares: document=0.7,chat=0.3.",
    )
    chat_turn: Literal["user", "assistant", "system"] = setting(
        "user", "Role whose turn the model writes, with start chat, tools or think."
    )
    prompts: str | None = setting(None, "File of texts to continue, with start prompts; rows as in training data.")
    store_reference: Literal["auto", "hidden", "topk", "none"] = setting(
        "auto",
        "Store the model's predictions with the rows, so that training needs no reference forward pass. hidden: the "
        "last hidden state, exact. topk: the 64 most likely tokens and the mass of the rest, small. auto: hidden if "
        "the output head is a plain one, 4 GB are enough, and tensor_parallel_size is 1. For vLLM's rows, the model "
        "stores them in a pass after all rows are drawn; to add them to finished rows, run again with hidden or topk.",
    )
    store_fisher: bool = setting(
        False,
        "Measure the model's Fisher information on the rows and store it with them, so that training with anchor_coef "
        "does not have to.",
    )
    engine: Literal["torch", "vllm", "ray"] = setting(
        "torch",
        "What samples the rows. torch: this process, or those of accelerate launch or torchrun. vllm: the same, with "
        "vLLM, for GPUs and large models. ray: the workers of a Ray cluster (at RAY_ADDRESS, else one on this "
        "machine).",
    )
    per_device_batch_size: int | None = setting(
        None, "Rows to draw at once. Default: as many as fit into half of the free memory.", low=1
    )
    rows_per_shard: int = setting(
        64, "Rows per Parquet file: what one process draws at a time, and the most that a kill can lose.", low=1
    )
    tensor_parallel_size: int = setting(1, "GPUs per process, with engine vllm.", low=1)
    num_workers: int | None = setting(
        None, "Workers that each hold the model, with engine ray. Default: one per GPU, else one per CPU.", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"push_to_hub: {self.push_to_hub!r} is not the name of a dataset; give OWNER/NAME")
        size, workers = self.tensor_parallel_size, self.num_workers
        if size > 1 and self.engine != "vllm":
            raise ValueError(f"tensor_parallel_size: {size} needs engine vllm, not {self.engine!r}; set --engine")
        if workers is not None and self.engine != "ray":
            raise ValueError(f"num_workers: {workers} needs engine ray, not {self.engine!r}; set --engine")
        if self.engine == "vllm" and self.attn_implementation is not None:
            raise ValueError(
                f"attn_implementation: {self.attn_implementation!r} has no effect with vllm; leave it out, or use torch"
            )


def run_sample(config: SampleConfig) -> None:
    """Sample a replay dataset; under `accelerate launch`, every process draws its share of the shards."""
    check_pool_folder(Path(config.output_dir))
    open_engine = engine_of(config)
    on_cpu = config.engine != "torch" or default_device() == "cpu"  # other engines load the model themselves
    state = PartialState(cpu=on_cpu) if launched() else None
    device = state.device if state is not None else "cpu" if on_cpu else default_device()
    tokenizer = load_tokenizer(config.model, **config.checkpoint)
    is_begun = (Path(config.output_dir) / MANIFEST).exists()
    keep_date(tokenizer, read_manifest(Path(config.output_dir)).get("created") if is_begun else None)
    start = choose_start_token(tokenizer, config.start_token)
    rows = enumerate(read_rows(config.prompts, "prompts"), start=1) if config.prompts else ()
    prompts = [prompt_text(row, tokenizer, f"prompts: row {at} of {config.prompts!r}") for at, row in rows]
    starts = plan_starts(config.start, tokenizer, start, chat_turn=config.chat_turn, prompts=prompts)
    if is_begun:
        settings = {name: getattr(config, name) for name in ("num_rows", "max_length", "seed", "rows_per_shard")}
        settings = {name: value for name, value in settings.items() if not isinstance(value, Unchosen)}
        check_same_rows(Path(config.output_dir), {"start": starts.describe(), **settings})
    model = load_model(config.model, device=device, **config.loading)
    if model.device.type == "cpu":
        torch.set_num_threads(choose_threads(model))
    is_main = state is None or state.is_main_process
    if is_main:
        print(f"document start: {start}")
    max_length = length_that_fits(model, config.max_length)
    is_vllm = config.engine == "vllm"  # schedules rows itself, so it gets whole shards
    store: str | None = None if config.store_reference == "none" else config.store_reference
    if store == "auto":
        obstacle = None
        if (size := config.tensor_parallel_size) > 1:
            obstacle = f"the pass over the rows needs the whole model on one device, not {size}; use --store_reference "
            obstacle += "hidden if it fits"
        store = default_store(model, config.output_dir, config.num_rows, max_length, obstacle=obstacle)
    with progress_line(shown=is_main):
        folder = sample_with_progress(
            model, tokenizer, config.output_dir, config.num_rows, max_length=max_length, seed=config.seed,
            start_token=start, starts=starts, store_reference=store,
            store_fisher=config.store_fisher, rows_per_shard=config.rows_per_shard,
            batch_size=config.per_device_batch_size or (config.rows_per_shard if is_vllm else None),
            engine=open_engine(model, max_length, store), engine_name="vllm" if is_vllm else "torch", state=state,
            device=first_device(config.tensor_parallel_size, state) if is_vllm else None,
        )  # fmt: skip
    if is_main:
        shared = f", drawn by {state.num_processes} processes" if state is not None else ""
        print(f"{quantity(config.num_rows, 'row')} of {max_length} tokens in {folder}{shared}")
        print(*pool_lines(folder, tokenizer, starts, config.preview), sep="\n")
        if config.push_to_hub:
            print(f"shared: {push_pool(folder, config.push_to_hub, private=config.hub_private_repo)}")


def first_device(size: int, state: PartialState | None) -> str:
    """The first device of this process if every launched process has `size` devices."""
    kind = default_device()
    return kind if state is None or kind == "cpu" else f"{kind}:{state.local_process_index * size}"


def engine_of(config: SampleConfig) -> Callable[[Any, int, str | None], AbstractContextManager[Engine] | None]:
    """A function (model, tokens per row, what to store) -> engine; None is torch in this process.

    Raises:
        ValueError: if the engine is not installed, or for Ray under a launcher.
    """
    if config.engine == "torch":
        return lambda model, length, store: None
    if config.engine == "ray" and launched():
        raise ValueError("engine: 'ray' starts its own workers; run it without accelerate or torchrun")
    path = Path(config.model).expanduser()
    name = str(path.resolve()) if path.exists() else config.model  # workers run in another folder
    if config.engine == "vllm":
        from retain.sampling.vllm_engine import vllm_engine

        options: dict[str, Any] = {"tensor_parallel_size": config.tensor_parallel_size, **config.checkpoint}
        options["seed"] = config.seed
        return lambda model, length, store: vllm_engine(name, dtype=model.dtype, max_length=length, **options)
    from retain.sampling.ray_workers import ray_engine

    return lambda model, length, store: ray_engine(
        partial(load_model, name, **config.loading | {"dtype": model.dtype}),
        max_length=length,
        seed=config.seed,
        store_reference=store,
        num_workers=config.num_workers,
    )


def sample_with_progress(
    model: Any, tokenizer: Any, output_dir: str, num_rows: int, title: str = "sampling replay rows", **settings: Any
) -> Path:
    """`sample_replay` with progress; the stage starts with the first rows, so an error prints nothing before it."""
    state = settings.get("state")
    processes = 1 if state is None else state.num_processes
    stages: list[StageProgress] = []

    def progress(rows: int) -> None:
        rows *= processes
        if not stages:
            stages.append(StageProgress(title, num_rows, "rows", SAMPLING_STAGE, initial=min(rows, num_rows)))
        else:
            stages[0].update(min(rows, num_rows - stages[0].done))
        if stages[0].done == num_rows:
            stages[0].close()

    return sample_replay(model, tokenizer, output_dir, num_rows=num_rows, progress=progress, **settings)


VERB = Verb(
    name="sample",
    example="retain sample --model M --output_dir replay/",
    settings=(SampleConfig,),
    run=run_sample,
    resume="run the same command again to resume",
    groups={"start": "How rows begin", "store_reference": "How rows are drawn", "dtype": "How the model is loaded"},
    aliases={"model_name_or_path": "model"},
)
