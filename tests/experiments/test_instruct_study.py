"""The instruct studies: verdicts go with their rows, undecided ones too; one arm end to end on a tiny random model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_model, make_texts, make_tokenizer

from experiments.study_10_instruct import data, report, runs
from experiments.study_12_self_generated_chat import report as chat
from experiments.study_12_self_generated_chat import run as chat_run


def row(arm: str, kl: float, changed: int, *, lost: int = 0, seed: int = 0, reached: bool = True) -> dict[str, Any]:
    """A run with so much divergence on every text, and so many of a hundred answers changed."""
    spread = random.Random(0)
    tokens, noise = [100] * 12, [spread.uniform(0.9, 1.1) for _ in range(12)]
    sums = {"ref_kl": [100 * kl * one for one in noise], "forgetting": [50 * kl * one for one in noise]}
    texts = {name: {"num_tokens": tokens, **sums} for name in ("own documents", "own chats", "web text", "real chats")}
    tuned = "".join("1" if at < changed else "0" for at in range(100))
    right = "".join("0" if at < lost else "2" for at in range(100))
    return {
        "settings": {"arm": arm, "seed": seed, "learning_rate": 1e-4},
        "reached": reached,
        "trajectory": [[0, 3.2], [9, 2.4 if reached else 3.0]],
        "texts": texts,
        "choices": {"science": {"right": right, "base": "0" * 100, "tuned": tuned}},
    }


def turns(ended: int) -> dict[str, Any]:
    return {
        "settings": {"length": 256}, "rows": 96, "user_turns_ended": ended, "answers_opened": ended,
        "answers_ended": ended // 2, "user_turn_tokens": [20] * ended, "examples": ["What is\nit?", "`x`"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kl", "changed", "lost", "word"),
    [(0.2, 60, 60, "yes, by"), (0.1, 30, 0, "cannot tell"), (0.05, 10, 0, "no: better"), (0.2, 2, 0, "mixed: worse")],
)
def test_ntp_on_real_text_is_judged_by_its_intervals(kl: float, changed: int, lost: int, word: str) -> None:
    rows = [row("plain", 0.1, 30), row("NTP, real", kl, changed, lost=lost)]
    assert f"worse than no replay? {word}" in report.verdict(rows)


def test_what_keeps_most_and_what_is_not_told_apart() -> None:
    rows = [row("plain", 0.1, 30), row("KL, self-generated", 0.02, 10), row("KL, real", 0.02, 10)]
    assert "ref_kl on web text: KL, self-generated (not told apart from it: KL, real)" in report.verdict(rows)
    assert report.verdict(rows[:1]).startswith("Verdict: none yet")
    assert report.verdict([]).startswith("Verdict: none yet")
    text = report.report(rows, ["plain", "KL, self-generated", "KL, real", "NTP, real"])
    assert "Not run yet: NTP, real." in text
    assert "| KL, real − KL, self-generated | +0.000 [+0.000, +0.000] (open)" in text


def test_only_what_learned_is_compared() -> None:
    rows = [row("LoRA, high rate", 0.05, 20), row("plain", 0.1, 30)]
    rows.append(row("KL, real chats", 0.01, 0, reached=False))
    assert list(report.compared(rows)) == ["plain", "LoRA, high rate"]
    assert "| KL, real chats | 0.0001 | 9 | 3.000: too little learned | – |" in report.table_of_arms(rows)


def test_several_seeds_widen_the_interval() -> None:
    one, other = row("plain", 0.1, 30), row("plain", 0.3, 30, seed=1)
    measure = report.MEASURES["ref_kl on web text"]
    value, low, high = report.value_of([one, other], measure)
    assert value == pytest.approx((report.value_of([one], measure)[0] + report.value_of([other], measure)[0]) / 2)
    assert low < 0.1
    assert high > 0.3


def test_a_share_of_answers_is_not_negative() -> None:
    rows = [row("plain", 0.1, changed, seed=seed) for seed, changed in enumerate((1, 2, 12))]
    value, low, high = report.value_of(rows, report.MEASURES["answers changed"])
    assert (value, low) == (pytest.approx(0.05), 0.0)
    assert high > 0.15
    assert report.value_of(rows, report.MEASURES["ref_kl on web text"]).low > 0


def test_claims_are_corrected_for_three_draws() -> None:
    """Differences to plain of which Student's t is 4.6, as study 10 had: 5% at one look, not at three."""

    def said(differences: tuple[float, ...], arm: str = "NTP, real") -> str:
        rows = [row("plain", 0.2, 0, seed=seed) for seed in range(3)]
        rows += [row(arm, 0.2 + one, 0, seed=seed) for seed, one in enumerate(differences)]
        return report.claims(report.compared(rows))

    assert "worse than no replay: **cannot tell** (" in said((0.115, 0.065, 0.06))
    assert "+0.081 [+0.005, +0.158]" in said((0.115, 0.065, 0.06)), "the interval that is not corrected leaves out 0"
    assert "corrected for three draws [-0.0" in said((0.115, 0.065, 0.06))
    assert "worse than no replay: **reproduced in divergence** (" in said((0.08, 0.085, 0.075))


@pytest.mark.parametrize(("ended", "word"), [(90, "Yes, mostly"), (0, "Hardly ever"), (45, "Partly")])
def test_whether_user_turns_end(ended: int, word: str) -> None:
    assert f"by itself? {word}: {ended} of 96" in chat.turns_verdict([turns(ended)])


@pytest.mark.parametrize(("kl", "word"), [(0.01, "yes"), (0.1, "cannot tell"), (0.3, "no, worse")])
def test_whether_own_chats_are_of_use(kl: float, word: str) -> None:
    rows = [row("plain", 0.1, 30), row(chat.DOCUMENTS, 0.05, 20), row(chat.CHATS, kl, 20), row(chat.MIX, 0.02, 15)]
    assert f"better than no replay? {word} (" in chat.report([turns(80)], rows)
    assert "no verdict yet" in chat.report([], rows[:2])


def test_turns_are_read_from_tokens() -> None:
    turn_of, opening = chat_run.turn_of, [7, 8]
    assert turn_of([3, 4, 5], 2, opening) == (None, False, False)
    assert turn_of([3, 2, 7, 8, 5], 2, opening) == (1, True, False)
    assert turn_of([3, 2, 7, 8, 5, 2], 2, opening) == (1, True, True)
    assert turn_of([3, 2, 9, 5, 2], 2, opening) == (1, False, False)


def test_figures(tmp_path: Path) -> None:
    rows = [row(arm, 0.1 / (1 + at), 30 - at) for at, arm in enumerate(chat.ARMS_COMPARED)]
    report.draw(rows, tmp_path / "instruct.png")
    chat.draw([turns(80)], rows, tmp_path / "chat.png")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 10_000


@pytest.mark.program
def test_an_arm_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model learns rows of one text to the gain asked, is measured, and its row can be reported."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    cut = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in make_texts(48)]
    rows = [[0, *ids[:15]] for ids in cut]
    documents = data.token_documents(rows[40:], tokenizer)
    turns = [tokenizer(f"<|im_start|>user\n{text}<|im_end|>")["input_ids"] for text in make_texts(3)]
    given = len(tokenizer("<|im_start|>user\n")["input_ids"])
    chats = data.token_documents(turns, tokenizer, [given] * len(turns))
    questions = [data.Question("the fox", ("jumps", "sings"), 0), data.Question("the dog", ("is lazy", "rain"), 1)]
    pools = data.Pools(
        train=rows[:32],
        new_task=documents,
        replay={},
        documents={data.WEB: documents},
        questions={"animals": questions},
    )
    load = runs.load_model
    monkeypatch.setattr(runs, "CACHE", tmp_path)
    monkeypatch.setattr(runs, "load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(runs, "load_model", lambda name, **how: load(name, **how) if "/" in name else make_model())
    monkeypatch.setattr(runs, "open_pools", lambda *given: pools)
    written = data.Written({"self": data.ReplayDataset.from_rows(rows[32:40], "rows")}, {data.DOCUMENTS: documents})
    monkeypatch.setattr(runs, "open_own", lambda *given: written)
    monkeypatch.setattr(runs, "open_chats", lambda *given: data.Written({}, {data.OWN_CHATS: chats}))
    scale = replace(runs.SCALES["laptop"], max_length=16, learning_rate=3e-3, target_gain=0.2, max_steps=12)
    place, found = runs.Workplace(scale, 0), []
    for name in ("plain", "KL, self-generated"):
        settings = place.settings(name, runs.ARMS[name])
        assert settings["arm"] == name
        assert ("coef" in settings) == (name != "plain")
        found.append({"settings": settings, **place.run(name, runs.ARMS[name])})
    first, last = found[0]["trajectory"][0], found[0]["trajectory"][-1]
    assert found[0]["reached"]
    assert first[1] - last[1] >= scale.target_gain
    assert last[0] < scale.max_steps
    assert len(found[1]["choices"]["animals"]["tuned"]) == 2
    assert list(found[0]["texts"]) == ["Verilog", data.WEB, data.DOCUMENTS]
    assert "| plain | 0.003 |" in report.table_of_arms(found)
    assert not list((tmp_path / "instruct").glob("run-*"))

    plain = runs.ARMS["plain"]
    anew = place._measured(place._train("", plain)[0], {data.OWN_CHATS: chats})["texts"]
    monkeypatch.setattr(runs.Workplace, "_train", None)  # the model is kept for what study 12 measures
    measured = place.on_chats("plain", plain)
    assert measured["trajectory"] == found[0]["trajectory"]
    assert measured["texts"] == anew
    assert measured["texts"]["own chats"]["num_tokens"] == [len(turn) - given for turn in turns]
    assert min(measured["texts"]["own chats"]["ref_kl"]) > 0


def test_what_is_measured_on_chats_joins_the_row_of_the_same_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study, made = chat_run, []

    class Place:
        seed, scale = 0, runs.SCALES["laptop"]
        settings = runs.Workplace.settings

        def run(self, name: str, arm: Any) -> dict[str, Any]:
            made.append(name)
            return {"trajectory": [[0, 3.0]], "texts": {"own documents": name}}

        def on_chats(self, name: str, arm: Any) -> dict[str, Any]:
            return {"trajectory": [[0, 3.0]], "texts": {"own chats": name}}

    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "INSTRUCT", tmp_path / "ten")
    monkeypatch.setattr(study, "workplace", lambda name, seed: Place())
    monkeypatch.setattr(study, "turns_row", lambda place: turns(3))
    (tmp_path / "ten").mkdir()
    for _ in range(2):
        for part in range(5):
            study.make("laptop", part)
    assert made == list(study.ARMS_COMPARED), "each once"
    assert study.row_of("plain", "laptop", Place())["texts"] == {"own documents": "plain", "own chats": "plain"}
    path = tmp_path / "ten" / "results.jsonl"
    path.write_text(path.read_text().replace("3.0", "2.0"))
    with pytest.raises(ValueError, match="plain, seed 0: chats were measured on a model that learned otherwise"):
        study.row_of("plain", "laptop", Place())


def test_pools_do_not_overlap_and_a_mix_is_half_of_each() -> None:
    rows = data.ReplayDataset.from_rows([[at] * 6 for at in range(8)], "rows", {"model": "x"}, [2] * 8)
    kept, away = data.part(rows, range(6), 4), data.part(rows, range(6, 8), 4)
    assert [row.tolist() for row in (kept[5], away[0])] == [[5] * 4, [6] * 4]
    both = data.mixed(kept, data.ReplayDataset.from_rows([[9] * 4] * 6, "other"))
    assert [int(both[at][0]) for at in range(len(both))] == [0, 9, 1, 9, 2, 9]
    assert both.prefix_lengths.tolist() == [2, 1] * 3
