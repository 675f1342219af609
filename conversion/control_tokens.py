"""Whether a checkpoint's `config.json` and its tokenizer mean the same control tokens.

A wrong id would go unnoticed: the prompt would hold a token that the towers' outputs are never put in place of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etils import epath

from omni_jax.config import ModelConfig
from omni_jax.config.components import CONTROL_TOKENS
from omni_jax.config.hf_fields import TOKEN_NAMES
from omni_jax.conversion.source import Checkpoint, read_json
from omni_jax.types import InputError

_FILES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json", "vocab.json")


def check(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Compares the seven control-token ids of `config.json` with every tokenizer file of the folder that names them.

    Raises:
      InputError: no tokenizer files, an id outside the vocabulary, a token no file names, or two different ids for one token.
    """
    folder = checkpoint.folder
    known = {file: dict(_ids(folder / file)) for file in _FILES if (folder / file).exists()}
    if not ("tokenizer.json" in known or "vocab.json" in known):
        raise InputError(f"{folder}: has no tokenizer (tokenizer.json, or vocab.json with merges.txt); copy them from the checkpoint")
    size = model.decoder.vocab_size
    for name, field in TOKEN_NAMES.items():
        # The padding token is the one that the tokenizer's own files name.
        token = CONTROL_TOKENS[name] if name != "pad" else _pad_token(folder)
        ours = getattr(model.tokens, name)
        where = f"{folder / 'config.json'}: {field} {ours!r}"
        if type(ours) is not int or not 0 <= ours < size:
            raise InputError(f"{where} is not a token id below text_config.vocab_size ({size}); use the config.json of this checkpoint")
        theirs = {file: ids[token] for file, ids in known.items() if token in ids}
        if not theirs:
            raise InputError(f"{where}: its token {token} is in none of {', '.join(known)}; use the tokenizer of this checkpoint")
        for file, other in theirs.items():
            if other != ours:
                raise InputError(f"{where}, but {token} is {other!r} in {folder / file}; use files of one checkpoint")


def _ids(path: epath.Path) -> Iterator[tuple[str, Any]]:
    """Yields (token, id) of every token a tokenizer file gives an id."""
    content = read_json(path)
    try:
        if path.name == "tokenizer.json":
            vocabulary = (content.get("model") or {}).get("vocab") or {}
            yield from vocabulary.items() if isinstance(vocabulary, dict) else ()
            yield from ((token["content"], token["id"]) for token in content.get("added_tokens") or ())
        elif path.name == "tokenizer_config.json":
            yield from ((token["content"], int(number)) for number, token in (content.get("added_tokens_decoder") or {}).items())
        else:
            yield from content.items()
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{path}: not a tokenizer file ({type(e).__name__}: {e}); copy it from the published checkpoint") from None


def _pad_token(folder: epath.Path) -> str:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(folder / file).get("pad_token") if (folder / file).exists() else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return CONTROL_TOKENS["pad"]
