"""`OmniRetriever.encode` on the golden checkpoint: mixtures, order, errors, precisions, prompts, progress."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import omni_jax
from omni_jax.api import encoding
from omni_jax.cli.main import main
from omni_jax.types import ArgumentError, InputError
from tests.golden_set import GoldenSet
from tests.media_samples import picture, write_clip, write_sound
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def model(golden: GoldenSet, converted: Path) -> omni_jax.OmniRetriever:
    return omni_jax.OmniRetriever.from_pretrained(converted, preset=golden.preset)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 1.0, width=96, height=64)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("media") / "sound.wav", 1.0)


def pictures(clip: Path) -> np.ndarray:
    with av.open(str(clip)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.jit
def test_golden_one_clip_in_every_form_has_one_embedding(model: omni_jax.OmniRetriever, clip: Path, sound: Path):
    with av.open(str(clip)) as container:
        fps = float(container.streams.video[0].average_rate)
    frames = pictures(clip)
    video = model.encode({"video": clip}, workers=0)
    forms = ({"video": clip.read_bytes()}, {"video": io.BytesIO(clip.read_bytes())}, {"array": frames, "fps": fps})
    for form in (*forms, {"array": [Image.fromarray(frame) for frame in frames], "fps": fps}):
        np.testing.assert_array_equal(model.encode(form, workers=0), video)
    with av.open(str(sound)) as container:
        wave = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    both = model.encode({"video": clip, "audio": clip}, workers=0)
    for form in (clip, clip.read_bytes(), io.BytesIO(clip.read_bytes())):
        np.testing.assert_array_equal(model.encode(form, workers=0), both)
    audio = model.encode(sound, workers=0)
    for form in ((wave, 16_000), {"array": wave, "sampling_rate": 16_000}, sound.read_bytes()):
        assert_close(model.encode(form, workers=0), audio, "invariance")


@pytest.mark.jit
def test_golden_a_mixed_list_keeps_its_order(model: omni_jax.OmniRetriever, clip: Path, sound: Path):
    items: list[Any] = [
        "a red ball",
        {"text": "a red ball", "video": clip, "audio": clip},
        Image.fromarray(picture(3, 96, 64)),
        sound,
        {"video": clip, "audio": sound},
        {"video": clip},
        "a red ball",
        {"text": "a tone", "audio": sound},
    ]
    together = model.encode(items, batch_size=3)
    assert together.shape == (len(items), model.dim)
    assert together.dtype == np.float32
    alone = np.stack([model.encode(item, workers=0) for item in items])
    assert_close(together, alone, "invariance")
    np.testing.assert_array_equal(together[0], together[6])
    assert len({row.tobytes() for row in together}) == len(items) - 1
    by_modality = model.encode(texts=["a red ball", None], videos=[clip, clip], audios=[clip, sound], workers=0)
    assert_close(by_modality, together[[1, 4]], "invariance")
    streamed = model.encode((item for item in items), batch_size=3, workers=0)
    assert_close(streamed, together, "invariance")


@pytest.mark.jit
def test_golden_an_interval_is_cut_from_all_media(model: omni_jax.OmniRetriever, clip: Path, sound: Path):
    pair = {"video": clip, "audio": sound}
    cut = model.encode(pair | {"timestamps": (0.2, 0.8)}, workers=0)
    np.testing.assert_array_equal(model.encode(pair, timestamps=(0.2, 0.8), workers=0), cut)
    both = model.encode([pair, pair], timestamps=[(0.2, 0.8), None], workers=0)
    assert_close(both, np.stack([cut, model.encode(pair, workers=0)]), "invariance")
    assert_close(model.encode([pair, pair | {"text": "x"}], timestamps=(0.2, 0.8), workers=0)[0], cut, "invariance")


@pytest.mark.parametrize("times", [[(0, 1), (1, 2), (2, 3)], ["0:00-0:01", "0:01-0:02", None], ["0:01", "0:02", "0:03"]])
def test_times_from_an_iterator_are_one_of_each_item(times: list[Any]):
    rows, count, _ = encoding._given(None, {"video": ["a", "b", "c"]}, iter(times))
    assert [row["timestamps"] for row in rows] == times and count == 3
    rows, _, _ = encoding._given(None, {"video": ["a", "b"]}, (time for time in ("0:01", "0:02")))
    assert [row["timestamps"] for row in rows] == ["0:01", "0:02"]


@pytest.mark.jit
def test_golden_one_bad_item_costs_no_other(model: omni_jax.OmniRetriever, clip: Path):
    items = ["a", Path("gone.mp4"), {"txt": "b"}, "c", b"junk", ""]
    good = model.encode(["a", "c"])
    with pytest.warns(
        UserWarning, match=r"4 of 6 items cannot be embedded and are left out: item 1: .*gone\.mp4: .*; item 2: .*keys"
    ) as told:
        assert_close(model.encode(items, on_error="skip"), good, "invariance")
    assert Path(told[0].filename) == Path(__file__)
    with pytest.warns(UserWarning, match="are NaN"):
        rows = model.encode(items, on_error="nan")
    assert_close(rows[[0, 3]], good, "invariance")
    assert np.isnan(rows[[1, 2, 4, 5]]).all()
    with pytest.warns(UserWarning, match="are NaN"):
        assert np.isnan(model.encode(Path("gone.mp4"), on_error="nan")).all()
    with pytest.raises(ArgumentError, match=r"2 of the first 4 items cannot be embedded: item 1: is empty; .*; item 3: is empty; "):
        model.encode(["a", {}, "c", None])
    with pytest.raises(ArgumentError, match=r"item 1: .*gone\.mp4: file not found") as error:
        model.encode(items)
    assert isinstance(error.value, InputError)
    assert isinstance(error.value, ValueError)


@pytest.mark.jit
def test_golden_errors_stop_an_endless_iterator(model: omni_jax.OmniRetriever):
    def endless() -> Iterator[str]:
        yield ""
        for number in itertools.count():
            yield f"a {number}"

    with pytest.raises(ArgumentError, match="item 0: its text is empty"):
        model.encode(endless(), batch_size=2)


@pytest.mark.jit
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give inputs, or at least one of texts"),
        ({"inputs": "a", "texts": "b"}, "give the items once"),
        ({"texts": "a", "videos": ["a.mp4"]}, "texts is one item, videos a list"),
        ({"texts": ["a"], "videos": []}, "same length; got texts 1, videos 0"),
        ({"texts": iter("ab"), "audios": iter("a")}, "do not give the same number of items"),
        ({"inputs": ["a", "b"], "timestamps": [None]}, "same length"),
        ({"inputs": "a", "batch_size": 0}, "batch_size is 0"),
        ({"inputs": [], "batch_size": True}, "batch_size is True"),
        ({"inputs": "a", "precision": "uint8"}, "precision is 'uint8'; choose one of float32, float16, int8, binary"),
        ({"inputs": "a", "on_error": "ignore"}, "on_error is 'ignore'; choose one of raise, skip, nan"),
        ({"inputs": "a", "on_error": "nan", "precision": "int8"}, "int8 has no NaN"),
        ({"inputs": "a", "truncate_dim": 0}, "truncate_dim is 0"),
        ({"inputs": "a", "truncate_dim": 1 << 20}, "truncate_dim is 1048576; it must be a whole number from 1 to"),
        ({"inputs": "a", "workers": -1}, "workers is -1"),
        ({"inputs": "a", "prompt_name": "query"}, "prompt_name 'query': this backbone takes none"),
        ({"inputs": "a", "prefix": "query"}, "this backbone takes none"),
    ],
)
def test_golden_wrong_arguments_are_one_line(model: omni_jax.OmniRetriever, arguments: dict[str, Any], words: str):
    with pytest.raises(ArgumentError) as error:
        model.encode(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.jit
def test_golden_precisions_and_widths(model: omni_jax.OmniRetriever):
    texts = ["a red ball", "a whistle over a gradient sky", "x"]
    whole = model.encode(texts)
    assert model.encode([]).shape == (0, model.dim)
    half = model.encode(texts, precision="float16")
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    bytes_ = model.encode(texts, precision="int8")
    assert bytes_.dtype == np.int8
    assert (np.abs(bytes_).max(axis=1) == 127).all()
    assert_close(model.similarity(bytes_, whole).diagonal(), np.ones(3, np.float32), "int8_cosine")
    bits = model.encode(texts, precision="binary")
    np.testing.assert_array_equal(np.unpackbits((bits.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, : model.dim], whole > 0)
    narrow = model.encode(texts, truncate_dim=8)
    assert_close(narrow, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), "invariance")
    raw = model.encode(texts, truncate_dim=8, normalize=False)
    np.testing.assert_array_equal(raw, model.encode(texts, normalize=False)[:, :8])


@pytest.mark.jit
def test_golden_similarity_is_the_cosine(model: omni_jax.OmniRetriever):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    expected = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    assert_close(model.similarity(a, b), expected, "invariance")
    assert model.similarity(a[0], b).shape == (1, 3)
    assert_close(model.similarity_pairwise(a, b), expected.diagonal(), "invariance")
    for one, other in ((a, b[:, :4]), (a, np.array(["x"]))):
        with pytest.raises(ArgumentError, match="similarity: arrays of"):
            model.similarity(one, other)
    with pytest.raises(ArgumentError, match="3 and 2 embeddings"):
        model.similarity_pairwise(a, b[:2])


@pytest.mark.jit
def test_golden_a_model_says_what_it_is(model: omni_jax.OmniRetriever, converted: Path):
    assert model.modalities == ("text", "image", "video", "audio")
    assert model.dim == model.config.decoder.hidden_size
    assert model.prompts == {}
    for part in (str(converted), f"dim {model.dim}", "LoRA of rank", "float32", "cpu device"):
        assert part in repr(model)


@pytest.mark.jit
def test_golden_a_caption_that_is_a_file_name_is_warned_of(model: omni_jax.OmniRetriever, clip: Path):
    with pytest.warns(UserWarning, match=r"item 1: the caption '.*clip.mp4' is the name of a file"):
        model.encode(["a", str(clip)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["a", "gone.mp4"])


@pytest.mark.jit
def test_golden_progress_and_one_line_while_compiling(golden: GoldenSet, converted: Path, capsys: pytest.CaptureFixture[str]):
    fresh = omni_jax.OmniRetriever.from_pretrained(converted, preset=golden.preset)
    fresh.encode(["a", "b", "c"], batch_size=1, show_progress=True)
    err = capsys.readouterr().err
    assert err.count("encode: compiling programs for these shapes") == 1
    assert "3/3" in err
    fresh.encode(["a", "b", "c"], batch_size=1, show_progress=True)
    assert "compiling" not in capsys.readouterr().err
    fresh.encode(["a", "a b c d e f g h" * 20], batch_size=1)  # not a terminal: nothing is written
    assert capsys.readouterr().err == ""


@pytest.mark.jit
def test_golden_queries_and_documents_get_their_prompts(golden_nemotron: GoldenSet, tmp_path: Path):
    assert main(["convert", "to-jax", "--base", str(golden_nemotron.checkpoint), "--out", str(tmp_path / "model")]) == 0
    model = omni_jax.OmniRetriever.from_pretrained(tmp_path / "model", preset=golden_nemotron.preset)
    assert model.prompts == {"passage": "passage: ", "query": "query: "}
    query, document = model.encode_query("a red ball"), model.encode_document(["a red ball"])[0]
    np.testing.assert_array_equal(query, model.encode("a red ball", prompt_name="query"))
    np.testing.assert_array_equal(document, model.encode("a red ball", prefix="passage"))
    assert not np.array_equal(query, document)
    with pytest.raises(ArgumentError, match="prompt_name 'title': choose one of passage, query"):
        model.encode_query("a", prompt_name="title")


@pytest.mark.jit
def test_golden_a_backbone_without_prompts_has_one_embedding_for_both(model: omni_jax.OmniRetriever):
    np.testing.assert_array_equal(model.encode_query("a red ball"), model.encode_document("a red ball"))
