"""What `retain` does not offer itself, each as small as it can be: L2-SP, interpolation with the base, OSF, CorDA."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from experiments.corpora import Texts, read_spanish
from experiments.finetunes import Bench, Run, compact_documents, finetune, make_trainer, scratch
from retain import ReplayDataset, ReplayTrainer, choose_start_token
from retain.data.rows import Document, packed_rows
from retain.measuring.tokens import document_sums, logits_of

logger = logging.getLogger("experiments")
# Documents of real replay by what they are called: those of pretraining in its shares, and ones the base never saw.
REAL: dict[str, Callable[[Texts], list[str]]] = {
    "real": lambda texts: [*texts.prose, *texts.code],
    "Spanish": lambda texts: read_spanish(),
}
ALPHAS = tuple(number / 10 for number in range(11))


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


class L2Trainer(ReplayTrainer):
    """Adds strength · Σ (θ − θ_base)² over all weights (L2-SP, Li et al. 2018, arXiv 1802.01483)."""

    strength = 0.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            return result
        if not hasattr(self, "_base_weights"):  # the first step: nothing has moved yet
            self._base_weights = [weight.detach().clone() for weight in self.model.parameters()]
        pairs = zip(self.model.parameters(), self._base_weights, strict=True)
        return result + self.strength * sum(((weight - base) ** 2).sum() for weight, base in pairs)


def l2_sp(run: Run, bench: Bench, stop_below: float | None) -> dict[str, Any]:
    kind = type("L2Trainer", (L2Trainer,), {"strength": run.strength})
    return finetune(run, bench, stop_below, kind=kind)


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
    """PEFT's OSF: the upper half of each matrix's singular directions is frozen, the rest is trained."""
    model = get_peft_model(bench.base(), OSFConfig(target_modules="all-linear"))
    return finetune(run, bench, stop_below, model=identical(model, bench))


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


SPECIAL = {"l2_sp": l2_sp, "interpolation": interpolation, "osf": osf, "corda": corda}
