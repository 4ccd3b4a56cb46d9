"""What both models write: greedy and sampled texts, their form and words, and what became of knowledge."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from retain.measuring.drift import MARKERS, drift, holds_answer, knowledge, knowledge_fate, word_overlap, words_in
from retain.measuring.generations import Prompt, Written, as_prompt, continue_prompts, measure_generations, stop_tokens
from retain.measuring.measure import measure
from retain.measuring.tokens import Options
from retain.report.tables import KNOWLEDGE_FATES

TOKENIZER = make_tokenizer()
START = 3
OPTIONS = Options(TOKENIZER, START, max_new_tokens=6, batch_tokens=64)


def by_hand(model, ids: list[int], count: int) -> list[int]:
    """Greedy tokens without a cache, one row."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


def test_greedy_texts_are_those_of_one_row_whatever_the_checkpoint_says():
    model = make_model()
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=4, suppress_tokens=[5, 6], min_new_tokens=6
    )
    before = model.generation_config
    prompts = [[START, *TOKENIZER(text)["input_ids"]] for text in ("the quick brown", "old towns", "a lazy dog")]
    written = continue_prompts(model, TOKENIZER, prompts, stop=[319], max_new_tokens=6, batch_tokens=64)
    for ids, found in zip(prompts, written, strict=True):
        expected = by_hand(model, ids, 6)
        assert found.text == TOKENIZER.decode(expected, skip_special_tokens=True)
        assert (found.num_tokens, found.ended) == (6, False)
    assert model.generation_config is before, "put back"


def test_a_text_ends_at_any_of_the_stop_tokens():
    model = make_model()
    ids = [START, *TOKENIZER("the quick brown")["input_ids"]]
    expected = by_hand(model, ids, 6)
    (found,) = continue_prompts(model, TOKENIZER, [ids], stop=[expected[2]], max_new_tokens=6, batch_tokens=64)
    assert found.ended
    assert found.num_tokens == expected.index(expected[2])
    model.generation_config.eos_token_id = [7, 9]
    assert stop_tokens([model], TOKENIZER, START) == sorted({7, 9, START, TOKENIZER.eos_token_id})


def test_both_models_stop_at_the_end_tokens_of_either():
    """A chat model's own end of turn was written past to `max_new_tokens`, and `ended` said never."""
    base, tuned = make_model(), make_model(seed=1)
    base.generation_config.eos_token_id = 0
    ids = [START, *TOKENIZER("the quick", add_special_tokens=False)["input_ids"]]
    own = by_hand(tuned, ids, 6)
    tuned.generation_config.eos_token_id = [0, own[2]]
    (row,) = measure_generations(base, tuned, [Prompt("the quick")], OPTIONS)["generations"]
    assert row["ended"]["tuned"]
    assert row["num_tokens"]["tuned"] == own.index(own[2])
    ending = by_hand(base, ids, 6)
    tuned.generation_config.eos_token_id = ending[1]
    (row,) = measure_generations(base, tuned, [Prompt("the quick")], OPTIONS)["generations"]
    assert row["num_tokens"]["base"] == ending.index(ending[1]), "the base, too: else lengths do not compare"


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_recurrent_models_write_the_same_in_a_batch_as_without_a_cache(kind):
    """Transformers' RWKV goes on from the state of another row of its batch."""
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, vocab_size=320, bos_token_id=3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    prompts = [[START, 50, 60], [START, 9, 14], [START, 100, 101]]
    written = continue_prompts(model, TOKENIZER, prompts, stop=[319], max_new_tokens=6, batch_tokens=64)
    expected = [by_hand(model, ids, 6) for ids in prompts]
    assert [one.text for one in written] == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in expected]


def test_samples_are_draws_of_the_whole_distribution_and_leave_the_random_state_alone():
    """Pitfall: a checkpoint's top_k or temperature would sharpen them. Shares of first tokens against the softmax."""
    model = make_model()
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, top_p=0.3)
    prompts = [[START, 40, 41]] * 3000
    torch.manual_seed(11)
    state = torch.get_rng_state()
    how = {"stop": [319], "max_new_tokens": 1, "batch_tokens": 4000, "seed": 5}
    written = continue_prompts(model, TOKENIZER, prompts, **how)
    assert torch.equal(torch.get_rng_state(), state)
    assert written == continue_prompts(model, TOKENIZER, prompts, **how)
    probs = torch.softmax(model(torch.tensor([[START, 40, 41]])).logits[0, -1].detach(), -1)
    top = int(probs.argmax())
    text = TOKENIZER.decode([top], skip_special_tokens=True)
    alike = [token for token in range(320) if TOKENIZER.decode([token], skip_special_tokens=True) == text]
    share, expected = sum(one.text == text for one in written) / 3000, float(probs[alike].sum())
    assert abs(share - expected) < 5 * (expected / 3000) ** 0.5


def test_a_chat_opens_its_own_document_and_a_text_is_opened_by_the_start_token():
    ids = TOKENIZER("the quick", add_special_tokens=False)["input_ids"]
    assert Prompt("the quick").tokens(TOKENIZER, START) == [START, *ids]
    assert Prompt("the quick", chat=True).tokens(TOKENIZER, START) == ids


@pytest.mark.parametrize(
    ("base", "tuned", "expected", "updated", "found"),
    [
        ("It is Paris.", "paris, of course", "Paris", None, "kept"),
        ("It is Paris.", "It is Rome.", "Paris", None, "forgotten"),
        ("It is Rome.", "It is Paris.", "Paris", None, "learned"),
        ("It is Rome.", "Parisian food", "Paris", None, "unknown"),
        ("It is Bonn.", "It is Berlin.", "Bonn", "Berlin", "updated"),
        ("It is Bonn.", "It is Bonn.", "Bonn", "Berlin", "kept"),
        ("It is Bonn.", "It is Kiel.", "Bonn", "Berlin", "forgotten"),
        ("It is Kiel.", "It is Kiel.", None, "Berlin", "unknown"),
        ("x", "y", None, None, None),
    ],
)
def test_what_became_of_a_piece_of_knowledge(base, tuned, expected, updated, found):
    assert knowledge_fate(base, tuned, expected, updated) == found


def test_knowledge_counts_and_the_share_kept_of_what_was_known():
    fates = ["kept"] * 6 + ["updated"] * 2 + ["forgotten"] * 2 + ["learned", "unknown"]
    found = knowledge(fates, [True] * 10 + [False] * 2)
    assert found["counts"] == {"kept": 6, "updated": 2, "forgotten": 2, "learned": 1, "unknown": 1}
    assert found["kept_share"]["value"] == 0.8
    assert found["kept_share"]["num_questions"] == 10
    assert knowledge([], []) is None
    assert knowledge(["unknown"], [False])["kept_share"] is None
    assert set(found["counts"]) == set(KNOWLEDGE_FATES)


def test_a_new_answer_that_replaces_nothing_known_is_not_kept_knowledge():
    """Nine new facts were learned and the one old one was lost: 90% of what the base knew was said to be kept."""
    found = knowledge(["updated"] * 9 + ["forgotten"], [False] * 9 + [True])
    assert found["counts"]["updated"] == 9
    assert (found["kept_share"]["value"], found["kept_share"]["num_questions"]) == (0.0, 1)


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("यह दल है", "दिल", False),  # letters alike, vowels not
        ("राजधानी दिल्ली है।", "दिल्ली", True),
        ("מַלְכָּה", "מלך", False),
        ("un cafe\u0301", "caf\u00e9", True),  # the accent apart and composed
        ("It is 1.5 or 3,140.", "5", False),
        ("It is 1.5 or 3,140.", "3", False),
        ("About 3,140.", "3,140", True),
        ("2024年に", "2024", True),
        ("GPT技術", "技術", True),
        ("In 1990, 5 people.", "5", True),
        ("می\u200cخواهم", "خواهم", False),  # half of a word
    ],
)
def test_an_answer_is_whole_words_in_every_script(text, answer, held):
    assert holds_answer(text, answer) is held


def test_words_of_every_script_are_counted():
    counts = {"हिन्दी भाषा": 2, "தமிழ் மொழி": 2, "مُحَمَّد رسول": 2, "a ❤️ b": 2, "ខ្មែរ": 5, "3.14 is pi": 3}
    assert {text: len(words_in(text)) for text in counts} == counts


def test_words_and_marks():
    assert word_overlap("the red fox", "the red fox") == 1
    assert word_overlap("the red fox", "the blue fox") == pytest.approx(2 / 3)
    assert word_overlap("", "") == 1
    assert word_overlap("a", "") == 0
    assert word_overlap("日本の首都", "日本の都") == pytest.approx(8 / 9)
    assert holds_answer("The answer: carbon dioxide (CO2).", "Carbon Dioxide")
    assert not holds_answer("carbonated dioxide", "carbon dioxide")
    for text in ("a <|im_start|>user", "[INST] do", "fine\nUser: and", "### Response", "<start_of_turn>"):
        assert MARKERS.search(text), text
    for text in ("the user: writes", "# Response times", "a < b | c", "install [INSTALL]"):
        assert not MARKERS.search(text), text


@given(st.text(), st.text())
def test_the_overlap_of_words_is_symmetric_and_a_share(one, other):
    assert word_overlap(one, other) == word_overlap(other, one)
    assert 0 <= word_overlap(one, other) <= 1


def test_drift_by_hand():
    rows = [
        {"answers": {"base": "a b", "tuned": "a b"},
         "num_tokens": {"base": 2, "tuned": 2}, "ended": {"base": True, "tuned": True},
         "markers": {"base": False, "tuned": False}},
        {"answers": {"base": "a b", "tuned": "a c"},
         "num_tokens": {"base": 2, "tuned": 6}, "ended": {"base": True, "tuned": False},
         "markers": {"base": False, "tuned": True}},
    ]  # fmt: skip
    found = drift(rows)
    assert found["num_prompts"] == 2
    values = {name: entry["value"] for name, entry in found.items() if name != "num_prompts"}
    assert values == {
        "identical": 0.5, "words": 0.75, "base_length": 2, "length": 4, "length_change": 2,
        "base_ended": 1, "ended": 0.5, "ended_change": -0.5, "base_markers": 0, "markers": 0.5, "markers_change": 0.5,
    }  # fmt: skip
    half = 12.706 * 2  # Student's t of one degree, and the standard error of 2 that leaving one out at a time gives
    assert found["length_change"]["ci"] == pytest.approx([2 - half, 2 + half], rel=1e-3)
    low, high = found["ended_change"]["ci"]
    assert -1 <= low < -0.5 < 0 < high < 1
    same = drift(
        [row | {"answers": {"base": "a", "tuned": "a"}, "ended": {"base": True, "tuned": True}} for row in rows * 6]
    )
    for key in ("identical", "words", "base_ended"):
        assert same[key]["ci"] == pytest.approx([0.7575, 1.0], abs=1e-4)
    assert same["ended_change"]["ci"] == pytest.approx([-0.2425, 0.2425], abs=1e-4)


def test_a_model_of_nan_writes_nothing():
    broken = make_model().eval()
    torch.nn.init.constant_(broken.get_input_embeddings().weight, math.nan)
    with pytest.raises(ValueError, match="model: its predictions after 3 tokens of a prompt are nan; its weights or"):
        measure_generations(make_model().eval(), broken, [Prompt("the quick")], OPTIONS)


def test_both_models_write_side_by_side():
    base, tuned = make_model().eval(), make_model(seed=1).eval()
    prompts = [Prompt("the quick", expected="fox"), Prompt("seven bright birds sing")]
    plain = measure_generations(base, tuned, prompts, OPTIONS, sampled=True)
    assert [row["how"] for row in plain["generations"]] == ["greedy"] * 2 + ["sampled"] * 2
    assert plain["generations"][0]["fate"] in KNOWLEDGE_FATES
    assert [row["fate"] for row in plain["generations"][1:]] == [None] * 3
    assert plain["knowledge"]["num_questions"] == 1
    assert plain["drift"]["greedy"]["length"]["value"] <= 6
    assert (
        measure_generations(base, base, prompts, OPTIONS, sampled=True)["drift"]["sampled"]["identical"]["value"] == 1
    )


def test_rows_of_prompts():
    assert as_prompt({"text": "a", "expected": "b"}, TOKENIZER, "row 1") == Prompt("a", expected="b")
    with pytest.raises(ValueError, match=r"^prompts: row 3 of 'x' has updated 7; give the answer's words"):
        as_prompt({"text": "a", "updated": 7}, TOKENIZER, "row 3 of 'x'")
    with pytest.raises(ValueError, match=r"row 1 has expected '!!'; give the answer's words"):  # no text holds it
        as_prompt({"text": "a", "expected": "!!"}, TOKENIZER, "row 1")


def test_no_room_for_the_continuation_is_said_before_anything_is_measured():
    model = make_model()
    with pytest.raises(ValueError, match=r"^max_new_tokens: 500 after a prompt of \d+ tokens exceeds this model's"):
        measure(model, make_model(seed=1), {}, tokenizer=TOKENIZER, prompts=["the fox"], max_new_tokens=500)


def test_a_default_number_of_new_tokens_is_what_the_models_have_room_for():
    base, tuned, long = make_model(), make_model(seed=1), Prompt(" ".join(["fox"] * 100))
    room = 128 - len(long.tokens(TOKENIZER, 3))
    assert 0 < room < 48
    report = measure(base, tuned, {}, tokenizer=TOKENIZER, refusals={"asked": [long.text]})
    assert report.results.refusals["asked"].max_new_tokens == room
    assert f"answers have at most {room} tokens, not 48: the models have no room" in report.data["warnings"][0]
    with pytest.raises(ValueError, match=r"^max_new_tokens: 48 after a prompt of \d+ tokens exceeds"):
        measure(base, tuned, {}, tokenizer=TOKENIZER, prompts=[" ".join(["fox"] * 128)])


def test_a_report_with_generations_is_written(tmp_path):
    report = measure(
        make_model(), make_model(seed=1), {}, tokenizer=TOKENIZER, prompts=[Prompt("the fox", expected="x")],
        max_new_tokens=4, max_length=32, sampled=True,
    )  # fmt: skip
    report.write(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert {"generations", "drift", "knowledge"} <= set(data)
    assert Written("a", 1, True, False, "a", "a").ended
