"""The records passed between packages, in the order a clip travels: file -> arrays -> features -> tokens -> batch -> embeddings.

Letters: B batch, S tokens, N items, P patches, F frames, D LLM width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class InputError(Exception):
    """Something a user gave cannot be used. The message is one line: what, where, what to do."""


class ArgumentError(InputError, ValueError):
    """An argument of the Python API cannot be used. A ValueError too, as sentence-transformers raises for the same."""


class ClipError(InputError):
    """One record cannot be used; the run continues without it."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a manifest. Absent modalities are None; paths are absolute."""

    id: str
    text: str | None = None
    video: Path | None = None
    audio: Path | None = None
    timestamps: tuple[float, float] | None = None  # seconds, [start, end)
    line: int = 0  # line of the manifest, from 1; 0 where it did not come from a file
    prefix: str | None = None  # what the caption is, "passage" or "query", for models trained with one; None: the preset's
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # other fields, carried along

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(k for k, v in (("t", self.text), ("v", self.video), ("a", self.audio)) if v is not None)


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """Frames sampled from one clip.

    Attributes:
      frames: (F, height, width, 3) uint8, RGB.
      frame_index: (F,) int64, indices into the stream, repeated where the clip has fewer than F frames.
      fps: average frames per second of the stream.
      num_frames: frames in the whole stream.
      seconds: length of the clip (of the `timestamps` interval where one is given).
      warnings: one line each: what of the stream does not decode.
    """

    frames: np.ndarray
    frame_index: np.ndarray
    fps: float
    num_frames: int
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Clip:
    """A decoded record. `waveform` is (samples,) float32 at 16 kHz, cropped and padded as the preset says."""

    record: Record
    video: VideoFrames | None = None
    waveform: np.ndarray | None = None
    warnings: tuple[str, ...] = ()  # one line each: what was repaired so that the clip could be used
    silent: bool = False  # whether the waveform is silence in place of a track that is missing or cannot be read


@dataclasses.dataclass(frozen=True)
class VisionFeatures:
    """Patches of one clip.

    Attributes:
      patches: (t*h*w, 1176) float32, rows ordered (t, h/2, w/2, 2, 2), values (channel, frame of the pair, 14, 14).
      grid_thw: (t, h, w) in patches.
      second_per_grid: seconds between temporal steps.
    """

    patches: np.ndarray
    grid_thw: tuple[int, int, int]
    second_per_grid: float


@dataclasses.dataclass(frozen=True)
class AudioSegment:
    """At most 300 s of audio, encoded on its own.

    Attributes:
      log_mel: (128, F) float32.
      fbank: (F', 128) float32, normalised for BEATs.
      tokens: audio tokens k before doubling.
    """

    log_mel: np.ndarray
    fbank: np.ndarray
    tokens: int


@dataclasses.dataclass(frozen=True)
class Features:
    """Model-ready arrays of one record."""

    record: Record
    vision: VisionFeatures | None = None
    audio: tuple[AudioSegment, ...] | None = None
    warnings: tuple[str, ...] = ()
    silent: bool = False  # as `Clip.silent`

    @property
    def audio_tokens(self) -> int:
        """k, audio tokens before doubling, over all segments."""
        return sum(s.tokens for s in self.audio or ())


# What a token's embedding is read from.
SOURCE_TEXT, SOURCE_VIDEO, SOURCE_AUDIO = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """One prompt.

    Attributes:
      ids: (S,) int32, media placeholders included.
      positions: (3, S) int32, TMRoPE axes temporal, height, width.
      source: (S,) int8, SOURCE_TEXT, SOURCE_VIDEO or SOURCE_AUDIO.
      source_index: (S,) int32, for a media token its number among the clip's video tokens, or among its doubled audio tokens; 0 for text.
      prefix: leading tokens that depend on the media alone (0 for a prompt without media): they may be computed once for every prompt
        that starts with the same media.
      truncated: caption tokens dropped because the caption was longer than the preset allows.
    """

    ids: np.ndarray
    positions: np.ndarray
    source: np.ndarray
    source_index: np.ndarray
    prefix: int = 0
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class TokenizedClip:
    """A record's features with its prompts, by table name."""

    features: Features
    sequences: Mapping[str, TokenSequence]


@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """Temporal grid steps, each attended on its own, padded to P patches.

    Attributes:
      patches: (N, P, 1176) float32.
      coords: (N, P, 2) int32, row and column of each patch in its grid.
      window: (N, P) int32, attention window of each patch, -1 for padding.
    """

    patches: np.ndarray
    coords: np.ndarray
    window: np.ndarray


@dataclasses.dataclass(frozen=True)
class AudioBatch:
    """Log-mel chunks: mel (N, 200, 128) float32 and frames (N,) int32, the valid frames of each."""

    mel: np.ndarray
    frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class BeatsBatch:
    """Audio segments for BEATs.

    Attributes:
      fbank: (N, F, 128) float32, F a multiple of 16.
      frames: (N,) int32, valid fbank frames (whole patches only count).
      tokens: (N,) int32, audio tokens k of each segment; the pooled output keeps the first k rows.
      max_tokens: rows of the pooled output, a static bucket >= max(tokens).
    """

    fbank: np.ndarray
    frames: np.ndarray
    tokens: np.ndarray
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Packed decoder rows.

    A row holds several prompts. Tokens attend causally within their segment; where prompts share a media prefix, the prefix has branch 0
    and each continuation a branch number of its own: a token sees its segment's branch 0 and its own branch.

    Attributes:
      ids: (R, S) int32, the pad token where nothing stands.
      media_index: (R, S) int32, row of the media table that replaces the token's embedding, -1 for text.
      positions: (3, R, S) int32.
      segment: (R, S) int32, 1.. per row; 0 for padding.
      branch: (R, S) int32.
      pool: (R, K) int32, token pooled for each prompt of the row, 0 where there is none.
      owner: (R, K, 2) int32, (clip of the batch, index into TABLES) of each pooled prompt, -1 where there is none. Host only.
    """

    ids: np.ndarray
    media_index: np.ndarray
    positions: np.ndarray
    segment: np.ndarray
    branch: np.ndarray
    pool: np.ndarray
    owner: np.ndarray


@dataclasses.dataclass(frozen=True)
class EncoderBatch:
    """Everything the encoder needs for a group of clips, in static shapes.

    The media table, which `RowBatch.media_index` points into, is the concatenation of: each vision batch's merged tokens
    (N * P/4 rows), each audio batch's tokens (N * 50 rows), each BEATs batch's tokens (N * max_tokens rows), in this order.
    """

    vision: tuple[VisionBatch, ...]
    audio: tuple[AudioBatch, ...]
    beats: tuple[BeatsBatch, ...]
    rows: tuple[RowBatch, ...]
    used_tokens: int  # tokens that are not padding: patches / 4, audio chunks' tokens, BEATs' tokens and decoder tokens
    total_tokens: int  # the same, padding included
    truncated: int = 0  # captions that were cut to the preset's length


@dataclasses.dataclass(frozen=True)
class StepKind:
    """The streams of one micro-batch; hashable, so that each kind compiles once.

    Attributes:
      anchor, positive: whether z_TVA and z_T'V'A' are active.
      hard: modality that the hard negative exchanges, None for no hard negative.
      singles: modalities embedded alone, in the order they stand in their row.
      pairs: pairs of L_A.
      layout: the prompts of each row that takes a gradient; None gives each tuple a row and the single modalities one together.
    """

    anchor: bool
    positive: bool
    hard: str | None
    singles: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    layout: tuple[tuple[str, ...], ...] | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that take a gradient."""
        return ("anchor",) * self.anchor + ("positive",) * self.positive + self.singles

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each row that takes a gradient, the anchor in the first."""
        if self.layout is not None:
            return self.layout
        tuples = [("anchor",)] * self.anchor + [("positive",)] * self.positive
        return (*tuples, *([self.singles] if self.singles else []))

    def branches(self, share_prefix: bool) -> bool:
        """Whether the hard negative is a branch of its anchor's row: it has the anchor's media, and prefixes are shared."""
        return share_prefix and self.hard == "text"

    def slots(self, share_prefix: bool) -> int:
        """K, the most prompts that are pooled in a row, a hard negative that is a branch included."""
        return max(len(names) + ("anchor" in names and self.branches(share_prefix)) for names in self.rows)

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers whose tokens some prompt has."""
        seen, heard = (self.anchor or modality in self.singles for modality in ("video", "audio"))
        return ("vision",) * seen + ("audio", "beats") * heard

    @property
    def shuffles(self) -> bool:
        """Whether features of other samples are exchanged."""
        return self.hard in ("audio", "video")


@dataclasses.dataclass(frozen=True)
class ClipMedia:
    """Tower inputs of one clip, unpadded or padded: vision (t, P, ...), audio (c, 200, 128), BEATs (1, F, 128)."""

    vision: VisionBatch
    audio: AudioBatch
    beats: BeatsBatch


@dataclasses.dataclass(frozen=True)
class Example:
    """One clip of a batch.

    Attributes:
      media: the clip.
      augmented: its augmented copy; None where no positive is active.
      prompts: "anchor", "positive", "hard", and each active modality. For a hard negative with exchanged video, its prompt has the
        layout of the video it takes.
    """

    media: ClipMedia
    augmented: ClipMedia | None
    prompts: Mapping[str, TokenSequence]


PATCHES_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """Static sizes: temporal steps t, patches P of a step, log-mel chunks c, fbank frames F, tokens S of a row, and of a hard negative's
    where it has a row of its own."""

    steps: int
    patches: int
    chunks: int
    fbank_frames: int
    row_tokens: int
    hard_tokens: int = 0

    def media_tokens(self, chunk_tokens: int, audio_repeat: int) -> int:
        """M, media tokens of one clip; `audio_repeat` as in `ModelConfig`."""
        return self.steps * self.patches // PATCHES_PER_TOKEN + audio_repeat * self.chunks * chunk_tokens


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-batch's clips of one process, before they are packed.

    Attributes:
      examples: b clips.
      kind: the active streams.
      shuffle: (G, b / G) int32, for each place of a block the place in that block whose features it takes.
    """

    examples: tuple[Example, ...]
    kind: StepKind
    shuffle: np.ndarray


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings by table name.

    Attributes:
      ids: N record ids, in manifest order.
      tables: name -> (N, D) float32.
      own: name -> the ids of a table that lacks some of the records, its rows in their order; a table that is not here has all.
      named: whether the ids are the records' own; False where a file has none, and they are row numbers.
      made_with: what the vectors depend on, as `omni_jax.api.made_with.made_with` gives it; None where that is unknown.
      parts, of: numbers, from 0, of the parts of a set that the records are, and how many parts the set has (`embed --part`).
      same: of a part, table name -> record -> the record of another part that has the same prompt: when parts are joined both get one row.
    """

    ids: tuple[str, ...]
    tables: dict[str, np.ndarray]
    own: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, kw_only=True)
    named: bool = dataclasses.field(default=True, kw_only=True)
    made_with: Mapping[str, Any] | None = dataclasses.field(default=None, kw_only=True)
    parts: tuple[int, ...] = dataclasses.field(default=(0,), kw_only=True)
    of: int = dataclasses.field(default=1, kw_only=True)
    same: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict, kw_only=True)

    def ids_of(self, table: str) -> tuple[str, ...]:
        """Returns the ids of a table's rows."""
        return self.own.get(table, self.ids)
