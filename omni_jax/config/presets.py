"""Presets: how clips and captions become model inputs, and the embedding tables they are made into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from omni_jax.config.errors import ConfigError, check_choices, check_fields

TABLE_MODALITIES = {
    "text": frozenset("t"),
    "video": frozenset("v"),
    "audio": frozenset("a"),
    "av": frozenset("va"),
    "tv": frozenset("tv"),
    "at": frozenset("ta"),
    "tva": frozenset("tva"),
}
"""Embedding tables in the order they are written, with the modalities (t, v, a) that the prompt of each contains."""

TABLES = tuple(TABLE_MODALITIES)

PREFIXES = ("passage", "query")
"""What a caption may be for a backbone trained with prefixes: something to be found, or something to find with."""


FRAME_ROUNDING = ("floor", "nearest", "stride")
"""How the frames of a clip are chosen, as `Preset.frame_rounding` has it."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """How clips and captions become model inputs.

    Attributes:
      text_head: "last" pools text alone from the last layer, without the fusion head; "fused" sends it through the fusion head.
      end_token: whether a prompt ends with `<|im_end|>`.
      filler: text in place of a caption in prompts with media and no caption; "" for none.
      filler_audio, filler_video: the same where the prompt has audio alone, or video alone; None takes `filler`.
      audio_crop: "first" or "center": which part of a longer track is kept.
      audio_seconds: length kept, seconds; 0 keeps the whole track.
      audio_pad: whether a shorter track is zero-padded to `audio_seconds`.
      audio_start: "track": sound begins with the first sample of its track, as the reference has it (soundfile and librosa see no picture);
        "clip": silence precedes a track that starts later than the picture.
      audio_track, video_track: number of the track among those of its kind in a file, from 0; -1 takes the one marked as default, without a
        mark the largest.
      channels: "first" or "mean": how several audio channels become one.
      frames: frames sampled per clip where `fps` is 0; even.
      fps: frames sampled per second; 0 samples `frames` whatever the length.
      max_frames: most frames of a clip sampled by `fps`; 0 sets no limit.
      frame_rounding: whose frames are taken: "floor", evenly spaced and rounded down, as in training; "nearest", rounded to the nearest, as
        mteb does from 2.26 on; "stride", every so many-th from the first, as mteb did before. `media.sampling` has the rules.
      frame_crop: "none" or "square" (centre).
      pixels: minimum and maximum area of a resized frame, pixels.
      min_pixels, max_pixels: the one or the other bound where they differ; 0 takes `pixels`.
      max_text_tokens: a longer caption is cut, and counted.
      prefix: "passage" or "query": what precedes a caption ("passage: ") where its record names nothing else; "" for nothing. Only
        for backbones whose prompts follow the chat template.
    """

    text_head: str = "last"
    end_token: bool = True
    filler: str = "Please describe the video."
    filler_audio: str | None = None
    filler_video: str | None = None
    audio_crop: str = "first"
    audio_seconds: float = 8.0
    audio_pad: bool = True
    audio_start: str = "track"
    audio_track: int = -1
    video_track: int = -1
    channels: str = "first"
    frames: int = 8
    fps: float = 0.0
    max_frames: int = 0
    frame_rounding: str = "floor"
    frame_crop: str = "none"
    pixels: int = 50176
    min_pixels: int = 0
    max_pixels: int = 0
    max_text_tokens: int = 512
    prefix: str = ""

    def __post_init__(self) -> None:
        what = "preset field "
        check_choices(self, what, text_head=("last", "fused"), channels=("first", "mean"), prefix=("", *PREFIXES))
        check_choices(self, what, audio_crop=("first", "center"), audio_start=("track", "clip"))
        check_choices(self, what, frame_rounding=FRAME_ROUNDING, frame_crop=("none", "square"))
        if self.frames < 2 or self.frames % 2:
            raise ConfigError(f"preset field frames={self.frames}: must be even and at least 2 (frames are embedded in pairs)")
        if not (math.isfinite(self.fps) and self.fps >= 0):
            raise ConfigError(f"preset field fps={self.fps}: must be 0 (frames={self.frames} whatever the length) or positive")
        if self.max_frames < 0 or (self.max_frames and not self.fps):
            raise ConfigError(f"preset field max_frames={self.max_frames}: must be 0, or positive beside a positive fps")
        check_fields(self, what, "pixels", lambda area: area >= 28 * 28, "must be at least 784 (28 x 28)")
        check_fields(self, what, "min_pixels max_pixels", lambda area: not area or area >= 28 * 28, "must be at least 784 (28 x 28)")
        smallest, largest = self.areas
        if smallest > largest:
            raise ConfigError(f"preset fields min_pixels and max_pixels: the smallest area {smallest} is above the largest {largest}")
        if not (math.isfinite(self.audio_seconds) and self.audio_seconds >= 0):
            raise ConfigError(f"preset field audio_seconds={self.audio_seconds}: must be 0 (the whole track) or positive")
        check_fields(self, what, "audio_track video_track", lambda track: track >= -1, "must be a number from 0, or -1 (the usual track)")
        check_fields(self, what, "max_text_tokens", lambda count: count >= 1, "must be at least 1")

    @property
    def areas(self) -> tuple[int, int]:
        """Smallest and largest area of a resized frame, pixels."""
        return self.min_pixels or self.pixels, self.max_pixels or self.pixels

    @property
    def most_frames(self) -> int:
        """Most frames that a clip can have; 0 where its length alone says it."""
        return self.max_frames if self.fps else self.frames

    def filler_of(self, table: str) -> str:
        """Returns the text of a prompt of this table that has no caption."""
        own = {"audio": self.filler_audio, "video": self.filler_video}.get(table)
        return self.filler if own is None else own

    def check(self, prompt: str) -> None:
        """Raises ConfigError for a field that the backbone's prompts ("plain" or "chat", `ModelConfig.prompt`) leave without effect."""
        if self.prefix and prompt == "plain":
            names = ", ".join(presets_for(prompt))
            raise ConfigError(f"preset field prefix={self.prefix!r}: this backbone takes no prefix; omit it, or use a preset of {names}")
        if self.text_head == "fused" and prompt == "chat":
            raise ConfigError("preset field text_head='fused': this backbone has no fusion head; leave it at 'last'")

    def override(self, assignments: list[str]) -> Preset:
        """Returns a copy with `field=value` strings applied, each value read as the field's own type.

        Raises:
          ConfigError: for an unknown field, a value of the wrong type, or one that the other fields leave without effect.
        """
        changes: dict[str, Any] = {}
        types = {f.name: type(f.default) for f in dataclasses.fields(self)}
        for text in assignments:
            name, sep, value = text.partition("=")
            if not sep or name not in types:
                raise ConfigError(f"--set {text}: write field=value with one of {', '.join(types)}")
            try:
                changes[name] = _parse(value, types[name])
            except ValueError:
                raise ConfigError(f"--set {text}: {name} takes a value like {getattr(self, name)!r}") from None
        made = Preset(**self.merged(changes))
        made.check_effect(changes)
        return made

    def merged(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all fields with these in their places: `frames` frees `fps` and `max_frames`, `pixels` its two bounds."""
        replaced = {"frames": ("fps", "max_frames"), "pixels": ("min_pixels", "max_pixels")}
        freed = {other: type(getattr(self, other))() for name in replaced if name in fields for other in replaced[name]}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | freed | dict(fields)

    def check_effect(self, fields: Iterable[str]) -> None:
        """Raises ConfigError for one of these fields whose value the others leave without effect."""
        whole = not self.audio_seconds
        for name, idle, reason in (
            ("frames", self.fps > 0, f"fps={self.fps:g} says how many"),
            ("pixels", self.min_pixels and self.max_pixels, "min_pixels and max_pixels say it"),
            ("audio_pad", self.audio_pad and whole, "audio_seconds=0 keeps whole tracks; set a length with it"),
            ("audio_crop", self.audio_crop != "first" and whole, "audio_seconds=0 keeps whole tracks; set a length with it"),
        ):
            if name in fields and idle:
                raise ConfigError(f"preset field {name}={getattr(self, name)!r} has no effect: {reason}")


def _parse(value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(value)
        return value.lower() in ("true", "1")
    return value if kind is type(None) else kind(value)


PRESETS: dict[str, Preset] = {
    # As the model was trained; golden data and published numbers are reproduced with it.
    "training": Preset(),
    # The published inference code (its undoubled audio tokens cannot run with BEATs, so doubling stays on).
    "release": Preset(
        text_head="fused", end_token=False, filler="", audio_crop="center", channels="mean", frame_crop="square", pixels=336 * 336
    ),
    # The OmniRetriever wrapper of mteb since 2.26.0.
    "mteb": Preset(text_head="fused", audio_crop="center", channels="mean", frame_rounding="nearest"),
    # The same of mteb 2.20, as its figures of August 2026 were made.
    "mteb_2026_08": Preset(text_head="fused", audio_seconds=300.0, audio_pad=False, channels="mean", frame_rounding="stride"),
    # WAVE-7B's own evaluation: a frame every half second, whole tracks, a prompt of its own for sound.
    "wave": Preset(
        filler_audio="Please describe the audio.",
        audio_seconds=0.0,
        audio_pad=False,
        fps=2.0,
        max_frames=128,
        min_pixels=28 * 28,
        max_pixels=420 * 420,
    ),
    # Omni-Embed-Nemotron-3B: the whole track, no filler, captions as passages.
    "nemotron": Preset(filler="", audio_seconds=0.0, audio_pad=False, prefix="passage"),
    # mteb's wrapper of it.
    "nemotron_mteb": Preset(
        filler="",
        audio_seconds=128.0,
        audio_pad=False,
        channels="mean",
        fps=2.0,
        max_frames=64,
        frame_rounding="nearest",
        min_pixels=32 * 14 * 14,
        max_pixels=64 * 28 * 28,
        prefix="passage",
    ),
}


def preset(key: str | Preset | Mapping[str, Any]) -> Preset:
    """Returns a preset by its name or by what `preset_key` gives; raises ConfigError naming the known ones."""
    if not isinstance(key, str):
        return key if isinstance(key, Preset) else Preset(**key)
    if key not in PRESETS:
        raise ConfigError(f"unknown preset {key!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[key]


def preset_key(chosen: Preset) -> str | dict[str, Any]:
    """Returns the name of a preset or, of one without, its fields that are not those of the training preset."""
    named = next((name for name, known in PRESETS.items() if known == chosen), None)
    usual = dataclasses.asdict(Preset())
    return named or {field: value for field, value in dataclasses.asdict(chosen).items() if value != usual[field]}


def presets_for(prompt: str) -> dict[str, Preset]:
    """Returns the presets of a backbone whose prompts are of this kind ("plain" or "chat", `ModelConfig.prompt`), its own first."""
    return {name: found for name, found in PRESETS.items() if bool(found.prefix) == (prompt == "chat")}


def default_preset(prompt: str) -> Preset:
    """Returns the preset that a backbone was trained with."""
    return next(iter(presets_for(prompt).values()))


def mteb_preset(prompt: str) -> str:
    """Returns the name of the preset that does what mteb's own wrapper of a backbone does."""
    return next(name for name in presets_for(prompt) if name.endswith("mteb"))
