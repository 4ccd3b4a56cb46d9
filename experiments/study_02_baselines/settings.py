"""What the study of baselines takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from experiments.corpora import Texts, load_texts
from experiments.finetunes import BenchSettings, Run
from experiments.study_02_baselines.methods import REAL


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A base, its texts, and how every method is trained; the learning rates of the others are multiples of plain's."""

    run: Run  # plain
    bench: BenchSettings
    texts: Callable[[], Texts] = load_texts
    replay_rows: int = 8
    coefs: tuple[float, ...] = (1.0, 3.0)
    strengths: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1)
    lora_ranks: tuple[int, ...] = (4, 16)
    seeds: int = 3


SCALES = {"laptop": Scale(run=Run(learning_rate=1e-3, max_steps=90), bench=BenchSettings())}


def plan(scale: Scale) -> dict[str, list[Run]]:
    """Runs by name of the method; the settings of a method differ in its knobs, seeds come later."""
    plain, rate = scale.run, scale.run.learning_rate
    lora, replay = replace(plain, method="lora"), replace(plain, replay_rows=scale.replay_rows)
    ranks, rates = scale.lora_ranks, (3 * rate, 10 * rate)
    slow = replace(lora, lora_rank=max(ranks), max_steps=3 * plain.max_steps)
    return {
        "plain": [plain, replace(plain, learning_rate=rate / 3), replace(plain, learning_rate=3 * rate)],
        "kl": [replace(replay, coef=coef) for coef in scale.coefs],
        "ntp": [replace(replay, objective="ntp", coef=coef) for coef in scale.coefs],
        **{
            f"{objective} {source}": [replace(replay, objective=objective, coef=coef) for coef in scale.coefs]
            for source in REAL
            for objective in ("kl", "ntp")
        },
        "replace": [replace(plain, objective="replace", share=0.25)],
        "kl_new": [replace(plain, objective="kl_new", coef=coef) for coef in (0.1, 0.3)],
        "L2-SP": [replace(plain, method="l2_sp", strength=strength) for strength in scale.strengths],
        "interpolation": [replace(plain, method="interpolation")],
        "LoRA": [*(replace(lora, lora_rank=rank, learning_rate=rate) for rank in ranks for rate in rates), slow],
        "OSF": [replace(plain, method="osf", learning_rate=one) for one in (rate, 3 * rate)],
        "CorDA": [replace(lora, method="corda", lora_rank=16, learning_rate=one) for one in rates],
    }
