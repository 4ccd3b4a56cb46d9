"""The four lines: each number with its interval, and words that follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retain.report.comparison import compare_at_matched_loss
from retain.report.outcome import cost_line, outcome_lines
from retain.report.results import RunResults, read_as
from retain.report.tables import comparison_table


def entry(value: float, half: float, **more: object) -> dict:
    return {"value": value, "ci": [value - half, value + half], "num_documents": 20, "num_tokens": 900, **more}


def make_run(name: str, kls: dict[str, float], gain: float = 0.5, losses: tuple[float, ...] = ()) -> RunResults:
    """A run of 20 documents; `losses` are its evaluations, one each 10 steps."""
    new = {"loss": entry(2.0 - gain, 0.1), "base_loss": entry(2.0, 0.1), "gain": entry(gain, 0.1)}
    texts = {
        text: {"ref_kl": entry(kl, kl / 10), "loss": entry(3 + kl, 0.1), "base_loss": entry(3, 0.1),
               "forgetting": entry(kl, 0.01)}
        for text, kl in kls.items()
    }  # fmt: skip
    sums = {
        text: {"ref_kl": [kl * (40 + at) for at in range(20)], "loss": [(3 + kl) * (40 + at) for at in range(20)],
               "base_loss": [3.0 * (40 + at) for at in range(20)], "num_tokens": [40.0 + at for at in range(20)]}
        for text, kl in kls.items()
    }  # fmt: skip
    rows = [{"step": 10 * at, "eval_loss": loss, "loss": loss} for at, loss in enumerate(losses)]
    for at, row in enumerate(rows):
        row |= {f"retention/{text}/ref_kl": kl * at / (len(rows) - 1) for text, kl in kls.items()}
    documents = [
        {"step": row["step"], "name": text, **of, "ref_kl": [value * at / (len(rows) - 1) for value in of["ref_kl"]]}
        for at, row in enumerate(rows)
        for text, of in sums.items()
    ]
    parts = {"retention": texts, "new_task": {"new task": new}, "per_document": sums, "trajectory": rows}
    return read_as(RunResults, {"name": name, **parts, "documents": documents})


def test_each_line_says_what_moved_most_and_what_was_prevented_least():
    falling = (2.0, 1.7, 1.5)
    plain, run = (
        make_run("plain", {"a": 0.4, "b": 0.2}, losses=falling),
        make_run("p", {"a": 0.1, "b": 0.1}, losses=falling),
    )
    learned, forgotten, prevented = outcome_lines(run, plain)
    assert learned.startswith(
        "learned: loss 2.000 → 1.500 on 20 held-out rows of the new task, lower by 0.500 [0.400, 0.600]"
    )
    assert "ref_kl 0.100 [0.090, 0.110] nats per token on “a”, which moved most of 2 texts" in forgotten
    assert prevented.startswith("prevented: 50.0% [50.0%, 50.0%] of the unprotected run's ref_kl on “b”")
    assert prevented.endswith("the least of 2 texts, at the same new-task loss (1.500)")


def test_without_a_loss_in_common_the_ends_are_compared_and_that_is_said():
    line = outcome_lines(make_run("p", {"a": 0.1}), make_run("plain", {"a": 0.4}))[2]
    assert line.startswith("prevented: 75.0% [75.0%, 75.0%] of")
    assert (
        "at the ends of both runs, where learning less also means forgetting less; no new-task loss was evaluated"
        in line
    )
    assert "while training plain and p (`retain finetune` does it with --eval_dataset_name FILE)" in line


def test_at_the_ends_the_training_losses_say_which_run_learned_more():
    runs = [
        replace(make_run(name, {"a": kl}), trajectory=[{"step": 8, "loss": loss + 1, key: loss}])
        for name, kl, key, loss in (("plain", 0.1, "loss", 2.787), ("p", 0.4, "new_task/loss", 0.752))
    ]
    assert outcome_lines(runs[1], runs[0])[2].endswith("their training loss ended at 2.787 of plain and 0.752 of p")
    assert "their training loss ended at" in compare_at_matched_loss(runs).reason
    unlogged = [runs[0], replace(runs[1], trajectory=[])]
    assert "training loss" not in compare_at_matched_loss(unlogged).reason


def test_a_loss_that_no_run_has_takes_no_rows_of_a_table():
    runs = [make_run(name, {"a": 0.1}) for name in ("plain", "p")]
    lossless = [replace(run, new_task={}) for run in runs]
    ends = [comparison_table(compare_at_matched_loss(found), "end") for found in (runs, lossless)]
    assert [[section.title for section in table.sections] for table in ends] == [["new task", "a"], ["a"]]


def test_what_was_not_prevented_is_no_prevention():
    line = outcome_lines(make_run("p", {"a": 0.6}), make_run("plain", {"a": 0.4}))[2]
    assert line.startswith("prevented: nothing, ref_kl is 50.0% [50.0%, 50.0%] above the unprotected run's on “a”")
    moved_nowhere = outcome_lines(make_run("p", {"a": 0.0}), make_run("plain", {"a": 0.0}))[2]
    assert moved_nowhere.startswith("prevented: cannot be judged; undefined: “plain” did not move")


@pytest.mark.parametrize(
    ("gain", "words"), [(-0.5, "it got worse, higher by 0.500 [0."), (0.05, "no learning shown, lower by")]
)
def test_no_learning_is_not_called_learning(gain, words):
    assert words in outcome_lines(make_run("p", {"a": 0.1}, gain=gain))[0]


def test_training_loss_stands_in_where_nothing_is_held_out():
    run = read_as(
        RunResults, {"name": "p", "retention": {}, "trajectory": [{"step": 1, "loss": 3.0}, {"step": 9, "loss": 2.0}]}
    )
    learned, forgotten, prevented = outcome_lines(run)
    assert learned.startswith("learned: training loss 3.000 → 2.000 (logged at steps 1 and 9); no rows were held out")
    assert forgotten.startswith("forgotten: not measured")
    assert "--compare_plain true" in prevented


def test_the_cost_is_beside_an_unprotected_step():
    line = cost_line(0.5, 0.4, [("sampling", 61.2)])
    assert line == "cost: 0.5 s per step, 1.25 times the unprotected run's 0.4 s; sampling 61 s"
    assert cost_line(None, 0.4, []) == "cost: steps were not timed (resumed at the end)"
