"""Draws are the model's own distribution, whatever the checkpoint's generation settings; a killed job resumes."""

from __future__ import annotations

import json
import os
import signal
import time
import types
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, CHATML, forked, make_model, make_tokenizer, random_model, sample_rows, save_model
from scipy.stats import chisquare
from transformers import AutoConfig, PreTrainedModel

from retain.cli.main import main
from retain.models.description import choose_start_token, model_fingerprint, tokenizer_fingerprint
from retain.models.loading import load_model, load_tokenizer
from retain.replay.dataset import MANIFEST, load_self_generated, load_texts, read_manifest
from retain.sampling.engine import choose_batch_size, choose_threads, draw_rows, draw_tokens, row_uniforms
from retain.sampling.quality import pool_lines
from retain.sampling.starts import TOOLS, chat_prefix, plan_starts
from retain.sampling.write import sample_replay

START = 3


def same_distribution(counts: np.ndarray, probs: np.ndarray) -> float:
    """p-value of a chi-square test; outcomes expected fewer than 5 times count as one."""
    expected = probs * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


# One draw


def test_draws_follow_the_softmax_and_never_take_a_token_of_probability_zero():
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 2.5, -3.0, -1e5, -torch.inf])
    count = 200_000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens(torch.softmax(logits, -1).expand(count, -1), uniforms)
    counts = np.bincount(drawn.numpy(), minlength=8)
    assert counts[[0, 2, 6, 7]].tolist() == [0, 0, 0, 0]
    assert same_distribution(counts, torch.softmax(logits.double(), -1).numpy()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_extreme_uniforms_draw_possible_tokens(dtype):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2, dtype=dtype)
    extremes = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(torch.softmax(logits.float(), -1), extremes).tolist() == [1, 2]
    wide = torch.zeros(2, 50_000, dtype=dtype)
    wide[:, -100:] = -torch.inf
    assert draw_tokens(torch.softmax(wide.float(), -1), extremes).tolist() == [0, 49_899]
    between = torch.tensor([0.1, 0.19999, 0.20001, 0.49999, 0.50001], dtype=torch.float64)
    assert draw_tokens(torch.tensor([0.2, 0.3, 0.5]).expand(5, -1), between).tolist() == [0, 0, 1, 1, 2]


def test_rounding_at_the_upper_end_draws_no_impossible_token():
    """(1 − 2⁻⁵³) times a total above 1 may round to the total itself."""
    probabilities = torch.tensor([[0.5, 0.5 + 2.0**-20, 0.0]]).expand(1000, -1)
    uniforms = torch.full((1000,), 1 - 2.0**-53, dtype=torch.float64)
    assert set(draw_tokens(probabilities, uniforms).tolist()) == {1}


def test_a_dataset_of_no_rows_is_not_made(tmp_path):
    with pytest.raises(ValueError, match="^num_rows: 0 does not fit; use a whole number of at least 1"):
        sample_replay(make_model(), make_tokenizer(), tmp_path / "out", num_rows=0)
    assert not (tmp_path / "out").exists()


def test_predictions_that_are_not_numbers_stop_the_run():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="dtype: the model's predictions are not finite"):
        sample_rows(model, START, range(2), 6, seed=0)


def test_uniforms_are_uniform_and_of_their_row_and_seed_alone():
    draws = np.concatenate([row_uniforms(0, row, 100) for row in range(200)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert same_distribution(np.histogram(draws, 50, (0, 1))[0], np.full(50, 1 / 50)) > 0.01
    assert np.array_equal(row_uniforms(4, 7, 9), row_uniforms(4, 7, 30)[:9])
    assert not np.array_equal(row_uniforms(4, 7, 9), row_uniforms(7, 4, 9))
    assert row_uniforms(2**63 - 1, 0, 3).shape == (3,)


# Rows


def hostile(model):
    """Generation settings as checkpoints bring them along (pitfall 14)."""
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=2.0, eos_token_id=[0, 2], max_length=3
    )
    return model


def test_the_first_tokens_are_the_models_own_whatever_its_generation_config_says():
    """Given the likeliest first token, the second is as the model says: the cache carries the context."""
    model = make_model()
    rows = sample_rows(hostile(model), START, range(20_000), 3, seed=2)
    first = int(rows[:, 1].mode().values)
    second = rows[rows[:, 1] == first, 2]
    assert len(second) > 500
    for given, drawn in (([START], rows[:, 1]), ([START, first], second)):
        probs = torch.softmax(model(torch.tensor([given])).logits[0, -1].double(), -1)
        assert same_distribution(np.bincount(drawn.numpy(), minlength=320), probs.detach().numpy()) > 0.01


def test_generation_settings_change_nothing():
    plain = sample_rows(make_model(), START, range(4), 20, seed=0)
    assert torch.equal(sample_rows(hostile(make_model()), START, range(4), 20, seed=0), plain)


def test_rows_go_on_past_the_end_of_a_document():
    """Pitfall 16: a row is not cut at an end-of-document token, and what follows is sampled in that context."""
    model = make_model(scale=1.0)  # nearly uniform, so that such tokens do come
    rows = sample_rows(hostile(model), START, range(200), 40, seed=0)
    assert rows.shape == (200, 40)
    ends = (rows[:, 1:-1] == 2) | (rows[:, 1:-1] == 0)
    assert ends.sum() > 20
    after = rows[:, 2:][ends]
    assert len(after.unique()) > 15  # neither padding nor a repeated end


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_does_not_depend_on_the_rows_beside_it(architecture):
    """Rows drawn alone, in other batches, in another order: the same tokens."""
    model = make_model(architecture)
    whole = sample_rows(model, START, range(12), 32, seed=3)
    parts = torch.cat([sample_rows(model, START, rows, 32, seed=3) for rows in ([0], range(1, 6), range(6, 12))])
    back = sample_rows(model, START, range(11, -1, -1), 32, seed=3).flip(0)
    different = [int((whole != other).any(-1).sum()) for other in (parts, back)]
    assert different == [0, 0]
    assert not torch.equal(sample_rows(model, START, range(12), 32, seed=4), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 12
    assert (whole[:, 0] == START).all()


RECURRENT = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
MIXING = {**RECURRENT, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
OTHER_CACHES = {
    "mamba": {**RECURRENT, "state_size": 8},
    "mamba2": {**RECURRENT, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {**RECURRENT, "state_size": 8},
    "rwkv": {**RECURRENT, "context_length": 64},
    "recurrent_gemma": {**MIXING, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 8},
    "jamba": {**MIXING, "mamba_d_state": 8, "num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
        "attn_layer_offset": 1},
}  # fmt: skip


def make_recurrent(kind: str, scale: float = 6.0) -> PreTrainedModel:
    """As `make_model`, of families that call their cache otherwise, or keep a state in it."""
    config = AutoConfig.for_model(kind, bos_token_id=3, eos_token_id=2, pad_token_id=4, **OTHER_CACHES[kind])
    return random_model(config, 0, scale)


def drawn_in_context(model) -> bool:
    """Whether each token is what a pass without a cache over the tokens before it, and the row's uniform, say."""
    drawn = draw_rows(model, [[3], [3, 9, 14]], range(2), 28, 4)
    ids = torch.from_numpy(drawn.tokens).long()
    with torch.no_grad():
        logits = torch.stack([model(ids[:, :at], use_cache=False).logits[:, -1] for at in range(1, 28)], dim=1)
    log_probs = torch.log_softmax(logits.double(), -1)
    chosen, entropies = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)
    for found, each in ((drawn.logprobs, chosen), (drawn.entropies, entropies)):
        sums = [float(each[row, given - 1 :].sum()) for row, given in enumerate(drawn.prefix_lengths)]
        assert found == pytest.approx(sums, rel=1e-5)
    uniforms = torch.from_numpy(np.stack([row_uniforms(4, row, 28) for row in range(2)]))[:, 3:]
    again = draw_tokens(log_probs[:, 2:].exp().reshape(50, -1), uniforms.reshape(-1))
    return torch.equal(again.reshape(2, 25), ids[:, 3:])


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 16, "factor": 8.0}
PLAIN = {**MIXING, "head_dim": 8, "max_position_embeddings": 128}
CHANGES_WITH_LENGTH = {
    "phi3": {**PLAIN, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    "mistral": {**PLAIN, "sliding_window": 8},
    "llama4_text": {**PLAIN, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "gemma2": {**PLAIN, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
}  # fmt: skip


def make_changing(kind: str) -> PreTrainedModel:
    """Models that predict otherwise from some length on: by another encoding of positions, or a window."""
    config = AutoConfig.for_model(kind, bos_token_id=3, eos_token_id=2, pad_token_id=4, **CHANGES_WITH_LENGTH[kind])
    return random_model(config, 0, 6.0)


IN_CONTEXT = {
    **{kind: partial(make_model, kind) for kind in ARCHITECTURES},
    **{kind: partial(make_recurrent, kind) for kind in ("mamba", "mamba2", "falcon_mamba", "jamba")},
    **{f"{kind}, long": partial(make_changing, kind) for kind in CHANGES_WITH_LENGTH if kind != "phi3"},
}


@pytest.mark.parametrize("kind", IN_CONTEXT)
def test_every_token_is_drawn_in_its_context(kind):
    """Mamba swallows `past_key_values`: each token was drawn given the last alone, and nothing said so."""
    assert drawn_in_context(IN_CONTEXT[kind]())


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_rows_of_a_model_whose_cache_fails_are_refused_or_right(kind):
    """RWKV mixes the rows of a batch; RecurrentGemma has a state in its modules, and was wrong in transformers 5.19."""
    model = make_recurrent(kind)
    for _ in range(2):  # what the last batch left in the modules does not reach the next
        try:
            assert drawn_in_context(model)
        except ValueError as error:
            assert str(error).startswith(f"model: '{kind}' does not continue from its cache")  # noqa: PT017


def test_rows_are_proven_at_their_own_length():
    """Eight tokens do not show what a cache does from the seventeenth on, where LongRoPE encodes all positions anew."""
    model = make_changing("phi3")
    draw_rows(model, [[3]], [0], 16, 0)
    with pytest.raises(ValueError, match=r"^max_length: within 40 tokens 'phi3' predicts differently with its cache"):
        draw_rows(model, [[3], [3]], [0, 1], 40, 0)


@pytest.mark.parametrize("store", ["hidden", None])
def test_rows_beyond_the_switch_of_longrope_are_refused(tmp_path, store):
    """Their first tokens were predicted while the row was short, and training reads it whole."""
    options = {"num_rows": 2, "store_reference": store}
    sample_replay(make_changing("phi3"), make_tokenizer(), tmp_path / "short", max_length=16, **options)
    with pytest.raises(ValueError, match=r"^max_length: 17, but beyond 16 tokens LongRoPE .*; use at most 16 "):
        sample_replay(make_changing("phi3"), make_tokenizer(), tmp_path / "long", max_length=17, **options)
    assert not (tmp_path / "long").exists()


def test_a_model_is_proven_once(model):
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    draw_rows(model, [[3]] * 4, range(4), 24, 0)
    assert passes.count((1, 23)) == 2  # rows at their whole length, without a cache
    passes.clear()
    draw_rows(model, [[3]] * 4, range(4, 8), 24, 0)
    assert passes == [(1, 1), *[(4, 1)] * 23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_is_not_taken_for_a_cache_that_carries_nothing(architecture, dtype):
    draw_rows(make_model(architecture).to(dtype), [[3]], [0], 8, 0)


def test_a_cache_that_carries_nothing_is_said_before_the_first_row_is_drawn(tmp_path, monkeypatch):
    forward = type(model := make_model()).forward

    def forgetful(self, *args, past_key_values=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(ValueError, match=r"^model: 'llama' does not continue from its cache .* --engine vllm") as error:
        sample(tmp_path, model)
    assert "\n" not in str(error.value)
    assert not contents(tmp_path)


# The folder


def sample(folder: Path, model=None, **settings: object) -> Path:
    values = {"num_rows": 10, "max_length": 8, "rows_per_shard": 4, "batch_size": 3, **settings}
    return sample_replay(model or make_model(), make_tokenizer(), folder, **values)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_the_same_model_in_another_folder_goes_on(tmp_path):
    before = contents(sample(tmp_path, num_rows=6))
    moved = make_model()
    moved.name_or_path = "elsewhere/model"
    assert contents(sample(tmp_path, moved, num_rows=6)) == before
    moved.lm_head.weight.data[0] += 1.0
    with pytest.raises(ValueError, match="holds rows with model"):
        sample(tmp_path, moved, num_rows=6)


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("num_rows", 9), ("max_length", 6), ("start", "chat")])
def test_other_settings_than_the_begun_rows_are_refused_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch, name, value
):
    save_model(tmp_path / "model")
    make_tokenizer(template=CHATML).save_pretrained(tmp_path / "model")
    command = ["sample", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "rows")]
    command += ["--num_rows", "4", "--max_length", "8"]
    assert main(command) == 0
    monkeypatch.setattr("retain.cli.sample.load_model", lambda *given, **options: pytest.fail("it was loaded"))
    assert main([*command, f"--{name}", str(value)]) == 1
    assert f"holds rows with {name} " in capsys.readouterr().err


def test_a_dataset_says_where_it_is_from(tmp_path):
    finished: list[int] = []
    folder = sample(tmp_path, progress=finished.append, seed=9)
    manifest, model = read_manifest(folder), make_model()
    assert manifest["model_fingerprint"] == model_fingerprint(model)
    assert manifest["tokenizer_fingerprint"] == tokenizer_fingerprint(make_tokenizer())
    assert manifest["start_token"] == {"id": 3, "token": "<s>", "reason": "the tokenizer's bos_token"}
    sampler = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "repetition_penalty": 1.0, "stop_at_eos": False}
    assert manifest["sampler"] == {"engine": "torch", **sampler, "dtype": "float32"}
    assert manifest["seed"] == 9
    assert manifest["versions"]["torch"] == version("torch")
    assert (finished[0], sum(finished)) == (0, 10)
    data = load_self_generated(folder)
    expected = sample_rows(model, START, range(10), 8, seed=9)
    assert np.array_equal(np.stack([data[i] for i in range(10)]), expected.numpy())


def test_a_finished_dataset_is_left_as_it_is(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in sample(tmp_path).glob("[ms]*")}
    finished: list[int] = []
    sample(tmp_path, progress=finished.append)
    assert finished == [10], "told at once, when drawing begins"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("[ms]*")} == before


def test_a_killed_job_goes_on_and_ends_the_same(tmp_path, llama_folder):
    folder = tmp_path / "replay"
    model, tokenizer = load_model(str(llama_folder)), load_tokenizer(str(llama_folder))
    settings = {"num_rows": 40, "max_length": 8, "rows_per_shard": 4, "batch_size": 2}

    def slow_job() -> None:
        sample_replay(model, tokenizer, folder, progress=lambda rows: time.sleep(0.05), **settings)

    process = forked(tmp_path / "said.txt", slow_job)
    try:
        deadline = time.monotonic() + 60
        while not list(folder.glob("shard-*.parquet")):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ValueError, match="another process is writing"):  # the lock, held by that process
            sample(folder)
    finally:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (folder / ".shard-00009.parquet.x1y2z3.retain-part").write_bytes(b"half a shard")
    assert 0 < len(contents(folder)) < 10
    first = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}

    for target in (folder, tmp_path / "undisturbed"):
        sample_replay(model, tokenizer, target, **settings)
    assert contents(folder) == contents(tmp_path / "undisturbed")
    assert len(contents(folder)) == 10
    assert {path: path.stat().st_mtime_ns for path in first} == first  # nothing was drawn again
    assert not list(folder.glob(".*"))


def test_an_interrupted_job_goes_on_with_smaller_batches(tmp_path):
    """After running out of memory, say: rows do not depend on the rows beside them."""
    sample(tmp_path / "whole")
    sample(tmp_path / "broken")
    (tmp_path / "broken" / "shard-00001.parquet").unlink()
    sample(tmp_path / "broken", batch_size=1)
    whole, broken = (load_self_generated(tmp_path / name) for name in ("whole", "broken"))
    assert np.array_equal(whole.tokens, broken.tokens)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"num_rows": 12}, {"max_length": 9}, {"rows_per_shard": 5}, {"seed_of_model": 1}],
    ids=str,
)
def test_another_dataset_in_the_folder_is_refused_and_left_alone(tmp_path, change):
    before = contents(sample(tmp_path)), (tmp_path / MANIFEST).read_bytes()
    model = make_model(seed=change.pop("seed_of_model", 0))
    with pytest.raises(ValueError, match="output_dir: .* choose another folder, or delete it"):
        sample(tmp_path, model, **change)
    assert (contents(tmp_path), (tmp_path / MANIFEST).read_bytes()) == before


def test_only_versions_and_time_may_differ_when_a_job_goes_on(tmp_path):
    sample(tmp_path)
    manifest = read_manifest(tmp_path) | {"created": "long ago", "versions": {"torch": "0.1"}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    sample(tmp_path)
    assert read_manifest(tmp_path)["created"] == "long ago"


def test_a_folder_of_other_files_is_never_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "shard-00000.parquet").write_text("of something else")
    with pytest.raises(ValueError, match=r"output_dir: .* holds other files .* choose an empty folder"):
        sample(tmp_path)
    assert (tmp_path / "shard-00000.parquet").read_text() == "of something else"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.parquet", "thesis.tex"]


def test_rows_longer_than_the_model_can_take_are_refused(tmp_path):
    """Also where dynamic NTK would stretch them: it encodes every length otherwise, and no cache follows."""
    for model in (*map(make_model, ARCHITECTURES), make_changing("gemma2")):
        with pytest.raises(ValueError, match="max_length: 129 is more than this model's 128 positions; use at most"):
            sample(tmp_path / "new", model, max_length=129)
    assert not (tmp_path / "new").exists()


def test_the_start_token_may_be_named(tmp_path, tokenizer):
    sample(tmp_path, start_token=choose_start_token(tokenizer, "<|endoftext|>"))
    assert all(load_self_generated(tmp_path)[i][0] == 0 for i in range(10))


def test_a_bfloat16_model_says_so(tmp_path):
    model = load_model(str(save_model(tmp_path / "m")), dtype="bfloat16")
    sample(tmp_path / "replay", model, num_rows=2)
    manifest = read_manifest(tmp_path / "replay")
    assert manifest["sampler"]["dtype"] == "bfloat16"
    assert manifest["model"] == str(tmp_path / "m")
    assert os.listdir(tmp_path / "replay")


def test_dropout_is_off_whatever_mode_the_model_was_left_in(tmp_path):
    model = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = sample_rows(model, START, range(3), 12, seed=0)
    assert torch.equal(sample_rows(model.train(), START, range(3), 12, seed=0), expected)
    assert model.training


def test_an_adapters_rows_cannot_pass_for_its_bases(tmp_path):
    """The fingerprint leaves adapters out, so rows of a tuned model would be taken for the base's own."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="model: it has an adapter; sample from its base, or from what"):
        sample(tmp_path / "new", tuned)
    assert not (tmp_path / "new").exists()
    sample(tmp_path / "new", tuned.merge_and_unload())


# Beginnings


CHAT = make_tokenizer("<|im_start|>", CHATML)


def test_rows_with_beginnings_of_different_lengths_are_those_drawn_alone():
    """In lockstep a given token takes the place of a drawn one; nothing is padded and nothing else changes."""
    model = make_model()
    prefixes = [[3], [3, 9, 14, 200, 7], [5, 6], [3, 9, 14, 200, 7, 8, 30, 31, 32]]
    together = draw_rows(model, prefixes, range(4), 20, 3)
    for row, prefix in enumerate(prefixes):
        alone = draw_rows(model, [prefix], [row], 20, 3)
        assert together.tokens[row, : len(prefix)].tolist() == prefix
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()
        assert together.logprobs[row] == pytest.approx(alone.logprobs[0], rel=1e-5)
        assert together.entropies[row] == pytest.approx(alone.entropies[0], rel=1e-5)


def test_own_loss_is_the_entropy():
    """E[−log p(x)] over x ~ p is the entropy: a sampler that sharpens or truncates fails this."""
    drawn = draw_rows(make_model(scale=12.0), [[3]] * 1500, range(1500), 24, 0)
    gap = -drawn.logprobs - drawn.entropies
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5
    assert gap.std() > 1


def test_starts_keep_their_shares_in_every_stretch():
    starts = plan_starts("document=0.7,chat=0.3", CHAT, choose_start_token(CHAT))
    for first in (0, 1000, 123_456):
        names = [starts.of_row(row)[0].name for row in range(first, first + 100)]
        assert 68 <= names.count("document") <= 72
    assert starts.of_row(5) == starts.of_row(5)
    assert [mode["share"] for mode in starts.describe()] == [0.7, 0.3]


def test_a_chat_row_begins_inside_the_turn():
    ids, end = chat_prefix(CHAT, "user")
    assert CHAT.decode(ids) == "<|im_start|>user\n"
    assert CHAT.convert_ids_to_tokens(end) == "<|im_end|>"


SWITCHED = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if enable_thinking %}/think {% endif %}"
) + CHATML


def test_tools_are_offered_and_thinking_is_switched_on_before_the_users_turn():
    tokenizer = make_tokenizer(template=SWITCHED)
    starts = plan_starts("tools=0.5,think=0.5", tokenizer, choose_start_token(tokenizer))
    tools, think = starts.modes
    written = [tokenizer.decode(ids) for ids in tools.prefixes]
    assert len(set(written)) == len(TOOLS)
    for at, text in enumerate(written):
        offered, _, turn = text.partition("<|im_end|>\n")
        names = [tool["function"]["name"] for tool in json.loads(offered.removeprefix("<|im_start|>system\n"))]
        assert names == [TOOLS[at][0], TOOLS[(at + 1) % len(TOOLS)][0]]
        assert turn == "<|im_start|>user\n"
    assert [tokenizer.decode(ids) for ids in think.prefixes] == ["/think <|im_start|>user\n"]
    assert tools.end_of_turn == think.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_prompts_are_continued_behind_the_document_start(tmp_path):
    tokenizer = make_tokenizer()
    start = choose_start_token(tokenizer)
    starts = plan_starts("prompts", tokenizer, start, prompts=["the quick", "a lazy dog sings"])
    folder = sample_replay(make_model(), tokenizer, tmp_path, num_rows=6, max_length=24, starts=starts)
    dataset = load_self_generated(folder)
    for row in range(6):
        text = tokenizer.decode(dataset[row][1 : dataset.prefix_lengths[row]])
        assert text == ["the quick", "a lazy dog sings"][row % 2]
    assert (dataset.num_predictions == 24 - dataset.prefix_lengths).all()
    measured = load_texts(str(folder), tokenizer)  # as retention text: the prompts are not predicted there either
    assert [document.num_tokens for document in measured] == dataset.num_predictions.tolist()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "start: 'nonsense' does not fit"),
        ("document=0.5", "add up to 0.5"),
        ("document=0.5,chat=0.6", "add up to 1.1"),
        ("document=x,chat=0.5", "does not fit"),
        ("chat", "needs a chat template"),
        ("tools", "start: 'tools' .* needs a chat template, .*; use document or prompts"),
        ("think", "start: 'think' .* needs a chat template, .*; use document or prompts"),
        ("prompts", "prompts: missing"),
        ("document,document", "does not fit"),
    ],
)
def test_starts_that_do_not_fit_are_refused(spec, message):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=message):
        plan_starts(spec, tokenizer, choose_start_token(tokenizer))


@pytest.mark.parametrize(("name", "why"), [("tools", "no place for tools"), ("think", "no switch for thinking")])
def test_templates_without_tools_or_thinking_are_refused(name, why):
    with pytest.raises(ValueError, match=f"start: '{name}', but the chat template has {why}; use chat"):
        plan_starts(name, CHAT, choose_start_token(CHAT))


def test_turns_that_never_end_are_warned_of(tmp_path, monkeypatch):
    starts = plan_starts("document=0.5,chat=0.5", CHAT, choose_start_token(CHAT))
    sample_replay(make_model(), CHAT, tmp_path, starts=starts, num_rows=8, max_length=24)
    assert "end their turn" not in "".join(pool_lines(tmp_path, CHAT, starts, preview=0))
    monkeypatch.setattr("retain.sampling.quality.end_ids", lambda *given: [10_000])
    assert "warning: only 0 of 4 chat rows end their turn" in "".join(pool_lines(tmp_path, CHAT, starts, preview=0))


# Processes and memory


def test_the_batch_size_fits_the_memory(monkeypatch):
    model = make_model()
    assert choose_batch_size(model, 64) == 64
    per_row = 2 * 2 * 2 * 8 * 64 * 4 + 32 * 320
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=2 * 11 * per_row))
    assert choose_batch_size(model, 64) == 8
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=0))
    assert choose_batch_size(model, 64) == 1


@pytest.mark.parametrize("kind", OTHER_CACHES)
def test_the_batch_size_is_found_of_every_kind_of_model(kind):
    assert choose_batch_size(make_recurrent(kind), 64) == 64


def test_the_batch_size_leaves_room_for_a_recurrent_state(monkeypatch):
    """Mamba: two channels a hidden unit, each with its state in float32, at any length."""
    model = make_recurrent("mamba")
    per_row = 2 * (2 * 32) * 8 * 4 + 32 * 320
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=2 * 11 * per_row))
    assert choose_batch_size(model, 64) == choose_batch_size(model, 4096) == 8


def test_processes_share_the_shards_and_give_the_rows_of_one(tmp_path):
    whole = sample(tmp_path / "whole")
    shared = tmp_path / "shared"
    for index in (0, 1, 2):  # one after the other; the test of the command line runs two at once
        process = types.SimpleNamespace(
            process_index=index, num_processes=3, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
        sample(shared, state=process)
    assert contents(shared) == contents(whole)


def test_a_narrow_model_is_drawn_from_with_one_thread(monkeypatch):
    """Pitfall 33."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert choose_threads(make_model()) == 7
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_threads(make_model()) == 1
    wide = make_model()
    wide.config.hidden_size = 4096
    assert choose_threads(wide) == 7
