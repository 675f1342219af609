"""Three-axis positions (TMRoPE): temporal, height, width. Source: SPEC section 4.

Letters: M media tokens, S tokens.
"""

from __future__ import annotations

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.tokens.interleave import MediaOrder
from omni_jax.types import SOURCE_VIDEO, VideoGrid


def line(start: int, count: int) -> np.ndarray:
    """Returns (3, count) int32: start, start + 1, ... on all axes, as text has them."""
    return np.tile(np.arange(start, start + count, dtype=np.int32), (3, 1))


def video_positions(video: VideoGrid, start: int, merge_size: int, positions_per_second: int) -> np.ndarray:
    """Returns (3, n) int32 of a clip's video tokens, the first at `start` on every axis.

    The temporal axis is trunc((t * second_per_grid) * 25) in float32, as the reference computes it; a float64 product differs by one
    where it falls next to a whole number.
    """
    steps, rows, columns = video.merged(merge_size)
    seconds = np.arange(steps, dtype=np.float32) * np.float32(video.second_per_grid)
    temporal = np.trunc(seconds * np.float32(positions_per_second)).astype(np.int32)
    t, h, w = np.meshgrid(temporal, np.arange(rows, dtype=np.int32), np.arange(columns, dtype=np.int32), indexing="ij")
    return start + np.stack([t.ravel(), h.ravel(), w.ravel()])


def media_positions(config: ModelConfig, order: MediaOrder, video: VideoGrid | None, start: int) -> tuple[np.ndarray, int]:
    """Returns positions (3, M + bos + eos) int32 of a media block and the position of the text after it.

    The block is bos tokens (one each kind of media), media tokens in `order`, eos tokens. Without video all positions count up. With
    video, the bos tokens share `start`, media begin at start + 1, and the eos tokens share the position after the last chunk (which
    need not be the largest of the block).
    """
    count = len(order.source)
    if video is None:
        return line(start, count + 2), start + count + 2
    edges = 1 if (order.source == SOURCE_VIDEO).all() else 2
    visual = video_positions(video, start + 1, config.vision.merge_size, config.positions_per_second)
    is_video = order.source == SOURCE_VIDEO
    media = np.where(is_video, visual[:, np.where(is_video, order.index, 0)], start + 1 + order.index)
    end = int(media[:, order.last_chunk :].max()) + 1
    bos, eos = np.full((3, edges), start), np.full((3, edges), end)
    return np.concatenate([bos, media, eos], axis=1).astype(np.int32), end + 1
