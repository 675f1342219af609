"""Packed rows hold every prompt exactly, and no token sees a wrong one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import TABLES, BeatsConfig, ModelConfig, preset
from omni_jax.tokens.batching import Planner
from omni_jax.tokens.packing import first_fit_decreasing
from omni_jax.tokens.prompts import build_sequences
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.towers.vision import step_layout
from omni_jax.types import SOURCE_AUDIO, SOURCE_TEXT, EncoderBatch, Features, Record, RowBatch, TokenSequence
from tests.golden_set import find
from tests.tokens import synthetic
from tests.tokens.batched import batched

GOLDEN = find("OMNI_GOLDEN", "wave_tiny")
CONFIG = ModelConfig.from_hf(GOLDEN.config, BeatsConfig())
TOKENIZER = Tokenizer.from_pretrained(GOLDEN.checkpoint)


def seen(rows: RowBatch, r: int, token: int) -> np.ndarray:
    """Places that a token attends to, by the rule of `types.RowBatch`."""
    places = np.arange(token + 1)
    same = rows.segment[r, places] == rows.segment[r, token]
    return places[same & ((rows.branch[r, places] == 0) | (rows.branch[r, places] == rows.branch[r, token]))]


def unpack(batch: EncoderBatch) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(clip, table) -> ids, positions and media rows of everything the pooled token sees."""
    found = {}
    for rows, owner in zip(batch.rows, batch.owners, strict=True):
        for r, k in np.argwhere(owner[..., 0] >= 0):
            places = seen(rows, int(r), int(rows.pool[r, k]))
            key = (int(owner[r, k, 0]), TABLES[owner[r, k, 1]])
            assert key not in found
            found[key] = (rows.ids[r, places], rows.positions[r, :, places].T, rows.media_index[r, places])
            for n, place in enumerate(places):
                np.testing.assert_array_equal(seen(rows, int(r), int(place)), places[: n + 1])
    return found


def media_table(batch: EncoderBatch) -> list[tuple[str, int]]:
    """What each row of the media table is computed from: the number in the first patch, mel frame or fbank frame, "" where padding."""
    table: list[tuple[str, int]] = []
    for v in batch.vision:
        for step, window in zip(v.patches, v.window, strict=True):
            table += [("video", int(p)) if w >= 0 else ("", -1) for p, w in zip(step[::4, 0], window[::4], strict=True)]
    for a in batch.audio:
        for mel, frames in zip(a.mel, a.frames, strict=True):
            table += [("whisper", int(mel[4 * i, 0])) if i < ((frames - 1) // 2 + 1) // 2 else ("", -1) for i in range(mel.shape[0] // 4)]
    for b in batch.beats:
        for bank, tokens in zip(b.fbank, b.tokens, strict=True):
            values = [int(bank[4 * i, 0]) if 4 * i < len(bank) else 0 for i in range(b.max_tokens)]
            table += [("beats", values[i]) if i < tokens else ("", -1) for i in range(b.max_tokens)]
    return table


def expected_media(sequence: TokenSequence, features: Features) -> list[tuple[str, int] | None]:
    """What each token of a prompt must be read from, straight from the features."""
    whisper: list[int] = []
    beats: list[int] = []
    for s in features.audio or ():
        whole = len(s.fbank) // 16 * 16
        whisper += [int(s.log_mel[0, 4 * i]) for i in range(s.tokens)]
        beats += [int(s.fbank[4 * i, 0]) if 4 * i < whole else 0 for i in range(s.tokens)]
    out: list[tuple[str, int] | None] = []
    for source, index in zip(sequence.source.tolist(), sequence.source_index.tolist(), strict=True):
        if source == SOURCE_TEXT:
            out.append(None)
        elif source == SOURCE_AUDIO:
            out.append(("beats", beats[index // 2]) if index % 2 else ("whisper", whisper[index // 2]))
        else:
            assert features.vision is not None
            out.append(("video", int(features.vision.patches[4 * index, 0])))
    return out


def check(batch: EncoderBatch, features: Sequence[Features], sequences: Sequence[Mapping[str, TokenSequence]]) -> None:
    """Every prompt comes back exactly, and every media token from the right place of the right clip."""
    table, found = media_table(batch), unpack(batch)
    assert found.keys() == {(c, name) for c, by_table in enumerate(sequences) for name in by_table}
    for (clip, name), (ids, positions, media) in found.items():
        sequence = sequences[clip][name]
        np.testing.assert_array_equal(ids, sequence.ids)
        np.testing.assert_array_equal(positions, sequence.positions)
        assert [None if m < 0 else table[m] for m in media] == expected_media(sequence, features[clip])
    for rows, owner in zip(batch.rows, batch.owners, strict=True):
        padding = rows.segment == 0
        assert (rows.ids[padding] == CONFIG.tokens.pad).all()
        assert (rows.media_index[padding] == -1).all()
        assert (owner[..., 0] >= 0).sum(axis=1).max() <= rows.pool.shape[1]
        for array in (rows.ids, rows.media_index, rows.positions, rows.segment, rows.branch, rows.pool, owner):
            assert array.dtype == np.int32
    rows_used = sum(int((r.segment > 0).sum()) for r in batch.rows)
    assert batch.used_tokens == rows_used + sum(kind != "" for kind, _ in table)
    assert batch.total_tokens == sum(r.ids.size for r in batch.rows) + len(table)


clip_shapes = st.fixed_dictionaries(
    {
        "caption": st.one_of(st.none(), st.sampled_from(["", "a bell", "  red ball <|im_end|>", "slow tone " * 30])),
        "grid": st.one_of(st.none(), st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 10]), st.sampled_from([2, 6, 12]))),
        "samples": st.one_of(st.none(), st.integers(321, 70_000)),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(clip_shapes, max_size=5),
    tables=st.sets(st.sampled_from(TABLES), min_size=1),
    share=st.booleans(),
    name=st.sampled_from(["training", "mteb", "release"]),
    multiple=st.sampled_from([1, 3]),
)
def test_every_prompt_is_recovered_golden(shapes: list[dict], tables: set[str], share: bool, name: str, multiple: int) -> None:
    features = []
    for i, s in enumerate(shapes):
        # An empty caption leaves nothing to embed where the preset adds no end token; that error has a test of its own.
        caption = s["caption"] or ("x" if name == "release" and s["caption"] == "" else s["caption"])
        grid, samples = s["grid"], s["samples"]
        features.append(
            Features(
                Record(str(i), caption),
                synthetic.vision(grid, 0.3 + i, first=10_000 * i) if grid else None,
                synthetic.audio(samples, first=10_000 * i) if samples else None,
            )
        )
    asked = [t for t in TABLES if t in tables]
    planner = Planner(row_multiple=multiple)
    batch = batched(features, asked, TOKENIZER, CONFIG, preset(name), share_prefix=share, planner=planner)
    check(batch, features, [build_sequences(f, asked, TOKENIZER, CONFIG, preset(name)) for f in features])
    assert all(rows.ids.shape[0] % multiple == 0 for rows in batch.rows)
    if not share:
        assert all((rows.branch == 0).all() for rows in batch.rows)


def _one(seconds: float = 2.0) -> Features:
    return Features(Record("x", "a bell"), synthetic.vision((4, 12, 18)), synthetic.audio(int(seconds * 16_000)))


def test_shared_media_is_written_once_golden() -> None:
    features = [_one()]
    alone = batched(features, TABLES, TOKENIZER, CONFIG, preset("training"), share_prefix=False, planner=Planner())
    shared = batched(features, TABLES, TOKENIZER, CONFIG, preset("training"), share_prefix=True, planner=Planner())
    sequences = build_sequences(features[0], TABLES, TOKENIZER, CONFIG, preset("training"))
    media = sum(sequences[name].prefix for name in ("video", "audio", "av"))
    assert alone.used_tokens - shared.used_tokens == media
    found = unpack(shared)
    for key, parts in unpack(alone).items():
        for a, b in zip(parts, found[key], strict=True):
            np.testing.assert_array_equal(a, b)


def test_towers_run_only_for_media_that_a_table_needs_golden() -> None:
    def made(*tables: str) -> EncoderBatch:
        return batched([_one()], tables, TOKENIZER, CONFIG, preset("training"), planner=Planner())

    assert (made("text").vision, made("text").audio, made("text").beats) == ((), (), ())
    assert made("tv").audio == made("tv").beats == ()
    assert made("at").vision == ()
    assert made("text").total_tokens == 16


def test_empty_batch_has_no_rows_golden() -> None:
    batch = batched([], TABLES, TOKENIZER, CONFIG, preset("training"), planner=Planner())
    assert (batch.rows, batch.used_tokens, batch.total_tokens) == ((), 0, 0)


def test_audio_of_several_segments_is_joined_in_order_golden() -> None:
    """301 s of audio: 7500 tokens of the first segment, then those of the second, each beside its BEATs token."""
    features = [Features(Record("long", None), None, synthetic.audio(301 * 16_000))]
    assert features[0].audio_tokens == 7525
    decoder = dataclasses.replace(CONFIG.decoder, max_positions=32768)  # as published; a small checkpoint may take shorter prompts
    config = dataclasses.replace(CONFIG, decoder=decoder)
    batch = batched(features, ("audio",), TOKENIZER, config, preset("mteb"), planner=Planner())
    (rows,) = batch.rows
    assert rows.ids.shape == (1, 16384)
    sequences = build_sequences(features[0], ("audio",), TOKENIZER, config, preset("mteb"))
    table = media_table(batch)
    used = rows.media_index[0, rows.segment[0] > 0]
    assert [None if m < 0 else table[m] for m in used] == expected_media(sequences["audio"], features[0])


def test_cut_captions_are_counted_by_clip_golden() -> None:
    long = Features(Record("x", "red ball " * 2000), synthetic.vision((1, 2, 2)), None)
    short = Features(Record("y", "red ball"), synthetic.vision((1, 2, 2)), None)
    batch = batched([long, short, long], ("text", "tv"), TOKENIZER, CONFIG, preset("training"), planner=Planner())
    assert batch.truncated == 2


def test_step_layout_numbers_windows_of_112_pixels() -> None:
    """10 x 6 merged tokens in windows of 4 x 4: three rows of windows, two columns, the last ones narrower."""
    coords, window = step_layout(20, 12, 2, 4)
    assert coords.shape == (240, 2)
    for (row, column), number in zip(coords.tolist(), window.tolist(), strict=True):
        assert number == (row // 8) * 2 + column // 8
    assert coords[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert coords[4].tolist() == [0, 2]
    assert coords[24].tolist() == [2, 0]
    assert len({tuple(c) for c in coords.tolist()}) == 240


def test_vision_batches_hold_layout_and_patches_golden() -> None:
    features = [
        Features(Record("x", None), synthetic.vision((2, 4, 6))),
        Features(Record("y", None), synthetic.vision((1, 8, 8), first=1000)),
    ]
    batch = batched(features, ("video",), TOKENIZER, CONFIG, preset("training"), planner=Planner())
    found = {}
    for v in batch.vision:
        for n in range(len(v.patches)):
            valid = v.window[n] >= 0
            assert not v.patches[n][~valid].any()
            if valid.any():
                found[int(v.patches[n, 0, 0])] = (v.coords[n, valid], v.window[n, valid])
    assert found.keys() == {0, 24, 1000}
    for first, (h, w) in {0: (4, 6), 24: (4, 6), 1000: (8, 8)}.items():
        coords, window = step_layout(h, w, CONFIG.vision.merge_size, CONFIG.vision.window_tokens)
        np.testing.assert_array_equal(found[first][0], coords)
        np.testing.assert_array_equal(found[first][1], window)


@given(
    items=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 4)), min_size=1, max_size=40),
    slots=st.integers(4, 12),
)
def test_first_fit_decreasing_fills_rows(items: list[tuple[int, int]], slots: int) -> None:
    lengths, prompts = zip(*items, strict=True)
    rows = first_fit_decreasing(lengths, prompts, 128, slots)
    assert sorted(i for row in rows for i in row) == list(range(len(items)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= 128
        assert sum(prompts[i] for i in row) <= slots
    # First fit: what opened a row fitted into none before it.
    for r, row in enumerate(rows):
        for earlier in rows[:r]:
            larger = [i for i in earlier if (-lengths[i], i) < (-lengths[row[0]], row[0])]
            full = sum(lengths[i] for i in larger) + lengths[row[0]] > 128
            assert full or sum(prompts[i] for i in larger) + prompts[row[0]] > slots


def test_inconsistent_segment_is_refused_golden() -> None:
    (segment,) = synthetic.audio(16_000)
    broken = Features(Record("x", None), None, (type(segment)(segment.log_mel, segment.fbank[:16], segment.tokens),))
    with pytest.raises(ValueError, match="cannot have"):
        batched([broken], ("audio",), TOKENIZER, CONFIG, preset("training"), planner=Planner())
