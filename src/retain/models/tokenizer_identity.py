"""Whether a tuned model reads text as its base does, and if not, in what it differs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from retain.models.description import tokenizer_fingerprint
from retain.models.loading import TOKENIZER_FILES, find_file, is_dequantised, load_tokenizer, resolve_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of_tuned(
    name: str, base_tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tuned model's own tokenizer, whose chat template may be another, or the base's where it brings none.

    Raises:
        ValueError: if the two cut text into different tokens, so that divergences mean nothing.
    """
    path = resolve_model_path(name)
    if not any(find_file(path, file) for file in TOKENIZER_FILES):
        return base_tokenizer
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(base_tokenizer):
        return tokenizer
    own, base = tokenizer.get_vocab(), base_tokenizer.get_vocab()
    if is_dequantised(path) and all(own.get(token, at) == at for token, at in base.items()):
        # A GGUF file pads its vocabulary, and lacks the rules by which text is cut before BPE.
        template, tokenizer = tokenizer.chat_template, copy.deepcopy(base_tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        return tokenizer
    raise ValueError(f"model: the tokenizer in {name!r} {_vocabulary_difference(own, base)}")


def _vocabulary_difference(own: dict[str, int], base: dict[str, int]) -> str:
    """In what a vocabulary is not the base's, and what to do."""
    moved = sorted(token for token in own.keys() & base.keys() if own[token] != base[token])
    if moved:
        token = moved[0]
        what = f"numbers {len(moved)} tokens otherwise ({token!r} is {own[token]}, in the base {base[token]})"
    elif own.keys() - base.keys():
        added = sorted(own.keys() - base.keys(), key=own.__getitem__)
        names = ", ".join(map(repr, added[:3])) + (", …" if len(added) > 3 else "")
        more = f"{len(added)} tokens" if len(added) > 1 else "1 token"
        return (
            f"has {more} more than the base's: {names}; give --base a copy of the base with the same tokens"
            " (add_tokens, resize_token_embeddings, save_pretrained)"
        )
    elif lacking := sorted(base.keys() - own.keys()):
        more = f"{len(lacking)} tokens" if len(lacking) > 1 else "1 token"
        what = f"lacks {more} of the base's ({lacking[0]!r})"
    else:
        what = "has the base's tokens and cuts text into others"
    return f"{what}: it was trained on another base; measure it against that one"
