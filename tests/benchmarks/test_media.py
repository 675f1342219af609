"""The media benchmark at a tiny size: equal pictures, every figure there. No time is asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax.media.video import read_frames
from tools.benchmarks import media


def test_a_long_file_repeats_a_short_one(tmp_path: Path) -> None:
    short = media.write_clip(tmp_path / "short.mp4", 96, 64, 60)
    long = media.repeat_clip(short, tmp_path / "long.mp4", 3)
    once, thrice = read_frames(short, 4), read_frames(long, 12)
    assert (once.num_frames, thrice.num_frames) == (240, 720)
    assert np.array_equal(thrice.frames[0], once.frames[0])


@pytest.mark.reference
def test_run_compares_the_pictures_and_gives_every_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(media, "REPEATS", {"10 s": 1, "20 s": 2})
    results = media.run(pairs=1, sizes={"tiny": (96, 64)}, groups=(60,))
    assert len(results) == 6
    assert results["ratio_lowest"] > 0 and results["ratio_prepared_lowest"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 4
