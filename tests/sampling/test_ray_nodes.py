"""Two nodes of a Ray cluster on this machine, one of which is lost: rows and parts of a study go to the other."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_engines import SETTINGS, contents, needs_ray, sample_on, whole  # noqa: F401

from experiments.program import make_on_ray
from retain.models.loading import load_model

pytestmark = [pytest.mark.slow, needs_ray]


@pytest.fixture
def lose_a_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A cluster of two nodes of one CPU each, and what takes the second away."""
    ray, utils = importlib.import_module("ray"), importlib.import_module("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield lambda: cluster.remove_node(second, allow_graceful=False)
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_loses_no_rows(lose_a_node, llama_folder, whole, tmp_path):  # noqa: F811
    from retain.sampling.ray_workers import ray_engine

    told: list[int] = []

    def progress(rows: int) -> None:
        told.append(rows)
        if len(told) == 2:  # of six
            lose_a_node()

    load = partial(load_model, str(llama_folder), dtype=torch.float32)
    with ray_engine(load, max_length=64, seed=0, num_workers=2) as engine:
        sample_on(engine, llama_folder, tmp_path, progress=progress)
    assert sum(told) == SETTINGS["num_rows"]
    assert contents(tmp_path) == contents(whole)


def test_what_a_lost_node_makes_of_a_study_is_made_by_the_other(lose_a_node, tmp_path):
    begun, made = tmp_path / "begun", tmp_path / "made"
    made.mkdir()
    head = importlib.import_module("ray").get_runtime_context().get_node_id()

    def note(name: str, part: Any) -> None:
        if importlib.import_module("ray").get_runtime_context().get_node_id() != head:
            begun.write_text(f"{name}-{part}")
            time.sleep(600)  # it is lost meanwhile
        deadline = time.monotonic() + 120
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # the other node has begun
        (made / f"{name}-{part}").touch()

    def lose_it_at_work() -> None:
        deadline = time.monotonic() + 120
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        lose_a_node()

    thread = threading.Thread(target=lose_it_at_work)
    thread.start()
    make_on_ray(note, "laptop", range(6), workers=2)
    thread.join()
    names = {path.name for path in made.iterdir()}
    assert names == {f"laptop-{part}" for part in range(6)}
    assert begun.read_text() in names


def test_what_kills_worker_after_worker_ends_the_work(lose_a_node):
    from retain.sampling.ray_workers import MAX_LOSSES, ray_workers

    with ray_workers(lambda: lambda item: os._exit(1) if item else item, num_workers=1) as spread:
        found = spread([0, 1])
        assert next(found) == (0, 0)
        with pytest.raises(ValueError, match=f"^engine: {MAX_LOSSES} Ray workers were lost with the same work"):
            next(found)
