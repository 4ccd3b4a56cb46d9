"""Forgetting of a model against its base: every metric by hand, against a naive twin, and what must not move it."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_texts, make_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from retain.data.rows import Document, tokenize_documents
from retain.measuring.measure import measure
from retain.measuring.tokens import DocumentSums, batches, document_sums, logits_of, summarize, token_values
from retain.report.metrics import GAIN, METRICS, SUMS
from retain.statistics import bootstrap_ratio, share_interval

TOKENIZER = make_tokenizer()
LN2 = math.log(2)


def table_model(*rows: list[float]):
    """A model of three tokens whose prediction depends on the last token alone."""
    log_probs = torch.tensor(rows).log()
    return lambda input_ids, attention_mask: log_probs[input_ids] + 5.0  # logits are known up to a constant


def ragged_documents(count: int = 7, max_length: int = 12) -> list[Document]:
    """Documents of very different lengths, most of several windows."""
    texts = [text for at in range(count) for text in make_texts(1, seed=at, words=1 + 5 * at)]
    return tokenize_documents(texts, TOKENIZER, 3, max_length)


def sums_of(base, tuned, documents, batch_tokens: int = 64) -> DocumentSums:
    return document_sums(logits_of(base), logits_of(tuned), documents, batch_tokens=batch_tokens)


def test_every_metric_by_hand():
    """Two documents, three predictions: 0→1 and 1→2 in the first, 0→2 in the second.

    After token 0 the base says (½, ¼, ¼) and the model (¼, ½, ¼); after token 1 both say (¼, ½, ¼).
    """
    base = table_model([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1 / 3] * 3)
    tuned = table_model([0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [1 / 3] * 3)
    documents = [Document([[0, 1, 2]], num_bytes=4), Document([[0, 2]], num_bytes=6)]
    sums = document_sums(base, tuned, documents, batch_tokens=100)
    by_hand = {  # in units of ln 2, per document
        "base_loss": [2 + 2, 2],
        "loss": [1 + 2, 2],
        "ref_kl": [0.5 * 1 - 0.25 * 1 + 0, 0.25],
        "base_ref_cross_entropy": [1.5 + 1.5, 1.5],
        "ref_argmax_cross_entropy": [2 + 1, 2],
        "base_ref_argmax_cross_entropy": [1 + 1, 1],
    }
    for name, expected in by_hand.items():
        np.testing.assert_allclose(sums.values[name] / LN2, expected, atol=1e-6, err_msg=name)
    assert sums.values["ref_agreement"].tolist() == [1, 0]
    assert sums.num_tokens.tolist() == [2, 1]

    metrics = summarize(sums)
    expected = {
        "forgetting": -LN2 / 3,
        "loss": 5 * LN2 / 3,
        "base_loss": 6 * LN2 / 3,
        "ref_kl": 0.5 * LN2 / 3,
        "ref_cross_entropy": 1.5 * LN2 + 0.5 * LN2 / 3,
        "base_ref_cross_entropy": 1.5 * LN2,
        "ref_argmax_cross_entropy": 5 * LN2 / 3,
        "base_ref_argmax_cross_entropy": LN2,
        "ref_agreement": 1 / 3,
        "bits_per_byte": 5 / 10,
        "base_bits_per_byte": 6 / 10,
    }
    assert {name: metric["value"] for name, metric in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert all((metric["num_documents"], metric["num_tokens"]) == (2, 3) for metric in metrics.values())
    # Beside the mean the documents have −1/3 and 1/3; divided by the share of the tokens that others have, −1 and 1/2.
    half = 12.706 * (1.25 / 2) ** 0.5 / 3  # Student's t of one degree
    assert metrics["forgetting"]["ci"] == pytest.approx([LN2 * (-1 / 3 - half), LN2 * (-1 / 3 + half)], rel=1e-4)
    assert metrics["ref_kl"]["ci"][0] == metrics["loss"]["ci"][0] == 0.0  # they cannot be less
    assert metrics["ref_agreement"]["ci"] == [0.0, 1.0]


def test_a_metric_has_one_numerator_and_a_line_in_the_docs():
    docs = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
    for metric in METRICS.values():
        assert (metric.per_token is None) != (metric.total is None), metric.name
    assert [name for name in (GAIN.name, *METRICS) if f"`{name}`" not in docs] == ["base_ref_argmax_cross_entropy"]


def test_agreement_on_every_token_has_the_interval_of_a_share():
    """Of its tokens, the least that is unknown, were they independent."""
    full = {name: np.full(12, 50.0) for name in SUMS}
    metrics = summarize(DocumentSums(full, np.full(12, 50), np.full(12, 200)))
    assert metrics["ref_agreement"]["ci"] == pytest.approx([share_interval(600, 600)[1], 1.0])
    assert metrics["forgetting"]["ci"] == [0.0, 0.0]


def test_vocabulary_that_neither_model_can_say_plays_no_part():
    logits, targets = (
        [torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(n)) for n in (0, 1)],
        torch.zeros(2, 3),
    )
    expected = token_values(*(one[..., :6] for one in logits), targets.long())
    unused = torch.tensor([0.0] * 6 + [-torch.inf] * 3)
    found = token_values(*(one + unused for one in logits), targets.long())
    assert set(found) == set(SUMS)
    for name in SUMS:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    ("who", "value", "expected"),
    [
        ("base", math.nan, "base: its loss on document 2 of 'wiki' is nan; "),
        ("tuned", math.nan, "model: its loss on document 2 of 'wiki' is nan; "),
        ("tuned", -math.inf, "model: its loss on document 2 of 'wiki' is inf; it gives a token there zero probability"),
    ],
)
def test_a_number_that_is_not_finite_is_an_error_that_names_the_model(who, value, expected):
    models = {"base": table_model([0.5, 0.5], [0.25, 0.75]), "tuned": table_model([0.5, 0.5], [0.25, 0.75])}
    models[who] = broken(models[who], value)
    documents = [Document([[0, 1, 0]], 2), Document([[0, 1, 1]], 2)]
    with pytest.raises(ValueError, match=expected):
        document_sums(models["base"], models["tuned"], documents, batch_tokens=9, text="wiki")


def broken(forward, value):
    """A logit of 1 after a 1, on the second document's batch row."""

    def wrapped(input_ids, attention_mask):
        logits = forward(input_ids=input_ids, attention_mask=attention_mask).clone()
        logits[input_ids[:, 2] == 1, 1, 1] = value
        return logits

    return wrapped


def test_the_interval_of_forgetting_is_paired():
    """Of the differences, not of two losses apart: it is narrow where the same documents are hard for both."""
    rng = np.random.default_rng(0)
    tokens = np.full(50, 100)
    base = rng.gamma(4.0, 100.0, size=50)
    zeros = dict.fromkeys(SUMS, np.zeros(50))
    sums = DocumentSums({**zeros, "base_loss": base, "loss": base + 10 + rng.normal(size=50)}, tokens, tokens * 4)
    low, high = summarize(sums)["forgetting"]["ci"]
    assert (low, high) == bootstrap_ratio(sums.values["loss"] - base, tokens)[1:]
    assert 0.09 < low < 0.1 < high < 0.11
    wide = summarize(sums)["loss"]["ci"]
    assert wide[1] - wide[0] > 50 * (high - low)


def naive_sums(base, tuned, documents: list[Document]) -> dict[str, list[float]]:
    """Window by window, without padding, position by position, in float64."""
    result: dict[str, list[float]] = {name: [0.0] * len(documents) for name in SUMS}
    for index, document in enumerate(documents):
        for window in document.windows:
            with torch.no_grad():
                both = [model(torch.tensor([window])).logits[0].double().log_softmax(-1) for model in (base, tuned)]
            for at, target in enumerate(window[1:]):
                p, q = both[0][at], both[1][at]
                found = {
                    "loss": -q[target],
                    "base_loss": -p[target],
                    "ref_kl": sum(p.exp() * (p - q)),
                    "base_ref_cross_entropy": -sum(p.exp() * p),
                    "ref_argmax_cross_entropy": -q[p.argmax()],
                    "base_ref_argmax_cross_entropy": -p[p.argmax()],
                    "ref_agreement": float(p.argmax() == q.argmax()),
                }
                for name, value in found.items():
                    result[name][index] += float(value)
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_model_equals_its_naive_twin(architecture):
    base, tuned = make_model(architecture, seed=0), make_model(architecture, seed=1)
    documents = ragged_documents(5)
    sums = sums_of(base, tuned, documents)
    for name, expected in naive_sums(base, tuned, documents).items():
        np.testing.assert_allclose(sums.values[name], expected, rtol=2e-5, atol=2e-5, err_msg=name)
    assert sums.num_tokens.tolist() == [document.num_tokens for document in documents]


def test_long_windows_are_summed_in_chunks():
    base, tuned = (make_model(seed=seed, max_position_embeddings=400) for seed in (0, 1))
    documents = [Document([torch.randint(5, 320, (300,), generator=torch.Generator().manual_seed(0)).tolist()], 1)]
    whole = sums_of(base, tuned, documents)
    for name, expected in naive_sums(base, tuned, documents).items():
        np.testing.assert_allclose(whole.values[name], expected, rtol=2e-5, err_msg=name)


def test_a_base_against_itself_has_forgotten_nothing():
    base = make_model()
    report = measure(base, make_model(), {"text": make_texts(4)}, tokenizer=TOKENIZER, max_length=20)
    for part in ("retention", "noise_floor"):
        metrics = report.data[part]["text"]
        assert abs(metrics["ref_kl"]["value"]) < 1e-6
        assert abs(metrics["forgetting"]["value"]) < 1e-6
        assert metrics["ref_agreement"]["value"] == 1
    metrics = report.data["retention"]["text"]
    assert metrics["loss"] == metrics["base_loss"]
    assert metrics["ref_kl"]["value"] == 0  # the same kernel on the same batches: exactly


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_and_order_play_no_part(architecture):
    base, tuned = make_model(architecture), make_model(architecture, seed=1)
    documents = ragged_documents()
    whole = sums_of(base, tuned, documents, batch_tokens=10_000)
    for other, back in (
        (sums_of(base, tuned, documents, batch_tokens=1), 1),
        (sums_of(base, tuned, documents, batch_tokens=30), 1),
        (sums_of(base, tuned, documents[::-1], batch_tokens=50), -1),
    ):
        for name in SUMS:
            np.testing.assert_allclose(other.values[name][::back], whole.values[name], rtol=1e-5, atol=1e-5)


def test_padding_plays_no_part():
    """A short document beside a long one, whatever the padded positions predict."""
    base, tuned = make_model(), make_model(seed=1)
    short, long = Document([[3, 9, 8]], 3), Document([[3, *range(10, 60)]], 50)
    alone, beside = sums_of(base, tuned, [short]), sums_of(base, tuned, [long, short], batch_tokens=1000)
    for name in SUMS:
        np.testing.assert_allclose(beside.values[name][1], alone.values[name][0], rtol=1e-5, atol=1e-5)

    def poisoned(model):
        def forward(input_ids, attention_mask):
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return logits.masked_fill(attention_mask.unsqueeze(-1) == 0, torch.nan)

        return forward

    again = document_sums(poisoned(base), poisoned(tuned), [long, short], batch_tokens=1000)
    for name in SUMS:
        np.testing.assert_array_equal(again.values[name], beside.values[name])


def test_batches_hold_every_window_once_and_keep_to_their_size():
    documents = ragged_documents()
    seen = []
    for indices, windows in batches(documents, 40):
        assert len(windows) == 1 or max(map(len, windows)) * len(windows) <= 40
        seen += list(zip(indices, map(tuple, windows), strict=True))
    expected = [(index, tuple(window)) for index, document in enumerate(documents) for window in document.windows]
    assert sorted(seen) == sorted(expected)


def test_what_was_given_is_context_and_not_predicted():
    """The opening of a user's turn: nobody wrote it, and no replay holds the model to it."""
    base, tuned = make_model(), make_model(seed=1)
    opening, windows = [3, 9, 8, 7], [[3, 9, 8, 7, 40, 41, 42], [3, 50, 51]]
    masks = [[False] * 4 + [True] * 3, [False, True, True]]
    (sums,), (whole,), (shorter,) = (
        [document_sums(logits_of(base), logits_of(tuned), [one], batch_tokens=64)]
        for one in (Document(windows, 9, masks), Document(windows, 9), Document([opening], 4))
    )
    assert sums.num_tokens.tolist() == [3 + 2]
    for name in SUMS:  # causal: the opening's own sums do not depend on what follows
        np.testing.assert_allclose(sums.values[name], whole.values[name] - shorter.values[name], atol=1e-5)


def test_forgetting_is_the_tuned_loss_minus_the_bases():
    base, tuned, texts = make_model(), make_model(seed=1), make_texts(6)
    documents = tokenize_documents(
        texts, TOKENIZER, 3, 20
    )  # the same tokens: texts of the new task are read as trained
    report = measure(base, tuned, {"a": documents}, tokenizer=TOKENIZER, new_task={"b": documents}, max_length=20)
    metrics = report.data["retention"]["a"]
    assert metrics["forgetting"]["value"] == pytest.approx(metrics["loss"]["value"] - metrics["base_loss"]["value"])
    assert metrics["ref_kl"]["value"] > 0.1
    assert metrics["ref_kl"]["ci"][0] < metrics["ref_kl"]["value"] < metrics["ref_kl"]["ci"][1]
    forgetting, gain = metrics["forgetting"], report.data["new_task"]["b"]["gain"]
    assert gain["value"] == -forgetting["value"]
    assert gain["ci"] == [-forgetting["ci"][1], -forgetting["ci"][0]]
    assert gain["num_tokens"] == sum(len(ids) for ids in TOKENIZER(texts)["input_ids"])


def test_a_report_says_what_was_measured_and_how():
    report = measure(make_model(), make_model(seed=1), {"a": make_texts(2)}, tokenizer=TOKENIZER, max_length=20, seed=4)
    data = report.data
    assert data["schema"] == "retain.report/1"
    assert data["base"]["fingerprint"] != data["tuned"]["fingerprint"]
    assert data["base"]["num_params"] == sum(parameter.numel() for parameter in make_model().parameters())
    assert data["settings"]["seed"] == 4
    assert data["settings"]["dtype"] == "float32"
    assert data["settings"]["start_token"] == "'<s>' (id 3): the tokenizer's bos_token"
    assert data["versions"]["torch"] == version("torch")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": torch.bfloat16}, "dtype: base has torch.float32, model has torch.bfloat16; load both the same way"),
        ({"attn": "eager"}, "attn_implementation: base has sdpa, model has eager"),
        ({"vocab_size": 321}, "vocabulary: base has 320, model has 321; .*resize_token_embeddings"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(change, expected):
    """Pitfall 5: in another dtype or kernel the noise floor would be the result."""
    tuned = make_model(vocab_size=change.get("vocab_size", 320)).to(change.get("dtype", torch.float32))
    tuned.set_attn_implementation(change.get("attn", "sdpa"))
    with pytest.raises(ValueError, match=expected):
        measure(make_model(), tuned, {"a": make_texts(1)}, tokenizer=TOKENIZER, max_length=20)


@pytest.mark.parametrize("texts", [[], [""], [Document([[3]], num_bytes=0)]])
def test_a_text_of_nothing_is_refused(texts):
    with pytest.raises(ValueError, match="retention: 'a' has no text to measure"):
        measure(make_model(), make_model(), {"a": texts}, tokenizer=TOKENIZER, max_length=20)
    with pytest.raises(ValueError, match="new_task: 'b' has no text to measure"):
        measure(make_model(), make_model(), {"a": ["fox"]}, new_task={"b": texts}, tokenizer=TOKENIZER, max_length=20)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_length": 1}, "max_length: 1 does not fit; use a whole number of at least 2"),
        ({"max_windows": 0}, "max_windows: 0 does not fit"),
        ({"max_windows": -1}, "max_windows: -1 does not fit"),  # measured all but the last window of each document
        ({"batch_tokens": 0}, "batch_tokens: 0 does not fit"),
        ({"num_resamples": 0}, "num_resamples: 0 does not fit"),
        ({"seed": -1}, "seed: -1 does not fit"),
        ({"choice_style": "letters"}, "choice_style: 'letters' is not known; use text or letter"),  # scored the letters
    ],
)
def test_settings_that_mean_nothing_are_refused(options, why):
    with pytest.raises(ValueError, match=f"^{why}"):
        measure(make_model(), make_model(), {"a": make_texts(2)}, tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([None], "data: a row is None; give a string, or a row with text"),
        (["half of \ud800"], "data: a row is not valid Unicode .*; correct or delete it"),
        ([Document([[3] + [5] * 200], 200)], "a document has 201 tokens, more than the models' 128 positions; cut it"),
    ],
)
def test_what_cannot_be_measured_is_refused(texts, why):
    """Documents that came as tokens were read beyond the models' positions, if these are rotary."""
    with pytest.raises(ValueError, match=why):
        measure(make_model(), make_model(), {"a": texts}, tokenizer=TOKENIZER)


def test_documents_and_words_stand_side_by_side_and_empty_ones_do_not_count():
    words, ids = make_texts(2), TOKENIZER("the fox", add_special_tokens=False)["input_ids"]
    mixed = [Document([[3]], 0), words[0], Document([[3, *ids]], 7), {"text": words[1]}]
    tuned = make_model(seed=1)
    found, plain = (
        measure(make_model(), tuned, {"a": texts}, tokenizer=TOKENIZER)["a"].loss
        for texts in (mixed, [words[0], "the fox", words[1]])
    )
    assert found == plain
    assert found.num_documents == 3


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"retention": {"a": "the quick brown fox"}}, "texts: 'a' is a str, not several texts; give a list"),
        (
            {"retention": {"a": {"train": ["fox"], "test": ["dog"]}}},
            "texts: 'a' is a dict, .*; give the rows of one split",
        ),
        ({"new_task": {"a": "wiki.txt"}}, "texts: 'a' is a str"),
        ({"new_task": {"a": Path("wiki.txt")}}, r"texts: 'a' is a \w+Path, not several texts; give a list"),
        ({"prompts": "the quick"}, "prompts: 'prompts' is a str, not several prompts"),
        ({"refusals": {"a": "advbench"}}, "requests: 'a' is a str, not several requests"),
        ({"choices": {"a": "arc_easy"}}, "questions: 'a' is a str, not several questions"),
        ({"retention": ["fox"]}, "retention: a list names no texts; give a mapping such as {'wiki': texts}"),
    ],
)
def test_one_text_is_not_read_as_many(given, why):
    """Its characters were documents, and the keys of a `DatasetDict`: numbers that nothing gave away."""
    with pytest.raises(ValueError, match=why):
        measure(make_model(), make_model(), **{"retention": {}} | given, tokenizer=TOKENIZER, max_length=20)


def test_tokens_that_the_models_do_not_have_are_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="tokenizer: '<tool>' is token 320, but the models have 320; give their own"):
        measure(make_model(), make_model(), {"a": ["a <tool>"]}, tokenizer=tokenizer, max_length=20)


def test_windows_longer_than_the_model_can_take_are_refused():
    with pytest.raises(ValueError, match="max_length: 512 is more than this model's 128 positions; use at most 128"):
        measure(make_model("gpt2"), make_model("gpt2"), {"a": make_texts(1)}, tokenizer=TOKENIZER, max_length=512)


def test_dropout_is_off_and_comes_back():
    """As after `trainer.train()`, which leaves the model in training mode."""
    base = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    tuned = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    report = measure(base, tuned, {"a": make_texts(2)}, tokenizer=TOKENIZER, max_length=20, prompts=["the quick"])
    assert report.data["retention"]["a"]["ref_kl"]["value"] == 0
    assert report.data["generations"][0]["base"] == report.data["generations"][0]["tuned"]
    assert tuned.training
    assert not base.training


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning:peft")
def test_adapters_of_every_kind_are_measured():
    """Prompt tuning puts virtual tokens before the text, whose logits are not those of the text."""
    base = make_model()
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ):
        tuned = get_peft_model(make_model(), config)
        report = measure(base, tuned, {"a": make_texts(2)}, tokenizer=TOKENIZER, max_length=20)
        assert report.data["retention"]["a"]["ref_kl"]["value"] > 1e-3
        with tuned.disable_adapter():
            report = measure(base, tuned, {"a": make_texts(2)}, tokenizer=TOKENIZER, max_length=20)
        assert report.data["retention"]["a"]["ref_kl"]["value"] == 0
        question = {"question": "the fox", "choices": ["rain and stone", "birds sing"], "answer": 0}
        asked = {"q": [question | {"question": text} for text in make_texts(6, words=3)]}
        report = measure(tuned, base, {"a": make_texts(2)}, tokenizer=TOKENIZER, max_length=20, choices=asked)
        assert report.data["noise_floor"]["a"]["ref_kl"]["value"] < 1e-6, "an adapter as the base"
        assert report.data["choices"]["q"]["rules"]["acc"]["noise_agreement"]["value"] == 1
