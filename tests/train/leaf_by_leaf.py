"""Gradients compared leaf by leaf, each with its own largest entry: a small leaf must not hide behind a large one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tests.tolerances import TOLERANCES, assert_close

ENTRY = "gradient_cache"

# A key's bias adds the same to all scores of a query, which softmax takes away again: the gradient is zero (in float64 nothing changes with
# the bias: tests/model/test_beats.py), and what float32 leaves of it is rounding, without a size of its own. It sums the terms that the
# kernel's gradient sums, there multiplied by a normalised input, so that the kernel's largest entry says how large those terms are. Of the
# stacks BEATs alone is so: rotary positions turn a bias differently at each key, and Whisper's keys have none.
VANISHING = {"beats/layers/attn/k/bias": "beats/layers/attn/k/kernel"}


def assert_same_gradients(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    """Asserts that each leaf agrees within "gradient_cache" of its own largest entry, and that those which vanish do on both sides."""
    assert got.keys() == want.keys()
    for name in want:
        one, other = np.asarray(got[name]), np.asarray(want[name])
        if name in VANISHING:
            limit = TOLERANCES[ENTRY][1] * float(np.abs(want[VANISHING[name]]).max())
            assert max(float(np.abs(x).max()) for x in (one, other)) <= limit, name
            continue
        try:
            assert_close(one, other, ENTRY)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
