"""Prompts, interleaving and positions against the golden data and against plain rewrites of SPEC sections 3 and 4."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_jax.config import TABLE_MODALITIES, TABLES, BeatsConfig, ConfigError, ModelConfig, Preset, preset
from omni_jax.features import audio_tokens
from omni_jax.tokens.prompts import build_sequence, build_sequences, media_block
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import SOURCE_AUDIO, SOURCE_TEXT, SOURCE_VIDEO, ClipError, Features, Record, VideoGrid
from tests.golden_set import GoldenSet, find
from tests.tolerances import assert_close

GOLDEN = find("OMNI_GOLDEN", "wave_tiny")
CONFIG = ModelConfig.from_hf(GOLDEN.config, BeatsConfig())
COMBINATIONS = {"t": "text", "v": "video", "a": "audio", "tv": "tv", "ta": "at", "va": "av", "tva": "tva"}
GRID = VideoGrid((4, 12, 18), 0.55)


def _media(golden: GoldenSet, clip: int) -> VideoGrid:
    t, h, w = golden.inputs[f"{clip}/grid_thw"].reshape(3).tolist()
    return VideoGrid((t, h, w), float(golden.inputs[f"{clip}/second_per_grid"]))


def test_golden_ids_and_positions(golden: GoldenSet, tokenizer: Tokenizer, config: ModelConfig) -> None:
    fused = dataclasses.replace(golden.preset, text_head="fused")
    for i in range(golden.clips):
        k = int(golden.inputs[f"{i}/audio_tokens"])
        for name, table in COMBINATIONS.items():
            made = build_sequence(tokenizer, config, fused, table, golden.records[i].text, _media(golden, i), k)
            assert_close(made.ids, golden.inputs[f"{i}/ids/{name}"], "token_ids")
            assert_close(made.positions, golden.base[f"{i}/position_ids/{name}"], "position_ids")
            if name != "t":
                trained = build_sequence(tokenizer, config, golden.preset, table, golden.records[i].text, _media(golden, i), k)
                assert_close(trained.ids, made.ids, "token_ids")
        label = build_sequence(tokenizer, config, golden.preset, "text", golden.records[i].text, None, None)
        assert_close(label.ids, golden.inputs[f"{i}/ids/label"], "token_ids")


def test_golden_ids_and_positions_of_the_second_backbone(golden_nemotron: GoldenSet) -> None:
    config = ModelConfig.from_hf(golden_nemotron.config, None)
    tokenizer = Tokenizer.from_pretrained(golden_nemotron.checkpoint)
    for i in range(golden_nemotron.clips):
        k = audio_tokens(golden_nemotron.inputs[f"{i}/log_mel"].shape[1])
        caption, media = golden_nemotron.records[i].text, _media(golden_nemotron, i)
        for name, table in COMBINATIONS.items():
            made = build_sequence(tokenizer, config, golden_nemotron.preset, table, caption, media, k)
            assert_close(made.ids, golden_nemotron.inputs[f"{i}/ids/{name}"], "token_ids")
            assert_close(made.positions, golden_nemotron.base[f"{i}/position_ids/{name}"], "position_ids")
            heard = made.source_index[made.source == SOURCE_AUDIO]
            assert len(heard) == (k if "a" in name else 0) and sorted(heard) == list(range(len(heard)))


def test_prefixes_of_the_chat_template_golden(golden_nemotron: GoldenSet, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """The record's own prefix goes before the preset's; none of it counts towards the caption; a backbone without prefixes refuses one."""
    chat = ModelConfig.from_hf(golden_nemotron.config, None)
    own = Tokenizer.from_pretrained(golden_nemotron.checkpoint)
    chosen = dataclasses.replace(golden_nemotron.preset, max_text_tokens=3)

    def text(table: str, prefix: str | None) -> list[int]:
        made = build_sequence(own, chat, chosen, table, "a bell rings at noon", GRID, 30, prefix=prefix)
        return made.ids.tolist()[made.prefix :]

    end = [own.im_end, *own.encode_text("\n")]
    for prefix, lead in (("query", "query: "), (None, "passage: "), ("", "")):
        whole = own.encode_text(f"{lead}a bell rings at noon")
        assert text("tv", prefix) == [*whole[: len(own.encode_text(lead)) + 3], *end]
        assert text("text", prefix)[-len(text("tv", prefix)) :] == text("tv", prefix)
    assert text("video", "query") == end
    with pytest.raises(ClipError, match="without prefixes"):
        build_sequence(tokenizer, config, preset("training"), "tv", "a bell", GRID, None, prefix="query")


def _naive_chunks(values: list[float], span: float) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    for place, value in enumerate(values):
        end = len(chunks) * span
        if chunks[-1] and (value > end or abs(value - end) <= 1e-5 * end):
            chunks.append([])
        chunks[-1].append(place)
    return chunks


def _naive_block(
    grid: tuple[int, int, int] | None, second_per_grid: float, k: int | None, repeat: int, start: int
) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, int]], int]:
    """SPEC sections 3 and 4 read aloud: ids, positions, (source, index), position after the block."""
    c = CONFIG.tokens
    video: list[tuple[int, ...]] = []
    values: list[float] = []
    if grid:
        for t in range(grid[0]):
            for h in range(grid[1] // 2):
                for w in range(grid[2] // 2):
                    temporal = int(np.float32(np.float32(t) * np.float32(second_per_grid)) * np.float32(25))
                    video.append((start + 1 + temporal, start + 1 + h, start + 1 + w))
                    values.append(t * second_per_grid * 25)
    if grid is None:
        assert k is not None
        count = repeat * k
        places = [(start + n,) * 3 for n in range(count + 2)]
        owners = [(SOURCE_TEXT, 0), *((SOURCE_AUDIO, n) for n in range(count)), (SOURCE_TEXT, 0)]
        return [c.audio_bos, *[c.audio] * count, c.audio_eos], places, owners, start + count + 2
    if k is None:
        end = max(max(p) for p in video) + 1
        owners = [(SOURCE_TEXT, 0), *((SOURCE_VIDEO, n) for n in range(len(video))), (SOURCE_TEXT, 0)]
        return [c.vision_bos, *[c.video] * len(video), c.vision_eos], [(start,) * 3, *video, (end,) * 3], owners, end + 1
    span = 50 * second_per_grid
    of_video, of_audio = _naive_chunks(values, span), _naive_chunks([float(n) for n in range(k)], span)
    ids, places, owners = [c.vision_bos, c.audio_bos], [(start,) * 3] * 2, [(SOURCE_TEXT, 0)] * 2
    last: list[tuple[int, ...]] = []
    for n in range(max(len(of_video), len(of_audio))):
        if n < len(of_video):
            last = [video[v] for v in of_video[n]]
            ids += [c.video] * len(last)
            places += last
            owners += [(SOURCE_VIDEO, v) for v in of_video[n]]
        if n < len(of_audio):
            doubled = [repeat * a + r for a in of_audio[n] for r in range(repeat)]
            last = [(start + 1 + j,) * 3 for j in doubled]
            ids += [c.audio] * len(last)
            places += last
            owners += [(SOURCE_AUDIO, j) for j in doubled]
    end = max(max(p) for p in last) + 1
    return [*ids, c.audio_eos, c.vision_eos], [*places, (end,) * 3, (end,) * 3], [*owners, (SOURCE_TEXT, 0), (SOURCE_TEXT, 0)], end + 1


@settings(max_examples=200, deadline=None)
@given(
    steps=st.integers(1, 12),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    second_per_grid=st.one_of(st.floats(0.005, 40.0), st.sampled_from([0.04, 0.1, 0.28, 0.55, 1.0, 1.2, 2.4])),
    k=st.integers(1, 500),
    repeat=st.sampled_from([1, 2]),
    kinds=st.sampled_from(["v", "a", "va"]),
    start=st.integers(0, 50),
)
@example(4, 2, 2, 0.28, 50, 2, "va", 0)  # 3 * 0.28 * 25 is 21 in float32, just below it in float64
@example(1, 6, 6, 40.0, 1, 2, "va", 0)  # the last chunk ends before the largest position
def test_media_block_equals_the_plain_rewrite_golden(
    steps: int, rows: int, columns: int, second_per_grid: float, k: int, repeat: int, kinds: str, start: int
) -> None:
    grid = (steps, 2 * rows, 2 * columns)
    video, audio = (grid if "v" in kinds else None), (k if "a" in kinds else None)
    config = CONFIG if repeat == 2 else dataclasses.replace(CONFIG, beats=None)
    block = media_block(config, VideoGrid(grid, second_per_grid) if video else None, audio, start=start)
    ids, places, owners, after = _naive_block(video, second_per_grid, audio, repeat, start)
    assert block.ids.tolist() == ids
    assert block.positions.T.tolist() == [list(p) for p in places]
    assert list(zip(block.source.tolist(), block.source_index.tolist(), strict=True)) == owners
    assert block.next == after


def test_temporal_positions_are_truncated_in_float32_golden() -> None:
    """Quirk of the reference: among common frame rates and lengths a float64 product gives other positions."""
    differing = 0
    for frames in range(10, 400):
        second_per_grid = 2 / (8 / (frames / 25))
        block = media_block(CONFIG, VideoGrid((4, 2, 2), second_per_grid), None)
        exact = [1 + int(t * second_per_grid * 25) for t in range(4)]
        differing += block.positions[0, 1:-1].tolist() != exact
    assert differing > 0


def test_eos_follows_the_last_chunk_not_the_largest_position_golden() -> None:
    """Quirk of the reference (SPEC section 4): with a tall grid and one audio token, text goes back below the video's rows."""
    block = media_block(CONFIG, VideoGrid((1, 20, 20), 0.5), 1)
    assert block.positions[:, 2:-2].max() == 10
    assert block.next == 4


def test_prefix_holds_the_media_alone_golden(tokenizer: Tokenizer, config: ModelConfig) -> None:
    chosen = preset("training")
    for pair in (("video", "tv"), ("audio", "at"), ("av", "tva")):
        first, second = (build_sequence(tokenizer, config, chosen, table, "a bell", GRID, 30) for table in pair)
        n = first.prefix
        assert n == second.prefix > 0
        for name in ("ids", "source", "source_index"):
            np.testing.assert_array_equal(getattr(first, name)[:n], getattr(second, name)[:n])
        np.testing.assert_array_equal(first.positions[:, :n], second.positions[:, :n])
        assert first.source[n:].tolist() == [SOURCE_TEXT] * (len(first.ids) - n)
        assert first.ids[n - 1] in (config.tokens.audio_eos, config.tokens.vision_eos)
    assert build_sequence(tokenizer, config, chosen, "text", "a bell", GRID, 30).prefix == 0


def test_leading_whitespace_goes_only_on_the_way_to_the_fused_head_golden(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Quirk of the reference's processor (SPEC section 3): `t` is stripped on the left, `label` is not."""
    caption = " \n\ta bell "
    last = build_sequence(tokenizer, config, preset("training"), "text", caption, None, None)
    fused = build_sequence(tokenizer, config, preset("mteb"), "text", caption, None, None)
    assert last.ids.tolist() == [*tokenizer.encode_text(caption), tokenizer.im_end]
    assert fused.ids.tolist() == [*tokenizer.encode_text("a bell "), tokenizer.im_end]
    with_media = build_sequence(tokenizer, config, preset("mteb"), "at", caption, None, 3)
    assert with_media.ids[with_media.prefix :].tolist() == last.ids.tolist()


@pytest.mark.parametrize("table", TABLES)
def test_release_preset_has_neither_filler_nor_end_golden(tokenizer: Tokenizer, config: ModelConfig, table: str) -> None:
    made = build_sequence(tokenizer, config, preset("release"), table, "a bell", GRID, 30)
    text = tokenizer.encode_text("a bell") if "t" in TABLE_MODALITIES[table] else []
    assert made.ids[made.prefix :].tolist() == text


def test_each_medium_may_have_a_filler_of_its_own_golden(tokenizer: Tokenizer, config: ModelConfig) -> None:
    changed = preset("training").override(["filler_audio=Describe the audio.", "filler_video="])

    def tail(table: str, chosen: Preset) -> list[int]:
        sequence = build_sequence(tokenizer, config, chosen, table, "caption", GRID, 3)
        return sequence.ids[sequence.prefix :].tolist()

    assert tail("audio", changed) == [*tokenizer.encode_text("Describe the audio."), tokenizer.im_end]
    assert tail("video", changed) == [tokenizer.im_end]
    for table in ("av", "tv", "at", "tva"):
        assert tail(table, changed) == tail(table, preset("training"))


def test_long_captions_are_cut_and_counted_golden(tokenizer: Tokenizer, config: ModelConfig) -> None:
    caption = "red ball " * 50
    short = dataclasses.replace(preset("training"), max_text_tokens=7)
    made = build_sequence(tokenizer, config, short, "tv", caption, GRID, None)
    whole = tokenizer.encode_text(caption)
    assert made.ids[made.prefix :].tolist() == [*whole[:7], tokenizer.im_end]
    assert made.truncated == len(whole) - 7
    assert build_sequence(tokenizer, config, short, "video", caption, GRID, None).truncated == 0


def test_clips_without_what_a_table_needs_are_refused_golden(tokenizer: Tokenizer, config: ModelConfig) -> None:
    chosen = preset("training")
    for table, message in (("tv", "video"), ("at", "audio")):
        with pytest.raises(ClipError, match=message):
            build_sequence(tokenizer, config, chosen, table, "a", None, None)
    with pytest.raises(ClipError, match="caption"):
        build_sequence(tokenizer, config, chosen, "tv", None, GRID, None)
    with pytest.raises(ClipError, match="nothing is left"):
        build_sequence(tokenizer, config, preset("release"), "text", "", None, None)
    with pytest.raises(ConfigError, match="unknown table"):
        build_sequence(tokenizer, config, chosen, "vt", "a", None, None)
    assert build_sequence(tokenizer, config, chosen, "text", "", None, None).ids.tolist() == [tokenizer.im_end]


def test_a_prompt_longer_than_the_model_takes_is_refused_golden(tokenizer: Tokenizer, config: ModelConfig) -> None:
    long = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_positions=40))
    features = Features(Record("a", "word " * 100))
    with pytest.raises(ClipError, match=r"text prompt has \d+ tokens, the model takes 40; lower"):
        build_sequences(features, ("text",), tokenizer, long, preset("training"))
