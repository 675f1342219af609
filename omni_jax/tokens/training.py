"""Features of a clip to the tower inputs of a training batch, and the lengths of its prompts before anything is decoded.

Letters: t temporal steps, P patches of a step, c log-mel chunks, F fbank frames, S tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.tokens.batching import mel_chunks, step_layout, whole_patches
from omni_jax.types import AudioBatch, BeatsBatch, ClipError, ClipMedia, Features, StepKind, VisionBatch

EDGES = 2  # begin and end token around each kind of media


def clip_media(features: Features, config: ModelConfig) -> ClipMedia:
    """Returns the tower inputs of one clip: vision (t, P, 1176), audio (c, 200, 128), BEATs (1, F, 128), F whole patches.

    Raises:
      ClipError: for a clip that lacks video or audio, or whose audio is longer than one segment (300 s).
    """
    if features.vision is None or features.audio is None:
        raise ClipError(f"record {features.record.id!r}: training needs frames and sound")
    if len(features.audio) != 1:
        raise ClipError(f"record {features.record.id!r}: its audio is longer than 300 s; set the preset's audio_seconds")
    t, h, w = features.vision.grid_thw
    coords, window = step_layout(h, w, config.vision.merge_size, config.vision.window_tokens)
    segment = features.audio[0]
    chunks = mel_chunks(segment, config)
    mel = np.zeros((len(chunks), config.audio.chunk_frames, config.audio.num_mel_bins), np.float32)
    for place, chunk in zip(mel, chunks, strict=True):
        place[: len(chunk)] = chunk
    whole = whole_patches(segment)
    return ClipMedia(
        vision=VisionBatch(
            patches=features.vision.patches.reshape(t, h * w, -1),
            coords=np.broadcast_to(coords, (t, *coords.shape)),
            window=np.broadcast_to(window, (t, *window.shape)),
        ),
        audio=AudioBatch(mel=mel, frames=np.array([len(c) for c in chunks], np.int32)),
        beats=BeatsBatch(
            fbank=segment.fbank[None, :whole],
            frames=np.array([whole], np.int32),
            tokens=np.array([segment.tokens], np.int32),
            max_tokens=segment.tokens,
        ),
    )


@dataclasses.dataclass(frozen=True)
class PromptLengths:
    """Tokens of one clip's prompts by part.

    Attributes:
      video, audio: media tokens, audio doubled where there is BEATs; those of the hard negative are `hard_video` and `hard_audio`.
      caption, positive, hard: text of the anchor, of the augmented copy and of the hard negative, template and end token included.
      alone: the caption of the prompt that is text alone.
      filler: text of the prompts of one medium.
    """

    video: int
    audio: int
    hard_video: int
    hard_audio: int
    caption: int
    positive: int
    hard: int
    alone: int
    filler: int

    def prompts(self) -> Mapping[str, int]:
        """Returns the tokens of each prompt of a training example, by its name."""
        media = self.video + self.audio + 2 * EDGES
        return {
            "anchor": media + self.caption,
            "positive": media + self.positive,
            "hard": self.hard_video + self.hard_audio + 2 * EDGES + self.hard,
            "text": self.alone,
            "audio": self.audio + EDGES + self.filler,
            "video": self.video + EDGES + self.filler,
        }

    def rows(self, kind: StepKind, share_prefix: bool) -> list[int]:
        """Returns the tokens of each row of a step kind, the hard negative's last where it has a row of its own."""
        prompts = self.prompts()
        rows = [sum(prompts[name] for name in names) for names in kind.rows]
        if kind.hard == "text" and share_prefix:
            rows[0] += self.hard  # a branch of the anchor's row
        elif kind.hard is not None:
            rows.append(prompts["hard"])
        return rows
