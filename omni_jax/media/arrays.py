"""Frames and waveforms that are in memory already, as the readers give those of a file.

Letters: F frames sampled, n frames given, N samples, C channels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from omni_jax.config import Preset
from omni_jax.media.sampling import sample_indices
from omni_jax.types import ClipError, VideoFrames

PICTURE_FPS = 24.0
"""Frames a second of pictures that come without a rate, as transformers takes them."""

_MOST_CHANNELS = 64
_RATES = (1_000, 1_000_000)  # Hz: outside, a resampler takes practically forever, or writes gigabytes for one block
_SCALE = {"uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")


def sampled_frames(
    fetch: Callable[[list[int]], Sequence[Any]], count: int, fps: float, rule: Preset, timestamps: tuple[float, float] | None, name: str
) -> VideoFrames:
    """Returns the frames that a preset takes of n frames in memory, each once: `frame_index` gives their places (`repeated`).

    Args:
      fetch: gives the frames of some numbers, each a picture as `picture` takes it.
      count: n.
      fps: frames a second.
      name: what to call the frames in a message.

    Raises:
      ClipError: for no frames, a rate that is no positive number, frames that are no pictures or of different sizes, or frames that end
        before the interval starts.
    """
    if isinstance(fps, bool) or not isinstance(fps, int | float | np.number) or not (math.isfinite(fps) and fps > 0):
        raise ClipError(f"{name}: its rate is {fps!r} frames a second; give a positive number as fps")
    if count < 1:
        raise ClipError(f"{name}: has no frames; give at least one")
    indices, seconds = sample_indices(count, float(fps), rule, timestamps, name)
    pictures = [picture(frame, name) for frame in fetch(np.unique(indices).tolist())]
    sizes = {frame.shape for frame in pictures}
    if len(sizes) > 1:
        raise ClipError(
            f"{name}: has frames of different sizes ({', '.join(f'{w}x{h}' for h, w, _ in sorted(sizes)[:3])}); resize them to one size"
        )
    return VideoFrames(np.stack(pictures), indices, float(fps), count, seconds)


def repeated(video: VideoFrames) -> np.ndarray:
    """Returns the (F, height, width, 3) frames of what `sampled_frames` gave."""
    return video.frames[np.unique(video.frame_index, return_inverse=True)[1]]


def picture(value: Any, name: str) -> np.ndarray:
    """Returns (height, width, 3) uint8, RGB, of a PIL image or an array (height, width), (height, width, C) or (C, height, width).

    C is 1, 3 or 4 (the fourth, alpha, is left out); numbers are integers from 0 to 255 or floats from 0 to 1. A PIL image is turned as
    its EXIF note says.

    Raises:
      ClipError: for anything else.
    """
    if isinstance(value, Image.Image):
        return np.asarray(_rgb(value, name))
    array = numbers(value, name)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ClipError(f"{name}: a frame has the shape {array.shape}; it must be (height, width, 3) or (3, height, width)")
    array = array[..., :3]
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise ClipError(f"{name}: a frame of {array.dtype} has values outside 0 to 1; scale it, or give uint8 from 0 to 255")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise ClipError(f"{name}: a frame of {array.dtype} is not a picture; give uint8 from 0 to 255, or floats from 0 to 1")
        array = array.astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def read_picture(path: os.PathLike[str] | str) -> Image.Image:
    """Returns a picture file (PNG, JPEG, BMP, WebP, TIFF) as an upright RGB image.

    Raises:
      ClipError: when it is none of these, or a damaged one.
    """
    try:
        # Pillow warns of large pictures and damaged notes on the terminal.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_FORMATS) as opened:
            return _rgb(opened, os.fspath(path))
    except UnidentifiedImageError:
        raise ClipError(f"{path}: not a picture of {', '.join(_FORMATS)}, or a damaged one; save it as PNG") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(f"{path}: cannot be read ({' '.join(str(error).split())}); save it again") from None


def is_picture(path: os.PathLike[str] | str) -> bool:
    """Whether a file begins as a picture does that `read_picture` reads."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    starts = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
    return head.startswith(starts) or (head[:2] == b"BM" and head[6:10] == bytes(4)) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def sound(value: Any, rate: Any, name: str) -> tuple[np.ndarray, int]:
    """Returns samples (N, C) float32 and their rate in Hz, of (N,), (N, C) or (C, N) floats or integers; integers are of full scale.

    Raises:
      ClipError: for another rank, no samples, NaN or infinity, or a rate that is no whole number of a sound.
    """
    whole = isinstance(rate, int | float | np.number) and not isinstance(rate, bool) and math.isfinite(rate) and rate == int(rate)
    if not whole or not _RATES[0] <= rate <= _RATES[1]:
        raise ClipError(f"{name}: its rate is {rate!r:.40} Hz; give a whole number from {_RATES[0]} to {_RATES[1]}, as (waveform, rate)")
    array = numbers(value, name)
    if array.ndim not in (1, 2):
        raise ClipError(
            f"{name}: a waveform has the shape {array.shape}; it must be (samples,), (samples, channels) or (channels, samples)"
        )
    array = array[:, None] if array.ndim == 1 else array.T if array.shape[0] < array.shape[1] else array
    if not array.size:
        raise ClipError(f"{name}: has no samples; omit it")
    if array.shape[1] > _MOST_CHANNELS:
        raise ClipError(f"{name}: a waveform of {array.shape[1]} channels; at most {_MOST_CHANNELS} are taken")
    if array.dtype.name in _SCALE:
        array = (array.astype(np.float64) - (128 if array.dtype == np.uint8 else 0)) / _SCALE[array.dtype.name]
    elif array.dtype.kind != "f":
        raise ClipError(f"{name}: a waveform of {array.dtype}; give floats from -1 to 1, or int16")
    array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ClipError(f"{name}: holds NaN or infinite samples; correct it or omit it")
    return array, int(rate)


def numbers(value: Any, name: str) -> np.ndarray:
    """Returns an array of numbers, of any library whose arrays NumPy can read.

    Raises:
      ClipError: for what is no array of numbers on the host.
    """
    try:
        array = np.asarray(value)
    except Exception as error:  # every library has its own, as for an array on a device
        raise ClipError(
            f"{name}: {type(value).__name__} is not an array that NumPy can read ({' '.join(str(error).split())[:120]})"
        ) from None
    if array.dtype.kind not in "fiu":
        raise ClipError(f"{name}: {type(value).__name__} holds {array.dtype}; give an array of numbers")
    return array


def _rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ClipError(f"{name}: the picture cannot be decoded ({' '.join(str(error).split())}); save it again") from None
