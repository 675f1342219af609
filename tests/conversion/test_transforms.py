import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.conversion.transforms import Identity, KeepAxis, PatchKernel, ReverseAxes
from tests.tolerances import assert_close

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
SIDE = st.integers(1, 9)
CASES = st.one_of(
    st.tuples(st.just(Identity()), st.lists(SIDE, min_size=1, max_size=3)),
    st.tuples(st.just(ReverseAxes()), st.lists(SIDE, min_size=2, max_size=3)),
    st.lists(SIDE, min_size=2, max_size=4).flatmap(
        lambda inner: st.tuples(st.just(PatchKernel(tuple(inner))), st.builds(lambda e: [e, *inner], SIDE))
    ),
    SIDE.map(lambda n: (KeepAxis(3, 2), [1, 1, n])),
    SIDE.map(lambda n: (KeepAxis(4, 1), [1, n, 1, 1])),
)


@given(CASES, st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_inverse_undoes_forward_bit_for_bit(case, dtype, seed):
    transform, shape = case
    bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)  # every pattern, NaN and -0.0 included
    tensor = np.frombuffer(bits, dtype).reshape(shape)
    leaf = transform.forward(tensor)
    assert transform.torch_shape(leaf.shape) == tensor.shape
    assert leaf.flags.c_contiguous
    assert_close(transform.inverse(leaf), tensor, "round_trip")


def test_large_transpose_is_a_transpose():
    tensor = np.arange(300 * 1000, dtype=np.int32).reshape(300, 1000)  # larger than a tile, not a multiple of one
    assert np.array_equal(ReverseAxes().forward(tensor), tensor.T)


def test_patch_kernel_rows_follow_channel_frame_row_column():
    tensor = np.arange(5 * 3 * 2 * 4 * 4).reshape(5, 3, 2, 4, 4)
    leaf = PatchKernel((3, 2, 4, 4)).forward(tensor)
    assert leaf[((1 * 2 + 1) * 4 + 2) * 4 + 3, 4] == tensor[4, 1, 1, 2, 3]


@pytest.mark.parametrize("transform", [Identity(), ReverseAxes()])
def test_rows_of_a_tensor_are_a_slice_of_the_leaf(transform):
    tensor = np.arange(6 * 4).reshape(6, 4)
    leaf = transform.forward(tensor)
    assert np.array_equal(transform.forward(tensor[2:5]), np.take(leaf, range(2, 5), axis=transform.row_axis))
