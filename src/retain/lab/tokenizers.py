"""Tokenizers made on the spot: byte-level BPE trained on texts, and one word per token of a synthetic language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

START = "<|endoftext|>"  # id 0; begins a document
MIN_VOCAB_SIZE = 257  # the bytes and the document start
CHUNK_CHARS = 2000  # per training string
TRAINING_CHARS = 4_000_000  # of texts to train on, about


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, which can write any text, on every n-th text, for about `TRAINING_CHARS` characters.

    Raises:
        ValueError: if the vocabulary has no room for all bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size: {vocab_size} has no room for all bytes; use {MIN_VOCAB_SIZE} or more")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    every = max(1, -(-sum(map(len, texts)) // TRAINING_CHARS))
    raw.train_from_iterator(_chunks(texts[::every]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=START, eos_token=START, pad_token=START)


def _chunks(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield from (text[at : at + CHUNK_CHARS] for at in range(0, len(text), CHUNK_CHARS))


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words `w1`, `w2`, … for a synthetic language; id 0 is the document start.

    >>> word_tokenizer(64)("w3 w1")["input_ids"]
    [3, 1]
    """
    words = [START, *(f"w{at}" for at in range(1, vocab_size))]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=START))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=START, eos_token=START, pad_token=START, unk_token=START
    )
