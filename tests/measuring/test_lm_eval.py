"""lm-evaluation-harness in memory: it answers as we do, question by question, and leaves the models as they were.

lm_eval is not among the test extras: `pip install 'retain[eval]'` first, or nothing here but the refusals is tested.
Last seen to pass with lm_eval 0.4.13.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHATML, make_model, make_texts, make_tokenizer, moved_model
from peft import LoraConfig, get_peft_model

from retain.measuring import lm_eval as harness
from retain.measuring.choices import Question, choice_scores, encode_questions, likeliest_choices, measure_choices
from retain.measuring.lm_eval import answer_of, evaluate_samples, load_tasks, measure_with_lm_eval
from retain.measuring.measure_options import Options
from retain.measuring.tokens import logits_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what lm_eval and its dependencies warn of is theirs
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: retain[eval]")
TOKENIZER = make_tokenizer()
LETTERS = "".join(f"\n{letter}. {{{{choices[{at}]}}}}" for at, letter in enumerate("ABCD"))
ASKED: dict[str, dict[str, Any]] = {
    "text": {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}"},
    "letter": {"doc_to_text": f"Question: {{{{question.strip()}}}}{LETTERS}\nAnswer:", "doc_to_choice": [*"ABCD"]},
}


def four_choices(count: int) -> list[Question]:
    rng = np.random.default_rng(1)
    pool = make_texts(1)[0].split()
    return [
        Question(text, tuple(" ".join(rng.choice(pool, size)) for size in rng.integers(1, 6, 4)), int(rng.integers(4)))
        for text in make_texts(count, seed=3, words=9)
    ]


QUESTIONS = four_choices(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks `mine_text` and `mine_letter`, a group `both` of them, a tag `tagged`, and one that generates."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q.text, "choices": list(q.choices), "answer": q.answer} for q in QUESTIONS]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test", "tag": "tagged"}
    data["dataset_kwargs"] = {"data_files": {"test": str(path / "rows.jsonl")}, "cache_dir": str(path / "cache")}
    chosen = {"output_type": "multiple_choice", "doc_to_target": "answer"}
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    for style, asked in ASKED.items():
        task = {"task": f"mine_{style}", **data, **chosen, **asked, "metric_list": accuracy}
        (path / f"{style}.yaml").write_text(json.dumps(task))  # JSON is YAML
    (path / "group.yaml").write_text(json.dumps({"group": "both", "task": ["mine_text", "mine_letter"]}))
    written = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}"}
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    until = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    (path / "w.yaml").write_text(json.dumps({"task": "writes", **data, **written, **until, "metric_list": [exact]}))
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    of_words = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    (path / "r.yaml").write_text(json.dumps({"task": "rolls", **data, "tag": [], **rolling, "metric_list": [of_words]}))
    return path


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@needs_lm_eval
@pytest.mark.parametrize(("style", "chat"), [("text", False), ("letter", False), ("letter", True)])
def test_it_finds_what_we_find(style, chat, folder):
    tokenizer = chat_tokenizer()
    models = make_model(), moved_model()
    ours = measure_choices(*models, QUESTIONS, Options(tokenizer, 3), style=style, chat_template=chat)
    theirs = measure_with_lm_eval(*models, tokenizer, [f"mine_{style}"], include_path=folder, chat_template=chat)
    (found,) = theirs.values()
    assert list(theirs) == [f"mine_{style}"]
    assert ours.keys() - {"num_truncated"} == found.keys()
    assert (found["num_questions"], found["chat_template"], found["notes"]) == (40, chat, [])
    for rule, compared in ours["rules"].items():
        del compared["noise_agreement"]
        assert found["rules"][rule] == compared
    assert 0 < found["rules"]["acc"]["agreement"]["value"] < 1


@needs_lm_eval
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("style", ["text", "letter"])
def test_every_score_and_answer_is_ours(style, chat, folder):
    model, tokenizer = moved_model(), chat_tokenizer()
    tasks = list(load_tasks([f"mine_{style}"], folder).values())
    options = {"limit": None, "num_fewshot": None, "chat_template": chat, "batch_size": 7, "seed": 0}
    samples = evaluate_samples(model, tokenizer, tasks, **options)[f"mine_{style}"]["none"]
    inputs = encode_questions(QUESTIONS, tokenizer, style=style, chat_template=chat, limit=128)
    scores = choice_scores(logits_of(model), inputs, batch_tokens=500, device="cpu")
    for at, found in enumerate(scores):
        np.testing.assert_allclose(found, [response[0] for response in samples[at]["filtered_resps"]], atol=1e-4)
    for rule in ("acc", "acc_norm"):
        assert [answer_of(samples[at], rule) for at in range(40)] == likeliest_choices(scores, inputs.lengths, rule)


@needs_lm_eval
def test_groups_tags_and_files(folder):
    options = {"include_path": folder, "limit": 5}
    models = make_model(), moved_model()
    found = measure_with_lm_eval(*models, TOKENIZER, ["both", "writes"], **options)
    assert list(found) == ["mine_text", "mine_letter", "writes"]
    assert [entry["num_questions"] for entry in found.values()] == [5, 5, 5]
    assert list(found["writes"]["rules"]) == ["exact_match"]
    by_file = measure_with_lm_eval(*models, TOKENIZER, [str(folder / "text.yaml")], limit=5)
    assert by_file == {"mine_text": found["mine_text"]}
    assert set(load_tasks(["tagged"], folder)) == {"mine_text", "mine_letter", "writes"}


@needs_lm_eval
def test_both_models_see_the_same_examples(folder):
    options = {"include_path": folder, "limit": 8, "num_fewshot": 2}
    (found,) = measure_with_lm_eval(make_model(), make_model(), TOKENIZER, ["mine_letter"], **options).values()
    assert found["notes"] == [], "no question was put in other words"
    assert found["rules"]["acc"]["agreement"]["value"] == 1.0


@needs_lm_eval
def test_models_and_tokenizer_stay_as_they_were(folder):
    base, tokenizer = make_model().to(torch.bfloat16), make_tokenizer()
    tokenizer.pad_token = None
    tuned = get_peft_model(make_model().to(torch.bfloat16), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    tuned.train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (base, tuned)]
    (found,) = measure_with_lm_eval(base, tuned, tokenizer, ["mine_text"], include_path=folder, limit=9).values()
    assert found["rules"]["acc"]["agreement"]["value"] == 1.0, "dropout is off, and an adapter of zeros changes nothing"
    assert (base.dtype, base.device, base.training) == (torch.bfloat16, torch.device("cpu"), False)
    assert all(module.training for module in tuned.modules())
    assert tokenizer.pad_token is None
    for model, states in zip((base, tuned), before, strict=True):
        assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


@needs_lm_eval
def test_what_cannot_be_measured_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    def few(include_path: str | None = None, include_defaults: bool = True) -> Any:
        return TaskManager(include_path=include_path, include_defaults=False)  # reading them all takes long

    monkeypatch.setattr("lm_eval.tasks.TaskManager", few)
    (tmp_path / "broken.yaml").write_text(json.dumps({"task": "broken", "dataset_path": "no/such", "test_split": "x"}))
    for names, path, why in (
        (["mine_text", "arc_hard"], folder, "lm_eval: no task 'arc_hard'; `lm-eval ls tasks` lists them, or give a YA"),
        (["rolls"], folder, "lm_eval: 'rolls' has word_perplexity, which judge no answer by itself; give tasks with"),
        (["broken"], tmp_path, "lm_eval: cannot load broken; "),
        (["a"], tmp_path / "missing", "include_path: no folder "),
    ):
        with pytest.raises(ValueError, match=f"^{why}") as error:
            load_tasks(names, path)
        assert "\n" not in str(error.value)


@needs_lm_eval
def test_a_task_without_answers_is_left_out_aloud(folder, monkeypatch, caplog):
    monkeypatch.setattr("retain.measuring.lm_eval.answer_of", lambda row, metric: None)
    with pytest.raises(ValueError, match="^lm_eval: no answers of mine_text can be compared"):
        measure_with_lm_eval(make_model(), make_model(), TOKENIZER, ["mine_text"], include_path=folder, limit=2)
    assert (
        "lm_eval: mine_text is left out; pair: base and tuned model do not tell the answers behind acc" in caplog.text
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^lm_eval: the package is not installed; pip install 'retain\[eval\]'$"):
        measure_with_lm_eval(make_model(), make_model(), TOKENIZER, ["arc_easy"])
