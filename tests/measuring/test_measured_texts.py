"""Texts measured: what the base said is remembered, an interval draws as much text as it needs, the worst documents."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer

from retain.cli.main import main
from retain.data.rows import tokenize_documents
from retain.losses import next_token_loss
from retain.measuring.choices import Question
from retain.measuring.measure import measure
from retain.models.base_predictions import MeasuredBase
from retain.report.gate import UNDECIDED, judge

TOKENIZER = make_tokenizer()


def measured(tuned, base=None, **more):
    base = base if base is not None else make_model().eval()
    texts = {"a": make_texts(5, seed=1), "b": make_texts(7, seed=2, words=11)}
    return measure(base, tuned, texts, tokenizer=TOKENIZER, max_length=24, batch_tokens=60, **more)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_base_asked_once_gives_each_tuned_model_its_own_report_to_the_last_bit(architecture):
    base = make_model(architecture).eval()
    tuned = [make_model(architecture, seed=seed).eval() for seed in (1, 2)]
    more: dict = {"choices": {"q": [Question("a fox?", ("dog", "lazy bird"), 1)]}, "refusals": {"r": ["rain", "stone"]}}
    more |= {"prompts": ["the quick", "old towns sing"], "sampled": True, "max_new_tokens": 3}
    plain = [without_time(measured(one, base, **more)) for one in tuned]
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    shared = MeasuredBase(base)
    for one, expected in zip((tuned[0], tuned[1], tuned[0]), (*plain, plain[0]), strict=True):
        before = len(calls)
        assert without_time(measured(one, shared, **more)) == expected
    # Probes of both checks, and the two worst documents of both texts: these are the tuned model's affair.
    assert len(calls) - before == 3 + 2 * 2 < before / 4


def without_time(report):
    return {name: value for name, value in report.data.items() if name != "created"}


def test_a_base_that_was_changed_is_refused():
    base, tuned = MeasuredBase(make_model().eval()), make_model(seed=1).eval()
    measured(tuned, base)
    with torch.no_grad():
        next(iter(base.model.parameters())).add_(0.25)
    with pytest.raises(ValueError, match="^base: it changed after it was first measured; make a new MeasuredBase of"):
        measured(tuned, base)


def test_a_base_of_nan_is_not_called_a_changed_one():
    base, tuned = make_model().eval(), make_model(seed=1).eval()
    with torch.no_grad():
        next(iter(base.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match="^base: its predictions are NaN; check how it was trained and saved"):
        measured(tuned, MeasuredBase(base))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prompts": ["fox " * 99], "max_new_tokens": 48}, "max_new_tokens: 48 after a prompt of "),
        ({"refusals": {"r": ["fox " * 99]}, "max_new_tokens": 48}, "max_new_tokens: 48 after a prompt of "),
        ({"choices": {"q": [{"question": "x", "choices": ["fox " * 199, "b"], "answer": 0}]}}, "choices: choice 1 of "),
        (
            {"choices": {"q": [Question("x", ("a", "b"), 0)]}, "choice_chat_template": True},
            "choice_chat_template: this tokenizer has no",
        ),
    ],
)
def test_what_has_no_room_is_refused_before_texts_are_measured(given, named, monkeypatch):
    import retain.measuring.measure

    monkeypatch.setattr(retain.measuring.measure, "text_results", None)
    base, tuned = make_model(seed=0).eval(), make_model(seed=1).eval()
    with pytest.raises(ValueError, match=f"^{named}"):
        measure(base, tuned, {"wiki": make_texts(2)}, tokenizer=make_tokenizer(), **given)


def test_texts_beyond_the_memory_are_read_again():
    base, tuned = make_model().eval(), make_model(seed=1).eval()
    shared = MeasuredBase(base, max_bytes=60 * 32 * 4)
    plain = measured(tuned, base).data["retention"]
    for _ in range(2):
        assert measured(tuned, shared).data["retention"] == plain
    assert shared.cached is not None
    assert len(shared.cached.states) == 1
    assert 0 <= shared.free_bytes < 60 * 32 * 4


def test_one_name_for_two_texts_is_refused():
    text = {"a": make_texts(2)}
    with pytest.raises(ValueError, match="^new_task: 'a' is also the name of a retention text; give each its own name"):
        measure(make_model(), make_model(seed=1), text, new_task=text, tokenizer=TOKENIZER, max_length=24)


def test_sums_of_every_document_are_in_the_report():
    report = measured(make_model(seed=1).eval()).data
    for text, found in report["per_document"].items():
        tokens = sum(found["num_tokens"])
        assert sum(found["ref_kl"]) / tokens == pytest.approx(report["retention"][text]["ref_kl"]["value"], abs=1e-5)
        forgetting = (sum(found["loss"]) - sum(found["base_loss"])) / tokens
        assert forgetting == pytest.approx(report["retention"][text]["forgetting"]["value"], abs=1e-5)


def test_the_worst_documents_token_by_token():
    base, tuned = make_model().eval(), make_model(seed=1).eval()
    report = measured(tuned, base=base).data
    sums = report["per_document"]["a"]
    per_token = np.array(sums["ref_kl"]) / np.array(sums["num_tokens"])
    worst = report["worst"]["a"]
    assert [row["document"] for row in worst] == np.argsort(-per_token)[:2].tolist()
    document = tokenize_documents(make_texts(5, seed=1), TOKENIZER, 3, 24)[worst[0]["document"]]
    window = document.windows[0]
    assert [row["text"] for row in worst[0]["tokens"]] == [TOKENIZER.decode([token]) for token in window[1:]]
    logits = [model(torch.tensor([window])).logits[0, :-1].detach() for model in (base, tuned)]
    for name, of in (("base_loss", logits[0]), ("loss", logits[1])):
        expected = next_token_loss(of, torch.tensor(window[1:])).tolist()
        assert [row[name] for row in worst[0]["tokens"]] == pytest.approx(expected, abs=1e-4)
    assert [row["tuned_top"] for row in worst[0]["tokens"]] == [TOKENIZER.decode([t]) for t in logits[1].argmax(-1)]


def test_the_command_line_warns_of_texts_that_were_trained_on(tmp_path, capsys):
    for name, model in (("base", make_model()), ("tuned", make_model(seed=1))):
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    texts = make_texts(6, seed=4, words=30)
    (tmp_path / "wiki.txt").write_text("\n\n".join(texts))
    rows = [*make_texts(4, seed=5), f"Before. {texts[2]} and after"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    arguments = ["--base", str(tmp_path / "base"), "--model", str(tmp_path / "tuned"), "--max_new_tokens", "4"]
    arguments += ["--retention", f"wiki={tmp_path}/wiki.txt", "--train_dataset", str(tmp_path / "train.jsonl")]
    assert main(["measure", *arguments, "--output_dir", str(tmp_path / "out"), "--max_length", "64"]) == 0
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    (warning,) = data["warnings"]
    assert warning.startswith("wiki: 1 of 6 documents is also in the training rows of ")
    assert "1 of 6 documents is also in the training rows" in capsys.readouterr().out
    assert "1 of 6 documents is also in the training rows" in (tmp_path / "out" / "report.html").read_text()


def test_copies_of_a_document_a_question_and_a_prompt_count_once():
    """One document twenty times is one document: no interval, and nothing is decided by it."""
    questions = [Question("Which?", ("a cat", "a dog"), 0), Question("Who?", ("a cat", "a dog"), 1)]
    report = measure(
        make_model(),
        make_model(seed=1),
        {"wiki": make_texts(1) * 20, "news": [*make_texts(3, seed=2), *make_texts(2, seed=2)]},
        tokenizer=TOKENIZER,
        max_length=24,
        max_new_tokens=2,
        choices={"arc": questions * 6},
        refusals={"harm": ["the fox", "the fox"]},
        prompts=["seven", "seven", "birds"],
    )
    data = report.data
    assert data["retention"]["wiki"]["forgetting"]["ci"] == [None, None]
    assert data["retention"]["wiki"]["forgetting"]["num_documents"] == len(data["per_document"]["wiki"]["loss"]) == 1
    assert data["retention"]["news"]["loss"]["num_documents"] == 3
    assert [row["document"] for row in data["worst"]["wiki"]] == [0]
    assert data["choices"]["arc"]["num_questions"] == 2
    assert data["refusals"]["harm"]["num_prompts"] == 1
    assert len(data["generations"]) == 2
    assert data["warnings"] == [
        "wiki: 20 documents hold 19 copies, left out",
        "news: 5 documents hold 2 copies, left out",
        "arc: 12 questions hold 10 copies, left out",
        "harm: 2 requests hold 1 copy, left out",
        "prompts: 3 prompts hold 1 copy, left out",
    ]
    assert judge(report.results, max_forgetting=0.0).code == UNDECIDED
