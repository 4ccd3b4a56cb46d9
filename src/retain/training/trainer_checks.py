"""What must hold of a host trainer, its model and its devices.

Every check raises a `ValueError` of one line, which names the setting, its value and the remedy.
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
    """Refuse devices, and ways to share a model over them, on which replay would be wrong, or end in torch's error.

    Args:
        trainer: the host, once it is built: it counts a model that is spread over GPUs as on one.
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
    """Refuse activated LoRA with checkpointing: PEFT then takes one forward pass for each backward pass."""
    checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    if invocation_tokens(model) and (args.gradient_checkpointing or checkpointed):
        raise ValueError(
            "gradient_checkpointing: true, and aLoRA (alora_invocation_tokens) allows only one forward pass a step "
            "then, without the base's and the replay rows'; set it false"
        )


def invocation_tokens(model: Any) -> list[list[int]]:
    """Token ids that switch each activated LoRA of a model on; empty for other models."""
    adapters = getattr(model, "peft_config", {}).values()
    return [tokens for one in adapters if (tokens := getattr(one, "alora_invocation_tokens", None))]


def check_lora_targets(model: Any, adapter: Any) -> None:
    """Refuse an adapter without a place in the model before rows are drawn for it; PEFT would only afterwards."""
    wanted, names = adapter.target_modules, [name for name, _ in model.named_modules()]
    for module in adapter.modules_to_save or ():
        if not any(name.endswith(module) for name in names):  # as PEFT finds them; it leaves out what it does not find
            raise ValueError(f"lora_modules_to_save: {module!r} is no module of this model; use lm_head, say")
    if wanted in (None, "all-linear") or any(check_target_module_exists(adapter, name) for name in names):
        return
    remedy = "q_proj"
    if isinstance(wanted, str):  # TRL makes a text of a single one, and PEFT takes a text for a pattern
        wanted, remedy = [wanted], f"'.*{wanted}', say"
    raise ValueError(
        f"lora_target_modules: {', '.join(sorted(wanted))!r} is no module of this model; use {remedy}, or all-linear"
    )


def check_trained(model: Any, dataset: Any) -> None:
    """Refuse to train nothing, as what PEFT's merge_and_unload leaves: all of it is frozen; or on nothing."""
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


def check_base_is_frozen(model: Any) -> None:
    """An adapter switched off shows the base only while nothing but the adapter is trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and base_parameter_name(name) is not None:
            raise ValueError(
                f"replay_reference: 'adapter', but the base's own {name!r} is trained too, so switching the adapter "
                "off does not give the base; use replay_reference copy, or freeze it"
            )


def check_weights(model: Any, accelerator: Any, where: str) -> None:
    """Refuse to keep trained weights that are not finite: the loss shows it only a step later.

    Under FSDP2 each process sees its shards and all say the same; elsewhere each looks at what it holds.
    """
    trained = [value.detach() for value in model.parameters() if value.requires_grad and value.is_floating_point()]
    is_shared = any(hasattr(value, "to_local") for value in trained)
    shards = [value.to_local() if hasattr(value, "to_local") else value for value in trained]
    bad = torch.zeros((), device=accelerator.device)
    for shard in shards:
        bad += (~shard.isfinite().all()).to(bad)
    if bool(accelerator.reduce(bad, reduction="sum") if is_shared else bad):  # all processes save together
        raise ValueError(
            f"model: weights that are not finite, so nothing was saved to {where!r}; lower learning_rate or "
            "replay_coef, check weight_decay, or use bf16 instead of fp16"
        )


def expected_steps(args: Any, rows: Any) -> int:
    """Optimizer steps of a run over these rows; for a stream what `max_steps` says."""
    if args.max_steps > 0 or not hasattr(rows, "__len__"):
        return int(args.max_steps)
    size = args.train_batch_size * args.world_size
    batches = len(rows) // size if args.dataloader_drop_last else -(-len(rows) // size)
    return math.ceil(args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps)))


# Loading, so that the base is seen whole before any framework takes it apart


def see_the_base_everywhere(*, may_change: bool) -> None:
    """FSDP may leave the weights of all processes but one empty until they are sharded; the base must be seen first.

    Args:
        may_change: whether the model is still to be loaded, so that the setting can be switched off.
    """
    is_set = [os.environ.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", LOADS_EMPTY)]
    if not (all(is_set) and launched()):
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
    """Refuse a model whose weights are shared out already: by ZeRO-3, over a device mesh, or by `device_map`."""
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
    if (count := len(set(getattr(model, "hf_device_map", {}).values()))) > 1:
        raise ValueError(
            f"device_map: spreads the model over {count} devices, which was never tried with replay; leave it out, and "
            "let the trainer share it (FSDP2)"
        )


def load_for_training(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Load a model by name as TRL does: float32 unless `model_init_kwargs` says otherwise."""
    see_the_base_everywhere(may_change=True)
    settings: dict[str, Any] = {"trust_remote_code": getattr(args, "trust_remote_code", False)}
    if given := getattr(args, "model_init_kwargs", None):
        args.model_init_kwargs = None  # they have done their work
        settings |= given
    settings |= {"revision": settings.get("revision") or "main", "dtype": settings.get("dtype") or "float32"}
    if quantization := kwargs.pop("quantization_config", None):
        settings["quantization_config"] = quantization
    if kwargs.get("processing_class") is None:  # from the same revision as the weights
        of_tokenizer = {key: settings[key] for key in ("revision", "trust_remote_code")}
        kwargs["processing_class"] = load_tokenizer(name, **of_tokenizer)
    with loaded_whole(args):
        return load_model(name, **settings)
