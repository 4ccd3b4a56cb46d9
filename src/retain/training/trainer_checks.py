"""Checks of a host trainer, its model and its devices.

Every check raises a one-line `ValueError` that names the setting, its value and the remedy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from transformers.integrations import is_deepspeed_zero3_enabled, set_hf_deepspeed_config, unset_hf_deepspeed_config

from retain.models.description import base_parameter_name, launched
from retain.models.loading import load_model, load_tokenizer

LOADS_EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def check_devices(trainer: Any) -> None:
    """Reject devices, and ways to distribute a model over them, on which replay would be wrong or torch would crash.

    Args:
        trainer: the built host; before that, a model spread over GPUs would not count as on one.
    """
    args = trainer.args
    if args.n_gpu > 1:  # nn.DataParallel gives each copy some of the rows, and the whole mask
        raise ValueError(
            f"devices: {args.n_gpu} GPUs and one process; start it with accelerate launch --num_processes "
            f"{args.n_gpu}, or use one of them: CUDA_VISIBLE_DEVICES=0"
        )
    if args.device.type == "mps":
        raise ValueError("devices: mps has no float64, which sums need; set use_cpu true")
    sizes = {"tp_size": trainer.get_tp_size(), "cp_size": trainer.get_cp_size(), "sp_size": trainer.get_sp_size()}
    for name, size in sizes.items():
        if size > 1:  # each process draws its own replay rows
            raise ValueError(
                f"devices: {name} {size} gives the processes that share one model different replay rows; set it to 1 "
                "and use data parallelism (DDP, FSDP2 or DeepSpeed ZeRO)"
            )
    if trainer.is_fsdp_xla_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        raise ValueError("devices: FSDP1 and XLA's FSDP are not tested with replay; set fsdp_version 2")


def check_forward_passes(model: Any, args: Any) -> None:
    """Reject activated LoRA with checkpointing: PEFT then allows one forward pass per backward pass."""
    checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    if invocation_tokens(model) and (args.gradient_checkpointing or checkpointed):
        raise ValueError(
            "gradient_checkpointing: true, but with aLoRA (alora_invocation_tokens) it allows only one forward pass "
            "per step, and the base and replay rows need their own; set it false"
        )


def invocation_tokens(model: Any) -> list[list[int]]:
    """Token ids that switch on each activated LoRA of a model; empty for other models."""
    adapters = getattr(model, "peft_config", {}).values()
    return [tokens for adapter in adapters if (tokens := getattr(adapter, "alora_invocation_tokens", None))]


def check_lora_targets(model: Any, adapter: Any) -> None:
    """Reject an adapter whose target modules the model lacks before rows are drawn; PEFT would only do so later."""
    targets, names = adapter.target_modules, [name for name, _ in model.named_modules()]
    for module in adapter.modules_to_save or ():
        if not any(name.endswith(module) for name in names):  # PEFT's own rule, but PEFT ignores a name without a match
            raise ValueError(f"lora_modules_to_save: {module!r} is no module of this model; use lm_head, say")
    if targets in (None, "all-linear") or any(check_target_module_exists(adapter, name) for name in names):
        return
    remedy = "q_proj"
    if isinstance(targets, str):  # TRL turns a list of one name into a string, which PEFT reads as a pattern
        targets, remedy = [targets], f"'.*{targets}', say"
    raise ValueError(
        f"lora_target_modules: {', '.join(sorted(targets))!r} is no module of this model; use {remedy}, or all-linear"
    )


def check_trained(model: Any, dataset: Any) -> None:
    """Reject a model without trainable parameters (as PEFT's merge_and_unload leaves it) and an empty dataset."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: all its parameters are frozen; call requires_grad_(True) on it, or merge its adapter and give it a "
            "new one (peft_config, --use_peft)"
        )
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError(
            "train_dataset: no row is left; SFTTrainer drops rows whose completion max_length cuts off: raise it, or "
            "give shorter prompts"
        )


def check_base_is_frozen(model: Any) -> None:
    """Reject a model that trains more than its adapter: switching the adapter off would not give the base."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and base_parameter_name(name) is not None:
            raise ValueError(
                f"replay_reference: 'adapter', but the base's own {name!r} is trained too, so switching the adapter "
                "off does not give the base; use replay_reference copy, or freeze it"
            )


def check_weights(model: Any, accelerator: Any, where: str) -> None:
    """Refuse to save trained weights that are not finite: the loss shows it only a step later.

    Under FSDP2 each process checks its shards and all get the same answer; otherwise each checks its own weights.
    """
    trained = [value.detach() for value in model.parameters() if value.requires_grad and value.is_floating_point()]
    is_sharded = any(hasattr(value, "to_local") for value in trained)
    shards = [value.to_local() if hasattr(value, "to_local") else value for value in trained]
    num_bad = torch.zeros((), device=accelerator.device)
    for shard in shards:
        num_bad += (~shard.isfinite().all()).to(num_bad)
    if bool(accelerator.reduce(num_bad, reduction="sum") if is_sharded else num_bad):  # all processes save together
        raise ValueError(
            f"model: some weights are not finite, so nothing was saved to {where!r}; lower learning_rate or "
            "replay_coef, check weight_decay, or use bf16 instead of fp16"
        )


def expected_steps(args: Any, rows: Any) -> int:
    """Optimizer steps of a run over these rows; `max_steps` for a stream."""
    if args.max_steps > 0 or not hasattr(rows, "__len__"):
        return int(args.max_steps)
    size = args.train_batch_size * args.world_size
    batches = len(rows) // size if args.dataloader_drop_last else -(-len(rows) // size)
    return math.ceil(args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps)))


# Loading: the base must be read whole on every process before FSDP or DeepSpeed shards it


def check_loads_everywhere(*, may_change: bool) -> None:
    """Reject FSDP's loading on one process only, which leaves the weights of the others empty until they are sharded.

    Args:
        may_change: switch that setting off instead, because the model is still to be loaded.
    """
    is_set = [os.environ.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", LOADS_EMPTY)]
    if not (all(is_set) and launched()):
        return
    if not may_change:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: true leaves the weights of this process empty, but every process needs "
            "the base; set it false, or give the model by name"
        )
    os.environ[LOADS_EMPTY] = "false"


@contextmanager
def unsharded_loading(args: Any) -> Iterator[None]:
    """A context in which DeepSpeed's ZeRO-3 does not shard weights as they are loaded, but when training begins."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:  # the config that accelerate made, or the file of --deepspeed
        set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)


def check_unsharded(model: Any) -> None:
    """Reject a model whose weights are distributed already: by ZeRO-3, over a device mesh, or by `device_map`."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model: ZeRO-3 sharded its weights when it was loaded, but every process needs the whole base; give the "
            "model by name, or load it before the training arguments are made"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):  # torch's DTensor
        raise ValueError(
            "model: its weights were sharded over a device mesh when it was loaded (tp_plan, distributed_config), but "
            "every process needs the whole base; load it whole, and let the trainer shard it (FSDP2)"
        )
    if (count := len(set(getattr(model, "hf_device_map", {}).values()))) > 1:
        raise ValueError(
            f"device_map: spreads the model over {count} devices, which is not tested with replay; leave it out, and "
            "let the trainer shard it (FSDP2)"
        )


def load_for_training(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Load a model by name as TRL does: float32 unless `model_init_kwargs` says otherwise."""
    check_loads_everywhere(may_change=True)
    settings: dict[str, Any] = {"trust_remote_code": getattr(args, "trust_remote_code", False)}
    if init_kwargs := getattr(args, "model_init_kwargs", None):
        args.model_init_kwargs = None  # else the host warns that it ignores them
        settings |= init_kwargs
    settings |= {"revision": settings.get("revision") or "main", "dtype": settings.get("dtype") or "float32"}
    if quantization := kwargs.pop("quantization_config", None):
        settings["quantization_config"] = quantization
    if kwargs.get("processing_class") is None:  # from the same revision as the weights
        tokenizer_settings = {key: settings[key] for key in ("revision", "trust_remote_code")}
        kwargs["processing_class"] = load_tokenizer(name, **tokenizer_settings)
    with unsharded_loading(args):
        return load_model(name, **settings)
