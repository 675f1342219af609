"""Every tolerance of the tests, in one table: nothing is compared with a number that stands elsewhere.

An entry is (kind, limit):
  absolute  max |actual - expected| <= limit
  relative  max |actual - expected| <= limit * max |expected|
  cosine    smallest cosine between rows (last axis) >= limit
  exact     equal in shape and in every value

float32 on CPU unless the name says otherwise. Adding an entry needs a reason beside it; loosening one needs a CHANGELOG entry.

Several updates in a row amplify rounding: at temperature 0.03 a start changed by 1e-7 of each value moves the losses of six updates by
1e-3. How much depends on the golden set, so the test of such a run measures it (`spread`) and allows SPREADS times as much, or the
entry's limit where that is more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TOLERANCES: dict[str, tuple[str, float]] = {
    # From the media file to the model's inputs.
    "frame_index": ("exact", 0.0),
    "frames": ("exact", 0.0),  # the same decoder and colour conversion as the reference's
    "token_ids": ("exact", 0.0),
    "position_ids": ("exact", 0.0),
    "pixel_values": ("absolute", 1e-5),
    "log_mel": ("absolute", 1e-4),
    "fbank": ("absolute", 2e-3),
    "waveform": ("absolute", 1e-3),
    # The same track read block by block, or entered by seeking: float32 sums in another order, and an AAC frame's overlap.
    "resampled": ("absolute", 1e-5),
    # The same samples from a file and from memory: resampled in blocks of other lengths.
    "waveform_in_memory": ("absolute", 1e-6),
    # Encoder outputs against the PyTorch reference. Its own distance between float32 and float64 is about 1e-6 of the largest entry.
    "encoder": ("relative", 5e-5),
    "whisper_tokens": ("relative", 5e-5),
    "beats_features": ("relative", 5e-5),
    "beats_tokens": ("relative", 5e-5),
    "video_tokens": ("relative", 5e-5),
    "last_token_hidden": ("relative", 5e-5),
    "embed": ("relative", 5e-5),
    # One layer or block against a plain NumPy rewrite: fewer roundings than a tower.
    "layer": ("relative", 1e-5),
    # The same rows from media files through the command line (decoder, resampler and resize included).
    "file_to_embedding_cosine": ("cosine", 0.9999),
    # The same embedding alone, in a mixed batch, under a larger bucket, on other meshes.
    "invariance": ("absolute", 1e-5),
    # A row in int8, 127 steps to its largest value, against itself in float32.
    "int8_cosine": ("absolute", 1e-3),
    "sharding": ("absolute", 1e-5),
    # Converters: bytes in are bytes out.
    "round_trip": ("exact", 0.0),
    # PEFT's projections on the exported adapter, float32.
    "adapter_projection": ("relative", 1e-5),
    # Training against the reference, from recorded inputs through the whole model: losses, gradients of their largest entry, parameters
    # after six updates, gradient norms. The reference's own float32-to-float64 distances are 2e-6, 6e-6, 3e-7.
    "loss": ("absolute", 1e-4),
    "gradient": ("relative", 2e-4),
    "parameter": ("absolute", 2e-5),
    "gradient_norm": ("relative", 1e-4),
    "learning_rate": ("relative", 1e-6),
    # The same attention by another kernel: values, and gradients of their largest entry.
    "attention_kernel": ("absolute", 1e-5),
    "attention_gradient": ("relative", 1e-4),
    # The same update by other roads: gradient caching, another remat policy, a mesh, one shared row instead of two.
    "gradient_cache": ("relative", 1e-5),
    "update_loss": ("absolute", 1e-5),
    # A central difference of a float32 loss: its rounding over the step, against a slope of about 1.
    "finite_difference": ("relative", 2e-2),
    # What cancels in exact arithmetic, in float64: rounding of sums of some tens of terms.
    "float64_rounding": ("relative", 1e-12),
    # float32 optimizer against the formulas in float64.
    "optimizer": ("absolute", 1e-6),
    # The losses alone, from recorded embeddings; a reordered or rescaled batch; float64 differences of their gradients in float32.
    "loss_from_embeddings": ("absolute", 1e-5),
    "loss_invariance": ("absolute", 1e-5),
    "loss_gradient": ("relative", 1e-4),
    # One device, eight under jit, eight under shard_map, and a case by hand; of a gradient by its own largest entry.
    "loss_sharding": ("absolute", 1e-6),
    "loss_sharding_gradient": ("relative", 1e-6),
    # A gradient against central differences of float32 outputs: their rounding over the step.
    "slope": ("relative", 1e-3),
    # bfloat16 against float32: 8 bits of mantissa through a tower; the direction must stay.
    "bfloat16_cosine": ("cosine", 0.99),
    # Weights in int8 against float32: measured 0.9985 and 0.9964 on the tiny golden sets; 0.9989 and 0.9738 where some channels of what
    # every layer multiplies are 30 times as large as the others, which a dynamic product rounds by the largest.
    "int8_embedding": ("cosine", 0.998),
    "int8_dynamic_embedding": ("cosine", 0.996),
    "int8_outliers": ("cosine", 0.998),
    "int8_dynamic_outliers": ("cosine", 0.97),
    # Of trained weights, from mp4 files: measured 0.99985 and 0.99968 on the whole demo's model, in bfloat16.
    "int8_trained": ("cosine", 0.9995),
    "int8_dynamic_trained": ("cosine", 0.999),
    # Retrieval figures are counts and short sums in float64.
    "metric": ("absolute", 1e-9),
    # mteb's figures, which are rounded to five places, against ours rounded likewise; before it rounds, float32 scores in another order.
    "mteb_score": ("absolute", 1e-6),
    # A probability estimated from thousands of random draws, against the exact one: about four standard errors of 4,000 draws near 0.3.
    "resampled_probability": ("absolute", 0.03),
    # The ends of a bootstrap interval of 4,000 records, percent, against the normal law: the wobble of 2,000 resamples.
    "interval_percent": ("absolute", 0.2),
    # float32 cosines shown beside a query: a row sum against a matrix product.
    "cosine_shown": ("absolute", 1e-6),
    # Means over hundreds of points scattered by 0.01 around their centre.
    "cloud": ("absolute", 5e-3),
    # A float32 cosine against float64; int8 keeps half a step of a row's largest value in 127; the step itself, a float32 division.
    "cosine_score": ("absolute", 1e-6),
    "int8": ("relative", 0.5 / 127 + 1e-6),
    "int8_scale": ("absolute", 1e-8),
    # Published averages, each rounded to two places: the mean of two of them against a third.
    "published_percent": ("absolute", 0.0101),
    # Operations counted by hand on a page, three digits, against the code: what the project asks of the page.
    "hand_count": ("relative", 0.02),
}


SPREADS = 3
"""Distance allowed between two runs of several updates, over the largest distance that roundings of the start alone made."""


def assert_close(actual: Any, expected: Any, name: str, *, spread: float = 0.0) -> None:
    """Raises AssertionError unless `actual` agrees with `expected` as the entry `name` of TOLERANCES says.

    The message names the entry, the worst place, both values there and the distance against the limit. NaN or infinity on either side
    fails, and so does a difference in shape.

    Args:
      spread: largest distance of the same values between runs of our own whose starts differ by rounding; of several updates alone.
    """
    kind, limit = TOLERANCES[name]
    got, want = np.asarray(actual), np.asarray(expected)
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {got.shape}, expected {want.shape}")
    if kind == "exact":
        if got.dtype.kind in "fV":  # bit for bit, so that NaN payloads, -0.0 and bfloat16 count as well
            same = _bits(got) == _bits(want) if got.dtype == want.dtype else np.zeros(got.shape, bool)
        else:
            same = got == want
        if not np.all(same):
            place = _place(np.argmin(same), got.shape)
            raise AssertionError(
                f"{name}: {np.size(same) - np.count_nonzero(same)} of {np.size(same)} values differ; first at {place}: {got[place]!r}, "
                f"expected {want[place]!r} ({got.dtype}, {want.dtype})"
            )
        return
    got, want = got.astype(np.float64), want.astype(np.float64)
    for side, array in (("actual", got), ("expected", want)):
        if not np.isfinite(array).all():
            raise AssertionError(f"{name}: {side} is not finite at {_place(np.argmin(np.isfinite(array)), array.shape)}")
    if got.size == 0:
        return
    if kind == "cosine":
        norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1)
        cosine = np.sum(got * want, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
        if cosine.min() < limit:
            raise AssertionError(f"{name}: cosine {cosine.min():.6f} < {limit} at row {_place(np.argmin(cosine), cosine.shape)}")
        return
    distance = np.abs(got - want)
    allowed = max(limit * np.abs(want).max() if kind == "relative" else limit, SPREADS * spread)
    if distance.max() > allowed:
        place = _place(np.argmax(distance), got.shape)
        raise AssertionError(
            f"{name}: |difference| {distance.max():.3e} > {allowed:.3e} ({kind} {limit:g}) at {place}: {got[place]:.9g}, "
            f"expected {want[place]:.9g}; {np.count_nonzero(distance > allowed)} of {distance.size} values are too far"
        )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


def _place(flat: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(flat), shape)) if shape else ()
