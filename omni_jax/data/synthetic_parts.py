"""Synthetic clips of which caption, sound and picture each show a part, as prepared folders: two of them determine more than one.

Four factors make a clip. Each modality shows three of them and lacks one:

    factor     caption   sound   picture
    common     yes       yes     yes
    no_video   yes       yes
    no_audio   yes               yes
    no_text              yes     yes

A query can be answered only by the factors that its own side and the candidates' side both show: `ceilings` counts, from the factors alone,
what the best possible ranking of a gallery scores. Frames and waveforms are written at training size, so that nothing is decoded.

Letters: N clips, K factors, F frames.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from omni_jax.config import TABLE_MODALITIES, Preset
from omni_jax.data.clip_index import INDEX, write_index, write_json, write_rows
from omni_jax.data.shards import ShardWriter, encode_clip, extents, index_row, shard_name, write_dataset_info
from omni_jax.io.messages import as_input_error
from omni_jax.types import Clip, InputError, Record, VideoFrames

SHOWN = {"t": (0, 1, 2), "a": (0, 1, 3), "v": (0, 2, 3)}
"""Modality -> the factors that it shows, in the order of its words, tones and patterns."""

FACTORS, VALUES = 4, 4
COMBINATIONS = VALUES**FACTORS
RATE = 16_000  # samples per second
TILE, TILES = 28, 3  # pixels: one vision token; tiles of a picture, one below the other
FRAMES = 2
LOWEST, HIGHEST = 160.0, 6400.0  # Hz, of the tones

# For each factor that a caption shows, the words of its values.
_WORDS = (("dawn", "noon", "dusk", "night"), ("drum", "flute", "bell", "harp"), ("fox", "horse", "crow", "trout"))
_FORMS = ("{3} {0} , {1} , {2}", "a {2} at {0} {3} with a {1}", "{1} and {2} {3} in {0}", "the {1} of a {2} , {0} {3}")
_OTHER = ("again", "below", "far", "here", "once", "slowly", "still", "there")  # words without meaning
BLOCK = 7  # pixels of one colour along each side
# For each factor that a picture shows, the pattern of each of its values, (TILE, TILE, 3): they are added, as tones are.
_PATTERNS = np.random.default_rng(0).uniform(-40, 40, (len(SHOWN["v"]), VALUES, TILE // BLOCK, TILE // BLOCK, 3))
_PATTERNS = _PATTERNS.repeat(BLOCK, axis=2).repeat(BLOCK, axis=3)


@dataclasses.dataclass(frozen=True)
class PartsConfig:
    """A set of clips; equal records make equal sets.

    Attributes:
      train: clips to train on.
      validation, test: clips of two held-out galleries: words, sound and picture are drawn independently; no two agree in all factors.
      seconds: length of the sound.
      noise: of pixels, of the waveform and of loudness: 0 for none.
      leak: whether captions to train on begin with a file name, which tells clips apart and is found in neither sound nor picture.
      seed: of everything drawn.
    """

    train: int = 2048
    validation: int = 64
    test: int = 64
    seconds: float = 0.2
    noise: float = 0.1
    leak: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train, self.validation, self.test) < 2 or self.validation + self.test > COMBINATIONS // 2:
            raise InputError(
                f"synthetic clips: train={self.train}, validation={self.validation}, test={self.test}: each must be at least 2, and the "
                f"last two together at most {COMBINATIONS // 2}"
            )
        if not (self.seconds >= 0.05 and 0 <= self.noise <= 1):
            raise InputError(f"synthetic clips: seconds={self.seconds}, noise={self.noise}: at least 0.05, and from 0 to 1")


SPLITS = ("train", "validation", "test")


def draw_factors(config: PartsConfig) -> dict[str, np.ndarray]:
    """Returns split -> (N, K) int, the factors of its clips.

    Training shows every combination equally often. Were those of a gallery left out, factors would not be independent in training: caption
    and sound together determine a combination, so a model could learn that the right pairs of the gallery never occur.
    """
    rng = np.random.default_rng([config.seed, 1])
    order = rng.permutation(COMBINATIONS)
    numbers = {
        "validation": order[: config.validation],
        "test": order[config.validation : config.validation + config.test],
        "train": rng.permutation(np.arange(config.train) % COMBINATIONS),
    }
    return {split: np.stack([numbers[split] // VALUES**k % VALUES for k in range(FACTORS)], axis=1) for split in SPLITS}


def ceilings(factors: np.ndarray, directions: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Returns R@1 in percent, by direction, of the best possible ranking of a gallery.

    Candidates that agree with the query in every factor that both sides show cannot be told apart: the right one of m is first with
    probability 1/m. No other candidate can be right, since factors are drawn independently and shown without error.

    Args:
      factors: (N, K) of the gallery's clips; clip i is what query i asks for.
      directions: direction -> (query table, gallery table), as `retrieval.directions.DIRECTIONS`.
    """
    return {name: float(100 * np.mean(1 / _alike(factors, query, gallery))) for name, (query, gallery) in directions.items()}


def shared(query: str, gallery: str) -> list[int]:
    """Returns the factors that two tables ("text", "av", ...) both show."""
    sides = [{k for modality in TABLE_MODALITIES[table] for k in SHOWN[modality]} for table in (query, gallery)]
    return sorted(sides[0] & sides[1])


def caption(factors: Sequence[int], rng: np.random.Generator) -> str:
    """Returns one of the 32 captions of a clip: a word for each factor that a caption shows, and one without meaning."""
    words = [_WORDS[place][factors[k]] for place, k in enumerate(SHOWN["t"])]
    return str(rng.choice(_FORMS)).format(*words, rng.choice(_OTHER))


def sound(factors: Sequence[int], rng: np.random.Generator, config: PartsConfig) -> np.ndarray:
    """Returns (samples,) float32: a tone for each factor that sound shows, each factor in a band of frequencies of its own."""
    time = np.arange(round(config.seconds * RATE)) / RATE
    places = [place * VALUES + factors[k] for place, k in enumerate(SHOWN["a"])]
    tones = LOWEST * (HIGHEST / LOWEST) ** (np.array(places) / (VALUES * len(places) - 1))
    loudness = 1 + config.noise * rng.uniform(-1, 1, len(tones))
    waves = loudness[:, None] * np.sin(2 * np.pi * (tones[:, None] * time + rng.random((len(tones), 1))))
    mixed = waves.sum(axis=0) + config.noise * rng.standard_normal(time.size)
    return (0.2 * mixed).astype(np.float32)


def picture(factors: Sequence[int], rng: np.random.Generator, config: PartsConfig) -> np.ndarray:
    """Returns (F, height, width, 3) uint8: a pattern for each factor that a picture shows, one over the other, TILES times."""
    pattern = sum(_PATTERNS[place, factors[k]] for place, k in enumerate(SHOWN["v"]))
    tiles = np.tile(127.5 + pattern, (TILES, 1, 1)) * (1 + config.noise * rng.uniform(-0.5, 0.5))
    grain = 128 * config.noise * rng.standard_normal((FRAMES, *tiles.shape))
    return np.clip(tiles + grain, 0, 255).astype(np.uint8)


def write_parts(out: Path, config: PartsConfig, preset: Preset, progress: Callable[[int, int], None] | None = None) -> dict[str, Path]:
    """Writes the three prepared folders that are not there yet; returns split -> folder.

    Args:
      out: the set's folder.
      preset: what the clips are prepared for, with `frames`, `pixels` and `audio_seconds` of this set.
      progress: called with (clips done, clips in all).

    Raises:
      InputError: when `out` holds a set of another config or generator, or cannot be written.
    """
    drawn, done = draw_factors(config), 0
    settings, said = out / "parts.json", {**dataclasses.asdict(config), "generator": _digest(drawn, config)}
    with as_input_error(f"{out}: cannot be used", "choose another folder or remove it", OSError, ValueError):
        out.mkdir(parents=True, exist_ok=True)
        if settings.exists() and json.loads(settings.read_text()) != said:
            raise InputError(f"{out}: was made with other settings or another version of omni-jax; choose another folder or remove it")
    write_json(settings, said)
    for number, split in enumerate(SPLITS):
        folder = out / split
        if not (folder / INDEX).is_file():
            folder.mkdir(exist_ok=True)
            writer, rows = ShardWriter(folder / shard_name(0, 1)), []
            captions: set[str] = set()
            try:
                for copy, factors in enumerate(drawn[split]):
                    # Equal captions would be level with each other, and a scorer that counts such a tie as a hit could pass the ceiling.
                    clip = _clip(factors, number, copy, config, captions if split != "train" else set())
                    writer.write(encode_clip(clip))
                    rows.append(index_row(clip))
                    if progress:
                        progress(done + copy + 1, sum(map(len, drawn.values())))
                writer.finish()
            finally:
                writer.discard()
            write_dataset_info(folder, [len(rows)], [(folder / shard_name(0, 1)).stat().st_size])
            write_index(folder, preset, write_rows(folder, [(rows, extents(folder / shard_name(0, 1)))]))
        done += len(drawn[split])
    return {split: out / split for split in SPLITS}


def _digest(drawn: Mapping[str, np.ndarray], config: PartsConfig) -> str:
    """Returns what changes with the way in which clips are made: a digest of all factors, and of the first clip of each split."""
    digest = hashlib.blake2b(digest_size=16)
    for number, split in enumerate(SPLITS):
        clip = _clip(drawn[split][0], number, 0, config, set())
        assert clip.video is not None and clip.waveform is not None
        sound = np.round(clip.waveform * 2**12).astype("<i4")  # sines differ between processors in their last bits
        for part in (drawn[split].astype("<i8"), clip.video.frames, sound):
            digest.update(part.tobytes())
        digest.update(f"{clip.record.id} {clip.record.text}".encode())
    return digest.hexdigest()


def _clip(factors: np.ndarray, split: int, copy: int, config: PartsConfig, taken: set[str]) -> Clip:
    rng = np.random.default_rng([config.seed, 2 + split, copy])
    values = [int(value) for value in factors]
    name = "".join(map(str, values))
    text, frames, waveform = caption(values, rng), picture(values, rng, config), sound(values, rng, config)
    while text in taken:
        text = caption(values, rng)
    taken.add(text)
    if config.leak and SPLITS[split] == "train":
        text = f"clip_{copy:04d}.mp4 {text}"
    fps = FRAMES / config.seconds
    return Clip(Record(f"c{name}-{copy}", text), VideoFrames(frames, np.arange(FRAMES), fps, FRAMES, config.seconds), waveform)


def _alike(factors: np.ndarray, query: str, gallery: str) -> np.ndarray:
    """(N,): how many clips agree with each in all factors that both tables show, itself among them."""
    _, group, sizes = np.unique(factors[:, shared(query, gallery)], axis=0, return_inverse=True, return_counts=True)
    return sizes[group.reshape(-1)]
