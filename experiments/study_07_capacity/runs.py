"""Bases, mixtures and finetunes, each kind of them in one loop: rows of results."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import vmap

from experiments.corpora import CACHE
from experiments.ensemble import Ensemble, Flat, evaluate, schedule, step_rows
from experiments.finetunes import StudyResults, drawn_rows
from experiments.study_07_capacity.settings import Arm, Scale, Start
from retain.files import atomic_path
from retain.lab.models import expand, make_model
from retain.lab.pretrain import Corpus, PretrainArguments, open_corpus
from retain.lab.runner import run_key
from retain.lab.streams import RowFunction, mixture

logger = logging.getLogger("experiments")
BETA2 = 0.999
TUNE_SEED, REPLAY_SEED = 1_000, 7_000  # added to the seed: rows of a finetune are none of the base's
AT_ONCE = 64  # steps of replay whose base predictions are held


def arguments(scale: Scale, num_steps: int, **more: Any) -> PretrainArguments:
    """AdamW's; a twentieth of the steps warm-up, then linear to 0."""
    return PretrainArguments(
        output_dir=str(CACHE), max_steps=num_steps, lr_scheduler_type="linear", warmup_steps=0.05, use_cpu=True, **more
    )


@cache
def corpora(scale: Scale, which: int) -> dict[int, Corpus]:
    """The old language (0) or the new one (1), for each seed."""
    return {seed: open_corpus(scale.language(which), seed) for seed in range(scale.seeds)}


def held_out_losses(scale: Scale, flat: Flat, weights: Tensor, of_seed: Tensor) -> dict[str, list[float]]:
    """Each member's loss on the held-out rows of its seed, old and new language."""
    found = {}
    for which, name in enumerate(("old", "new")):
        rows = np.stack([corpus.held_out for corpus in corpora(scale, which).values()]).astype(np.int64)
        losses = evaluate(flat, weights, torch.from_numpy(rows), of_seed)
        found[name] = [round(loss, 5) for loss in losses.tolist()]
    return found


def folder_of(scale: Scale) -> Path:
    """Where weights and drawn rows lie: of these languages and this pretraining."""
    own = ("targets", "starts", "arms", "tune_rows", "tune_learning_rate")
    return CACHE / "capacity" / run_key({name: value for name, value in asdict(scale).items() if name not in own}, "")


def pretrain(scale: Scale, size: str, length: float, results: StudyResults) -> tuple[Flat, dict[float, Tensor]]:
    """For each share of the new language, the weights of all seeds, shape (seeds, parameters); made once."""
    shares, path = scale.shares_at(size, length), folder_of(scale) / f"{size}-{length:g}.safetensors"
    flat, members = Flat.of(scale.shape(size)), [(share, seed) for share in shares for seed in range(scale.seeds)]
    if not path.is_file():
        weights = torch.stack([flat.vector(make_model(flat.model.config, seed)) for _, seed in members])
        args = arguments(scale, scale.pretrain_steps(size, length))
        streams = [_mixed(scale, share, seed, args.max_steps * scale.batch_size) for share, seed in members]
        weights = Ensemble(flat, flat.loss, args).train(
            weights, torch.full((len(members),), BETA2, dtype=torch.float64),
            _rates(args, scale.learning_rate, members),
            lambda done: ((rows,) for rows in step_rows(streams, scale.batch_size, range(done, args.max_steps))),
            path.with_suffix(".checkpoint"),
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({"weights": weights}, temporary)
    weights = load_file(path)["weights"]
    losses = held_out_losses(scale, flat, weights, torch.tensor([seed for _, seed in members]))
    for at, (share, seed) in enumerate(members):
        row = {"kind": "base", "size": size, "tokens_per_param": length, "share": share, "seed": seed,
               "batch_size": scale.batch_size, "learning_rate": scale.learning_rate}  # fmt: skip
        results.make(row, lambda at=at: {name: values[at] for name, values in losses.items()})
    logger.info("%s, %g tokens per parameter: %s", size, length, losses)
    return flat, dict(zip(shares, weights.split(scale.seeds), strict=True))


def _rates(args: PretrainArguments, peak: float, members: Sequence[Any]) -> Any:
    share = schedule(args)
    return lambda at: torch.full((len(members),), peak * share(at))


def _mixed(scale: Scale, share: float, seed: int, num_rows: int) -> RowFunction:
    old, new = (corpora(scale, which)[seed].stream(num_rows, seed) for which in (0, 1))
    return mixture([(1 - share, old), (share, new)], num_rows, seed) if share else old


def start_of(scale: Scale, start: Start, results: StudyResults) -> tuple[Flat, Tensor, dict[int, float]]:
    """The weights of a start, shape (seeds, parameters), and each seed's tokens per parameter."""
    made = {length: pretrain(scale, start.size, length, results) for length in start.tokens_per_param}
    lengths, (flat, _) = list(made), next(iter(made.values()))
    chosen = dict.fromkeys(range(scale.seeds), lengths[0])
    if len(lengths) > 1:
        bases = {(row["settings"]["size"], row["settings"]["tokens_per_param"], row["settings"]["seed"]): row["old"]
                 for row in results.rows_with({"kind": "base", "share": 0.0})}  # fmt: skip
        for seed in chosen:
            wanted = bases[scale.small, scale.lengths[-1], seed]
            chosen[seed] = min(lengths, key=lambda at: abs(bases[start.size, at, seed] - wanted))
    weights = torch.stack([made[length][1][0.0][seed] for seed, length in chosen.items()])
    if start.widened:
        grown = [expand(flat.model_of(one), seed=seed, **dict(start.widened)) for seed, one in enumerate(weights)]
        flat = Flat.of(grown[0].config)
        weights = torch.stack([flat.vector(model) for model in grown])
    return flat, weights, chosen


def tune_all(scale: Scale, name: str, start: Start, results: StudyResults) -> None:
    """Every arm and seed of a start, for each number of steps: a loop each."""
    members = [(arm, seed) for arm in scale.arms for seed in range(scale.seeds)]
    rows = {(num_steps, *member): _settings(scale, name, start, num_steps, *member)
            for num_steps in start.steps for member in members}  # fmt: skip
    if all(results.get(row) for row in rows.values()):
        return
    flat, weights, lengths = start_of(scale, start, results)
    of_seed, args = torch.tensor([seed for _, seed in members]), arguments(scale, max(start.steps), weight_decay=0.0)
    streams = _streams(scale, name, flat, weights, max(start.steps) * scale.tune_rows)
    before, tuning = held_out_losses(scale, flat, weights, torch.arange(scale.seeds)), None
    for num_steps in start.steps:
        if all(results.get(rows[num_steps, *member]) for member in members):
            continue
        args = arguments(scale, num_steps, weight_decay=0.0)
        tuning = tuning or Ensemble(flat, flat.protected_loss, args)
        trained = tuning.train(
            weights[of_seed], torch.full((len(members),), BETA2, dtype=torch.float64),
            _rates(args, scale.tune_learning_rate, members),
            lambda done, last=num_steps: _batches(scale, flat, weights, streams, members, range(done, last)),
            folder_of(scale) / f"tune-{run_key(rows[num_steps, *members[0]], '')}.checkpoint",
        )  # fmt: skip
        after = held_out_losses(scale, flat, trained, of_seed)
        for at, member in enumerate(members):
            seed = member[1]
            facts = {
                "tokens_per_param": lengths[seed],
                "base_old": before["old"][seed],
                "base_new": before["new"][seed],
            }
            ends = {of: values[at] for of, values in after.items()}
            results.make(rows[num_steps, *member], lambda facts=facts, ends=ends: facts | ends)
        logger.info("%s, %d steps: %s", name, num_steps, after)


def _settings(scale: Scale, name: str, start: Start, num_steps: int, arm: Arm, seed: int) -> dict[str, Any]:
    how = {"batch_size": scale.tune_rows, "learning_rate": scale.tune_learning_rate}
    return {"kind": "tune", "start": name, **asdict(start), "steps": num_steps, **asdict(arm), "seed": seed, **how}


def _streams(scale: Scale, name: str, flat: Flat, weights: Tensor, num_rows: int) -> dict[str, list[RowFunction]]:
    """New rows, and replay of both kinds, of each seed; none twice in a run."""
    found: dict[str, list[RowFunction]] = {"new": [], "self": [], "real": []}
    for seed in range(scale.seeds):
        for which, kind in enumerate(("real", "new")):
            found[kind].append(open_corpus(scale.language(which), TUNE_SEED + seed).stream(num_rows, seed))
        drawn = _drawn(scale, name, flat, weights[seed], seed, num_rows)
        found["self"].append(lambda numbers, drawn=drawn: drawn[numbers])
    return found


def _drawn(scale: Scale, name: str, flat: Flat, vector: Tensor, seed: int, num_rows: int) -> np.ndarray:
    """Rows that a base writes from its document start at temperature 1, shape (rows, length); drawn once."""
    path = folder_of(scale) / f"rows-{name.replace(' ', '-')}-{seed}-{num_rows}.npy"
    if not path.is_file():
        model = flat.model_of(vector).eval()
        rows = np.stack(drawn_rows(model, [0] * num_rows, scale.max_length, REPLAY_SEED + seed)).astype(np.uint8)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, rows)
    return np.load(path)


def _batches(
    scale: Scale,
    flat: Flat,
    weights: Tensor,
    streams: Mapping[str, Sequence[RowFunction]],
    members: Sequence[tuple[Arm, int]],
    steps: range,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each step and member: new rows, replay rows, the base's predictions on these, the coefficient."""
    of_seed = torch.tensor([seed for _, seed in members])
    kinds = ["self", "real"]
    of_rows = torch.tensor([kinds.index(arm.rows) * scale.seeds + seed for arm, seed in members])
    coefs = torch.tensor([arm.coef for arm, _ in members])
    predict = vmap(lambda vector, tokens: flat.logits(vector, tokens).log_softmax(-1))
    bases = weights.repeat(len(kinds), 1)
    for begin in range(steps.start, steps.stop, AT_ONCE):
        part = range(begin, min(begin + AT_ONCE, steps.stop))
        new = list(step_rows(streams["new"], scale.tune_rows, part))
        both = list(step_rows([one for kind in kinds for one in streams[kind]], scale.tune_rows, part))
        with torch.no_grad():
            predicted = predict(bases, torch.cat(both, dim=1)).split(scale.tune_rows, dim=1)
        for fresh, replay, known in zip(new, both, predicted, strict=True):
            yield fresh[of_seed], replay[of_rows], known[of_rows], coefs
