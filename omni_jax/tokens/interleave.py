"""The order of video and audio tokens in one prompt. Source: SPEC section 3.

Letters: t, h, w patches of a grid; n video tokens; k audio tokens of the audio tower; A = repeat * k audio tokens in the prompt.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.types import SOURCE_AUDIO, SOURCE_VIDEO, VideoGrid

RELATIVE_TOLERANCE = 1e-5  # of the comparison with a chunk's end, as in the reference


@dataclasses.dataclass(frozen=True)
class MediaOrder:
    """Media tokens of a prompt in reading order.

    Attributes:
      source: (M,) int8, SOURCE_VIDEO or SOURCE_AUDIO.
      index: (M,) int32, number among the clip's video tokens or among its repeated audio tokens.
      last_chunk: place where the last chunk begins (0 where there is one kind of media only).
    """

    source: np.ndarray
    index: np.ndarray
    last_chunk: int


def chunk_starts(values: np.ndarray, span: float) -> list[int]:
    """Returns where chunks of non-decreasing values begin: 0, then the first place whose value reaches c * span, c = 1, 2, ...

    c grows by one per cut, however far the value jumps; "reaches" allows a relative difference of 1e-5.
    """
    starts = [0]
    while True:
        end = len(starts) * span
        # At most one cut per token, even where a value jumps past several ends.
        place = starts[-1] + 1 + int(np.searchsorted(values[starts[-1] + 1 :], end * (1 - RELATIVE_TOLERANCE)))
        if place >= len(values):
            return starts
        starts.append(place)


def interleave(config: ModelConfig, video: VideoGrid | None, audio_tokens: int | None) -> MediaOrder:
    """Returns the order of a prompt's media tokens.

    Video and audio alternate in chunks of 2 x 25 x `second_per_grid` position units (two temporal steps), video first; where one kind
    has more chunks, its last ones follow one another. Audio tokens are repeated after that (`ModelConfig.audio_repeat`).
    """
    merge = config.vision.merge_size
    video_count = video.tokens(merge) if video else 0
    audio_count = config.audio_repeat * (audio_tokens or 0)
    if video is None or audio_tokens is None:
        source = np.full(video_count + audio_count, SOURCE_AUDIO if video is None else SOURCE_VIDEO, np.int8)
        return MediaOrder(source, np.arange(len(source), dtype=np.int32), 0)

    steps, rows, columns = video.merged(merge)
    span = config.positions_per_second * config.seconds_per_chunk * video.second_per_grid
    step_values = np.arange(steps) * video.second_per_grid * config.positions_per_second
    video_cuts = [*chunk_starts(np.repeat(step_values, rows * columns), span), video_count]
    audio_cuts = [*(config.audio_repeat * start for start in chunk_starts(np.arange(audio_tokens), span)), audio_count]
    pieces: list[tuple[int, int, int]] = []
    for c in range(max(len(video_cuts), len(audio_cuts)) - 1):
        for kind, cuts in ((SOURCE_VIDEO, video_cuts), (SOURCE_AUDIO, audio_cuts)):
            if c + 1 < len(cuts):
                pieces.append((kind, cuts[c], cuts[c + 1]))
    pieces = [p for p in pieces if p[1] < p[2]]
    return MediaOrder(
        source=np.concatenate([np.full(end - start, kind, np.int8) for kind, start, end in pieces]),
        index=np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in pieces]),
        last_chunk=sum(end - start for _, start, end in pieces[:-1]),
    )
