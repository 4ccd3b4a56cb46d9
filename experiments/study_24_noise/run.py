"""With replay of a sixteenth of the batch, does it pay to treat its gradient apart from the new task's?

python -m experiments 24 [--seeds 0 1 2] [--report]

Rule, committed before the runs: the small base on Verilog, 96 steps of 32 rows, a linear schedule, two replay rows a
step, all at 1e-3. Every run is read at its end. Prevented: 1 - own / plain at the same new-task loss, on the line
between plain's learning rates with the same seed, of ref_kl on own rows. A way pays if it prevents more than the plain
sum of both gradients at its own coefficient: paired by seed, the whole 95% interval above 0 (Student's t), corrected
for the number of ways, and more than one point. Three seeds, one look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.claim import Interval, over_seeds, yes_or_no
from experiments.finetunes import Bench, BenchSettings, Run, StudyResults, finetune, small_bench
from experiments.pages import NoReport, dots, findings, panels, table
from experiments.program import LAPTOP, Report, conduct
from experiments.study_14_anchor.report import end_of, prevented
from retain import ReplayDataset, ReplayTrainer
from retain.losses import kl_divergence

HERE = Path(__file__).parent
SEEDS, ROWS, MARGIN = (0, 1, 2), 2, 0.01
RUN = Run(max_steps=96, schedule="linear", eval_steps=96)
PLAIN = (2.5e-4, 5e-4, 1e-3, 2e-3)
TOGETHER = "together"
# How replay's gradient is used, and its coefficients.
WAYS = {
    TOGETHER: (1.0, 3.0, 10.0),
    "clipped to the new task's norm": (3.0, 10.0),
    "averaged over ten steps": (1.0, 3.0),
    "not in Adam's second moment": (1.0,),
    "rows drawn by their last KL": (1.0, 3.0),
}
FINDINGS = {
    "clipped to the new task's norm": "Clipping replay's gradient to the new task's norm",
    "averaged over ten steps": "Averaging replay's gradient over ten steps",
    "not in Adam's second moment": "Leaving replay's gradient out of Adam's second moment",
    "rows drawn by their last KL": "Drawing replay rows by their last KL",
}
Gradients = Sequence[Tensor]


def total(gradients: Gradients) -> Tensor:
    """The norm over all weights."""
    return torch.stack([one.norm() for one in gradients]).norm()


def clipped(new: Gradients, replay: Gradients) -> Gradients:
    """Replay's gradient, no longer than the new task's."""
    share = (total(new) / total(replay).clamp(min=1e-12)).clamp(max=1.0)
    return [share * one for one in replay]


class Averaged:
    """The mean of replay's gradients, those of ten steps ago counting a third."""

    def __init__(self, beta: float = 0.9) -> None:
        self.beta, self.steps, self.sums = beta, 0, list[Tensor]()

    def __call__(self, new: Gradients, replay: Gradients) -> Gradients:
        self.steps += 1
        before = self.sums or [torch.zeros_like(one) for one in replay]
        self.sums = [torch.lerp(one, mean, self.beta) for one, mean in zip(replay, before, strict=True)]
        return [one / (1 - self.beta**self.steps) for one in self.sums]


class NewTaskAdam(torch.optim.AdamW):
    """Adam whose second moment is of `grad` alone; its first one also of `replay_grad`. No weight decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(step=0, first=torch.zeros_like(weight), second=torch.zeros_like(weight))
                state["step"] += 1
                first, second = group["betas"]
                state["first"].lerp_(weight.grad + weight.replay_grad, 1 - first)
                state["second"].lerp_(weight.grad**2, 1 - second)
                mean, square = (state[name] / (1 - beta ** state["step"]) for name, beta in
                                (("first", first), ("second", second)))  # fmt: skip
                weight -= group["lr"] * mean / (square.sqrt() + group["eps"])


class ApartTrainer(ReplayTrainer):
    """Computes replay's gradient after the new task's, and adds it as `way` says; the loss has no replay term."""

    def __init__(self, *, way: str, coef: float, rows: ReplayDataset, base: Any, **how: Any) -> None:
        super().__init__(**how)
        self.way, self.coef, self.rows, self.base = way, coef, rows, base.eval()
        self.draws = np.random.default_rng(self.args.seed)
        self.last_kl = np.full(len(rows), np.nan)
        shapes: dict[str, Callable[[Gradients, Gradients], Gradients]] = {
            "clipped to the new task's norm": clipped,
            "averaged over ten steps": Averaged(),
        }
        self.shape = shapes.get(way, lambda new, replay: replay)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]

    def create_optimizer(self, model: Any = None) -> Any:
        if self.way == "not in Adam's second moment":
            self.optimizer = NewTaskAdam(self.model.parameters(), lr=self.args.learning_rate)
        return super().create_optimizer(model)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        chosen, counts = self.drawn()
        batch = self.rows.batch(chosen)["input_ids"]
        with torch.no_grad():
            ref = self.base(input_ids=batch).logits[:, :-1]
        kl = kl_divergence(ref, model(input_ids=batch).logits[:, :-1]).mean(1)  # nats per token of each row
        self.last_kl[chosen] = kl.detach().numpy()
        replay = torch.autograd.grad(self.coef * (kl * torch.from_numpy(counts)).mean(), self.weights)
        new = [weight.grad for weight in self.weights]
        for weight, one in zip(self.weights, self.shape(new, replay), strict=True):
            if self.way == "not in Adam's second moment":
                weight.replay_grad = one
            else:
                weight.grad += one
        return loss

    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of rows and what each counts, so that the mean over draws is that over the pool.

        By their last KL: half of the draws evenly, half as the KL was; rows not drawn yet have the mean of the others.
        """
        number = len(self.rows)
        if self.way != "rows drawn by their last KL" or np.isnan(self.last_kl).all():
            return self.draws.choice(number, ROWS, replace=False), np.ones(ROWS, np.float32)
        kl = np.where(np.isnan(self.last_kl), np.nanmean(self.last_kl), self.last_kl)
        chances = 0.5 / number + 0.5 * kl / kl.sum() if kl.sum() > 0 else np.full(number, 1 / number)
        chosen = self.draws.choice(number, ROWS, p=chances / chances.sum())
        return chosen, (1 / (number * chances[chosen])).astype(np.float32)


def bench() -> Bench:
    """The small base and Verilog; no held-out row is trained on."""
    return small_bench(BenchSettings(unseen=True))


def make(name: str, seed: int) -> None:
    """Plain finetuning at each rate, and every way with each of its coefficients."""
    place, results = bench(), StudyResults(HERE / "results.jsonl", bench().fingerprint)
    run = replace(RUN, seed=seed)
    for rate in PLAIN:
        plain = replace(run, learning_rate=rate)
        results.make({"way": "plain", **plain.settings()}, lambda plain=plain: finetune(plain, place))
    for way, coefs in WAYS.items():
        for coef in coefs:
            kind = partial(ApartTrainer, way=way, coef=coef, rows=place.replay, base=place.base())
            settings = {"way": way, "kl": coef, **run.settings()}
            results.make(settings, lambda kind=kind: finetune(run, place, kind=kind))


def report(name: str) -> Report:
    """What each way prevented at its coefficients, and whether it pays."""
    rows = list(StudyResults(HERE / "results.jsonl", "").rows.values())
    plain = {seed: [end_of(row) for row in rows if is_of(row, "plain", None, seed)] for seed in SEEDS}
    shares, losses = dict[tuple[str, float], np.ndarray](), dict[tuple[str, float], float]()
    for way, coef in ((way, coef) for way, coefs in WAYS.items() for coef in coefs):
        ends = [end_of(row) for seed in SEEDS for row in rows if is_of(row, way, coef, seed)]
        if len(ends) < len(SEEDS) or min(map(len, plain.values())) < len(PLAIN):
            raise NoReport("not every run of all seeds is made yet")
        shares[way, coef] = np.array([prevented(end, plain[seed])[-1] for seed, end in zip(SEEDS, ends, strict=True)])
        losses[way, coef] = float(np.mean([end.loss for end in ends]))
    level = 1 - 0.05 / (len(shares) - len(WAYS[TOGETHER]))
    gains = {
        (way, coef): over_seeds(share - shares[TOGETHER, coef], level)
        for (way, coef), share in shares.items()
        if way != TOGETHER
    }
    lines = [
        (way, f"{coef:g}", f"{losses[way, coef]:.3f}", over_seeds(share).percent(),
         gains[way, coef].text('+.1%') if way != TOGETHER else "–")
        for (way, coef), share in shares.items()
    ]  # fmt: skip
    text = table(("replay's gradient", "coefficient", "new-task loss", "prevented", "points beside together"), lines)
    found = {
        f"{said} prevents more": verdict_of({coef: gain for (one, coef), gain in gains.items() if one == way})
        for way, said in FINDINGS.items()
    }

    def draw(path: Path) -> None:
        with panels(path, 1, (6.0, 3.0)) as (axes,):
            dots(axes, {f"{way}, {coef:g}": over_seeds(100 * share) for (way, coef), share in shares.items()})
            axes.set_xlabel("% of the KL on own rows prevented")

    return f"{text}\n\n{findings(found)}", draw


def is_of(row: dict[str, Any], way: str, coef: float | None, seed: int) -> bool:
    own = row["settings"]
    return bool((own["way"], own.get("kl"), own["seed"]) == (way, coef, seed))


def verdict_of(gains: dict[float, Interval]) -> tuple[str, str]:
    """Whether a way pays at any of its coefficients, or costs at all of them."""
    pays = any(gain.low > 0 and gain.value > MARGIN for gain in gains.values())
    does_not = all(gain.high < MARGIN for gain in gains.values())
    verdict = "reproduced" if pays else "not reproduced" if does_not else "cannot tell"
    said = "; ".join(f"{gain.text('+.1%')} at coefficient {coef:g}" for coef, gain in gains.items())
    return yes_or_no(verdict), f"{said}; {len(SEEDS)} seeds"


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, LAPTOP, parts=lambda scale: SEEDS, make=make, report=report, arguments=arguments)
