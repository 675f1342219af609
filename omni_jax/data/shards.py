"""Prepared clips: ArrayRecord files that training reads by number and TensorFlow Datasets by name.

A folder that `omni-jax prepare` wrote holds
  clips-train.array_record-00000-of-00004  one tf.train.Example a clip, no pickle: see `example_features`
  index.json, index.arrow                  what is known of the clips without reading one: see `clip_index`
  dataset_info.json, features.json         the same for `tfds.builder_from_directory(DIR).as_data_source("train")`
  parts/, preparation.json                 the state from which an interrupted preparation resumes

Frames are kept at training size as uint8 and the waveform as float32: their features are, bit for bit, those of the media file.

Letters: N clips, F frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import Preset
from omni_jax.data.clip_index import AGAIN, ClipIndex, Extents
from omni_jax.data.clips import ClipInfo
from omni_jax.data.record_cache import RecordCache
from omni_jax.data.remote_shards import RemoteShards
from omni_jax.features.vision import FRAMES_PER_STEP, PATCH, temporal_steps
from omni_jax.io import WholeFile
from omni_jax.io.messages import as_input_error, line_of
from omni_jax.io.remote import is_remote
from omni_jax.types import Clip, ClipError, InputError, Record, VideoFrames

NAME, SPLIT = "clips", "train"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
MEDIA_FIELDS = (
    *("audio_crop", "audio_seconds", "audio_pad", "audio_start", "audio_track", "channels"),
    *("frames", "fps", "max_frames", "frame_rounding", "frame_crop", "pixels", "min_pixels", "max_pixels", "video_track"),
)
"""Fields of a preset that shards depend on."""

TEXT_FIELDS = ("text_head", "end_token", "filler", "filler_audio", "filler_video", "max_text_tokens", "prefix")
"""Fields of a preset that change prompts or their pooling alone: shards serve every value. A test holds every field to one of the two."""

_WRITER = "group_size:1,zstd:1"  # a record is read alone
_READER = "readahead_buffer_size:0,max_parallelism:0"  # random access
OPEN = 64  # shards that are open at once
BLOCK, BLOCK_HEAD, CHUNK_HEAD = 1 << 16, 24, 40  # bytes, of Riegeli's file format


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
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = example_features()
    encoded = features.encode_example(
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
    # As features.serialize_example, whose fields come in an order that differs from process to process.
    return ExampleSerializer(features.get_serialized_info()).get_tf_example(encoded).SerializeToString(deterministic=True)


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

    def finish(self) -> Extents:
        """Gives the shard its name and returns where its records lie. Raises InputError when it could not be written whole."""
        with self._writing():
            self._writer.close()  # says so where anything was not written
            found = extents(self._file.path)
            self._file.finish()
        return found

    def discard(self) -> None:
        """Removes what was written and not finished."""
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):
                self._writer.close()
        self._file.discard()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        # RuntimeError is the library's own, whatever went wrong below.
        return as_input_error(f"{self._path}: cannot be written", "check that the disk has space", RuntimeError, OSError)


def check_shard(path: Path, records: int, size: int | None) -> None:
    """Looks at a shard's size, or where that is not known at its end.

    Raises:
      InputError: when it is missing, damaged, or another than the index was written for.
    """
    with as_input_error(f"{path}: shard not found", AGAIN):
        if size is None:
            open_shard(path, records).close()
        elif (there := path.stat().st_size) != size:
            raise InputError(f"{path}: has {there} bytes where the index has {size}; {AGAIN}")


def open_shard(path: Path, records: int) -> Any:
    """Returns a reader of a shard. Raises InputError when it is missing, damaged, or holds another number of records."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        raise InputError(f"{path}: shard not found; {AGAIN}")
    with as_input_error(f"{path}: cannot be read as a shard", AGAIN, Exception):  # the library raises whatever its status says
        reader = ArrayRecordReader(str(path), _READER)
        there = reader.num_records()
    if there != records:
        raise InputError(f"{path}: holds {there} clips where the index has {records}; {AGAIN}")
    return reader


def extents(path: Path) -> Extents:
    """Returns where the records of a shard lie, by the heads of its chunks: with groups of one a chunk is a record.

    Source: github.com/google/riegeli, doc/riegeli_records_file_format.md. Block headers are at every multiple of 64 KiB.
    """
    size, bounds = path.stat().st_size, []

    def after(place: int, count: int) -> int:
        """Where `count` bytes that begin at a place end, with the block headers among them."""
        while count:
            place += BLOCK_HEAD if place % BLOCK == 0 else 0
            step = min(count, BLOCK - place % BLOCK)
            place, count = place + step, count - step
        return place

    with path.open("rb") as file:
        place = after(0, CHUNK_HEAD)  # the signature
        while place < size:
            file.seek(place)
            raw = file.read(2 * BLOCK_HEAD + CHUNK_HEAD)
            cut = BLOCK_HEAD if place % BLOCK == 0 else 0
            until = BLOCK - (place + cut) % BLOCK  # bytes to the next block header
            head = raw[cut : cut + until] + raw[cut + until + BLOCK_HEAD :] if until < CHUNK_HEAD else raw[cut:]
            bounds.append(place)
            if head[24:25] != b"r" or int.from_bytes(head[25:32], "little") != 1:
                break
            place = after(after(place, CHUNK_HEAD), int.from_bytes(head[8:16], "little"))
    return Extents(tuple(bounds), size)


def write_dataset_info(folder: Path, lengths: Sequence[int], sizes: Sequence[int]) -> None:
    """Writes what TensorFlow Datasets asks for to read the folder."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import naming

    template = naming.ShardedFileTemplate(
        data_dir=epath.Path(folder), template=TEMPLATE, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=sum(sizes), filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=example_features(),
        split_infos=[split],
        check_data=False,
        description="Clips at training size, written by omni-jax prepare.",
    )


class ShardSource:
    """The clips of a prepared folder, by number. See `clips.ClipSource`."""

    def __init__(self, directory: os.PathLike[str] | str, preset: Preset, *, cache: RecordCache | None = None, check: bool = True) -> None:
        """Opens the index.

        Args:
          directory: a folder that may be in an object store.
          cache: of what is read from there.
          check: looks whether every shard is there and as long as the index says.

        Raises:
          InputError: when the folder is not whole, or was prepared under other settings than `preset`.
        """
        self._folder, self.preset, self._cache = os.fspath(directory), preset, cache
        self._remote = None
        if is_remote(directory):
            if cache is None:
                raise InputError(f"{directory}: clips in an object store are read by training alone; copy the folder to a local disk")
            self._remote = RemoteShards(self._folder, cache)
        self._index = index = ClipIndex(Path(self._folder) if self._remote is None else self._remote.index)
        wanted, stored = media_fields(preset), stored_fields(index.preset)
        if differing := [name for name in MEDIA_FIELDS if stored[name] != wanted[name]]:
            name = differing[0]
            raise InputError(
                f"{directory}: prepared with {name}={stored[name]!r}, but training asks for {name}={wanted[name]!r}; "
                f"prepare it again, or give the preset that it was prepared with"
            )
        self._starts = np.concatenate([[0], np.cumsum(index.lengths)]).astype(np.int64)
        if not len(self):
            raise InputError(f"{directory}: holds no clips; errors.jsonl there says why")
        if check:
            self._check()
        self.limits, self.silent, self.digest = index.limits, index.silent, index.digest
        self.ids, self.captions = index.ids, index.captions
        self._reader = functools.lru_cache(maxsize=OPEN)(lambda shard: open_shard(Path(self._path(shard)), index.lengths[shard]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> ClipInfo:
        return self._index.info(index)

    def numbers_of(self, ids: Iterable[str]) -> Iterator[int]:
        """Yields the numbers of the clips that have one of these ids."""
        return self._index.numbers_of(ids)

    def ahead(self, numbers: Iterable[int]) -> None:
        """Begins to read clips that will be loaded soon, where they lie in an object store."""
        if self._remote is not None:
            shards = [self._shard_of(number) for number in numbers]
            ends = [(self._name(shard), *self._end(shard)) for shard in dict.fromkeys(shards)]
            clips = [(self._name(shard), *self._extent(n)) for shard, n in zip(shards, numbers, strict=True)]
            self._remote.ahead([*ends, *clips])

    def load(self, index: int) -> Clip:
        shard = self._shard_of(index)
        number = index - int(self._starts[shard])
        try:
            if self._remote is None:
                (data,) = self._reader(shard).read([number])
            else:
                data = self._remote.record(self._name(shard), number, self._extent(index), self._end(shard))
            clip = decode_clip(data)
        except InputError:  # of a store or a shard that is gone; of a damaged record the library says whatever its status says
            raise
        except Exception as error:
            raise ClipError(f"{self._path(shard)}: clip {self.ids[index]!r} cannot be read ({line_of(error)}); {AGAIN}") from None
        if clip.record.id != self.ids[index]:
            raise ClipError(f"{self._path(shard)}: holds clip {clip.record.id!r} where the index has {self.ids[index]!r}; {AGAIN}")
        return dataclasses.replace(clip, silent=self._index.is_silent(index))

    def _check(self) -> None:
        sizes = self._index.sizes
        there = None if self._remote is None else self._remote.sizes()
        for shard, length in enumerate(self._index.lengths):
            if there is None:
                check_shard(Path(self._path(shard)), length, sizes[shard] if sizes is not None else None)
            elif sizes is not None and (found := there.get(self._name(shard))) != sizes[shard]:
                raise InputError(f"{self._path(shard)}: has {found or 0} bytes where the index has {sizes[shard]}; {AGAIN}")

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _extent(self, number: int) -> tuple[int, int]:
        found = self._index.extent(number)
        assert found is not None, "folders of earlier versions are not read from a store"
        return found

    def _end(self, shard: int) -> tuple[int, int]:
        assert self._index.sizes is not None
        return self._extent(int(self._starts[shard + 1]) - 1)[1], self._index.sizes[shard]

    def _name(self, shard: int) -> str:
        return shard_name(shard, len(self._index.lengths))

    def _path(self, shard: int) -> str:
        return f"{self._folder.rstrip('/')}/{self._name(shard)}"

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self._folder, "preset": self.preset, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, check=False)
