"""What must hold before a run is called protected; each check refuses in one line with the remedy."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from retain.data.overlap import find_rows
from retain.data.rows import Document
from retain.models.description import max_positions
from retain.models.reference import Reference
from retain.replay.dataset import ReplayDataset
from retain.training.config import ReplayConfig

LOADS_EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
logger = logging.getLogger(__name__)
NOISE = 5e-3  # nats per token at the untouched model; half precision makes less
SHORT = 16  # tokens below which a row may be another's by chance
NO_TOKENS = ("type_ids", "position_ids")  # columns of integers that are no tokens end so


def check_devices(trainer: Any) -> None:
    """Refuse devices, and ways to share a model over them, on which replay would be wrong, or end in torch's error.

    Args:
        trainer: the host, once it is built: it counts a model that is spread over GPUs as on one.

    Raises:
        ValueError: with what to do instead.
    """
    args = trainer.args
    if args.n_gpu > 1:  # nn.DataParallel gives each copy a part of the rows, and the whole mask
        raise ValueError(
            f"devices: {args.n_gpu} GPUs and one process; start it with accelerate launch --num_processes "
            f"{args.n_gpu}, or use one of them: CUDA_VISIBLE_DEVICES=0"
        )
    if args.device.type == "mps":
        raise ValueError("devices: mps has no float64, in which sums are held; set use_cpu true")
    sizes = {"tp_size": trainer.get_tp_size(), "cp_size": trainer.get_cp_size(), "sp_size": trainer.get_sp_size()}
    for name, size in sizes.items():
        if size > 1:  # replay rows are drawn by process
            raise ValueError(
                f"devices: {name} {size} gives the processes that share one model different replay rows; set it 1, "
                "and use data parallelism (DDP, FSDP2 or DeepSpeed ZeRO)"
            )
    if trainer.is_fsdp_xla_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        raise ValueError("devices: FSDP1 and XLA's FSDP were never tried with replay; set fsdp_version 2")


def check_forward_passes(model: Any, args: Any) -> None:
    """Refuse activated LoRA with checkpointing: PEFT then takes one forward pass for each backward pass.

    Raises:
        ValueError: with what to do instead.
    """
    adapters = getattr(model, "peft_config", {}).values()
    activated = any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters)
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    if activated and (args.gradient_checkpointing or layers):
        raise ValueError(
            "gradient_checkpointing: true, and aLoRA (alora_invocation_tokens) allows only one forward pass a step "
            "then, without the base's and the replay rows'; set it false"
        )


def check_invoked(model: Any, rows: ReplayDataset) -> None:
    """Refuse replay rows on none of which an activated LoRA is on: they hold nothing.

    Raises:
        ValueError: with what to do instead.
    """
    found = [getattr(one, "alora_invocation_tokens", None) for one in getattr(model, "peft_config", {}).values()]
    for tokens in filter(None, found):
        asked = np.asarray(tokens, dtype=rows.tokens.dtype).tobytes()
        if not any(asked in rows[at].tobytes() for at in range(len(rows))):
            raise ValueError(
                f"replay_dataset: no row holds the tokens {tokens} that switch aLoRA on, so none would protect the "
                "model, which stays its base without them; replay prompts that end with them, or set replay_coef 0"
            )


def check_trained(model: Any, dataset: Any) -> None:
    """Refuse to train nothing, as what PEFT's merge_and_unload leaves: all of it is frozen; or on nothing.

    Raises:
        ValueError: with what to do instead.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: all its parameters are frozen; call requires_grad_(True) on it, or give it a new adapter "
            "(peft_config, --use_peft), and merge one that it has"
        )
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError(
            "train_dataset: no row is left; SFTTrainer drops those whose completions max_length cuts off: raise it, or "
            "give shorter prompts"
        )


def check_positions(model: Any, lengths: Iterable[int]) -> None:
    """Rows must fit the model as it is trained, whose prompt may take positions.

    Raises:
        ValueError: if one does not.
    """
    longest, limit = max(lengths, default=0), max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"replay_max_length: rows of {longest} tokens, but this model, as it is trained, has {limit} positions for "
            f"them; use at most {limit}, for max_length too"
        )


def check_rows_fit(rows: ReplayDataset, model: Any) -> None:
    """Rows must have something to predict, fit the model's positions, and use its tokens.

    Raises:
        ValueError: naming what does not fit.
    """
    if not rows.num_predictions.sum():
        raise ValueError(f"replay_dataset: {rows.source!r} has no row of two tokens or more; give longer rows")
    longest, limit = int(np.diff(rows.offsets).max()), max_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(f"replay_dataset: rows of {longest} tokens, but this model has {limit} positions; cut them")
    largest, vocabulary = int(rows.tokens.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise ValueError(
            f"replay_dataset: token id {largest}, but this model has {vocabulary} tokens; sample from this model"
        )


def check_held_out(
    rows: Iterable[Any], retention: Mapping[str, Sequence[Document]], where: str, edges: Collection[int] = ()
) -> None:
    """What is replayed or trained on must not be measured as what is remembered: see `find_rows`.

    Single short rows may be the same by chance (a heading, a greeting): they count from a tenth of a text on.

    Args:
        where: whose rows these are, for the message.
        edges: tokens that open or close a row and are no part of its text.

    Raises:
        ValueError: naming the text and how many rows it shares.
    """
    windows = [(name, window) for name in retention for document in retention[name] for window in document.windows]
    found = [windows[at] for at in find_rows([window for _, window in windows], rows, edges)] if windows else []
    for name in retention:
        shared = [len(window) for text, window in found if text == name]
        count = sum(text == name for text, _ in windows)
        if shared and (max(shared) >= SHORT or 10 * len(shared) >= count):
            raise ValueError(
                f"retention: {name!r} shares {len(shared)} rows with the {where}; measure on rows never "
                f"{'replayed' if 'replay' in where else 'trained on'}"
            )


def row_edges(tokenizer: Any, start_id: int) -> set[int]:
    """Tokens that open or close rows."""
    return {start_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}


def check_not_trained_on(dataset: Any, retention: Mapping[str, Sequence[Document]], edges: Collection[int]) -> None:
    """What a host trains on must not be measured as what is remembered; where nobody can look, that is said.

    Raises:
        ValueError: as `check_held_out`.
    """
    rows = training_rows(dataset)
    first = list(itertools.islice(rows, 1))
    if retention and dataset is not None and not first:
        logger.warning("retention: not looked for in the training rows, which are a stream, or no tokens yet")
    check_held_out(itertools.chain(first, rows), retention, "training rows", edges)


def training_rows(dataset: Any) -> Iterator[Any]:
    """Token ids of the rows that a host trainer will train on: see `row_columns`.

    Nothing for a stream, whose rows pass by only once, and for rows that are not tokenised when training begins
    (prompts of online methods).
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return
    first = dataset[0]
    rows = row_columns(first) if isinstance(first, Mapping) else []
    named = list(dict.fromkeys(name for row in rows for name in row))
    for at in range(0, len(dataset) if rows else 0, 1000):
        places = list(range(at, min(at + 1000, len(dataset))))
        if getattr(dataset, "column_names", None) is None:
            fetch = getattr(dataset, "__getitems__", None)  # torch's name for rows that are made faster together
            batch: Any = fetch(places) if fetch else None
            if not isinstance(batch, list):  # a batch in one mapping
                batch = [dataset[index] for index in places]
        else:
            columns = dataset.select_columns(named).with_format("numpy")[at : at + 1000]
            batch = [dict(zip(named, row, strict=True)) for row in zip(*(columns[name] for name in named), strict=True)]
        for example in batch:
            for row in rows:
                yield np.concatenate([np.asarray(example[name], dtype=np.int64) for name in row])


def row_columns(example: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The columns of token ids that make up each row of a trainer's example, in TRL's names.

    `input_ids` of supervised training, and whatever ends so, are whole rows; answers (`chosen_ids` and `rejected_ids`
    of DPO and reward models, `completion_ids` of KTO) follow `prompt_ids` where there are some.
    """
    arrays = {name: np.asarray(value) for name, value in example.items() if name.endswith("_ids")}
    tokens = [
        name
        for name, array in arrays.items()
        if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size) and not name.endswith(NO_TOKENS)
    ]
    whole = [(name,) for name in tokens if name.endswith("input_ids")]
    prompt = ("prompt_ids",) if "prompt_ids" in tokens else ()
    # KTO's other completions of a prompt, KL_completion_ids, are the completions of its neighbours
    taken = {*prompt, *(name for (name,) in whole), *(f"KL_{name}" for name in tokens)}
    answers = [(*prompt, name) for name in tokens if name not in taken]
    return whole + answers or [prompt] * bool(prompt)


def expected_steps(args: Any, rows: Any) -> int:
    """Optimizer steps of a run over these rows; for a stream what `max_steps` says."""
    if args.max_steps > 0 or not hasattr(rows, "__len__"):
        return int(args.max_steps)
    size = args.train_batch_size * args.world_size
    batches = len(rows) // size if args.dataloader_drop_last else -(-len(rows) // size)
    return math.ceil(args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps)))


def check_replay_every(config: ReplayConfig, steps: int) -> None:
    """Refuse replay on the first step alone, where the model is its base.

    Raises:
        ValueError: with what to do instead.
    """
    if config.objective.uses_reference and 1 < config.replay_every >= steps:
        raise ValueError(
            f"replay_every: {config.replay_every} of {steps} steps is the first one only, where the model is its "
            "base and KL has no gradient; use a smaller one"
        )


def zero_kl_error(steps: int) -> ValueError:
    """What a KL that was exactly 0 to the end of a run can come from; that the reference stays was shown."""
    return ValueError(
        f"replay/kl: exactly 0 after {steps} steps: either the weights do not move at this learning_rate and dtype, or "
        "only tokens are trained that no replay row holds (TrainableTokensConfig: give rows that do), so nothing "
        "protects the model; check these"
    )


def check_noise(kl: float, budget: float | None) -> None:
    """Before its first step a model is its base: what the KL shows there is noise of the forward pass.

    Args:
        kl: of the first step, nats per token.

    Raises:
        ValueError: if a budget is hardly above it, which no coefficient could hold.
    """
    if kl < NOISE:
        return
    what = f"before any step the KL is {kl:.2g} nats per token: noise of dropout, NEFTune or half precision"
    if budget is not None and kl > budget / 2:
        raise ValueError(f"max_ref_kl: {budget:g}, but {what}; switch it off, or ask for more than twice that")
    logger.warning("replay/kl: %s; switch it off, or the penalty is held against noise, too", what)


def check_weights(model: Any, accelerator: Any, where: str) -> None:
    """Refuse to keep trained weights that are not finite: the loss shows it only a step later.

    Under FSDP2 each process sees its shards and all say the same; elsewhere each looks at what it holds.

    Raises:
        ValueError: before anything of them is written.
    """
    trained = [value.detach() for value in model.parameters() if value.requires_grad and value.is_floating_point()]
    shards = [value.to_local() if hasattr(value, "to_local") else value for value in trained]
    bad = torch.zeros((), device=accelerator.device)
    for shard in shards:
        bad += (~shard.isfinite().all()).to(bad)
    if any(hasattr(value, "to_local") for value in trained):  # all processes save together
        bad = accelerator.reduce(bad, reduction="sum")
    if bool(bad):
        raise ValueError(
            f"model: weights that are not finite, so nothing was saved to {where!r}; lower learning_rate or "
            "replay_coef, check weight_decay, or use bf16 instead of fp16"
        )


def see_the_base_everywhere(*, may_change: bool) -> None:
    """FSDP may leave the weights of all processes but one empty until they are sharded; the base must be seen first.

    Args:
        may_change: whether the model is still to be loaded, so that the setting can be switched off.

    Raises:
        ValueError: if the model was loaded so already.
    """
    empty = [os.environ.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", LOADS_EMPTY)]
    if not all(empty) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if not may_change:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true leaves the weights of this process empty, and the base must be seen "
            "on every process; set it false, or give the model by name"
        )
    os.environ[LOADS_EMPTY] = "false"


@contextmanager
def loaded_whole(args: Any) -> Iterator[None]:
    """Load weights that DeepSpeed's ZeRO-3 would take apart at once: the base must be seen on every process first.

    They are shared out when training begins.
    """
    from transformers.integrations import (
        is_deepspeed_zero3_enabled,
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    if not is_deepspeed_zero3_enabled():
        yield
        return
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:  # what accelerate's settings made, or the file of --deepspeed
        set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)


def check_whole(model: Any) -> None:
    """Refuse a model whose weights are shared out already, by DeepSpeed's ZeRO-3 or over a device mesh.

    Raises:
        ValueError: with what to do instead.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model: its weights were shared out by ZeRO-3 when it was loaded; the base must be seen on every process: "
            "give the model by name, or load it before the training arguments are made"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):  # torch's DTensor
        raise ValueError(
            "model: its weights were shared out over a device mesh when it was loaded (tp_plan, distributed_config); "
            "the base must be seen on every process: load it whole, and let the trainer share it (FSDP2)"
        )


def takes_cache(config: ReplayConfig, rows: ReplayDataset | None, *, own_rows: bool) -> bool:
    """Whether the base's predictions come from what was stored beside the replay rows.

    Args:
        own_rows: whether the rows are the model's own; another model's predictions are not the base's.

    Raises:
        ValueError: if that was asked for and cannot be had.
    """
    objective = config.objective
    if not objective.uses_reference or config.replay_reference not in ("auto", "cache"):
        return False
    if objective.takes_stored and rows is not None and rows.cache is not None and own_rows:
        return True
    if config.replay_reference == "auto":
        return False
    why = "nothing fit is stored" if objective.takes_stored else f"{objective.name!r} needs other predictions"
    raise ValueError(
        f"replay_reference: 'cache', but {why}; use auto, or rows that this model drew with "
        "`retain sample --store_reference hidden`"
    )


def check_base_is_frozen(model: Any) -> None:
    """An adapter switched off shows the base only while nothing but the adapter is trained.

    Raises:
        ValueError: naming a weight of the base that would be trained.
    """
    prefix = getattr(model.base_model, "prefix", None) or "prompt_encoder"
    own = (prefix, "modules_to_save", "prompt_encoder", "token_adapter", "trainable_tokens")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in own):
            raise ValueError(
                f"replay_reference: 'adapter', but the base's own {name!r} is trained too, so switching the adapter "
                "off does not give the base; use replay_reference copy, or freeze it"
            )


def make_reference(config: ReplayConfig, model: Any, *, has_adapter: bool) -> Reference:
    """The adapter switched off where there is or will be one, else a frozen copy of the model as it is now.

    Raises:
        ValueError: if what was asked for cannot be had.
    """
    if config.replay_reference == "adapter" and not has_adapter:
        raise ValueError("replay_reference: 'adapter', but there is no adapter; use copy, or --use_peft")
    if config.replay_reference != "copy" and has_adapter:
        return Reference()
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError("replay_reference: a copy under DeepSpeed ZeRO-3 is not supported; use an adapter or FSDP2")
    return Reference.copy_of(model)
