"""Video frames to patches. Source: SPEC section 2 (Qwen2-VL's smart_resize and patch order).

Letters: F frames, t temporal steps, h and w patches of a frame (before merging), C colour channels.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from einops import rearrange
from PIL import Image

from omni_jax.config import Preset, VisionConfig
from omni_jax.types import ClipError, VideoFrames, VideoGrid, VisionFeatures

PATCH, MERGE, FRAMES_PER_STEP = VisionConfig.patch_size, VisionConfig.merge_size, VisionConfig.temporal_patch_size
FACTOR = PATCH * MERGE  # pixels per side of a token: frames are resized to multiples of it
MAX_ASPECT = 200  # longer side over shorter side

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training images, RGB, 0..1
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def smart_resize(height: int, width: int, smallest: int, largest: int | None = None) -> tuple[int, int]:
    """Returns (height, width) in pixels, multiples of 28 with an area near or between the bounds, the aspect nearly kept.

    Both sides are rounded to multiples of 28. An area above `largest` is then scaled down and both sides rounded down, an area below
    `smallest` scaled up and both sides rounded up.

    Args:
      smallest, largest: areas in pixels; None takes `smallest` for both.

    Raises:
      ClipError: for a side below 28 pixels or an aspect ratio above 200.
    """
    if min(height, width) < FACTOR:
        raise ClipError(
            f"frames are {width}x{height} pixels; both sides must be at least {FACTOR}; give a larger copy or remove the record"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ClipError(f"frames are {width}x{height} pixels; the aspect ratio must not exceed {MAX_ASPECT}; crop it or remove the record")
    sides = [round(side / FACTOR) * FACTOR for side in (height, width)]
    area = sides[0] * sides[1]
    largest = smallest if largest is None else largest
    if area > largest:
        scale = math.sqrt(height * width / largest)
        # A side of a long strip would round down to nothing.
        sides = [max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR) for side in (height, width)]
    elif area < smallest:
        scale = math.sqrt(smallest / (height * width))
        sides = [math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width)]
    return sides[0], sides[1]


def square_crop(frames: np.ndarray) -> np.ndarray:
    """Returns the centre square of frames (F, height, width, C)."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[:, top : top + side, left : left + side]


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns frames (F, height, width, 3) uint8, bicubic with antialiasing, rounded to uint8 as the reference does."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames])


def patchify(pixels: np.ndarray) -> np.ndarray:
    """Returns patches (t*h*w, 1176): rows (t, h/2, w/2, 2, 2), values (C, frame of the pair, 14, 14).

    Args:
      pixels: (F, height, width, 3), F even, height and width multiples of 28.
    """
    sizes = {"pair": FRAMES_PER_STEP, "a": MERGE, "b": MERGE, "p": PATCH, "q": PATCH}
    return np.ascontiguousarray(rearrange(pixels, "(t pair) (h a p) (w b q) c -> (t h w a b) (c pair p q)", **sizes))


def vision_features(frames: VideoFrames, preset: Preset) -> VisionFeatures:
    """Returns the normalised patches of one clip.

    Raises:
      ClipError: for a clip without frames or length, and frames that cannot be resized.
    """
    _check(frames)
    return patch_features(dataclasses.replace(frames, frames=fit(frames.frames, preset)))


def fit(frames: np.ndarray, preset: Preset) -> np.ndarray:
    """Returns frames (F, height, width, 3) uint8, cropped and resized as the preset says; sides are multiples of 28.

    Not to be applied twice: a frame of the right size may be resized once more.

    Raises:
      ClipError: as `smart_resize`.
    """
    pictures = square_crop(frames) if preset.frame_crop == "square" else frames
    return resize(pictures, *smart_resize(pictures.shape[1], pictures.shape[2], *preset.areas))


def patch_features(frames: VideoFrames) -> VisionFeatures:
    """Returns the normalised patches of frames that `fit` has made; the last of an odd number appears twice, as in Qwen's
    processor, and the time between steps is that of the frames sampled."""
    _check(frames)
    count, height, width = frames.frames.shape[:3]
    padded = np.concatenate([frames.frames, frames.frames[-1:]]) if count % FRAMES_PER_STEP else frames.frames
    patches = patchify(padded).astype(np.float32)  # the bytes are put in order: they are a quarter of the numbers
    patches /= np.float32(255)
    patches -= np.repeat(MEAN, patches.shape[1] // len(MEAN))
    patches /= np.repeat(STD, patches.shape[1] // len(STD))
    grid = VideoGrid((temporal_steps(count), height // PATCH, width // PATCH), FRAMES_PER_STEP / (count / frames.seconds))
    return VisionFeatures(patches, grid)


def temporal_steps(frames: int) -> int:
    """Returns t, the steps of so many frames."""
    return -(-frames // FRAMES_PER_STEP)


def _check(frames: VideoFrames) -> None:
    if frames.frames.shape[0] == 0:
        raise ClipError("no frames were sampled; set the preset's frames")
    if not (math.isfinite(frames.seconds) and frames.seconds > 0):
        raise ClipError(
            f"the clip is {frames.seconds} seconds long; it must have a positive length; re-encode it or correct its timestamps"
        )
