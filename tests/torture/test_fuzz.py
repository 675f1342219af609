"""The short form of part `fuzz`: everything the fuzzers ever found, again, and some hundreds of new inputs a target."""

from __future__ import annotations

import pytest

from tools.torture import fuzz
from tools.torture.fuzz_targets import SEEDS, TARGETS, WORDS

KEPT = [(name, path.name) for name in TARGETS for path in fuzz.corpus(name)]


def test_golden_corpus_of_findings_is_clean() -> None:
    assert KEPT, "the corpus is gone"
    for name, file in KEPT:
        TARGETS[name]((fuzz.CORPUS / name / file).read_bytes())


@pytest.mark.jit
@pytest.mark.parametrize("name", TARGETS)
def test_golden_some_hundreds_of_mutations(name: str) -> None:
    fuzzer = fuzz.Fuzzer(TARGETS[name], list(SEEDS[name]), WORDS[name], 0)
    fuzzer.run(30, most=400)
    assert fuzzer.found == {}
    assert fuzzer.tried == 400


@pytest.mark.costly
def test_the_fuzzer_finds_what_is_behind_several_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that fails far from every seed: coverage leads there, and the finding names the error and its place."""
    from omni_jax.io.safetensors_io import dtype_name

    def target(data: bytes) -> None:
        dtype_name("float32")  # a line of the project's, so that a trace exists
        if data[:1] == b"F" and data[1:2] == b"\xff":
            raise KeyError("deep")

    fuzzer = fuzz.Fuzzer(target, [b"A\x00"], (b"F", b"\xff"), 0)
    fuzzer.run(20, most=20_000)
    ((what, data),) = fuzzer.found.items()
    assert what.startswith("KeyError at test_fuzz.py:") and data[:2] == b"F\xff"


def test_an_input_that_takes_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 0.2)

    def target(data: bytes) -> None:
        while True:
            pass

    fuzzer = fuzz.Fuzzer(target, [b"x"], (b"y",), 0)
    fuzzer.attempt(b"x")
    assert fuzzer.found == {"took over 0 s": b"x"}
