"""Captions to vocabulary indices, with no way for a caption to speak in control tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

import tokenizers
from etils import epath

from omni_jax.config import SpecialTokens
from omni_jax.config.components import CONTROL_TOKENS
from omni_jax.io.messages import MALFORMED, as_input_error
from omni_jax.types import ClipError, InputError

END = "<|im_end|>"
START = "<|im_start|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")


class Tokenizer:
    """The byte-pair tokenizer of a checkpoint.

    Attributes:
      im_end: index of `<|im_end|>`, which ends a prompt.
      im_start: index of `<|im_start|>`, which begins a turn of the chat template; None where the tokenizer has none.
      control: indices of the control tokens, by the field names of `config.SpecialTokens`.
      digest: of all files of its folder that may be read for it: equal for equal files; "" of one that was not read from a folder.
    """

    def __init__(self, plain: tokenizers.Tokenizer, added: Mapping[str, int], where: str = "the tokenizer", digest: str = ""):
        """Takes a tokenizer without added tokens and the added tokens apart. Raises InputError when a control token is missing."""
        missing = [name for name in (END, *CONTROL_TOKENS.values()) if name not in added]
        if missing:
            raise InputError(f"{where}: the tokenizer lacks {', '.join(missing)}; use the folder of a WAVE-7B checkpoint")
        self._plain = plain
        self._where = where
        self.digest = digest
        self.im_end = added[END]
        self.im_start = added.get(START)
        self.control = {field: added[name] for field, name in CONTROL_TOKENS.items()}

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str]) -> Tokenizer:
        """Reads the tokenizer files of a checkpoint folder; nothing is fetched and no code of the folder is run.

        Raises:
          InputError: when the folder has no tokenizer, or one that cannot be read or lacks a control token.
        """
        folder = epath.Path(directory)
        if not folder.is_dir():
            raise InputError(f"{folder}: not a folder; give the folder of a checkpoint")
        file = folder / "tokenizer.json"
        files = _read_files(folder)
        if file.name in files:
            with as_input_error(f"{file}: cannot be read", "copy it again from the checkpoint", UnicodeDecodeError):
                text = files[file.name].decode("utf-8-sig")
        elif {"vocab.json", "merges.txt"} <= files.keys():
            text = _from_slow_files(folder)
        else:
            raise InputError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt; copy them from the checkpoint")
        # The library raises bare Exception.
        with as_input_error(f"{file}: cannot be read as a tokenizer", "copy it again from the checkpoint", Exception):
            record = json.loads(text)
            added = {token["content"]: int(token["id"]) for token in record["added_tokens"]}
            # Without its added tokens the tokenizer reads their strings as ordinary text, those marked special=false too.
            plain = tokenizers.Tokenizer.from_str(json.dumps({**record, "added_tokens": [], "truncation": None, "padding": None}))
        return cls(plain, {**_added_tokens(folder, files), **added}, str(folder), _digest(files))

    def check(self, tokens: SpecialTokens) -> None:
        """Holds the control tokens against those of a model, padding aside: any index may fill places that are not read.

        Raises:
          InputError: naming the first that differs.
        """
        for field, name in CONTROL_TOKENS.items():
            here, there = self.control[field], getattr(tokens, field)
            if field != "pad" and here != there:
                raise InputError(
                    f"{self._where}: {name} is {here} in the tokenizer, but the model's config has {there} for {field}; "
                    f"use the tokenizer files of the same checkpoint"
                )

    def encode_text(self, text: str) -> list[int]:
        """Returns the vocabulary indices of a text; the strings of control tokens in it are ordinary text.

        Raises:
          ClipError: for text that is not valid Unicode (lone surrogates, as undecodable bytes leave behind).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise ClipError(f"the caption is not valid Unicode at character {e.start}; save the file as UTF-8") from None
        return list(self._plain.encode(text, add_special_tokens=False).ids)


def _read_files(folder: epath.Path) -> dict[str, bytes]:
    found = {}
    for file in (folder / name for name in FILES):
        with as_input_error(f"{file}: cannot be read", "copy it again from the checkpoint"):
            if file.is_file():
                found[file.name] = file.read_bytes()
    return found


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in FILES:
        content = files.get(name, b"")
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _added_tokens(folder: epath.Path, files: Mapping[str, bytes]) -> dict[str, int]:
    """Control tokens that older checkpoints list beside the tokenizer."""
    found: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if name not in files:
            continue
        with as_input_error(f"{folder / name}: cannot be read", "copy it again from the checkpoint", *MALFORMED):
            record: dict[str, Any] = json.loads(files[name].decode("utf-8-sig"))
            if name == "added_tokens.json":
                found.update({content: int(index) for content, index in record.items()})
            else:
                found.update({token["content"]: int(index) for index, token in record.get("added_tokens_decoder", {}).items()})
    return found


def _from_slow_files(folder: epath.Path) -> str:
    """Returns what tokenizer.json would hold, built from vocab.json and merges.txt."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises PyTorch, which is not needed
    from transformers import Qwen2Tokenizer  # slow to import; only checkpoints without tokenizer.json need it

    # The library raises whatever its parsers do.
    with as_input_error(f"{folder}: vocab.json and merges.txt cannot be read", "copy them again from the checkpoint", Exception):
        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).backend_tokenizer.to_str()
