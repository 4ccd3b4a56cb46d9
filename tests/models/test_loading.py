"""Strict loading: every weight of a model or adapter is found, or it is refused; a Hub id is seen as a folder is."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import make_model, make_tokenizer, save_model
from datasets import Dataset
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, PeftType, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_models import ADAPTERS, NEEDED, QV, gguf_file, write_gguf  # noqa: F401
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from retain import ReplayConfig, ReplaySFTTrainer
from retain.cli.main import main
from retain.cli.measure import MeasureConfig, Start, load_judge, measure_models, other_base
from retain.models.loading import find_file, load_model, load_tokenizer, tokenizer_of_tuned
from retain.models.reference import probe
from retain.training.run_files import settings_of_run

IDS = torch.arange(5, 25)[None]
Weights = dict[str, torch.Tensor]


def edited(file: Path, edit: Callable[[Weights], Weights]) -> str:
    """The model or adapter of `file` with other weights."""
    save_file(edit(load_file(file)), file, {"format": "pt"})
    return str(file.parent)


def saved(folder: Path, edit: Callable[[Weights], Weights] = lambda found: found, architecture: str = "llama") -> str:
    return edited(save_model(folder, architecture) / "model.safetensors", edit)


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda found: {name: value for name, value in found.items() if part not in name}


def renamed(rename: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda found: {rename(name): value for name, value in found.items()}


def refusal(load: Callable[..., Any], *given: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load(*given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("retain")]


# Models

DAMAGED = {
    "no head": (without("lm_head"), ["lacks 1 of its weights", "lm_head.weight"]),
    "body alone, as AutoModel saves it": (
        lambda found: renamed(lambda name: name.removeprefix("model."))(without("lm_head")(found)),
        ["lacks 1 of its weights", "lm_head.weight"],
    ),
    "one layer": (without("layers.1."), ["lacks 9 of its weights", "model.layers.1.input_layernorm.weight"]),
    "one norm": (without("model.norm"), ["lacks 1 of its weights", "model.norm.weight"]),
    "names of another program": (
        renamed(lambda name: name.replace("layers", "blocks")),
        ["lacks 18 of its weights", "it holds model.blocks.0.input_layernorm.weight"],
    ),
    "another width": (
        lambda found: found | {"lm_head.weight": torch.zeros(319, 32)},
        ["lm_head.weight is [319, 32] in the file and [320, 32] by config.json"],
    ),
    "a bias that the model has no place for": (
        lambda found: found | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        ["would be ignored: model.layers.0.self_attn.q_proj.bias"],
    ),
    "an adapter that was not merged": (
        lambda found: found | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        ["would be ignored: model.layers.0.self_attn.q_proj.lora_A.weight"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_model_whose_weights_are_not_found_is_refused(case, tmp_path):
    """Else they are random: pytorch#101107, transformers#9882."""
    edit, expected = DAMAGED[case]
    message = refusal(load_model, saved(tmp_path / "m", edit))
    assert message.startswith("model: ")
    for part in expected:
        assert part in message


def test_the_verbs_name_their_flag(tmp_path, capsys):
    name = saved(tmp_path / "m", without("lm_head"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the quick brown fox"}\n' * 8)
    out = ["--output_dir", str(tmp_path / "out")]
    for verb, field, arguments in (
        ("sample", "model", ["--num_rows", "2", "--max_length", "8"]),
        ("finetune", "model", ["--dataset_name", str(rows), "--replay_coef", "0"]),
        ("measure", "base", ["--model", name, "--retention", f"rows={rows}"]),
    ):
        assert main([verb, f"--{field}", name, *arguments, *out]) == 1
        assert f"{field}: {name!r} lacks 1 of its weights" in capsys.readouterr().err


def test_a_lost_shard_is_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = shutil.copytree(tmp_path, tmp_path / "gone") / min(index["weight_map"].values())
    gone.unlink()
    assert gone.name in refusal(load_model, str(gone.parent))
    lost = min(file for name, file in index["weight_map"].items() if "layers.1" in name)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / lost).unlink()
    assert "of its weights" in refusal(load_model, str(tmp_path))


def test_tied_weights_may_be_saved_once_on_either_side_or_twice(tmp_path):
    whole = make_model("qwen3")(IDS).logits
    for at, edit in enumerate((
        lambda found: found,
        renamed(lambda name: name.replace("model.embed_tokens", "lm_head")),
        lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()},
    )):  # fmt: skip
        assert torch.equal(load_model(saved(tmp_path / str(at), edit, "qwen3"))(IDS).logits, whole)
    lost = refusal(load_model, saved(tmp_path / "lost", without("embed_tokens"), "qwen3"))
    assert "model.embed_tokens.weight" in lost


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "blocks compiled one by one": lambda name: name.replace(".0.", ".0._orig_mod."),
    "FSDP1 around checkpointing": lambda name: "_fsdp_wrapped_module." + name.replace(
        ".1.", ".1._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_wrappers_prefix_is_read_over_and_said(wrapper, architecture, tmp_path, caplog):
    name = saved(tmp_path / "m", renamed(WRAPPED[wrapper]), architecture)
    with caplog.at_level(logging.WARNING, "retain"):
        model = load_model(name)
    whole = make_model(architecture)(IDS).logits
    assert torch.equal(model(IDS).logits, whole)
    assert ["wrapper" in line for line in own_lines(caplog)] == [True]
    assert model.config._name_or_path == name
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(str(tmp_path / "again"))(IDS).logits, whole)
    assert len(own_lines(caplog)) == 1


def test_what_belongs_to_no_part_of_the_model_is_said_in_one_line(tmp_path, caplog):
    """Prediction heads, vision towers, old buffers: the model does not need them."""
    extra = {"mtp.layers.0.proj.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    with caplog.at_level(logging.WARNING, "retain"):
        model = load_model(saved(tmp_path / "m", lambda found: found | extra))
    assert torch.equal(model(IDS).logits, make_model()(IDS).logits)
    (line,) = own_lines(caplog)
    assert "mtp.layers.0.proj.weight" in line
    assert "inv_freq" not in line


def test_a_gguf_file_that_lacks_a_tensor_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    model = make_model()
    del model.model.layers[1].mlp.up_proj.weight
    file = write_gguf(tmp_path / "tiny.gguf", model, make_tokenizer())
    assert "model.layers.1.mlp.up_proj.weight" in refusal(load_model, str(file))
    assert not any((tmp_path / "cache").rglob("*.safetensors"))


def test_the_callers_settings_cannot_switch_it_off(tmp_path):
    """`model_init_kwargs` of a trainer come here."""
    name = saved(tmp_path / "m", lambda found: found | {"lm_head.weight": torch.zeros(319, 32)})
    assert "[319, 32]" in refusal(load_model, name, ignore_mismatched_sizes=True, output_loading_info=False)


# Adapters


def saved_adapter(folder: Path, base: Path, config: Any = None) -> Path:
    """A moved adapter on the base in `base`, as PEFT saves it."""
    model = load_model(str(base))
    adapted = get_peft_model(model, config or LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def half_a_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def wider(found: Weights) -> Weights:
    return {name: torch.zeros(value.shape[0], 48) if "lora_A" in name else value for name, value in found.items()}


DAMAGED_ADAPTERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one layer": (lambda file: edited(file, without("layers.1")), ["lacks 2 of its weights", "layers.1", "whole"]),
    "no weights in the file": (lambda file: edited(file, lambda found: {}), ["lacks 4 of its weights"]),
    "no file": (lambda file: file.unlink(), ["holds no adapter_model.safetensors"]),
    "half a file": (half_a_file, ["adapter_model.safetensors", "damaged", "copy"]),
    "more layers than the base": (
        lambda file: edited(file, lambda found: found | {f"{name}".replace("layers.1", "layers.2"): value.clone()
                                                         for name, value in found.items() if "layers.1" in name}),
        ["would be ignored", "layers.2", "base_model_name_or_path"],
    ),
    "another width": (
        lambda file: edited(file, wider), ["adapter_model.safetensors", "[2, 48]", "base_model_name_or_path"]),
    "names of another program": (
        lambda file: edited(file, renamed(lambda name: name.replace("base_model.model.", "policy."))),
        ["lacks 4 of its weights"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED_ADAPTERS)
def test_an_adapter_whose_weights_are_not_found_is_refused(case, llama_folder, tmp_path):
    """Else it is its base, or half of itself: peft#2699."""
    damage, expected = DAMAGED_ADAPTERS[case]
    damage(saved_adapter(tmp_path / "a", llama_folder))
    message = refusal(load_model, str(tmp_path / "a"))
    assert message.startswith("model: ")
    for part in (str(tmp_path / "a"), *expected):
        assert part in message


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_without_its_saved_module_is_refused(modules, llama_folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules)
    file = saved_adapter(tmp_path / "a", llama_folder, config)
    load_model(str(tmp_path / "a"))
    assert "lm_head.weight" in refusal(load_model, edited(file, without("lm_head")))


def test_a_prompt_of_another_length_is_refused(llama_folder, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    file = saved_adapter(tmp_path / "a", llama_folder, config)
    load_model(str(tmp_path / "a"))
    edited(file, lambda found: {"prompt_embeddings": torch.zeros(3, 32)})
    assert "[3, 32]" in refusal(load_model, str(tmp_path / "a"))
    edited(file, renamed(lambda name: f"policy.{name}"))
    assert "prompt_embeddings" in refusal(load_model, str(tmp_path / "a"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_of_a_grown_vocabulary_says_what_to_do(llama_folder, tmp_path):
    grown = load_model(str(llama_folder))
    grown.resize_token_embeddings(322)
    grown.save_pretrained(tmp_path / "grown")
    saved_adapter(tmp_path / "a", tmp_path / "grown", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for base in (str(tmp_path / "grown"), str(llama_folder)):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        if base != str(llama_folder):
            load_model(str(tmp_path / "a"))
    message = refusal(load_model, str(tmp_path / "a"))
    for part in ("adapter_model.safetensors", "322", "320", "resize_token_embeddings", "base_model_name_or_path"):
        assert part in message


@pytest.mark.parametrize("wrapped", [
    lambda name: f"_orig_mod.{name}", lambda name: f"module.{name}",
    lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    lambda name: name.replace("self_attn", "_orig_mod.self_attn"),
])  # fmt: skip
@pytest.mark.parametrize("config", [None, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])])
def test_a_wrappers_prefix_in_an_adapter_is_read_over_and_said(wrapped, config, llama_folder, tmp_path, caplog):
    file = saved_adapter(tmp_path / "a", llama_folder, config)
    whole = load_model(str(tmp_path / "a"))(IDS).logits
    with caplog.at_level(logging.WARNING, "retain"):
        found = load_model(edited(file, renamed(wrapped)))(IDS).logits
    assert torch.equal(found, whole)
    assert "wrapper" in caplog.text


@pytest.mark.filterwarnings("ignore")  # of what each thinks of a tiny model
@pytest.mark.parametrize("kind", sorted({*ADAPTERS, "DORA"} - {"MULTITASK_PROMPT_TUNING", "POLY", "SHADOW"}))
def test_a_whole_adapter_of_any_kind_is_loaded_as_peft_loads_it(kind, llama_folder, tmp_path):
    """The three left out want inputs of their own, or do not run on a Llama."""
    make: Any = LoraConfig if kind == "DORA" else PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    settings = {"use_dora": True, **QV} if kind == "DORA" else NEEDED.get(kind, QV)
    saved_adapter(tmp_path, llama_folder, make(task_type="CAUSAL_LM", **settings))
    expected = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert torch.equal(load_model(str(tmp_path))(IDS).logits, expected(IDS).logits)


# Names of the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[[Path], str]:
    """Puts a folder into the Hub's local cache; returns its id."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder: Path) -> str:
        place = tmp_path / "hub" / f"models--me--{folder.name}"
        shutil.copytree(folder, place / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
        return f"me/{folder.name}"

    return put


def renumbered() -> Any:
    """A tokenizer that cuts as ours does and numbers two words the other way round."""
    raw = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), eos_token="<|im_end|>")


@pytest.mark.parametrize("kind", ["folder", "hub", "gguf"])
def test_a_tuned_model_with_a_renumbered_tokenizer_is_refused(kind, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    make_model().save_pretrained(tmp_path / "renumbered")
    renumbered().save_pretrained(tmp_path / "renumbered")
    name = str(tmp_path / "renumbered") if kind == "folder" else hub(tmp_path / "renumbered")
    if kind == "gguf":
        other = renumbered()
        other.bos_token = "<s>"
        name = str(write_gguf(tmp_path / "renumbered.gguf", make_model(), other))
    load_model(name)
    message = refusal(tokenizer_of_tuned, name, make_tokenizer())
    assert "'a' is" in message
    assert "measure" in message


def test_a_gguf_file_may_pad_its_vocabulary_and_cut_by_other_rules(tmp_path, monkeypatch):
    """llama.cpp fills the embedding with tokens of its own, and the rules before BPE are not in the file."""
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    padded = make_tokenizer()
    padded.add_tokens(["[PAD320]", "[PAD321]"])
    name = str(write_gguf(tmp_path / "padded.gguf", make_model(vocab_size=322), padded))
    own = tokenizer_of_tuned(name, make_tokenizer())
    assert own.get_vocab() == make_tokenizer().get_vocab()


def test_an_adapter_of_another_base_warns_by_its_id_as_by_its_folder(hub, llama_folder, tmp_path):
    other = save_model(tmp_path / "other", seed=3)
    saved_adapter(tmp_path / "adapter", other)
    for name in (str(tmp_path / "adapter"), hub(tmp_path / "adapter")):
        tuned = load_model(name)
        assert isinstance(tuned, PeftModel)
        start = Start(str(llama_folder), probe(load_model(str(llama_folder))))
        assert "it was trained on another base" in "".join(other_base(name, tuned, start))


def test_what_a_run_was_set_to_is_found_by_its_id_and_above_its_checkpoints(hub, tmp_path):
    """Else the same weights are measured on other tokens of the new task, and their replay rows are not looked at."""
    folder = tmp_path / "run"
    settings = {"training_arguments": {"completion_only_loss": False}, "replay_dataset": {"source": str(tmp_path)}}
    for part in (".", "checkpoint-2", "other"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text("{}")
    (folder / "retain_config.json").write_text(json.dumps(settings))
    for name in (str(folder), str(folder / "checkpoint-2"), hub(folder)):
        assert settings_of_run(name) == settings
    assert settings_of_run(str(folder / "other")) == {}


def test_a_hub_that_does_not_answer_is_no_model_without_the_file(hub, llama_folder):
    """A misspelt folder was asked for on the Hub file by file, for four minutes: each was taken to be missing."""
    known = hub(llama_folder)
    assert find_file(known, "config.json")
    assert find_file(known, "spiece.model") is None
    for load in (settings_of_run, load_tokenizer, lambda name: tokenizer_of_tuned(name, make_tokenizer())):
        with pytest.raises(
            ValueError, match="^model: 'ou' is not a local folder, and could not be read from the Hub .*; check the"
        ):
            load("ou")


def test_an_adapter_may_name_a_revision_of_its_base(hub, llama_folder, tmp_path):
    """PEFT's `revision`; and its base may be an id, too."""
    name = hub(shutil.copytree(llama_folder, tmp_path / "base"))
    file = saved_adapter(tmp_path / "a", llama_folder)
    settings = json.loads((file.parent / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
    file.with_name("adapter_config.json").write_text(json.dumps(settings))
    load_model(str(file.parent))
    file.with_name("adapter_config.json").write_text(json.dumps(settings | {"revision": "older"}))
    assert "older" in refusal(load_model, str(file.parent))


def test_a_tuned_model_with_another_vocabulary_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    make_model().config.save_pretrained(tmp_path)
    assert tokenizer_of_tuned(str(tmp_path), tokenizer) is tokenizer, "none there: nothing to compare"
    save_model(tmp_path)
    tokenizer_of_tuned(str(tmp_path), tokenizer)
    lacking, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    lacking.add_tokens(["<mine>"])
    assert "was trained on another base" in refusal(tokenizer_of_tuned, str(tmp_path), lacking)
    for token, named in (("<tool>", "has tokens that the base's lacks: '<tool>'"), ("<step>", "'<step>', '<tool>'")):
        other.add_tokens([token])
        other.save_pretrained(tmp_path)
        message = refusal(tokenizer_of_tuned, str(tmp_path), tokenizer)
        for part in (named, "resize_token_embeddings", "--base"):
            assert part in message
        assert "was trained on another base" in refusal(tokenizer_of_tuned, str(tmp_path), lacking)


# Bases that lie in a file or package


def test_an_adapter_names_its_package_and_so_does_the_card(gguf_file, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING, "retain"):
        base = load_model("package:fake_llm_package")
        load_model("package:fake_llm_package")
    (line,) = own_lines(caplog)
    assert re.search(r"tiny.gguf: 0.0 GB of dequantised weights .* cached in .*/cache/models/tiny-", line)
    args = SFTConfig(str(tmp_path / "out"), max_steps=1, report_to="none", bf16=False, use_cpu=True, max_length=16)
    trainer = ReplaySFTTrainer(
        base, args, replay_config=ReplayConfig(replay_coef=0, replay_objective="kl"), processing_class=make_tokenizer(),
        train_dataset=Dataset.from_dict({"text": ["the quick brown fox"] * 8}), peft_config=LoraConfig(r=2, **QV),
    )  # fmt: skip
    trainer.save_model()
    trainer.create_model_card()
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "package:fake_llm_package"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuned version of `package:fake_llm_package`" in card
    assert 'pipeline("text-generation", model="out"' in card
    assert torch.equal(load_model(str(tmp_path / "out"))(IDS).logits, make_model()(IDS).logits)


@pytest.mark.parametrize("name", ["package:fake_llm_package", "tiny.gguf"])
def test_peft_is_not_heard_looking_for_the_config_of_a_gguf_base(gguf_file, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.chdir(gguf_file.parent)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Could not find a config file in")
        get_peft_model(load_model(name), LoraConfig(r=2, **QV)).save_pretrained(tmp_path / "out")
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == (name if name.startswith("package:") else str(gguf_file))


# What the user set is what is named


def test_errors_name_the_field_that_was_set(llama_folder):
    good: dict[str, Any] = {"base": str(llama_folder), "judge": str(llama_folder), "model": [str(llama_folder)]}
    good |= {"retention": ["w=x"], "refusals": ["w=x"], "output_dir": "x"}
    for field in ("base", "model"):
        config = MeasureConfig(**good | {field: "nope/nope/nope" if field == "base" else ["nope/nope/nope"]})
        with pytest.raises(ValueError, match=rf"^{field}: no folder or file 'nope/nope/nope'"):
            next(measure_models(config, print))
    with pytest.raises(ValueError, match="^judge: no folder or file 'nope/nope/nope'"):
        load_judge(MeasureConfig(**good | {"judge": "nope/nope/nope"}), make_model())
    with pytest.raises(ValueError, match=r"^model_name_or_path: no folder or file 'nope/nope/nope'"):
        load_tokenizer("nope/nope/nope", field="model_name_or_path")


def test_an_adapter_whose_base_is_gone_says_whose(llama_folder, tmp_path):
    base = shutil.copytree(llama_folder, tmp_path / "base")
    saved_adapter(tmp_path / "a", base)
    shutil.rmtree(base)
    message = refusal(load_model, str(tmp_path / "a"))
    assert message.startswith("model: ")
    for part in (str(tmp_path / "a"), str(base), "base_model_name_or_path"):
        assert part in message
