"""Train tiny models in as many processes as torchrun starts, and save the weights: `ddp_run.py FOLDER BATCH WAY CASE…`.

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
from conftest import make_model, make_texts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_trainer import LORA, config
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from retain import ReplayConfig, ReplayDataset, ReplaySFTTrainer
from retain.replay import load_self_generated
from retain.sampling import sample_rows

CASES = {
    "llama-copy": ("llama", None, "kl"),
    "gemma-copy": ("gemma3_text", None, "kl"),  # its embedding scale is a buffer that autograd saves
    "qwen-copy": ("qwen3", None, "kl"),  # tied embeddings: the head's gradient and the input's are one
    "llama-adapter": ("llama", LORA, "kl"),
    "llama-cache": ("llama", None, "kl"),
    "llama-ntp": ("llama", None, "ntp"),
    "llama-new": ("llama", None, "kl_new"),
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


def main(folder: Path, batch: int, way: str, cases: Sequence[str]) -> None:
    rows = Dataset.from_list([{"text": text} for text in make_texts(48, seed=1)])
    # Told to use the CPU, accelerate would leave DeepSpeed out.
    where = {"use_cpu": False, "ddp_backend": "gloo"} if way == "zero" else {}
    for name, (architecture, lora, objective) in ((name, CASES[name]) for name in cases):
        if name == "llama-cache":
            replay = load_self_generated(folder.parent / "stored")
        else:
            drawn = sample_rows(make_model(architecture), 3, range(20), 24, seed=6).numpy()
            replay = ReplayDataset.from_rows([row[: 3 + at % 20] for at, row in enumerate(drawn)], "ragged")
        trainer = ReplaySFTTrainer(
            model=make_model(architecture),
            args=config(
                folder / name, per_device_train_batch_size=batch, optim="sgd", learning_rate=0.3, max_steps=4, **where
            ),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(**lora) if lora else None,
            replay_config=ReplayConfig(replay_objective=objective, replay_coef=2.0, per_device_replay_batch_size=batch),
            replay_dataset=replay,
            retention_datasets={"words": make_texts(4, seed=9)},
        )
        trainer.train()
        retention = trainer.evaluate_retention()
        weights = whole_weights(trainer.model)
        if trainer.is_world_process_zero():
            logged = {
                key: [row[key] for row in trainer.state.log_history if key in row] for key in ("loss", "replay/loss")
            }
            wrapped = [type(model).__name__ for model in (trainer.model, trainer.model_wrapped)]
            kept = {"weights": weights, "wrapped": wrapped, "retention": retention, **logged}
            torch.save(kept, folder / f"{name}.pt")


if __name__ == "__main__":
    if sys.argv[3] == "fsdp2":
        let_accelerate_shard_on_cpus()
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    # Together, and with nothing left running: a process that exits with live gloo threads may abort.
    state = accelerate.PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
