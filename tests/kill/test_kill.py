"""SIGKILL at random moments of every verb that takes long: the same command ends with the files of an undisturbed run.

RETAIN_KILLS: how many kills altogether (default 100). RETAIN_KILL_SEED: other moments.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killing import CHAIN, Killer, Server, make_kinds, make_world

KILLS = int(os.environ.get("RETAIN_KILLS", "100"))
SEED = int(os.environ.get("RETAIN_KILL_SEED", "0"))
NAMES = [kind.name for kind in make_kinds(Path())]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory, server) -> Path:
    root = make_world(tmp_path_factory.mktemp("world"))
    argv = ["sample", "--model", str(root / "model"), "--num_rows", "24", "--max_length", "24"]
    done = server.run([*argv, "--store_reference", "hidden", "--output_dir", str(root / "stored")], root)
    assert done["code"] == 0, done["said"]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("at", range(len(NAMES)), ids=[name.replace(" ", "-").replace(",", "") for name in NAMES])
def test_killed_at_random_moments(server, world, tmp_path, at):
    kind = make_kinds(world)[at]
    kills = KILLS // len(NAMES) + (at < KILLS % len(NAMES))
    killer = Killer(server, kind, tmp_path, SEED * 1000 + at)
    while killer.kills < kills:
        killer.chain(min(CHAIN, kills - killer.kills))
    counts = f"{killer.kills} kills, {killer.late} too late, {killer.compared} comparisons"
    print(f"\n{kind.name}: {counts}; a run: {killer.seconds:.1f} s, {killer.events} events")
