"""`retain plan` on the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from conftest import make_texts, save_model

from retain.cli import plan as plan_verb
from retain.cli.main import main
from retain.cli.plan import PlanConfig
from retain.laws.law import ForgettingLaw
from retain.laws.plan import pilot_grid

FLAGS = [
    *("--lora_ranks", "1", "2", "4", "8", "--replay_coefs", "0", "1", "--pilot_steps", "12", "--learning_rate", "1e-2"),
    *("--max_length", "16", "--per_device_train_batch_size", "2", "--replay_num_rows", "8", "--num_resamples", "100"),
    *("--eval_rows", "2", "--retention_max_documents", "1", "--lora_target_modules", "q_proj", "v_proj"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model, rows of a new task, a retention text, and a plan that was made of them."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "llama")
    for name, seed, count in (("new", 1, 12), ("held", 2, 4)):
        rows = [json.dumps({"text": text}) + "\n" for text in make_texts(count, seed=seed, words=12)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(4, seed=3)))
    return folder


def arguments(world: Path, *more: str) -> list[str]:
    return [
        "plan", "--model", f"{world}/llama", "--dataset_name", f"{world}/new.jsonl", "--output_dir", f"{world}/plan",
        "--eval_dataset_name", f"{world}/held.jsonl", "--retention", f"wiki={world}/wiki.txt", *FLAGS, *more,
    ]  # fmt: skip


def test_rows_are_no_longer_than_the_model_takes(world, monkeypatch, capsys):
    """A model of 128 positions: 256 tokens that nobody chose become 128, and 200 that somebody chose are refused."""
    seen = []
    monkeypatch.setattr(plan_verb, "prepare_rows", lambda config, folder: seen.append(int(config.max_length)) or 1 / 0)
    at, words = FLAGS.index("--max_length"), arguments(world, "--max_ref_kl", "5")
    begin = words.index(FLAGS[at])
    assert main(words[:begin] + words[begin + 2 :]) == 1
    assert seen == [128]
    capsys.readouterr()
    assert main([*words, "--max_length", "200"]) == 1
    assert "max_length: 200 is more than this model's 128 positions; use at most 128" in capsys.readouterr().err


def test_every_pilot_has_a_seed_of_its_own(world):
    """With one seed for all, intervals do not hold what another seed does."""
    config = PlanConfig(
        model="m", dataset_name="new.jsonl", retention=["wiki=wiki.txt"], max_ref_kl=0.1, output_dir="plan"
    )
    seeds = [plan_verb.seed_of(config, pilot) for pilot in pilot_grid([1, 2, 4, 8], [0.0, 10.0], 60)]
    assert len(set(seeds)) == len(seeds) == 7
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_retention_text_may_be_on_the_hub():
    """As for `retain finetune`, which reads it; it was refused as no file."""
    hub = PlanConfig(model="m", dataset_name="d", retention=["wiki=owner/name"], max_ref_kl=0.1, output_dir="plan")
    assert plan_verb.retention_of(hub) == "wiki"


@pytest.mark.program
def test_plan_on_the_command_line(world, capsys, monkeypatch):
    """Stopped in the middle, resumed, and run again with a limit that nothing keeps."""
    made, make = [], plan_verb.make_pilot

    def stopped(pilot, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(pilot)
        return make(pilot, *rest)

    monkeypatch.setattr(plan_verb, "make_pilot", stopped)
    assert main(arguments(world, "--max_ref_kl", "5")) == 130
    assert "finished pilots are kept" in capsys.readouterr().err
    monkeypatch.setattr(plan_verb, "make_pilot", make)
    assert main(arguments(world, "--max_ref_kl", "5")) == 0
    out = capsys.readouterr().out
    assert out.count("(found)") == 3
    plan = json.loads((world / "plan" / "plan.json").read_text())
    command = out.strip().splitlines()[-1]
    assert command == plan["command"]
    flags = shlex.split(command)
    assert flags[:2] == ["retain", "finetune"]
    assert not {"--save_strategy", "--report_to"} & set(flags), (
        "a long run keeps checkpoints, and reports as the user does"
    )
    chosen = plan["recommendation"]
    assert flags[flags.index("--lora_r") + 1] == str(chosen["rank"])
    assert chosen["forgetting_loss"]["high"] <= 5
    assert plan["cost"]["pilots"] == 7
    assert plan["cost"]["steps"] == 84
    assert plan["cost"]["tokens"] > 84 * 2 * 2
    assert ForgettingLaw.from_json(world / "plan" / "law.json").form.name == "joint"
    assert (world / "plan" / "plan.png").stat().st_size > 10_000
    assert "What the pilots cannot say" in (world / "plan" / "plan.md").read_text()
    assert main(arguments(world, "--max_ref_kl", "1e-7")) == 0
    out = capsys.readouterr().out
    assert out.count("(found)") == 7
    assert "No setting keeps forgetting within 1e-07" in out
    assert "--max_ref_kl 1e-07" in out.strip().splitlines()[-1]


def test_held_out_rows_are_kept_apart_where_none_are_given(world, tmp_path):
    given = {"model": "M", "retention": ["wiki=wiki.txt"], "max_ref_kl": 1.0, "output_dir": str(tmp_path)}
    rows = make_texts(40, seed=5, words=12)
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    config = PlanConfig(dataset_name=str(tmp_path / "many.jsonl"), **given)
    training, held_out = (
        {json.loads(line)["text"] for line in Path(path).read_text().splitlines()}
        for path in plan_verb.prepare_rows(config, tmp_path)
    )
    assert (len(training), len(held_out)) == (36, 4)
    assert training | held_out == set(rows)
    with pytest.raises(ValueError, match="dataset_name: 12 rows are too few to hold some out; give --eval_dataset"):
        plan_verb.prepare_rows(PlanConfig(dataset_name=f"{world}/new.jsonl", **given), tmp_path)
