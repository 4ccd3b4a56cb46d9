"""The file of a sweep: which runs it asks for, and the name of each, a hash of its resolved configuration."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RESUMED = ("finetune", "pretrain")  # go on from a checkpoint; other verbs go on, or begin again, by themselves


@dataclass(frozen=True)
class SweepRun:
    """One run: its verb, its resolved flags (without `output_dir`), and the hash of both."""

    verb: str
    flags: Mapping[str, Any]

    @property
    def key(self) -> str:
        text = json.dumps([self.verb, self.flags], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def arguments(self, folder: Path) -> list[str]:
        """The command line of this run, writing into `folder`."""
        words = [self.verb]
        for name, value in {**self.flags, "output_dir": str(folder)}.items():
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
        if self.verb in RESUMED and list(folder.glob("checkpoint-*")):
            words += ["--resume_from_checkpoint", "true"]
        return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def read_sweep(path: str | Path) -> list[SweepRun]:
    """The runs of a YAML file: `verb`, `common` flags, a `grid` of lists, and a `list` of flags that go together.

    Every combination of the grid is made with every entry of the list. `config` among the flags names a YAML file
    whose keys are flags, too; what the sweep says wins.

    Raises:
        ValueError: one line naming the file, the key, and what is wrong.
    """
    asked = _read_yaml(path, "sweep")
    known = {"verb", "common", "grid", "list"}
    if unknown := set(asked) - known:
        raise ValueError(f"sweep: {path} has {min(unknown)!r}; use {', '.join(sorted(known))}")
    verb = asked.get("verb")
    if not isinstance(verb, str):
        raise ValueError(f"sweep: {path} has verb {verb!r}; name one of retain's, say finetune")
    common, grid, entries = asked.get("common") or {}, asked.get("grid") or {}, asked.get("list") or [{}]
    good = isinstance(common, dict) and isinstance(grid, dict) and isinstance(entries, list)
    if not good or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"sweep: {path} needs flags under common, lists of values under grid, flags in every list entry"
        )
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"sweep: grid of {name!r} in {path} is {values!r}; give a list of values")
    runs = [
        SweepRun(verb, _resolved({**common, **dict(zip(grid, cell, strict=True)), **entry}, str(path)))
        for cell in itertools.product(*grid.values())
        for entry in entries
    ]
    keys = [run.key for run in runs]
    if twice := next((run for at, run in enumerate(runs) if run.key in keys[:at]), None):
        raise ValueError(f"sweep: {path} has a run twice: {dict(twice.flags)}; leave one out")
    return runs


def _resolved(flags: dict[str, Any], where: str) -> dict[str, Any]:
    """Flags with those of their `config` file beneath, without empty ones."""
    if "output_dir" in flags:
        raise ValueError(f"sweep: output_dir in {where} is the sweep's own to choose; leave it out")
    if "config" in flags:
        if not isinstance(flags["config"], str):
            raise ValueError(f"sweep: config in {where} is {flags['config']!r}; give the path of one YAML file")
        flags = _read_yaml(flags["config"], "config") | {name: flags[name] for name in flags if name != "config"}
        flags.pop("output_dir", None)
    return {name: value for name, value in flags.items() if value is not None}


def _read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what}: cannot read {str(path)!r}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{what}: {str(path)!r} is not YAML; check the file") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what}: {str(path)!r} holds {type(found).__name__}, not keys with values; check the file")
    for name, value in found.items():
        if not _plain({name: value}):
            raise ValueError(
                f"{what}: {str(path)!r} has {name!r}: {value!r}; give text (dates in quotes), numbers, or lists of them"
            )
    return found


def _plain(value: Any) -> bool:
    """Whether it can be written on a command line: YAML also knows dates, sets and keys that are no text."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _plain(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float))
