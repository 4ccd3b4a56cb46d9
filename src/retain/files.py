"""Files of our own, written whole or not at all; the standard library only."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG_FILE = "retain_config.json"  # of a run, beside its metrics.jsonl


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, fsynced and renamed over it on success, removed on failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; broken surrogates, which a model may emit, are written as escapes."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, remedy: str) -> Any:
    """What a JSON file holds, or a `ValueError` of one line: what could not be read, why, and the remedy."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{what}: cannot read {str(path)!r} ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # of which UnicodeDecodeError is one
        raise ValueError(f"{what}: cannot read {str(path)!r} (not JSON: {str(error)[:80]}); {remedy}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file of our own, up to a torn last line; empty where there is no file."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the line that a killed process was writing
                break
    return rows


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row and close the file, so that it outlives the process."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for one writer; the lock goes with the process, however it ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output_dir: another process is writing to {str(folder)!r}; wait for it") from None
        yield
