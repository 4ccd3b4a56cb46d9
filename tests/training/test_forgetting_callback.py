"""Forgetting inside any trainer: the values of `measure`, nothing else moved, and never against a wrong base."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATML, make_model, make_texts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training_runs import LORA as PLAIN_LORA
from training_runs import ROWS, SETTINGS, TOKENIZER, TOKENS, points, weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from retain import ForgettingCallback, measure
from retain.files import read_jsonl
from retain.laws.run_tables import read_runs
from retain.measuring.choices import Question
from retain.training.retention import retention_documents
from retain.training.run_files import REPORTED_ARGUMENTS, read_run

TEXTS = {"words": make_texts(9, seed=9), "few": [text[: 20 + 30 * at] for at, text in enumerate(make_texts(4, seed=8))]}
QUESTIONS = [
    Question(text, tuple(make_texts(4, seed=at, words=3)), 0) for at, text in enumerate(make_texts(24, seed=3, words=6))
]
LORA = {**PLAIN_LORA, "lora_dropout": 0.1}
METRICS = ("forgetting", "loss", "ref_kl", "ref_agreement")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 4}
    return {**SETTINGS, **evaluated, "output_dir": str(folder), "max_steps": 4, "learning_rate": 5e-3, **changes}


def callback(**changes: Any) -> ForgettingCallback:
    return ForgettingCallback(**{"retention": TEXTS, "choices": {"arc": QUESTIONS[:3]}, "max_length": 32} | changes)


def host(kind: str, folder: Path, *callbacks: TrainerCallback, model: Any = None, **changes: Any) -> Any:
    """transformers' own trainer, TRL's, or TRL's with an adapter."""
    model = model if model is not None else make_model(attention_dropout=0.1)
    given: dict[str, Any] = {"processing_class": TOKENIZER, "callbacks": [*callbacks]}
    if kind == "plain":
        args = TrainingArguments(**settings(folder, **changes))
        return Trainer(model, args, train_dataset=TOKENS, eval_dataset=TOKENS.select(range(4)), **given)
    args = SFTConfig(**settings(folder, **{"max_length": 24, **changes}))
    lora = LoraConfig(**LORA) if kind == "lora" else None
    return SFTTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS.select(range(8)), peft_config=lora, **given)


KINDS = ("plain", "sft", "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_of_measure(kind, tmp_path):
    found = callback(choices={"arc": QUESTIONS}, choices_every=2)
    trainer = host(kind, tmp_path, found, learning_rate=5e-2)
    trainer.train()
    report = measure(
        make_model(), trainer.model, found.documents, tokenizer=TOKENIZER, choices={"arc": QUESTIONS}, max_length=32
    ).data
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "metrics.jsonl") if "retention/words/loss" in row}
    assert [*rows] == [0, 2, 4]
    for name in TEXTS:
        for metric in METRICS:
            expected = report["retention"][name][metric]["value"]
            assert rows[4][f"retention/{name}/{metric}"] == pytest.approx(expected, abs=2e-6)
            assert found.tables[4][name][metric]["num_documents"] == len(found.documents[name])
        assert [rows[0][f"retention/{name}/{metric}"] for metric in ("forgetting", "ref_kl", "ref_agreement")] == [
            0,
            0,
            1,
        ]
        assert rows[4][f"retention/{name}/ref_kl"] > 1e-6
    agreement = points(tmp_path, "choices/arc/agreement")
    assert agreement == {0: 1.0, 4: report["choices"]["arc"]["rules"]["acc_norm"]["agreement"]["value"]}
    assert agreement[4] < 1
    rows_of_few = [row for row in read_jsonl(tmp_path / "documents.jsonl") if row["name"] == "few"]
    last = rows_of_few[-1]
    assert [row["step"] for row in rows_of_few] == [0, 2, 4]
    value = (np.sum(last["loss"]) - np.sum(last["base_loss"])) / np.sum(last["num_tokens"])
    assert value == pytest.approx(rows[4]["retention/few/forgetting"], abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_training_is_bit_identical_with_and_without_it(kind, tmp_path):
    runs, drawn = [], []
    for name, callbacks in (("a", [callback()]), ("b", [])):
        runs.append(host(kind, tmp_path / name, *callbacks))
        runs[-1].train()
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert drawn[0] == drawn[1], "the random states too"
    one, other = (weights(run.model) for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["loss"] for row in runs[0].state.log_history if "loss" in row] == [
        row["loss"] for row in runs[1].state.log_history if "loss" in row
    ]


def test_dropout_is_off_and_every_mode_comes_back(tmp_path):
    found = callback()
    trainer = host("lora", tmp_path, found)
    trainer.train()
    trainer.model.train()
    trainer.model.get_input_embeddings().eval()
    modes = [module.training for module in trainer.model.modules()]
    tables, found.tables = found.tables, {}
    found.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model, metrics={})
    assert found.tables[4] == tables[4]
    assert [module.training for module in trainer.model.modules()] == modes


def test_values_go_through_the_trainers_log(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    found, tracker = callback(), Tracker()
    trainer = host("sft", tmp_path / "a", tracker, found)
    found.trainer = trainer
    trainer.train()
    silent = host("sft", tmp_path / "b", callback())
    silent.train()
    assert len([logs for logs in seen if "retention/words/ref_kl" in logs]) == 3
    histories = [[row for row in one.state.log_history if "retention/few/loss" in row] for one in (trainer, silent)]
    assert histories[0] == histories[1]
    assert [row["step"] for row in histories[0]] == [0, 2, 4]
    assert points(tmp_path / "a") == points(tmp_path / "b")


def test_the_files_are_those_of_a_run(tmp_path):
    """What `retain report` and `retain fit` read."""
    host("sft", tmp_path, callback(), max_steps=6).train()
    run = read_run(tmp_path)
    assert [row["step"] for row in run["trajectory"] if "retention/words/ref_kl" in row and "eval_loss" in row] == [
        0, 2, 4, 6
    ]  # fmt: skip
    assert run["training"]["reference"] == "copy"
    assert len(run["documents"]) == 8
    columns = ("num_params", "finetuning_loss", "forgetting_loss")
    runs = read_runs([tmp_path], columns, retention="words")
    assert len(runs) == 3
    assert runs.columns["num_params"][0] == sum(one.numel() for one in make_model().parameters())


@pytest.mark.parametrize("name", ["metrics.jsonl", "documents.jsonl"])
def test_losses_that_are_not_finite_are_no_result(name, tmp_path):
    settings = {"training_arguments": dict.fromkeys(REPORTED_ARGUMENTS, 1)}
    (tmp_path / "retain_config.json").write_text(json.dumps(settings))
    rows = {"metrics.jsonl": {"step": 1, "retention/a/ref_kl": math.nan, "grad_norm": math.inf}}
    rows["documents.jsonl"] = {"step": 1, "name": "a", "loss": [0.1, math.inf]}
    (tmp_path / name).write_text(json.dumps(rows[name]) + "\n")
    with pytest.raises(ValueError, match=rf"{name}' holds a loss that is not finite, which is no result; finetune"):
        read_run(tmp_path)
    (tmp_path / name).write_text(json.dumps({"step": 1, "name": "a", "grad_norm": math.inf, "loss": [0.1]}) + "\n")
    if name == "metrics.jsonl":  # what mixed precision skips is no loss
        assert len(read_run(tmp_path)["trajectory"]) == 1


# Resumed


@pytest.mark.parametrize("kind", ["sft", "lora"])
def test_a_resumed_run_has_the_files_of_an_uninterrupted_one(kind, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "eval_on_start": False}
    host(kind, tmp_path / "whole", callback(), **saved).train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for row in ({"step": 3, "retention/words/ref_kl": 9.0}, {"step": 4, "loss": 9.0}):
        with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    host(kind, tmp_path / "cut", callback(), **saved).train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    assert list(points(tmp_path / "cut")) == [2, 4]
    files = [read_jsonl(tmp_path / name / "documents.jsonl") for name in ("cut", "whole")]
    assert files[0] == files[1]
    assert len(files[0]) == 4
    again = host(kind, tmp_path / "cut", callback(), **saved | {"eval_on_start": True})
    again.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert read_jsonl(tmp_path / "cut" / "documents.jsonl") == files[1], "no row twice"


def test_a_model_that_is_not_the_base_is_refused_when_training_resumes(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = host("sft", tmp_path, callback(), **saved)
    whole.train()
    kept = points(tmp_path)
    resumed = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    halfway = type(make_model()).from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"^base: training resumes at step 2, but the trainer.s model is not known .*; give base=the"
    ):
        host("sft", tmp_path, callback(), model=halfway, **saved).train(**resumed)
    assert points(tmp_path) == kept, "the files are untouched"
    late = host("sft", tmp_path, **saved)
    late.add_callback(callback())
    with pytest.raises(
        ValueError, match=r"^base: the model was trained for 2 steps before this callback saw it; give the"
    ):
        late.train(**resumed)
    given = host("sft", tmp_path, callback(base=make_model()), model=halfway, **saved)
    given.train(**resumed)
    assert points(tmp_path) == pytest.approx(kept, abs=1e-7)


# The base


def test_a_callback_added_later_or_a_second_training_has_the_same_base(tmp_path):
    trainer = host("sft", tmp_path)
    found = callback()
    trainer.add_callback(found)
    trainer.evaluate()
    assert points(tmp_path) == {0: 0.0}
    trainer.train()
    first = points(tmp_path)
    assert (first[0], [*first]) == (0.0, [0, 2, 4])
    trainer.train()
    assert points(tmp_path)[0] == pytest.approx(first[4]), "the model went on; the base did not"


def test_a_base_may_be_given(tmp_path):
    started = make_model(seed=1)
    host("sft", tmp_path, callback(base=make_model()), model=started).train()
    assert points(tmp_path)[0] > 0.1


@pytest.mark.parametrize("bad", ["trained", "pissa", "base trained too", "own weights", "vocabulary", "dtype"])
def test_what_is_not_the_base_is_refused_in_one_line(bad, tmp_path):
    model, options = make_model(), {}
    why = r"^base: the trainer.s model does not give its base .*; give base=the model before"
    if bad == "trained":
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    elif bad == "pissa":
        model = get_peft_model(model, LoraConfig(**{**LORA, "lora_dropout": 0.0}, init_lora_weights="pissa"))
    elif bad == "base trained too":
        model = get_peft_model(model, LoraConfig(**LORA))
        model.base_model.model.model.norm.weight.requires_grad_(True)
    else:
        base = {
            "own weights": model,
            "vocabulary": make_model(vocab_size=328),
            "dtype": make_model().to(torch.bfloat16),
        }
        options["base"] = base[bad]
        why = {
            "own weights": "^base: it shares weights with the model being trained, so it changes too; give base=the",
            "vocabulary": "^base: its vocabulary is 328, the model's 320; load both alike",
            "dtype": r"^base: its dtype is torch.bfloat16, the model's torch.float32; load both alike",
        }[bad]
    with pytest.raises(ValueError, match=why) as error:
        host("plain", tmp_path, callback(**options), model=model)
    assert "\n" not in str(error.value)
    if bad == "trained":
        host("plain", tmp_path, callback(base=make_model()), model=model)


def test_mixed_precision_compares_like_with_like(tmp_path):
    for kind in ("plain", "lora"):
        trainer = host(kind, tmp_path / kind, callback(), bf16=True)
        trainer.evaluate()  # before the host has wrapped the model
        assert points(tmp_path / kind) == {0: 0.0}
        trainer.train()
        found = points(tmp_path / kind)
        assert found[0] == 0.0
        assert found[4] > 1e-6


def test_other_trainers(tmp_path):
    rows = [{"prompt": "the quick", "chosen": " brown fox", "rejected": " lazy dog"}] * 16
    trainer = DPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=DPOConfig(**settings(tmp_path), max_length=24),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=TOKENIZER,
        callbacks=[callback()],
    )
    trainer.train()
    found = points(tmp_path)
    assert (found[0], found[4] > 0) == (0.0, True)


# What is measured


def test_a_text_that_is_trained_on_is_not_measured_as_remembered(tmp_path):
    with pytest.raises(ValueError, match=r"^retention: 'words' shares \d+ rows with the training rows"):
        host("sft", tmp_path, callback(retention={"words": ROWS["text"][:4]})).train()


def test_the_first_window_of_the_first_documents_is_measured(tmp_path):
    """As in `retain finetune`, so that `ref_kl` of a text means the same."""
    cut = {"tokenizer": TOKENIZER, "start_id": 3, "max_length": 16, "max_windows": 1}
    texts = make_texts(30, seed=4)
    every = retention_documents("a", texts, **cut)
    assert [len(document.windows) for document in every] == [1] * 30
    assert retention_documents("a", iter(["", *texts]), 6, **cut) == every[:5]
    found = callback(retention={"a": texts}, max_documents=5, max_length=16)
    host("sft", tmp_path, found)
    assert found.documents["a"] == every[:5]
    assert (found.settings["retention"], found.settings["retention_windows"]) == ({"a": 5}, 1)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match=rf"^max_documents: {wrong} does not fit"):
            callback(max_documents=wrong)
    with pytest.raises(ValueError, match="'a' has no text to measure"):
        retention_documents("a", ["", ""], **cut)
    with pytest.raises(ValueError, match="messages"):  # it was left out, like a text of no token
        retention_documents("a", [{"messages": []}, *texts], **cut)
    with pytest.raises(ValueError, match="texts: 'a' is a str, not several texts; give a list"):
        retention_documents("a", "wiki.txt", **cut)


def test_letters_in_the_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    form = {"choice_style": "letter", "choice_chat_template": True}
    found = ForgettingCallback(choices={"arc": QUESTIONS}, tokenizer=tokenizer, **form)
    trainer = host("plain", tmp_path, found, learning_rate=5e-2)
    trainer.train()
    expected = measure(make_model(), trainer.model, {}, tokenizer=tokenizer, choices={"arc": QUESTIONS}, **form).data[
        "choices"
    ]["arc"]["rules"]["acc"]["agreement"]["value"]
    assert points(tmp_path, "choices/arc/agreement")[4] == expected


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"retention": {}, "choices": {}}, "^retention: nothing to measure; give texts, or choices$"),
        ({"retention": ["a"]}, "^retention: a list names no texts; give a mapping such as"),
        ({"choices_every": 0}, "^choices_every: 0 does not fit; use a whole number of at least 1$"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bad, why):
    with pytest.raises(ValueError, match=why):
        callback(**bad)
