"""Logs of inspect, paired by question: two that inspect-ai 0.3.285 wrote, and others of its schema made here.

`inspect_logs/` holds a task of four questions with two scorers, answered by its mock model (`mockllm`).
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from retain.cli.main import main
from retain.cli.measure import paired_report
from retain.measuring.answer_files import GRADE_WORDS, GRADES, _read_archive, answered, read_log
from retain.measuring.paired_answers import pair_answers

LOGS = Path(__file__).parent / "inspect_logs"
BASE, TUNED = LOGS / "base.eval", LOGS / "tuned.eval"


def make_sample(number: int, answer: str = "A", grade: Any = "C", **changes: Any) -> dict[str, Any]:
    turns = [{"id": f"m{number}", "role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]
    scores = {"choice": {"value": grade, "answer": answer}}
    return {"id": number, "epoch": 1, "input": f"q{number}", "target": "A", "choices": ["x", "y"], "messages": turns,
            "output": {"completion": answer}, "scores": scores} | changes  # fmt: skip


def write_log(path: Path, samples: list[dict[str, Any]], model: str = "hf/local", **of_log: Any) -> Path:
    log = {"version": 2, "status": "success", "eval": {"task": "mine", "model": model}} | of_log
    if path.suffix.lower() == ".json":
        path.write_text(json.dumps(log | {"samples": samples}))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("header.json", json.dumps(log))
            for one in samples:
                archive.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
    return path


def pair(folder: Path, base: list[dict[str, Any]], tuned: list[dict[str, Any]], suffix: str = ".json") -> dict:
    files = [write_log(folder / f"{name}{suffix}", rows) for name, rows in (("base", base), ("tuned", tuned))]
    return pair_answers(*map(read_log, files))


def test_logs_of_inspect_are_paired_and_agree_with_its_own_accuracy():
    report = paired_report([str(BASE), str(TUNED)])
    exact, includes = (report.results.choices["capitals"].rules[name] for name in ("match", "includes"))
    assert exact.counts == {"right_right": 1, "right_wrong": 1, "wrong_right": 1, "wrong_same": 1, "wrong_other": 0}
    assert includes.counts == {"right_right": 2, "right_wrong": 1, "wrong_right": 1, "wrong_same": 0, "wrong_other": 0}
    for path, side in ((BASE, "base_accuracy"), (TUNED, "accuracy")):
        header = next(_read_archive(path))
        own = {one["name"]: one["metrics"]["accuracy"]["value"] for one in header["results"]["scores"]}
        assert own == {"match": getattr(exact, side).value, "includes": getattr(includes, side).value}
    assert report.data["choices"]["capitals"]["notes"] == []
    assert report.data["base"] == {"model": f"mockllm/base ({BASE})"}


def test_the_command_line_judges_a_pair_of_logs(tmp_path, capsys):
    arguments = ["measure", "--pair", str(BASE), str(TUNED), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--min_agreement", "0.9"]) == 3, "four questions decide nothing"
    said = capsys.readouterr().out
    assert "paired from files of inspect" in said
    assert "capitals (match), same answer 50.0%" in said
    shutil.copy(BASE, tmp_path / "base.jsonl")
    assert main(["measure", "--pair", str(tmp_path / "base.jsonl"), str(TUNED), "--output_dir", str(tmp_path)]) == 1
    assert "base.jsonl' is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".eval"])
def test_both_forms_of_a_log_say_the_same(suffix, tmp_path):
    base = [make_sample(at) for at in range(6)]
    tuned = [make_sample(at, *("B", "I") if at < 2 else ()) for at in range(6)]
    found = pair(tmp_path, base, tuned, suffix)
    assert found["rules"]["choice"]["counts"]["right_wrong"] == 2
    assert found["rules"]["choice"]["agreement"]["value"] == pytest.approx(4 / 6)


def test_an_archive_is_opened_once(tmp_path, monkeypatch):
    """Its directory is as long as the log: with each sample anew, 4,000 of them took 201 seconds."""
    opened = []

    class Opened(zipfile.ZipFile):
        def __init__(self, *given: Any) -> None:
            opened.append(given)
            super().__init__(*given)

    log = write_log(tmp_path / "log.EVAL", [make_sample(at) for at in range(5)])
    monkeypatch.setattr(zipfile, "ZipFile", Opened)
    assert len(read_log(log).answers["choice"]) == 5
    assert len(opened) == 1


def test_epochs_after_the_first_and_copies_are_left_out(tmp_path):
    rows = [make_sample(at, epoch=epoch, input=f"q{at // 2}") for at in range(4) for epoch in (1, 2, 3)]
    found = pair(tmp_path, rows, rows)
    assert found["num_questions"] == 2
    assert found["notes"] == [
        "Only the first of 3 epochs counts: answers to one question are not independent.",
        "2 of 4 questions are copies of others, and left out.",
    ]


def test_samples_that_were_not_scored_are_left_out_and_counted(tmp_path):
    base = [make_sample(at) for at in range(4)]
    tuned = [make_sample(0, grade=float("nan")), make_sample(1, scores=None), make_sample(2), make_sample(3)]
    found = pair(tmp_path, base, tuned)
    assert found["num_questions"] == 2
    assert found["notes"] == ["Left out, since only one file has them: 2 of the base's questions, 0 of the tuned's."]


@pytest.mark.parametrize("grade", ["P", 0.5, {"a": 1}, [1], "good", "c"])
def test_a_score_that_is_neither_right_nor_wrong_is_refused(grade, tmp_path):
    with pytest.raises(ValueError, match="do not tell the answers behind choice; give a task whose answers are right"):
        pair(tmp_path, [make_sample(0)], [make_sample(0, grade=grade)])


def test_grades_are_read_as_inspect_reads_them():
    grades = [*GRADES, *GRADE_WORDS, "YES", True, False, 1, 0.0]
    right = [grade for grade in grades if answered(make_sample(0), {"value": grade, "answer": "A"}).right]
    assert right == ["C", "1", "1.0", "yes", "true", "YES", True, 1]
    assert answered(make_sample(0, "whole text"), {"value": "C"}).answer == "whole text"


def test_a_question_is_known_by_its_words_and_not_by_the_ids_of_its_messages(tmp_path):
    def chat(name: str, words: str = "q", before: str = "") -> list[dict[str, Any]]:
        asked = {"id": name, "role": "user", "content": words}
        return [make_sample(0, input=[asked], messages=[{"role": "system", "content": before}, asked])]

    assert pair(tmp_path, chat("a"), chat("b"))["notes"] == []
    assert "1 of 1 questions have other prompts" in pair(tmp_path, chat("a"), chat("b", before="Hi."))["notes"][0]
    with pytest.raises(ValueError, match=r"question 0 is not the same in both files \(input differs\)"):
        pair(tmp_path, chat("a"), chat("b", "other"))
    with pytest.raises(ValueError, match=r"\(choices differs\)"):
        pair(tmp_path, [make_sample(0)], [make_sample(0, choices=["y", "x"])])


def test_a_local_model_is_named_by_its_folder_and_a_run_that_failed_says_so(tmp_path):
    spec = {"task": "mine", "model": "hf/local", "model_args": {"model_path": "out/"}}
    path = write_log(tmp_path / "a.json", [make_sample(0)], status="error", **{"eval": spec})
    found = read_log(path)
    assert (found.name, found.task) == ("out/", "mine")
    assert found.notes == ["The run of a.json did not succeed (status error)."]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", "pair: cannot read '{path}' (not JSON: "),
        ("a.json", b"[]", "pair: '{path}' is not a log of inspect: it is [], not an object; give an .eval"),
        ("a.json", b'{"doc_id": 1}', "pair: '{path}' is not a log of inspect: 'eval' is missing; "),
        ("a.eval", b"PK", "pair: cannot read '{path}': File is not a zip file; give an .eval or .json log"),
        ("none.eval", None, "pair: cannot read '{path}': [Errno 2] No such file or directory"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(name, content, words, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_log(path)
    assert str(caught.value).startswith(words.replace("{path}", str(path)))
    assert "\n" not in str(caught.value)


def test_damaged_and_empty_logs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(status success\) has no scored samples"):
        read_log(write_log(tmp_path / "a.json", []))
    with pytest.raises(ValueError, match=r"'epoch' is \"1\", not a whole number"):
        read_log(write_log(tmp_path / "a.json", [make_sample(0, epoch="1")]))
    with zipfile.ZipFile(tmp_path / "b.eval", "w") as archive:
        archive.writestr("_journal/start.json", "{}")
    with pytest.raises(ValueError, match="has no header.json because its run did not end"):
        read_log(tmp_path / "b.eval")
    whole = bytearray(BASE.read_bytes())
    with zipfile.ZipFile(BASE) as archive:
        at = archive.getinfo("samples/q1_epoch_1.json").header_offset
    whole[at + 60 : at + 200] = bytes(140)
    (tmp_path / "c.eval").write_bytes(whole)
    with pytest.raises(ValueError, match=r"samples/q1_epoch_1.json in '.*c.eval' is damaged: "):
        read_log(tmp_path / "c.eval")
