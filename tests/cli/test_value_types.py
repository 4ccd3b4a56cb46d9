"""Values of a type that a setting does not have, from YAML and from Python: refused by name, with what to give."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from retain import ReplayConfig
from retain.checks import expected_value, fits, hints_of
from retain.cli.main import VERBS, load_verb, main
from retain.cli.measure import MeasureConfig
from retain.cli.sample import SampleConfig


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


def test_what_to_give_is_said_in_words() -> None:
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
        n: v for n, v in defaults.items() if v is not None and not isinstance(v, str) and not fits(v, hints[n])
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


PLAN = "retention: [a=b]\nmodel: m\ndataset_name: d\nmax_ref_kl: 1\n"
YAML = [
    ("finetune", "replay_dataset: 5", "replay_dataset: 5 is not text; write it in quotes"),
    ("finetune", "replay_dataset: true", "replay_dataset: True is not"),
    ("finetune", "replay_dataset: [x]", "replay_dataset: ['x'] is not"),
    ("finetune", "start_token: [3]", "start_token: [3] is not"),
    ("finetune", "output_dir: 5", "output_dir: 5 is not"),
    ("finetune", "max_steps: 2.5", "max_steps: 2.5 is not a whole number"),
    ("finetune", "eval_dataset_name: 5", "eval_dataset_name: 5 is not"),
    ("finetune", "learning_rate: [1]", "learning_rate: [1] is not a number"),
    ("finetune", "use_peft: 3", "use_peft: 3 is not true or false"),
    ("finetune", "allow_off_policy_replay: 1", "allow_off_policy_replay: 1 is not"),
    ("finetune", "retention: {wiki: wiki.txt}", "retention: {'wiki': 'wiki.txt'} is not a list"),
    ("finetune", "adam_beta2_half_life_tokens: true", "adam_beta2_half_life_tokens: True is not"),
    ("sample", "prompts: 3", "prompts: 3 is not"),
    ("sample", "start: 3", "start: 3 is not"),
    ("sample", "num_rows: 2.5", "num_rows: 2.5 is not"),
    ("measure", "retention: [1]", "retention: [1] is not"),
    ("measure", "model: 2026-11-22", "model: datetime.date(2026, 11, 22) is not"),
    ("plan", "lora_ranks: [a, 2]", "lora_ranks: ['a', 2] is not"),
    ("plan", f'{PLAN}lora_ranks: "4"', "lora_ranks: 4 is not a list; write [a, b]"),
    ("pretrain", "corpus: 5", "corpus: 5 is not"),
    ("sweep", "cores_per_run: 1.5", "cores_per_run: 1.5 is not"),
]


@pytest.mark.parametrize(("verb", "line", "message"), YAML, ids=[f"{verb} {line}" for verb, line, _ in YAML])
def test_yaml_of_the_wrong_type_is_refused_by_name(
    verb: str, line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(line + "\n")
    out = [] if line.startswith("output_dir") else ["--output_dir", str(tmp_path / "out")]
    assert main([verb, "--config", str(tmp_path / "c.yaml"), *out]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"retain {verb}: {message}")
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
