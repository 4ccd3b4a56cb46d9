"""Runs made once: keys, rows that several processes append, and what a kill leaves."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

from retain.files import read_jsonl
from retain.lab.runner import RunRows, run_key


def test_a_key_is_that_of_the_settings_alone():
    assert run_key({"a": 1, "b": [2]}, "bench") == run_key({"b": [2], "a": 1}, "bench")
    assert len({run_key({"a": 1}), run_key({"a": 2}), run_key({"a": 1}, "bench"), run_key({"a": "1"})}) == 4
    assert run_key({"a": 1}, "bench") == "787db1d22c1dbed7"


def test_a_row_is_made_once_and_outlives_a_half_written_line(tmp_path: Path):
    path, made = tmp_path / "deep" / "results.jsonl", []

    def compute(value: int) -> dict:
        made.append(value)
        return {"value": value}

    results = RunRows(path)
    assert [results.make("a", lambda: compute(1)), results.make("a", lambda: compute(2))] == 2 * [
        {"key": "a", "value": 1}
    ]
    with open(path, "a") as file:
        file.write('{"key": "b", "val')  # a killed process was writing it
    again = RunRows(path)
    assert again.make("b", lambda: compute(3))["value"] == 3
    again.append({"key": "c", "status": "failed"})
    assert [row["key"] for row in read_jsonl(path)] == ["a", "b", "c"]
    assert set(again.rows) == set(RunRows(path).rows) == {"a", "b"}, "a failed run is tried again"
    assert made == [1, 3]
    assert [one.name for one in path.parent.iterdir()] == ["results.jsonl"], "no lock stays"


def make_rows(path: Path, counted: Path) -> None:
    """What each of several processes does: the same forty runs."""

    def compute() -> dict:
        with open(counted, "a") as file:
            file.write("x")
        time.sleep(0.002)
        return {"filler": "y" * 10_000}

    results = RunRows(path)
    for at in range(40):
        results.make(f"{at}", compute)


def test_processes_share_a_file_and_each_run_is_computed_by_one(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    given = (tmp_path / "results.jsonl", tmp_path / "counted")
    processes = [context.Process(target=make_rows, args=given) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(int(row["key"]) for row in read_jsonl(given[0])) == list(range(40))
    assert len(given[1].read_text()) == 40
