"""From what a caller of `OmniRetriever.encode` hands over to items that `loading.load_item` makes clips of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from omni_jax.config import Preset
from omni_jax.data.formats.entry import media_kind
from omni_jax.data.paths import media_path
from omni_jax.data.times import interval
from omni_jax.io.messages import line_of
from omni_jax.types import ClipError, FilePart, InputError, Record, VideoFrames

if TYPE_CHECKING:
    from PIL import Image

Media: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO"
"""A media file: its path, its bytes, or an object that reads them."""

Video: TypeAlias = "Media | np.ndarray | Sequence[Image.Image] | Mapping[str, Any] | Any"
"""A file, frames (n, height, width, 3), PIL images, {"array": frames, "fps": rate}, or a decoder as torchcodec's `VideoDecoder`."""

Audio: TypeAlias = "Media | tuple[np.ndarray, int] | Mapping[str, Any] | Any"
"""A file, (waveform, rate), {"array": waveform, "sampling_rate": rate}, or a decoder as torchcodec's `AudioDecoder`."""

FIELDS = ("text", "video", "audio", "image", "timestamps")
"""Keys of an item that is a dict."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to embed, ready to be handed to a process that reads files.

    Attributes:
      record: its caption and interval, and the files of which it is known what they hold.
      file: a file of which it is not known whether it is a picture, a video or a sound.
      image: a picture file.
      frames: frames in memory, as `media.arrays.sampled_frames` gives them.
      sound: samples (N, channels) float32 in memory, and their rate.
      error: why it cannot be used; the rest is then void.
      notes: one line each: what a caller would want to know of how it was taken.
      named: temporary file -> what to call it in a message.
    """

    record: Record
    file: Path | None = None
    image: Path | None = None
    frames: VideoFrames | None = None
    sound: tuple[np.ndarray, int] | None = None
    error: ClipError | None = None
    notes: tuple[str, ...] = ()
    named: Mapping[Path, str] = dataclasses.field(default_factory=dict)

    @property
    def reads(self) -> bool:
        """Whether there is anything to decode or to compute before it can be embedded."""
        return self.error is None and bool(self.record.modalities - {"t"} or self.file or self.image or self.frames or self.sound)

    def renamed(self, line: str) -> str:
        """Returns a message about the item with its temporary files called what the caller knows."""
        for path, name in self.named.items():
            line = line.replace(str(path), name)
        return line.removeprefix(f"record {self.record.id!r}: ")

    def discard(self) -> None:
        """Removes its temporary files."""
        for path in self.named:
            with contextlib.suppress(OSError):
                path.unlink()


def is_single(value: Any) -> bool:
    """Whether a value is one item, and not a list or an iterator of items."""
    if value is None or isinstance(value, str | bytes | bytearray | os.PathLike | Mapping) or hasattr(value, "read") or _is_wave(value):
        return True
    if any(hasattr(value, name) for name in ("get_frames_at", "get_all_samples")):
        return True
    if hasattr(value, "ndim") and hasattr(value, "shape"):  # an array is an item, an array of captions a list
        return not (value.ndim == 1 and np.asarray(value).dtype.kind in "UO")
    return not hasattr(value, "__iter__")


def parse_items(
    values: Iterable[Mapping[str, Any]], preset: Preset, folder: Callable[[], Path], prefix: str | None = None
) -> Iterator[Item]:
    """Yields an item for each mapping of `FIELDS` to what a caller gave, None where it gave nothing; "item" stands for a thing of any kind.

    What cannot be used becomes an item with an `error`. Bytes and what file objects hold are kept in files until `Item.discard`.

    Args:
      folder: where such files lie; called when the first is written.
      prefix: as `Record.prefix`, of every caption.
    """
    for number, given in enumerate(values):
        parser = _Parser(number, preset, folder)
        try:
            yield parser.item(given, prefix)
        except ClipError as error:
            yield Item(Record(str(number)), error=error, named=parser.named)
        except Exception as error:  # the caller's object raises what it likes: that item's fault alone
            line = f"cannot be read ({type(error).__name__}: {line_of(error)}); give it in another form"
            yield Item(Record(str(number)), error=ClipError(line), named=parser.named)


class _Parser:
    """What is known of one item so far."""

    def __init__(self, number: int, preset: Preset, folder: Callable[[], Path]) -> None:
        self.number, self.preset, self.folder = number, preset, folder
        self.named: dict[Path, str] = {}
        self.notes: list[str] = []

    def item(self, given: Mapping[str, Any], prefix: str | None) -> Item:
        fields = {name: value for name, value in given.items() if value is not None}
        if "item" in fields:
            fields = {name: value for name, value in self.described(fields.pop("item")).items() if value is not None} | fields
        if not fields.keys() - {"timestamps"}:
            raise ClipError("is empty; give a caption, a video, a sound or a picture, or leave the item out")
        if {"image", "video"} <= fields.keys():
            raise ClipError("has an image and a video; an image is a video of one frame, so give one of them")
        times = _timestamps(fields.get("timestamps"))
        text = fields.get("text")
        if text is not None:
            text = self.caption(text)
        file = self.file(fields["file"], "file") if "file" in fields else None
        video, frames = self.video(fields["video"], times) if "video" in fields else (None, None)
        image, frames = self.image(fields["image"]) if "image" in fields else (None, frames)
        audio, sound = self.audio(fields["audio"]) if "audio" in fields else (None, None)
        record = Record(str(self.number), text, video, audio, times, prefix=prefix)
        return Item(record, file, image, frames, sound, notes=tuple(self.notes), named=self.named)

    def described(self, value: Any) -> Mapping[str, Any]:
        """Returns the fields of a thing of any kind; "file" for a file of which nothing is known."""
        if isinstance(value, str):
            return {"text": value}
        if isinstance(value, bytes | bytearray | os.PathLike) or hasattr(value, "read"):
            return {"file": value}
        if isinstance(value, Mapping):
            return self.fields(value)
        if hasattr(value, "get_frames_at"):
            return {"video": value}
        if hasattr(value, "get_all_samples") or _is_wave(value):
            return {"audio": value}
        if _is_image(value):
            return {"image": value}
        if isinstance(value, list | tuple):
            if all(_is_image(frame) or hasattr(frame, "ndim") for frame in value):
                return {"video": value}
            raise ClipError("is a list inside the list; it may be a video there, of PIL images or arrays; give other things one by one")
        rank = getattr(value, "ndim", None)
        if rank in (1, 2):
            raise ClipError(f"is an array of shape {tuple(value.shape)} without a rate; give a waveform as (waveform, rate)")
        if rank in (3, 4):
            return {"image" if rank == 3 else "video": value}
        if rank is not None:
            raise ClipError(f"is an array of rank {rank}; a picture has rank 3, a video rank 4 (frames, height, width, 3)")
        raise ClipError(f"is of type {type(value).__name__}; give a caption, a path, bytes, an array, a PIL image, a decoder or a dict")

    def fields(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        keys = set(value)
        if "array" in keys:
            if "sampling_rate" in keys:
                return {"audio": value}
            if keys & {"fps", "video_metadata"}:
                return {"video": value}
            raise ClipError('is a dict with "array" and no rate; add "fps" for frames or "sampling_rate" for a waveform')
        if keys and keys <= {"bytes", "path"}:
            return {"file": value}
        if "role" in keys and "content" in keys:
            raise ClipError(f"is a chat message, which this model does not take; give a dict with {', '.join(FIELDS)}")
        if unknown := sorted(map(str, keys - set(FIELDS))):
            rate = [name for name in unknown if name in ("fps", "sampling_rate", "video_metadata")]
            where = f'; {rate[0]} belongs beside the array, as {{"array": ..., "{rate[0]}": ...}}' if rate else ""
            raise ClipError(f"has the unknown keys {', '.join(unknown)}; the keys are {', '.join(FIELDS)}{where}")
        return value

    def caption(self, text: Any) -> str:
        if not isinstance(text, str):
            raise ClipError(f"its text is of type {type(text).__name__}; give a string")
        if not text.strip():
            raise ClipError("its text is empty; fill it in or omit it")
        if media_kind(os.path.splitext(text)[1]) and len(text) < 4096 and "\0" not in text and os.path.isfile(text):
            self.notes.append(
                f"the caption {text!r} is the name of a file and is embedded as text; for the file give pathlib.Path({text!r})"
            )
        return text

    def video(self, value: Any, times: tuple[float, float] | None) -> tuple[Path | None, VideoFrames | None]:
        from omni_jax.media.arrays import PICTURE_FPS, sampled_frames

        rate: Any = None
        if isinstance(value, Mapping):
            if "array" not in value:
                return self.file(value, "video"), None
            about = value.get("video_metadata") or {}
            if not isinstance(about, Mapping):
                raise ClipError(f'its video_metadata is of type {type(about).__name__}; give {{"fps": rate}}')
            rate = value["fps"] if "fps" in value else about.get("fps")
            _known(value, "video", {"array", "fps", "video_metadata"})
            value = value["array"]
        if isinstance(value, str | bytes | bytearray | os.PathLike) or hasattr(value, "read"):
            return self.file(value, "video"), None
        if hasattr(value, "get_frames_at"):
            with _decoding("its video"):
                rate = value.metadata.average_fps if rate is None else rate
                count = int(value.metadata.num_frames or len(value))
            fetch = functools.partial(_decoded_frames, value)
        else:
            if getattr(value, "ndim", 4) != 4 or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
                shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
                raise ClipError(f"its video is a {type(value).__name__}{shape}; frames have the shape (frames, height, width, 3)")
            count = len(value)
            fetch = functools.partial(_held_frames, value)
            if rate is None:
                rate = PICTURE_FPS
                if count > 1:
                    self.notes.append(f'frames without a rate are taken as {rate:g} a second; say it as {{"array": frames, "fps": rate}}')
        return None, sampled_frames(fetch, count, rate, self.preset, times, "its video")

    def image(self, value: Any) -> tuple[Path | None, VideoFrames | None]:
        from omni_jax.media.arrays import PICTURE_FPS, sampled_frames

        if isinstance(value, str | bytes | bytearray | os.PathLike | Mapping) or hasattr(value, "read"):
            return self.file(value, "image"), None
        return None, sampled_frames(lambda _: [value], 1, PICTURE_FPS, self.preset, None, "its image")

    def audio(self, value: Any) -> tuple[Path | None, tuple[np.ndarray, int] | None]:
        from omni_jax.media.arrays import sound

        if isinstance(value, Mapping) and "array" in value:
            _known(value, "audio", {"array", "sampling_rate", "path"})
            if "sampling_rate" not in value:
                raise ClipError('its audio is an array without a rate; add "sampling_rate"')
            return None, sound(value["array"], value["sampling_rate"], "its audio")
        if isinstance(value, str | bytes | bytearray | os.PathLike | Mapping) or hasattr(value, "read"):
            return self.file(value, "audio"), None
        if hasattr(value, "get_all_samples"):
            with _decoding("its audio"):
                samples = value.get_all_samples()
                array, rate = samples.data, samples.sample_rate
            return None, sound(array, rate, "its audio")
        if isinstance(value, list | tuple) and len(value) == 2:
            return None, sound(value[0], value[1], "its audio")
        raise ClipError(f'its audio is a {type(value).__name__}; give (waveform, rate), {{"array", "sampling_rate"}}, a path or bytes')

    def file(self, value: Any, what: str) -> Any:
        """Returns the path of a file; what is no path is written to the folder first."""
        if isinstance(value, FilePart):
            return value
        if isinstance(value, Mapping):
            _known(value, what, {"bytes", "path"})
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str | os.PathLike):
            path = os.fspath(value)
            if not isinstance(path, str):
                raise ClipError(f"its {what} is a path of type {type(path).__name__}; give a string or a pathlib path")
            if not path.strip():
                raise ClipError(f"its {what} is empty; fill it in or omit it")
            try:
                return media_path(path, Path.cwd())
            except InputError as error:
                raise ClipError(f"its {what} {error}") from None
        if not isinstance(value, bytes | bytearray) and not hasattr(value, "read"):
            raise ClipError(f"its {what} is of type {type(value).__name__}; give a path, bytes, a file object or an array")
        held = isinstance(value, bytes | bytearray)
        name = "" if held else getattr(value, "name", "")
        suffix = os.path.splitext(name)[1] if isinstance(name, str) else ""
        path = self.folder() / f"{self.number}-{what}{suffix}"
        self.named[path] = f"its {what}" if what != "file" else "it"
        try:
            with open(path, "wb") as target:
                if held:
                    target.write(value)
                else:
                    shutil.copyfileobj(value, target)
        except TypeError:
            raise ClipError(f"its {what} is a file opened as text; open it with mode 'rb'") from None
        except (OSError, ValueError) as error:
            raise ClipError(f"its {what} cannot be read or kept in {path.parent} ({error})") from None
        if not suffix and path.stat().st_size >= 12:
            with open(path, "rb") as file:  # FFmpeg asks the name, too: a WAV file must be called one
                head = file.read(12)
            if head[:4] == b"RIFF" and head[8:] == b"WAVE":
                self.named[renamed := path.with_suffix(".wav")] = self.named.pop(path)
                path = path.rename(renamed)
        return path


def _known(value: Mapping[str, Any], what: str, keys: set[str]) -> None:
    if unknown := sorted(map(str, set(value) - keys)):
        raise ClipError(f"its {what} has the unknown keys {', '.join(unknown)}; the keys are {', '.join(sorted(keys))}")


def _timestamps(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if (times := interval(value)) is None:
        raise ClipError(f"its timestamps {str(value)[:80]} must be (start, end) in seconds or HH:MM:SS with 0 <= start < end")
    return times


def _is_wave(value: Any) -> bool:
    """Whether a value is (waveform, rate)."""
    return isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "ndim") and isinstance(value[1], int | float | np.number)


def _is_image(value: Any) -> bool:
    return hasattr(value, "getexif") and hasattr(value, "convert")  # PIL is loaded where there is one


def _held_frames(frames: Any, numbers: list[int]) -> Sequence[Any]:
    return [frames[n] for n in numbers]


def _decoded_frames(decoder: Any, numbers: list[int]) -> Sequence[Any]:
    with _decoding("its video"):
        return decoder.get_frames_at(indices=numbers).data


@contextlib.contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Makes one line of whatever a decoder of another library raises."""
    try:
        yield
    except Exception as error:
        raise ClipError(f"{what} cannot be decoded ({type(error).__name__}: {line_of(error)})") from None
