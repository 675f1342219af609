"""Reading and preparing a clip: 8 frames and 8 s of sound, beside decord, librosa and the processors of transformers, in CPU seconds.

Both read the same files: H.264 with B-pictures at 720p and 1080p, key frames every 30 to 250 frames, 10 s, 3 min and 30 min long (the long
files repeat ten seconds, so that they cost no encoding), and 16-bit stereo WAV beside them, as librosa reads no video. The two sides take
turns in one process; CPU time of all threads is counted, since several clips are read at a time. The pictures are compared first.

"Prepared" is the whole way to the model's arrays at training size. Ours has a record written into a shard besides, and BEATs' filter bank.
Theirs are `Qwen2VLImageProcessorPil`, as the one for videos needs torchvision, and `WhisperFeatureExtractor`; each has one thread.

Run alone: python -m tools.benchmarks --only media
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from omni_jax.config import preset
from omni_jax.data.loading import load_training_clip, training_features
from omni_jax.data.shards import ShardWriter, encode_clip
from omni_jax.media.audio import read_waveform
from omni_jax.media.video import read_frames
from omni_jax.types import Features, Record

FPS, SECONDS, FRAMES, RATE = 24, 10, 8, 16_000
SIZES = {"720p": (1280, 720), "1080p": (1920, 1080)}
GROUPS = (30, 60, 120, 250)
REPEATS = {"10 s": 1, "3 min": 18, "30 min": 180}
LONG_GROUP = 60
TRAINING = preset("training")
LARGEST_DIFFERENCE = 1.5  # of 255, mean over a picture


def run(pairs: int = 5, sizes: dict[str, tuple[int, int]] | None = None, groups: tuple[int, ...] = GROUPS) -> dict[str, Any]:
    """Prints and returns CPU seconds of ours and theirs for each file, and their ratios."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, (width, height) in (sizes or SIZES).items():
            for group in groups:
                clip = write_clip(folder / f"{size}-{group}.mp4", width, height, group)
                for length, repeats in REPEATS.items():
                    if repeats > 1 and group != min(groups, key=lambda n: abs(n - LONG_GROUP)):
                        continue
                    label = f"{size}, a key frame each {group} frames, {length}"
                    long = clip if repeats == 1 else repeat_clip(clip, folder / "long.mp4", repeats)
                    results[label] = compare(long, write_sound(folder / "sound.wav", repeats), pairs)
                    print(
                        f"{label}: ours {results[label]['ours']:.3f}, decord and librosa {results[label]['theirs']:.3f}, "
                        f"ratio {results[label]['ratio']:.2f} (pictures alone {results[label]['ratio_pictures']:.2f}); prepared: "
                        f"ours {results[label]['ours_prepared']:.3f}, theirs {results[label]['theirs_prepared']:.3f}, "
                        f"ratio {results[label]['ratio_prepared']:.2f}",
                        flush=True,
                    )
    rows = list(results.values())
    for name in ("ratio", "ratio_prepared"):
        ratios = [row[name] for row in rows]
        results[f"{name}_median"], results[f"{name}_lowest"] = float(np.median(ratios)), float(min(ratios))
        print(f"{name}: median {results[f'{name}_median']:.2f}, lowest {results[f'{name}_lowest']:.2f}")
    return results


def compare(clip: Path, sound: Path, pairs: int) -> dict[str, float]:
    """Returns medians of CPU seconds of both sides over interleaved runs. Raises ValueError where their pictures differ."""
    ours, theirs = read_frames(clip, FRAMES), decord_frames(clip)
    apart = np.abs(ours.frames.astype(np.int16) - theirs).mean(axis=(1, 2, 3)).max()
    if apart > LARGEST_DIFFERENCE:
        raise ValueError(f"{clip}: pictures differ by {apart:.2f} of 255")
    writer = ShardWriter(clip.with_suffix(".array_record"))
    height, width = (14 * n for n in prepared(clip, sound, writer).vision.grid.thw[1:])  # type: ignore[union-attr]
    if (FRAMES * height * width) != 14 * 14 * len(processed(clip, sound)[0]):
        raise ValueError(f"{clip}: frames are resized to other sizes")
    sides: dict[str, Callable[[], object]] = {
        "ours_pictures": lambda: read_frames(clip, FRAMES),
        "theirs_pictures": lambda: decord_frames(clip),
        "ours_sound": lambda: read_waveform(sound, seconds=8.0),
        "theirs_sound": lambda: librosa_samples(sound),
        "ours_prepared": lambda: prepared(clip, sound, writer),
        "theirs_prepared": lambda: processed(clip, sound),
    }
    for side in sides.values():
        side()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(pairs):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            start = time.process_time()
            sides[name]()
            spent[name].append(time.process_time() - start)
    writer.discard()
    median = {name: float(np.median(values)) for name, values in spent.items()}
    ours_s, theirs_s = (median[f"{side}_pictures"] + median[f"{side}_sound"] for side in ("ours", "theirs"))
    return median | {
        "ours": ours_s,
        "theirs": theirs_s,
        "ratio": theirs_s / ours_s,
        "ratio_pictures": median["theirs_pictures"] / median["ours_pictures"],
        "ratio_prepared": median["theirs_prepared"] / median["ours_prepared"],
    }


def prepared(clip: Path, sound: Path, writer: ShardWriter) -> Features:
    """Writes a clip as `prepare` does, and returns the arrays that training makes of it."""
    made = load_training_clip((Record("0", "caption", clip, sound), TRAINING))
    writer.write(encode_clip(made))
    return training_features(made, TRAINING)


def processed(clip: Path, sound: Path) -> tuple[np.ndarray, np.ndarray]:
    """Patches, each frame's with the frame twice as a picture's are, and the log-mel spectrogram, by the processors of transformers."""
    pictures, spectrogram = _processors()
    made = spectrogram(librosa_samples(sound), sampling_rate=RATE, return_tensors="np", padding=False)
    return pictures(images=list(decord_frames(clip)), return_tensors="np")["pixel_values"], made["input_features"]


def _keep_freed_memory() -> None:
    """As `media.workers` has it in the processes that decode."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


@functools.cache
def _processors() -> tuple[Any, Any]:
    import torch
    from threadpoolctl import threadpool_limits
    from transformers import WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    threadpool_limits(1)  # as in the processes that decode
    _keep_freed_memory()
    torch.set_num_threads(1)
    smallest, largest = TRAINING.areas
    return Qwen2VLImageProcessorPil(size={"shortest_edge": smallest, "longest_edge": largest}), WhisperFeatureExtractor(feature_size=128)


def decord_frames(clip: Path) -> np.ndarray:
    """(8, height, width, 3) uint8, as the reference takes them."""
    import decord

    reader = decord.VideoReader(str(clip), num_threads=1)  # more threads take more CPU time
    return reader.get_batch(np.linspace(0, len(reader) - 1, FRAMES, dtype=int)).asnumpy()


def librosa_samples(sound: Path) -> np.ndarray:
    """(128000,) float32: the first channel, 8 s."""
    import librosa

    return librosa.load(str(sound), sr=RATE, mono=False, duration=8.0)[0][0]


def write_clip(path: Path, width: int, height: int, group: int) -> Path:
    """Writes ten seconds of moving, textured pictures."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    grain = rng.integers(0, 24, (height, width, 3), np.uint8)
    with av.open(path, "w") as out:
        options = {"preset": "veryfast", "threads": "2", "x264-params": f"keyint={group}:min-keyint={group}:scenecut=0:bframes=3"}
        stream: Any = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(FPS * SECONDS):
            down, right = round(100 + 90 * np.sin(i / 40)), round(100 + 90 * np.cos(i / 55))
            view = texture[down : down + height, right : right + width]
            picture = view // 2 + np.roll(grain, i * 37, axis=1) + 40
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return path


def repeat_clip(clip: Path, path: Path, repeats: int) -> Path:
    """Writes a clip over and over into one file, without encoding."""
    with av.open(clip) as source, av.open(path, "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        base = source.streams.video[0].time_base
        assert base is not None
        packets = [(bytes(p), p.pts or 0, p.dts or 0, p.is_keyframe) for p in source.demux(video=0) if p.size]
        length = int(Fraction(SECONDS) / base)
        for number in range(repeats):
            for data, pts, dts, key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.time_base = pts + number * length, dts + number * length, base
                packet.is_keyframe, packet.stream = key, stream
                out.mux(packet)
    return path


def write_sound(path: Path, repeats: int) -> Path:
    """Writes stereo noise as long as the clip."""
    block = np.random.default_rng(0).uniform(-0.5, 0.5, (48_000 * SECONDS, 2)).astype(np.float32)
    with soundfile.SoundFile(path, "w", 48_000, 2, subtype="PCM_16") as file:
        for _ in range(repeats):
            file.write(block)
    return path
