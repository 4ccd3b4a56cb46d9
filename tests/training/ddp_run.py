"""Tiny models are trained in several processes: by `run`, or `torchrun ddp_run.py FOLDER BATCH WAY CASE…`.

WAY is "ddp", "zero" (DeepSpeed, as the environment says), or "fsdp2": accelerate's own FSDP2, which it keeps for
accelerators, on CPU processes.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType
from conftest import make_model, make_texts, make_tokenizer, sample_rows
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import LORA, config
from transformers.integrations import is_deepspeed_zero3_enabled

from retain import ReplayConfig, ReplayDataset, ReplaySFTTrainer, losses
from retain.replay.dataset import load_self_generated
from retain.training.replay_term import TermBatch

CASES = {
    "llama-copy": ("llama", None, "kl"),
    "gemma-copy": ("gemma3_text", None, "kl"),  # its embedding scale is a buffer that autograd saves
    "qwen-copy": ("qwen3", None, "kl"),  # tied embeddings: the head's gradient and the input's are one
    "llama-adapter": ("llama", LORA, "kl"),
    "llama-cache": ("llama", None, "kl"),
    "llama-ntp": ("llama", None, "ntp"),
    "qwen-joint": ("qwen3", None, "kl"),  # rows of one length: one forward pass where nothing shards the model
    "llama-new": ("llama", None, "kl_new"),
}
PARTS = ("replay/kl_opening", "replay/kl_rest")
OF_ANCHOR = ("replay/anchor", "replay/kl_fixed")
ADAM = {"optim": "adamw_torch", "learning_rate": 2e-3}
ANCHOR = {"anchor_coef": 10.0, "anchor_lr_ratio": 1.0}
FOUR = {"max_steps": 4}
FASTER = {"learning_rate": 3e-3}
SAVING = {
    "save_strategy": "steps",
    "save_steps": 2,
    **ADAM,
    **FOUR,
}  # torch loads no FSDP2 checkpoint of SGD's, without state
# What takes longer than a fast test may, each with what is special about it:
MORE: dict[str, tuple[str, dict[str, Any] | None, str, dict[str, Any]]] = {
    "copy-accumulated": ("llama", None, "kl", {"gradient_accumulation_steps": 2}),
    "adapter-accumulated": ("llama", LORA, "kl", {"gradient_accumulation_steps": 2}),
    "cache-accumulated": ("llama", None, "kl", {"gradient_accumulation_steps": 2}),
    "ntp-accumulated": ("llama", None, "ntp", {"gradient_accumulation_steps": 2}),
    "new-accumulated": ("llama", None, "kl_new", {"gradient_accumulation_steps": 2}),
    "adapter-cache": ("llama", LORA, "kl", {}),
    "adapter-ntp": ("llama", LORA, "ntp", {}),
    "adapter-new": ("llama", LORA, "kl_new", {}),
    "replace": ("llama", None, "replace", {}),
    "adapter-replace": ("llama", LORA, "replace", {}),
    "copy-evaluated": ("llama", None, "kl", {"eval_strategy": "steps", "eval_steps": 1}),
    "adapter-evaluated": ("llama", LORA, "kl", {"eval_strategy": "steps", "eval_steps": 1}),
    "cache-evaluated": ("llama", None, "kl", {"eval_strategy": "steps", "eval_steps": 1}),
    "copy-budget": ("llama", None, "kl", FOUR),
    "adapter-budget": ("llama", LORA, "kl", FOUR),
    "cache-budget": ("llama", None, "kl", FOUR),
    "cache-anchor": ("llama", None, "kl", ADAM | FASTER | FOUR),
    "copy-resumed": ("llama", None, "kl", SAVING),
    "adapter-resumed": ("llama", LORA, "kl", SAVING),
    "anchor-resumed": ("qwen3", None, "kl", SAVING),
    "adapter-anchor-resumed": ("llama", LORA, "kl", SAVING | FASTER),
    "joint-unused": ("llama", None, "kl", {"ddp_find_unused_parameters": True}),
    "joint-accumulated": ("llama", LORA, "kl", {"gradient_accumulation_steps": 2}),
    "copy-bf16": ("llama", None, "kl", {"bf16": True}),
    "adapter-bf16": ("llama", LORA, "kl", {"bf16": True}),
    "cache-bf16": ("llama", None, "kl", {"bf16": True}),
    "adapter-bf16-halved": ("llama", LORA, "kl", {"bf16": True}),
}
LOADED: dict[str, tuple[str, dict[str, Any] | None, str, dict[str, Any]]] = {
    f"{kind}-bf16-{how}": ("llama", None, "kl", {"bf16": True})
    for kind in ("copy", "cache")
    for how in ("halved", "rounded")  # a base in bfloat16, and the same in float32
}
ANCHORED = {
    "whole-anchor": ("qwen3", None, "kl", ADAM),
    "adapter-anchor": ("llama", LORA, "kl", ADAM | FASTER | FOUR),
}
# What CI runs: each architecture, reference, pass and division once or more; `MORE` and the rest of `CASES` are slow.
CORNER = {
    "ddp": ("gemma-copy", "llama-adapter", "qwen-joint", "llama-new", "adapter-anchor"),
    "fsdp2": ("gemma-copy", "llama-adapter", "qwen-joint", "llama-cache", "whole-anchor"),
}


def let_accelerate_shard_on_cpus() -> None:
    """Accelerate knows FSDP2 on accelerators only; say that these processes are some. All else is its own code."""
    original = accelerate.state.AcceleratorState.__init__

    def init(self: object, *args: object, **kwargs: object) -> None:
        accelerate.PartialState(cpu=True)
        shared = accelerate.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    accelerate.state.AcceleratorState.__init__ = init


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Every weight as one tensor, however the processes share them."""
    gathered: Any = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        return {
            name.replace("module.", ""): (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in model.named_parameters()
        }


class Gathers(TorchDispatchMode):
    """Counts all-gathers. torch's CommDebugMode follows modules, too, and fails where a forward ends in its middle."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # comes again as what it does
        self.count += func.namespace in ("c10d", "_c10d_functional") and "gather" in func.__name__
        return func(*args, **(kwargs or {}))


def count_gathers(trainer: Any) -> list[int]:
    """All-gathers of one replay term with its gradient: in one chunk, and in chunks of two predictions."""
    found, whole = [], losses.CHUNK_BYTES
    for losses.CHUNK_BYTES in (whole, 4 * 320 * 2):
        batch = trainer.replay.batch(range(4), trainer.accelerator.device)
        labels = batch.pop("labels")
        with Gathers() as seen:
            trainer.replay.term.kl(TermBatch(trainer.model_wrapped, batch, labels)).backward()
        found.append(seen.count)
        trainer.model.zero_grad()
    losses.CHUNK_BYTES = whole
    return found


def make_trainer(folder: Path, name: str, batch: int, where: dict[str, Any]) -> ReplaySFTTrainer:
    architecture, lora, objective, special = {**MORE, **ANCHORED, **LOADED}.get(name) or (*CASES[name], {})
    # Which new rows give way depends on how a step is split, so they are all the same there.
    texts = make_texts(1, seed=1) * 48 if objective == "replace" else make_texts(48, seed=1)
    if "cache" in name:
        replay = load_self_generated(folder.parent / "stored")
    else:
        drawn = sample_rows(make_model(architecture), 3, range(20), 24, seed=6).numpy()
        lengths = [24 if "joint" in name else 3 + at % 20 for at in range(20)]
        replay = ReplayDataset.from_rows([row[:n] for row, n in zip(drawn, lengths, strict=True)], "drawn")
    batch //= special.get("gradient_accumulation_steps", 1)
    settings = {"per_device_train_batch_size": batch, "optim": "sgd", "learning_rate": 0.3, "max_steps": 3}
    settings |= special
    share: dict[str, Any] = {"per_device_replay_batch_size": batch} if objective != "replace" else {"replay_share": 0.5}
    share |= {"max_ref_kl": 0.01} if "budget" in name else ANCHOR if "anchor" in name else {}
    # at other steps the KL is that of fixed rows
    share |= {"replay_every": 2, "anchor_rank": 8} if name == "whole-anchor" else {}
    model = make_model(architecture)
    if name.endswith(("halved", "rounded")):
        model = model.bfloat16() if name.endswith("halved") else model.bfloat16().float()
    return ReplaySFTTrainer(
        model=model,
        args=config(folder / name, **settings, **where),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        eval_dataset=Dataset.from_list([{"text": text} for text in make_texts(4, seed=2)]),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(**lora) if lora else None,
        replay_config=ReplayConfig(replay_objective=objective, replay_coef=2.0, **share),  # type: ignore[arg-type]
        replay_dataset=replay,
        retention_datasets={"words": make_texts(4, seed=9)},
    )


def run(folder: Path, batch: int, way: str, cases: Sequence[str]) -> None:
    if way == "fsdp2":
        let_accelerate_shard_on_cpus()
    # Told to use the CPU, accelerate would leave DeepSpeed out.
    where = {"use_cpu": False, "ddp_backend": "gloo"} if way == "zero" else {}
    for name in cases:
        trainer, kept = make_trainer(folder, name, batch, where), {}
        trainer.train()
        if "resumed" in name:
            kept["whole"] = whole_weights(trainer.model)
            trainer = make_trainer(folder, name, batch, where)
            trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
        if (anchor := trainer.replay.anchor) is not None:
            kept["fixed"] = anchor.fixed.kl(trainer.model, trainer.accelerator.device)
        retention = trainer.evaluate_retention()
        weights = whole_weights(trainer.model)
        if name == "copy-accumulated" and way == "fsdp2":
            kept["gathers"] = count_gathers(trainer)
        if trainer.is_world_process_zero():
            logged = {
                key: [row[key] for row in trainer.state.log_history if key in row]
                for key in ("loss", "new_task/loss", "replay/loss", *PARTS, "replay/coef", *OF_ANCHOR)
            }
            wrapped = [type(model).__name__ for model in (trainer.model, trainer.model_wrapped)]
            kept |= {"weights": weights, "wrapped": wrapped, "retention": retention, **logged}
            kept["joint"] = trainer.replay.joint is not None
            reference = trainer.replay.reference
            kept["copy_bytes"] = 0 if reference is None else reference.num_bytes
            models = [trainer.model, *([reference.ref_model] if kept["copy_bytes"] else [])]
            kept["placed"] = [
                sorted({str(weight.placements) for weight in one.parameters() if isinstance(weight, DTensor)})
                for one in models
            ]
            torch.save(kept, folder / f"{name}.pt")

    # Together, and with nothing left running: a process that exits with live gloo threads may abort.
    state = accelerate.PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
