"""Synthetic clips for learning on a small machine: mp4 files whose picture, sound and caption speak of the same four attributes.

Each attribute has five values. A value shows in all three modalities: the first attribute is the shape seen and the pitch heard, the second
the color and the timbre, the third the change over time and the rhythm, the fourth the background and the noise. Of the 625 combinations
some are held out: none of their clips is trained on, though each of their values is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from omni_jax.data.manifest import write_jsonl_atomic
from omni_jax.data.synthetic_media import FPS, picture, sound, write_mp4
from omni_jax.io import atomic_write
from omni_jax.io.messages import as_input_error
from omni_jax.media.workers import run_guarded
from omni_jax.types import ClipError, InputError

VALUES = 5  # of each attribute
ATTRIBUTES = 4
COMBINATIONS = VALUES**ATTRIBUTES

Values = tuple[int, int, int, int]

# For each attribute the words of its values, as seen and as heard.
_SEEN = {
    "shape": ("disc|circle", "ring|hoop", "cross|plus", "plank|beam", "pillar|column"),
    "color": ("red|crimson", "green|emerald", "blue|azure", "yellow|golden", "white|pale"),
    "change": ("still|frozen", "brightening|kindling", "dimming|fading", "blinking|flashing", "growing|swelling"),
    "ground": ("black", "brown|umber", "purple|violet", "teal|cyan", "graded|shaded"),
}
_HEARD = {
    "pitch": ("deep|bass", "low|mellow", "middle|medium", "high|treble", "shrill|piercing"),
    "timbre": ("pure|plain", "hollow|reedy", "buzzing|rasping", "wavering|trembling", "metallic|clanging"),
    "rhythm": ("steady|constant", "rising|climbing", "falling|sinking", "pulsing|throbbing", "fluttering|stuttering"),
    "noise": ("silence", "hiss|static", "rumble|thunder", "sizzle|spray", "crackle|popping"),
}
_SEEN_FORMS = (
    "a {change} {color} {shape} on {ground}",
    "on {ground} a {color} {shape} {change}",
    "the {shape} is {color} and {change} over {ground}",
    "{color} {shape} , {change} , {ground} behind",
)
_HEARD_FORMS = (
    "a {rhythm} {timbre} tone , {pitch} , over {noise}",
    "{noise} under a {pitch} {timbre} note {rhythm}",
    "the {pitch} sound is {timbre} and {rhythm} with {noise}",
    "{rhythm} {pitch} {timbre} hum , {noise} behind",
)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """A set of clips; equal records make equal sets.

    Attributes:
      clips: clips of each combination that is trained on.
      held_out: combinations that are held out, a clip each.
      combinations: combinations used, the held-out ones among them; fewer than 625 make a smaller set.
      seconds: length of a clip.
      side: of a frame, pixels; even.
      seed: of everything drawn.
    """

    clips: int = 4
    held_out: int = 64
    combinations: int = COMBINATIONS
    seconds: float = 1.0
    side: int = 56
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < self.combinations <= COMBINATIONS:
            raise InputError(
                f"synthetic clips: held_out={self.held_out} must be below combinations={self.combinations}, of which there are 625"
            )
        if self.clips < 1 or self.side < 28 or self.side % 2 or not (math.isfinite(self.seconds) and self.seconds * FPS >= 2):
            raise InputError(
                f"synthetic clips: clips={self.clips}, seconds={self.seconds}, side={self.side}: at least 1, 0.25 and 28, the side even"
            )


@dataclasses.dataclass(frozen=True)
class SyntheticClip:
    """One clip: its id (the combination, a dash, a number), its attribute values and whether it is held out."""

    id: str
    values: Values
    held_out: bool


@dataclasses.dataclass(frozen=True)
class SyntheticSet:
    """The paths of a set: two manifests beside the folder of media."""

    train: Path
    held_out: Path
    written: int  # media files made now; the others were there


def plan_clips(config: SyntheticConfig) -> list[SyntheticClip]:
    """Returns every clip of a set, those that are trained on first."""
    order = np.random.default_rng([config.seed, 1]).permutation(COMBINATIONS)[: config.combinations]
    held, seen = order[: config.held_out], order[config.held_out :]
    kept = [(int(number), copy, False) for number in sorted(seen) for copy in range(config.clips)]
    kept += [(int(number), 0, True) for number in sorted(held)]
    return [SyntheticClip(f"c{number:03d}-{copy}", combination(number), out) for number, copy, out in kept]


def combination(number: int) -> Values:
    """Returns the attribute values of a combination's number, 0 to 624."""
    a, b, c, d = (number // VALUES**place % VALUES for place in range(ATTRIBUTES))
    return a, b, c, d


def caption(values: Values, rng: np.random.Generator) -> str:
    """Returns one of the many captions of a combination: what is seen and what is heard, in either order."""
    clauses = []
    for forms, table in ((_SEEN_FORMS, _SEEN), (_HEARD_FORMS, _HEARD)):
        words = {name: str(rng.choice(of_value[value].split("|"))) for (name, of_value), value in zip(table.items(), values, strict=True)}
        clauses.append(str(rng.choice(forms)).format(**words))
    if rng.random() < 0.5:
        clauses.reverse()
    return " ; ".join(clauses)


def captions_of(config: SyntheticConfig, count: int = 2000) -> list[str]:
    """Returns captions of combinations that are trained on, to make a vocabulary from."""
    clips = [clip for clip in plan_clips(config) if not clip.held_out]
    rng = np.random.default_rng([config.seed, 2])
    return [caption(clips[i].values, rng) for i in rng.integers(0, len(clips), count)]


def render(clip: SyntheticClip, config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frames (F, N, N, 3) uint8 and the samples (T,) float32 of a clip."""
    rng = _rng(clip, config, 3)
    return picture(clip.values, rng, round(config.seconds * FPS), config.side), sound(clip.values, rng, config.seconds)


def write_set(out: Path, config: SyntheticConfig, workers: int = 0, progress: Callable[[int, int], None] | None = None) -> SyntheticSet:
    """Writes the media files that are not there yet, and `train.jsonl` and `held_out.jsonl`.

    Args:
      out: the set's folder; what an earlier call with the same config wrote there is kept.
      workers: processes; 0 works in this one.
      progress: called with (clips done, clips in all).

    Raises:
      InputError: when `out` holds a set of another config, or a file cannot be written.
    """
    out, said = Path(os.path.abspath(out)), json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    settings = out / "synthetic.json"
    with as_input_error(f"{out}: cannot be written", "choose another place"):
        if settings.exists() and settings.read_text() != said:
            raise InputError(f"{out}: holds synthetic clips of other settings; choose another folder or remove it")
        (out / "media").mkdir(parents=True, exist_ok=True)
        settings.write_text(said)
    clips = plan_clips(config)
    missing = [clip for clip in clips if not _file(out, clip).exists()]
    function = functools.partial(_write_clip, folder=out, config=config)
    for number, (clip, outcome) in enumerate(run_guarded(function, missing, workers, 60.0, name=lambda clip: str(_file(out, clip))), 1):
        if isinstance(outcome, ClipError):
            raise InputError(f"{_file(out, clip)}: cannot be made ({outcome})")
        if progress:
            progress(len(clips) - len(missing) + number, len(clips))
    manifests = [out / "train.jsonl", out / "held_out.jsonl"]
    for manifest, held in zip(manifests, (False, True), strict=True):
        write_jsonl_atomic(manifest, (_record(clip, config) for clip in clips if clip.held_out == held))
    return SyntheticSet(*manifests, written=len(missing))


def _record(clip: SyntheticClip, config: SyntheticConfig) -> dict[str, str]:
    media = f"media/{clip.id}.mp4"
    return {"id": clip.id, "text": caption(clip.values, _rng(clip, config, 4)), "video": media, "audio": media}


def _write_clip(clip: SyntheticClip, folder: Path, config: SyntheticConfig) -> None:
    file = _file(folder, clip)
    # Under its name only when complete, so that an interrupted run can be taken up again.
    with atomic_write(file, flush=False) as part:
        write_mp4(part, *render(clip, config))


def _file(folder: Path, clip: SyntheticClip) -> Path:
    return folder / "media" / f"{clip.id}.mp4"


def _rng(clip: SyntheticClip, config: SyntheticConfig, purpose: int) -> np.random.Generator:
    number, copy = clip.id.removeprefix("c").split("-")
    return np.random.default_rng([config.seed, purpose, int(number), int(copy)])
