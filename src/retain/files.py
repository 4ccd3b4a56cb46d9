"""Files that are written whole or not at all, locks, checks of paths, and untrusted text made safe to print.

Standard library and filelock only.
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

METRICS_FILE = "metrics.jsonl"  # all logs of a run, one JSON object per line
CONFIG_FILE = "retain_config.json"  # the settings of that run
# What a verb writes into its output_dir, and the files that identify it.
OUTPUTS = {
    "replay rows": ("manifest.json",),
    "a training run": (CONFIG_FILE,),
    "a report": ("report.json",),
    "a merged model": ("alphas.jsonl", "merge.json"),
    "a plan": ("pilots.jsonl", "plan.json"),
    "a sweep": ("results.jsonl",),
}
ROW = b'{"key": '  # how a verb's JSONL files begin; its JSON files hold a schema
LOCK = ".lock"
PART = ".retain-part"  # suffix of a file that is being written
SAFETENSORS_PART = ".tmp" + "[0-9A-Za-z]" * 6  # a file that safetensors is writing
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch and safetensors, which raise no OSError, say of a full disk; 122 is EDQUOT, 27 is EFBIG.
DISK_FULL_WORDS = ("inline_container.cc", "os error 28", "os error 122", "os error 27")
# Shapes of JSON values, for `check_shape`.
MAPPING: dict[Any, Any] = {}
NUMBER = (float, int)
JSON_TYPES = {
    dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false"
}  # fmt: skip


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Add the path to errors of a full disk, and the reason where a library leaves that out too."""
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
    """A temporary path in the same folder; on success it is fsynced and renamed to `path`, on failure removed."""
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
    """Write UTF-8 text whole or not at all; lone surrogates, which a model may emit, are written as escapes."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, field: str, remedy: str) -> Any:
    """The value in a JSON file; errors are one line: field, file, reason, remedy."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{field}: cannot read {str(path)!r} ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{field}: cannot read {str(path)!r} (not JSON: {str(error)[:80]}); {remedy}") from error


def short_names(paths: Sequence[Path], field: str) -> list[str]:
    """A unique name for each path, made of as few of its last parts as possible.

    Raises:
        ValueError: if a path of the setting `field` is given twice.

    >>> short_names([Path("runs/a"), Path("runs/b")], "model"), short_names([Path("a/end"), Path("../b/end")], "model")
    (['a', 'b'], ['a_end', 'b_end'])
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    for count in range(1, 1 + max(map(len, parts), default=1)):
        names = ["_".join(path_parts[-count:]) for path_parts in parts]
        if len(set(names)) == len(paths):
            return names
    repeated = next(path for path, name in zip(paths, names, strict=True) if names.count(name) > 1)
    raise ValueError(f"{field}: {str(repeated)!r} is given twice; leave one of them out")


def read_settings(folder: Path, shape: Any = MAPPING) -> dict[str, Any]:
    """The contents of a run's `retain_config.json`, empty if there is none."""
    path, remedy = folder / CONFIG_FILE, "restore it, or make the run again"
    if not path.is_file():
        return {}
    settings: dict[str, Any] = read_json(path, "settings", remedy)
    check_shape(settings, shape, f"{str(path)!r} is damaged", remedy)
    return settings


def read_jsonl(path: Path, shape: Any = MAPPING) -> list[dict[str, Any]]:
    """The rows of a JSONL file that retain wrote, without a torn last line; empty if there is no file.

    Args:
        shape: the shape of each row, for `check_shape`.
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
            if number == len(lines):  # no line break at its end: a killed process was writing it
                break
            raise ValueError(f"{where} (not JSON: {str(error)[:80]}); {remedy}") from error
        check_shape(row, shape, where, remedy)
        rows.append(row)
    return rows


def without_nan(value: Any) -> Any:
    """The value with None (null in JSON) for NaN and infinity, which Python's JSON accepts and the format lacks.

    >>> without_nan({"loss": 1.5, "ci": (1.4, float("inf"))})
    {'loss': 1.5, 'ci': [1.4, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(without_nan, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_shape(value: Any, shape: Any, where: str, remedy: str) -> None:
    """Raise a one-line `ValueError` unless a value read from JSON has this shape.

    Args:
        shape: a type or a tuple of types; `[shape]` for a list of any length, `[shape, shape]` for a pair; a dict of
            keys and shapes, where a key ending in "?" may be missing or null, the key `str` stands for every key, and
            keys that are not named are ignored.

    >>> check_shape({"num_rows": "12"}, {"num_rows": int, "model?": str}, "manifest", "sample again")
    Traceback (most recent call last):
    ValueError: manifest: 'num_rows' is "12", not a whole number; sample again
    """
    if misfit := _misfit(value, shape, ""):
        raise ValueError(f"{where}: {misfit}; {remedy}")


def _misfit(value: Any, shape: Any, name: str) -> str | None:
    """A description of the first place where a value has another shape; None if it fits."""
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
        given = {key: part for key, part in shape.items() if not key.endswith("?") or value.get(key[:-1]) is not None}
        if missing := [key for key in given if key.removesuffix("?") not in value]:
            return f"{f'{name}.{missing[0]}'[1:]!r} is missing"
        parts = [(f".{key.removesuffix('?')}", value[key.removesuffix("?")], part) for key, part in given.items()]
    else:
        return None
    return next(filter(None, (_misfit(item, part, name + key) for key, item, part in parts)), None)


def check_writable(path: Path, flag: str) -> None:
    """Refuse an output file that cannot be written, before the work begins."""
    if path.is_dir():
        raise ValueError(f"{flag}: {str(path)!r} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag}: no folder {str(path.parent)!r}; make it first")


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row and close the file, so that a later crash does not lose it."""
    with _full_disk_named(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def check_model_path(name: str, field: str) -> None:
    """Refuse a model name that can only be a path and does not exist; a possible Hub id passes.

    Args:
        field: the setting, for the error.
    """
    is_path = name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/")
    if not name or (is_path and not Path(name).expanduser().exists()):
        raise ValueError(f"{field}: no folder or file {name!r}; give a folder, a GGUF file or a Hub id")


def check_file(name: str, field: str) -> None:
    """Refuse the name of a file that does not exist; `field` is the setting, for the error."""
    if not Path(name).expanduser().is_file():
        raise ValueError(f"{field}: no file {name!r}; check the path")


def check_output_dir(folder: Path, output: str) -> None:
    """Refuse a folder that holds only another verb's output, or a user's file under the name of an output file.

    Args:
        output: the kind of output to write, a key of `OUTPUTS`.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {str(existing)!r} is a file; choose a folder")
    files = [(kind, folder / name) for kind, names in OUTPUTS.items() for name in names if (folder / name).exists()]
    outputs = {kind: path.name for kind, path in files if _is_output(path)}
    for kind, path in files:
        if kind == output and not _is_output(path):
            raise ValueError(
                f"output_dir: {str(folder)!r} holds a {path.name} that retain did not write; choose another folder, or "
                "move the file"
            )
    if outputs and output not in outputs:
        kind, name = next(iter(outputs.items()))
        raise ValueError(
            f"output_dir: {str(folder)!r} already holds {kind} ({name}); choose another folder for {output}"
        )


def _is_output(path: Path) -> bool:
    """Whether the beginning of a file shows that a verb wrote it; its first row may be half-written."""
    if path.name == CONFIG_FILE:
        return True
    with open(path, "rb") as file:
        head = file.read(2**16)
    return ROW.startswith(head[: len(ROW)]) if path.suffix == ".jsonl" else b'"schema": "retain.' in head


@contextmanager
def exclusive(folder: Path, output: str) -> Iterator[None]:
    """Lock the folder for one writer; create it if it is missing. The system releases the lock if the process dies.

    Files that a killed writer left half-written are removed. If the work fails and leaves a new folder empty, the
    folder is removed.

    Args:
        output: the kind of output to write, a key of `OUTPUTS`; a folder that holds only another kind is refused.
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
        new = False  # keep the folder
    finally:
        with suppress(OSError):  # Windows removes no open file; there filelock does on release
            (folder / LOCK).unlink()
        lock.release()
        if new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def remove_parts(folder: Path) -> None:
    """Remove files and folders that a killed process left half-written; no other process may be writing there."""
    patterns = (f".*{PART}", SAFETENSORS_PART, f"checkpoint-*/{SAFETENSORS_PART}")
    for part in [part for pattern in patterns for part in folder.glob(pattern)]:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """An error in one line: the first non-empty line of its message, with its type unless that is `ValueError`.

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


# Untrusted text, from models and data


def visible(text: str) -> str:
    """The text with every control, bidi-override, surrogate or unassigned character, also line breaks, as an escape.

    >>> print(visible("exe\\u202egnp"))
    exe\\u202egnp
    """
    return "".join(map(_visible_char, text))


def visible_text(text: str) -> str:
    """`visible` that keeps line breaks and tabs."""
    return "".join(char if char in "\n\t" else _visible_char(char) for char in text.replace("\r\n", "\n"))


def _visible_char(char: str) -> str:
    is_hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
    is_joiner = char in "\u200c\u200d"  # part of ordinary Persian, Hindi and emoji
    return char.encode("unicode_escape").decode("ascii") if is_hidden and not is_joiner else char


def hub_remedy() -> str:
    """What to do when a download from the Hub fails."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return "check the name" + ", and unset HF_HUB_OFFLINE, which forbids downloads" * offline


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
