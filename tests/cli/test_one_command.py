"""`retain finetune --config sft.yaml --replay_dataset self`: what is chosen, measured, said, and compared."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_model, make_texts, make_tokenizer, save_model
from peft import LoraConfig
from torch import nn

from retain.cli import dry_run, finetune
from retain.cli.dry_run import seconds_of_fisher
from retain.cli.finetune import FinetuneConfig, planned_stages
from retain.cli.main import load_verb, main
from retain.replay.dataset import load_self_generated
from retain.replay.stored_fisher import FISHER_TOKENS
from retain.training import protection_choice
from retain.training.protection_choice import (
    ANCHORED,
    FOLLOWING,
    KL_ALONE,
    PROTECTING,
    UNSET,
    ProtectionChoice,
    choose_protection,
    new_tokens_per_step,
    rotation_cost,
    rows_drawn,
)
from retain.training.trainer_checks import load_for_training

SFT = {
    "max_steps": 12, "per_device_train_batch_size": 4, "max_length": 24, "learning_rate": 2e-3, "use_cpu": True,
    "bf16": False, "report_to": "none", "logging_steps": 5, "gradient_checkpointing": False, "save_steps": 6,
    "lr_scheduler_type": "constant", "retention_max_documents": 8,
}  # fmt: skip

NOT_PROTECTED = "this run is not protected against forgetting"
SHOWN = {"disable_tqdm": False}  # transformers' default depends on its log level, which the command lowers


def write_rows(path: Path, seed: int, count: int) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(count, seed=seed)))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "new.jsonl", 1, 24)
    write_rows(folder / "held.jsonl", 2, 8)
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(8, seed=3)))
    return folder


def run(world: Path, out: Path, *flags: str, **changes: object) -> int:
    """The command on a plain YAML of `trl sft`."""
    settings = {"model_name_or_path": str(world / "model"), "dataset_name": str(world / "new.jsonl"), **SFT, **changes}
    (out.parent / f"{out.name}.yaml").write_text(json.dumps({**settings, "output_dir": str(out)}))
    return main(["finetune", "--config", str(out.parent / f"{out.name}.yaml"), "--replay_dataset", "self", *flags])


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Printed lines by the word before their first colon."""
    return by_first_word(capsys.readouterr().out)


def by_first_word(text: str) -> dict[str, str]:
    found = [line.partition(": ") for line in text.splitlines() if ": " in line]
    return {name: rest for name, _, rest in found}


def stages_of(text: str) -> list[str]:
    """The stages that ended, by their lines."""
    return re.findall(r"^(.+): [\d,]+ (?:rows|steps|tokens) in \d+ (?:s|min)", text, re.M)


@pytest.fixture
def planned(monkeypatch) -> list[str]:
    """The stages that the command plans, by name."""
    names: list[str] = []

    def spied(*args):
        stages = planned_stages(*args)
        names.extend(stage.name for stage in stages)
        return stages

    monkeypatch.setattr(finetune, "planned_stages", spied)
    return names


def test_it_protects_measures_and_ends_with_four_lines_and_the_page(world, tmp_path, capsys, planned, caplog):
    held = ["--eval_dataset_name", str(world / "held.jsonl"), "--eval_strategy", "steps", "--eval_steps", "4"]
    flags = [*held, "--compare_plain", "true", "--retention", f"wiki={world}/wiki.txt"]
    assert run(world, tmp_path / "out", *flags, **SHOWN) == 0
    shown = capsys.readouterr()
    lines = by_first_word(shown.out)
    assert lines["chosen, since none was given"].startswith("replay_objective kl, replay_coef 1;")
    assert "{'" not in shown.out + shown.err, "no dictionary of the host's"
    assert NOT_PROTECTED not in caplog.text, "the unprotected run was asked for"
    steps = re.findall(
        r"^step (\d+): new-task loss [\d.]+; ref_kl [\d.]+ on wiki, [\d.]+ on self-generated$", shown.err, re.M
    )
    assert steps == ["0", "4", "8", "12"] * 2
    cached = ["measuring wiki", "measuring self-generated"]  # by the last evaluation
    assert [name for name in planned if name not in cached] == stages_of(shown.err)
    assert planned.count("training") == planned.count("measuring wiki") == 2
    assert "loss" in lines["learned"]
    assert "8 held-out rows of the new task" in lines["learned"]
    assert "which moved most of 2 texts" in lines["forgotten"]
    assert "% [" in lines["prevented"]
    assert "at the same new-task loss (" in lines["prevented"]
    assert "times the unprotected run's" in lines["cost"]
    assert list(lines)[-5:] == ["learned", "forgotten", "prevented", "cost", "page"]
    assert "svg" in Path(lines["page"]).read_text()
    out = tmp_path / "out"
    pages = json.loads((out / "report" / "report.json").read_text())
    plain, protected = pages["runs"]
    assert [one["name"] for one in (plain, protected)] == ["plain", "protected"]
    # The same rows, seed and steps; nothing protects one of them.
    assert plain["training"]["replay_coef"] == 0
    assert all(
        plain["training"][name] == protected["training"][name] for name in ("seed", "max_steps", "learning_rate")
    )
    configs = [json.loads((folder / "retain_config.json").read_text()) for folder in (out, out / "plain")]
    assert configs[0]["new_rows"] == configs[1]["new_rows"]
    firsts = [min(one["trajectory"], key=lambda row: row["step"])["eval_loss"] for one in (plain, protected)]
    assert firsts[0] == firsts[1]
    assert plain["retention"]["wiki"]["ref_kl"]["value"] > protected["retention"]["wiki"]["ref_kl"]["value"] > 0
    # Of the plain run only what was measured stays.
    assert not [*(out / "plain").glob("checkpoint-*"), *(out / "plain").glob("*.safetensors")]
    assert (out / "model.safetensors").exists()


def test_the_new_task_loss_is_that_of_the_trainers_own_evaluation(world, tmp_path, capsys):
    """Two ways to one number: ours by row with an interval, and the host's mean over all tokens."""
    held = ["--eval_dataset_name", str(world / "held.jsonl"), "--eval_strategy", "steps", "--eval_steps", "12"]
    assert run(world, tmp_path / "out", *held, "--eval_on_start", "true", "--per_device_eval_batch_size", "8",
               disable_tqdm=True) == 0  # fmt: skip
    shown = capsys.readouterr()
    assert "{'" not in shown.out
    assert not re.search("step|sampling|measuring", shown.err), "disable_tqdm silences all of it"
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in report["trajectory"] if "eval_loss" in row}
    found = report["new_task"]["new task"]
    assert found["base_loss"]["value"] == pytest.approx(losses[0], abs=1e-4)
    assert found["loss"]["value"] == pytest.approx(losses[12], abs=1e-4)
    assert found["gain"]["value"] == pytest.approx(losses[0] - losses[12], abs=2e-4)


def test_without_held_out_rows_the_training_loss_is_reported_and_that_is_said(world, tmp_path, capsys, planned):
    assert run(world, tmp_path / "out", **SHOWN) == 0
    shown = capsys.readouterr()
    lines = by_first_word(shown.out)
    assert stages_of(shown.err) == planned
    assert "measuring self-generated" in planned
    assert lines["new task"].startswith("no rows are held out, so its training loss is reported")
    assert lines["learned"].startswith("training loss ")
    assert "(logged at steps 1 and 12); no rows were held out" in lines["learned"]
    assert lines["prevented"].startswith("unknown without an unprotected run")
    rows = [load_self_generated(tmp_path / "out" / name) for name in ("replay", "held-out")]
    assert (len(rows[0]), len(rows[1])) == (4, 8)  # it draws one row in every third of its 12 steps
    assert rows[0][0].tolist() != rows[1][0].tolist()


def test_a_plain_run_that_was_made_is_read_again_unless_its_settings_changed(world, tmp_path, capsys, monkeypatch):
    assert run(world, tmp_path / "out", "--compare_plain", "true") == 0
    lines, made = said(capsys), (tmp_path / "out" / "plain" / "metrics.jsonl").stat().st_mtime_ns
    assert "compared at their ends, not at the same loss" in lines["new task"]
    again = ["--compare_plain", "true", "--resume_from_checkpoint", "true"]
    assert run(world, tmp_path / "out", *again) == 0
    out = capsys.readouterr().out
    once_more = by_first_word(out)
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-12'}" in out
    assert "unprotected run, to compare" not in once_more
    assert all(once_more[name] == lines[name] for name in ("learned", "forgotten", "prevented"))
    assert (tmp_path / "out" / "plain" / "metrics.jsonl").stat().st_mtime_ns == made
    assert run(world, tmp_path / "out", *again, max_steps=14) == 0
    assert "unprotected run, to compare" in said(capsys)


@pytest.mark.parametrize("given", [["--replay_coef", "1"], ["--replay_objective", "kl"], ["--max_ref_kl", "0.1"]])
def test_nothing_is_chosen_for_those_who_chose(given):
    parsed = load_verb("finetune").parse(["--output_dir", "out", *given])[-1]
    assert parsed.chosen is None
    assert (parsed.replay_objective, parsed.replay_coef, parsed.anchor_coef) == ("kl", 1.0, 0.0)


def test_what_is_chosen_stands_in_one_place(world, tmp_path, capsys, monkeypatch):
    chosen = {"anchor_coef": 30.0, "replay_start": 0.5, "share_of_batch": 0.5, "min_rows": 16}
    monkeypatch.setattr(protection_choice, "KL_ALONE", ProtectionChoice("a test says so", **chosen))
    held = ["--eval_dataset_name", str(world / "held.jsonl")]
    assert run(world, tmp_path / "out", "--compare_plain", "true", *held, retention_max_documents=9) == 0
    line = said(capsys)["chosen, since none was given"]
    assert "anchor_coef 30, replay after 50% of the steps; a test says so" in line
    folders = tmp_path / "out", tmp_path / "out" / "plain"
    protected, plain = (json.loads((folder / "retain_config.json").read_text()) for folder in folders)
    for name, value in {"anchor_coef": 30, "replay_start": 0.5, "per_device_replay_batch_size": 2}.items():
        assert protected["replay"][name] == value
    for folder in folders:  # nobody said when to evaluate, and the two are to be compared on their way
        rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "eval_loss" in row] == list(range(13))
    rates = [one["training_arguments"]["learning_rate"] for one in (protected, plain)]
    assert rates == [2e-3, 2e-3]
    assert len(load_self_generated(tmp_path / "out" / "replay")) == 16  # all are read for the Fisher information


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("model", "flags", "anchor"),
    [
        ("llama", [], 100.0),
        ("llama", ["--lora_r", "64"], 0.0),  # whose rotations cost more than a twentieth of a step of 96 tokens
        ("llama", ["--use_dora", "true"], 0.0),
        ("llama", ["--lora_modules_to_save", "lm_head"], 0.0),
        ("llama", ["--optim", "adafactor"], 0.0),
        ("gpt2", [], 0.0),  # its layers are no linear ones
        ("llama", ["--replay_start", "0.5", "--per_device_replay_batch_size", "3"], 100.0),
    ],
)
def test_lora_is_anchored_where_an_anchor_can_hold_it(world, tmp_path, capsys, model, flags, anchor):
    if model == "gpt2":
        save_model(tmp_path / "model", "gpt2")
    name = str((tmp_path if model == "gpt2" else world) / "model")
    small = ["--use_peft", "true", "--lora_r", "2"] if "--lora_r" not in flags else ["--use_peft", "true"]
    assert run(world, tmp_path / "out", *small, *flags, model_name_or_path=name, max_steps=4) == 0
    found = json.loads((tmp_path / "out" / "retain_config.json").read_text())["replay"]
    assert found["anchor_coef"] == anchor
    assert (found["replay_coef"], found["replay_start"] > 0) == ((5.0, True) if anchor else (1.0, False))
    if "--replay_start" in flags:
        assert (found["replay_start"], found["per_device_replay_batch_size"]) == (0.5, 3)
    assert (f"anchor_coef {anchor:g}" in said(capsys)["chosen, since none was given"]) == bool(anchor)


def test_full_finetuning_with_many_new_tokens_per_step_is_anchored(world, tmp_path, capsys):
    many = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 4, "max_steps": 2}
    assert run(world, tmp_path / "out", **many) == 0
    found = json.loads((tmp_path / "out" / "retain_config.json").read_text())["replay"]
    assert (found["anchor_coef"], found["replay_coef"], found["replay_every"]) == (100.0, 5.0, 1)
    assert "anchor_coef 100" in said(capsys)["chosen, since none was given"]


def test_rows_with_fisher_information_are_anchored_like_own_ones(world, tmp_path, capsys):
    few = ["--num_rows", "16", "--max_length", "24"]
    for flags, anchor in ([], 0.0), (["--store_fisher", "true"], 100.0):
        rows = tmp_path / f"rows{anchor}"
        assert main(["sample", "--model", str(world / "model"), "--output_dir", str(rows), *few, *flags]) == 0
        given = ["--replay_dataset", str(rows), "--use_peft", "true", "--lora_r", "2"]
        assert run(world, tmp_path / f"out{anchor}", *given, max_steps=4) == 0
        found = json.loads((tmp_path / f"out{anchor}" / "retain_config.json").read_text())["replay"]
        assert found["anchor_coef"] == anchor


@pytest.mark.parametrize(("plugin", "anchor"), [(None, 100.0), (object(), 0.0)])
def test_no_anchor_is_chosen_where_deepspeed_was_launched(plugin, anchor):
    """`accelerate launch --use_deepspeed` leaves the argument `deepspeed` empty; the anchor would be refused there."""
    args = SimpleNamespace(optim="adamw_torch", deepspeed=None, deepspeed_plugin=plugin)
    lora = SimpleNamespace(
        use_peft=True, use_dora=False, lora_modules_to_save=None, load_in_4bit=False, load_in_8bit=False
    )
    assert choose_protection(args, lora).anchor_coef == anchor


def test_an_anchor_is_chosen_where_a_step_has_tokens_enough_for_its_rotations():
    """At most a twentieth of operations: 4/3 · k/T with full finetuning and k eigenvectors, 2/3 · d/T with all."""
    llama, width = make_model(), make_model().config.hidden_size
    assert rotation_cost(llama, None, 100, width // 4) == pytest.approx(4 / 3 * width / 4 / 100)
    assert rotation_cost(llama, None, 100) == pytest.approx(2 / 3 * width / 100)
    enough = 2 / 3 * width / 0.05
    assert ANCHORED.for_model(llama, None, enough + 1) is ANCHORED
    assert ANCHORED.for_model(llama, None, enough - 1, rank=width // 4) is ANCHORED
    assert ANCHORED.for_model(llama, None, enough - 1) is KL_ALONE
    assert ANCHORED.for_model(make_model("gpt2"), None, 1e6) is KL_ALONE
    lora, two = LoraConfig(target_modules="all-linear", r=2), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert rotation_cost(two, lora, 100) == pytest.approx(2 / 100 * (16 + 4) / (32 + 16))
    enough = rotation_cost(llama, lora, 1) / 0.05
    assert ANCHORED.for_model(llama, lora, enough + 1) is ANCHORED
    assert ANCHORED.for_model(llama, lora, enough - 1) is KL_ALONE
    assert KL_ALONE.for_model(llama, None, 1e6) is KL_ALONE


@pytest.mark.parametrize(
    ("row", "packing", "tokens"),
    [({"input_ids": [5] * 7}, False, 7), ({"input_ids": [5] * 99}, False, 32), ({"text": "the fox"}, True, 32),
     ({"words": "the fox"}, False, None), ({"words": ""}, False, 1)],
)  # fmt: skip
def test_tokens_of_a_step_are_counted_by_the_first_rows(row, packing, tokens):
    args = SimpleNamespace(
        packing=packing,
        max_length=32,
        train_batch_size=4,
        gradient_accumulation_steps=3,
        world_size=2,
        dataset_text_field="words",
    )
    tokenizer = make_tokenizer()
    tokens = tokens or len(tokenizer("the fox").input_ids)
    assert new_tokens_per_step([row] * 3, tokenizer, args) == pytest.approx(12 * tokens)


@pytest.mark.parametrize("kind", ["a reader who left", "ascii"])
def test_a_run_outlives_its_output(world, tmp_path, monkeypatch, kind):
    """`retain finetune … | head -1` died of a broken pipe; `…` and `−` ended a run where standard output is ASCII."""
    read, write = os.pipe()
    os.close(read)
    with open(write if kind != "ascii" else tmp_path / "said.txt", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(world, tmp_path / "äußerst", max_steps=1) == 0
    assert (tmp_path / "äußerst" / "model.safetensors").exists()
    assert kind != "ascii" or "\\xe4u\\xdferst\n" in (tmp_path / "said.txt").read_text()


def test_a_model_over_several_devices_is_refused_before_it_writes_rows(world, tmp_path, capsys, monkeypatch):
    def load(*given):
        model = load_for_training(*given)
        model.hf_device_map = {"model": 0, "lm_head": 1}
        return model

    monkeypatch.setattr(finetune, "load_for_training", load)
    assert run(world, tmp_path / "out") == 1
    assert "device_map: spreads the model over 2 devices" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokens_of_rows_that_nothing_cuts_are_counted_whole():
    """TRL's `max_length` may be null."""
    args = SimpleNamespace(
        packing=False, max_length=None, train_batch_size=1, gradient_accumulation_steps=1, world_size=1,
        dataset_text_field="text",
    )  # fmt: skip
    assert new_tokens_per_step([{"input_ids": [5] * 99}], make_tokenizer(), args) == 99


def test_few_rows_are_replayed_on_some_steps_only():
    unset: dict[str, Any] = dict.fromkeys((*PROTECTING, *FOLLOWING), UNSET)
    config = FinetuneConfig(**unset)
    config.choose(KL_ALONE, batch_size=4, steps=100)
    assert (config.per_device_replay_batch_size, config.replay_every) == (1, 4)
    config.choose(KL_ALONE, batch_size=4, steps=8)
    assert config.replay_every == 2, "a short run has some of them, too"
    found = [ANCHORED.rows_and_every(size, steps=100) for size in (16, 8, 4, 2, 1)]
    assert found == [(2, 1), (1, 1), (1, 2), (1, 4), (1, 4)], "an eighth of the batch, as long as it has two rows"
    asked = FinetuneConfig(**unset | {"replay_every": 3})
    asked.choose(KL_ALONE, batch_size=4, steps=100)
    assert (asked.per_device_replay_batch_size, asked.replay_every) == (None, 3)


def test_what_was_given_is_kept_though_it_is_the_default():
    flags = ["--output_dir", "out", "--replay_every", "1", "--replay_start", "0"]
    given = load_verb("finetune").parse(flags)[-1]
    given.choose(ANCHORED, batch_size=1, steps=100)
    assert (given.replay_every, given.replay_start) == (1, 0.0)
    assert "replay after" not in given.chosen.line()
    unset = load_verb("finetune").parse(flags[:2])[-1]
    unset.choose(ANCHORED, batch_size=1, steps=100)
    assert (unset.replay_every, unset.replay_start) == (4, 0.7)
    assert "replay after 70%" in unset.chosen.line()


def test_the_pool_follows_what_the_run_draws():
    args = SimpleNamespace(train_batch_size=16, world_size=2, gradient_accumulation_steps=3)
    config = FinetuneConfig(replay_every=4)
    assert rows_drawn(config, args, 100) == 25 * 2 * 2 * 3
    assert rows_drawn(FinetuneConfig(replay_coef=0.0, anchor_coef=1.0), args, 100) == 0
    assert [KL_ALONE.num_rows(draws, reads_fisher=False) for draws in (0, 100, 300, 10_000)] == [
        256,
        100,
        256,
        1000,
    ]
    assert KL_ALONE.num_rows(100, reads_fisher=True) == 256


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--compare_plain", "true", "--replay_coef", "0"], "compare_plain: true needs a protected run"),
        (["--retention", "self-generated=x"], "retention: 'self-generated' is the name of the rows that the model"),
    ],
)
def test_what_cannot_be_compared_is_refused(world, tmp_path, capsys, flags, line):
    assert run(world, tmp_path / "out", *flags) == 1
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dataset_name", "eval_dataset_name"])
def test_chats_that_the_template_refuses_are_refused_before_a_model_writes_rows(world, tmp_path, capsys, name):
    turns = [{"role": "user", "content": "the fox"}, {"role": "bot", "content": "old towns"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    make_model().config.save_pretrained(tmp_path / "model")  # without weights: they are not looked for
    template = "{% for m in messages %}{% if m.role == 'bot' %}{{ raise_exception('who?') }}{% endif %}{% endfor %}"
    make_tokenizer(template=template).save_pretrained(tmp_path / "model")
    changes = {"model_name_or_path": str(tmp_path / "model"), name: str(tmp_path / "chats.jsonl")}
    assert run(world, tmp_path / "out", **changes) == 1
    assert "the chat template refuses a chat of user, bot (who?)" in capsys.readouterr().err


def test_a_dry_run_says_what_the_run_would_take_and_makes_nothing(world, tmp_path, capsys):
    flags = ["--dry_run", "true", "--compare_plain", "true", "--eval_dataset_name", str(world / "held.jsonl")]
    assert run(world, tmp_path / "out", *flags) == 0
    assert not (tmp_path / "out").exists()
    lines = said(capsys)
    assert not [line for line in lines if line.startswith("{")]
    lengths = [len(make_tokenizer()(text)["input_ids"]) + 1 for text in make_texts(24, seed=1)]  # and its end
    assert lines["new rows"].startswith(f"24 rows of {min(min(lengths), 24)} to {min(max(lengths), 24)} tokens")
    assert lines["new rows"].endswith("100% of their tokens are predicted")
    assert lines["chosen, since none was given"].startswith("replay_objective kl, replay_coef 1;")
    assert lines["replay"] == "the run draws 4 rows, of a pool of 4"
    assert "weights in float32" in lines["device"]
    assert " GB in training" in lines["memory"]
    assert re.search(r"s with replay, [\d.]+ times an unprotected one's", lines["a step"])
    for part in ("for 12 steps", "sampling", "training", "measuring", "the unprotected run"):
        assert part in lines["the run"]


def test_the_steps_that_a_dry_run_times_replay_also_where_replay_starts_late(world, tmp_path, monkeypatch):
    tried = []

    def recorded(trainer: Any, fisher: float) -> Any:
        config = trainer.replay_config
        tried.append((config.anchor_coef, config.replay_start, config.replay_every))
        return measured(trainer, fisher)

    measured = dry_run.measured_cost
    monkeypatch.setattr(dry_run, "measured_cost", recorded)
    assert run(world, tmp_path / "out", "--dry_run", "true", "--use_peft", "true", "--lora_r", "2") == 0
    assert tried == [(100.0, 0.0, 1), (0.0, 0.0, 1)]


def test_a_dry_run_says_where_nothing_would_protect(world, tmp_path, capsys):
    """It tried a few steps with replay each, and promised what the run then refused, or did without."""
    assert run(world, tmp_path / "out", "--dry_run", "true", "--replay_every", "90") == 1
    assert "replay_every: 90 of " in capsys.readouterr().err
    assert run(world, tmp_path / "out", "--dry_run", "true", "--max_steps", "1") == 0
    assert "protection: none (a run of one step" in capsys.readouterr().out


def test_a_dry_run_foresees_the_reading_of_the_whole_pool():
    tried = SimpleNamespace(num_tokens=100, seconds=7.0)  # of which it read for 2
    assert seconds_of_fisher(tried, 2.0, pool_tokens=1000) == pytest.approx(5 + 20)
    assert seconds_of_fisher(tried, 2.0, pool_tokens=10**9) == pytest.approx(5 + 2 * FISHER_TOKENS / 100)
    assert seconds_of_fisher(tried, 2.0, None) == 7.0
    assert seconds_of_fisher(None, 0.0, 1000) == 0.0


def test_a_run_without_protection_warns_unless_it_is_there_to_be_compared(world, tmp_path, caplog):
    assert run(world, tmp_path / "dry", "--dry_run", "true", "--compare_plain", "true") == 0
    assert NOT_PROTECTED not in caplog.text
    assert run(world, tmp_path / "out", "--replay_coef", "0", max_steps=1) == 0
    assert NOT_PROTECTED in caplog.text


def test_a_dry_run_counts_the_completions_of_prompts(world, tmp_path, capsys):
    texts = make_texts(9, seed=5, words=6)
    rows = [{"prompt": prompt, "completion": done} for prompt, done in itertools.pairwise(texts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"dataset_name": str(tmp_path / "pairs.jsonl"), "max_length": 64}
    assert run(world, tmp_path / "out", "--dry_run", "true", "--replay_coef", "0", **changes) == 0
    lines = said(capsys)
    share = int(re.search(r"(\d+)% of their tokens are predicted", lines["new rows"])[1])
    assert 30 < share < 70
    assert lines["held-out rows of the new task"].startswith("none")
    assert "times an unprotected" not in lines["a step"]


def test_a_chain_trains_each_adapter_on_the_one_before_merged_and_is_measured_as_one(world, tmp_path, capsys):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "learning_rate": 2e-2}
    short = ["--replay_num_rows", "8", "--replay_coef", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(world, one, *short, **lora) == 0
    assert not (one / "base").exists()
    later = {**lora, "model_name_or_path": str(one), "max_steps": 4}
    assert run(world, two, *short, "--dry_run", "true", **later) == 0
    assert not two.exists()
    capsys.readouterr()
    assert run(world, two, *short, **later) == 0
    assert said(capsys)["base"] == f"{two}/base, the adapter {one} merged into {world}/model"
    assert json.loads((two / "adapter_config.json").read_text())["base_model_name_or_path"] == str(two / "base")
    texts = [f"--retention={name}={world / file}" for name, file in (("wiki", "wiki.txt"), ("new", "held.jsonl"))]
    stages = ["--base", str(world / "model"), "--model", str(one), "--model", str(two), "--output_dir", str(tmp_path)]
    few = ["--max_new_tokens", "0", "--num_resamples", "100"]
    assert main(["measure", *stages, *texts, *few, "--chain", "true"]) == 0
    shown = capsys.readouterr().out
    assert "After 2 stages" in shown
    assert "was trained on another base" not in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert {text["name"] for text in report["chain"]} == {"wiki", "new"}
    assert report["runs"][0]["base"] == report["runs"][1]["base"]
    backwards = [*stages[:2], "--model", str(two), "--model", str(one), "--output_dir", str(tmp_path / "backwards")]
    assert main(["measure", *backwards, *texts, *few, "--chain", "true"]) == 0
    shown = capsys.readouterr().out
    assert f"the adapter '{two}' switched off is not '{world}/model', the base" in shown
    assert f"the adapter '{one}' switched off is not '{two}', the stage before it" in shown
    assert main(["measure", *stages[:4], *stages[6:], *texts, "--chain", "true"]) == 1
    assert "chain: true needs at least two stages as --model" in capsys.readouterr().err
