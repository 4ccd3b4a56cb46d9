"""Read a model's answers from the logs of lm-evaluation-harness and of Inspect (inspect-ai).

Written for lm_eval 0.4.13. A line of a per-sample file (`--log_samples`, `lm_eval.result_schema.SampleResult`) has
`doc_id`, `target`, `arguments`, `filtered_resps`, `filter`, `doc_hash`, `prompt_hash`, and a number for each metric. A
multiple-choice response is `[log-likelihood, is_greedy]` per choice; any other is text.

Written for inspect-ai 0.3.285. A `.json` log is an `EvalLog`. An `.eval` log is a ZIP archive of `header.json`, the
same without samples, and one `EvalSample` per `samples/ID_epoch_N.json`. Its members are compressed with Deflate or
with Zstandard, which Python's zipfile cannot read before 3.14.
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

ANSWER_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # metrics that score a single answer
LOG_REMEDY = "give an .eval or .json log written by inspect eval (lm-eval's end in .jsonl)"
LOG_SHAPE = {"eval": {"task": str, "model": str, "model_args?": {}}, "status": str}
SAMPLE_SHAPE = {
    "id": (str, int), "epoch": int, "input": (str, list), "target": (str, list),
    "messages?": [{"role": str}], "output?": {"completion?": str},
    "scores?": {str: {"value": (str, int, float, bool, list, dict), "answer?": str}},
}  # fmt: skip
GRADES = {"C": 1, "I": 0, "N": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}  # as Inspect's `value_to_float` reads them
GRADE_WORDS = {"yes": 1, "true": 1, "no": 0, "false": 0}  # looked up in lower case
ZSTANDARD = 93  # the compression method in the ZIP specification


def read_samples(path: Path) -> AnswerFile:
    """Read the answers in a per-sample file of lm-evaluation-harness, by metric and filter.

    Raises:
        ValueError: one line naming file and line, if it is not such a file, repeats a question, or holds a number that
            is not finite.
    """
    answers: dict[str, dict[Hashable, Answered]] = {}
    seen: set[tuple[str, Any]] = set()
    for where, row in json_rows(path, "pair"):
        if not {"doc_id", "target", "filtered_resps"} <= set(row):
            raise ValueError(f"{where} is not an lm-eval sample; give a file written by lm_eval --log_samples")
        filter_name, doc_id = str(row.get("filter", "none")), row["doc_id"]
        if (filter_name, doc_id) in seen:
            raise ValueError(f"{where} repeats doc_id {doc_id!r}; give the file of a single run")
        seen.add((filter_name, doc_id))
        responses = row["filtered_resps"] if isinstance(row["filtered_resps"], list) else []
        scores = [response[0] for response in responses if isinstance(response, list) and response]
        metrics = [metric for metric in ANSWER_METRICS if metric in row]
        for value in (*scores, *(row[metric] for metric in metrics)):
            if str(value).lower().lstrip("-") in ("nan", "inf", "infinity"):  # numbers or strings
                raise ValueError(f"{where} holds {value}, which is not a result; evaluate that model again in float32")
        question = {key: row.get(key) for key in ("doc_hash", "target_hash")}
        for metric in metrics:
            rule = metric if filter_name == "none" else f"{metric} ({filter_name})"
            answer = Answered(answer_of(row, metric), row[metric] == 1, question, row.get("prompt_hash"))
            answers.setdefault(rule, {})[doc_id] = answer
    if not seen:
        raise ValueError(f"pair: {str(path)!r} is empty; give a file written by lm_eval --log_samples")
    return AnswerFile("lm-eval", task_of(path), path.parent.name or path.stem, str(path), answers)


def task_of(path: Path) -> str:
    """The task in a file's name: `arc_easy` for `samples_arc_easy_2026-11-01T10-00-00.123456.jsonl`."""
    name = path.stem.removeprefix("samples_")
    task, _, date = name.rpartition("_")
    return task if task and date[:1].isdigit() else path.stem


def answer_of(row: dict[str, Any], metric: str) -> Hashable | None:
    """The answer that a metric scored: the index of the likeliest choice, or the text; None if the row does not tell.

    A choice must agree with the metric's own number, or None is returned.
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
    if all(choice.startswith(" ") for choice in choices):  # lm-eval does not count the space before an answer
        choices = [choice[1:] for choice in choices]
    if len(choices) != len(scores) or not all(choices):
        return None
    sizes = {"acc": [1] * len(choices), "acc_norm": list(map(len, choices)),
             "acc_bytes": [len(choice.encode("utf-8", "replace")) for choice in choices]}  # fmt: skip
    answer = int((scores / np.array(sizes[metric], float)).argmax())
    target = str(row["target"])
    right = {int(target)} if target.isdecimal() else set()
    right |= {choices.index(target)} if target in choices else set()
    agrees = not right or any((answer == index) == (row[metric] == 1) for index in right)
    return answer if agrees else None


def read_log(path: Path) -> AnswerFile:
    """Read the first epoch's answers in a log of Inspect, by scorer.

    Raises:
        ValueError: one line naming the file, if it is not such a log or has no scored answers.
    """
    samples = _read_archive(path) if path.suffix.lower() == ".eval" else _read_object(path)
    log, where = next(samples), f"pair: {str(path)!r} is not a log of inspect"
    check_shape(log, LOG_SHAPE, where, LOG_REMEDY)
    answers: dict[str, dict[Hashable, Answered]] = {}
    epochs = 1
    for sample in samples:
        check_shape(sample, SAMPLE_SHAPE, where, LOG_REMEDY)
        epochs = max(epochs, sample["epoch"])
        for scorer, score in (sample.get("scores") or {}).items() if sample["epoch"] == 1 else ():
            if score["value"] == score["value"]:  # NaN means that it was not scored
                answers.setdefault(scorer, {})[sample["id"]] = answered(sample, score)
    if not answers:
        raise ValueError(
            f"pair: {str(path)!r} (status {log['status']}) has no scored samples; give the log of a complete run"
        )
    notes = [f"Only the first of {epochs} epochs counts: answers to one question are not independent."] * (epochs > 1)
    notes += [f"The run of {path.name} did not succeed (status {log['status']})."] * (log["status"] != "success")
    model = str((log["eval"].get("model_args") or {}).get("model_path") or log["eval"]["model"])  # path for hf/local
    return AnswerFile("inspect", log["eval"]["task"], model, f"{model} ({path})", answers, notes)


def answered(sample: dict[str, Any], score: dict[str, Any]) -> Answered:
    """A scored sample; its answer is the one that the scorer extracted, else the whole completion."""
    grade = score["value"]
    if isinstance(grade, str):
        grade = GRADES.get(grade, GRADE_WORDS.get(grade.lower()))
    known = isinstance(grade, int | float) and grade in (0, 1)
    answer = score.get("answer")
    answer = answer if answer is not None else (sample.get("output") or {}).get("completion")
    turns = takewhile(lambda turn: turn["role"] != "assistant", sample.get("messages") or [])
    question = {"input": _message_content(sample["input"]), "target": json.dumps(sample["target"])}
    question |= {"choices": json.dumps(sample["choices"])} if sample.get("choices") else {}
    return Answered(answer if known else None, known and grade == 1, question, _message_content(list(turns)))


def _message_content(messages: str | list[Any]) -> str:
    """A text, or the roles and contents of messages, whose ids differ between runs, as JSON."""
    if not isinstance(messages, str):
        messages = [[turn.get("role"), turn.get("content")] for turn in messages]
    return json.dumps(messages)


def _read_object(path: Path) -> Iterator[Any]:
    """The log in a JSON file, then each of its samples."""
    log = read_json(path, "pair", LOG_REMEDY)
    yield log
    yield from log.get("samples") or []


def _read_archive(path: Path) -> Iterator[Any]:
    """The header of an archived log, then each of its samples."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"pair: cannot read {str(path)!r}: {first_line(error)}; {LOG_REMEDY}") from error
    with archive:
        members = {member.filename: member for member in archive.infolist()}
        if "header.json" not in members:
            raise ValueError(f"pair: {str(path)!r} has no header.json because its run did not end; {LOG_REMEDY}")
        yield _read_member(archive, members["header.json"])
        for name, member in members.items():
            if name.startswith("samples/") and name.endswith(".json"):
                yield _read_member(archive, member)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """The parsed JSON of an archive member."""
    path = str(archive.filename)
    try:
        if member.compress_type != ZSTANDARD:
            return json.loads(archive.read(member))
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)  # lengths of the local header's last two fields
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            packed = file.read(member.compress_size)
        return json.loads(pyarrow.decompress(packed, member.file_size, codec="zstd", asbytes=True))
    except (OSError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        where = f"pair: {member.filename} in {path!r}"
        raise ValueError(f"{where} is damaged: {first_line(error)}; {LOG_REMEDY}") from error
