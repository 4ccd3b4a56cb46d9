"""What the study of baselines takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
    slow = replace(plain, max_steps=3 * plain.max_steps)
    anchors = [(10, 10), (20, 10), (20, 20), (50, 20), (100, 10), (200, 10), (100, 20)]  # coefficient, times the rate
    penalties = [(3, 1), (10, 1), (30, 1), (100, 1), (300, 1), (100, 3)]

    def both(method: str, **more: Any) -> list[Run]:
        """At plain's rate, with three times the steps, and at three times it."""
        return [replace(slow, method=method, **more), replace(plain, method=method, learning_rate=3 * rate, **more)]

    return {
        "plain": [
            plain,
            replace(plain, learning_rate=rate / 3),
            replace(slow, learning_rate=rate / 10),
            replace(plain, learning_rate=3 * rate),
        ],
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
        "EWC": [
            replace(plain, method="ewc", strength=float(one), learning_rate=times * rate) for one, times in penalties
        ],
        "EAFT": [replace(plain, method="eaft", strength=alpha) for alpha in (0.5, 1.0, 2.0)],
        "STM": [replace(plain, method="stm", strength=perplexity) for perplexity in (2.5, 100.0, 1e3, 1e4)],
        "anchor": [replace(plain, anchor_coef=float(one), learning_rate=times * rate) for one, times in anchors],
        "anchor+kl": [
            replace(replay, coef=5.0, anchor_coef=float(one), learning_rate=times * rate, replay_start=start)
            for one, times, start in ((20, 10, 0.2), (20, 20, 0.2), (20, 20, None), (100, 10, None), (100, 10, 0.2))
        ],
        "interpolation": [replace(plain, method="interpolation")],
        "LoRA": [
            *(replace(lora, lora_rank=rank, learning_rate=one) for rank in ranks for one in rates),
            replace(slow, method="lora", lora_rank=max(ranks)),
        ],
        "OSF": both("osf"),
        "CorDA": [replace(lora, method="corda", lora_rank=16, learning_rate=one) for one in rates],
        "plain, embeddings frozen": both("frozen_embeddings"),
        "plain, embeddings alone": both("embeddings"),
        "LoRA, embeddings trained": both("lora_embeddings", lora_rank=max(ranks)),
        "OSF, embeddings trained": both("osf_embeddings"),
    }
