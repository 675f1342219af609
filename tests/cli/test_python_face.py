"""`OmniRetriever` from Python: what it refuses, and what it tells besides the vectors. All read the golden checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omni_jax
from omni_jax.retrieval.embedding_pass import assemble
from omni_jax.tokens.tokenizer import CONTROL_TOKENS
from omni_jax.types import InputError, Record
from tests.golden_set import GoldenSet
from tests.media_samples import write_clip


@pytest.fixture(scope="module")
def model(golden: GoldenSet, converted: Path) -> omni_jax.OmniRetriever:
    return omni_jax.OmniRetriever.from_pretrained(converted, preset=golden.preset)


@pytest.fixture
def changed(converted: Path, tmp_path: Path) -> Callable[[str, str, int], Path]:
    """Returns the converted folder with one number of its model's configuration replaced."""

    def make(part: str, field: str, value: int) -> Path:
        folder = shutil.copytree(converted, tmp_path / "changed")
        record = json.loads((folder / "omni_jax.json").read_text())
        assert field in record["model"][part]
        record["model"][part][field] = value
        (folder / "omni_jax.json").write_text(json.dumps(record))
        return folder

    return make


@pytest.mark.jit
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"texts": b"abc"}, "item 0: its text is of type bytes; give a string"),
        ({"texts": {"a": "b"}}, "item 0: its text is of type dict; give a string"),
        ({"texts": 3}, "item 0: its text is of type int; give a string"),
        ({"texts": ["a", 3]}, "item 1: its text is of type int; give a string"),
        ({"texts": [None]}, "item 0: is empty"),
        ({"texts": [Path("a")]}, "item 0: its text is of type "),
        ({"texts": ["a", " \n"]}, "item 1: its text is empty"),
        ({"videos": [b"a.mp4"]}, "item 0: its video: not a media file"),
        ({"videos": [""]}, "item 0: its video is empty"),
        ({"audios": [3]}, "item 0: its audio is a int"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size is 0"),
        ({"texts": [], "batch_size": -1}, "batch_size is -1"),
        ({"texts": ["a"], "batch_size": 2.0}, "batch_size is 2.0"),
        ({"texts": ["a"], "batch_size": True}, "batch_size is True"),
    ],
)
def test_golden_what_cannot_be_encoded_is_one_line(model: omni_jax.OmniRetriever, arguments: dict[str, Any], words: str):
    with pytest.raises(InputError) as error:
        model.encode(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.jit
def test_golden_mended_and_cut_items_are_told_once(model: omni_jax.OmniRetriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mute = write_clip(tmp_path / "mute.mp4", 1.0, audio=False)
    whole = write_clip(tmp_path / "whole.mp4", 1.0)
    monkeypatch.setattr(model, "preset", dataclasses.replace(model.preset, max_text_tokens=3))
    with pytest.warns(UserWarning) as told:
        model.encode(texts=["x", "a red ball " * 20, "y"], audios=[whole, mute, mute], batch_size=2, workers=0)
    (one,) = told
    assert Path(one.filename) == Path(__file__)
    line = str(one.message)
    assert line.startswith(f"encode: 2 of 3 items were repaired, the first: item 1: {mute}: no audio track; silence is used instead")
    assert line.endswith("; 1 of 3 captions were cut to max_text_tokens=3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(texts=["x"])


@pytest.mark.jit
def test_golden_embed_names_records_and_lines(model: omni_jax.OmniRetriever):
    records = [Record("bare", text="x", line=7), Record("made"), Record("odd", text="\udce9", line=9)]
    outcome = assemble(records, list(model.embed(records, ["text"])))
    reasons = [reason for _, reason in outcome.problems]
    assert [name for name, _ in outcome.problems] == ["made", "odd"]
    assert reasons[0].startswith("record 'made': has no text, which the requested tables need; ")
    assert reasons[1].startswith("record 'odd' (line 9 of the manifest): the caption is not valid Unicode")
    with pytest.raises(InputError, match="batch_size is 0"):
        list(model.embed(records, ["text"], batch_size=0))


@pytest.mark.parametrize("field", [field for field in CONTROL_TOKENS if field != "pad"])
def test_golden_tokenizer_of_another_model_is_refused(changed: Callable[[str, str, int], Path], model: omni_jax.OmniRetriever, field: str):
    here = getattr(model.config.tokens, field)
    folder = changed("tokens", field, here + 1)
    with pytest.raises(InputError) as error:
        omni_jax.OmniRetriever.from_pretrained(folder)
    for word in (str(folder), field, CONTROL_TOKENS[field], str(here), str(here + 1)):
        assert word in str(error.value)


@pytest.mark.costly
def test_golden_any_padding_index_will_do(changed: Callable[[str, str, int], Path], model: omni_jax.OmniRetriever):
    omni_jax.OmniRetriever.from_pretrained(changed("tokens", "pad", model.config.tokens.pad + 1))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision", "patch_size", 16),
        ("vision", "merge_size", 4),
        ("vision", "temporal_patch_size", 1),
        ("vision", "in_channels", 4),
        ("beats", "patch_size", 8),
        ("beats", "num_mel_bins", 64),
        ("audio", "num_mel_bins", 80),
    ],
)
def test_golden_other_patches_are_refused(changed: Callable[[str, str, int], Path], part: str, field: str, value: int):
    with pytest.raises(InputError, match=rf"{part}\.{field} is {value}, must be .* fixed at 14/2/2/16") as error:
        omni_jax.OmniRetriever.from_pretrained(changed(part, field, value))
    assert "\n" not in str(error.value)
