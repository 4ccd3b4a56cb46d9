"""Protection is proven where it can move: against the live model, at evaluations and at the end; else one line."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, make_model, make_texts, make_tokenizer, random_model
from datasets import Dataset
from peft import LoraConfig
from training_runs import LORA, ROWS, TOKENIZER, config, logged, rows_of, train
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTTrainer

from retain import ForgettingCallback, ReplayConfig, ReplayMixin, ReplaySFTTrainer, ReplayTrainer, measure
from retain.replay.dataset import ReplayDataset
from retain.sampling.write import sample_replay

TEXTS = {"words": make_texts(3, seed=9)}


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


# What is still to move


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_long_warm_up_in_bf16_is_no_fault(tmp_path: Path, replay: ReplayDataset, lora: bool) -> None:
    """Steps of 1e-7 are lost in the products of bf16 autocast until they have added up: no KL, and nothing wrong."""
    adapter = LoraConfig(**LORA) if lora else None
    changes = {"learning_rate": 1e-4 if lora else 1e-6, "lr_scheduler_type": "linear", "warmup_steps": 1000}
    changes |= {"bf16": True, "max_steps": 24 if lora else 12, "logging_steps": 4}
    kl = logged(train(tmp_path, replay, peft_config=adapter, changes=changes), "replay/kl")
    assert len(kl) == (6 if lora else 3)
    assert kl[-1] > 0


# What moves along


class Merge(TrainerCallback):
    """ReLoRA: after a step, what the adapter learned goes into the base, and a new adapter begins at nothing."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.base_layer.weight.data += module.get_delta_weight("default")
                module.lora_B["default"].weight.data.zero_()


@pytest.mark.parametrize(("at", "precision"), [("evaluation", "bf16"), ("checkpoint", "float32"), ("end", "bf16")])
def test_a_base_that_an_adapter_was_merged_into_is_seen(
    tmp_path: Path, replay: ReplayDataset, at: str, precision: str
) -> None:
    """The adapter switched off was taken for the base still: ref_kl 0.0 where an independent copy says 0.375."""
    changes = {"learning_rate": 1e-2, "bf16": precision == "bf16"}
    changes |= {"evaluation": {"eval_strategy": "steps", "eval_steps": 2}, "checkpoint": {"save_strategy": "steps",
                "save_steps": 2}, "end": {}}[at]  # fmt: skip
    more = {"eval_dataset": ROWS.select(range(4)), "peft_config": LoraConfig(**LORA), "changes": changes}
    if at == "evaluation":
        train(tmp_path / "kept", replay, retention_datasets=TEXTS, **more)
    says = rf"replay_reference: 'adapter' gives other predictions at step {3 if at == 'end' else 2} than .*merged into"
    with pytest.raises(ValueError, match=says):
        train(tmp_path / "merged", replay, retention_datasets=TEXTS, callbacks=[Merge(2)], **more)
    assert "ref_kl" not in (tmp_path / "merged" / "metrics.jsonl").read_text()


def test_forgetting_is_not_measured_against_a_base_that_an_adapter_was_merged_into(tmp_path: Path) -> None:
    def run(*more: Any) -> Any:
        measured = ForgettingCallback(TEXTS)
        args = config(tmp_path, learning_rate=1e-2, eval_strategy="steps", eval_steps=3)
        trainer = SFTTrainer(
            make_model(), args, train_dataset=ROWS, eval_dataset=ROWS.select(range(4)), processing_class=TOKENIZER,
            peft_config=LoraConfig(**LORA), callbacks=[*more, measured],
        )  # fmt: skip
        trainer.train()
        return measured.tables[3]["words"]["ref_kl"]["value"]

    assert run() > 1e-3
    with pytest.raises(ValueError, match="base: its predictions at step 3 differ"):
        run(Merge(2))


class Follow(TrainerCallback):
    """Moves the frozen copy along with the model, as trainers do that renew their reference."""

    trainer: Any = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.replay.reference.ref_model.load_state_dict(self.trainer.model.state_dict())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_copy_that_follows_the_model_is_seen(tmp_path: Path, dropout: float) -> None:
    """Without dropout at the first step that has moved the weights: the KL stays 0. Else at a checkpoint or the end."""
    drop = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    follow = Follow()
    follow.trainer = ReplaySFTTrainer(
        model=make_model("gpt2", **drop), args=config(tmp_path, max_steps=40 if not dropout else 3),
        train_dataset=ROWS, processing_class=TOKENIZER, replay_dataset=rows_of(make_model("gpt2")), callbacks=[follow],
    )  # fmt: skip
    says = f"'copy' gives other predictions at step {3 if dropout else 1} than"
    with pytest.raises(ValueError, match=says):
        follow.trainer.train()


# What the host changes


class Halved(SFTTrainer):
    """A host that changes the model it was given."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        with torch.no_grad():
            self.model.get_output_embeddings().weight.mul_(0.5)


def test_a_copy_is_proven_against_the_model_that_is_trained(tmp_path: Path, replay: ReplayDataset) -> None:
    """It was compared with itself."""

    class Host(ReplayMixin, Halved):
        pass

    with pytest.raises(ValueError, match="replay_reference: the trainer changed the model that it was given"):
        train(tmp_path, replay, trainer_class=Host)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("vocab_size", [320, 448], ids=["added", "padded"])
def test_a_vocabulary_that_the_host_resizes_is_refused_before_a_step(
    tmp_path: Path, lora: bool, vocab_size: int
) -> None:
    """`chat_template_path` adds tokens and cuts what was padded; RuntimeError at step 1, after "proven"."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(tmp_path / "chat")
    model = make_model(vocab_size=vocab_size)
    says = f"replay_reference: the trainer changed the vocabulary from {vocab_size} to 384 tokens.*chat_template_path"
    with pytest.raises(ValueError, match=says):
        ReplaySFTTrainer(
            model, config(tmp_path, chat_template_path=str(tmp_path / "chat")), train_dataset=ROWS,
            processing_class=make_tokenizer(), replay_dataset=rows_of(model),
            peft_config=LoraConfig(**LORA) if lora else None,
        )  # fmt: skip


# Models and devices that replay does not know


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_model_without_a_token_head_is_refused(tmp_path: Path, replay: ReplayDataset, kind: Any) -> None:
    """A KL over classes was called nats per token."""
    settings = make_model().config
    settings.num_labels = 3
    model = kind.from_config(settings)
    args = config(tmp_path)
    for chosen in ({}, {"replay_objective": "ntp"}, {"replay_objective": "replace"}):
        with pytest.raises(ValueError, match="model: Llama.*Classification has no head that predicts each"):
            ReplayTrainer(
                model=model, args=args, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}],
                processing_class=TOKENIZER, replay_config=ReplayConfig(**chosen),
                replay_dataset=ReplayDataset.from_rows(list(replay), "rows"),
            )  # fmt: skip
    with pytest.raises(ValueError, match="model: Llama.*Classification has no head"):
        ReplayTrainer(model=model, args=args, processing_class=TOKENIZER, replay_config=ReplayConfig(replay_coef=0.0),
                      retention_datasets=TEXTS)  # fmt: skip
    with pytest.raises(ValueError, match="model: Llama.*Classification has no head"):
        measure(make_model(), model, TEXTS, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="model: Llama.*Classification has no head"):
        sample_replay(model, TOKENIZER, tmp_path / "rows", num_rows=2)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_reward_model_is_refused(tmp_path: Path, replay: ReplayDataset, llama_folder: Path, by_name: bool) -> None:
    class Host(ReplayMixin, RewardTrainer):
        pass

    settings = make_model().config
    settings.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(settings)
    args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"chosen": "the fox", "rejected": "the dog"}])
    with pytest.raises(ValueError, match="model: RewardTrainer trains scores"):
        Host(model=str(llama_folder) if by_name else model, args=args, train_dataset=rows, processing_class=TOKENIZER,
             replay_dataset=ReplayDataset.from_rows(list(replay), "rows"))  # fmt: skip


def test_what_a_copy_costs_under_fsdp2_is_said_before_the_run(tmp_path: Path, replay: ReplayDataset) -> None:
    host: dict[str, Any] = {"train_dataset": ROWS, "processing_class": TOKENIZER, "replay_dataset": replay}
    trainer = ReplaySFTTrainer(make_model(), config(tmp_path), **host)
    assert len(trainer.protection()) == 3
    trainer.is_fsdp_enabled = True
    assert trainer.protection()[1].startswith("reference: a copy, sharded like the model, 0.0 GB a device;")


def test_a_model_that_sees_the_tokens_it_predicts_is_refused(tmp_path: Path, replay: ReplayDataset) -> None:
    """BERT has an output head, and says what each token is: its loss of the next one is no forgetting at all."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = random_model(BertConfig(vocab_size=320, **sizes), 0, 3.0)
    with pytest.raises(ValueError, match=r"^model: \w+ has no head that predicts each next token"):
        train(tmp_path, replay, model, ReplayTrainer)
    with pytest.raises(ValueError, match=r"^model: \w+ has no head that predicts each next token"):
        measure(model, model, TEXTS, tokenizer=TOKENIZER)


# What is said


def test_rows_that_are_all_dropped_are_named(tmp_path: Path, replay: ReplayDataset) -> None:
    """TRL drops rows whose completions are cut off; torch then said "num_samples=0"."""
    rows = Dataset.from_list([{"prompt": text, "completion": " x"} for text in make_texts(4, seed=1)])
    with pytest.raises(ValueError, match=r"^train_dataset: no row is left"):
        train(tmp_path, replay, train_dataset=rows, changes={"max_length": 16})


def test_a_step_without_a_label_is_said_to_be_one(tmp_path: Path, replay: ReplayDataset) -> None:
    rows = Dataset.from_list([{"input_ids": [3, 7, 9, 11], "labels": [-100] * 4}] * 8)
    with pytest.raises(ValueError, match="loss: nan at step 1: every label of its new rows is masked .-100."):
        train(tmp_path, replay, trainer_class=ReplayTrainer, train_dataset=rows)


def test_no_message_sends_the_reader_to_a_folder_that_a_wheel_does_not_have() -> None:
    for path in (Path(__file__).parents[2] / "src" / "retain").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not re.search(r"\b(docs|experiments|examples)/", node.value), f"{path.name}: {node.value}"
