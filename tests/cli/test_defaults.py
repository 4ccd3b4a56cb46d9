"""Defaults that work where the user is: no accelerator, few positions, a word that is misspelt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, make_model, make_texts, make_tokenizer, random_model
from transformers import AutoConfig

from retain.cli.main import main
from retain.measuring.measure import measure
from retain.replay.dataset import read_manifest
from retain.sampling.write import sample_replay

HEADS = {"num_key_value_heads": 2, "head_dim": 8}
OF_README = {"gpt_neox": {}, "olmo2": {}, "gemma3_text": {**HEADS, "sliding_window": 16}, "mistral": HEADS}
QUICK = ["--report_to", "none", "--max_steps", "2", "--disable_tqdm", "true", "--save_strategy", "no"]


def save_tiny(folder: Path, architecture: str, **changes) -> str:
    """A random model of 128 positions and the tests' tokenizer."""
    shape = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 128, "pad_token_id": 4, **changes}
    random_model(AutoConfig.for_model(architecture, **shape), 0, 6.0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_texts(path: Path, seed: int, words: int = 40) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(6, seed=seed, words=words)))
    return str(path)


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("architecture", OF_README)
def test_the_three_steps_of_the_readme_run_with_its_flags(architecture, tmp_path, capsys):
    """TRL's bf16 and rows of 1024 tokens, and our rows of 512, are for another machine and another model."""
    model = save_tiny(tmp_path / "model", architecture, **OF_README[architecture])
    replay, out = (str(tmp_path / name) for name in ("replay", "out"))
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {model}\ndataset_name: {write_texts(tmp_path / 'new.jsonl', 1)}\noutput_dir: {out}\n"
    )
    wiki = write_texts(tmp_path / "wiki.jsonl", 2, words=400)
    finetune = ["finetune", "--config", str(tmp_path / "sft.yaml"), "--replay_dataset", replay]
    finetune += ["--replay_objective", "kl", "--replay_coef", "1", *QUICK]
    measure = ["measure", "--base", model, "--model", out, "--retention", f"wiki={wiki}"]
    assert main(["sample", "--model", model, "--output_dir", replay, "--num_rows", "4"]) == 0
    assert main(finetune) == 0
    assert "no accelerator: training on the CPU in float32" in capsys.readouterr().out
    assert main([*measure, "--max_new_tokens", "2", "--output_dir", str(tmp_path / "report")]) == 0
    arguments = json.loads(Path(out, "retain_config.json").read_text())["training_arguments"]
    settings = json.loads((tmp_path / "report" / "report.json").read_text())["settings"]
    assert (arguments["bf16"], arguments["max_length"], settings["max_length"]) == (False, 128, 128)
    assert read_manifest(Path(replay))["max_length"] == 128


@pytest.mark.usefixtures("no_accelerator")
def test_what_is_asked_for_is_not_a_default(tmp_path):
    from retain.cli.main import load_verb

    argv = ["--output_dir", str(tmp_path), "--bf16", "true", "--max_length", "1024"]
    args = load_verb("finetune").parse(argv)[1]
    assert (args.bf16, type(args.max_length)) == (True, int)
    with pytest.raises(ValueError, match="max_length: 200 is more than this model's 128 positions; use at most 128"):
        sample_replay(make_model(), make_tokenizer(), tmp_path / "rows", num_rows=1, max_length=200)
    with pytest.raises(ValueError, match="max_length: 200 is more than this model's 128 positions; use at most 128"):
        measure(make_model(), make_model(), {"wiki": ["a"]}, tokenizer=make_tokenizer(), max_length=200)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("finetune", "retain finetune: give --model, --dataset_name, --replay_dataset; for example `retain finetune "),
        ("finetune --replay_coef 1", "retain finetune: model: missing; give --model"),
        ("finetune --replay_coeff 1", "retain finetune: --replay_coeff: unknown argument; did you mean --replay_coef?"),
        ("finetune --config {bad}", "retain finetune: --replay_coeff: unknown argument; did you mean --replay_coef?"),
        (
            "finetune --learning_rat 1",
            "retain finetune: --learning_rat: unknown argument; did you mean --learning_rate? ",
        ),
        (
            "finetune --num_processes 2",
            "retain finetune: --num_processes: unknown argument; `retain finetune --help_all` ",
        ),
        ("finetune --config {bad} --config {bad}", "retain finetune: config: given twice; "),
        ("measure --base x --modle y", "retain measure: --modle: unknown argument; did you mean --model? "),
        ("measure --config {bad}", "retain measure: --replay_coeff: unknown argument; "),
        ("sample --ouput_dir x", "retain sample: --ouput_dir: unknown argument; "),
        ("plan --modle x", "retain plan: --modle: unknown argument; "),
        ("pretrain --corpsu x", "retain pretrain: --corpsu: unknown argument; "),
    ],
)
def test_a_misspelt_flag_is_named_before_all_else(argv, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("replay_coeff: 1\n")
    assert main(argv.format(bad="bad.yaml").split()) == 1
    assert capsys.readouterr().err.startswith(line)
    assert {path.name for path in tmp_path.iterdir()} == {"bad.yaml"}


def test_the_settings_that_a_run_keeps_are_those_it_used(tmp_path):
    """`per_device_replay_batch_size: null` stood where 1 was used."""
    from datasets import Dataset
    from trl import SFTConfig

    from retain import ReplaySFTTrainer

    folder = sample_replay(make_model(), make_tokenizer(), tmp_path / "pool", num_rows=4, max_length=20)
    args = SFTConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none", max_length=24)
    rows = Dataset.from_dict({"text": make_texts(4, seed=1)})
    trainer = ReplaySFTTrainer(
        make_model(), args, train_dataset=rows, processing_class=make_tokenizer(), replay_dataset=str(folder)
    )
    kept = trainer.measurer.settings["replay"]
    names = ("per_device_replay_batch_size", "replay_max_length", "replay_reference", "start_token")
    assert [kept[name] for name in names] == [1, 20, "copy", "<s>"]


def test_a_small_divergence_is_not_shown_as_none():
    """The end of a run said `ref_kl 0.0000 [0.0000, 0.0000]`."""
    from retain.report.numbers import Estimate

    assert str(Estimate.read({"value": 1.8e-5, "ci": [1.2e-5, 2.9e-5]})) == "0.000018 [0.000012, 0.000029]"
    assert str(Estimate.read({"value": 0.25, "ci": [None, None]})) == "0.250"


@pytest.mark.parametrize(("number", "words"), [(0, "0 prompts"), (1, "1 prompt"), (1200, "1,200 prompts")])
def test_one_prompt_is_one_prompt(number, words):
    from retain.report.numbers import quantity

    assert quantity(number, "prompt") == words


def test_a_large_vocabulary_takes_fewer_tokens_a_pass_unless_they_were_chosen():
    """2048 tokens of 262k logits of two models are 4.3 GB."""
    from retain.checks import Unchosen
    from retain.measuring.measure import tokens_that_fit

    large = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=torch.empty(262144, 1)))
    assert [tokens_that_fit(large, tokens) for tokens in (Unchosen(2048), 2048)] == [512, 2048]
    assert tokens_that_fit(make_model(), Unchosen(2048)) == 2048
