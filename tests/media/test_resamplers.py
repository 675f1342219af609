"""How far our resampler (soxr HQ, as librosa's) is from torchaudio's default, which mteb uses: the figures of docs/guides/evaluation.md.

torchaudio's wheels want a CUDA build of torch, so its published formula stands here: windowed sinc, width 6, roll-off 0.99, Hann. It was
compared with `torchaudio.functional.resample` of 2.11 once: 7e-6 of full scale apart, at 8, 22.05, 32, 44.1 and 48 kHz.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import soxr

RATE, WIDTH, ROLL_OFF = 16_000, 6, 0.99


def sinc_hann(samples: np.ndarray, rate: int) -> np.ndarray:
    """(N,) at a rate to (ceil(N * 16000 / rate),) float64."""
    common = math.gcd(rate, RATE)
    old, new = rate // common, RATE // common
    band = min(old, new) * ROLL_OFF
    reach = math.ceil(WIDTH * old / band)
    times = (np.arange(-reach, reach + old) / old - np.arange(new)[:, None] / new) * band
    times = np.clip(times, -WIDTH, WIDTH)
    kernels = np.sinc(times) * np.cos(times * np.pi / WIDTH / 2) ** 2 * band / old
    padded = np.pad(samples.astype(np.float64), (reach, reach + old))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])[::old]
    return (windows @ kernels.T).ravel()[: math.ceil(new * len(samples) / old)]


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_the_distance_to_torchaudio_is_the_one_that_the_page_states(rate: int) -> None:
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(8 * rate))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    pink = np.fft.irfft(spectrum, 8 * rate).astype(np.float32)
    ours, theirs = (np.fft.rfft(x) for x in (soxr.resample(pink, rate, RATE, quality="HQ"), sinc_hann(pink, rate)))
    assert len(ours) == len(theirs)
    hertz = np.fft.rfftfreq(8 * RATE, 1 / RATE)

    def apart(low: float, high: float) -> float:
        band = (hertz >= low) & (hertz < high)
        return float(np.linalg.norm(ours[band] - theirs[band]) / np.linalg.norm(ours[band]))

    assert apart(20, 5000) < 0.001
    assert 0.017 < apart(20, 7000) < 0.019
    assert 0.067 < apart(20, 8000) < 0.071
