"""Rows of local JSON, table and text files, unchanged.

Errors are one line that names the setting, the file and, for JSON, the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.files import first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

JSON_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json"), (".parquet", ".csv"), (".txt", ".text", ".md")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)
TEXT_COLUMNS = ("text", "prompt", "completion", "question")
JSON_SPACE = re.compile(r"[ \t\r\n]*")  # less than `str.isspace`


def check_path(source: str, field: str) -> None:
    """Refuse a source that can only be a path if nothing is there; a possible Hub id passes.

    Args:
        field: the setting that names the source, for errors.
    """
    path = Path(source).expanduser()
    is_path = path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or source.endswith("/")
    if is_path and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{field}: no file {source!r}; check the path")


def read_file(path: Path, field: str) -> Dataset:
    """Read the rows of a file; the values of a JSON row do not depend on other rows.

    Args:
        field: the setting that names the file, for errors.
    """
    from datasets import Dataset

    suffix, name = path.suffix.lower(), repr(str(path))
    if suffix in TABLE_SUFFIXES:
        table = read_table(path, field, TEXT_COLUMNS)
        if table.num_rows:
            return Dataset(table)
    elif suffix in SUFFIXES:
        rows = [row for _, row in json_rows(path, field)] if suffix in JSON_SUFFIXES else list(_read_text(path, field))
        if any(rows):
            return _as_dataset(rows, name, field)
    else:
        raise ValueError(f"{field}: {name} has an unknown ending; use .jsonl, .json, .parquet, .csv or .txt")
    raise ValueError(f"{field}: {name} is empty; give a file with at least one row")


def json_rows(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file, in one list or one after another as in JSONL, each with its location for errors.

    An object may span several lines.

    Args:
        field: the setting that names the file, for errors.
    """
    text, name = _decoded(path, field), f"{field}: {str(path)!r}"
    located = _json_values(text, name)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        located = ((f"{name} item {at}", row) for _, rows in located for at, row in enumerate(rows, start=1))
    for where, row in located:
        if not isinstance(row, dict):
            remedy = " on its own line, or end the file's name in .json" if isinstance(row, list) else ""
            raise ValueError(f"{where} is not an object; write every row as {{...}}{remedy}")
        yield where, row


def read_table(path: Path, field: str, text_columns: Collection[str]) -> Table:
    """Read a CSV or Parquet file.

    Args:
        field: the setting that names the file, for errors.
        text_columns: columns of a CSV file in which "04" and "true" are text.
    """
    from pyarrow import csv, parquet

    options = {
        "parse_options": csv.ParseOptions(newlines_in_values=True),  # even where pyarrow's blocks end
        "convert_options": csv.ConvertOptions(column_types=dict.fromkeys(text_columns, "string")),
    }
    try:
        table = csv.read_csv(path, **options) if path.suffix.lower() == ".csv" else parquet.read_table(path)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others on broken files
        raise ValueError(f"{field}: cannot read {str(path)!r} ({first_line(error)}); write it again") from error
    if twice := [name for name in table.column_names if table.column_names.count(name) > 1]:
        raise ValueError(f"{field}: {str(path)!r} has several columns {twice[0]!r}; keep one")
    return table


def _as_dataset(rows: list[dict[str, Any]], name: str, field: str) -> Dataset:
    from datasets import Dataset, Json

    columns = dict.fromkeys(key for row in rows for key in row)  # `from_list` keeps only the first row's
    empty: dict[str, Any] = {"chat_template_kwargs": {}}  # TRL expects a mapping in every row
    values = {column: [row.get(column, empty.get(column)) for row in rows] for column in columns}
    refusal, remedy = f"{field}: the rows of {name} do not share one schema", "give each column values of one type"
    try:  # without "use_json", one row's tool arguments would become null keys in all others
        dataset = Dataset.from_dict(values, on_mixed_types="use_json")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ValueError(f"{field}: {name} has {error.object!r:.80}, which is not valid Unicode; correct it") from error
    except Exception as error:  # pyarrow raises many kinds
        raise ValueError(f"{refusal} ({first_line(error)}); {remedy}") from error
    for column, feature in dataset.features.items():
        types = sorted({type(value).__name__ for value in values[column] if value is not None})
        if isinstance(feature, Json) and types != ["dict"]:
            raise ValueError(f"{refusal} ({column!r} is {' and '.join(types)}); {remedy}")
    return dataset


def _decoded(path: Path, field: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {str(path)!r} is not UTF-8 at byte {error.start}; convert it") from error
    except OSError as error:
        raise ValueError(f"{field}: cannot read {str(path)!r}: {error.strerror}; check the path") from error


def _read_text(path: Path, field: str) -> Iterator[dict[str, str]]:
    """Paragraphs between blank lines."""
    lines: list[str] = []
    # Not splitlines: form feeds and U+2028 are part of the text.
    for line in [*re.split(r"\r\n?|\n", _decoded(path, field)), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield {"text": "\n".join(lines)}
            lines = []


def _json_values(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """JSON values one after another, each with the line on which it begins."""
    decoder, end, line = json.JSONDecoder(), 0, 1
    while (start := JSON_SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        where = f"{name} line {line}"
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({first_line(error)}); correct or delete it") from error
        yield where, value
        line += text.count("\n", start, end)
