"""What the studies of capacity take at every scale; only laptop has been run."""

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
# As many bits of language for a parameter as the smallest models of the other scales have, about half a bit.
FULL = World(
    num_states=16_384, vocab_size=4096, branching=8, max_length=256, batch_size=256, learning_rate=1e-3,
    warmup_steps=150, target=4.0, tune_learning_rate=3e-4, tune_rows=256, replay_rows=64, replay_pool=65_536,
    max_steps=5000, eval_steps=100,
    sizes=(
        Size("5.8M", 10_000.0, (0.3, *WIDE)), Size("12M", 1000.0, WIDE), Size("21M", 316.2278, WIDE),
        Size("32M", 316.2278, WIDE), Size("46M", 316.2278, WIDE),
    ),
)  # fmt: skip
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
    "paper": Scale(
        world=FULL, same_loss=3.0, lengths=(10, 31.6228, 100, 316.2278, 1000, 3162.2777, 10_000),
        shares=(0.05, 0.1, 0.25, 0.5, 0.75), frontier_lengths=(17.7828, 10_000),
    ),
}  # fmt: skip
