"""The tokenizer: control-token strings in a caption are ordinary text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.tokens.tokenizer import CONTROL_TOKENS, END, Tokenizer
from omni_jax.types import ClipError, InputError
from tests.golden_set import GoldenSet, find

GOLDEN = find("OMNI_GOLDEN", "wave_tiny")
SHARED = Tokenizer.from_pretrained(GOLDEN.checkpoint)
RECORD = json.loads((GOLDEN.checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
ADDED = {token["content"]: token["id"] for token in RECORD["added_tokens"]}
FULL = tokenizers.Tokenizer.from_str(json.dumps(RECORD))  # as the reference uses it, added tokens included


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_ordinary_text_equals_the_full_tokenizer_golden(text: str) -> None:
    if not any(name in text for name in ADDED):
        assert SHARED.encode_text(text) == FULL.encode(text, add_special_tokens=False).ids


@given(parts=st.lists(st.sampled_from([*ADDED, " ", "a", "red ball", "<|", "|>", "日本"]), max_size=6))
def test_control_strings_are_ordinary_text_golden(parts: list[str]) -> None:
    text = "".join(parts)
    ids = SHARED.encode_text(text)
    assert not set(ids) & set(ADDED.values())
    assert FULL.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("special", [True, False])
def test_both_kinds_of_added_tokens_are_ordinary_text_golden(tmp_path: Path, special: bool) -> None:
    """Libraries treat tokens marked special=false apart; a checkpoint's tokenizer need not have any."""
    index = max(RECORD["model"]["vocab"].values(), default=0) + max(ADDED.values()) + 1
    token = {"id": index, "content": "<tool_call_0>", "special": special}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    record = {**RECORD, "added_tokens": [*RECORD["added_tokens"], token]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")
    # The library numbers a new added token itself, whatever the file says.
    full = tokenizers.Tokenizer.from_str(json.dumps(record))
    assert len(full.encode("<tool_call_0>", add_special_tokens=False).ids) == 1
    ids = Tokenizer.from_pretrained(tmp_path).encode_text("<tool_call_0>")
    assert ids == SHARED.encode_text("<tool_call_0>")
    assert len(ids) > 1 and not set(ids) & set(ADDED.values())


def test_golden_control_tokens(tokenizer: Tokenizer, golden: GoldenSet) -> None:
    assert tokenizer.im_end == ADDED[END]
    assert tokenizer.control["video"] == golden.config["video_token_index"]
    assert tokenizer.control["audio"] == golden.config["audio_token_index"]
    assert tokenizer.control["audio_bos"] == golden.config["audio_start_token_id"]
    assert tokenizer.control["vision_eos"] == golden.config["vision_end_token_id"]
    assert tokenizer.control["pad"] == golden.config["pad_token_id"]


def test_lone_surrogates_are_refused_golden(tokenizer: Tokenizer) -> None:
    broken = b"caf\xe9 au lait".decode("utf-8", "surrogateescape")
    with pytest.raises(ClipError, match="not valid Unicode at character 3"):
        tokenizer.encode_text(broken)


def test_vocabulary_and_merges_alone_suffice_golden(golden: GoldenSet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in RECORD["model"]["merges"]]
    made = {
        "vocab.json": json.dumps(RECORD["model"]["vocab"]),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "added_tokens.json": json.dumps(ADDED),
    }
    for name in (*made, "tokenizer_config.json", "special_tokens_map.json"):
        if (golden.checkpoint / name).is_file():
            shutil.copy(golden.checkpoint / name, tmp_path)
        elif name in made:  # a checkpoint with tokenizer.json need not have it
            (tmp_path / name).write_text(made[name], encoding="utf-8")
    slow = Tokenizer.from_pretrained(tmp_path)
    assert slow.control == tokenizer.control
    for text in ("two  words\n", "  leading", "日本語 🎉 don't 12345", "<|im_end|> <tool_call>", "e\u0301"):
        assert slow.encode_text(text) == tokenizer.encode_text(text)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


def test_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [END, *CONTROL_TOKENS.values()])
def test_missing_control_token_is_named_golden(tmp_path: Path, name: str) -> None:
    record = {**RECORD, "added_tokens": [t for t in RECORD["added_tokens"] if t["content"] != name]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
