"""The short form of part `long`: a process that is watched, and what counts as growth."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tools.torture import long
from tools.torture.long import Sample
from tools.torture.outcome import Outcome

STEADY = [Sample(n / 40, 1000 + n % 3, 10, 5) for n in range(40)]


def test_growth_files_threads_and_late_compilations_are_losses() -> None:
    said = "Compiling a\n\nWARM\nan update\n"
    for samples, text, words in (
        (STEADY, said, ""),
        ([Sample(s.done, s.memory + int(100 * s.done), s.files, s.threads) for s in STEADY], said, "memory grew by 4."),
        ([Sample(s.done, s.memory, s.files + int(4 * s.done), s.threads) for s in STEADY], said, "files went from 11 to 13"),
        ([Sample(s.done, s.memory, s.files, s.threads + int(4 * s.done)) for s in STEADY], said, "threads went from 6 to 8"),
        (STEADY, said + "Compiling b\n", "1 programs compiled after warm-up"),
        (STEADY[:5], said, "too few looks"),
    ):
        outcome = Outcome("long", 0)
        long.judge(outcome, "work", samples, text)
        assert len(outcome.lost) == bool(words) and words in "".join(outcome.lost), (outcome.lost, words)


def test_a_run_out_of_time_is_judged_by_what_it_made_and_says_so() -> None:
    half = [Sample(s.done / 2, s.memory + int(100 * s.done), s.files, s.threads) for s in STEADY]
    outcome = Outcome("long", 0)
    made, samples = long._reached(outcome, "updates", 2000, half, long.OUT_OF_TIME)
    assert made == 975 and outcome.notes == ["out of time: 975 of 2,000 updates"] and outcome.lost == []
    long.judge(outcome, "work", samples, "WARM")
    assert len(outcome.lost) == 1 and "memory grew by" in outcome.lost[0]
    long._reached(outcome, "updates", 2000, half[:3], long.OUT_OF_TIME)
    assert "out of time before updates had begun well" in outcome.lost[-1]
    assert long._reached(outcome, "updates", 2000, half, 0) == (2000, half)


@pytest.mark.costly
def test_a_process_is_watched_from_outside(tmp_path: Path) -> None:
    code = "import sys, time\nfor i in range(12):\n print('Compiling', i, flush=True)\n open(sys.argv[1], 'a').write('x')\n time.sleep(0.1)"
    place = tmp_path / "done"
    command = [sys.executable, "-c", code, str(place)]
    samples, said, status = long.watch(
        command, dict(os.environ), tmp_path / "log", lambda: len(place.read_text()) / 12 if place.exists() else 0.0, 60
    )
    late = long.watch([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), tmp_path / "late", lambda: 0.0, 0.3)
    assert late[2] == long.OUT_OF_TIME
    assert status == 0 and len(samples) >= 3 and max(s.done for s in samples) > samples[0].done and samples[-1].memory > 1 << 20
    assert "Compiling 0" in said.partition("\nWARM\n")[0] and "Compiling 11" in said.partition("\nWARM\n")[2]
