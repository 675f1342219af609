"""Features of one waveform are computed once: the pipelines of these tests read the same few clips over and over."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from omni_jax.features import audio


@pytest.fixture(scope="package", autouse=True)
def features_computed_once() -> Iterator[None]:
    compute, known = audio._segment, {}

    def remembered(waveform: np.ndarray) -> audio.AudioSegment | None:
        key = waveform.dtype.str, waveform.tobytes()
        if key not in known:
            known[key] = compute(waveform)
            if known[key] is not None:
                for array in (known[key].log_mel, known[key].fbank):
                    array.flags.writeable = False  # the next reader gets the same
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "_segment", remembered)
        yield
