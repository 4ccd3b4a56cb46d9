"""The finetunes that studies share, at miniature scale: a base of twenty steps, few cells, verdicts of either kind."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import finetunes, matched_loss, program, small_base
from experiments.finetunes import Run, StudyResults
from experiments.study_01_replay_cost import run as cost
from experiments.study_02_baselines import report as baselines_report
from experiments.study_02_baselines import run as baselines
from retain.lab.runner import run_key

TINY = small_base.BaseSettings(
    hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, vocab_size=300, max_length=32, batch_size=8,
    max_steps=20,
)  # fmt: skip
SHORT = finetunes.BenchSettings(max_length=32, num_documents=6, new_task_rows=8, replay_rows=32)
STEPS = {"max_steps": 6, "batch_size": 8, "warmup_steps": 1, "eval_steps": 3, "learning_rate": 3e-3}
PLAIN = Run(**STEPS)


def small_texts() -> small_base.Texts:
    rng = random.Random(0)
    words = [
        "the",
        "state",
        "of",
        "our",
        "union",
        "is",
        "strong",
        "and",
        "every",
        "nation",
        "wishes",
        "peace",
        "with",
        "honor",
        "to",
        "all",
        "its",
        "people",
    ]
    signs = ["module", "wire", "input", "output", "assign", "begin", "end", "always", "posedge", "reg", "logic", "case"]

    def texts(vocabulary: list[str], number: int) -> list[str]:
        return [" ".join(rng.choice(vocabulary) for _ in range(150)) for _ in range(number)]

    return small_base.Texts(texts(words, 40), texts(words, 12), texts(words, 2), texts(signs, 20), texts(signs, 4))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> finetunes.Bench:
    texts = small_texts()
    folder = small_base.make_base(tmp_path_factory.mktemp("base") / "tiny", texts, TINY)
    return finetunes.open_bench(folder, texts, SHORT)


def in_place(monkeypatch: pytest.MonkeyPatch, module: Any, bench: finetunes.Bench, folder: Path) -> None:
    """The study as it is, on the tiny bench and in another folder."""
    monkeypatch.setattr(module, "small_bench", lambda: bench, raising=False)
    monkeypatch.setattr(module, "bench_of", lambda name: bench, raising=False)
    monkeypatch.setattr(module, "HERE", folder)
    (folder / "README.md").write_text("before\n<!-- results: written by run.py -->\n<!-- end of results -->\nafter\n")


def test_base_is_an_ordinary_folder_and_is_made_once(bench: finetunes.Bench) -> None:
    facts = json.loads((bench.folder / "base.json").read_text())
    assert facts["held_out_loss"][-1] < facts["held_out_loss"][0]
    assert bench.tokenizer.bos_token == "<|endoftext|>"
    before = (bench.folder / "model.safetensors").stat().st_mtime_ns
    small_base.make_base(bench.folder, small_texts(), TINY)
    assert (bench.folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        small_base.make_base(bench.folder, small_texts(), replace(TINY, seed=1))


@pytest.mark.program
def test_first_study_runs_resumes_and_reports(
    bench: finetunes.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place(monkeypatch, cost, bench, tmp_path)
    monkeypatch.setattr(cost.pools, "report", lambda: ("", lambda path: None))
    (tmp_path / "pools.md").write_text("<!-- results: written by run.py --><!-- end of results -->")
    monkeypatch.setattr(cost.pools, "make_runs", bool)
    cell = replace(PLAIN, coef=10.0, replay_rows=4)
    monkeypatch.setattr(cost, "RATE", PLAIN.learning_rate)
    monkeypatch.setattr(cost, "rates", lambda: [])
    monkeypatch.setattr(cost, "SEEDS", (0,))
    monkeypatch.setattr(cost, "unprotected", lambda: [PLAIN])
    monkeypatch.setattr(cost, "cells", lambda: [cell])
    monkeypatch.setattr(cost, "timed", lambda: [replace(cell, eval_steps=0)])
    monkeypatch.setattr(cost, "TIMING_ROUNDS", 1)
    monkeypatch.setattr(cost, "TIMED_STEPS", 2)
    cost.main(["--num_workers", "1"])
    first = (tmp_path / "results.jsonl").read_text()
    assert len(first.splitlines()) == 3
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"key": "torn')  # killed while it wrote
    monkeypatch.setattr(cost, "make_trainer", None)  # nor is anything trained again
    monkeypatch.setattr(finetunes, "make_trainer", None)
    cost.main(["--parts", "full", "timing", "--num_workers", "1"])
    assert (tmp_path / "results.jsonl").read_text() == first + '{"key": "torn'
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "full, 1/2, coef 10" in page
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# Whose parts test_baseline_methods.py tests one by one.
SLOW_METHODS = ("EWC", "STM", "plain, embeddings frozen", "plain, embeddings alone", "LoRA, embeddings trained",
                "OSF, embeddings trained")  # fmt: skip


@pytest.mark.program
@pytest.mark.parametrize("left_out", [SLOW_METHODS, pytest.param((), marks=pytest.mark.slow)], ids=["most", "all"])
def test_second_study_runs_every_method(
    bench: finetunes.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: tuple[str, ...]
) -> None:
    scale = baselines.Scale(run=PLAIN, bench=SHORT, texts=small_texts, seeds=2)
    monkeypatch.setattr(baselines, "SCALES", {"laptop": scale})
    in_place(monkeypatch, baselines, bench, tmp_path)
    runs = {
        "plain": [PLAIN],
        "kl": [replace(PLAIN, coef=1.0, replay_rows=2)],
        "L2-SP": [replace(PLAIN, method="l2_sp", strength=0.1)],
        "kl Spanish": [replace(PLAIN, coef=1.0, replay_rows=2)],
        "interpolation": [replace(PLAIN, method="interpolation")],
        "OSF": [replace(PLAIN, method="osf")],
        "CorDA": [replace(PLAIN, method="corda", lora_rank=2)],
        "EWC": [replace(PLAIN, method="ewc", strength=10.0)],
        "EAFT": [replace(PLAIN, method="eaft", strength=1.0)],
        "STM": [replace(PLAIN, method="stm", strength=300.0)],
        "anchor+kl": [replace(PLAIN, anchor_coef=1.0, coef=1.0, replay_rows=2, replay_start=0.5)],
        "plain, embeddings frozen": [replace(PLAIN, method="frozen_embeddings")],
        "plain, embeddings alone": [replace(PLAIN, method="embeddings")],
        "LoRA, embeddings trained": [replace(PLAIN, method="lora_embeddings", lora_rank=2)],
        "OSF, embeddings trained": [replace(PLAIN, method="osf_embeddings")],
    }
    runs = {name: found for name, found in runs.items() if name not in left_out}
    monkeypatch.setattr(baselines, "plan", lambda scale: runs)
    for module in (baselines, baselines_report):
        monkeypatch.setattr(module, "GAIN", 0.2)  # reached by some at their first evaluation
    texts = [" ".join(["cada pueblo busca paz y justicia"] * 20)] * len(bench.replay)
    monkeypatch.setitem(baselines.REAL, "Spanish", lambda _: texts)
    alone = ["--num_workers", "1"]
    baselines.main([*alone, "--runs", "0"])
    baselines.main(alone)
    monkeypatch.setattr(baselines, "finetune", None)  # would fail if a finished run were made again
    monkeypatch.setattr(baselines, "SPECIAL", None)
    baselines.main(alone)
    rows = baselines.rows_of("laptop", bench.fingerprint)
    assert [row["name"] for row in rows] == [name for _ in range(2) for name in runs]
    ends = {(row["name"], row["settings"]["seed"]): row["trajectory"][-1]["step"] for row in rows}
    assert {end for (name, _), end in ends.items() if name != "interpolation"} == {3, 6}
    assert ends["plain", 0] == ends["plain", 1] == 6, "a reference goes all the way"
    page = (tmp_path / "README.md").read_text()
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[::-1]))  # as processes might have finished
    baselines.main(["--report"])
    assert (tmp_path / "README.md").read_text() == page
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "figure.png", "sources.png", "results.jsonl"}
    own, spanish = (row["trajectory"][-1]["eval_loss"] for row in rows[1:4:2])
    assert own != spanish  # other rows were replayed
    for row in rows:
        begin, end = row["trajectory"][0], row["trajectory"][-1]
        assert begin["retention/prose/ref_kl"] == pytest.approx(0, abs=1e-5)
        assert end["eval_loss"] < begin["eval_loss"]


def test_a_key_follows_what_decides_the_result(bench: finetunes.Bench) -> None:
    plain = run_key(PLAIN.settings(), bench.fingerprint)
    assert plain == run_key(replace(PLAIN, replay_rows=7).settings(), bench.fingerprint)  # plays no part
    assert plain != run_key(replace(PLAIN, seed=1).settings(), bench.fingerprint)
    assert plain != run_key(PLAIN.settings(), "another bench")


def synthetic(coef: float, seed: int, left: float, method: str = "full", rows: int = 2) -> dict[str, Any]:
    """A run whose loss falls evenly and whose divergence is `left` of a plain run's."""
    run = replace(PLAIN, method=method, coef=coef, replay_rows=rows, seed=seed, batch_size=32)
    steps, documents = (0, 5, 10), []
    moved = {step: [left * step * (1 + 0.1 * place + 0.01 * seed) for place in range(5)] for step in steps}
    for step in steps:
        values = [round(matched_loss.GRAIN * value) for value in moved[step]]
        documents += [{"step": step, "name": text, metric: values} for text, metric in matched_loss.MEASURES]
    trajectory = [{"step": step, "eval_loss": 5.0 - 0.1 * step} for step in steps]
    return {
        "key": f"{coef} {seed} {rows}",
        "settings": run.settings(),
        "trajectory": trajectory,
        "documents": documents,
    }


def rows_for(left: float, rows: int) -> list[dict[str, Any]]:
    plain = [synthetic(0.0, seed, 1.0) for seed in range(3)]
    return plain + [synthetic(10.0, seed, left, rows=rows) for seed in range(3)]


@pytest.mark.parametrize(
    ("left", "rows", "said"),
    [(0.01, 2, "a step: yes"), (0.2, 2, "a step: no"), (0.01, 16, "a step: no")],
)
def test_first_verdict_goes_with_the_results(left: float, rows: int, said: str) -> None:
    cells, _ = cost.cells_of(rows_for(left, rows), {"full": PLAIN.learning_rate})
    text = cost.verdict(cells)
    assert said in text
    assert said.replace("a step", "to the same loss") in text
    if rows == 16:  # it protects, at two thirds more operations
        assert "The cheapest that prevents as much: full, 1/2, coef 10" in text
    said = {(0.01, 2): "yes", (0.2, 2): "no"}.get((left, rows))  # None within the limit: nothing is said
    assert [one for one, _ in cost.answers(cells, cost.METHODS).values()] == ([said] if said else [])


def test_replay_is_read_beside_the_gentlest_plain_run() -> None:
    """Which ends at 4.5 nats with half of what the usual rate has moved there."""
    rate, gentle = PLAIN.learning_rate, synthetic(0.0, 0, 0.5)
    gentle["settings"]["learning_rate"] = rate / 3
    for place, point in enumerate(gentle["trajectory"]):
        point["eval_loss"] = 5.0 - 0.25 * place
    rows = rows_for(0.01, 2)
    usual = {"full": rate, "lora": rate}
    cells, targets = cost.cells_of([*rows, gentle], usual)
    assert targets["full"] < 4.5
    text = cost.beside_gentler(cells, [*rows, gentle], usual, targets)
    assert "- full, at 4.500 nats" in text
    assert "1/16, coef 10 99%." in text  # 0.01 of 5 steps beside 0.5 of 10
    assert cost.beside_gentler(cells, rows, usual, targets) == "", "no lower rate"


def test_second_verdict_goes_with_the_results() -> None:
    def verdict_of(kl: float, other: float) -> str:
        rows = [{**synthetic(0.0, seed, 1.0), "name": "plain"} for seed in (0, 1)]
        rows += [{**synthetic(10.0, seed, kl), "name": "kl"} for seed in (0, 1)]
        rows += [{**synthetic(1.0, seed, other), "name": "ntp"} for seed in (0, 1)]
        return baselines_report.verdict(baselines.entries_of(rows)[0])

    assert "less than ntp (98% less), plain (99% less)" in verdict_of(0.01, 0.5)
    assert "less than plain (50% less); more than ntp (4900% more)" in verdict_of(0.5, 0.01)
    assert "not clearly different from ntp" in verdict_of(0.5, 0.5)


def test_the_papers_claims_go_with_the_results() -> None:
    def claims_of(left: dict[str, float]) -> str:
        rows = [{**synthetic(0.0, seed, 1.0), "name": "plain"} for seed in (0, 1)]
        for at, (name, share) in enumerate(left.items()):
            rows += [{**synthetic(1.0 + at, seed, share), "name": name} for seed in (0, 1)]
        entries = baselines.entries_of(rows)[0]
        return baselines_report.claims(entries) + baselines_report.beside_paper(entries)

    found = claims_of({"kl": 0.1, "ntp": 0.3, "kl real": 0.1, "ntp real": 0.1, "ntp Spanish": 0.5})
    assert "nearly eliminates forgetting: **direction reproduced, size not** (10% to 10% is left" in found
    assert "on self-generated replay: **reproduced**" in found
    assert "KL keeps more than NTP, on real replay: **cannot tell**" in found
    assert "NTP on such text is worse than no replay: **not reproduced**" in found
    assert "was not trained on" not in found, "one of kl Spanish, ntp Spanish is not there"
    assert "as good as real (KL): **not told apart**" in found
    assert "as good as real (NTP): **real forgets less**" in found
    assert "none would no longer be told apart" in found
    assert "size as well" in claims_of({"kl": 0.02, "ntp": 0.3})
    assert "| kl real | 0.0028 | 2.5% |" in found
    left = {"LoRA": 3.0, "LoRA, embeddings trained": 0.5, "OSF": 1.0, "OSF, embeddings trained": 0.5}
    found = claims_of(left)
    assert "as much learned: **reproduced, each at the lowest rate tried**" in found, "there is no other"
    assert "why LoRA forgets more than plain finetuning: **yes** (" in found
    assert "why OSF forgets more than plain finetuning: **yes, though at that rate it is not shown to" in found


@pytest.mark.parametrize(
    ("frozen", "trained", "answer"),
    [(2.0, 0.9, "yes"), (2.0, 1.5, "in part"), (2.0, 2.5, "no"), (2.0, 2.0, "cannot tell")],
)
def test_why_an_adapter_forgets_goes_with_the_results(frozen: float, trained: float, answer: str) -> None:
    left = {"plain": 1.0, "OSF": frozen, "OSF, embeddings trained": trained}
    rows = [
        {**synthetic(0.1 * at, seed, share), "name": name}
        for at, (name, share) in enumerate(left.items())
        for seed in (0, 1)
    ]
    assert f"are why OSF forgets more than plain finetuning: **{answer}** (" in baselines_report.claims(
        baselines.entries_of(rows)[0]
    )


def test_bases_are_reported_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "HERE", tmp_path)
    for bench, left in (("one", 0.2), ("other", 0.4)):
        rows = [{**synthetic(0.0, seed, 1.0), "name": "plain"} for seed in (0, 1)]
        rows += [{**synthetic(10.0, seed, left), "name": "kl"} for seed in (0, 1)]
        with open(tmp_path / "results.jsonl", "a") as file:
            file.writelines(json.dumps({**row, "bench": bench, "key": f"{bench} {row['key']}"}) + "\n" for row in rows)
    first, second = baselines.report("laptop")[0].split("### Base 2")
    assert "20% is left of plain's" in first
    assert "40% is left of plain's" in second


def test_a_run_that_never_learned_enough_is_not_read() -> None:
    assert matched_loss.read_at(synthetic(0.0, 0, 1.0), 3.9) is None
    reading = matched_loss.read_at(synthetic(0.0, 0, 1.0), 4.25)
    assert reading.step == pytest.approx(7.5)
    assert reading.value("prose", "ref_kl") == pytest.approx(7.5 * 1.2)


def test_interval_is_the_wider_of_seeds_and_documents() -> None:
    cells = [matched_loss.read_at(synthetic(1.0, seed, left), 4.1) for seed, left in enumerate((0.1, 0.3))]
    plain = [matched_loss.read_at(synthetic(0.0, seed, 1.0), 4.1) for seed in (0, 1)]
    found = matched_loss.prevented(cells, plain, "prose", "ref_kl")
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 - 12.706 * 0.1, abs=1e-2)  # t with one degree of freedom


def test_results_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = StudyResults(path, "bench")
    first.make({"a": 1}, lambda: {"value": 2})
    with open(path, "a") as file:
        file.write('{"key"')
    again = StudyResults(path, "bench")
    again.make({"a": 2}, lambda: {"value": 3})
    assert [row["value"] for row in StudyResults(path, "bench").rows.values()] == [2, 3]


def test_no_parts_begin_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = SimpleNamespace(ray_workers=lambda *args, **options: pytest.fail("workers were begun"))
    monkeypatch.setitem(sys.modules, "retain.sampling.ray_workers", begun)
    program.make_on_ray(print, "laptop", [], workers=2)
