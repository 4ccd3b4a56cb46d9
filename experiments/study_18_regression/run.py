"""Why KL replay keeps a function where next-token replay does not: one-dimensional regression, a minute.

python -m experiments 18 [--report]

A network predicts y of x as a normal distribution of known width. It learns one function on the left, and is then
finetuned on another function on the right, alone or with replay on the left: of y that the base itself draws there
(self), or of y that comes from elsewhere (other), each with the likelihood of y (NTP) or the KL from the base's
prediction at the same x, which does not look at y. Rows from elsewhere have x in the third of the left that is
next to the right, as text of others has contexts that the model itself seldom writes.

Rule, fixed before the runs: what is forgotten is the mean KL from the base to the finetuned network on the left, in
nats, after all steps; a claim holds where its difference, paired by seed, has its sign in the whole 95% interval, and
0.01 nats or less do not matter.

A first look had rows from elsewhere at the same x as the base's own, so that both KL arms were one computation, number
for number, and the third claim held by definition. Where they lie was changed then, before a run of it; intervals are
corrected for two looks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.claim import Claim, over_seeds
from experiments.finetunes import StudyResults
from experiments.pages import NoReport, dress, findings, panels, table
from experiments.program import Report, conduct, seeds_of

HERE = Path(__file__).parent
ARMS = ("plain", "KL, self", "NTP, self", "KL, other", "NTP, other")
BORDER, EDGES = 1.0, (-3.0, 3.0)
CURVE = 61  # points of a drawn function
CLAIMS = {  # finding: two arms, the first of which forgets less
    "In regression, replay that the base wrote keeps the function": ("NTP, self", "plain"),
    "In regression, KL keeps more than NTP on the same rows": ("KL, self", "NTP, self"),
    "In regression, KL keeps more than NTP on rows from elsewhere": ("KL, other", "NTP, other"),
    "In regression, NTP on rows from elsewhere is worse than no replay": ("plain", "NTP, other"),
}


@dataclass(frozen=True)
class Scale:
    width: int = 64
    noise: float = 0.3  # standard deviation of y, known
    base_steps: int = 3000
    tune_steps: int = 1000
    rows: int = 64
    replay_rows: int = 8
    learning_rate: float = 3e-3
    coef: float = 1.0
    elsewhere: float = 1 / 3  # part of the left, next to the right, where rows that the base did not write lie
    seeds: int = 5


SCALES = {"laptop": Scale()}


def old(x: Tensor) -> Tensor:
    return torch.sin(2.5 * x)


def new(x: Tensor) -> Tensor:
    return 1.5 - 0.5 * x


def other(x: Tensor) -> Tensor:
    """What text that the model was not trained on says of the left."""
    return 0.4 * x + 1.0


def between(low: float, high: float, number: int, draws: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(number, 1, generator=draws)


def descend(model: nn.Module, num_steps: int, rate: float, loss: Callable[[], Tensor]) -> nn.Module:
    """AdamW's steps on a loss, with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return model


def tuned(arm: str, base: nn.Module, scale: Scale, seed: int) -> nn.Module:
    """The base after finetuning on the right, with the replay of the arm on the left."""
    model, draws = copy.deepcopy(base), torch.Generator().manual_seed(1_000 + seed)
    kind, _, source = arm.partition(", ")

    def squares(difference: Tensor) -> Tensor:
        """The likelihood's, or the KL's, of normal distributions of one width: the same form."""
        return (difference / scale.noise).square().mean() / 2

    def noise(x: Tensor) -> Tensor:
        return scale.noise * torch.randn(x.shape, generator=draws)

    def loss() -> Tensor:
        x = between(BORDER, EDGES[1], scale.rows, draws)
        found = squares(model(x) - new(x) - noise(x))
        if not source:
            return found
        part = 1.0 if source == "self" else scale.elsewhere
        x = between(BORDER - part * (BORDER - EDGES[0]), BORDER, scale.replay_rows, draws)
        with torch.no_grad():
            predicted = base(x)
        y = (predicted if source == "self" else other(x)) + noise(x)
        return found + scale.coef * squares(model(x) - (predicted if kind == "KL" else y))

    return descend(model, scale.tune_steps, scale.learning_rate, loss)


def make(name: str, seed: int) -> None:
    """A base, its finetunes, and what they predict."""
    scale, results = SCALES[name], StudyResults(HERE / "results.jsonl", name)
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(1, scale.width), nn.Tanh(), nn.Linear(scale.width, scale.width), nn.Tanh()]
    base = nn.Sequential(*layers, nn.Linear(scale.width, 1))

    def loss() -> Tensor:
        x = between(EDGES[0], BORDER, scale.rows, draws)
        return (base(x) - old(x) - scale.noise * torch.randn(x.shape, generator=draws)).square().mean()

    descend(base, scale.base_steps, scale.learning_rate, loss)
    grid = torch.linspace(*EDGES, CURVE)[:, None]

    def row(model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            moved = (model(grid) - base(grid))[grid <= BORDER] / scale.noise
            missed = (model(grid) - new(grid))[grid > BORDER] / scale.noise
            curve = [round(value, 3) for value in model(grid)[:, 0].tolist()]
        kl, loss = (round(float(one.square().mean()) / 2, 6) for one in (moved, missed))
        return {"forgotten": kl, "new_task": loss, "curve": curve}

    settings = {key: value for key, value in vars(scale).items() if key != "seeds"} | {"seed": seed}
    results.make({"arm": "base", **settings}, lambda: row(base))
    for arm in ARMS:
        results.make({"arm": arm, **settings}, lambda arm=arm: row(tuned(arm, base, scale, seed)))


def report(name: str) -> Report:
    """What is forgotten and learned in each arm, and the claims."""
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in StudyResults(HERE / "results.jsonl", name).rows_with():
        rows.setdefault(row["settings"]["arm"], {})[row["settings"]["seed"]] = row
    seeds = sorted(set.intersection(*(set(rows.get(arm, ())) for arm in ("base", *ARMS))))
    if len(seeds) < 2:
        raise NoReport("fewer than two seeds are whole yet")
    lost = {arm: [rows[arm][seed]["forgotten"] for seed in seeds] for arm in ARMS}
    learned = {arm: over_seeds([rows[arm][seed]["new_task"] for seed in seeds]) for arm in ARMS}
    found = {}
    for label, (less, more) in CLAIMS.items():
        claim = Claim([a - b for a, b in zip(lost[less], lost[more], strict=True)], -1, margin=0.01, first_look=0)
        words = f"{over_seeds(lost[less])} against {over_seeds(lost[more])} nats, {claim.interval.text('+.3f')}"
        found[label] = (claim.verdict, f"{words}; {len(seeds)} seeds, {SCALES[name].width} units")
    lines = [(arm, over_seeds(lost[arm]), learned[arm]) for arm in ARMS]
    head = ("arm", "forgotten on the left: KL to the base, nats", "left to learn on the right, nats")

    def draw(path: Path) -> None:
        x = torch.linspace(*EDGES, CURVE).tolist()
        median = sorted(seeds, key=lambda seed: rows["plain"][seed]["forgotten"])[len(seeds) // 2]
        shown = (("Finetuned alone", ("plain",)), ("Replay that the base wrote", ("KL, self", "NTP, self")),
                 ("Replay from elsewhere", ("KL, other", "NTP, other")))  # fmt: skip
        with panels(path, len(shown), (11.0, 3.2)) as all_axes:
            for axes, (title, arms) in zip(all_axes, shown, strict=True):
                axes.axvspan(BORDER, EDGES[1], color="0.93", zorder=0)
                axes.plot(x, rows["base"][median]["curve"], color="0.35", linestyle=(0, (4, 2)), label="base")
                for arm in arms:
                    axes.plot(x, rows[arm][median]["curve"], label=arm.partition(",")[0])
                axes.set_ylim(-1.7, 3.4)
                dress(axes, title, "x (finetuned on the shaded part)", "prediction" if axes is all_axes[0] else "")
                axes.set_xlim(EDGES)
                axes.legend(loc="upper right")

    return f"{table(head, lines)}\n\n{findings(found)}", draw


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, SCALES, parts=seeds_of, make=make, report=report, arguments=arguments)
