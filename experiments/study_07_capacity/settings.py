"""What the studies of capacity take: on a laptop, as shown, and with larger models on a GPU, not run yet."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.study_07_capacity.runs import Size, World


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the study takes: sizes at one loss, lengths of the smallest, shares of the new language in the frontier."""

    world: World
    same_loss: float
    lengths: tuple[float, ...]
    shares: tuple[float, ...]
    frontier_lengths: tuple[float, ...]  # bases whose finetunes are set against the frontier
    frontier_coefs: tuple[float, ...] = (1.8,)  # beside the size's own
    seeds: int = 3

    @property
    def smallest(self) -> str:
        return self.world.sizes[0].name


WIDE = (1.0, 3.0, 10.0, 30.0)
SCALES = {
    "laptop": Scale(
        world=World(), same_loss=1.3, lengths=(17.7828, 100, 562.3413), shares=(0.1, 0.2, 0.5),
        frontier_lengths=(100, 562.3413), seeds=6,
    ),
    "gpu": Scale(
        world=World(
            num_states=1024, vocab_size=128, batch_size=256, learning_rate=2e-3, target=2.5, tune_learning_rate=1e-3,
            tune_rows=128, replay_rows=64, replay_pool=32_768, max_steps=500, eval_steps=50,
            sizes=(
                Size("134k", 316.2278, (1.0, 3.0, 10.0)), Size("430k", 100.0, WIDE[1:]),
                Size("1e6", 31.6228, WIDE[1:]), Size("2.4e6", 10.0, WIDE[1:]),
            ),
        ),
        same_loss=1.5, lengths=(10, 31.6228, 100, 316.2278), shares=(0.1, 0.2, 0.5), frontier_lengths=(100, 316.2278),
    ),
}  # fmt: skip
