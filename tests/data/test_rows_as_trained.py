"""Rows are read as TRL's `SFTTrainer` trains on them: the same tokens, the same of them predicted, the same loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_model, make_texts, make_tokenizer
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from retain.cli.main import main
from retain.cli.measure import MeasureConfig, new_task_reading
from retain.data.rows import (
    NEW_TASK,
    Reading,
    prompt_text,
    read_rows,
    read_text,
    read_texts,
    row_text,
    row_texts,
    token_documents,
    tokenize_documents,
)
from retain.measuring.generations import default_prompts
from retain.measuring.measure import measure
from retain.replay.dataset import load_replay_dataset, load_texts
from retain.training.retention import new_task_documents

TOOLS_CHATML = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% if mood is defined %}<|im_start|>mood {{ mood }}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{% if 'content' in message %}{{ message['content'] }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOX, TOWNS = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "old towns"}
RAIN, STONE = {"role": "user", "content": "and rain?"}, {"role": "assistant", "content": "stone"}


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tools(*names: str) -> list[dict[str, Any]]:
    properties = {name: {"type": "string"} for name in names}
    return [{"type": "function", "function": {"name": "look", "parameters": {"properties": properties}}}]


ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in make_texts(3, words=9)] + [{"text": "ends by itself<|im_end|>"}],
    "prompt and completion": [
        {"prompt": "the fox jumps", "completion": " over a dog"},
        {"prompt": "seven br", "completion": "ight birds"},  # tokens merge over the border
    ],
    "messages": [{"messages": [FOX, TOWNS]}, {"messages": [FOX, TOWNS, RAIN, STONE]}],
    "tools": [
        {"messages": [FOX, call(city="Paris"), TOWNS], "tools": tools("city")},
        {"messages": [FOX, call(unit=3, exact=None), TOWNS], "tools": tools("unit", "exact")},
        {"messages": [FOX, TOWNS], "tools": []},
    ],
    "tools in JSON": [{"messages": [FOX, call(a=1), TOWNS], "tools": json.dumps(tools("a"))}],
    "template's own": [
        {"messages": [FOX, TOWNS], "chat_template_kwargs": {"mood": "glad"}},
        {"messages": [RAIN, STONE], "chat_template_kwargs": {"mood": "sad", "other": 1}},
    ],
    "chats in two parts": [
        {"prompt": [FOX], "completion": [TOWNS], "tools": tools("a"), "chat_template_kwargs": {"mood": "glad"}},
        {"prompt": [FOX, TOWNS, RAIN], "completion": [call(b=[1, "x"]), STONE], "tools": tools("b")},
    ],
    # Of a row in several forms, the one on which TRL trains.
    "text beside a chat": [{"text": "a summary", "messages": [FOX, TOWNS]}],
    "text beside a pair": [{"text": "a summary", "prompt": "the fox", "completion": " rain"}],
    "text beside both": [{"text": "a summary", "prompt": [FOX], "completion": [TOWNS]}],
    "text beside others": [{"text": "a summary", "label": "fox"}],
    "conversations": [{"conversations": [{"from": "human", "value": "fox"}, {"from": "gpt", "value": "towns"}]}],
}

GIVEN = MeasureConfig(base="a", model=["b"], output_dir="c", max_new_tokens=0, retention=["wiki=w"])


def make_chat_tokenizer(template: str = TOOLS_CHATML, bos: str | None = "<s>") -> Any:
    return make_tokenizer(bos, template)


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def host(folder: Path, source: str, tokenizer: Any, **changes: Any) -> SFTTrainer:
    """TRL's own trainer on the rows, for training and evaluation."""
    options = {"output_dir": str(folder / "out"), "report_to": "none", "use_cpu": True, "bf16": False}
    rows, args = read_rows(source, "data"), SFTConfig(**{**options, "per_device_eval_batch_size": 8, **changes})
    return SFTTrainer(
        make_model(max_position_embeddings=512), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


def measured(trainer: SFTTrainer, rows: Any, **options: Any) -> dict[str, Any]:
    """The report on new-task rows, of the trainer's model."""
    base, tokenizer = make_model(max_position_embeddings=512), trainer.processing_class
    return measure(base, trainer.model, {}, tokenizer=tokenizer, new_task={"task": rows}, **options).data


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("changes", [{}, {"assistant_only_loss": True}, {"completion_only_loss": False}])
def test_a_row_has_the_tokens_and_labels_that_trl_trains_on(name: str, changes: dict, tmp_path: Path) -> None:
    if "assistant_only_loss" in changes and name.startswith(("text", "prompt and completion", "conversations")):
        return  # refused by TRL
    tokenizer = make_chat_tokenizer()
    source = written(tmp_path, ROWS[name])
    trained = host(tmp_path, source, tokenizer, **changes).train_dataset
    reading = Reading(**{"assistant_only_loss": False, **changes}, as_trained=True)
    read = list(read_texts(source, tokenizer, None, reading, field="data"))
    assert len(trained) == len(read) == len(ROWS[name])
    for row, text, alone in zip(trained, read, ROWS[name], strict=True):
        assert text.ids == row["input_ids"]
        assert [id if one else -100 for id, one in zip(text.ids, text.predicted, strict=True)] == row["labels"]
        assert read_text(alone, tokenizer, reading=reading).ids == text.ids, "a row does not depend on its neighbours"


def test_a_template_that_marks_no_turns_is_marked_as_trl_marks_it(tmp_path: Path) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer, source = make_chat_tokenizer(qwen2_5_chat_template), written(tmp_path, ROWS["messages"])
    trained = host(tmp_path, source, tokenizer, assistant_only_loss=True).train_dataset
    read = list(read_texts(source, tokenizer, None, Reading(assistant_only_loss=True, as_trained=True), field="data"))
    for row, text in zip(trained, read, strict=True):
        assert text.ids == row["input_ids"]
        assert [id if one else -100 for id, one in zip(text.ids, text.predicted, strict=True)] == row["labels"]


def test_a_template_that_nobody_can_mark_is_refused(tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer(CHATML.replace("<|im_start|>", "<|x|>"))
    reading = Reading(assistant_only_loss=True, as_trained=True)
    with pytest.raises(ValueError, match=r"^assistant_only_loss: the chat template does not mark .* or leave the"):
        list(read_texts(written(tmp_path, ROWS["messages"]), tokenizer, None, reading, field="data"))


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("name", ["text", "prompt and completion", "messages", "tools", "chats in two parts"])
def test_the_new_tasks_loss_is_what_the_host_evaluates(name: str, bos: str | None, tmp_path: Path) -> None:
    """Prompts were counted, too: a run that had learned "got worse"."""
    tokenizer, source = make_chat_tokenizer(bos=bos), written(tmp_path, ROWS[name])
    trainer = host(tmp_path, source, tokenizer)
    evaluated = trainer.evaluate()["eval_loss"]
    for texts in (load_texts(source, tokenizer, None, NEW_TASK), ROWS[name]):
        data = measured(trainer, texts, start_token="<|endoftext|>", max_length=512)
        assert data["new_task"]["task"]["loss"]["value"] == pytest.approx(evaluated, rel=2e-5)
    pairs = name in ("prompt and completion", "chats in two parts")
    assert data["settings"]["loss_tokens"] == {"task": "completions" if pairs else "all"}


@pytest.mark.parametrize("changes", [{"assistant_only_loss": True}, {"completion_only_loss": False}])
def test_which_tokens_count_may_be_said(changes: dict, tmp_path: Path) -> None:
    name = "messages" if "assistant_only_loss" in changes else "prompt and completion"
    tokenizer, source = make_chat_tokenizer(), written(tmp_path, ROWS[name])
    trainer = host(tmp_path, source, tokenizer, **changes)
    found = measured(trainer, ROWS[name], max_length=512, **changes)["new_task"]["task"]["loss"]
    assert found["value"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=2e-5)


def test_a_text_may_be_in_another_column(tmp_path: Path) -> None:
    rows = [{"text": "a summary", "content": text} for text in make_texts(2, words=9)]
    tokenizer, source = make_chat_tokenizer(), written(tmp_path, rows)
    trained = host(tmp_path, source, tokenizer, dataset_text_field="content").train_dataset
    read = read_texts(source, tokenizer, None, new_task_reading(GIVEN, {"dataset_text_field": "content"}), field="data")
    assert [text.ids for text in read] == list(trained["input_ids"])


def test_a_long_row_is_measured_as_the_host_cuts_it_and_beyond(tmp_path: Path) -> None:
    row = {"prompt": "the fox jumps over", "completion": " " + make_texts(1, words=30)[0]}
    tokenizer, source = make_chat_tokenizer(), written(tmp_path, [row])
    trainer = host(tmp_path, source, tokenizer, max_length=16)
    first, whole = (
        measured(trainer, [row], max_length=16, max_windows=windows)["new_task"]["task"]["loss"]
        for windows in (1, None)
    )
    assert first["value"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=2e-5)
    text = read_text(row, tokenizer, reading=NEW_TASK)
    assert whole["num_tokens"] == sum(text.predicted) > first["num_tokens"]


def test_what_an_old_text_was_given_is_context(tmp_path: Path) -> None:
    """Prompts are nobody's prediction; nor are a user's turns, where the template tells them from the answers."""
    tokenizer = make_chat_tokenizer()
    for rows, name in ((ROWS["prompt and completion"], "completions"), (ROWS["messages"], "assistant turns")):
        for document, row in zip(tokenize_documents(rows, tokenizer, 0, 64), rows, strict=True):
            assert document.loss_tokens == name
            (window,), (mask,) = document.windows, document.masks or []
            assert window == [0, *tokenizer(row_text(row, tokenizer), add_special_tokens=False)["input_ids"]]
            counted = [id for id, one in zip(window, mask, strict=True) if one]
            answers = [turn["content"] for turn in row.get("messages", [TOWNS])]
            expected = row.get("completion") or "".join(f"{answer}<|im_end|>\n" for answer in answers[1::2])
            assert tokenizer.decode(counted).endswith(expected[-5:])
            assert document.num_tokens == len(counted)
            assert document.num_bytes == len(tokenizer.decode(counted, skip_special_tokens=True).encode())
    unmarked = make_chat_tokenizer(CHATML)
    (document,) = tokenize_documents(ROWS["messages"][:1], unmarked, 0, 64)
    assert (document.loss_tokens, document.masks) == ("all", None)
    rows = load_replay_dataset(written(tmp_path, ROWS["prompt and completion"]), tokenizer, 0, 64)
    assert rows.num_predictions.tolist() == [len(rows[at]) - 1 for at in range(2)], "replay holds prompts, too"


def test_windows_of_a_prompt_alone_are_left_out() -> None:
    tokenizer = make_chat_tokenizer()
    row = {"prompt": make_texts(1, words=30)[0], "completion": " seven birds"}
    (document,) = tokenize_documents([row], tokenizer, 0, 12)
    assert [window[0] for window in document.windows] == [0] * len(document.windows)
    assert document.num_bytes == len(" seven birds")
    assert tokenize_documents([row], tokenizer, 0, 12, max_windows=1) == []


def test_special_tokens_are_predicted_and_are_no_bytes_of_text() -> None:
    """Bits per byte counted the characters of the end of a row: 5% too low on short ones."""
    tokenizer = make_chat_tokenizer()
    text = "seven bright birds"
    (document,) = tokenize_documents([{"text": text}], tokenizer, 0, 64, reading=NEW_TASK)
    ids = tokenizer(text)["input_ids"]
    assert document.windows == [[*ids, tokenizer.eos_token_id]]
    assert (document.num_tokens, document.num_bytes) == (len(ids), len(text) - len(tokenizer.decode(ids[:1])))
    end = tokenizer.eos_token_id
    (own,) = token_documents([[0, *ids, end, *ids, end]], tokenizer)
    assert (own.num_tokens, own.num_bytes) == (2 * len(ids) + 2, 2 * len(text))
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    (unknown,) = token_documents([[0, tokenizer.unk_token_id]], tokenizer)
    assert unknown.num_bytes == 0, "no text becomes it, as in GPT-2, whose unk ends documents"
    tokenizer.backend_tokenizer.model.unk_token = "<unk>"
    (unknown,) = token_documents([[0, tokenizer.unk_token_id]], tokenizer)
    assert unknown.num_bytes == len("<unk>"), "it stands for a text"


def test_the_rows_that_a_run_reports_on_have_the_bytes_that_measure_counts() -> None:
    """A run's report counted the spelling of the end of a row, `retain measure` did not."""
    tokenizer = make_chat_tokenizer()
    text = "seven bright birds"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    (reported,) = new_task_documents(Dataset.from_list([{"input_ids": ids}]), 1, tokenizer)
    (measured,) = tokenize_documents([{"text": text}], tokenizer, 0, 64, reading=NEW_TASK)
    assert (reported.num_tokens, reported.num_bytes) == (measured.num_tokens, measured.num_bytes)


def test_a_start_token_that_a_template_writes_is_no_text_to_predict() -> None:
    """Bits per byte counted its characters: 0.8% too low."""
    tokenizer = make_chat_tokenizer("<s>" + CHATML)
    (document,) = tokenize_documents([{"messages": [FOX, TOWNS]}], tokenizer, 3, 64)
    assert document.windows[0][:2] != [3, 3]
    text = row_text({"messages": [FOX, TOWNS]}, tokenizer).removeprefix("<s>")
    assert document.num_bytes == len(text.replace("<|im_start|>", "").replace("<|im_end|>", ""))


PREFERRED = [
    {"prompt": "the fox", "chosen": " old towns", "rejected": " stone"},
    {"prompt": [FOX], "chosen": [TOWNS], "rejected": [STONE]},
    {"chosen": [FOX, TOWNS], "rejected": [FOX, STONE]},
    {"chosen": "the fox, old towns", "rejected": "the fox, stone"},
]


@pytest.mark.parametrize("row", PREFERRED)
def test_a_row_of_preferences_is_no_text_and_both_its_answers_were_trained_on(row: dict, tmp_path: Path) -> None:
    """Its prompt alone was measured, as what was learned, and its answers were not looked for among the measured."""
    tokenizer, source = make_chat_tokenizer(), written(tmp_path, [row])
    with pytest.raises(
        ValueError, match=r"row 1 of .* has \['chosen', .*'rejected'\]; it needs text, messages, or prompt"
    ):
        list(read_texts(source, tokenizer, field="data"))
    chosen, rejected = row_texts(source, tokenizer, "data")
    assert "old towns" in chosen
    assert "stone" in rejected
    assert "fox" in chosen
    assert "fox" in rejected


def test_prompts_see_the_tools_and_settings_of_their_chat() -> None:
    tokenizer = make_chat_tokenizer()
    row = {"messages": [FOX, TOWNS], "tools": tools("a"), "chat_template_kwargs": {"mood": "glad"}}
    asked = prompt_text(row, tokenizer)
    assert asked.startswith("<|im_start|>tools\n")
    assert "mood glad" in asked
    assert asked.endswith("<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n")
    assert row_text(row, tokenizer).startswith(asked)


# The verbs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, rows of three forms, and a finetune of it on each form of loss."""
    folder = tmp_path_factory.mktemp("world")
    make_model(max_position_embeddings=512).save_pretrained(folder / "llama")
    make_chat_tokenizer().save_pretrained(folder / "llama")
    for name in ("messages", "prompt and completion"):
        (folder / name[:4]).mkdir()
        written(folder / name[:4], ROWS[name])
    (folder / "wiki.txt").write_text("\n\n".join(make_texts(3, seed=3, words=30)))
    return folder


def run(verb: str, **flags: Any) -> None:
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main([verb, *words]) == 0


@pytest.mark.parametrize(
    ("rows", "flags", "counted"),
    [
        ("prom", {}, "completions"),
        ("prom", {"completion_only_loss": "false"}, "all"),
        ("mess", {}, "all"),
        ("mess", {"assistant_only_loss": "true"}, "assistant turns"),
    ],
)
def test_a_run_is_measured_on_the_tokens_of_its_own_loss(
    rows: str, flags: dict, counted: str, world: Path, tmp_path: Path
) -> None:
    """And its retention text, where one window of each document is asked for, as during training."""
    source, base, text = world / rows / "rows.jsonl", world / "llama", f"wiki={world}/wiki.txt"
    common: dict[str, Any] = {"max_length": 32, "output_dir": tmp_path / "out"}
    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_dataset_name": source, "per_device_eval_batch_size": 8}
    step: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "replay_coef": 0, "save_strategy": "no"}
    step |= {"bf16": "false", "use_cpu": "true", "report_to": "none"}
    step |= {"dataset_name": source, "model_name_or_path": base, "retention": text}
    run("finetune", **common, **evaluated, **step, **flags)
    common |= {"output_dir": tmp_path / "report", "base": base, "model": tmp_path / "out", "max_windows": 1}
    run("measure", **common, retention=text, new_task=f"task={source}", max_new_tokens=0, num_resamples=100)
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    last = [row for row in data["trajectory"] if "eval_loss" in row][-1]
    assert data["new_task"]["task"]["loss"]["value"] == pytest.approx(last["eval_loss"], rel=2e-5)
    assert data["retention"]["wiki"]["ref_kl"]["value"] == pytest.approx(last["retention/wiki/ref_kl"], rel=1e-4)
    assert data["settings"]["loss_tokens"] == {"task": counted, "wiki": "all"}
    assert data["training"]["loss_tokens"] == counted
    told = (tmp_path / "report" / "report.md").read_text()
    assert f"task: {len(ROWS['messages'])} documents" in told
    assert (f"tokens of {counted}" in told) == (counted != "all")
    assert data["training"]["retention_windows"] == 1
    assert data["generations"] == [], "max_new_tokens 0 writes nothing"


def test_the_new_tasks_chats_go_through_the_template_of_the_tuned_model(world: Path, tmp_path: Path) -> None:
    """TRL's `chat_template_path` and `eos_token` change it; what is old stays in the base's form."""
    tokenizer = make_chat_tokenizer(CHATML.replace("message['content']", "'so: ' + message['content']"))
    shutil.copytree(world / "llama", tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    source = str(world / "mess" / "rows.jsonl")
    evaluated = host(tmp_path, source, tokenizer).evaluate()["eval_loss"]
    given: dict[str, Any] = {"base": world / "llama", "model": tmp_path / "tuned", "output_dir": tmp_path / "r"}
    given |= {"new_task": f"task={source}", "retention": f"old={source}", "max_new_tokens": 0, "max_length": 512}
    run("measure", **given)
    data = json.loads((tmp_path / "r" / "report.json").read_text())
    assert data["new_task"]["task"]["loss"]["value"] == pytest.approx(evaluated, rel=2e-5)
    assert data["settings"]["loss_tokens"] == {"task": "all", "old": "assistant turns"}


def test_a_chat_is_continued_where_its_answer_begins() -> None:
    """The default prompt was cut inside of the system message."""
    tokenizer = make_chat_tokenizer()
    system = {"role": "system", "content": make_texts(1, words=30)[0]}
    chat_row = {"messages": [system, FOX, TOWNS, RAIN, STONE]}
    rows = [chat_row, {"text": make_texts(1, words=30)[0]}, ROWS["conversations"][0]]
    texts = [[read_text(row, tokenizer)] for row in rows]
    chat, text, old_form = default_prompts(texts, tokenizer, 400)
    assert chat.text == row_text({"messages": [system, FOX]}, tokenizer) + "<|im_start|>assistant\n"
    assert rows[1]["text"].startswith(text.text)
    assert (chat.chat, text.chat, old_form.chat) == (True, False, True)
    assert old_form.text.startswith("<|im_start|>human\nfox")
    assert default_prompts(texts, tokenizer, 30)[0] == text, "no room for the chat"


def test_nothing_is_written_only_where_nothing_is_asked() -> None:
    given: dict[str, Any] = {"base": "a", "model": ["b"], "output_dir": "c", "max_new_tokens": 0}
    for asked in ({"prompts": "p"}, {"refusals": ["r=r"]}, {"harmless": ["h=h"]}):
        with pytest.raises(ValueError, match="max_new_tokens: 0 leaves .* without answers; use at least 1"):
            MeasureConfig(**given, **asked)
