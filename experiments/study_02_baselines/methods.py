"""What `retain` does not offer itself, each as small as it can be.

Penalties on the weights (L2-SP, EWC), gates on tokens (EAFT, STM), interpolation with the base, PEFT's OSF and CorDA,
and finetunes that train the embeddings, or all else.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from experiments.corpora import Texts, read_spanish
from experiments.finetunes import Bench, Run, compact_documents, finetune, lora_of, make_trainer, scratch
from retain import ReplayDataset, ReplayTrainer, choose_start_token
from retain.data.rows import Document, packed_rows
from retain.losses import next_token_loss
from retain.measuring.tokens import document_sums, logits_of

logger = logging.getLogger("experiments")
# Documents of real replay by what they are called: those of pretraining in its shares, and ones the base never saw.
REAL: dict[str, Callable[[Texts], list[str]]] = {
    "real": lambda texts: [*texts.prose, *texts.code],
    "Spanish": lambda texts: read_spanish(),
}
ALPHAS = tuple(number / 10 for number in range(11))
FISHER_ROWS = 512  # of 63 predictions
TOP = 20  # tokens whose entropy is taken


def real_replay(source: str, bench: Bench, texts: Texts) -> ReplayDataset:
    """As many rows of as many tokens as the base wrote, each from the start of a real document, none twice."""
    documents, length = REAL[source](texts), len(bench.replay[0])
    documents = random.Random(0).sample(documents, len(documents))
    start = choose_start_token(bench.tokenizer)
    rows = (row for text in documents for row in packed_rows([text], bench.tokenizer, start, length)[:1])
    found = list(islice(rows, len(bench.replay)))
    if len(found) < len(bench.replay):
        logger.warning("%s: %d rows in the place of %d; they are replayed again", source, len(found), len(bench.replay))
    return ReplayDataset.from_rows(found, source)


class PenaltyTrainer(ReplayTrainer):
    """Adds strength · Σ importance · (θ − θ_base)² over all weights."""

    def __init__(
        self, *, strength: float, importance: Sequence[torch.Tensor | float] | None = None, **how: Any
    ) -> None:
        super().__init__(**how)
        weights, self.strength = list(self.model.parameters()), strength
        importance = [1.0] * len(weights) if importance is None else importance
        self.pulled = [(one, one.detach().clone(), pull) for one, pull in zip(weights, importance, strict=True)]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            return result
        return result + self.strength * sum((pull * (one - base) ** 2).sum() for one, base, pull in self.pulled)


def l2_sp(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """L2-SP: Li et al. 2018, arXiv 1802.01483."""
    return finetune(run, bench, stop_below, kind=partial(PenaltyTrainer, strength=run.strength))


def ewc(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """Elastic weight consolidation, strength · ½ Σ F (θ − θ_base)²: Kirkpatrick et al. 2017, arXiv 1612.00796."""
    importance = [fisher / 2 for fisher in base_fisher(bench)]
    return finetune(run, bench, stop_below, kind=partial(PenaltyTrainer, strength=run.strength, importance=importance))


@cache
def base_fisher(bench: Bench) -> list[torch.Tensor]:
    return true_fisher(bench.base(), bench.replay)


def true_fisher(base: Any, rows: ReplayDataset) -> list[torch.Tensor]:
    """The diagonal of the base's Fisher information, per predicted token, of each weight.

    From rows that the base drew itself: their tokens are labels drawn from its own predictions, and the gradients of
    a row's tokens are uncorrelated, so the square of their sum is, in the mean, the sum of their squares.
    """
    weights, rows_read = list(base.eval().parameters()), range(min(FISHER_ROWS, len(rows)))
    sums = [torch.zeros_like(weight) for weight in weights]
    for at in rows_read:
        loss = base(**rows.batch([at])).loss * float(rows.num_predictions[at])  # the model's is a mean
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient**2
    return [total / float(rows.num_predictions[rows_read].sum()) for total in sums]


class GatedTrainer(ReplayTrainer):
    """Weighs the loss of each token by what `gate` makes of the rows and of the model's logits for their tokens."""

    def __init__(self, *, gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **how: Any) -> None:
        super().__init__(**how)
        self.gate = gate

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        rows = inputs["input_ids"]
        logits = model(input_ids=rows).logits[:, :-1]
        return (next_token_loss(logits, rows[:, 1:]) * self.gate(rows, logits.detach())).mean()


def eaft(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """Entropy-adaptive finetuning: Diao et al. 2026, arXiv 2601.02151; `strength` is its alpha."""

    def gate(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return entropy_weights(logits, run.strength)  # type: ignore[arg-type]

    return finetune(run, bench, stop_below, kind=partial(GatedTrainer, gate=gate))


def entropy_weights(logits: torch.Tensor, alpha: float) -> torch.Tensor:
    """(Entropy of the 20 likeliest tokens / ln 20) ** alpha, as in LLaMA-Factory 0.9.5."""
    likeliest = logits.topk(TOP).values.log_softmax(-1)
    return (-(likeliest.exp() * likeliest).sum(-1) / math.log(TOP)) ** alpha


def stm(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """Selective token masking: Wu et al. 2025, arXiv 2501.14315; `strength` is its threshold."""
    base = bench.base().eval()

    def gate(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return known_tokens(base, rows, run.strength)  # type: ignore[arg-type]

    return finetune(run, bench, stop_below, kind=partial(GatedTrainer, gate=gate))


@torch.no_grad()
def known_tokens(base: Any, rows: torch.Tensor, perplexity: float) -> torch.Tensor:
    """0 for tokens of a higher perplexity under the base; the others have a mean of 1 over all."""
    known = (next_token_loss(base(input_ids=rows).logits[:, :-1], rows[:, 1:]).exp() <= perplexity).float()
    return known / known.mean()


@torch.no_grad()
def measured(base: Any, model: Any, bench: Bench, step: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of a trajectory and its documents, for a model that no trainer holds."""
    rows = [Document([row.tolist()], 0) for row in bench.new_task.rows]
    found, documents = {"step": step}, []
    for name, texts in {"new": rows, **bench.retention}.items():
        sums = document_sums(logits_of(base), logits_of(model), texts, batch_tokens=2048)
        values = {key: (sums.values[key] / sums.num_tokens) for key in ("loss", "base_loss", "ref_kl")}
        if name == "new":
            found["eval_loss"] = round(float(values["loss"].mean()), 6)
            continue
        found[f"retention/{name}/forgetting"] = round(float((values["loss"] - values["base_loss"]).mean()), 6)
        found[f"retention/{name}/ref_kl"] = round(float(values["ref_kl"].mean()), 6)
        row = {key: sums.values[key].tolist() for key in values} | {"num_tokens": sums.num_tokens.tolist()}
        documents.append(compact_documents({"step": step, "name": name, **row}))
    return found, documents


def interpolation(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """Finetune plainly to the end, then walk from the base's weights to the tuned ones; `step`: how far."""
    with scratch() as folder:
        trainer = make_trainer(replace(run, method="full", eval_steps=0), bench, folder)
        trainer.train()
    base, model = (bench.base().to(trainer.model.device) for _ in range(2))
    tuned = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trajectory, documents = [], []
    for alpha in ALPHAS:
        for (name, weight), start in zip(model.named_parameters(), base.parameters(), strict=True):
            weight.data = torch.lerp(start.data, tuned[name], alpha)
        row, sums = measured(base, model, bench, alpha)
        trajectory.append(row)
        documents += sums
    return {"trajectory": trajectory, "documents": documents}


def osf(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    return finetune(run, bench, stop_below, model=identical(osf_of(bench.base()), bench))


def osf_of(model: Any) -> Any:
    """PEFT's OSF: the upper half of each matrix's singular directions is frozen, the rest is trained."""
    return get_peft_model(model, OSFConfig(target_modules="all-linear"))


def corda(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """PEFT's CorDA, knowledge-preserved: LoRA on the directions that matter least on 128 self-generated rows."""
    torch.manual_seed(run.seed)
    base, rows = bench.base(), bench.replay.batch(range(min(128, len(bench.replay))))["input_ids"]
    head = base.get_output_embeddings()
    linear = [name for name, one in base.named_modules() if isinstance(one, torch.nn.Linear) and one is not head]
    names = sorted({name.rpartition(".")[2] for name in linear})
    config = LoraConfig(
        r=run.lora_rank, lora_alpha=run.lora_rank, target_modules=names,
        init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"),
    )  # fmt: skip

    @torch.no_grad()
    def look() -> None:
        for part in rows.split(1):
            base(input_ids=part)

    preprocess_corda(base, config, run_model=look)
    return finetune(run, bench, stop_below, model=identical(get_peft_model(base, config), bench))


@torch.no_grad()
def identical(model: Any, bench: Bench) -> Any:
    """The model, shown to predict what the base predicts before it is trained."""
    rows = bench.new_task.rows[:4]
    error = (model.eval()(input_ids=rows).logits - bench.base()(input_ids=rows).logits).abs().max()
    assert error < 1e-3, f"the adapter is not the identity at its start: {error:.2g}"
    return model


def with_embeddings(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    """A finetune in which the embeddings, which are the output head, too, are trained or not, unlike as usual."""
    model = bench.base()
    if run.method == "lora_embeddings":
        model = lora_of(run, model)
    elif run.method == "osf_embeddings":
        model = osf_of(model)
    elif run.method == "embeddings":
        model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(run.method != "frozen_embeddings")
    return finetune(run, bench, stop_below, model=identical(model, bench))


SPECIAL = {
    "l2_sp": l2_sp, "ewc": ewc, "eaft": eaft, "stm": stm, "interpolation": interpolation, "osf": osf, "corda": corda,
    **dict.fromkeys(("frozen_embeddings", "embeddings", "lora_embeddings", "osf_embeddings"), with_embeddings),
}  # fmt: skip
