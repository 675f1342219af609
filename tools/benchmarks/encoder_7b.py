"""The 7B shape with random bfloat16 weights on one GPU or TPU: clips/s, tokens/s, model FLOP/s and share of the device's peak.

Stands alone: needs jax, flax, optax, einops and numpy, the repository's root as working directory, and about 19 GB for the weights (twice
that where torch runs beside). Where torch is installed for the same kind of device, the same forward in plain torch modules (bfloat16,
scaled_dot_product_attention, eager) is timed in turn with ours, on equal arrays. A clip is 8 frames of 168 x 252, 8 s of audio and 20
tokens of text: one prompt of 640 tokens, nothing padded.

Run: python -m tools.benchmarks.encoder_7b [--batch 1 8 32] [--pairs 5] [--no-torch] [--layers N] [--width N] [--json FILE]
`--layers 2 --width 256` tries it on any CPU in seconds.

Letters: N clips, P patches, S tokens, D decoder width.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Both frameworks share the device: jax must not take all of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, ModelConfig, SpecialTokens, VisionConfig
from omni_jax.model import Encoder, abstract_encoder, abstract_params, with_params
from omni_jax.types import AudioBatch, BeatsBatch, EncoderBatch, RowBatch, VisionBatch
from tools.benchmarks.forward_work import forward_work, total
from tools.benchmarks.timing import PAIRS, clock, interleave

# Dense bfloat16 products, TFLOP/s of one device as jax counts devices (makers' data sheets). The first name found in the kind holds.
PEAKS = (
    ("H100 PCIe", 756),
    ("H100", 989),
    ("H200", 989),
    ("A100", 312),
    ("TPU v6", 918),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v4", 275),
)
GRID = (4, 12, 18)  # temporal steps, rows and columns of patches
SECONDS = 8
TEXT = 20
PRODUCT = 8192  # side of the square matrices whose product stands for what the device reaches


def peak_tflops(kind: str) -> float | None:
    """Returns the peak of a device kind, None for one that the table does not hold."""
    return next((peak for name, peak in PEAKS if name in kind), None)


def shape_7b(layers: int = 28, width: int = 3584) -> ModelConfig:
    """Returns the settings of the 7B model; fewer layers or less width (a multiple of 128) shrink decoder and towers together."""
    heads = width // 128
    tower = min(1280, width)
    small = (layers, width) != (28, 3584)
    depth = min(layers, 32) if small else 32
    beats = min(768, width)
    return ModelConfig(
        decoder=DecoderConfig(
            hidden_size=width,
            intermediate_size=18944 * width // 3584,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=math.gcd(heads, 4),
            vocab_size=1024 if small else 152064,
        ),
        vision=VisionConfig(
            hidden_size=tower,
            intermediate_size=3420 * tower // 1280,
            num_layers=depth,
            num_heads=16 if tower == 1280 else tower // 64,
            output_size=width,
            full_attention_layers=tuple(i for i in (7, 15, 23, 31) if i < depth),
        ),
        audio=AudioConfig(hidden_size=tower, intermediate_size=4 * tower, num_layers=depth, num_heads=tower // 64, output_size=width),
        beats=BeatsConfig(num_layers=min(12, depth), hidden_size=beats, intermediate_size=4 * beats, num_heads=beats // 64),
        tokens=SpecialTokens(pad=0, audio=1, audio_bos=2, audio_eos=3, video=4, vision_bos=5, vision_eos=6),
    )


def random_weights(config: ModelConfig, dtype: Any) -> Encoder:
    """Returns an encoder whose weights were made on the device, leaf by leaf, in `dtype`: no copy of another width, no large scratch."""

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        if path[-1] in ("scale", "gate_scale", "g"):
            return jnp.ones(shape, dtype)
        if path[-1] == "bias":
            return jnp.zeros(shape, dtype)
        # A hash of the element's number: elementwise, so that the compiler writes it straight into the result.
        number = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            number = number * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        number = (number ^ (number >> 16)) * np.uint32(0x7FEB352D)
        number = (number ^ (number >> 15)) * np.uint32(0x846CA68B)
        return ((number >> 8).astype(jnp.float32) * (2.0**-24) - 0.5).astype(dtype) * dtype(0.02 * 12**0.5)

    make = jax.jit(leaf, static_argnums=(0, 1))
    leaves = {path: make(path[-1:], spec.shape) for path, spec in abstract_params(config, dtype).items()}
    return with_params(abstract_encoder(config, param_dtype=dtype), leaves)


def full_batch(config: ModelConfig, clips: int, *, grid: tuple[int, int, int] = GRID, seconds: int = SECONDS) -> EncoderBatch:
    """Returns a batch with nothing padded: one prompt a row, its media tokens in the order video, audio."""
    rng = np.random.default_rng(0)
    t, h, w = grid
    merge, side = config.vision.merge_size, config.vision.window_tokens
    y, x, i, j = np.meshgrid(np.arange(h // merge), np.arange(w // merge), np.arange(merge), np.arange(merge), indexing="ij")
    coords = np.stack([(y * merge + i).ravel(), (x * merge + j).ravel()], axis=1).astype(np.int32)
    window = ((y // side) * -(-w // (merge * side)) + x // side).ravel().astype(np.int32)
    steps, chunks, tokens = clips * t, clips * seconds * 100 // config.audio.chunk_frames, seconds * 25
    frames = (seconds * 100 - 2) // 16 * 16
    video = t * h * w // merge**2
    length = video + 2 * tokens + 4 + TEXT
    media = np.full((clips, length), -1, np.int32)
    clip = np.arange(clips)[:, None]
    media[:, 2 : 2 + video] = clip * video + np.arange(video)
    first = clips * video
    pairs = np.stack([clip * tokens + np.arange(tokens), clips * tokens + clip * tokens + np.arange(tokens)], axis=2)
    media[:, 2 + video : 2 + video + 2 * tokens] = first + pairs.reshape(clips, -1)
    ones = np.ones((clips, length), np.int32)
    row = RowBatch(
        ids=rng.integers(7, config.decoder.vocab_size, (clips, length)).astype(np.int32),
        media_index=media,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (clips, 3, length)).copy(),
        segment=ones,
        branch=0 * ones,
        pool=np.full((clips, 1), length - 1, np.int32),
    )
    return EncoderBatch(
        vision=(
            VisionBatch(
                rng.normal(size=(steps, h * w, config.vision.patch_values)).astype(np.float32),
                np.broadcast_to(coords, (steps, *coords.shape)).copy(),
                np.broadcast_to(window, (steps, *window.shape)).copy(),
            ),
        ),
        audio=(
            AudioBatch(
                rng.normal(0, 0.5, (chunks, config.audio.chunk_frames, config.audio.num_mel_bins)).astype(np.float32),
                np.full(chunks, config.audio.chunk_frames, np.int32),
            ),
        ),
        beats=(
            BeatsBatch(
                rng.normal(0, 0.5, (clips, frames, config.beats.num_mel_bins)).astype(np.float32),
                np.full(clips, frames, np.int32),
                np.full(clips, tokens, np.int32),
                tokens,
            ),
        ),
        rows=(row,),
        owners=(np.stack([np.arange(clips), np.full(clips, 6)], axis=1)[:, None].astype(np.int32),),
        used_tokens=steps * h * w // 4 + 2 * clips * tokens + clips * length,
        total_tokens=steps * h * w // 4 + 2 * clips * tokens + clips * length,
    )


def device_arrays(batch: EncoderBatch, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Returns the arrays of the forward, each placed by `put`."""
    vision, audio, beats, rows = batch.vision[0], batch.audio[0], batch.beats[0], batch.rows[0]
    return {
        "vision": tuple(map(put, (vision.patches, vision.coords, vision.window))),
        "audio": tuple(map(put, (audio.mel, audio.frames))),
        "beats": tuple(map(put, (beats.fbank, beats.frames))),
        "rows": {n: put(getattr(rows, n)) for n in ("ids", "media_index", "positions", "segment", "branch", "pool")},
    }


def jax_forward(encoder: Encoder, batch: EncoderBatch) -> tuple[Callable[[], np.ndarray], dict[str, float]]:
    """Returns a call that embeds the batch and waits, and what its compilation took: seconds, and bytes of scratch, arguments and code."""
    graph, params = nnx.split(encoder)
    tokens = batch.beats[0].max_tokens

    def forward(params: nnx.State, arrays: dict[str, Any]) -> jax.Array:
        model: Encoder = nnx.merge(graph, params)
        fbank, frames = arrays["beats"]
        parts = [model.video_tokens(*arrays["vision"]), model.whisper_tokens(*arrays["audio"]), model.beats_tokens(fbank, frames, tokens)]
        media = jnp.concatenate([p.reshape(-1, p.shape[-1]) for p in parts])
        return model.embed_rows(RowBatch(**arrays["rows"]), media)[0][:, 0]

    arrays = device_arrays(batch, jnp.asarray)
    made: list[Any] = []
    precision = "highest" if encoder.dtype == jnp.float32 else "default"

    def compile_forward() -> None:
        with jax.default_matmul_precision(precision):
            made.append(jax.jit(forward).lower(params, arrays).compile())

    facts = {"compile_seconds": clock(compile_forward)}
    memory = made[0].memory_analysis()
    if memory is not None:
        facts |= {"scratch_bytes": float(memory.temp_size_in_bytes), "argument_bytes": float(memory.argument_size_in_bytes)}
    return lambda: np.asarray(made[0](params, arrays)), facts


def torch_encoder(config: ModelConfig) -> Any:
    """Returns the plain torch encoder with random weights on the device of jax's kind, made there in the dtype of the run."""
    import torch

    from tools.benchmarks.torch_encoder import TorchEncoder

    gpu = torch.cuda.is_available()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if gpu else "cpu"):
            return TorchEncoder(config).eval()
    finally:
        torch.set_default_dtype(before)


def torch_forward(encoder: Any, batch: EncoderBatch) -> Callable[[], np.ndarray]:
    """Returns a call that embeds the batch in torch and waits."""
    import torch

    device = next(encoder.parameters()).device
    arrays = device_arrays(batch, lambda a: torch.from_numpy(a).to(device))
    rows = {n: arrays["rows"][n] for n in ("ids", "media_index", "positions", "pool")}
    rows["positions"] = rows["positions"].transpose(0, 1)
    audio = (*arrays["audio"], True)

    @torch.inference_mode()
    def call() -> np.ndarray:
        return encoder(arrays["vision"], audio, arrays["beats"][0], rows, batch.beats[0].max_tokens)[:, 0].float().cpu().numpy()

    return call


def product_tflops(dtype: Any, side: int = PRODUCT, repeats: int = 10) -> float:
    """Returns TFLOP/s of one square matrix product on the device."""
    a = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    run = lambda: multiply(a, a).block_until_ready()  # noqa: E731
    run()
    return 2 * side**3 / float(np.median([clock(run) for _ in range(repeats)])) / 1e12


def run(
    batches: Sequence[int] = (1, 8, 32), *, layers: int = 28, width: int = 3584, pairs: int = PAIRS, with_torch: bool = True, **shapes: Any
) -> dict[str, Any]:
    """Returns the figures of every batch size, and prints a line for each; `shapes` go to `full_batch`."""
    device = jax.devices()[0]
    peak = peak_tflops(device.device_kind)
    config = shape_7b(layers, width)
    encoder = random_weights(config, jnp.bfloat16)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    measured = product_tflops(jnp.bfloat16, PRODUCT if device.platform != "cpu" else 512)
    results: dict[str, Any] = {
        "device": device.device_kind,
        "peak_tflops": peak,
        "parameters": count,
        "product_tflops": measured,
        "batches": {},
    }
    print(f"{device.device_kind}: peak {peak or 'not known'} TFLOP/s, a bfloat16 product reaches {measured:.2f}; jax {jax.__version__}")
    beside = torch_encoder(config) if with_torch else None
    for size in batches:
        batch = full_batch(config, size, **shapes)
        work = total(forward_work(config, batch))
        ours, facts = jax_forward(encoder, batch)
        if beside is None:
            ours()
            seconds, theirs = float(np.median([clock(ours) for _ in range(pairs)])), None
        else:
            timed = interleave(ours, torch_forward(beside, batch), pairs)
            seconds, theirs = timed.seconds
        rate = work.needed / seconds / 1e12
        stats = device.memory_stats() or {}
        figures = facts | {
            "seconds": seconds,
            "clips_per_second": size / seconds,
            "tokens_per_second": batch.rows[0].ids.size / seconds,
            "model_tflops": rate,
            "share_of_peak": rate / peak if peak else None,
            "peak_bytes_in_use": stats.get("peak_bytes_in_use"),
            "torch_seconds": theirs,
            "ratio": theirs / seconds if theirs else None,
        }
        results["batches"][size] = figures
        print(_line(device.device_kind, size, figures), flush=True)
    return results


def _line(device: str, size: int, figures: dict[str, Any]) -> str:
    share, torch_seconds, peak = figures["share_of_peak"], figures["torch_seconds"], figures["peak_bytes_in_use"]
    parts = [
        f"{device}, batch {size}: {figures['clips_per_second']:.2f} clips/s, {figures['tokens_per_second']:.0f} decoder tokens/s",
        f"{figures['model_tflops']:.2f} model TFLOP/s" + (f" ({100 * share:.0f} % of peak)" if share else ""),
        f"compiled in {figures['compile_seconds']:.1f} s",
    ]
    if "scratch_bytes" in figures:
        parts.append(f"scratch {figures['scratch_bytes'] / 2**30:.2f} GiB")
    if peak:
        parts.append(f"peak so far {peak / 2**30:.1f} GiB")
    if torch_seconds:
        parts.append(f"torch {size / torch_seconds:.2f} clips/s, {figures['ratio']:.2f}x torch")
    return "; ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.encoder_7b", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="clips in a batch")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers; fewer shrink the towers too")
    parser.add_argument("--width", type=int, default=3584, help="decoder width, a multiple of 128")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="runs per figure, interleaved with torch's")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    chosen = parser.parse_args(arguments)
    usable = importlib.util.find_spec("torch") is not None and jax.default_backend() in ("cpu", "gpu")
    if usable and jax.default_backend() == "gpu":
        import torch

        usable = torch.cuda.is_available()
    beside = usable and not chosen.no_torch
    results = run(chosen.batch, layers=chosen.layers, width=chosen.width, pairs=chosen.pairs, with_torch=beside)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
