"""What `retain pretrain` takes beside the flags of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field

from retain.checks import check_name, check_number, check_types, described


@dataclass(kw_only=True)
class PretrainConfig:
    """A small model from nothing, on a text, a synthetic language or a digit task."""

    corpus: str | None = field(
        default=None,
        metadata=described(
            "english, spanish, code (real text from packages), a file of rows, a Hub dataset (OWNER/NAME), or a mix of "
            "these with shares: english=0.7,spanish=0.3. Problems of the package reasoning-gym count as text: "
            "reasoning-gym:gsm_symbolic. Or synthetic, a language of known entropy. Or a digit task: add, reversal, "
            "sort, modadd."
        ),
    )
    data_dir: str | None = field(
        default=None, metadata=described("Folder of the packages with texts. Default: texts/ in retain's cache.")
    )
    model_size: str = field(
        default="430k",
        metadata=described("30k, 134k, 430k, 2M, 5.8M, 12M, 21M, 32M, 46M, 100M, 200M, or a number of parameters."),
    )
    vocab_size: int | None = field(
        default=None, metadata=described("Tokens. Default: 1024 for text, 64 for a synthetic language; digits have 19.")
    )
    tokenizer_corpus: str | None = field(
        default=None,
        metadata=described("Texts that the tokenizer is made for, separated by commas. Default: those of the corpus."),
    )
    max_length: int = field(
        default=128, metadata=described("Tokens per row; digit tasks have rows of their own length.")
    )
    max_tokens: float | None = field(
        default=None, metadata=described("Train on so many tokens, rounded up to whole steps.")
    )
    tokens_per_param: float | None = field(
        default=None, metadata=described("Train on so many tokens per parameter, counted as 12 L D^2 + D V.")
    )
    stop_at_loss: float | None = field(
        default=None,
        metadata=described(
            "End at the first evaluation with a loss this low, in nats per token; the length is the most."
        ),
    )
    adam_beta2_half_life_tokens: float | None = field(
        default=None,
        metadata=described("Tokens after which Adam's second moment halves, in the place of adam_beta2; e.g. 10e6."),
    )
    eval_rows: int = field(default=256, metadata=described("Held-out rows of each evaluation."))
    num_states: int = field(
        default=256, metadata=described("With corpus synthetic: hidden states, what is to be learned.")
    )
    branching: int = field(default=4, metadata=described("With corpus synthetic: tokens that may follow in a state."))
    language_seed: int = field(default=0, metadata=described("With corpus synthetic: which language."))
    digits: int = field(default=3, metadata=described("With a digit task: digits of a number."))

    def __post_init__(self) -> None:
        self.model_size = str(self.model_size)  # YAML brings numbers
        check_types(self)
        check_name("corpus", self.corpus)
        check_number("max_length", self.max_length, low=8, integer=True)
        check_number("eval_rows", self.eval_rows, low=1, integer=True)
        check_number("digits", self.digits, low=1, integer=True)
        check_number("language_seed", self.language_seed, low=0, integer=True)
        if self.vocab_size is not None:
            check_number("vocab_size", self.vocab_size, low=4, integer=True)
        for name in ("max_tokens", "tokens_per_param", "stop_at_loss", "adam_beta2_half_life_tokens"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=1e-6)
        if self.max_tokens is not None and self.tokens_per_param is not None:
            raise ValueError(f"max_tokens: {self.max_tokens:g} and tokens_per_param exclude each other; leave one out")
