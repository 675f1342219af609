"""Tokenizer files of Qwen2's kind with the control tokens, trained on captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from omni_jax.config.components import CONTROL_TOKENS

END = "<|im_end|>"
FILLER = "Please describe the video."  # used in prompts of one medium; part of what a vocabulary is trained on

# Qwen2's split of a text into words: contractions, letters, single digits, punctuation, line ends, spaces.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MULTIPLE = 16  # the vocabulary's size, so that a mesh divides it


def train_tokenizer(captions: Iterable[str], out: epath.Path, vocabulary: int = 1024) -> tuple[dict[str, int], int]:
    """Writes the tokenizer files and returns the ids of the added tokens and the size of the vocabulary, rounded up.

    Args:
      captions: texts; each word found in two of them becomes one token, as far as the vocabulary reaches.
      out: folder.
      vocabulary: most tokens before the added ones.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    bpe.train_from_iterator([*captions, FILLER, FILLER], trainer)
    added = [END, CONTROL_TOKENS["pad"], "<|im_start|>", *(token for field, token in CONTROL_TOKENS.items() if field != "pad")]
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in added])
    record: dict[str, Any] = json.loads(bpe.to_str())
    ids = {token["content"]: token["id"] for token in record["added_tokens"]}
    size = bpe.get_vocab_size(with_added_tokens=True)
    files = {
        "tokenizer.json": record,
        "vocab.json": record["model"]["vocab"],
        "added_tokens.json": ids,
        "special_tokens_map.json": {"eos_token": END, "pad_token": CONTROL_TOKENS["pad"], "unk_token": CONTROL_TOKENS["pad"]},
        "tokenizer_config.json": {
            "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in record["added_tokens"]},
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": CONTROL_TOKENS["pad"],
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": CONTROL_TOKENS["pad"],
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in record["model"]["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return ids, -(-size // _MULTIPLE) * _MULTIPLE
