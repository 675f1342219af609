"""The comparison itself: each kind accepts what is within its limit and names the worst place where it is not."""

import ml_dtypes
import numpy as np
import pytest

from tests.tolerances import SPREADS, TOLERANCES, assert_close


def test_equal_arrays_pass_under_every_entry() -> None:
    for name, (kind, limit) in TOLERANCES.items():
        assert kind in ("absolute", "relative", "cosine", "exact") and limit >= 0, name
        assert_close(np.arange(1.0, 7.0).reshape(2, 3), np.arange(1.0, 7.0).reshape(2, 3), name)


def test_absolute_limit_names_the_worst_place() -> None:
    want = np.zeros((2, 3))
    got = want.copy()
    got[1, 2] = 2 * TOLERANCES["pixel_values"][1]
    with pytest.raises(AssertionError, match=r"pixel_values.*\(1, 2\)"):
        assert_close(got, want, "pixel_values")


def test_relative_limit_is_of_the_largest_reference_value() -> None:
    want = np.array([1000.0, 0.0])
    step = TOLERANCES["encoder"][1] * 1000
    assert_close(want + np.array([0, 0.9 * step]), want, "encoder")
    with pytest.raises(AssertionError, match="encoder"):
        assert_close(want + np.array([0, 1.1 * step]), want, "encoder")


def test_cosine_takes_the_worst_row() -> None:
    want = np.eye(3)
    got = want.copy()
    got[2] = [0, 1, 0]
    with pytest.raises(AssertionError, match=r"row \(2,\)"):
        assert_close(got, want, "file_to_embedding_cosine")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_never_passes(value: float) -> None:
    with pytest.raises(AssertionError, match="not finite"):
        assert_close([value, 1.0], [value, 1.0], "encoder")


def test_exact_compares_bits() -> None:
    nan = np.array([np.nan, 1.0], np.float32)
    assert_close(nan, nan.copy(), "round_trip")
    assert_close(nan.astype(ml_dtypes.bfloat16), nan.astype(ml_dtypes.bfloat16), "round_trip")
    for got, want in (
        (np.array([0.0], np.float32), np.array([-0.0], np.float32)),
        (np.array([1.0], np.float32), np.array([1.0], np.float64)),
        (np.ones(2, ml_dtypes.bfloat16), np.array([1, 1.0078125], ml_dtypes.bfloat16)),
        (np.array([1, 2]), np.array([1, 3])),
    ):
        with pytest.raises(AssertionError, match="round_trip"):
            assert_close(got, want, "round_trip")


def test_the_spread_of_a_run_widens_a_limit_and_never_narrows_it() -> None:
    limit = TOLERANCES["loss"][1]
    assert_close(0.9 * limit, 0.0, "loss", spread=limit / 100)
    assert_close(SPREADS * limit, 0.0, "loss", spread=limit)
    with pytest.raises(AssertionError, match="loss"):
        assert_close(1.1 * SPREADS * limit, 0.0, "loss", spread=limit)


def test_shape_is_compared_before_values() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.zeros((1, 3)), np.zeros(3), "embed")
