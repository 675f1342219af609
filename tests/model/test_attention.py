"""Attention kernels agree: the splash kernel, interpreted on the CPU, against the products under the written mask."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import ConfigError
from omni_jax.model.attention import choose, pooled_attention, row_attention, row_mask, splash_ids, splash_mask
from omni_jax.parallel import make_mesh
from omni_jax.train.remat import REMAT
from tests.model.builders import noise
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

ROWS, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 150, 4, 2, 64  # no multiple of 128

# (segment, branch, tokens), from the left.
PACKED = [
    [(1, 0, 40), (1, 1, 9), (1, 2, 11), (2, 0, 30), (3, 1, 20), (0, 0, 40)],  # branches, a prompt, a prompt numbered 1, padding
    [(0, 0, 5), (1, 0, 1), (2, 0, 60), (2, 1, 4), (2, 2, 50), (3, 0, 30)],  # padding first, a single token
]
LEADING = [  # prompts of 128 tokens at most, those with branches first
    [(1, 0, 80), (1, 1, 9), (1, 2, 11), (2, 0, 120), (3, 0, 128), (4, 0, 36), (0, 0, 100)],
    [(1, 0, 100), (1, 1, 4), (1, 2, 24), (2, 0, 1), (3, 0, 128), (4, 0, 99), (5, 0, 128)],
]
PLAIN_ROWS = [[(1, 0, 100), (2, 0, 50)], [(1, 0, 70), (2, 0, 40), (0, 0, 40)]]


def ids(rows: list[list[tuple[int, int, int]]]) -> tuple[jax.Array, jax.Array]:
    """(segment, branch), each (R, S) int32."""
    each = [np.concatenate([np.tile([[s], [b]], (1, n)) for s, b, n in row], axis=1) for row in rows]
    segment, branch = np.stack(each, axis=1).astype(np.int32)
    return jnp.asarray(segment), jnp.asarray(branch)


def inputs(tokens: int = TOKENS) -> tuple[jax.Array, ...]:
    shapes = (ROWS, tokens, HEADS, WIDTH), (ROWS, tokens, KV_HEADS, WIDTH), (ROWS, tokens, KV_HEADS, WIDTH)
    return tuple(jnp.asarray(noise(i, *shape)) for i, shape in enumerate(shapes))


CASES = {"branches": (PACKED, 2, 0), "segments": (PLAIN_ROWS, 0, 0), "unused": (PLAIN_ROWS, 2, 0), "reach": (LEADING, 2, 128)}


@pytest.mark.parametrize(("rows", "branches", "reach"), CASES.values(), ids=CASES)
def test_splash_ids_and_mask_are_the_row_mask(rows: list, branches: int, reach: int):
    segment, branch = ids(rows)
    tokens = segment.shape[1]
    query, key = splash_ids(segment, branch, max(branches, 1), reach)
    mask = splash_mask(tokens, key.shape[1], causal=True, reach=reach)
    seen = (np.asarray(query)[:, :, None] == np.asarray(key)[:, None, :]) & mask
    # Each key is met once, in whichever copy; what padding sees of other padding does not count.
    met = np.zeros((ROWS, tokens, tokens), int)
    for start in range(0, key.shape[1], tokens):
        part = seen[:, :, start : start + tokens]
        met[:, :, : part.shape[2]] += part
    used = np.asarray(segment)[:, :, None] > 0 if reach else True
    np.testing.assert_array_equal(met * used, np.asarray(row_mask(segment, branch)) * used)


def test_reach_leaves_out_blocks_of_pairs():
    """Five blocks of 128: the diagonal and one before it, and the first block alone again for a second branch."""
    whole, near = (splash_mask(640, 640 + size, causal=True, reach=reach) for size, reach in ((640, 0), (128, 128)))
    counts = [mask.reshape(5, 128, -1, 128).any(axis=(1, 3)).sum() for mask in (whole, near)]
    assert counts == [2 * 15, 5 + 4 + 1]


@pytest.mark.parametrize(
    ("rows", "branches", "reach"), [CASES[name] for name in ("branches", "segments", "reach")], ids=["branches", "segments", "reach"]
)
def test_splash_agrees_with_plain(rows: list, branches: int, reach: int):
    segment, branch = ids(rows)
    tokens = segment.shape[1]
    weight = jnp.asarray(noise(7, ROWS, tokens, HEADS * WIDTH))
    read = (segment > 0)[..., None] | (reach == 0)  # padding sees less of other padding within a reach

    def run(kernel: str):
        def weighed(q, k, v):
            out = row_attention(segment, branch, kernel=kernel, branches=branches, reach=reach)(q, k, v) * read
            return jnp.sum(out * weight), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))(*inputs(tokens))
        return out, gradients

    (plain, by_plain), (splash, by_splash) = run("plain"), run("splash_interpret")
    assert_close(splash, plain, "attention_kernel")
    for got, want in zip(by_splash, by_plain, strict=True):
        assert_close(got, want, "attention_gradient")


@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 1, 4)], ids=["rows and heads", "heads that tensor does not divide"])
def test_splash_on_a_mesh_gives_each_device_its_rows_and_heads(sizes: tuple[int, int, int]):
    segment, branch = ids(PACKED)
    want = row_attention(segment, branch)(*inputs())
    mesh = make_mesh(*sizes, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        program = jax.jit(lambda q, k, v: row_attention(segment, branch, kernel="splash_interpret")(q, k, v))
        assert_close(program(*inputs()), want, "attention_kernel")


@pytest.mark.parametrize("meshed", [False, True])
def test_remat_attention_does_not_run_the_kernel_again(meshed: bool):
    """Forward, and for the gradients of q and of k and v; once more under "layer", where nothing of the kernel is kept."""
    segment, branch = ids(PACKED)

    def layer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(row_attention(segment, branch, kernel="splash_interpret")(jnp.sin(q), k, v)))

    def loops(remat: str) -> int:  # what is interpreted runs its kernel's grid in loops
        kept = layer if REMAT[remat] is None else jax.checkpoint(layer, policy=REMAT[remat])
        program = jax.jit(jax.value_and_grad(kept, argnums=(0, 1, 2)))
        with jax.set_mesh(make_mesh(1, 2, 2, devices=jax.devices()[:4])) if meshed else contextlib.nullcontext():
            return program.lower(*inputs()).as_text().count("stablehlo.while")

    assert loops("layer") > loops("attention") == loops("none") > 0


@pytest.mark.parametrize("causal", [True, False])
def test_pooled_tokens_attend_as_in_their_row(causal: bool):
    segment, branch = ids(PACKED if causal else PLAIN_ROWS)
    pool = jnp.array([[48, 59, 89, 0], [5, 149, 119, 65]])
    q, k, v = inputs()
    at = jnp.arange(ROWS)[:, None], pool
    whole = row_attention(segment, branch, causal=causal)(q, k, v)
    assert_close(pooled_attention(segment, branch, pool, causal=causal)(q[at], k, v), whole[at], "attention_kernel")


def test_auto_takes_the_platforms_kernel():
    assert [choose("auto", platform) for platform in ("tpu", "gpu", "cpu")] == ["splash", "plain", "plain"]
    assert choose("plain", "tpu") == "plain"
    with pytest.raises(ConfigError, match="attention 'flash': choose one of"):
        choose("flash", "tpu")
