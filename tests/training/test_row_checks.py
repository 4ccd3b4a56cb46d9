"""Rows of a run: those replayed, trained on and measured are looked through, and refused where they meet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_texts
from datasets import Dataset
from peft import LoraConfig
from training_runs import LORA, ROWS, TOKENIZER, logged, rows_of, train
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from retain import ReplayConfig
from retain.data.overlap import find_rows
from retain.replay.dataset import ReplayDataset, token_documents, tokenize_documents
from retain.training.row_checks import check_held_out, row_columns, training_rows, warn_of_trained_rows


@pytest.fixture(scope="module")
def replay() -> ReplayDataset:
    return rows_of(make_model())


def test_replay_and_retention_must_not_share_rows(tmp_path: Path, replay: ReplayDataset) -> None:
    shared = token_documents([replay[0].tolist(), replay[1].tolist()], TOKENIZER)
    with pytest.raises(ValueError, match="retention: 'own' shares 2 rows"):
        train(tmp_path, replay, retention_datasets={"own": shared})


def test_a_beginning_that_many_files_share_is_no_shared_row(tmp_path: Path) -> None:
    header = list(range(10, 50))  # a licence, say
    rows = ReplayDataset.from_rows([[3, *header, 60 + at, 61] for at in range(8)], "licensed")
    other = token_documents([[3, *header, 99, 98]], TOKENIZER)
    train(tmp_path / "other", rows, retention_datasets={"code": other}, changes={"max_steps": 1})
    for same in ([3, *header], [3, *header, 60, 61, 77]):  # cut shorter, or longer
        with pytest.raises(ValueError, match="retention: 'code' shares 1 rows"):
            train(tmp_path / "same", rows, retention_datasets={"code": token_documents([same], TOKENIZER)})


def shifted(texts: list[str]) -> list[str]:
    return [" ".join(text.split()[3:]) for text in texts]


OLD = make_texts(12, seed=3)


SHORT = ["the quick fox", "over a lazy dog", "seven bright birds", "rain and stone"]


@pytest.mark.parametrize(
    ("replayed", "measured"), [(OLD, OLD), (OLD, shifted(OLD)), (SHORT, SHORT), (SHORT, SHORT[:1])]
)
def test_replayed_text_is_found_however_short_or_cut(tmp_path: Path, replayed: list[str], measured: list[str]) -> None:
    (tmp_path / "old.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in replayed))
    ntp = ReplayConfig(replay_objective="ntp")
    with pytest.raises(ValueError, match=rf"retention: 'old' shares {len(measured)} rows with the replay dataset"):
        train(tmp_path, str(tmp_path / "old.jsonl"), retention_datasets={"old": measured}, replay_config=ntp)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [None, "wrapped", "bfd"])
@pytest.mark.parametrize("cut", [False, True], ids=["same", "shifted"])
def test_retention_must_not_be_trained_on(
    tmp_path: Path, replay: ReplayDataset, packing: str | None, cut: bool
) -> None:
    texts = ROWS["text"][:8]
    changes = {"packing": True, "packing_strategy": packing} if packing else {}
    with pytest.raises(ValueError, match=r"retention: 'new' shares \d rows with the training rows; measure on rows"):
        train(tmp_path, replay, retention_datasets={"new": shifted(texts) if cut else texts}, changes=changes)


def test_preferences_that_are_measured_are_refused_and_streams_are_not_looked_at() -> None:
    pairs = Dataset.from_list([{"prompt_ids": [3, 5], "chosen_ids": [at, 7, 8], "rejected_ids": [9]} for at in (1, 2)])
    rows = [[3, 5, 1, 7, 8], [3, 5, 9], [3, 5, 2, 7, 8], [3, 5, 9]]
    assert [row.tolist() for row in training_rows(pairs)] == rows, "what is rejected is trained on, too"
    assert [row.tolist() for row in training_rows([{"input_ids": [1, 2]}])] == [[1, 2]]
    assert [row.tolist() for row in training_rows(Dataset.from_list([{"input_ids": [1, 2]}] * 3).select([1]))] == [
        [1, 2]
    ]
    for unknown in (None, [], ROWS, ROWS.to_iterable_dataset()):
        assert list(training_rows(unknown)) == []


PAIRS = {"prompt": ROWS["text"][:4], "chosen": ROWS["text"][4:8], "rejected": ROWS["text"][8:12]}


HOSTS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS, ("prompt", "chosen", "rejected")),
    "reward": (RewardTrainer, RewardConfig, PAIRS, ("chosen", "rejected")),
    "kto": (
        KTOTrainer, KTOConfig,
        {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 2},
        ("prompt", "completion"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_text_that_a_host_of_trl_trains_on_is_no_retention_text(name: str, tmp_path: Path, llama_folder: Path) -> None:
    """KTO's rows and the rejected answers of DPO passed: only two names of columns were known."""
    host, arguments, columns, trained_on = HOSTS[name]
    options = {"max_length": 512, "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    model: Any = str(llama_folder)
    if name == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=1)
    rows = Dataset.from_dict(columns)
    trainer: Any = host(model=model, args=arguments(**options), train_dataset=rows, processing_class=TOKENIZER)
    for column in trained_on:
        documents = tokenize_documents([columns[column][1]], TOKENIZER, 3, 512)
        with pytest.raises(ValueError, match="'wiki' shares 1 rows with the training rows"):
            check_held_out(training_rows(trainer.train_dataset), {"wiki": documents}, "training rows", {2, 3, 4})
    others = tokenize_documents(ROWS["text"][20:24], TOKENIZER, 3, 512)
    check_held_out(training_rows(trainer.train_dataset), {"wiki": others}, "training rows", {2, 3, 4})


def test_columns_of_integers_that_are_no_tokens_make_no_rows() -> None:
    example = {"prompt_ids": [1], "completion_ids": [2], "KL_completion_ids": [3], "token_type_ids": [0], "label": True}
    assert row_columns(example) == [("prompt_ids", "completion_ids")]
    assert row_columns({"chosen_input_ids": [1], "rejected_input_ids": [2], "position_ids": [0]}) == [
        ("chosen_input_ids",), ("rejected_input_ids",),
    ]  # fmt: skip
    assert row_columns({"prompt_ids": [1], "text": "a", "image_ids": ["a"]}) == [("prompt_ids",)]


def test_training_rows_that_are_made_on_demand_are_made_together() -> None:
    batches: list[int] = []

    class Made(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2500

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return self.__getitems__([index])[0]

        def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
            batches.append(len(indices))
            return [{"input_ids": torch.tensor([index, 7])} for index in indices]

    assert [row.tolist() for row in training_rows(Made())] == [[index, 7] for index in range(2500)]
    assert batches[-3:] == [1000, 1000, 500]
    assert len(batches) < 10

    class InOneMapping(Made):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([index, 7])}

        def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"input_ids": torch.tensor([[index, 7] for index in indices])}

    assert [row.tolist() for row in training_rows(InOneMapping())] == [[index, 7] for index in range(2500)]


def test_rows_that_share_a_template_or_a_heading_are_not_the_same() -> None:
    generator = np.random.default_rng(0)
    template = list(range(200, 230))
    chats = [[3, *template, *generator.integers(10, 90, 20), *template[:9], 4] for _ in range(40)]
    assert find_rows(chats[:10], chats[10:], {3, 4}) == set()
    assert find_rows([*chats[:10], chats[20]], chats[10:], {3, 4}) == {10}
    packed = [np.concatenate(chats[at : at + 3])[:100] for at in range(10, 38, 3)]  # cut inside of a template, too
    assert find_rows(chats[:10], packed, {3, 4}) == set()
    documents = token_documents([*chats[:10], [3, 5, 6]], TOKENIZER)
    check_held_out([*chats[10:], [3, 5, 6]], {"chats": documents}, "training rows", {3, 4})  # one heading of eleven
    with pytest.raises(ValueError, match="shares 1 rows"):
        check_held_out([[3, 5, 6, 4]], {"heading": token_documents([[3, 5, 6]], TOKENIZER)}, "training rows", {3, 4})


def test_rows_that_nobody_looked_through_are_named(
    tmp_path: Path, replay: ReplayDataset, caplog: pytest.LogCaptureFixture
) -> None:
    train(
        tmp_path, replay, train_dataset=ROWS.to_iterable_dataset(), retention_datasets={"words": make_texts(3, seed=9)}
    )
    assert "retention: texts not searched for in the training rows, which are a stream" in caplog.text


def test_learning_measured_on_training_rows_is_called_memory(caplog: pytest.LogCaptureFixture) -> None:
    rows, others = (TOKENIZER(make_texts(20, seed=seed))["input_ids"] for seed in (1, 2))
    new, warned = Dataset.from_dict({"input_ids": rows}), "eval_dataset: 2 of 20 rows are training rows, too"
    for held_out in (others, [*rows[:1], *others[1:]], None, [*rows[:2], *others[2:]]):
        assert warned not in caplog.text
        warn_of_trained_rows(held_out and Dataset.from_dict({"input_ids": held_out}), new, {3, 4})
    assert warned in caplog.text
    caplog.clear()
    warn_of_trained_rows({"a": new}, new, {3, 4})  # several sets, by name
    assert caplog.text == ""


INVOKING = [[3, 7, 9, *range(10, 20)]] * 8  # rows with what switches an activated LoRA on


def test_activated_lora_that_no_replay_row_switches_on_is_refused(tmp_path: Path, replay: ReplayDataset) -> None:
    """Short runs were called protected, and longer ones ended in an error: a KL of exactly 0."""
    alora = LoraConfig(**LORA, alora_invocation_tokens=[7, 9])
    with pytest.raises(ValueError, match=r"^replay_dataset: no row holds the tokens \[7, 9\] that switch aLoRA on"):
        train(tmp_path, replay, peft_config=alora)
    rows, new = ReplayDataset.from_rows(INVOKING, "invoking"), Dataset.from_dict({"input_ids": INVOKING})
    assert logged(train(tmp_path, rows, peft_config=alora, train_dataset=new), "replay/kl")[-1] > 0
