"""A model's answers in the files of other evaluation programs: lm-evaluation-harness, and Inspect (inspect-ai).

Written for lm_eval 0.4.13. A line of a per-sample file (`--log_samples`, `lm_eval.result_schema.SampleResult`) has
`doc_id`, `target`, `arguments`, `filtered_resps`, `filter`, `doc_hash`, `prompt_hash`, and a number for each metric. A
multiple-choice response is `[log-likelihood, is_greedy]` per choice; any other is text.

Written for inspect-ai 0.3.285. A `.json` log is an `EvalLog`. An `.eval` log is a ZIP archive of `header.json`, the
same without samples, and an `EvalSample` in each `samples/ID_epoch_N.json`. Its members are deflated, or packed with
Zstandard, which Python's zipfile reads from 3.14 on.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Hashable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from retain.data.row_files import json_rows
from retain.files import check_shape, first_line, read_json
from retain.measuring.paired_answers import Answered, AnswerFile

ANSWER_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # those that judge one answer by itself
LOG_REMEDY = "give a log that inspect eval wrote, .eval or .json (those of lm-eval end in .jsonl)"
LOG_SHAPE = {"eval": {"task": str, "model": str, "model_args?": {}}, "status": str}
SAMPLE_SHAPE = {
    "id": (str, int), "epoch": int, "input": (str, list), "target": (str, list),
    "messages?": [{"role": str}], "output?": {"completion?": str},
    "scores?": {str: {"value": (str, int, float, bool, list, dict), "answer?": str}},
}  # fmt: skip
GRADES = {"C": 1, "I": 0, "N": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}  # as `value_to_float` there reads them
GRADE_WORDS = {"yes": 1, "true": 1, "no": 0, "false": 0}  # in any case
ZSTANDARD = 93  # the compression method in the ZIP specification


def read_samples(path: Path) -> AnswerFile:
    """The answers of a per-sample file by metric and filter.

    Raises:
        ValueError: one line naming the file and the line, for what is not such a file, holds a question twice, or a
            number that is not finite.
    """
    answers: dict[str, dict[Hashable, Answered]] = {}
    seen: set[tuple[str, Any]] = set()
    for where, row in json_rows(path, "pair"):
        if not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise ValueError(f"{where} is not a sample of lm-eval; give a file that lm_eval --log_samples wrote")
        name, number = str(row.get("filter", "none")), row["doc_id"]
        if (name, number) in seen:
            raise ValueError(f"{where} has doc_id {number!r} a second time; give a file of one run")
        seen.add((name, number))
        responses = row["filtered_resps"] if isinstance(row["filtered_resps"], list) else []
        numbers = [one[0] for one in responses if isinstance(one, list) and one]  # log-likelihoods; else texts
        metrics = [metric for metric in ANSWER_METRICS if metric in row]
        for value in (*numbers, *(row[metric] for metric in metrics)):
            if str(value).lower().lstrip("-") in ("nan", "inf", "infinity"):  # also where they were written as text
                raise ValueError(f"{where} has {value}, which is no result; evaluate that model again, in float32")
        question = {key: row.get(key) for key in ("doc_hash", "target_hash")}
        for metric in metrics:
            found = Answered(answer_of(row, metric), row[metric] == 1, question, row.get("prompt_hash"))
            answers.setdefault(metric if name == "none" else f"{metric} ({name})", {})[number] = found
    if not seen:
        raise ValueError(f"pair: {str(path)!r} is empty; give a file that lm_eval --log_samples wrote")
    return AnswerFile("lm-eval", task_of(path), path.parent.name or path.stem, str(path), answers)


def task_of(path: Path) -> str:
    """`arc_easy` of `samples_arc_easy_2026-11-01T10-00-00.123456.jsonl`; else the file's own name."""
    name = path.stem.removeprefix("samples_")
    task, _, date = name.rpartition("_")
    return task if task and date[:1].isdigit() else path.stem


def answer_of(row: dict[str, Any], metric: str) -> Hashable | None:
    """The answer that a metric judged: the index of the likeliest choice, or the text; None where it does not follow.

    The metric's own number must agree: else the choices' lengths, say, are not those of the file's continuations.
    """
    responses = row["filtered_resps"]
    if not isinstance(responses, list) or not responses or row[metric] not in (0, 1):
        return None
    if metric == "exact_match":
        return responses[0] if isinstance(responses[0], str) else None
    try:
        scores = np.array([float(response[0]) for response in responses])
        arguments = row["arguments"].values() if isinstance(row["arguments"], dict) else row["arguments"]
        choices = [pair["arg_1"] if isinstance(pair, dict) else pair[1] for pair in arguments]
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    if all(choice.startswith(" ") for choice in choices):  # the space between question and answer is not counted
        choices = [choice[1:] for choice in choices]
    if len(choices) != len(scores) or not all(choices):
        return None
    sizes = {"acc": [1] * len(choices), "acc_norm": list(map(len, choices)),
             "acc_bytes": [len(choice.encode("utf-8", "replace")) for choice in choices]}  # fmt: skip
    answer = int((scores / np.array(sizes[metric], float)).argmax())
    target = str(row["target"])
    right = {int(target)} if target.isdecimal() else set()
    right |= {choices.index(target)} if target in choices else set()
    agrees = not right or any((answer == one) == (row[metric] == 1) for one in right)
    return answer if agrees else None


def read_log(path: Path) -> AnswerFile:
    """The answers of a log by scorer: of each question those of the first epoch.

    Raises:
        ValueError: one line naming the file, for what is no such log, or one without answers that were scored.
    """
    samples = _read_archive(path) if path.suffix.lower() == ".eval" else _read_object(path)
    log, where = next(samples), f"pair: {str(path)!r} is no log of inspect"
    check_shape(log, LOG_SHAPE, where, LOG_REMEDY)
    answers: dict[str, dict[Hashable, Answered]] = {}
    epochs = 1
    for sample in samples:
        check_shape(sample, SAMPLE_SHAPE, where, LOG_REMEDY)
        epochs = max(epochs, sample["epoch"])
        for scorer, score in (sample.get("scores") or {}).items() if sample["epoch"] == 1 else ():
            if score["value"] == score["value"]:  # NaN: it could not be scored
                answers.setdefault(scorer, {})[sample["id"]] = answered(sample, score)
    if not answers:
        raise ValueError(
            f"pair: {str(path)!r} (status {log['status']}) has no scored samples; give a log of a whole run"
        )
    notes = [f"Of {epochs} epochs the first alone counts: answers to one question are not independent."] * (epochs > 1)
    notes += [f"The run of {path.name} did not end well (status {log['status']})."] * (log["status"] != "success")
    model = str((log["eval"].get("model_args") or {}).get("model_path") or log["eval"]["model"])  # of hf/local
    return AnswerFile("inspect", log["eval"]["task"], model, f"{model} ({path})", answers, notes)


def answered(sample: dict[str, Any], score: dict[str, Any]) -> Answered:
    """A scored sample: the scorer's own reading of the answer, else all that the model wrote."""
    grade = score["value"]
    if isinstance(grade, str):
        grade = GRADES.get(grade, GRADE_WORDS.get(grade.lower()))
    known = isinstance(grade, int | float) and grade in (0, 1)
    answer = score.get("answer")
    answer = answer if answer is not None else (sample.get("output") or {}).get("completion")
    turns = takewhile(lambda turn: turn["role"] != "assistant", sample.get("messages") or [])
    question = {"input": _words(sample["input"]), "target": json.dumps(sample["target"])}
    question |= {"choices": json.dumps(sample["choices"])} if sample.get("choices") else {}
    return Answered(answer if known else None, known and grade == 1, question, _words(list(turns)))


def _words(messages: str | list[Any]) -> str:
    """A text, or messages without the numbers that every run gives them anew."""
    shown = messages if isinstance(messages, str) else [[one.get("role"), one.get("content")] for one in messages]
    return json.dumps(shown)


def _read_object(path: Path) -> Iterator[Any]:
    """A log without its samples, then each of them."""
    log = read_json(path, "pair", LOG_REMEDY)
    yield log
    yield from log.get("samples") or []


def _read_archive(path: Path) -> Iterator[Any]:
    """The same of an archive."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"pair: cannot read {str(path)!r}: {first_line(error)}; {LOG_REMEDY}") from error
    with archive:
        members = {one.filename: one for one in archive.infolist()}
        if "header.json" not in members:
            raise ValueError(f"pair: {str(path)!r} has no header.json, its run has not ended; {LOG_REMEDY}")
        yield _read_member(archive, members["header.json"])
        for name, member in members.items():
            if name.startswith("samples/") and name.endswith(".json"):
                yield _read_member(archive, member)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """The JSON in a member of an archive."""
    path = str(archive.filename)
    try:
        if member.compress_type != ZSTANDARD:
            return json.loads(archive.read(member))
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)  # of the local header, where the sizes of its last two fields stand
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            packed = file.read(member.compress_size)
        return json.loads(pyarrow.decompress(packed, member.file_size, codec="zstd", asbytes=True))
    except (OSError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        where = f"pair: {member.filename} in {path!r}"
        raise ValueError(f"{where} is damaged: {first_line(error)}; {LOG_REMEDY}") from error
