"""Which replay coefficient suits DPO and GRPO? On the small base, 430,896 parameters; a tiny scale.

python -m experiments 17

DPO prefers what follows in Verilog to what the base itself wrote there; GRPO rewards the share of the letter e in what
the model writes. Full finetuning, KL on rows that the base wrote, a quarter of the batch in every step.

Rule, fixed before the runs (learning rates and steps were chosen without replay, on a seed that is not among those
judged): of each trainer the coefficient to recommend is the largest of the grid with which the run learns, in every
seed, at least 90% of what it learns with coefficient 0: of DPO the fall of the loss on held-out pairs, of GRPO the rise
of the mean reward in the last ten steps over the base's. It protects if ref_kl on held-out prose is lower than with
coefficient 0, paired by seed, with the whole 95% interval (Student's t).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from experiments.claim import Claim, Interval, over_seeds, yes_or_no
from experiments.finetunes import Bench, StudyResults, scratch, small_bench
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import Report, conduct, seeds_of
from retain import ReplayConfig, ReplayMixin
from retain.sampling.engine import draw_rows

HERE = Path(__file__).parent
COEFS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
MIN_LEARNED = 0.9
PROMPT = 16  # tokens
TICKS = {"DPO": (0.002, 0.005, 0.01), "GRPO": (0.01, 0.03, 0.1, 0.3)}  # of the figure, nats per token


class ReplayDPO(ReplayMixin, DPOTrainer):
    """DPO with replay."""


class ReplayGRPO(ReplayMixin, GRPOTrainer):
    """GRPO with replay."""


@dataclass(frozen=True)
class Scale:
    """Half an hour of a slow core for a seed."""

    dpo_steps: int = 60
    dpo_pairs: int = 8
    dpo_rate: float = 1e-4
    grpo_steps: int = 60
    grpo_completions: int = 32
    grpo_rate: float = 5e-4
    new_tokens: int = 32
    held_out: int = 64
    seeds: int = 3


SCALES = {"laptop": Scale()}


def preferences_bench() -> Bench:
    return small_bench(for_anchors=True)


def shared(scale: Scale, folder: Path, seed: int, **more: Any) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": str(folder), "seed": seed, "lr_scheduler_type": "linear", "warmup_steps": 6, "bf16": False,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False, **more,
    }  # fmt: skip


def trained(kind: type, bench: Bench, coef: float, **given: Any) -> Any:
    """A trainer after its run; the same replay rows in all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hosts speak of themselves
        trainer = kind(
            model=bench.base(), processing_class=bench.tokenizer, retention_datasets=bench.retention,
            replay_config=ReplayConfig(replay_coef=coef), replay_dataset=bench.replay if coef else None, **given,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def forgotten(trainer: Any) -> dict[str, float]:
    """What the run forgot of each text at its end, nats per token."""
    found = trainer.evaluate_retention()
    return {name: value for name, value in found.items() if name.endswith(("/ref_kl", "/forgetting"))}


def dpo(scale: Scale, coef: float, seed: int) -> dict[str, Any]:
    """Pairs of one prompt each; the held-out loss before and after."""
    bench, tokenizer = preferences_bench(), preferences_bench().tokenizer
    rows = [bench.train[at]["input_ids"] for at in range(scale.dpo_steps * scale.dpo_pairs)]
    rows += [bench.new_task[at]["input_ids"] for at in range(min(scale.held_out, len(bench.new_task)))]
    prompts, ends = [list(row[:PROMPT]) for row in rows], PROMPT + scale.new_tokens
    theirs = draw_rows(bench.base(), prompts, range(len(rows)), ends, seed).tokens
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in (
            map(tokenizer.decode, (row[:PROMPT], row[PROMPT:ends], list(one)[PROMPT:]))
            for row, one in zip(rows, theirs, strict=True)
        )
    ]
    held_out = len(rows) - scale.dpo_steps * scale.dpo_pairs
    with scratch() as folder:
        more = {"max_steps": scale.dpo_steps, "per_device_train_batch_size": scale.dpo_pairs, "max_length": ends}
        args = DPOConfig(**shared(scale, folder, seed, learning_rate=scale.dpo_rate, **more), eval_strategy="steps",
                         eval_steps=scale.dpo_steps, eval_on_start=True)  # fmt: skip
        data = {"train_dataset": pairs[:-held_out], "eval_dataset": pairs[-held_out:]}
        trainer = trained(ReplayDPO, bench, coef, args=args, **{k: Dataset.from_list(v) for k, v in data.items()})
        losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        return {"before": losses[0], "after": losses[-1], "learned": losses[0] - losses[-1], **forgotten(trainer)}


def share_of_e(completions: Sequence[str], **_: Any) -> list[float]:
    return [text.count("e") / max(1, len(text)) for text in completions]


def grpo(scale: Scale, coef: float, seed: int) -> dict[str, Any]:
    """Prompts from prose; the mean reward of the first step, which the base writes, and of the last ten."""
    bench = preferences_bench()
    starts = [document.windows[0][:PROMPT] for document in bench.retention["prose"]]
    prompts = [{"prompt": bench.tokenizer.decode(start, skip_special_tokens=True)} for start in starts]
    with scratch() as folder:
        more = {"max_steps": scale.grpo_steps, "per_device_train_batch_size": scale.grpo_completions}
        args = GRPOConfig(**shared(scale, folder, seed, learning_rate=scale.grpo_rate, **more), num_generations=8,
                          max_completion_length=scale.new_tokens)  # fmt: skip
        data = Dataset.from_list(prompts * 10)
        trainer = trained(ReplayGRPO, bench, coef, args=args, train_dataset=data, reward_funcs=share_of_e)
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        before, after = rewards[0], sum(rewards[-10:]) / 10
        return {"before": before, "after": after, "learned": after - before, **forgotten(trainer)}


TRAINERS: dict[str, Callable[[Scale, float, int], dict[str, Any]]] = {"DPO": dpo, "GRPO": grpo}


def make(name: str, seed: int) -> None:
    """Both trainers with every coefficient."""
    scale, results = SCALES[name], StudyResults(HERE / "results.jsonl", name)
    sizes = {key: value for key, value in asdict(scale).items() if key != "seeds"}
    for trainer, run in TRAINERS.items():
        for coef in COEFS:
            key = {"trainer": trainer, "coef": coef, "seed": seed, **sizes}
            results.make(key, lambda run=run, coef=coef: run(scale, coef, seed))


def report(name: str) -> Report:
    """What each coefficient learned and forgot, the one to recommend, and whether it protects."""
    rows: dict[tuple[str, float], dict[int, Any]] = {}
    for row in StudyResults(HERE / "results.jsonl", name).rows_with():
        settings = row["settings"]
        rows.setdefault((settings["trainer"], settings["coef"]), {})[settings["seed"]] = row
    of_all = [set(rows.get((trainer, coef), ())) for trainer in TRAINERS for coef in COEFS]
    seeds = sorted(set.intersection(*of_all))
    if len(seeds) < 2:
        raise NoReport("fewer than two seeds have every coefficient yet")

    def values(trainer: str, coef: float, measure: str) -> list[float]:
        return [rows[trainer, coef][seed][measure] for seed in seeds]

    def learned(trainer: str, coef: float) -> list[float]:
        """Shares of what the same seed learned without replay."""
        pairs = zip(values(trainer, coef, "learned"), values(trainer, 0.0, "learned"), strict=True)
        return [one / plain for one, plain in pairs]

    def from_one_start(trainer: str, coef: float) -> list[float]:
        """The same, where what every seed starts from, the base, is the mean of what they read of it."""
        start = float(np.mean(values(trainer, 0.0, "before")))
        pairs = zip(values(trainer, coef, "after"), values(trainer, 0.0, "after"), strict=True)
        return [(one - start) / (plain - start) for one, plain in pairs]

    lines, found, drawn = [], {}, {}
    for trainer in TRAINERS:
        for coef in COEFS:
            prose, own = (values(trainer, coef, f"retention/{text}/ref_kl") for text in ("prose", "self-generated"))
            shares = over_seeds(learned(trainer, coef))
            lines.append((trainer, f"{coef:g}", shares.percent(), over_seeds(prose), over_seeds(own)))
            drawn[trainer, coef] = shares, over_seeds(prose)
        found |= finding(trainer, learned, values)
    head = ("trainer", "coefficient", "learned, of what is learned without", "ref_kl on prose", "ref_kl on own rows")

    def draw(path: Path) -> None:
        with panels(path, len(TRAINERS), (8.0, 3.0)) as all_axes:
            for axes, trainer in zip(all_axes, TRAINERS, strict=True):
                for coef in COEFS:
                    share, moved = drawn[trainer, coef]
                    seen = (
                        values(trainer, coef, "retention/prose/ref_kl"),
                        [100 * one for one in learned(trainer, coef)],
                    )
                    axes.plot(*seen, "o", color="C0", markersize=2.5, alpha=0.5)
                    axes.plot(moved.value, 100 * share.value, "o", color="C0")
                    place = (4, -12) if coef else (-3, 6)
                    axes.annotate(f"{coef:g}", (moved.value, 100 * share.value), place, textcoords="offset points")
                axes.set_xscale("log")
                axes.set_xticks(TICKS[trainer], [f"{tick:g}" for tick in TICKS[trainer]])
                axes.minorticks_off()
                axes.margins(y=0.12)
                axes.axhline(100 * MIN_LEARNED, linewidth=0.9, linestyle="--", color="C7")
                dress(axes, f"{trainer}, by coefficient", "ref_kl on prose, nats per token", "learned, % of without")

    shares = from_one_start("GRPO", COEFS[1])
    after = (
        f"Looked at after the runs: with the mean of what all seeds read as the base's reward, GRPO at {COEFS[1]:g} "
        f"learns {over_seeds(shares).percent()} as much ({', '.join(f'{one:.0%}' for one in shares)})."
    )
    return f"{table(head, lines)}\n\n{findings(found)}\n\n{after}", draw


def finding(
    trainer: str, learned: Callable[[str, float], list[float]], values: Callable[[str, float, str], list[float]]
) -> Mapping[str, tuple[str, str]]:
    """The coefficient to recommend by the rule, and what it prevents."""
    measure = "retention/prose/ref_kl"
    chosen = max(coef for coef in COEFS if min(learned(trainer, coef)) >= MIN_LEARNED)
    shown = chosen or COEFS[1]
    pairs = list(zip(values(trainer, shown, measure), values(trainer, 0.0, measure), strict=True))
    claim = Claim([one - plain for one, plain in pairs], direction=-1)
    prevented: Interval = over_seeds([1 - one / plain for one, plain in pairs])
    verdict = yes_or_no(claim.verdict) + (", at the end of the grid" if chosen == max(COEFS) else "")
    which = f"the largest that learns 90% as much is {shown:g}" if chosen else f"the smallest, {shown:g}"
    words = f"{which}: it learns {over_seeds(learned(trainer, shown)).percent()} as much and prevents"
    plain = over_seeds(values(trainer, 0.0, measure))
    words += f" {prevented.percent()} of ref_kl on prose, {plain} nats without, {len(pairs)} seeds"
    label = f"With {trainer}, replay at the largest coefficient that leaves learning alone forgets less"
    return {label: (verdict if chosen else "no: none leaves learning alone", words)}


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=report, arguments=arguments)
