"""The records passed between packages, in the order a clip travels: file -> arrays -> features -> tokens -> batch -> embeddings.

Letters: B batch, S tokens, N items, P patches, F frames, D LLM width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np


class InputError(Exception):
    """Something a user gave cannot be used. The message is one line: what, where, what to do."""


class ArgumentError(InputError, ValueError):
    """An argument of the Python API cannot be used. A ValueError too, as sentence-transformers raises for the same."""


class ClipError(InputError):
    """One record cannot be used; the run continues without it."""


@dataclasses.dataclass(frozen=True)
class FilePart(os.PathLike[str]):
    """A media file inside another file, read in place: a member of a tar, or a cell of a Parquet column.

    As a path it is FILE/NAME, which is what messages call it. `media.parts` opens it.

    Attributes:
      file: the absolute path of the file that holds it.
      name: what it is called there, with the suffix of its kind.
      start, size: bytes of a tar's member.
      column, group, row: dotted name of a Parquet column, number of the row group, number of the row in it; "" for a tar's member.
    """

    file: Path
    name: str
    start: int = 0
    size: int = 0
    column: str = ""
    group: int = 0
    row: int = 0

    def __fspath__(self) -> str:
        return f"{os.fspath(self.file)}/{self.name}"

    def __str__(self) -> str:
        return self.__fspath__()


MediaFile: TypeAlias = "Path | FilePart"
"""The source of a record's video or sound."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a manifest. Absent modalities are None; paths are absolute."""

    id: str
    text: str | None = None
    video: MediaFile | None = None
    audio: MediaFile | None = None
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
class VideoGrid:
    """The shape of one clip's video in time and space.

    Attributes:
      thw: (t, h, w) in patches.
      second_per_grid: seconds between temporal steps.
    """

    thw: tuple[int, int, int]
    second_per_grid: float

    def merged(self, merge_size: int) -> tuple[int, int, int]:
        """(t, rows, columns) in tokens."""
        t, h, w = self.thw
        return t, h // merge_size, w // merge_size

    def tokens(self, merge_size: int) -> int:
        t, rows, columns = self.merged(merge_size)
        return t * rows * columns


@dataclasses.dataclass(frozen=True)
class VisionFeatures:
    """Patches of one clip: (t*h*w, 1176) float32, rows ordered (t, h/2, w/2, 2, 2), values (channel, frame of the pair, 14, 14)."""

    patches: np.ndarray
    grid: VideoGrid


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


# The batches below have any leading axes, written "...": N items of many clips where they are embedded, and in training the micro-batch,
# the clip and its copy before the items of a clip. Their arrays are NumPy's on the host and JAX's in a program.


@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """Temporal grid steps, each attended on its own, padded to P patches.

    Attributes:
      patches: (..., P, 1176) float32.
      coords: (..., P, 2) int32, row and column of each patch in its grid.
      window: (..., P) int32, attention window of each patch, -1 for padding.
    """

    patches: Any
    coords: Any
    window: Any


@dataclasses.dataclass(frozen=True)
class AudioBatch:
    """Log-mel chunks: mel (..., 200, 128) float32 and frames (...) int32, the valid frames of each."""

    mel: Any
    frames: Any


@dataclasses.dataclass(frozen=True)
class BeatsBatch:
    """Audio segments for BEATs.

    Attributes:
      fbank: (..., F, 128) float32, F a multiple of 16.
      frames: (...) int32, valid fbank frames (whole patches only count).
      tokens: (...) int32, audio tokens k of each segment; the pooled output keeps the first k rows.
      max_tokens: rows of the pooled output, a static bucket >= max(tokens).
    """

    fbank: Any
    frames: Any
    tokens: Any
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class MediaBatch:
    """What the towers read of clips: leading axes (..., t) of temporal steps, (..., c) of log-mel chunks, and (...) of the one segment."""

    vision: VisionBatch
    audio: AudioBatch
    beats: BeatsBatch


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Packed decoder rows.

    A row holds several prompts. Tokens attend causally within their segment; where prompts share a media prefix, the prefix has branch 0
    and each continuation a branch number of its own: a token sees its segment's branch 0 and its own branch.

    Attributes:
      ids: (..., S) int32, the pad token in empty places.
      media_index: (..., S) int32, row of the media table that replaces the token's embedding, -1 for text.
      positions: (..., 3, S) int32.
      segment: (..., S) int32, 1.. per row; 0 for padding.
      branch: (..., S) int32.
      pool: (..., K) int32, token pooled for each prompt of the row, 0 where there is none.
    """

    ids: Any
    media_index: Any
    positions: Any
    segment: Any
    branch: Any
    pool: Any


@dataclasses.dataclass(frozen=True)
class EncoderBatch:
    """Everything the encoder needs for a group of clips, in static shapes.

    The media table, which `RowBatch.media_index` points into, is the concatenation of: each vision batch's merged tokens
    (N * P/4 rows), each audio batch's tokens (N * 50 rows), each BEATs batch's tokens (N * max_tokens rows), in this order.

    Attributes:
      vision, audio, beats: with one leading axis, N items of many clips; a batch for each bucket of sizes.
      rows: with one leading axis, R rows.
      owners: for each of them (R, K, 2) int32: (clip of the batch, index into TABLES) of each pooled prompt, -1 where there is none.
      used_tokens: tokens that are not padding: patches / 4, audio chunks' tokens, BEATs' tokens and decoder tokens.
      total_tokens: the same, padding included.
      truncated: captions that were cut to the preset's length.
    """

    vision: tuple[VisionBatch, ...]
    audio: tuple[AudioBatch, ...]
    beats: tuple[BeatsBatch, ...]
    rows: tuple[RowBatch, ...]
    owners: tuple[np.ndarray, ...]
    used_tokens: int
    total_tokens: int
    truncated: int = 0


@dataclasses.dataclass(frozen=True)
class StepKind:
    """The streams of one micro-batch; hashable, so that each kind compiles once.

    Attributes:
      anchor, positive: whether z_TVA and z_T'V'A' are active.
      hard: modality that the hard negative exchanges, None for no hard negative.
      singles: modalities embedded alone, in their order in the row.
      pairs: pairs of L_A.
      duals: tables of two modalities, embedded for L_J.
      layout: the prompts of each row that takes a gradient; None gives each tuple a row, the single modalities one together, and so the
        duals.
      hard_media: whether the sound or picture that the hard negative takes comes with the batch, as mined ones do; otherwise it is that of
        another clip of the block.
      reach: tokens that no prompt of a row is longer than, its branches counted; one with branches begins its row. 0: not known.
    """

    anchor: bool
    positive: bool
    hard: str | None
    singles: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    layout: tuple[tuple[str, ...], ...] | None = None
    hard_media: bool = False
    duals: tuple[str, ...] = ()
    reach: int = 0

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that take a gradient."""
        return ("anchor",) * self.anchor + ("positive",) * self.positive + self.singles + self.duals

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The prompts of each row that takes a gradient, the anchor in the first."""
        if self.layout is not None:
            return self.layout
        tuples = [("anchor",)] * self.anchor + [("positive",)] * self.positive
        return (*tuples, *(names for names in (self.singles, self.duals) if names))

    def branches(self, share_prefix: bool) -> bool:
        """Whether the hard negative is a branch of its anchor's row: it has the anchor's media, and prefixes are shared."""
        return share_prefix and self.hard == "text"

    def pooled(self, share_prefix: bool) -> tuple[tuple[str, ...], ...]:
        """The prompts pooled in each of the rows: a hard negative that is a branch follows its anchor."""
        behind = {"anchor": ("anchor", "hard")} if self.branches(share_prefix) else {}
        return tuple(tuple(name for first in names for name in behind.get(first, (first,))) for names in self.rows)

    def slots(self, share_prefix: bool) -> int:
        """K, the most prompts that are pooled in a row."""
        return max(map(len, self.pooled(share_prefix)))

    @property
    def media(self) -> tuple[str, ...]:
        """The modalities besides text whose tokens some prompt has."""
        alone = {*self.singles, *"".join(self.duals)}
        return tuple(name for name in ("video", "audio") if self.anchor or name in alone or name[0] in alone)

    @property
    def shuffles(self) -> bool:
        """Whether features of other samples are exchanged."""
        return self.hard in ("audio", "video")


@dataclasses.dataclass(frozen=True)
class Example:
    """One clip of a batch.

    Attributes:
      media: the clip.
      augmented: its augmented copy; None where no positive is active.
      prompts: "anchor", "positive", "hard", and each active modality. For a hard negative with exchanged video, its prompt has the
        layout of the video it takes.
      hard_media: the clip whose sound or picture the hard negative takes, where its kind has `hard_media`.
    """

    media: MediaBatch
    augmented: MediaBatch | None
    prompts: Mapping[str, TokenSequence]
    hard_media: MediaBatch | None = None


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
