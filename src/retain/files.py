"""Files of our own, written whole or not at all; the standard library only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CONFIG_FILE = "retain_config.json"  # of a run, beside its metrics.jsonl
LOCK = ".lock"
PART = ".retain-part"  # ends the name of a file that is being written
# What torch and safetensors say of a full disk, which is not an OSError; 122 is a quota, 27 a limit on a file's size.
DISK_FULL = ("inline_container.cc", "os error 28", "os error 122", "os error 27")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A write that fails for want of space says where: libraries do not, and some do not say why either."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) and not error.filename else None
        if number not in FULL and not any(sign in str(error) for sign in DISK_FULL):
            raise
        number = number or errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, fsynced and renamed over it on success, removed on failure."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
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
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for one writer, and make it where it is not; the lock goes with the process, however it ends.

    What a killed writer left half-written is removed. A folder that was made here goes if the work fails with nothing
    in it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _take(folder)
    try:
        remove_parts(folder)
        with naming(folder):
            yield
    except BaseException:
        if new and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
        raise
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)


def _take(folder: Path) -> int:
    """A handle that holds the folder's lock."""
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"output_dir: another process is writing to {str(folder)!r}; wait for it, or choose another folder"
            ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
        os.close(handle)  # that of a writer which ended in between, and took it away


def hold_together(folder: Path) -> int:
    """Hold the folder beside other writers; the first removes what killed ones left. Returns a handle to be closed."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_parts(folder)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def remove_parts(folder: Path) -> None:
    """Remove files and folders that were being written when their process was killed; none may be at it now."""
    for part in folder.glob(f".*{PART}"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
