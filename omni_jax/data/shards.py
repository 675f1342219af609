"""Prepared clips: ArrayRecord files that training reads by number and TensorFlow Datasets by name.

A folder that `omni-jax prepare` wrote holds
  clips-train.array_record-00000-of-00004  one tf.train.Example a clip, no pickle: see `example_features`
  index.json                               what is known of each clip without reading it, the preset, the number of clips in each shard
  dataset_info.json, features.json         the same for `tfds.builder_from_directory(DIR).as_data_source("train")`
  parts/, preparation.json                 the state from which an interrupted preparation resumes

Frames are kept at training size as uint8 and the waveform as float32: their features are, bit for bit, those of the media file.

Letters: N clips, F frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import Preset
from omni_jax.data.clips import ClipInfo, Limits
from omni_jax.features.vision import FRAMES_PER_STEP, PATCH, temporal_steps
from omni_jax.io import WholeFile, replacing
from omni_jax.types import Clip, ClipError, InputError, Record, VideoFrames, VideoGrid

FORMAT = "omni_jax.clips/1"
INDEX = "index.json"
NAME, SPLIT = "clips", "train"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
COLUMNS = ("id", "caption", "grid", "second_per_grid", "seconds", "frames", "samples", "silent")
MEDIA_FIELDS = (
    *("audio_crop", "audio_seconds", "audio_pad", "audio_start", "audio_track", "channels"),
    *("frames", "fps", "max_frames", "frame_rounding", "frame_crop", "pixels", "min_pixels", "max_pixels", "video_track"),
)
"""Fields of a preset that shards depend on."""

TEXT_FIELDS = ("text_head", "end_token", "filler", "filler_audio", "filler_video", "max_text_tokens", "prefix")
"""Fields of a preset that change prompts or their pooling alone: shards serve every value. A test holds every field to one of the two."""

_WRITER = "group_size:1,zstd:1"  # a record is read alone
_READER = "readahead_buffer_size:0,max_parallelism:0"  # random access
_AGAIN = "run 'omni-jax prepare' again with the same arguments"


def shard_name(number: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"{NAME}-{SPLIT}.array_record-{number:05}-of-{count:05}"


def media_fields(preset: Preset) -> dict[str, Any]:
    """Returns what shards depend on."""
    return {name: getattr(preset, name) for name in MEDIA_FIELDS}


def stored_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what shards depend on as an index holds it; a field that is younger than the index had its default's effect."""
    return media_fields(Preset()) | {name: stored[name] for name in MEDIA_FIELDS if name in stored}


@functools.cache
def example_features() -> Any:
    """Returns the TFDS features of a record: arrays as raw little-endian bytes, so that float64 stays float64."""
    import tensorflow_datasets as tfds  # slow to import; commands that read no shards do without it

    def tensor(dtype: Any, *shape: int | None) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "frames": tensor(np.uint8, None, None, None, 3),
            "frame_index": tensor(np.int64, None),
            "waveform": tensor(np.float32, None),
            "seconds": tensor(np.float64, 1),
            "fps": tensor(np.float64, 1),
            "num_frames": tensor(np.int64, 1),
        }
    )


def encode_clip(clip: Clip) -> bytes:
    """Returns a clip from `load_training_clip` as a tf.train.Example."""
    assert clip.video is not None
    assert clip.waveform is not None
    video = clip.video
    return example_features().serialize_example(
        {
            "id": clip.record.id,
            "caption": clip.record.text or "",
            "frames": np.ascontiguousarray(video.frames),
            "frame_index": video.frame_index.astype(np.int64),
            "waveform": clip.waveform,
            "seconds": np.array([video.seconds], np.float64),
            "fps": np.array([video.fps], np.float64),
            "num_frames": np.array([video.num_frames], np.int64),
        }
    )


def decode_clip(data: bytes) -> Clip:
    """Returns the clip of a record; its record has no paths."""
    found = example_features().deserialize_example_np(data)
    video = VideoFrames(
        frames=found["frames"],
        frame_index=found["frame_index"],
        fps=float(found["fps"][0]),
        num_frames=int(found["num_frames"][0]),
        seconds=float(found["seconds"][0]),
    )
    record = Record(found["id"].decode(), found["caption"].decode())
    return Clip(record=record, video=video, waveform=found["waveform"])


def index_row(clip: Clip) -> dict[str, Any]:
    """Returns what the index says of a clip, by the names of COLUMNS."""
    assert clip.video is not None
    assert clip.waveform is not None
    count, height, width = clip.video.frames.shape[:3]
    return {
        "id": clip.record.id,
        "caption": clip.record.text,
        "grid": [temporal_steps(count), height // PATCH, width // PATCH],
        "second_per_grid": FRAMES_PER_STEP / (count / clip.video.seconds),
        "seconds": clip.video.seconds,
        "frames": count,
        "samples": int(clip.waveform.size),
        "silent": clip.silent,
    }


class ShardWriter:
    """Writes one shard under a temporary name; `finish` gives it its own."""

    def __init__(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path, self._file = path, WholeFile(path)
        with self._writing():
            self._writer = ArrayRecordWriter(str(self._file.path), _WRITER)

    def write(self, data: bytes) -> None:
        """Adds a record. Raises InputError when the disk takes no more."""
        with self._writing():
            self._writer.write(data)

    def finish(self) -> None:
        """Gives the shard its name. Raises InputError when it could not be written whole."""
        with self._writing():
            self._writer.close()  # says so where anything was not written
            self._file.finish()

    def discard(self) -> None:
        """Removes what was written and not finished."""
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):
                self._writer.close()
        self._file.discard()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:  # the first is the library's own, whatever went wrong below
            raise InputError(f"{self._path}: cannot be written ({_line(error)}); check that the disk has room") from None


def open_shard(path: Path, records: int) -> Any:
    """Returns a reader of a shard.

    Raises:
      InputError: when it is missing, damaged, or holds another number of records.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        raise InputError(f"{path}: shard not found; {_AGAIN}")
    try:
        reader = ArrayRecordReader(str(path), _READER)
        there = reader.num_records()
    except Exception as error:  # the library raises whatever its status says
        raise InputError(f"{path}: cannot be read as a shard ({_line(error)}); {_AGAIN}") from None
    if there != records:
        raise InputError(f"{path}: holds {there} clips where the index has {records}; {_AGAIN}")
    return reader


def write_dataset_info(folder: Path, lengths: Sequence[int]) -> None:
    """Writes what TensorFlow Datasets asks for to read the folder."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import naming

    template = naming.ShardedFileTemplate(
        data_dir=epath.Path(folder), template=TEMPLATE, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    size = sum((folder / shard_name(i, len(lengths))).stat().st_size for i in range(len(lengths)))
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=example_features(),
        split_infos=[split],
        check_data=False,
        description="Clips at training size, written by omni-jax prepare.",
    )


class ShardSource:
    """The clips of a prepared folder, by number. See `clips.ClipSource`."""

    def __init__(self, directory: os.PathLike[str] | str, preset: Preset) -> None:
        """Reads the index and the ends of all shards.

        Raises:
          InputError: when the folder is not whole, or was prepared under other settings than `preset`.
        """
        self._folder, self.preset = Path(directory), preset
        index = read_index(self._folder)
        wanted, stored = media_fields(preset), stored_fields(index["preset"])
        if differing := [name for name in MEDIA_FIELDS if stored[name] != wanted[name]]:
            name = differing[0]
            raise InputError(
                f"{directory}: prepared with {name}={stored[name]!r}, but training asks for {name}={wanted[name]!r}; "
                f"prepare it again, or give the preset that it was prepared with"
            )
        self._rows: Mapping[str, list[Any]] = index["records"]
        lengths = index["shards"]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        if not len(self):
            raise InputError(f"{directory}: holds no clips; errors.jsonl there says why")
        names = [shard_name(i, len(lengths)) for i in range(len(lengths))]
        self._readers = [open_shard(self._folder / name, count) for name, count in zip(names, lengths, strict=True)]
        grids = self._rows["grid"]
        self.limits = Limits(max(t for t, _, _ in grids), max(h * w for _, h, w in grids), max(self._rows["samples"]))

    @property
    def ids(self) -> Sequence[str]:
        return self._rows["id"]

    @property
    def captions(self) -> Sequence[str]:
        return self._rows["caption"]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> ClipInfo:
        at = {name: self._rows[name][index] for name in COLUMNS}
        t, h, w = at["grid"]
        return ClipInfo(at["id"], at["caption"], VideoGrid((t, h, w), at["second_per_grid"]), at["samples"], at["silent"])

    def load(self, index: int) -> Clip:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        path = self._folder / shard_name(shard, len(self._readers))
        try:
            (data,) = self._readers[shard].read([index - int(self._starts[shard])])
            clip = decode_clip(data)
        except Exception as error:
            raise ClipError(f"{path}: clip {self.ids[index]!r} cannot be read ({_line(error)}); {_AGAIN}") from None
        if clip.record.id != self.ids[index]:
            raise ClipError(f"{path}: holds clip {clip.record.id!r} where the index has {self.ids[index]!r}; {_AGAIN}")
        return dataclasses.replace(clip, silent=self._rows["silent"][index])

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self._folder, "preset": self.preset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"], state["preset"])


def read_index(folder: Path) -> dict[str, Any]:
    """Returns the index of a prepared folder.

    Raises:
      InputError: when there is none, or one that cannot be read.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise InputError(f"{path}: format {index['format']!r} is not {FORMAT!r}; prepare the clips with this version")
        rows = index["records"]
        if sum(index["shards"]) != len(rows["id"]) or {len(rows[name]) for name in COLUMNS} != {len(rows["id"])}:
            raise ValueError("its columns differ in length")
        return index
    except FileNotFoundError:
        unfinished = "its preparation was interrupted" if (folder / "preparation.json").is_file() else "not a prepared folder"
        raise InputError(f"{folder}: {unfinished} (no {INDEX}); run 'omni-jax prepare'") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({_line(error)}); {_AGAIN}") from None


def write_index(folder: Path, preset: Preset, lengths: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the index under its name when it is whole."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    write_json(folder / INDEX, {"format": FORMAT, "preset": dataclasses.asdict(preset), "shards": list(lengths), "records": columns})


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all. Raises InputError where it cannot be written."""
    with replacing(path, "check that the disk has room") as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
