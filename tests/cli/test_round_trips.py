"""What is written comes back as it was: settings, replay folders, laws, sweeps."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from retain import fit_forgetting_law
from retain.cli.main import load_verb
from retain.cli.sweep import read_sweep
from retain.files import exclusive, write_json
from retain.laws.law import ForgettingLaw
from retain.replay.dataset import MANIFEST, MANIFEST_SCHEMA, load_self_generated, write_shard

# What YAML and a command line can hold; text that begins with a dash is a flag to any parser, and what can only be a
# path must be there.
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="./~")
WORDS = st.text(CHARACTERS, min_size=1, max_size=12).filter(lambda text: not text.startswith("-"))
WORDS |= st.sampled_from(["runs", "pair", "retention=x"])  # names of flags, as values
NAMES = WORDS.filter(lambda text: "=" not in text)
COUNTS, SHARES = st.integers(1, 10**9), st.floats(0, 1)
SAMPLE = st.fixed_dictionaries(
    {"model": WORDS, "output_dir": WORDS},
    optional={
        "num_rows": COUNTS, "max_length": st.integers(2, 10**6), "rows_per_shard": COUNTS,
        "seed": st.integers(0, 2**31), "chat_turn": st.sampled_from(["user", "assistant"]), "preview": COUNTS,
        "store_reference": st.sampled_from(["auto", "hidden", "topk", "none"]),
    },
)  # fmt: skip
MEASURE = st.fixed_dictionaries(
    {
        "base": WORDS, "model": st.lists(WORDS, min_size=1, max_size=2, unique=True), "output_dir": WORDS,
        "retention": st.lists(st.tuples(NAMES, WORDS), min_size=1, max_size=3, unique_by=lambda pair: pair[0]).map(
            lambda pairs: ["=".join(pair) for pair in pairs]
        ),
    },
    optional={
        "max_documents": COUNTS, "num_resamples": st.integers(100, 10**5), "seed": st.integers(0, 2**31),
        "max_forgetting": st.floats(1e-9, 1e3),
    },
)  # fmt: skip


@pytest.mark.parametrize(("verb", "given_settings"), [("sample", SAMPLE), ("measure", MEASURE)])
def test_settings_mean_the_same_as_flags_and_as_yaml(verb, given_settings):
    @settings(max_examples=25, deadline=None)
    @given(given_settings)
    def check(wanted: dict[str, Any]) -> None:
        flags = []
        for name, value in wanted.items():
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        (of_flags,) = load_verb(verb).parse(flags)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "settings.yaml"
            file.write_text(yaml.safe_dump(wanted, allow_unicode=True), encoding="utf-8")
            (of_yaml,) = load_verb(verb).parse(["--config", str(file)])
        found = dataclasses.asdict(of_flags)
        assert {name: found[name] for name in wanted} == wanted
        assert dataclasses.asdict(of_yaml) == found

    check()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2**17), min_size=1, max_size=9), st.integers(1, 4)), min_size=1),
    st.integers(1, 5),
    st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.text(max_size=8), st.integers(), st.booleans())),
)
def test_rows_and_manifest_come_back(rows, rows_per_shard, extra):
    """Rows of any lengths, in shards of any size, under a manifest with further keys."""
    tokens = [np.array([0] * given + drawn, dtype=np.int32) for drawn, given in rows]
    given = np.array([given for _, given in rows], dtype=np.int32)
    manifest = {"extra": extra, "schema": MANIFEST_SCHEMA, "num_rows": len(rows), "rows_per_shard": rows_per_shard}
    manifest |= {"batch_size": 4, "model": "m", "model_fingerprint": "f", "tokenizer_fingerprint": "t"}
    manifest |= {"start_token": {"id": 0}, "sampler": {"engine": "torch", "dtype": "float32"}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / MANIFEST, manifest)
        for shard, at in enumerate(range(0, len(rows), rows_per_shard)):
            part = slice(at, at + rows_per_shard)
            column = np.empty(len(tokens[part]), dtype=object)
            column[:] = tokens[part]
            write_shard(folder, shard, at, {"input_ids": column, "prefix_length": given[part]})
        found = load_self_generated(folder)
    assert [row.tolist() for row in found] == [row.tolist() for row in tokens]
    assert found.prefix_lengths.tolist() == given.tolist()
    assert found.manifest == manifest


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 3), st.floats(-1, 1)),
        min_size=4,
        max_size=12,
        unique_by=lambda point: round(point[0], 3),
    ),
    st.integers(0, 2**31),
)
def test_a_law_of_any_runs_comes_back_exactly(points, seed):
    """From the file the same numbers, and the same file from them."""
    loss, noise = (np.array(column) for column in zip(*points, strict=True))
    table = {"run": range(len(loss)), "finetuning_loss": loss, "forgetting_loss": 2 - 0.5 * loss + 0.1 * noise}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as name:
        warnings.simplefilter("ignore")
        law = fit_forgetting_law(table, "linear", num_resamples=20, seed=seed)
        first, second = Path(name) / "law.json", Path(name) / "again.json"
        law.to_json(first)
        again = ForgettingLaw.from_json(first)
        again.to_json(second)
        assert first.read_bytes() == second.read_bytes()
    assert (again.params, again.conf_int()) == (law.params, law.conf_int())
    assert again.predict(finetuning_loss=1.0) == law.predict(finetuning_loss=1.0)


VALUES = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), WORDS)
FLAGS = st.dictionaries(st.text("abc_", min_size=1, max_size=6), VALUES, max_size=4)


GRID = st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.lists(VALUES, min_size=1, max_size=3), max_size=2)


@settings(max_examples=40, deadline=None)
@given(FLAGS, GRID)
def test_a_sweep_has_every_combination_and_keys_that_do_not_depend_on_order(common, grid):
    grid = {name: list({json.dumps(value): value for value in values}.values()) for name, values in grid.items()}
    with tempfile.TemporaryDirectory() as name:
        found = []
        for turn in (1, -1):
            flags, cells = (dict(list(one.items())[::turn]) for one in (common, grid))
            sweep = {"verb": "finetune", "common": flags, "grid": cells}
            file = Path(name) / "sweep.yaml"
            file.write_text(yaml.safe_dump(sweep, allow_unicode=True, sort_keys=False), encoding="utf-8")
            found.append({run.key: dict(run.flags) for run in read_sweep(file)})
    assert found[0] == found[1]
    assert len(found[0]) == int(np.prod([len(values) for values in grid.values()], initial=1))
    for flags in found[0].values():
        assert {name: flags[name] for name in common} == common
        assert all(flags[name] in values for name, values in grid.items())


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path):
    """safetensors writes beside its place, too, and a killed run leaves as much as its model is large."""
    (tmp_path / "checkpoint-8").mkdir()
    gone = [".report.json.x1.retain-part", ".tmpZmn5Ii", "checkpoint-8/.tmpa0b1C2"]
    kept = [".tmp", ".tmpfile", ".tmp-notes1", "tmpZmn5Ii", "checkpoint-8/model.safetensors"]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("x")
    with exclusive(tmp_path, "a report"):
        assert not [name for name in gone if (tmp_path / name).exists()]
        assert [name for name in kept if (tmp_path / name).exists()] == kept
