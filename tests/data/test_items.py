"""Items of `encode`: the same clip in every form gives the same features, and what cannot be used says why."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from omni_jax.config import Preset
from omni_jax.data.items import Item, is_single, parse_items
from omni_jax.data.loading import item_features, load_item
from omni_jax.types import ClipError, Features
from tests.media_samples import picture, write_clip, write_sound
from tests.tolerances import assert_close

PRESET = Preset(pixels=28 * 28 * 4, audio_seconds=2.0)


class VideoDecoder:
    """What is used of torchcodec's class: frames (n, 3, height, width) by number."""

    def __init__(self, frames: np.ndarray, fps: float):
        self._frames = frames
        self.metadata = SimpleNamespace(average_fps=fps, num_frames=len(frames))

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        return SimpleNamespace(data=self._frames[indices].transpose(0, 3, 1, 2))


class AudioDecoder:
    """Likewise: samples (channels, n) and their rate."""

    def __init__(self, wave: np.ndarray, rate: int):
        self._samples = SimpleNamespace(data=wave.T, sample_rate=rate)

    def get_all_samples(self) -> SimpleNamespace:
        return self._samples


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", 1.2, width=96, height=64)


@pytest.fixture(scope="module")
def frames(clip: Path) -> tuple[np.ndarray, float]:
    with av.open(str(clip)) as container:
        rate = container.streams.video[0].average_rate
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), float(rate)


@pytest.fixture(scope="module")
def wave_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound") / "two.wav", 1.5, sample_rate=44_100, channels=2, subtype="FLOAT")


@pytest.fixture(scope="module")
def wave(wave_file: Path) -> tuple[np.ndarray, int]:
    with av.open(str(wave_file)) as container:
        blocks = [frame.to_ndarray().reshape(-1, 2) for frame in container.decode(audio=0)]
        return np.concatenate(blocks), container.streams.audio[0].rate


@pytest.fixture
def parsed(tmp_path: Path) -> Callable[..., Item]:
    def parse(value: Any, preset: Preset = PRESET, **fields: Any) -> Item:
        (item,) = parse_items([{"item": value, **fields}], preset, lambda: tmp_path)
        return item

    return parse


@pytest.fixture
def features(parsed: Callable[..., Item]) -> Callable[..., Features]:
    def make(value: Any, preset: Preset = PRESET, **fields: Any) -> Features:
        item = parsed(value, preset, **fields)
        found = item_features(item, preset)
        item.discard()
        return found

    return make


@pytest.mark.parametrize("times", [None, (0.3, 1.0)])
@pytest.mark.parametrize("preset", [PRESET, dataclasses.replace(PRESET, fps=4.0, max_frames=6, frame_rounding="nearest")])
def test_one_video_in_every_form_has_the_same_patches(
    features: Callable[..., Features], clip: Path, frames: tuple[np.ndarray, float], preset: Preset, times: tuple[float, float] | None
):
    array, fps = frames
    forms = {
        "path": {"video": str(clip)},
        "bytes": {"video": clip.read_bytes()},
        "file object": {"video": io.BytesIO(clip.read_bytes())},
        "datasets": {"video": {"bytes": clip.read_bytes(), "path": None}},
        "array": {"array": array, "fps": fps},
        "array of torch's order": {"array": array.transpose(0, 3, 1, 2), "fps": fps},
        "floats": {"array": array / np.float32(255), "video_metadata": {"fps": fps}},
        "pictures": {"video": {"array": [Image.fromarray(frame) for frame in array], "fps": fps}},
        "decoder": VideoDecoder(array, fps),
    }
    expected = features({"video": clip}, preset, timestamps=times).vision
    assert expected is not None
    for form, value in forms.items():
        found = features(value, preset, timestamps=times)
        assert found.vision is not None, form
        assert found.audio is None, form
        assert found.vision.grid == expected.grid, form
        np.testing.assert_array_equal(found.vision.patches, expected.patches, err_msg=form)


@pytest.mark.parametrize("times", [None, (0.25, 1.1)])
@pytest.mark.parametrize("preset", [PRESET, dataclasses.replace(PRESET, channels="mean", audio_crop="center", audio_seconds=1.0)])
def test_one_sound_in_every_form_has_the_same_waveform(
    parsed: Callable[..., Item], wave_file: Path, wave: tuple[np.ndarray, int], preset: Preset, times: tuple[float, float] | None
):
    samples, rate = wave
    forms = {
        "path of any kind": wave_file,
        "bytes": wave_file.read_bytes(),
        "file": {"audio": io.BytesIO(wave_file.read_bytes())},
        "waveform and rate": (samples, rate),
        "channels first": {"array": samples.T, "sampling_rate": rate},
        "of float64": {"audio": (samples.astype(np.float64), float(rate))},
        "decoder": AudioDecoder(samples, rate),
    }
    expected = load_item(parsed({"audio": wave_file}, preset, timestamps=times), preset).waveform
    for form, value in forms.items():
        clip = load_item(parsed(value, preset, timestamps=times), preset)
        assert clip.video is None, form
        assert clip.waveform.shape == expected.shape, form
        assert_close(clip.waveform, expected, "waveform_in_memory")


def test_integer_samples_are_of_full_scale(parsed: Callable[..., Item]):
    whole = np.array([[-32768], [0], [16384]] * 8000, np.int16)
    clip = load_item(parsed((whole, 16_000)), PRESET)
    np.testing.assert_array_equal(clip.waveform[:3], np.float32([-1, 0, 0.5]))


def test_a_picture_is_a_video_of_one_frame(features: Callable[..., Features], tmp_path: Path):
    image = Image.fromarray(picture(5, 96, 64))
    image.save(tmp_path / "a.png")
    expected = features({"video": {"array": [image], "fps": 24}}).vision
    for value in (image, np.asarray(image), tmp_path / "a.png", {"image": str(tmp_path / "a.png")}, (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(features(value).vision.patches, expected.patches)
    turned = Image.fromarray(np.rot90(picture(5, 96, 64)))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(features(tmp_path / "turned.png").vision.patches, expected.patches)


def test_an_item_has_what_it_was_given(features: Callable[..., Features], clip: Path, frames: tuple[np.ndarray, float]):
    found = features({"text": "a ball", "video": {"array": frames[0], "fps": frames[1]}, "audio": clip})
    assert (found.record.text, found.vision is None, found.audio is None) == ("a ball", False, False)
    assert features("a ball").vision is features("a ball").audio is None


def test_a_file_of_any_kind_is_taken_with_what_it_has(features: Callable[..., Features], clip: Path, tmp_path: Path):
    both = features({"video": clip, "audio": clip})
    for value in (clip, clip.read_bytes(), io.BytesIO(clip.read_bytes()), {"bytes": clip.read_bytes(), "path": "clip.mp4"}):
        found = features(value)
        np.testing.assert_array_equal(found.vision.patches, both.vision.patches)
        np.testing.assert_array_equal(found.audio[0].log_mel, both.audio[0].log_mel)
    mute = features(write_clip(tmp_path / "mute.mp4", 1.0, audio=False))
    assert (mute.vision is None, mute.audio) == (False, None)


def test_temporary_files_are_removed(parsed: Callable[..., Item], clip: Path, tmp_path: Path):
    item = parsed({"video": clip.read_bytes(), "audio": io.BytesIO(clip.read_bytes())})
    assert len(list(tmp_path.iterdir())) == 2
    item.discard()
    assert not list(tmp_path.iterdir())


NOISE = np.zeros((4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "its text is empty"),
        (" \n", "its text is empty"),
        (None, "is empty; give a caption"),
        ({}, "is empty; give a caption"),
        ({"text": None, "video": None}, "is empty; give a caption"),
        ({"timestamps": (0, 1)}, "is empty; give a caption"),
        ({"text": "a", "vidoe": "a.mp4"}, "unknown keys vidoe; the keys are text, video, audio, image, timestamps"),
        (
            {"video": "a.mp4", "fps": 2},
            "unknown keys fps; the keys are text, video, audio, image, timestamps; fps belongs beside the array",
        ),
        ({"role": "user", "content": "a"}, "is a chat message"),
        ({"text": 3}, "its text is of type int"),
        (7, "is of type int; give a caption, a path"),
        (["a", "b"], "is a list inside the list"),
        (Path(""), "not a picture, a video or a sound|is a directory|file not found"),
        ({"video": ""}, "its video is empty"),
        ({"video": b""}, "file is empty"),
        ({"audio": b"no sound at all"}, "its audio: not a media file"),
        (b"nothing of the kind", "it: not a media file"),
        (io.StringIO("text"), "it is a file opened as text|its file is a file opened as text"),
        (Path("gone.mp4"), "gone.mp4: file not found"),
        ({"image": "gone.png"}, "gone.png: cannot be read"),
        ({"image": b"\x89PNG\r\n\x1a\n" + bytes(40)}, "its image: "),
        ({"image": Image.new("RGB", (40, 40)), "video": "a.mp4"}, "has an image and a video"),
        (np.zeros(4000, np.float32), "without a rate; give a waveform as (waveform, rate)"),
        (np.zeros((2, 2, 2, 2, 2)), "is an array of rank 5"),
        (np.zeros((4, 32, 32, 7), np.uint8), "a frame has the shape (32, 32, 7)"),
        (np.full((4, 32, 32, 3), 300), "is not a picture; give uint8"),
        (np.full((4, 32, 32, 3), 1.5), "values outside 0 to 1"),
        (np.full((4, 32, 32, 3), np.nan), "values outside 0 to 1"),
        (NOISE[:0], "has no frames"),
        ({"array": NOISE}, 'no rate; add "fps" for frames'),
        ({"array": NOISE, "fps": 0}, "its rate is 0 frames a second"),
        ({"array": NOISE, "fps": -1}, "its rate is -1 frames a second"),
        ({"array": NOISE, "fps": float("nan")}, "its rate is nan frames a second"),
        ({"array": NOISE, "fps": "25"}, "its rate is '25' frames a second"),
        ({"array": NOISE, "video_metadata": "25"}, "its video_metadata is of type str"),
        ({"array": NOISE, "fps": 2, "rate": 3}, "its video has the unknown keys rate"),
        ({"video": NOISE[0]}, "its video is a ndarray of shape (32, 32, 3); frames have the shape (frames, height, width, 3)"),
        ([Image.new("RGB", (40, 40)), Image.new("RGB", (41, 40))], "frames of different sizes (40x40, 41x40)"),
        (NOISE[:, :20, :20], "both sides must be at least 28"),
        *(
            ({"array": np.zeros(100, np.float32), "sampling_rate": rate}, f"its rate is {rate!r} Hz")
            for rate in (0, -16_000, float("nan"), "8000")
        ),
        *(
            ((np.zeros(100, np.float32), rate), f"its rate is {rate} Hz; give a whole number from 1000 to 1000000")
            for rate in (0, 1, 10**9)
        ),
        ((np.zeros(100, np.float32), 0.5), "its rate is 0.5 Hz"),
        ((np.zeros((2, 3, 4), np.float32), 16_000), "a waveform has the shape (2, 3, 4)"),
        ((np.zeros(0, np.float32), 16_000), "has no samples"),
        ((np.full(100, np.inf), 16_000), "holds NaN or infinite samples"),
        ((np.zeros(100, np.int64), 16_000), "a waveform of int64"),
        ({"audio": np.zeros(100, np.float32)}, "its audio is a ndarray; give (waveform, rate)"),
        ({"audio": {"array": np.zeros(100, np.float32)}}, 'without a rate; add "sampling_rate"'),
        ({"text": "a", "timestamps": (2, 1)}, "its timestamps (2, 1) must be (start, end)"),
        ({"text": "a", "timestamps": 3}, "its timestamps 3 must be (start, end)"),
        ({"audio": (np.zeros(16_000, np.float32), 16_000), "timestamps": (5, 6)}, "has no samples at 5 s"),
        ({"video": {"array": NOISE, "fps": 2}, "timestamps": (5, 6)}, "timestamps start at 5 s, but the video is 2 s long"),
    ],
)
def test_what_cannot_be_used_is_one_line(parsed: Callable[..., Item], value: Any, words: str):
    item = parsed(value)
    with pytest.raises(ClipError) as error:
        item_features(item, PRESET)
    line = item.renamed(str(error.value))
    assert any(part in line for part in words.split("|")), line
    assert "\n" not in line
    assert "/pytest-" not in line


def test_an_object_that_fails_costs_its_item_alone(tmp_path: Path):
    class Broken:
        def read(self, size: int = -1) -> bytes:
            raise KeyError("no\nbytes")

    found = [item.error for item in parse_items([{"item": "a"}, {"item": Broken()}, {"item": "b"}], PRESET, lambda: tmp_path)]
    assert found[0] is found[2] is None
    assert str(found[1]) == "cannot be read (KeyError: 'no\\nbytes'); give it in another form"


def test_a_decoder_that_fails_is_one_line(parsed: Callable[..., Item]):
    class Broken(AudioDecoder):
        def get_all_samples(self) -> SimpleNamespace:
            raise RuntimeError("no more\npackets")

    assert str(parsed(Broken(np.zeros((1, 1)), 1)).error) == "its audio cannot be decoded (RuntimeError: no more packets)"


def test_a_caption_that_names_a_media_file_is_pointed_out(parsed: Callable[..., Item], clip: Path):
    assert "is the name of a file and is embedded as text; for the file give pathlib.Path" in parsed(str(clip)).notes[0]
    assert not parsed("gone.mp4").notes
    assert not parsed(str(clip.parent)).notes


def test_frames_without_a_rate_are_pointed_out(parsed: Callable[..., Item]):
    assert "frames without a rate are taken as 24 a second" in parsed(NOISE).notes[0]
    assert not parsed({"array": NOISE, "fps": 2}).notes


@pytest.mark.parametrize(
    ("value", "single"),
    [
        ("a", True),
        (b"a", True),
        (Path("a"), True),
        (io.BytesIO(), True),
        ({"text": "a"}, True),
        (NOISE, True),
        (Image.new("L", (2, 2)), True),
        ((np.zeros(3), 16_000), True),
        (VideoDecoder(NOISE, 1), True),
        (["a"], False),
        (("a", "b"), False),
        ((np.zeros(3), np.zeros(3)), False),
        (iter("ab"), False),
        (np.array(["a", "b"]), False),
        ({"a": 1}.values(), False),
    ],
)
def test_one_item_is_told_from_a_list(value: Any, single: bool):
    assert is_single(value) is single
