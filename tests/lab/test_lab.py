"""The laboratory: sizes, expansion, digit tasks, languages of known entropy, and pretraining."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model as make_any_model
from conftest import make_texts
from safetensors.torch import load_file
from transformers import LlamaConfig

from retain.cli.main import main
from retain.lab.languages import Language
from retain.lab.models import SIZES, counted_size, counted_size_of, expand, make_config, make_model, shape_of
from retain.lab.pretrain import PretrainConfig, open_corpus, split_documents
from retain.lab.streams import Stream, mixture, shuffled
from retain.lab.tasks import EOS, TASKS, DigitTask, digit_tokenizer, exact_match
from retain.lab.tokenizers import train_tokenizer, word_tokenizer
from retain.models.description import num_parameters
from retain.models.loading import load_model, load_tokenizer

# Sizes


@pytest.mark.parametrize(
    ("width", "millions"), [(256, 5.8), (384, 12.2), (512, 21), (640, 32), (768, 46)]
)  # fmt: skip
def test_sizes_are_counted_as_the_paper_counts(width, millions):
    """12·L·D² + D·V at L = 6, V = 4096; the MLP's width is a multiple of 8, hence almost."""
    assert counted_size(width, 6, 4096) == pytest.approx(millions * 1e6, rel=0.01)
    assert counted_size(width, 6, 4096) == pytest.approx(12 * 6 * width**2 + width * 4096, rel=0.005)


@pytest.mark.parametrize("size", [*SIZES, "1e6", 25_000_000, 70000])
def test_a_size_has_a_configuration(size):
    config = make_config(size, vocab_size=512, max_length=64)
    assert config.model_type == "qwen3"
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    if str(size) not in SIZES:
        assert counted_size_of(config) == pytest.approx(float(size), rel=0.1)
        assert counted_size_of(config) == counted_size(config.hidden_size, config.num_hidden_layers, 512)


def test_the_digit_model_has_134k_parameters():
    model = make_model(make_config("134k", vocab_size=19, max_length=11))
    assert num_parameters(model) == 133_888
    assert "q_norm" in str(model)


@pytest.mark.parametrize("size", ["5B", 10, 1e12])
def test_a_size_that_is_not_known_is_one_line(size):
    with pytest.raises(ValueError, match="^model_size: .*; use"):
        shape_of(size, 64)
    for wanted, vocab_size, nearest in ((30_000, 50_000, 802_944), (10_000, 8, 8_960)):
        with pytest.raises(ValueError, match=f"a vocabulary of {vocab_size}; use {nearest}, the nearest"):
            shape_of(wanted, vocab_size)
        assert shape_of(nearest, vocab_size).hidden_size == 16


def test_fresh_weights_follow_the_seed_alone():
    config = make_config("30k", vocab_size=32, max_length=8)
    before = torch.get_rng_state()
    one, same, other = (make_model(config, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


# Expansion

LARGER = {
    "width": {"hidden_size": 64},
    "mlp": {"intermediate_size": 104},
    "heads": {"num_heads": 8},
    "depth": {"num_layers": 5},
    "all": {"hidden_size": 96, "intermediate_size": 72, "num_heads": 8, "num_layers": 3},
}


@pytest.mark.parametrize("how", LARGER)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_expanded_model_computes_the_same(kind, how):
    model = make_any_model(kind)
    larger = expand(model, **LARGER[how])
    assert num_parameters(larger) > num_parameters(model)
    ids = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        was, now = model(ids).logits, larger(ids).logits
    assert float(was.std()) > 0.5
    torch.testing.assert_close(now, was, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("how", LARGER)
def test_what_is_new_learns(how):
    """Nothing new may be dead: after three steps of Adam every parameter has moved."""
    model = expand(make_any_model("qwen3"), **LARGER[how]).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        changed = weight != before[name]
        assert changed.float().mean() > 0.5, name


@pytest.mark.parametrize("change", [{"hidden_size": 40}, {"num_heads": 6}, {"num_layers": 1}, {"intermediate_size": 8}])
def test_what_cannot_hold_the_old_is_refused(change):
    with pytest.raises(ValueError, match="does not fit a model with .*; use"):
        expand(make_any_model("qwen3"), **change)
    with pytest.raises(ValueError, match="cannot be expanded"):
        expand(make_any_model("gpt2"), num_layers=3)
    biased = make_model(LlamaConfig(**make_any_model("llama").config.to_diff_dict() | {"mlp_bias": True}))
    with pytest.raises(ValueError, match="biases"):
        expand(biased, num_layers=3)


# Digit tasks


@pytest.mark.parametrize(
    ("task", "item", "text"),
    [
        ("add", 95_007, "<add>095+007=0102<eos>"),
        ("add", 999_999, "<add>999+999=1998<eos>"),
        ("modadd", 999_999, "<modadd>999+999=0998<eos>"),
        ("reversal", 120, "<reversal>120+___=0021<eos>"),
        ("sort", 302, "<sort>302+___=0023<eos>"),
    ],
)
def test_rows_of_the_digit_tasks(task, item, text):
    one = DigitTask(task, 3)
    [row] = one.rows(np.array([item]))
    tokenizer = digit_tokenizer(task)
    assert tokenizer.decode(row).replace(" ", "") == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == row.tolist()
    assert len(row) == one.length == 14
    assert tokenizer.bos_token_id == row[0] == one.start_id
    assert one.answer_length == len(text.split("=")[1].replace("<eos>", "")) + 1


@pytest.mark.parametrize("task", TASKS)
def test_training_never_draws_a_held_out_item(task):
    one = DigitTask(task, 2, held_out=0.2)
    drawn = one.training_items(range(4000), seed=3)
    assert not set(drawn) & set(one.held_out_items)
    assert len(one.held_out_items) == 0.2 * one.num_items
    assert set(one._not_held_out(np.arange(one.num_items - len(one.held_out_items)))) == set(
        range(one.num_items)
    ) - set(one.held_out_items)
    assert np.array_equal(one.training_rows([7, 5], 3), one.training_rows([4, 5, 6, 7], 3)[[3, 1]])
    assert not np.array_equal(drawn[:50], one.training_items(range(50), seed=4))
    assert np.array_equal(one.held_out_rows(9), DigitTask(task, 2, held_out=0.2).held_out_rows(9))


def test_exact_match_is_what_greedy_decoding_writes():
    task = DigitTask("add", 1)
    model = make_model(make_config("30k", vocab_size=19, max_length=task.length))
    rows = task.rows(np.arange(100))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = exact_match(model, rows, task.answer_length, batch_size=33)
    given = task.length - task.answer_length
    written = torch.from_numpy(rows[:, :given])
    with torch.no_grad():
        for _ in range(task.answer_length):
            written = torch.cat([written, model(written).logits[:, -1:].argmax(-1)], dim=1)
    assert right.tolist() == (written.numpy() == rows).all(1).tolist()
    assert 0 < right.mean() < 1 or right.all()
    assert model.training


@pytest.mark.parametrize(
    "wrong", [{"name": "multiply"}, {"name": "add", "digits": 9}, {"name": "sort", "held_out": 1.0}]
)
def test_a_task_that_is_not_known_is_one_line(wrong):
    with pytest.raises(ValueError, match="; use"):
        DigitTask(**wrong)


# Languages


def test_the_entropy_rate_agrees_with_a_long_run():
    language = Language(num_states=50, vocab_size=20, branching=3, seed=5)
    tokens, probabilities, following = language.table
    rows = language.rows(range(100), 2001, seed=1)
    state, losses = np.zeros(100, dtype=int), []
    for at in range(1, rows.shape[1]):
        chosen = (tokens[state] == rows[:, at, None]).argmax(1)
        losses.append(-np.log(probabilities[state, chosen]))
        state = following[state, chosen]
    by_row = np.array(losses).mean(0)
    error = by_row.std(ddof=1) / 10
    assert error < 0.003
    assert by_row.mean() == pytest.approx(language.ideal_loss(2001), abs=4 * error)
    assert language.ideal_loss(2001) == pytest.approx(language.entropy_rate, abs=1e-3)
    assert language.stationary.sum() == pytest.approx(1)
    assert (language.stationary > 0).all()
    np.testing.assert_allclose(language._step(language.stationary), language.stationary, atol=1e-10)


def test_rows_of_a_language_are_functions_of_their_numbers():
    language = Language(seed=1)
    rows = language.rows([3, 900, 4], 40, seed=2)
    assert np.array_equal(rows[::-1], language.rows([4, 900, 3], 40, seed=2))
    assert not np.array_equal(rows, language.rows([3, 900, 4], 40, seed=3))
    assert (rows[:, 0] == 0).all()
    assert rows[:, 1:].min() > 0
    assert rows.max() < language.vocab_size
    assert word_tokenizer(64).decode(rows[0][1:4]) == " ".join(f"w{token}" for token in rows[0][1:4])


@pytest.mark.parametrize("wrong", [{"num_states": 1}, {"branching": 64}, {"branching": 1}, {"concentration": 0}])
def test_a_language_that_cannot_be_is_one_line(wrong):
    with pytest.raises(ValueError, match="does not fit; use"):
        Language(**wrong)


# Streams and tokenizers


def test_every_row_once_a_pass_and_a_mixture_by_its_shares():
    rows = np.arange(20).reshape(10, 2)
    source = shuffled(rows, seed=1)
    first, second = source(np.arange(10)), source(np.arange(10, 20))
    assert sorted(first.tolist()) == sorted(second.tolist()) == rows.tolist()
    assert first.tolist() != second.tolist()
    both = mixture([(3, source), (1, shuffled(rows + 100, seed=2))], 4000, seed=1)
    drawn = both(np.arange(4000))
    assert np.mean(drawn[:, 0] < 100) == pytest.approx(0.75, abs=0.03)
    assert np.array_equal(both(np.array([17, 3])), drawn[[17, 3]])
    stream = Stream(both, 4000)
    assert stream[17]["labels"].tolist() == drawn[17].tolist()
    assert len(stream) == 4000


def test_texts_are_held_out_by_what_they_are(tmp_path):
    texts = make_texts(200)
    (tmp_path / "texts.txt").write_text("\n\n".join(texts + texts[:50]))
    train, away = split_documents(str(tmp_path / "texts.txt"))
    assert not set(train) & set(away)
    assert 2 <= len(set(away)) <= 25
    (tmp_path / "few.txt").write_text("\n\n".join(texts[:2]))
    with pytest.raises(ValueError, match="too few to hold some out"):
        split_documents(str(tmp_path / "few.txt"))


def test_a_tokenizer_made_on_the_spot_writes_anything():
    tokenizer = train_tokenizer(make_texts(30), 300)
    assert len(tokenizer) == 300
    assert tokenizer.bos_token_id == 0
    text = "the quick — ñandú 日本\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match="has no room for all bytes"):
        train_tokenizer(["x"], 100)


# Pretraining

SMALL = [
    *("--corpus", "synthetic", "--model_size", "20000", "--num_states", "8", "--vocab_size", "12", "--branching", "2"),
    *("--max_length", "16", "--eval_rows", "16", "--per_device_train_batch_size", "8", "--report_to", "none"),
    *("--use_cpu", "--disable_tqdm", "True"),
]


def made(folder: Path) -> dict:
    return json.loads((folder / "pretrain.json").read_text())


def test_pretraining_makes_an_ordinary_folder(tmp_path, capsys):
    config = tmp_path / "base.yaml"
    config.write_text("corpus: synthetic\nmodel_size: 20000\nmax_tokens: 4000\nadam_beta2_half_life_tokens: 1e4\n")
    rest = [*SMALL[4:], "--output_dir", str(tmp_path / "base")]
    assert main(["pretrain", "--config", str(config), *rest]) == 0
    output, found = capsys.readouterr().out, made(tmp_path / "base")
    assert found["num_steps"] == 32  # 4,000 tokens in steps of 128, rounded up
    assert found["num_tokens"] == 4096
    assert found["tokens_per_param"] == pytest.approx(4096 / found["num_params"])
    assert found["adam_beta2"] == pytest.approx(0.5 ** (128 / 1e4))
    assert f"beta2 {found['adam_beta2']:.6g}" in output
    assert found["eval_loss"] > found["ideal_loss"] > 0
    settings = json.loads((tmp_path / "base" / "retain_config.json").read_text())
    assert settings["training_arguments"]["adam_beta2"] == found["adam_beta2"]
    model, tokenizer = load_model(str(tmp_path / "base")), load_tokenizer(str(tmp_path / "base"))
    assert model.config.model_type == "qwen3"
    assert tokenizer.bos_token_id == model.config.bos_token_id == 0
    sample = ["--model", str(tmp_path / "base"), "--output_dir", str(tmp_path / "replay")]
    assert main(["sample", *sample, "--num_rows", "4", "--max_length", "16"]) == 0


@pytest.mark.parametrize(
    ("flags", "output"),
    [
        (["--corpus", "add", "--digits", "1", "--max_steps", "2"], "drawn with repetition"),
        (["--corpus", "TEXT", "--max_steps", "2", "--vocab_size", "270"], "passes over the text"),
        (["--corpus", "TEXT=0.5,OTHER=0.5", "--tokens_per_param", "0.01", "--vocab_size", "270"], "per parameter"),
    ],
)
def test_every_kind_of_corpus(tmp_path, capsys, flags, output):
    for name, seed in (("TEXT", 1), ("OTHER", 2)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(make_texts(60, seed)))
        flags = [flag.replace(name, str(tmp_path / f"{name}.txt")) for flag in flags]
    assert main(["pretrain", *SMALL[2:], *flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert output in capsys.readouterr().out
    assert made(tmp_path / "out")["eval_loss"] > 0


def test_a_dataset_of_the_hub_is_a_corpus(tmp_path, capsys, monkeypatch):
    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        assert configuration is None
        if name != "owner/texts":
            raise FileNotFoundError(f"no {name} on the Hub")
        assert split == "train"
        return datasets.Dataset.from_list([{"text": text} for text in make_texts(60, 1)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    command = ["pretrain", *SMALL[2:], "--max_steps", "2", "--vocab_size", "270"]
    assert main([*command, "--corpus", "owner/texts=2", "--output_dir", str(tmp_path / "out")]) == 0
    assert "passes over the text" in capsys.readouterr().out
    for name, line in (
        (
            "owner/nothing",
            "corpus: cannot load 'owner/nothing' from the Hub (no owner/nothing on the Hub); check the name",
        ),
        ("texts/missing.jsonl", "corpus: no file 'texts/missing.jsonl'; check the path"),
    ):
        assert main([*command, "--corpus", name, "--output_dir", str(tmp_path / "none")]) == 1
        assert line in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def test_texts_share_a_tokenizer_whichever_of_them_is_learned(tmp_path):
    both = []
    for seed, name in ((1, "a"), (2, "b")):
        path = tmp_path / f"{name}.jsonl"
        rows = [json.dumps({"text": f"{name} {text} {name * 40}"}) + "\n" for text in make_texts(200, seed)]
        path.write_text("".join(rows))
        both.append(str(path))
    known = {"tokenizer_corpus": ",".join(both), "vocab_size": 300, "max_length": 16, "eval_rows": 4}
    one, other = (open_corpus(PretrainConfig(corpus=name, **known), 0).tokenizer for name in both)
    assert one.get_vocab() == other.get_vocab()
    alone = open_corpus(PretrainConfig(corpus=both[0], **known | {"tokenizer_corpus": None}), 0).tokenizer
    assert alone.get_vocab() != one.get_vocab()


def test_pretraining_to_a_target_loss(tmp_path, capsys):
    rest = [*SMALL, "--max_steps", "200", "--eval_steps", "5", "--save_strategy", "no"]
    assert main(["pretrain", *rest, "--stop_at_loss", "2.0", "--output_dir", str(tmp_path / "hit")]) == 0
    assert "target loss: reached" in capsys.readouterr().out
    found = made(tmp_path / "hit")
    assert found["reached"]
    assert found["eval_loss"] <= 2.0
    assert found["num_steps"] < 200
    assert found["num_steps"] % 5 == 0
    rest[rest.index("no")] = "steps"
    again = ["pretrain", *rest, "--save_steps", "5", "--stop_at_loss", "2.0", "--output_dir", str(tmp_path / "kept")]
    assert main(again) == 0
    assert main([*again, "--resume_from_checkpoint", "true"]) == 0  # as after a kill behind its last step
    assert made(tmp_path / "kept") | {"seconds": found["seconds"], "resumed": False} == found
    for name, weight in load_file(tmp_path / "hit" / "model.safetensors").items():
        assert torch.equal(weight, load_file(tmp_path / "kept" / "model.safetensors")[name])
    rest[rest.index("steps")] = "no"
    rest[rest.index("200")] = "5"
    assert main(["pretrain", *rest, "--stop_at_loss", "0.1", "--output_dir", str(tmp_path / "missed")]) == 0
    assert "target loss: not reached" in capsys.readouterr().out
    assert not made(tmp_path / "missed")["reached"]


def test_resuming_with_other_settings_is_refused_before_the_corpus_is_read(tmp_path, capsys, monkeypatch):
    command = ["pretrain", *SMALL, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(tmp_path)]
    assert main(command) == 0
    monkeypatch.setattr("retain.lab.pretrain.open_corpus", lambda *given: pytest.fail("it was read"))
    assert main([*command, "--max_tokens", "99"]) == 1
    assert "max_steps: the length is given twice" in capsys.readouterr().err
    for name, value in (("language_seed", 1), ("seed", 7), ("per_device_train_batch_size", 5), ("learning_rate", 0.5)):
        assert main([*command, f"--{name}", str(value), "--resume_from_checkpoint", "true"]) == 1
        assert f"{name}: {value}, but the run in" in capsys.readouterr().err


# Finetuning


def test_finetuning_by_half_life_and_to_a_target_loss(tmp_path, capsys, llama_folder_with_rows):
    model, rows, held = llama_folder_with_rows
    command = [
        *("finetune", "--model", model, "--dataset_name", rows, "--eval_dataset_name", held),
        *("--replay_coef", "0", "--max_steps", "40", "--per_device_train_batch_size", "2", "--max_length", "24"),
        *("--use_cpu", "--bf16", "False", "--report_to", "none", "--save_strategy", "no", "--learning_rate", "1e-2"),
        *("--eval_strategy", "steps", "--eval_steps", "4", "--gradient_checkpointing", "False"),
        *("--output_dir", str(tmp_path / "out"), "--disable_tqdm", "True"),
    ]
    assert main([*command, "--stop_at_loss", "4.0", "--adam_beta2_half_life_tokens", "1000"]) == 0
    output = capsys.readouterr().out
    assert "target loss: reached" in output
    settings = json.loads((tmp_path / "out" / "retain_config.json").read_text())
    assert settings["replay"]["adam_beta2_half_life_tokens"] == 1000
    assert settings["training_arguments"]["adam_beta2"] == pytest.approx(0.5 ** (2 * 24 / 1000))
    assert "at 48 tokens per step (24 a row)" in output
    command[command.index("--output_dir") + 1] = str(tmp_path / "other")
    assert main([*command, "--adam_beta2_half_life_tokens", "1000", "--adam_beta2", "0.95"]) == 1
    assert "exclude each other" in capsys.readouterr().err


@pytest.fixture
def llama_folder_with_rows(tmp_path):
    from conftest import save_model

    folder = save_model(tmp_path / "llama")
    for name, seed in (("new", 1), ("held", 2)):
        text = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(12, seed))
        (tmp_path / f"{name}.jsonl").write_text(text)
    return str(folder), str(tmp_path / "new.jsonl"), str(tmp_path / "held.jsonl")


def test_eos_is_the_last_token_of_every_row():
    assert all((DigitTask(task, 2).held_out_rows()[:, -1] == EOS).all() for task in TASKS)
