"""Files of our own, written whole or not at all, and text of others made harmless to look at.

Locks are filelock's, all else the standard library's.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"  # of a run: every log, one object a line
CONFIG_FILE = "retain_config.json"  # beside it
# What a verb leaves in its output_dir, by files that only such a folder has.
OUTPUTS = {
    "replay rows": ("manifest.json",),
    "a training run": (CONFIG_FILE,),
    "a report": ("report.json",),
    "a merged model": ("alphas.jsonl", "merge.json"),
    "a plan": ("pilots.jsonl", "plan.json"),
    "a sweep": ("results.jsonl",),
}
ROW = b'{"key": '  # begins a verb's JSON Lines; its JSON has a schema
LOCK = ".lock"
PART = ".retain-part"  # ends the name of a file that is being written
SAFETENSORS_PART = ".tmp" + "[0-9A-Za-z]" * 6  # of weights that safetensors is writing
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same in the words of torch and safetensors, who raise no OSError; 122 is a quota, 27 a limit on a file's size.
DISK_FULL_WORDS = ("inline_container.cc", "os error 28", "os error 122", "os error 27")
# Shapes of what is read from JSON, for `check_shape`.
MAPPING: dict[Any, Any] = {}
NUMBER = (float, int)
JSON_TYPES = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false"
}  # fmt: skip


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Errors of a full disk with the path, which libraries leave out; some leave out the reason, too."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) and not error.filename else None
        if number not in DISK_FULL and not any(words in str(error) for words in DISK_FULL_WORDS):
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
        with _full_disk_named(path):
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


def read_json(path: Path, field: str, remedy: str) -> Any:
    """The value in a JSON file; an error is one line with the field, the file, the reason and the remedy."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{field}: cannot read {str(path)!r} ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # of which UnicodeDecodeError is one
        raise ValueError(f"{field}: cannot read {str(path)!r} (not JSON: {str(error)[:80]}); {remedy}") from error


def short_names(paths: Sequence[Path], field: str) -> list[str]:
    """A name for each path, also of a folder: as many of its last parts as tell them apart.

    Raises:
        ValueError: for a path that is given twice, in the setting `field`.

    >>> short_names([Path("runs/a"), Path("runs/b")], "model"), short_names([Path("a/end"), Path("../b/end")], "model")
    (['a', 'b'], ['a_end', 'b_end'])
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    for count in range(1, 1 + max(map(len, parts), default=1)):
        names = ["_".join(of_path[-count:]) for of_path in parts]
        if len(set(names)) == len(paths):
            return names
    twice = next(path for path, name in zip(paths, names, strict=True) if names.count(name) > 1)
    raise ValueError(f"{field}: {str(twice)!r} is given twice; leave one of them out")


def read_settings(folder: Path, shape: Any = MAPPING) -> dict[str, Any]:
    """A run's `retain_config.json`; nothing where there is none."""
    path, remedy = folder / CONFIG_FILE, "restore it, or make the run again"
    if not path.is_file():
        return {}
    found: dict[str, Any] = read_json(path, "settings", remedy)
    check_shape(found, shape, f"{str(path)!r} is damaged", remedy)
    return found


def read_jsonl(path: Path, shape: Any = MAPPING) -> list[dict[str, Any]]:
    """Rows of a JSONL file of our own, up to a torn last line; empty where there is no file.

    Args:
        shape: of each row, as `check_shape` takes it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where, remedy = f"{str(path)!r}: line {number} is damaged", "correct or delete the line, or make the file again"
        try:
            row: Any = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # it has no end: a killed process was writing it
                break
            raise ValueError(f"{where} (not JSON: {str(error)[:80]}); {remedy}") from error
        check_shape(row, shape, where, remedy)
        rows.append(row)
    return rows


def is_finite(value: Any) -> bool:
    """Whether no number in a value read from JSON is NaN or infinite, which Python reads and JSON does not know.

    >>> is_finite({"loss": [1.5, None]}), is_finite({"loss": [1.5, float("nan")]})
    (True, False)
    """
    if isinstance(value, dict | list):
        return all(map(is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def check_shape(value: Any, shape: Any, where: str, remedy: str) -> None:
    """Raise a `ValueError` of one line unless a value read from JSON has this shape.

    Args:
        shape: a type, or a tuple of several; `[shape]` for a list of such, `[shape, shape]` for a pair; a dict of keys
            and their shapes, where a key that ends in "?" may be missing or null, other keys are ignored, and `str`
            stands for every key.

    >>> check_shape({"num_rows": "12"}, {"num_rows": int, "model?": str}, "manifest", "sample again")
    Traceback (most recent call last):
    ValueError: manifest: 'num_rows' is "12", not a whole number; sample again
    """
    if found := _misfit(value, shape, ""):
        raise ValueError(f"{where}: {found}; {remedy}")


def _misfit(value: Any, shape: Any, name: str) -> str | None:
    """The first place where a value has another shape, in words."""
    types = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
    place = f"{name[1:]!r} is " if name else "it is "
    if type(value) not in types:
        return f"{place}{json.dumps(value)[:40]}, not {JSON_TYPES[types[0]]}"
    if isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            return f"{place}{json.dumps(value)[:40]}, not {len(shape)} values"
        parts = [(f".{at}", item, shape[0]) for at, item in enumerate(value)]
    elif isinstance(shape, dict) and str in shape:
        parts = [(f".{key}", item, shape[str]) for key, item in value.items()]
    elif isinstance(shape, dict):
        needed = {key: of for key, of in shape.items() if not key.endswith("?") or value.get(key[:-1]) is not None}
        if missing := [key for key in needed if key.removesuffix("?") not in value]:
            return f"{f'{name}.{missing[0]}'[1:]!r} is missing"
        parts = [(f".{key.removesuffix('?')}", value[key.removesuffix("?")], of) for key, of in needed.items()]
    else:
        return None
    return next(filter(None, (_misfit(item, of, name + key) for key, item, of in parts)), None)


def check_writable(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise ValueError(f"{flag}: {str(path)!r} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag}: no folder {str(path.parent)!r}; make it first")


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row and close the file, so that it outlives the process."""
    with _full_disk_named(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def check_model_path(name: str, field: str) -> None:
    """Refuse a model's name that can only be a path, and names nothing; one that the Hub may know passes.

    Args:
        field: the setting that named it.
    """
    is_path = name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/")
    if not name or (is_path and not Path(name).expanduser().exists()):
        raise ValueError(f"{field}: no folder or file {name!r}; give a folder, a GGUF file or a Hub id")


def check_file(name: str, field: str) -> None:
    """Refuse a name of no file.

    Args:
        field: the setting that named it.
    """
    if not Path(name).expanduser().is_file():
        raise ValueError(f"{field}: no file {name!r}; check the path")


def check_output_dir(folder: Path, output: str) -> None:
    """Refuse a folder that holds another verb's output and none of this kind, or a user's file of the same name.

    Args:
        output: what is to be written, a key of `OUTPUTS`.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"output_dir: {str(place)!r} is a file; choose a folder")
    there = [(kind, folder / file) for kind, files in OUTPUTS.items() for file in files if (folder / file).exists()]
    held = {kind: path.name for kind, path in there if _is_output(path)}
    for kind, path in there:
        if kind == output and not _is_output(path):
            raise ValueError(
                f"output_dir: {str(folder)!r} holds a {path.name} that is none of retain's; choose another folder, or "
                "move the file"
            )
    if held and output not in held:
        kind, file = next(iter(held.items()))
        raise ValueError(
            f"output_dir: {str(folder)!r} holds {kind} ({file}), among whose files {output} would lie; choose another "
            "folder"
        )


def _is_output(path: Path) -> bool:
    """Whether a verb wrote a file, as far as its beginning tells; its first row may be half-written."""
    if path.name == CONFIG_FILE:
        return True
    with open(path, "rb") as file:
        head = file.read(2**16)
    return ROW.startswith(head[: len(ROW)]) if path.suffix == ".jsonl" else b'"schema": "retain.' in head


@contextmanager
def exclusive(folder: Path, output: str) -> Iterator[None]:
    """Hold the folder for one writer, and make it where it is missing; the system frees the lock with the process.

    What a killed writer left half-written is removed. A folder that was made here goes if the work fails with nothing
    in it.

    Args:
        output: what is to be written, a key of `OUTPUTS`; a folder that holds another kind alone is refused.
    """
    from filelock import FileLock, Timeout

    check_output_dir(folder, output)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output_dir: another process is writing to {str(folder)!r}; wait for it, or choose another folder"
        ) from None
    try:
        remove_parts(folder)
        with _full_disk_named(folder):
            yield
        new = False  # it stays
    finally:
        with suppress(OSError):  # Windows removes no open file; there filelock does when it lets go
            (folder / LOCK).unlink()
        lock.release()
        if new:
            with suppress(OSError):  # where something was written
                folder.rmdir()


def remove_parts(folder: Path) -> None:
    """Remove files and folders that a killed process was writing; no process may be writing there now."""
    patterns = (f".*{PART}", SAFETENSORS_PART, f"checkpoint-*/{SAFETENSORS_PART}")
    for part in [part for pattern in patterns for part in folder.glob(pattern)]:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """An error in one line: the first line of its message that is not empty, and its type where that is not ours.

    >>> one_line(KeyError("step"))
    "KeyError: 'step' (RETAIN_DEBUG=1 shows where)"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else "no message"
    if isinstance(error, ValueError):
        return message
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename!r}" if error.filename else ""
        return f"{error.strerror}{where}; check the path, its permissions and the space left"
    if any(words in message for words in DISK_FULL_WORDS):
        return "a file could not be written, probably No space left on device; free some space and run it again"
    return f"{type(error).__name__}: {message} (RETAIN_DEBUG=1 shows where)"


# Text that a model or a stranger wrote


def visible(text: str) -> str:
    """The text in one line, every control, bidi-override, surrogate or unassigned character as an escape.

    >>> print(visible("exe\\u202egnp"))
    exe\\u202egnp
    """
    return "".join(map(_visible_char, text))


def visible_text(text: str) -> str:
    """The same for text of several lines: line breaks and tabs stay."""
    return "".join(char if char in "\n\t" else _visible_char(char) for char in text.replace("\r\n", "\n"))


def _visible_char(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
    joiner = char in "\u200c\u200d"  # part of ordinary Persian, Hindi and emoji
    return char.encode("unicode_escape").decode("ascii") if hidden and not joiner else char


def hub_remedy() -> str:
    """What to do where the Hub does not give what was asked for."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return "check the name" + ", and unset HF_HUB_OFFLINE, with which nothing is downloaded" * offline


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
