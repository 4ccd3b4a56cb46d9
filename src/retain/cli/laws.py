"""`retain fit` and `retain predict`: settings in, text out."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from retain.cli.config import FitConfig, PredictConfig
from retain.files import check_writable
from retain.laws.fit import fit_forgetting_law
from retain.laws.forms import form_of
from retain.laws.law import ForgettingLaw
from retain.laws.runs import read_runs, unlike_recipes

INPUTS = ("num_params", "num_steps", "num_tokens", "replay_share", "tokens_per_param", "finetuning_loss", "ref_kl")


def run_fit(config: FitConfig) -> str:
    """Fit a law to the runs of `config`, write it, and return its summary."""
    assert config.output is not None
    for flag, path in (("output", config.output), ("plot", config.plot)):
        if path is not None:
            check_writable(Path(path), flag)
    forms = [form_of(name) for name in (config.form, *config.rivals)]
    runs = read_runs(
        config.runs,
        list(dict.fromkeys(column for form in forms for column in form.columns)),
        retention=config.retention_name,
        metric=config.forgetting_metric,
        min_steps=config.min_steps,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary says what they say
        law = fit_forgetting_law(
            runs,
            config.form,
            shared_exponents=config.shared_exponents,
            rivals=config.rivals,
            num_starts=config.num_starts,
            num_resamples=config.num_resamples,
            seed=config.seed,
        )
    law.to_json(config.output)
    lines = [law.summary(), *(f"! {note}" for note in unlike_recipes(config.runs)), "", f"law: {config.output}"]
    if config.plot:
        from retain.report.style import save_png

        save_png(law.plot(), config.plot)
        lines.append(f"figure: {config.plot}")
    return "\n".join(lines)


def run_predict(config: PredictConfig) -> str:
    """What a law says of a run, or of the most steps within a limit, as text or JSON."""
    assert config.law is not None
    law = ForgettingLaw.from_json(config.law)
    known: dict[str, Any] = {name: getattr(config, name) for name in INPUTS if getattr(config, name) is not None}
    if config.model is not None and config.lora_r is not None:
        from retain.models.loading import lora_num_params  # with torch, which nothing else here needs

        known["num_params"] = lora_num_params(
            config.model,
            config.lora_r,
            config.lora_target_modules,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    if config.max_forgetting is not None:
        answer = _most_steps(law, config, known)
    else:
        answer = law.predict(level=config.level, dataset=config.dataset, **known).to_dict()
    answer = {"inputs": known, **answer}
    return json.dumps(answer, indent=2) if config.json else as_text(answer)


def _most_steps(law: ForgettingLaw, config: PredictConfig, known: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"level": config.level, "dataset": config.dataset, **known}
    options["forgetting_loss"] = config.max_forgetting
    found = law.solve("num_steps", **options)
    low, high = (value if 0 < value < float("inf") else None for value in found.ci)
    return {
        "num_steps": {"value": found.value, "ci": [low, high]},
        "max_forgetting": config.max_forgetting,
        "level": config.level,
        "extrapolates": bool(found.extrapolates),
        "notes": found.extrapolates,
    }


def as_text(answer: dict[str, Any]) -> str:
    """An answer for people: a line for each number, and what it rests on."""
    given = ", ".join(f"{name} {value:g}" for name, value in answer["inputs"].items())
    lines = [f"for {given}:"]
    for name, found in answer.items():
        if isinstance(found, dict) and "ci" in found:
            low, high = (f"{end:.5g}" if end is not None else "?" for end in found["ci"])
            lines.append(f"{name:<18}{found['value']:.5g}   {answer['level']:.0%} interval [{low}, {high}]")
    lines += [f"! {note}" for note in answer["notes"]]
    return "\n".join(lines)
