"""Rows of local files: JSON, tables and texts, as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.text import first_line

if TYPE_CHECKING:
    from datasets import Dataset

JSON_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json"), (".parquet", ".csv"), (".txt", ".text", ".md")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)
SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own, which is less than Python's


def read_file(path: Path) -> Dataset:
    """Rows of a file; what a row of JSON holds does not depend on the others.

    Raises:
        ValueError: one line naming the file and, for JSON, the line.
    """
    suffix, name = path.suffix.lower(), repr(str(path))
    if suffix in TABLE_SUFFIXES:
        return _read_table(path, suffix)
    if suffix not in SUFFIXES:
        raise ValueError(f"data: {name} has an unknown ending; use .jsonl, .json, .parquet, .csv or .txt")
    rows = list(_read_json(path, suffix) if suffix in JSON_SUFFIXES else _read_text(path))
    if not any(rows):
        raise ValueError(f"data: {name} is empty; give a file with at least one row")
    return _as_dataset(rows, name)


def _as_dataset(rows: list[dict[str, Any]], name: str) -> Dataset:
    from datasets import Dataset, Json

    columns = dict.fromkeys(key for row in rows for key in row)  # `from_list` would keep the first row's only
    # what TRL takes for a mapping in every row
    empty: dict[str, Any] = {"chat_template_kwargs": {}}
    values = {column: [row.get(column, empty.get(column)) for row in rows] for column in columns}
    refusal = f"data: the rows of {name} do not share one schema"
    try:  # without "use_json", the arguments of one row's tool call would be keys of nulls in every other
        found = Dataset.from_dict(values, on_mixed_types="use_json")
    except Exception as error:  # pyarrow has many ways of saying so
        raise ValueError(f"{refusal}; {first_line(error)}") from error
    for column, kind in found.features.items():
        kinds = sorted({type(value).__name__ for value in values[column] if value is not None})
        if isinstance(kind, Json) and kinds != ["dict"]:
            raise ValueError(f"{refusal}; {column!r} is {' and '.join(kinds)}")
    return found


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {str(path)!r} is not UTF-8 at byte {error.start}; convert it") from error


def _read_text(path: Path) -> Iterator[dict[str, str]]:
    lines: list[str] = []
    # Not splitlines: form feeds and U+2028 are part of the text.
    for line in [*re.split(r"\r\n?|\n", _decoded(path)), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield {"text": "\n".join(lines)}
            lines = []


def _read_json(path: Path, suffix: str) -> Iterator[dict[str, Any]]:
    """The rows of a list, or objects one after another: JSONL, also where one is printed over several lines."""
    text, name = _decoded(path), f"data: {str(path)!r}"
    found = _values(text, name)
    if suffix == ".json" and text.lstrip().startswith("["):
        found = ((f"{name} item {at}", row) for _, rows in found for at, row in enumerate(rows, start=1))
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object; write every row as {{...}}")
        yield row


def _values(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """JSON values one after another, each with the line that it begins in."""
    decoder, at, line = json.JSONDecoder(), 0, 1
    while (begin := SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", at, begin)
        where = f"{name} line {line}"
        try:
            value, at = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON; {first_line(error)}") from error
        yield where, value
        line += text.count("\n", begin, at)


def _read_table(path: Path, suffix: str) -> Dataset:
    from datasets import Dataset
    from pyarrow import csv, parquet

    try:
        table = parquet.read_table(path) if suffix == ".parquet" else csv.read_csv(path, **_as_text(csv))
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others on broken files
        raise ValueError(f"data: cannot read {str(path)!r}; {first_line(error)}") from error
    if not table.num_rows:
        raise ValueError(f"data: {str(path)!r} is empty; give a file with at least one row")
    return Dataset(table)


def _as_text(csv: Any) -> dict[str, Any]:
    """Texts may have line breaks, also where pyarrow's blocks end, and "04" or "true" in their columns is text."""
    texts = dict.fromkeys(("text", "prompt", "completion", "question"), "string")
    return {
        "parse_options": csv.ParseOptions(newlines_in_values=True),
        "convert_options": csv.ConvertOptions(column_types=texts),
    }
