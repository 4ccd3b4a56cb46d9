"""Tiny random models of several architectures and a small tokenizer, made on the spot: no network, no files kept."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.update(
    RETAIN_CACHE=tempfile.mkdtemp(prefix="retain-tests-"),
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
if "RETAIN_TEST_DEVICE" not in os.environ:  # the same tests with a GPU as without
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background, and so in every program of a test
    signal.signal(signal.SIGINT, signal.default_int_handler)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what libraries warn of while they are imported is theirs
    import torch
    import trl  # noqa: F401

import pytest
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["RETAIN_CACHE"], ignore_errors=True)

WORDS = "the quick brown fox jumps over a lazy dog while seven bright birds sing of rain and stone in old towns"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_finish() -> None:
    """Trainers collect garbage as they begin: without what imports left, that takes no half second each time."""
    gc.freeze()


def forked(said: Path, work: Callable[..., object], *arguments: object, **environment: str) -> BaseProcess:
    """A process that does this work: a copy of this one, which imports nothing anew. What it prints is in `said`."""

    def run() -> None:
        warnings.simplefilter("ignore")
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(environment)
        with open(said, "w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                work(*arguments)
            except Exception:
                traceback.print_exc()
                raise SystemExit(1) from None

    process = get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def places(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each process; nothing where there is one."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [world | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]


def make_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Sentences of random words, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    pool = WORDS.split()
    return [
        " ".join(pool[i] for i in torch.randint(0, len(pool), (words,), generator=generator).tolist())
        for _ in range(count)
    ]


def make_tokenizer(bos: str | None = "<s>", template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens; `<|endoftext|>` separates documents."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(make_texts(50), trainer)
    special_tokens = {"bos_token": bos, "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special_tokens)


def sample_rows(model: Any, start_id: int, rows: Sequence[int], max_length: int, seed: int) -> torch.Tensor:
    """The rows with these numbers, shape (rows, max_length), drawn from the document start on."""
    from retain.sampling.engine import draw_rows

    drawn = draw_rows(model, [[start_id]] * len(rows), rows, max_length, seed)
    return torch.from_numpy(drawn.tokens.astype("int64"))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128},
    "qwen3": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 128},
    "gemma3_text": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
        "max_position_embeddings": 128,
    },
}


def make_model(architecture: str = "llama", seed: int = 0, scale: float = 6.0, **changes: Any) -> PreTrainedModel:
    """A random model whose predictions are far from uniform: matrices are scaled up after initialisation."""
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 3, 2, 4
    return random_model(config, seed, scale)


def random_model(config: Any, seed: int, scale: float) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def unrendered_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures of a page are made; matplotlib renders them, a third of a short run, where these names say so alone."""
    with pytest.MonkeyPatch.context() as patch:
        if not {"report", "test_demo.py", "test_examples.py"} & {*request.path.parts}:
            patch.setattr("retain.report.style.to_svg", lambda figure, description: "<svg></svg>")
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def moved_model() -> PreTrainedModel:
    """The tiny Llama a little way off, as after finetuning."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter += 0.3 * parameter.std() * noise
    return model


def save_model(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model and the tokenizer as an ordinary folder."""
    make_model(architecture, seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()
