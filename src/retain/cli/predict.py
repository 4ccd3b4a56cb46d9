"""`retain predict`: a law → the losses of a run before it is made, or its largest number of steps within a limit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from retain.checks import setting
from retain.cli.flags import Verb
from retain.cli.settings import RevisionSettings
from retain.laws.law import ForgettingLaw

INPUTS = ("num_params", "num_steps", "num_tokens", "replay_share", "tokens_per_param", "finetuning_loss", "ref_kl")
LIMITS = {"max_forgetting": "forgetting", "max_ref_kl": "ref_kl"}  # flag → the metric that the law must be fitted to


@dataclass(kw_only=True)
class PredictConfig(RevisionSettings):
    """Settings of `retain predict`; the law's file comes first, without a flag."""

    law: str = setting("", "File written by `retain fit`.", required=True)
    dataset: str | None = setting(None, "Data set to predict for, if the law was fitted to several.")
    level: float = setting(0.95, "Coverage of the intervals.", low=1e-6, high=1 - 1e-6)
    json: bool = setting(False, "Print JSON.")
    num_params: float | None = setting(None, "Parameters to be tuned.")
    num_steps: float | None = setting(None, "Update steps.")
    num_tokens: float | None = setting(None, "Finetuning tokens.")
    replay_share: float | None = setting(None, "Share of old data mixed in.", high=1)
    tokens_per_param: float | None = setting(None, "Pretraining tokens per parameter.")
    finetuning_loss: float | None = setting(None, "Loss on the new task, in nats per token, for the form linear.")
    ref_kl: float | None = setting(None, "KL(base || model) on the new task, in nats per token.")
    max_forgetting: float | None = setting(
        None, "Solve for the largest num_steps whose predicted forgetting stays below this, in nats per token."
    )
    max_ref_kl: float | None = setting(None, "The same for a law of KL(base || model), the default of `retain fit`.")
    model: str | None = setting(
        None, "Model whose tuned parameters are counted, instead of giving num_params; only its configuration is read."
    )
    lora_r: int | None = setting(None, "Rank of the LoRA to be tuned, with model.", low=1)
    lora_target_modules: list[str] | None = setting(
        None, "Modules that get a LoRA, or all-linear. Default: PEFT's for this architecture."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.lora_r is None):
            missing = "lora_r" if self.lora_r is None else "model"
            raise ValueError(f"{missing}: missing; --model and --lora_r go together, in place of --num_params")
        for name, other in (("num_params", "lora_r"), *(("num_steps", limit) for limit in LIMITS), tuple(LIMITS)):
            if getattr(self, name) is not None and getattr(self, other) is not None:
                raise ValueError(f"{name}: {getattr(self, name):g} does not go with {other}; leave one out")


def run_predict(config: PredictConfig) -> None:
    """Print the predicted losses of a run, or its largest num_steps within a limit, as text or JSON."""
    law = ForgettingLaw.from_json(config.law)
    known: dict[str, Any] = {name: getattr(config, name) for name in INPUTS if getattr(config, name) is not None}
    if config.model is not None and config.lora_r is not None:
        from retain.models.loading import lora_num_params  # imports torch, which nothing else here needs

        known["num_params"] = lora_num_params(
            config.model, config.lora_r, config.lora_target_modules, **config.checkpoint
        )
    limit = limit_of(config, law)
    if limit is None:
        answer = law.predict(level=config.level, dataset=config.dataset, **known).to_dict()
    else:
        answer = largest_num_steps(law, config, known, limit)
    answer = {"inputs": known, **answer}
    print(json.dumps(answer, indent=2) if config.json else as_text(answer))


def limit_of(config: PredictConfig, law: ForgettingLaw) -> str | None:
    """The name of the limit that was given, or None.

    Raises:
        ValueError: if the law was fitted to another metric.
    """
    name = next((name for name in LIMITS if getattr(config, name) is not None), None)
    metric = law.settings.get("forgetting_metric")
    if name is not None and metric not in (None, LIMITS[name]):
        remedy = {"forgetting": "give --max_forgetting", "ref_kl": "give --max_ref_kl"}.get(metric, "fit one of ref_kl")
        raise ValueError(f"{name}: {getattr(config, name):g} does not fit a law of {metric}; {remedy}")
    return name


def largest_num_steps(law: ForgettingLaw, config: PredictConfig, known: dict[str, Any], limit: str) -> dict[str, Any]:
    """The largest number of steps whose predicted forgetting loss stays within the limit."""
    options: dict[str, Any] = {"level": config.level, "dataset": config.dataset, **known}
    options["forgetting_loss"] = getattr(config, limit)
    num_steps = law.solve("num_steps", **options)
    low, high = (value if 0 < value < float("inf") else None for value in num_steps.ci)
    return {
        "num_steps": {"value": num_steps.value, "ci": [low, high]},
        limit: getattr(config, limit),
        "level": config.level,
        "extrapolates": bool(num_steps.extrapolates),
        "notes": num_steps.extrapolates,
    }


def as_text(answer: dict[str, Any]) -> str:
    """An answer as text: its inputs, a line for each number, and notes."""
    inputs = ", ".join(f"{name} {value:g}" for name, value in answer["inputs"].items())
    lines = [f"for {inputs}:"]
    for name, number in answer.items():
        if isinstance(number, dict) and "ci" in number:
            low, high = (f"{end:.5g}" if end is not None else "?" for end in number["ci"])
            lines.append(f"{name:<18}{number['value']:.5g}   {answer['level']:.0%} interval [{low}, {high}]")
    lines += [f"! {note}" for note in answer["notes"]]
    return "\n".join(lines)


VERB = Verb(
    name="predict",
    example="retain predict law.json --num_params 5e6 --num_steps 260",
    settings=(PredictConfig,),
    run=run_predict,
    resume="run it again",
    positional="law",
    groups={"num_params": "The run", "max_forgetting": "A limit instead of num_steps",
            "model": "A LoRA instead of num_params"},
)  # fmt: skip
