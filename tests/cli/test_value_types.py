"""Values of a type that a setting does not have, from YAML and from Python: refused by name, with what to give."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from retain import ReplayConfig
from retain.checks import expected_value, fits, hints_of
from retain.cli.main import VERBS, load_verb
from retain.cli.measure import MeasureConfig
from retain.cli.sample import SampleConfig
from retain.training.protection_choice import UNSET


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (True, bool, True), (1, bool, False), ("false", bool, False), (1, int, True), (True, int, False),
        (1.0, int, False), (1, float, True), (True, float, False), ("1", float, False), (5, str | None, False),
        (None, str | None, True), (["a"], list[str], True), ([1], list[str], False), ("a", list[str], False),
        ("a", Literal["a", "b"], True), ("c", Literal["a", "b"], False), ({}, dict[str, Any] | str, True),
        (3, dict[str, Any] | str | None, False), (object(), Any, True),
    ],
)  # fmt: skip
def test_fits(value: Any, hint: Any, good: bool) -> None:
    assert fits(value, hint) == good


def test_an_expected_value_has_words() -> None:
    assert expected_value(bool) == "true or false; use one of them"
    assert expected_value(int | None) == "a whole number; use one"
    assert expected_value(list[str] | str) == "a list; write [a, b]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_default_fits_its_own_field(verb: str) -> None:
    """Else a YAML file that states a default would be refused."""
    parser = load_verb(verb).parser()
    hints = {name: hint for kind in load_verb(verb).settings for name, hint in hints_of(kind).items()}
    defaults = {name: parser.get_default(name) for name in hints}
    assert {
        n: v
        for n, v in defaults.items()
        if v is not None and v is not UNSET and not isinstance(v, str) and not fits(v, hints[n])
    } == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ReplayConfig(allow_off_policy_replay="false"),
            "allow_off_policy_replay: 'false' is not true",
        ),
        (lambda: ReplayConfig(replay_coef="1"), "replay_coef: '1' does not fit; use a number"),
        (
            lambda: SampleConfig(model="m", output_dir="o", trust_remote_code="false"),
            "trust_remote_code: 'false' is not true or false",
        ),
        (
            lambda: SampleConfig(model="m", output_dir="o", start_token=[3]),
            r"start_token: \[3\] is not text",
        ),
        (lambda: MeasureConfig(base="m", model=["m"], output_dir="o", retention=None), "retention: None is not a list"),
        (
            lambda: MeasureConfig(base="m", model=["m"], output_dir="o", retention="a=b"),
            "retention: 'a=b' is not a list",
        ),
    ],
)
def test_python_is_checked_like_yaml(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
