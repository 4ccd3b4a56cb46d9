"""One forward pass for new and replay rows: replay rows join the host's batch inside the model, at its decoder.

The decoder is what lies between token ids and output head. Hooks add the replay rows to its input and remove them from
its output, so the host's labels, head and loss are the same as without them, whether or not it computes logits (TRL's
fused head never does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from retain.models.head import head_input, seen_by_head
from retain.models.reference import evaluation_mode, probe_tokens, rounding_tolerance
from retain.replay.provenance import rope_kinds
from retain.training.trainer_checks import invocation_tokens

# Tokens of a joint pass over those of two passes; the second one has a fixed cost of about 2% on a small model.
MAX_PADDING = 1.02
# Decoder inputs that allow rows to join; any other must be missing, None or False.
JOINED_INPUTS = ("input_ids", "attention_mask", "use_cache", "num_items_in_batch", "return_dict")
MORE_OUTPUTS = ("output_router_logits", "output_hidden_states", "output_attentions")


class JointForward:
    """Runs replay rows through the host's own forward pass.

    Args:
        decoder: the module whose last hidden states the output head multiplies.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    @classmethod
    def of(cls, trainer: Any) -> JointForward | None:
        """A joint forward pass for a built trainer; None if its model must see the two batches separately."""
        model = trainer.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not _may_join(trainer) or base.base_model is base:
            return None
        joint = cls(base.base_model)
        return joint if joint._is_exact(model) else None

    @contextmanager
    def with_rows(self, replay: Mapping[str, Tensor]) -> Iterator[list[Float[Tensor, "rows length size"]]]:
        """A context in which the first suitable forward pass with gradient also runs these rows.

        Args:
            replay: `input_ids`, and `attention_mask` if rows are padded at the right.

        Yields:
            A list that receives the rows' hidden states; it stays empty if no pass was suitable.
        """
        replay_hidden: list[Tensor] = []
        shapes: list[torch.Size] = []

        def join(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = {"input_ids": args[0], **kwargs} if args else kwargs
            if shapes or len(args) > 1 or not torch.is_grad_enabled() or not can_join(inputs, replay):
                return None
            shapes.extend(batch["input_ids"].shape for batch in (inputs, replay))
            return (), {**inputs, **joint_inputs(inputs, replay), "use_cache": False}

        def split(module: Any, args: Any, outputs: Any) -> None:
            if shapes and not replay_hidden:
                (num_new, new_length), (num_replay, replay_length) = shapes
                new, replayed = outputs.last_hidden_state.split([num_new, num_replay])
                outputs.last_hidden_state = new[:, :new_length]
                replay_hidden.append(head_input(replayed[:, :replay_length]))

        handles = (
            self.decoder.register_forward_pre_hook(join, with_kwargs=True),
            self.decoder.register_forward_hook(split),
        )
        try:
            yield replay_hidden
        finally:
            for handle in handles:
                handle.remove()

    def _is_exact(self, model: Any) -> bool:
        """Whether rows of two lengths give the head the same hidden states in one joint pass as in separate passes."""
        tokens = probe_tokens(model.get_input_embeddings().weight.shape[0]).to(model.device)
        new, replay = tokens[:1, :-1], tokens[1:].expand(4, -1)  # hardly any padding
        with evaluation_mode(model), seen_by_head(model) as seen:
            with torch.no_grad():
                model(input_ids=replay, use_cache=False)
                model(input_ids=new, use_cache=False)
            with self.with_rows({"input_ids": replay}) as joined:
                model(input_ids=new, use_cache=False)
        if not joined or len(seen) != 3:
            return False
        separate, joint = seen[:2], [joined[0].detach(), seen[2].detach()]
        tolerance = rounding_tolerance(model)
        pairs = zip(separate, joint, strict=True)
        return all(a.shape == b.shape and bool((a - b).norm() <= tolerance * a.norm()) for a, b in pairs)


def can_join(inputs: Mapping[str, Any], replay: Mapping[str, Tensor]) -> bool:
    """Whether a decoder's inputs are whole rows and nothing else, and joining the replay rows needs little padding."""
    others = [value for name, value in inputs.items() if name not in JOINED_INPUTS]
    if any(value is not None and value is not False for value in others):
        return False
    new, old, mask = inputs["input_ids"], replay["input_ids"], inputs.get("attention_mask")
    if new is None or new.ndim != 2 or (mask is not None and mask.shape != new.shape):
        return False
    padded = (len(new) + len(old)) * max(new.shape[1], old.shape[1])
    return padded <= MAX_PADDING * (new.numel() + old.numel())


def joint_inputs(new: Mapping[str, Any], replay: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Both batches as one, padded at the right to one length.

    The mask is None if the new rows have no padding: no row attends to what stands to its right.
    """
    length = max(batch["input_ids"].shape[1] for batch in (new, replay))

    def concatenated(*values: Tensor) -> Tensor:
        return torch.cat([pad(value, (0, length - value.shape[1])) for value in values])

    ids, mask = concatenated(new["input_ids"], replay["input_ids"]), new.get("attention_mask")
    if mask is None or bool(mask.all()):
        return {"input_ids": ids, "attention_mask": None}
    replay_mask = replay.get("attention_mask", torch.ones_like(replay["input_ids"]))
    return {"input_ids": ids, "attention_mask": concatenated(mask, replay_mask.to(mask.dtype))}


def _may_join(trainer: Any) -> bool:
    """Whether no setting is known under which one joint batch would give other results than two."""
    model, args, accelerator = trainer.model, trainer.args, trainer.accelerator
    adapters = getattr(model, "peft_config", {}).values()
    config = model.config.get_text_config()
    obstacles = (
        trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,  # the head's weights are whole only during a pass
        accelerator.state.dynamo_plugin.backend != DynamoBackend.NO or is_compiled_module(model),  # ignores new hooks
        args.ddp_broadcast_buffers,  # at each pass, and processes may differ in whether they join
        args.neftune_noise_alpha,  # its noise depends on the padded length
        any(kind.get("rope_type") in ("dynamic", "longrope") for kind in rope_kinds(model)),  # depends on longest row
        any(adapter.peft_type != "LORA" for adapter in adapters) or invocation_tokens(model),  # index rows by number
        any(getattr(config, name, False) for name in MORE_OUTPUTS),  # would cover all rows, and the host reads them
    )
    return not any(obstacles)
