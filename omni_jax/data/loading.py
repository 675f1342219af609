"""From manifest records to features, decoded and computed in processes that a bad file cannot stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omni_jax.config import Preset
from omni_jax.data.items import Item
from omni_jax.media.workers import run_guarded
from omni_jax.types import AudioSegment, Clip, ClipError, Features, FilePart, MediaFile, Record

if TYPE_CHECKING:
    from omni_jax.media.audio import Waveform

LONGEST_CUT_S = 600.0
"""Seconds of an interval above which its centre is cut by the reader, which need not decode it whole."""

DECODE_LIMIT_S = 120.0
"""Seconds without another packet after which one clip's decoding counts as hung."""

SILENCE_S = 8.0
"""Seconds of silence for a record without audio where the preset names no length, as `media.audio` has it for a missing track."""


def load_features(
    records: Iterable[Record], preset: Preset, modalities: Iterable[str], workers: int, timeout_s: float = DECODE_LIMIT_S
) -> Iterator[Features | ClipError]:
    """Yields, for each record in order, its features or the reason why there are none.

    Args:
      records: any iterable; read a few records ahead.
      preset: how clips become arrays.
      modalities: among "t", "v", "a"; others are neither decoded nor opened. A modality the record lacks is left out.
      workers: decoding processes; 0 decodes in this process, where a hang cannot be ended.
      timeout_s: seconds one record may take, as in `run_guarded`.
    """
    function = functools.partial(record_features, preset=preset, modalities=frozenset(modalities))
    for _, outcome in run_guarded(function, records, workers, timeout_s, name=media_name):
        yield outcome


def record_features(record: Record, preset: Preset, modalities: frozenset[str]) -> Features:
    """Returns one record's features. Raises ClipError when its media cannot be used."""
    return clip_features(load_clip(record, preset, modalities, fitted=True), preset, fitted=True)


def load_clip(record: Record, preset: Preset, modalities: frozenset[str], fitted: bool = False) -> Clip:
    """Returns a record with its frames and waveform, of those modalities that are asked for and that it has.

    Args:
      fitted: whether frames are cropped and resized, each as soon as it is decoded.

    Raises:
      ClipError: when a media file cannot be used.
    """
    # Each reader loads its libraries when it is first needed: captions alone need neither.
    video = waveform = None
    warnings: tuple[str, ...] = ()
    silent = False
    if "v" in modalities and record.video is not None:
        from omni_jax.media.video import read_frames

        options = {"fit": functools.partial(_fitted, record, preset)} if fitted else {}
        video = read_frames(record.video, preset, record.timestamps, preset.video_track, **options)
        warnings = video.warnings
    if "a" in modalities and record.audio is not None:
        from omni_jax.media.audio import read_waveform

        read = functools.partial(read_waveform, record.audio, track=preset.audio_track, start=preset.audio_start)
        audio = _cut_waveform(read, record.timestamps, preset)
        waveform, warnings, silent = audio.samples, (*warnings, *audio.warnings), audio.silent
    return Clip(record=record, video=video, waveform=waveform, warnings=warnings, silent=silent)


def _fitted(record: Record, preset: Preset, picture: np.ndarray) -> np.ndarray:
    from omni_jax.features.vision import fit

    with _naming(record, record.video):
        return fit(picture[None], preset)[0]


def item_features(item: Item, preset: Preset) -> Features:
    """Returns the features of one item of `encode`. Raises ClipError when it cannot be used."""
    return clip_features(load_item(item, preset), preset)


def load_item(item: Item, preset: Preset) -> Clip:
    """Returns an item of `encode`, whatever it was given as, with its frames and waveform.

    Raises:
      ClipError: when it, or its media file, cannot be used.
    """
    if item.error is not None:
        raise item.error
    record, image, warnings = item.record, item.image, ()
    if item.file is not None:
        from omni_jax.media.arrays import is_picture

        if is_picture(item.file):
            image = item.file
        else:
            record = dataclasses.replace(record, **dict.fromkeys(_tracks_of(item.file), item.file))
    clip = load_clip(record, preset, frozenset("tva"))
    video, waveform = clip.video, clip.waveform
    if image is not None:
        from omni_jax.media.arrays import PICTURE_FPS, read_picture, sampled_frames

        picture = read_picture(image)
        video = sampled_frames(lambda _: [picture], 1, PICTURE_FPS, preset, None, str(image))
    elif item.frames is not None:
        video = item.frames
    if video is not None and video is not clip.video:
        from omni_jax.media.arrays import repeated

        video = dataclasses.replace(video, frames=repeated(video))
    if item.sound is not None:
        from omni_jax.media.audio import array_waveform

        reader = functools.partial(array_waveform, *item.sound, "its audio")
        audio = _cut_waveform(reader, record.timestamps, preset)
        waveform, warnings = audio.samples, audio.warnings
    return Clip(record, video, waveform, (*clip.warnings, *warnings), silent=clip.silent)


def _tracks_of(path: Path) -> list[str]:
    """Returns "video", "audio" or both: what a file has. Raises ClipError for what is no media file, or has neither."""
    from omni_jax.media.source import open_container, tracks

    with open_container(path) as container:
        found = [kind for kind in ("video", "audio") if tracks(container, kind)]
    if not found:
        raise ClipError(f"{path}: has neither pictures nor sound; give a media file")
    return found


def _cut_waveform(reader: Callable[..., Waveform], timestamps: tuple[float, float] | None, preset: Preset) -> Waveform:
    """Returns a waveform, of an interval the samples [int(start * 16000), int(end * 16000)) of the resampled track, as the reference cuts.

    Args:
      reader: `read_waveform` of a file, or `array_waveform` of samples in memory.

    Raises:
      ClipError: when the track cannot be used.
    """
    from omni_jax.media.audio import SAMPLE_RATE, Waveform

    read = functools.partial(reader, crop=preset.audio_crop, channels=preset.channels)
    whole = functools.partial(read, seconds=preset.audio_seconds, pad=preset.audio_pad, timestamps=timestamps)
    if timestamps is None or (preset.audio_crop == "center" and timestamps[1] - timestamps[0] > LONGEST_CUT_S):
        return whole()
    start, end = timestamps
    if preset.audio_seconds and preset.audio_crop == "first":
        end = min(end, start + preset.audio_seconds)
    # Whole seconds lie on samples of every rate, and the resampler's filter reaches less far than one.
    first = max(0, math.floor(start) - 1)
    try:
        wide = read(seconds=0, pad=False, timestamps=(first, end + 1))
    except ClipError:
        return whole()  # with the interval's own times in the message
    samples = wide.samples[int(start * SAMPLE_RATE) - first * SAMPLE_RATE : int(end * SAMPLE_RATE) - first * SAMPLE_RATE]
    if wide.samples.size <= SAMPLE_RATE or not samples.size or wide.silent:
        return whole()  # a very short track, or one that is lacking there: the reader says so
    kept = round(preset.audio_seconds * SAMPLE_RATE) or samples.size
    skipped = max(0, samples.size - kept) // 2 if preset.audio_crop == "center" else 0
    samples = samples[skipped : skipped + kept]
    shortest = max(SAMPLE_RATE, kept if preset.audio_pad else 0)
    return Waveform(np.pad(samples, (0, max(0, shortest - samples.size))), wide.warnings)


def clip_features(clip: Clip, preset: Preset, fitted: bool = False) -> Features:
    """Returns the model-ready arrays of a decoded clip; `fitted` as it was loaded with.

    Raises:
      ClipError: when they cannot be computed; the message starts with the media file.
    """
    vision = audio = None
    if clip.video is not None:
        from omni_jax.features.vision import patch_features, vision_features

        with _naming(clip.record, clip.record.video):
            vision = patch_features(clip.video) if fitted else vision_features(clip.video, preset)
    if clip.waveform is not None:
        from omni_jax.features.audio import audio_segments

        with _naming(clip.record, clip.record.audio):
            audio = audio_segments(clip.waveform, preset)
    return Features(record=clip.record, vision=vision, audio=audio, warnings=clip.warnings, silent=clip.silent)


def load_training_clip(item: tuple[Record, Preset]) -> Clip:
    """Returns a record's clip as training keeps it: frames at training size (uint8), a waveform always.

    A record without audio gets silence and a warning, as a video file without a track does.

    Raises:
      ClipError: when the media cannot be used, or the audio is longer than one segment.
    """
    from omni_jax.features.audio import SAMPLE_RATE, SEGMENT_SAMPLES, SEGMENT_SECONDS

    record, preset = item
    clip = load_clip(record, preset, frozenset("va"), fitted=True)
    if clip.video is None:
        raise ClipError(f"record {record.id!r}: has no video; training needs one")
    if clip.waveform is None:
        seconds = preset.audio_seconds if preset.audio_pad and preset.audio_seconds else SILENCE_S
        silence = np.zeros(max(SAMPLE_RATE, round(seconds * SAMPLE_RATE)), np.float32)
        warnings = (*clip.warnings, f"record {record.id!r}: no audio; silence is used instead")
        clip = dataclasses.replace(clip, waveform=silence, warnings=warnings, silent=True)
    if clip.waveform is not None and clip.waveform.size > SEGMENT_SAMPLES:
        raise ClipError(f"{record.audio}: is longer than {SEGMENT_SECONDS} s; set the preset's audio_seconds")
    return clip


def training_features(clip: Clip, preset: Preset, audio: tuple[AudioSegment, ...] | None = None) -> Features:
    """Returns the model-ready arrays of a clip from `load_training_clip`: those that `clip_features` gives for the file.

    Args:
      audio: those of its sound where they are known.

    Raises:
      ClipError: when they cannot be computed.
    """
    from omni_jax.features.audio import audio_segments
    from omni_jax.features.vision import patch_features

    assert clip.video is not None
    assert clip.waveform is not None
    with _naming(clip.record, clip.record.video):
        vision = patch_features(clip.video)
    with _naming(clip.record, clip.record.audio):
        audio = audio or audio_segments(clip.waveform, preset)
    return Features(record=clip.record, vision=vision, audio=audio, warnings=clip.warnings, silent=clip.silent)


@contextlib.contextmanager
def _naming(record: Record, file: MediaFile | None) -> Iterator[None]:
    """Puts the file at fault before the message of a ClipError."""
    try:
        yield
    except ClipError as e:
        raise ClipError(f"{file or f'record {record.id!r}'}: {e}") from None


def media_name(record: Record) -> str:
    """Returns what to call a record whose media are at fault: its files."""
    files = dict.fromkeys(str(path) for path in (record.video, record.audio) if path is not None)
    return " + ".join(files) or f"record {record.id}"


def media_stat(media: MediaFile | None) -> os.stat_result | None:
    """Returns what the system knows of the file that a video or a sound is in; None of one that is not there, or in an object store."""
    if media is None:
        return None
    try:
        return os.stat(media.file if isinstance(media, FilePart) else media)
    except (OSError, ValueError):
        return None
