"""Inspect (inspect-ai): a model's answers in its logs, `.eval` and `.json`.

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

from retain.files import check_shape, first_line, read_json
from retain.measuring.paired_answers import Answered, AnswerFile

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
    import pyarrow

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
