"""Multiple choice: scores by hand, by a naive twin and by lm-evaluation-harness; files paired without any model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CHATML, make_model, make_texts, make_tokenizer, save_model
from tokenizers.processors import TemplateProcessing

from retain import ForgettingCallback
from retain.cli.main import main
from retain.cli.measure import paired_report
from retain.measuring.answer_files import read_samples, task_of
from retain.measuring.choices import (
    Inputs,
    Question,
    as_question,
    as_questions,
    choice_scores,
    context_and_answers,
    encode_pair,
    encode_questions,
    likeliest_choices,
    load_questions,
    measure_choices,
)
from retain.measuring.measure import measure
from retain.measuring.paired_answers import compare_answers, pair_answers
from retain.measuring.tokens import Options, logits_of
from retain.report.report import ForgettingReport
from retain.report.results import RunResults
from retain.report.sentences import answers_sentence
from retain.report.tables import answers_table

TOKENIZER = make_tokenizer()
OPTIONS = Options(TOKENIZER, start_id=3)
HOSTILE = "</li><script>alert(1)</script><img src=x> \x1b[31m \u202eevil | `x` \x00"


def make_questions(count: int = 12, seed: int = 0) -> list[Question]:
    """Questions of random words with two to five choices of unlike lengths, some of them not ASCII."""
    rng = np.random.default_rng(seed)
    pool = ["naïve", "日本", *make_texts(1, seed=seed)[0].split()]

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(pool, int(rng.integers(low, high))))

    return [
        Question(
            words(4, 12) + ["?", " "][at % 3 == 0], tuple(words(1, 6) for _ in range(2 + at % 4)), int(rng.integers(2))
        )
        for at in range(count)
    ]


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that opens every text with its BOS, as Llama's does."""
    bos = tokenizer.bos_token
    special = [(bos, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer


def chat_tokenizer() -> Any:
    tokenizer = with_bos(make_tokenizer(bos="<|im_start|>"))
    tokenizer.chat_template = CHATML
    return tokenizer


# Scores


def test_scores_and_choices_by_hand():
    """Three tokens; what follows hangs on the last token alone, and logits are known up to a constant."""
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5], [0.25, 0.25, 0.5]]).log()
    inputs = Inputs(
        rows={
            (2, 0): [(0, 0, [1]), (1, 1, [0])],  # log ¼ ; log ½
            (0, 1): [(0, 1, [1, 2])],  # log ¼ + log ½
            (0,): [(1, 0, [2])],  # log ¼
        },
        lengths=[np.array([1.0, 4.0]), np.array([1.0, 2.0])],
    )
    for batch_tokens in (1, 100):
        scores = choice_scores(
            lambda input_ids, attention_mask: log_probs[input_ids] + 7,
            inputs,
            batch_tokens=batch_tokens,
            device="cpu",
        )
        np.testing.assert_allclose(scores[0], np.log([1 / 4, 1 / 8]), atol=1e-6)
        np.testing.assert_allclose(scores[1], np.log([1 / 4, 1 / 2]), atol=1e-6)
        assert likeliest_choices(scores, inputs.lengths, "acc") == [0, 1]
        assert likeliest_choices(scores, inputs.lengths, "acc_norm") == [1, 1]  # log(8)/4 < log(4)
    assert likeliest_choices([np.array([-1.0, -1.0])], [np.ones(2)], "acc") == [0], "the first of equals"


def naive_scores(model: Any, tokenizer: Any, question: Question, style: str, chat: bool) -> list[float]:
    """Choice by choice, without padding, in float64."""
    context, answers = context_and_answers(question, style)
    if chat:
        turns = [{"role": "user", "content": context}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    scores = []
    for answer in answers:
        start, wanted = encode_pair(tokenizer, context, answer if chat else " " + answer)
        with torch.no_grad():
            logits = model(torch.tensor([start + wanted])).logits[0].double().log_softmax(-1)
        scores.append(sum(float(logits[len(start) - 1 + at, token]) for at, token in enumerate(wanted)))
    return scores


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("style", "chat"), [("text", False), ("letter", False), ("letter", True)])
def test_scores_equal_a_naive_twin(architecture, style, chat):
    model, tokenizer = make_model(architecture), chat_tokenizer()
    questions = make_questions(6)
    inputs = encode_questions(questions, tokenizer, style=style, chat_template=chat, limit=128)
    scores = choice_scores(logits_of(model), inputs, batch_tokens=300, device="cpu")
    assert inputs.num_truncated == 0
    assert len(inputs.rows) <= (6 if style == "letter" else sum(len(question.choices) for question in questions))
    for question, found in zip(questions, scores, strict=True):
        expected = naive_scores(model, tokenizer, question, style, chat)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_batches_play_no_part():
    inputs = encode_questions(make_questions(), TOKENIZER, style="text", chat_template=False, limit=None)
    whole, small = (
        choice_scores(logits_of(make_model()), inputs, batch_tokens=tokens, device="cpu") for tokens in (9999, 1)
    )
    for one, other in zip(whole, small, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_a_continuation_is_what_the_whole_has_beyond_the_context():
    start, wanted = encode_pair(TOKENIZER, "the quick", " brown fox")
    assert start == TOKENIZER("the quick")["input_ids"]
    assert start + wanted == TOKENIZER("the quick brown fox")["input_ids"]
    assert encode_pair(TOKENIZER, "the quick  \n", "brown") == encode_pair(TOKENIZER, "the quick", "  \nbrown")
    bos = with_bos(make_tokenizer())
    start, wanted = encode_pair(bos, "the", " fox")
    assert (start[0], start[1:], wanted) == (3, *encode_pair(TOKENIZER, "the", " fox"))
    start, wanted = encode_pair(bos, "<s>the", " fox")
    assert (start.count(3), wanted) == (1, encode_pair(TOKENIZER, "the", " fox")[1]), "BOS is not doubled"


def test_what_a_tokenizer_appends_is_no_part_of_an_answer():
    """Else every choice is scored as EOS alone."""
    closing = make_tokenizer()
    special = [("<s>", 3), (closing.eos_token, closing.eos_token_id)]
    template = TemplateProcessing(single=f"<s> $A {closing.eos_token}", special_tokens=special)
    closing.backend_tokenizer.post_processor = template
    assert closing("the fox")["input_ids"][-1] == closing.eos_token_id
    for context in ("the quick", "<s>the quick"):
        start, wanted = encode_pair(closing, context, " fox")
        assert (start, wanted) == encode_pair(with_bos(make_tokenizer()), context, " fox")
        assert wanted == TOKENIZER(" fox", add_special_tokens=False)["input_ids"]


def test_a_choice_without_tokens_of_its_own_is_refused(monkeypatch):
    """Where a token spans the join of question and choice."""
    monkeypatch.setattr("retain.measuring.choices.encode_pair", lambda *given: ([1, 2], []))
    for style, other in (("letter", "text"), ("text", "letter")):
        advice = f"leave the question out, or try choice_style {other}"
        with pytest.raises(ValueError, match=f"choice 1 of question 1 has 0 tokens of its own; {advice}$"):
            encode_questions(make_questions(1), TOKENIZER, style=style, chat_template=False, limit=None)


def test_what_is_too_long_loses_its_beginning_and_is_counted():
    question = Question(make_texts(1, words=60)[0], ("old towns", "rain"), 0)
    inputs = encode_questions([question], TOKENIZER, style="text", chat_template=False, limit=20)
    assert inputs.num_truncated == 2
    context = "Question: " + question.text + "\nAnswer:"
    for row, [(_, choice, wanted)] in inputs.rows.items():
        whole = TOKENIZER(f"{context} {question.choices[choice]}")["input_ids"]
        assert (*row, wanted[-1]) == tuple(whole[-21:])
    with pytest.raises(ValueError, match=r"choices: choice 1 of question 1 has \d+ tokens of its own; leave"):
        encode_questions([question], TOKENIZER, style="text", chat_template=False, limit=1)


def test_the_two_styles_ask_as_the_harness_does():
    question = Question(" Why? ", ("rain", "stone"), 1)
    assert context_and_answers(question, "text") == ("Question:  Why? \nAnswer:", ("rain", "stone"))
    assert context_and_answers(question, "letter") == ("Question: Why?\nA. rain\nB. stone\nAnswer:", ("A", "B"))


# Questions


def write_questions(path: Path, questions: list[Question]) -> None:
    rows = [{"question": q.text, "choices": list(q.choices), "answer": q.answer} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ARC = {"id": "M_7", "question": "Why?", "choices": {"text": ["rain", "stone", "fox"], "label": ["1", "2", "3"]}}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "choices": ["rain", "stone", "fox"], "answer": 1},  # MMLU: an index
        {"question": "Why?", "choices": ["rain", "stone", "fox"], "answer": "B"},
        {"question": "Why?", "choices": ["rain", "stone", "fox"], "answer": "stone"},
        {**ARC, "answerKey": "2"},  # ARC's own labels are digits here and there
        {**ARC, "answerKey": 2},
        {**ARC, "choices": ARC["choices"] | {"label": [1, 2, 3]}, "answerKey": 2},
        {**ARC, "choices": ARC["choices"] | {"label": [0, 1, 2]}, "answer": 1},
        {**ARC, "choices": ARC["choices"] | {"label": ["A", "B", "C"]}, "answer": 1, "answerKey": "B"},
        {**ARC, "choices": ARC["choices"] | {"label": ["A", "B", "C"]}, "answerKey": "B", "answer": None},
    ],
    ids=str,
)
def test_rows_of_every_known_form(row, tmp_path):
    from datasets import Dataset

    expected = [Question("Why?", ("rain", "stone", "fox"), 1)]
    assert as_question(row, "row 1") == expected[0]
    assert as_questions("mine", [row, expected[0]]) == 2 * expected
    assert ForgettingCallback(choices={"mine": [row]}).choices == {"mine": expected}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert load_questions(str(tmp_path / "rows.jsonl")) == expected
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    assert load_questions(str(tmp_path / "rows.parquet")) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"question": None}, "has no question; write question, choices and answer"),
        ({"question": " "}, "has no question"),
        ({"choices": ["rain"]}, r"has choices \['rain'\]; give a list of at least two texts"),
        ({"choices": ["rain", ""]}, ".*give a list of at least two texts"),
        ({"choices": "rain"}, ".*give a list of at least two texts"),
        ({"choices": {"text": ["rain", "stone"], "label": ["A", "B"]}, "answer": "C"}, "has answer 'C', none of"),
        ({"answer": 3}, "has answer 3, none of its choices; give the index of the right one, from 0"),
        ({"answer": -1}, "has answer -1, none of its choices"),
        ({"answer": True}, "has answer True, none of its choices"),
        ({"answer": None}, "has answer None, none of its choices"),
        ({"answer": "D"}, "has answer 'D', none of its choices"),
        ({"choices": ["B", "A"], "answer": "A"}, "has answer 'A', both a letter and another choice"),
        ({"choices": {"text": ["rain", "stone"], "label": [1, 2]}}, "has answer 1, both a label and the index of anot"),
        (
            {"choices": {"text": ["rain", "stone"], "label": [1, 1]}, "answer": None, "answerKey": 1},
            "has answer 1, the l",
        ),
        ({"answerKey": "C"}, "has an answer and an answerKey for different choices; give one of them"),
    ],
)
def test_rows_that_ask_nothing_are_refused(change, expected):
    row = {"question": "Why?", "choices": ["rain", "stone", "fox"], "answer": 1} | change
    with pytest.raises(ValueError, match=rf"^choices: row 4 of 'x' {expected}"):
        as_question(row, "row 4 of 'x'")


def test_a_part_of_the_questions_is_drawn_by_the_seed(tmp_path):
    questions = make_questions(30)
    write_questions(tmp_path / "rows.jsonl", questions)
    source = str(tmp_path / "rows.jsonl")
    some = load_questions(source, max_questions=10, seed=3)
    assert some == load_questions(source, max_questions=10, seed=3) != load_questions(source, max_questions=10, seed=4)
    assert [question for question in questions if question in some] == some
    assert load_questions(source, max_questions=99) == questions


def test_known_sets_are_asked_for_by_the_names_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(*arguments, **options):
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_list([{**ARC, "answerKey": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("arc_challenge", "arc_easy", "mmlu", "commonsense_qa"):
        assert len(load_questions(name)) == 1
    assert asked == [
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("cais/mmlu", "all", "test"),
        ("tau/commonsense_qa", None, "validation"),
    ]


# Comparison


def test_the_comparison_by_hand():
    """Ten questions: 4 stay right, 2 are lost, 1 is won, 1 stays wrong alike, 2 stay wrong otherwise."""
    base = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]  # the right answer is 0
    tuned = [0, 0, 0, 0, 1, 2, 0, 1, 2, 3]
    right = [[answer == 0 for answer in of] for of in (base, tuned)]
    found = compare_answers(base, tuned, *right)
    assert found["counts"] == {
        "right_right": 4, "right_wrong": 2, "wrong_right": 1, "wrong_same": 1, "wrong_other": 2,
    }  # fmt: skip
    assert found["agreement"]["value"] == 0.5
    assert (found["base_accuracy"]["value"], found["accuracy"]["value"]) == (0.6, 0.5)
    assert found["change"]["value"] == pytest.approx(-0.1)
    assert found["change"]["ci"][0] < -0.1 < found["change"]["ci"][1]
    assert found["mcnemar_p"] == 1.0
    assert all(found[key]["num_questions"] == 10 for key in ("agreement", "accuracy", "base_accuracy", "change"))
    low, high = compare_answers([0], [1], [True], [False])["change"]["ci"]
    assert low == -1 < 0.5 < high < 0.6  # of one question, hardly anything
    unchanged = compare_answers([0] * 12, [0] * 12, [True] * 6 + [False] * 6, [True] * 6 + [False] * 6)
    assert unchanged["change"]["ci"] == pytest.approx([-0.2425, 0.2425], abs=1e-4)
    assert unchanged["agreement"]["ci"] == pytest.approx([1 - 0.2425, 1.0], abs=1e-4)


def test_the_interval_of_the_change_is_paired():
    """Both models get the same questions right but for a few: narrow, however uncertain either accuracy is."""
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.5).tolist()
    after = [not was if at < 4 else was for at, was in enumerate(before)]
    found = compare_answers(before, after, before, after)
    low, high = found["change"]["ci"]
    assert high - low < 0.03 < 0.09 < found["accuracy"]["ci"][1] - found["accuracy"]["ci"][0]


def test_equal_accuracy_does_not_hide_forgetting():
    """What it is for: as many won as lost."""
    base = [0] * 50 + [1] * 50
    tuned = [1] * 20 + [0] * 30 + [0] * 20 + [1] * 30
    right = [[answer == 0 for answer in of] for of in (base, tuned)]
    entry = {"style": "letter", "chat_template": False, "num_questions": 100, "notes": []}
    rules = {"acc": compare_answers(base, tuned, *right)}
    report = ForgettingReport({"name": "tuned", "retention": {}, "choices": {"arc": {**entry, "rules": rules}}})
    run, other = report.results, RunResults("other", retention={})
    sentence = answers_sentence(run)
    assert sentence.startswith("“tuned” answers 60.0% [50.2%, 69.1%] of 100 questions of arc (acc) as its base did; ")
    assert "no change in accuracy shown, 50.0% → 50.0%: +0.0 points [" in sentence
    table = answers_table([run, other])
    assert table is not None
    (section,) = table.sections
    rows = {row.label: [cell.value for cell in row.cells] for row in section.rows}
    assert next(iter(rows)) == "same answer as the base"
    assert rows["right → wrong"] == rows["wrong → right"] == ["20", "–"]
    assert rows["McNemar p"] == ["1.000", "–"]
    assert answers_table([other]) is None
    assert answers_sentence(other) == ""


def test_a_model_agrees_with_itself_and_its_own_seeds():
    questions = make_questions(20)
    found = [measure_choices(make_model(), make_model(seed=seed), questions, OPTIONS) for seed in (0, 1, 1)]
    assert found[1] == found[2]
    for rule in ("acc", "acc_norm"):
        same, other = found[0]["rules"][rule], found[1]["rules"][rule]
        assert same["agreement"]["value"] == same["noise_agreement"]["value"] == other["noise_agreement"]["value"] == 1
        assert other["agreement"]["value"] < 1
        assert same["noise_agreement"]["num_questions"] == 8
        answers = found[1]["answers"][rule]
        alike = [one == two for one, two in zip(answers["base"], answers["tuned"], strict=True)]
        assert np.mean(alike) == other["agreement"]["value"]
    counts = found[1]["rules"]["acc_norm"]["counts"]
    assert len(found[1]["lost"]) == min(10, counts["right_wrong"])
    assert found[0]["lost"] == []


def test_choices_in_a_report_of_a_chat_model(tmp_path):
    report = measure(
        make_model(),
        make_model(seed=1),
        {},
        tokenizer=chat_tokenizer(),
        choices={"arc": [{"question": q.text, "choices": [*q.choices], "answer": q.answer} for q in make_questions(9)]},
        choice_style="letter",
        choice_chat_template=True,
        num_resamples=200,
    )
    found = report.data["choices"]["arc"]
    assert list(found["rules"]) == ["acc"]
    assert (found["style"], found["chat_template"], found["num_questions"]) == ("choice_style letter", True, 9)
    assert report.verdict.startswith("“tuned” answers ")
    with pytest.raises(ValueError, match="choice_chat_template: this tokenizer has no chat template; leave"):
        measure_choices(make_model(), make_model(), make_questions(2), OPTIONS, chat_template=True)
    with pytest.raises(ValueError, match="choices: there are no questions"):
        measure_choices(make_model(), make_model(), [], OPTIONS)
    many = [Question("Why?", tuple(f"choice {at}" for at in range(27)), 0)]
    with pytest.raises(ValueError, match="choice_style: question 1 has more choices than letters"):
        measure_choices(make_model(), make_model(), many, OPTIONS, style="letter")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "base")
    save_model(folder / "tuned", seed=1)
    return folder


def test_questions_alone_are_measured_and_hostile_ones_harm_nobody(models, tmp_path, capsys):
    """From the command line to the page: no texts, two sets, and strings that would like to be more than text."""
    questions = make_questions(24)
    bad = [
        Question(q.text + HOSTILE, (f"<b>{q.choices[0]}\u202e", f"</pre>{q.choices[1]}\u202e"), at % 2)
        for at, q in enumerate(questions)
    ]
    write_questions(tmp_path / "good.jsonl", questions)
    write_questions(tmp_path / "bad.jsonl", bad)
    arguments = [
        "--base",
        str(models / "base"),
        "--model",
        str(models / "tuned"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    arguments += ["--choices", f"good={tmp_path}/good.jsonl", f"--choices=b\x1b[31m<b>={tmp_path}/bad.jsonl"]
    assert main(["measure", *arguments, "--num_resamples", "200"]) == 0
    output = capsys.readouterr()
    assert "questions of good …" in output.out
    for stage in ("base", "tuned", "noise floor"):
        assert re.search(rf"^good, {stage}: [\d,]+ tokens in ", output.err, re.M), "progress"
    assert "same answer as the base" in output.out
    assert "forgetting was not measured" not in output.out.lower()
    for text in (output.out, output.err.replace("\r", "")):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(data["choices"]) == {"good", "b\x1b[31m<b>"}
    assert data["generations"] == []
    assert data["choices"]["b\x1b[31m<b>"]["lost"], "so that there is something to show"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Answers to the same questions" in page
    assert "What was learned, what was forgotten" not in page
    assert all(text in page for text in ("alert(1)", "&lt;/pre&gt;", "\\u202e")), "shown, as text"
    assert not re.search(r"<(script|img|b>=)", page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", page)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## Answers to the same questions" in text
    assert "Tango's for the change in accuracy" in page
    assert all("paired bootstrap" not in shown for shown in (page, text))
    assert "\x1b" not in text
    assert not re.search(r"<(?!br>)", text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--choices", "arc.jsonl"], "choices: 'arc.jsonl' is not name=file; write e.g. --choices arc=arc.jsonl"),
        (["--choices", "arc=no.jsonl"], "no.jsonl'; check the path"),
        (["--choices", "arc=arc_easy"], "choices: cannot load 'allenai/ai2_arc' from the Hub ("),
        (["--choices", "arc=q.jsonl", "--choice_style", "words"], "choice_style"),
        (["--choices", "arc=q.jsonl", "--max_questions", "0"], "max_questions: 0 does not fit"),
        (["--choices", "arc=q.jsonl", "--choice_chat_template"], "choice_chat_template: this tokenizer has no chat"),
        (["--choices", "arc=bad.jsonl"], "choices: row 2 of 'bad.jsonl' has answer 7, none of its choices"),
        (["--choices", "arc=q.jsonl", "--pair", "q.jsonl", "q.jsonl"], "does not go with pair; leave one of them out"),
        ([], "retention: missing; give at least one text as --retention name=file, or questions as --choices"),
    ],
    ids=str,
)
def test_bad_questions_end_in_one_line(arguments, expected, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "q.jsonl", make_questions(3))
    write_questions(tmp_path / "bad.jsonl", [Question("a", ("b", "c"), 0), Question("a", ("b", "c"), 7)])
    given = ["--base", str(models / "base"), "--model", str(models / "tuned"), "--output_dir", "out"]
    assert main(["measure", *given, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not (tmp_path / "out").exists()


# Pairing without a model


def sample(number: int, scores: list[float], target: int, choices: list[str], **changes: Any) -> dict[str, Any]:
    """A line as `EvaluationTracker.save_results_samples` of lm_eval 0.4.13 writes it: responses are strings."""
    sizes = [1.0] * len(scores), list(map(len, choices))
    found = [int(np.argmax(np.array(scores) / size)) for size in sizes]
    return {
        "doc_id": number,
        "doc": {"question": f"q{number}"},
        "target": str(target),
        "arguments": {f"gen_args_{at}": {"arg_0": "Q", "arg_1": f" {choice}"} for at, choice in enumerate(choices)},
        "resps": [[[str(score), "False"]] for score in scores],
        "filtered_resps": [[str(score), "False"] for score in scores],
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": f"d{number}",
        "prompt_hash": f"p{number}",
        "target_hash": f"t{target}",
        "acc": float(found[0] == target),
        "acc_norm": float(found[1] == target),
    } | changes


CHOICES = ["x", "longer"]
BASE = [sample(at, [-1.0, -2.0], 0, CHOICES) for at in range(6)]  # answers 0, and 1 per character
TUNED = [sample(at, [-3.0, -2.0] if at < 2 else [-1.0, -7.0], 0, CHOICES) for at in range(6)]


def write_samples(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_files(base: Path, tuned: Path) -> dict[str, Any]:
    return pair_answers(read_samples(base), read_samples(tuned))


def paired(folder: Path, base: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> dict[str, Any]:
    return pair_files(write_samples(folder / "a.jsonl", base), write_samples(folder / "b.jsonl", tuned))


@pytest.mark.parametrize("number", ["nan", "-inf", float("nan")])
def test_a_file_with_numbers_that_are_not_finite_is_refused(number, tmp_path):
    bad = [*TUNED[:3], TUNED[3] | {"filtered_resps": [[number, "False"], ["-2.0", "False"]]}]
    with pytest.raises(
        ValueError, match=rf"b.jsonl' line 4 holds {number}, which is not a result; evaluate that model again"
    ):
        paired(tmp_path, BASE, bad)
    with pytest.raises(ValueError, match="line 1 holds nan, which is not a result"):
        paired(tmp_path, [BASE[0] | {"acc": float("nan")}], TUNED)


def test_a_rule_of_one_file_alone_is_named(tmp_path):
    """The rule that a sentence leads with was gone without a word."""
    found = paired(tmp_path, BASE, [{key: row[key] for key in row if key != "acc_norm"} for row in TUNED])
    assert list(found["rules"]) == ["acc"]
    assert found["notes"] == ["Left out, since only one file has it: acc_norm."]


def test_questions_that_are_copies_count_once_in_a_pair_of_files(tmp_path):
    found = paired(
        tmp_path, *([row | {"doc_hash": f"d{row['doc_id'] // 2}"} for row in rows] for rows in (BASE, TUNED))
    )
    assert found["num_questions"] == 3
    assert found["notes"] == ["3 of 6 questions are copies of others, and left out."]


@pytest.mark.parametrize("who", ["base", "model"])
def test_a_model_of_nan_answers_nothing(who):
    """The first of equals wins, and NaN is like none: choice 1, every time."""
    models = {"base": make_model(), "model": make_model()}
    torch.nn.init.constant_(models[who].get_input_embeddings().weight, math.nan)
    with pytest.raises(ValueError, match=f"{who}: its log-likelihood of answer 1 to question 1 is nan; its weights or"):
        measure_choices(*models.values(), make_questions(2), OPTIONS)


def test_files_of_lm_eval_are_paired_by_question(tmp_path):
    found = paired(tmp_path, BASE, TUNED[::-1])
    assert found["rules"]["acc"]["counts"]["right_wrong"] == 2
    assert found["rules"]["acc"]["agreement"]["value"] == pytest.approx(4 / 6)
    norm = found["rules"]["acc_norm"]  # −1/1 < −2/6, but −1/1 > −7/6
    assert (norm["counts"]["wrong_same"], norm["counts"]["wrong_right"]) == (2, 4)
    assert found["notes"] == []
    assert found["num_questions"] == 6


def test_what_cannot_be_paired_is_counted_or_refused(tmp_path):
    found = paired(tmp_path, BASE[:5], TUNED[1:])
    assert found["num_questions"] == 4
    assert found["notes"] == [
        "Left out, since only one file has them: 1 of the base's questions, 1 of the tuned's."
    ]  # fmt: skip
    other = [row | {"prompt_hash": "other"} for row in TUNED]
    assert "6 of 6 questions have other prompts" in paired(tmp_path, BASE, other)["notes"][0]
    for bad, why in (
        ([*TUNED, TUNED[0]], "line 7 repeats doc_id 0; give the file of a single run"),
        (
            [row | {"doc_hash": "other"} for row in TUNED],
            r"question 0 is not the same in both files \(doc_hash differs\)",
        ),
        ([row | {"doc_id": 99} for row in TUNED[:1]], "share no question"),
        ([], "is empty; give a file written by lm_eval --log_samples"),
        ([{"text": "a"}], "line 1 is not an lm-eval sample"),
    ):
        with pytest.raises(ValueError, match=why):
            paired(tmp_path, BASE, bad)
    (tmp_path / "torn.jsonl").write_text(json.dumps(BASE[0]) + '\n{"doc_id": 1, "tar')
    with pytest.raises(ValueError, match=r"torn.jsonl' line 2 is not JSON \(.*\); correct"):
        pair_files(tmp_path / "torn.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(
        ValueError, match=r"pair: cannot read '.*none.jsonl': No such file or directory; check the path"
    ):
        pair_files(tmp_path / "none.jsonl", tmp_path / "a.jsonl")


def test_answers_that_contradict_the_files_own_metric_are_left_out(tmp_path):
    """As where another delimiter made other lengths: rather no number than a wrong one."""
    wrong = [row | {"acc_norm": 1.0 - row["acc_norm"]} for row in TUNED]
    found = paired(tmp_path, BASE, wrong)
    assert list(found["rules"]) == ["acc"]
    assert found["notes"] == ["acc_norm is left out: the file does not tell the answers behind it."]
    parts = [[row | {"acc": 0.25, "acc_norm": 0.5} for row in rows] for rows in (BASE, TUNED)]  # as truthfulqa_mc2
    with pytest.raises(ValueError, match="do not tell the answers behind acc, acc_norm; give a task whose answers are"):
        paired(tmp_path, *parts)


def test_generated_answers_are_paired_by_their_text_and_filter(tmp_path):
    def rows(answers: str) -> list[dict[str, Any]]:
        return [
            {
                "doc_id": at,
                "target": "1",
                "filter": name,
                "filtered_resps": [answer],
                "exact_match": float(answer == "1"),
            }
            for name in ("strict", "flexible")
            for at, answer in enumerate(answers)
        ]

    found = paired(tmp_path, rows("1123"), rows("1223"))
    assert set(found["rules"]) == {"exact_match (strict)", "exact_match (flexible)"}
    assert found["rules"]["exact_match (strict)"]["agreement"]["value"] == 0.75


def test_pairing_from_the_command_line(tmp_path, capsys):
    names = [f"samples_arc_easy_2026-11-0{day}T10-00-00.0.jsonl" for day in (1, 2)]
    files = [str(write_samples(tmp_path / name, rows)) for name, rows in zip(names, (BASE, TUNED), strict=True)]
    out = str(tmp_path / "out")
    assert task_of(Path("mine_b.jsonl")) == "mine_b", "where the file has another name than lm_eval's"
    assert main(["measure", "--pair", *files, "--output_dir", out]) == 0
    assert "arc_easy, acc_norm" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data == json.loads(json.dumps(paired_report(files).data | {"created": data["created"]}))
    assert set(data["choices"]) == {"arc_easy"}
    assert data["settings"] == {}  # nothing is drawn: the intervals are closed forms
    assert "retain" in data["versions"]
    assert ForgettingReport(data).summary()
    assert main(["measure", "--pair", files[0], "--output_dir", out]) == 1
    assert capsys.readouterr().err == "retain measure: pair: 1 files are not a pair; give two, the base's first\n"
    assert main(["measure", "--pair", files[0], str(tmp_path / "no.jsonl"), "--output_dir", out]) == 1
    assert "No such file or directory" in capsys.readouterr().err
