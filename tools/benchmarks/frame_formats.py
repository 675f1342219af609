"""Frames of prepared clips in three lossless forms: bytes and decoding time of raw with zstd (as shards hold them), WebP and PNG.

Clips are pans and zooms over photographs with hand-held shake and sensor noise, encoded as H.264 by FFmpeg at 1280x720, then sampled and
resized as `omni-jax prepare` does at the training preset. Photographs: the folder given, of JPEG or PNG files.

Run alone: python -m tools.benchmarks.frame_formats FOLDER
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLIPS, SECONDS, FPS, SIZE = 6, 8, 12, (1280, 720)


def write_video(path: Path, photo: Image.Image, seed: int) -> None:
    """Writes a clip that pans and zooms over a photograph."""
    import av

    rng = np.random.default_rng(seed)
    wide = photo.convert("RGB").resize((1920, 1280), Image.Resampling.LANCZOS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "21", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for n in range(SECONDS * FPS):
            zoom, shake = 1 - 0.2 * n / (SECONDS * FPS), rng.normal(0, 1.5, 2)
            left, top = 300 * n / (SECONDS * FPS) * zoom + 20 + shake[0], 100 * zoom + shake[1]
            crop = wide.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + SIZE[0] * zoom, top + SIZE[1] * zoom))
            noisy = np.asarray(crop, np.float32) + rng.normal(0, 3, (SIZE[1], SIZE[0], 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy.clip(0, 255).astype(np.uint8), "rgb24")))
        container.mux(stream.encode())


def measure(frames: np.ndarray) -> dict[str, tuple[int, float]]:
    """Returns bytes and seconds of decoding of (F, h, w, 3) frames by form; raises where a form is not lossless."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    found = {}
    with tempfile.NamedTemporaryFile(prefix="omni_jax-frames-") as file:
        writer = ArrayRecordWriter(file.name, "group_size:1,zstd:1")
        writer.write(frames.tobytes())
        writer.close()
        from omni_jax.data.shards import extents

        bounds = extents(Path(file.name)).bounds
        reader = ArrayRecordReader(file.name, "readahead_buffer_size:0,max_parallelism:0")
        found["raw, zstd 1"] = bounds[1] - bounds[0], _least(lambda: np.frombuffer(reader.read([0])[0], np.uint8).reshape(frames.shape))
    forms = {"PNG": {"format": "PNG"}, "WebP, method 0": {"format": "WEBP", "lossless": True, "quality": 20, "method": 0}}
    forms["WebP, method 4"] = {"format": "WEBP", "lossless": True, "quality": 75, "method": 4}
    for name, options in forms.items():
        images = []
        for frame in frames:
            Image.fromarray(frame).save(file := io.BytesIO(), **options)
            images.append(file.getvalue())

        def decoded(images: list[bytes] = images) -> np.ndarray:
            return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])

        assert np.array_equal(decoded(), frames), name
        found[name] = sum(map(len, images)), _least(decoded)
    return found


def _least(action: object, times: int = 5) -> float:
    """The least CPU seconds of several calls: what other work on the machine changes least."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        action()  # type: ignore[operator]
        taken.append(time.process_time() - begun)
    return min(taken)


def run(photographs: str) -> dict[str, tuple[float, float]]:
    """Returns megabytes and milliseconds of decoding of a clip by form, and prints a row of a table for each."""
    from omni_jax.config import preset
    from omni_jax.data.loading import load_training_clip
    from omni_jax.types import Record

    photos = sorted(p for p in Path(photographs).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="omni_jax-frames-") as folder:
        for number in range(CLIPS):
            path = Path(folder) / f"{number}.mp4"
            write_video(path, Image.open(photos[number % len(photos)]), number)
            clip = load_training_clip((Record(str(number), "a", video=path), preset("training")))
            assert clip.video is not None
            rows.append((clip.video.frames.nbytes, measure(np.ascontiguousarray(clip.video.frames))))
    size = sum(size for size, _ in rows)
    print(f"{CLIPS} clips, frames of {size / CLIPS / 1e6:.2f} MB each")
    print("| form | MB a clip | of raw | decoding, ms a clip |\n|---|---|---|---|")
    found = {}
    for name in rows[0][1]:
        stored, seconds = (float(np.mean([made[name][n] for _, made in rows])) for n in range(2))
        found[name] = stored / 1e6, 1e3 * seconds
        print(f"| {name} | {stored / 1e6:.2f} | {100 * stored * CLIPS / size:.0f} % | {1e3 * seconds:.1f} |")
    return found


if __name__ == "__main__":
    run(sys.argv[1])
