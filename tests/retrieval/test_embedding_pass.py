"""The embedding pass: order, grouping, overlap of host and devices, skipped records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax.retrieval.embedding_pass import (
    Part,
    assemble,
    embedding_pass,
    first_of_prompts,
    same_in_other_parts,
)
from omni_jax.retrieval.metrics import evaluate
from omni_jax.types import ClipError, EncoderBatch, Features, Record, TokenizedClip


def _clip(number: int, **options) -> TokenizedClip:
    return TokenizedClip(Features(Record(id=f"clip{number}", text=f"caption {number}"), **options), {})


def _stream(numbers, broken=()):
    for n in numbers:
        item = ClipError(f"clip{n}.mp4: broken") if n in broken else _clip(n)
        yield Record(id=f"clip{n}", text=f"caption {n}"), item


class _Encoder:
    """Stands for tokens and model: a clip's vector is its number; logs when groups start and when they are read."""

    def __init__(self, spoiled=()):
        self.log: list[tuple[str, tuple[int, ...]]] = []
        self.spoiled = spoiled

    def plan(self, clips):
        self.numbers = tuple(int(c.features.record.id.removeprefix("clip")) for c in clips)
        return EncoderBatch(
            vision=(), audio=(), beats=(), rows=(), owners=(), used_tokens=3 * len(clips), total_tokens=4 * len(clips), truncated=1
        )

    def encode(self, batch):
        numbers = self.numbers
        self.log.append(("start", numbers))

        def read():
            self.log.append(("read", numbers))
            for table in ("video", "text"):
                for clip in reversed(range(len(numbers))):
                    value = self.spoiled[numbers[clip]] if numbers[clip] in self.spoiled else numbers[clip] + 1.0
                    yield clip, table, np.array([value, 0 if table == "text" else value], np.float32)

        return read()


def _embed(encoder: _Encoder, numbers, tables=("text", "video"), *, broken=(), group=2, normalize=False) -> Part:
    stream = list(_stream(numbers, broken))
    parts = embedding_pass(stream, tables, plan=encoder.plan, encode=encoder.encode, group=group, normalize=normalize)
    return assemble([record for record, _ in stream], list(parts))


def test_rows_come_in_the_order_of_the_records_with_an_uneven_last_group():
    outcome = _embed(_Encoder(), range(5))
    assert outcome.table.ids == tuple(f"clip{i}" for i in range(5))
    np.testing.assert_array_equal(outcome.table.tables["text"], [[i + 1, 0] for i in range(5)])
    np.testing.assert_array_equal(outcome.table.tables["video"], [[i + 1, i + 1] for i in range(5)])
    assert (outcome.used_tokens, outcome.total_tokens, outcome.truncated) == (15, 20, 3)
    assert outcome.padded_share == pytest.approx(0.25)


def test_the_next_group_starts_before_the_last_one_is_read():
    encoder = _Encoder()
    _embed(encoder, range(5))
    order = [("start", (0, 1)), ("start", (2, 3)), ("read", (0, 1)), ("start", (4,)), ("read", (2, 3)), ("read", (4,))]
    assert encoder.log == order


def test_a_broken_clip_is_set_aside_and_the_others_go_on():
    outcome = _embed(_Encoder(), range(7), broken=(0, 3, 6))
    assert outcome.table.ids == ("clip1", "clip2", "clip4", "clip5")
    assert list(outcome.problems) == [(f"clip{n}", f"clip{n}.mp4: broken") for n in (0, 3, 6)]


def test_parts_count_every_record_once():
    encoder = _Encoder()
    parts = embedding_pass(_stream(range(9), broken=(0, 3, 8)), ("text",), plan=encoder.plan, encode=encoder.encode, group=2)
    assert [part.records for part in parts] == [3, 3, 2, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_vector_that_is_no_direction_is_set_aside(value: float, normalize: bool):
    outcome = _embed(_Encoder(spoiled={1: value}), range(3), group=3, normalize=normalize)
    assert outcome.table.ids == ("clip0", "clip2")
    (name, reason), *rest = outcome.problems
    assert not rest and name == "clip1" and "text, video is zero or not finite" in reason


def test_rows_are_normalised_and_nothing_at_all_gives_no_tables():
    outcome = _embed(_Encoder(), range(3), normalize=True)
    np.testing.assert_allclose(np.linalg.norm(outcome.table.tables["video"], axis=1), 1, rtol=1e-6)
    empty = _embed(_Encoder(), range(2), broken=(0, 1))
    assert empty.table.ids == () and empty.table.tables == {} and len(empty.problems) == 2


def test_warnings_are_kept_by_record():
    encoder = _Encoder()
    stream = [(Record(id="clip0", text="x"), _clip(0, warnings=("clip0.mp4: no audio track, 8 s of silence used",)))]
    (part,) = embedding_pass(stream, ("text",), plan=encoder.plan, encode=encoder.encode, group=2)
    assert part.warnings == (("clip0", "clip0.mp4: no audio track, 8 s of silence used"),)


@pytest.mark.jit
def test_equal_prompts_have_one_row_whatever_their_groups_rounded():
    """Nine clips of three captions, three files of which two clips cut another part: what is level is counted so, and not by rounding."""
    rng = np.random.default_rng(0)
    captions, files = rng.normal(size=(2, 3, 8))
    records = [
        Record(f"c{i}", text=f"caption {i % 3}", video=Path(f"{i // 3}.mp4"), timestamps=(0.0, 1.0) if i > 6 else None) for i in range(9)
    ]
    text = np.stack([captions[i % 3] + 2e-7 * rng.normal(size=8) for i in range(9)]).astype(np.float32)
    video = np.stack([files[i // 3] + (i > 6) + 2e-7 * rng.normal(size=8) for i in range(9)]).astype(np.float32)
    parts = [Part(tuple(r.id for r in records[s]), {"text": text[s], "video": video[s]}) for s in (slice(5, 9), slice(0, 5))]
    after = assemble(records, parts)
    assert after.table.ids == tuple(r.id for r in records)
    np.testing.assert_array_equal(after.table.tables["text"], text[[0, 1, 2] * 3])
    np.testing.assert_array_equal(after.table.tables["video"], video[[0, 0, 0, 3, 3, 3, 6, 7, 7]])
    found = {ties: evaluate(after.table, ties=ties, resamples=0)["directions"]["v2t"] for ties in ("optimistic", "worst")}
    assert found["worst"]["R@1"] == 0 and found["optimistic"]["ties"] == 9
    prefixed = [Record("a", text="x", prefix="query"), Record("b", text="x"), Record("c"), Record("d")]
    part = Part(tuple("abcd"), {"text": text[:4], "audio": video[:4]})
    unlike = assemble(prefixed, [part])  # nothing is known to be the same
    np.testing.assert_array_equal(unlike.table.tables["text"], text[:4])
    np.testing.assert_array_equal(unlike.table.tables["audio"], video[:4])


def test_a_part_knows_which_prompts_another_part_has_first():
    records = [Record(f"c{i}", text=None if i == 4 else f"caption {i % 2}", audio=Path("a.wav") if i > 2 else None) for i in range(6)]
    tables = ("text", "audio", "video")
    firsts = first_of_prompts(records, tables)
    assert same_in_other_parts(firsts, {"c0", "c2", "c4"}) == {"audio": {"c4": "c3"}}
    assert same_in_other_parts(firsts, {"c2", "c3", "c4"}) == {"text": {"c2": "c0", "c3": "c1"}}
    assert same_in_other_parts(firsts, {r.id for r in records}) == {}
