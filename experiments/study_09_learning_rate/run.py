"""Is forgetting a matter of the learning rate, in pretraining or finetuning, and does replay do away with it?

python -m experiments 09 [--parts 0 1] [--report]

`--parts` counts through every pretraining rate of seed 0, then of seed 1, and so on: to pretrain, then to finetune.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.finetunes import Bench, Run, StudyResults, finetune
from experiments.lab_bases import open_lab_bench, pretrain
from experiments.pages import NoReport
from experiments.program import Report, conduct
from experiments.study_09_learning_rate.report import OLD, draw, nearest, table_of_rates, verdict
from retain.lab.pretrain import PretrainConfig, open_corpus

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the study takes."""

    corpus: str = "synthetic"
    new_corpus: str = "synthetic"
    model_size: str = "6400"
    num_states: int = 32
    vocab_size: int = 32
    max_length: int = 64
    tokens_per_param: tuple[float, ...] = (75, 100, 115, 130, 150, 175, 200, 300)
    pretrain_batch: int = 64
    pretrain_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    rates: tuple[float, ...] = (1.5e-4, 7e-4, 3e-3, 1.5e-2)
    replay_rates: tuple[float, ...] = (7e-4, 3e-3, 1.5e-2)
    control_rate: float = 3e-3
    batch_size: int = 32
    replay_rows: int = 16
    replay_pool: int = 4096
    coef: float = 1.0
    steps_times_rate: float = 0.5
    least_steps: int = 300
    stop_loss: float = 1.6
    seeds: int = 6


SCALES = {"laptop": Scale()}


def corpus_config(scale: Scale, name: str, language: int) -> PretrainConfig:
    """The old or the new corpus; texts of both share a tokenizer."""
    both = f"{scale.corpus},{scale.new_corpus}" if name != "synthetic" else None
    return PretrainConfig(
        corpus=name, model_size=scale.model_size, num_states=scale.num_states, vocab_size=scale.vocab_size,
        max_length=scale.max_length, language_seed=language, tokenizer_corpus=both,
    )  # fmt: skip


def bases_of(scale: Scale, rate: float, seed: int) -> dict[float, dict[str, Any]]:
    """Bases by tokens per parameter, pretrained at this rate unless they are there."""
    how = {"per_device_train_batch_size": scale.pretrain_batch, "learning_rate": rate}
    return pretrain(corpus_config(scale, scale.corpus, 0), scale.tokens_per_param, seed=seed, **how)


def base_row(scale: Scale, rate: float, seed: int, results: StudyResults) -> list[dict[str, Any]]:
    """The bases as a row, so that who has the rows needs no base: tokens per parameter, losses, size."""
    names = ("tokens_per_param", "loss", "ideal_loss", "num_params")
    settings = {"kind": "base", "pretrain_rate": rate, "seed": seed, **fixed_of(scale)}
    settings["lengths"] = list(scale.tokens_per_param)

    def compute() -> dict[str, Any]:
        found = bases_of(scale, rate, seed).values()
        return {"bases": [{name: base[name] for name in names if name in base} for base in found]}

    return results.make(settings, compute)["bases"]


def plan(scale: Scale, rate: float, control: bool) -> Iterator[tuple[float, float]]:
    """Finetuning rate and coefficient of every run on a base; the control base needs one only."""
    if control:
        yield scale.control_rate, 0.0
        return
    yield from ((one, 0.0) for one in scale.rates)
    yield from ((one, scale.coef) for one in scale.replay_rates)


def run_of(scale: Scale, rate: float, coef: float, seed: int) -> Run:
    """The finetune; the faster it learns, the closer it is watched."""
    return Run(
        learning_rate=rate,
        max_steps=max(scale.least_steps, round(scale.steps_times_rate / rate)),
        eval_steps=max(4, round(0.03 * scale.steps_times_rate / rate)),
        batch_size=scale.batch_size,
        coef=coef,
        replay_rows=scale.replay_rows,
        seed=seed,
    )


def make_base_runs(
    scale: Scale, base: dict[str, Any], known: dict[str, Any], results: StudyResults, *, control: bool = False
) -> None:
    """Every finetune of one base; where a run is missing the base is pretrained, unless it is there, and opened."""
    bench: Bench | None = None

    def compute(run: Run) -> dict[str, Any]:
        nonlocal bench
        if bench is None:
            found = bases_of(scale, known["pretrain_rate"], known["seed"])[base["tokens_per_param"]]
            new, old = (open_corpus(corpus_config(scale, name, at), known["seed"])
                        for at, name in ((1, scale.new_corpus), (0, scale.corpus)))  # fmt: skip
            bench = open_lab_bench(
                found["folder"], new, old, seed=known["seed"], num_replay=0 if control else scale.replay_pool,
                num_train=scale.batch_size * max(scale.least_steps, round(scale.steps_times_rate / min(scale.rates))),
            )  # fmt: skip
        tuned = finetune(run, bench, scale.stop_loss)
        facts = {name: base[name] for name in ("loss", "ideal_loss", "num_params") if name in base}
        return {"base": facts, "trajectory": [compact(row) for row in tuned["trajectory"]]}

    for rate, coef in plan(scale, known["pretrain_rate"], control):
        settings = {**known, "control": control, "learning_rate": rate, "coef": coef}
        settings["tokens_per_param"] = base["tokens_per_param"]
        run = run_of(scale, rate, coef, known["seed"])
        results.make(settings, lambda run=run: compute(run))


def compact(row: dict[str, Any]) -> dict[str, float]:
    """What the report reads of an evaluation."""
    return {name: round(row[name], 5) for name in ("step", "eval_loss", f"retention/{OLD}/forgetting")}


def make_runs(scale: Scale, rate: float, seed: int, results: StudyResults) -> None:
    """Of one pretraining rate: the base of most tokens, then the control: as good as the worst of those of the seed."""
    bases = {one: base_row(scale, one, seed, results) for one in scale.pretrain_rates}
    longest = {one: max(found, key=lambda base: base["tokens_per_param"]) for one, found in bases.items()}
    worst = max(base["loss"] for base in longest.values())
    known = {"pretrain_rate": rate, "seed": seed, **fixed_of(scale)}
    make_base_runs(scale, longest[rate], known, results)
    if (base := nearest(bases[rate], worst)) is not longest[rate]:
        make_base_runs(scale, base, known, results, control=True)


def fixed_of(scale: Scale) -> dict[str, Any]:
    own = ("seeds", "pretrain_rates", "rates", "replay_rates", "control_rate", "tokens_per_param", "coef")
    return {name: value for name, value in asdict(scale).items() if name not in own}


def pretrained(scale: Scale) -> range:
    """Parts: a pretraining rate with a seed, to be pretrained; in `finetuned` the same again, to be finetuned."""
    return range(scale.seeds * len(scale.pretrain_rates))


def finetuned(name: str) -> range:
    bases = pretrained(SCALES[name])
    return range(len(bases), 2 * len(bases))


def make(name: str, part: int) -> None:
    scale = SCALES[name]
    finetunes, base = divmod(part, len(pretrained(scale)))
    seed, at = divmod(base, len(scale.pretrain_rates))
    (make_runs if finetunes else base_row)(
        scale, scale.pretrain_rates[at], seed, StudyResults(HERE / "results.jsonl", name)
    )


def page(name: str) -> Report:
    found = StudyResults(HERE / "results.jsonl", name).rows_with(fixed_of(SCALES[name]))
    if not (rows := [row for row in found if "trajectory" in row]):
        raise NoReport("no finetune is made yet")
    return f"{table_of_rates(rows)}\n\n{verdict(rows)}", lambda path: draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(
        __doc__, HERE, SCALES, parts=pretrained, then=(finetuned,), make=make, report=page, only="parts",
        arguments=arguments,
    )  # fmt: skip
