"""Which prompts of a training clip share a row: the cheapest way to fill rows of one length."""

from __future__ import annotations

import dataclasses

import pytest

from omni_jax.tokens.training import PromptLengths, lay_out, partitions
from omni_jax.train import LossConfig, step_kind

TEXT, AUDIO, VIDEO = (step_kind(count, LossConfig()) for count in range(3))
CLIP = PromptLengths(video=216, audio=400, hard_video=216, hard_audio=400, caption=40, positive=40, hard=40, alone=40, filler=6)


def laid(kind, clips, *, multiple=8, attention=3e-5):
    return lay_out(kind, clips, share_prefix=True, multiple=multiple, attention=attention)


@pytest.mark.parametrize(("count", "ways"), [(1, 1), (2, 2), (3, 5), (4, 15), (5, 52)])
def test_every_way_to_fill_rows_is_tried_once(count: int, ways: int):
    names = tuple("abcde"[:count])
    made = [tuple(sorted(rows)) for rows in partitions(names)]
    assert len(made) == len(set(made)) == ways
    assert all(sorted(name for row in rows for name in row) == list(names) and rows[0][0] == "a" for rows in partitions(names))


def test_loads_count_a_branch_in_its_anchors_row():
    assert CLIP.loads(TEXT, True) == {"anchor": 700, "positive": 660, "text": 40, "audio": 408}
    assert CLIP.loads(TEXT, False)["anchor"] == 660
    assert (CLIP.row(TEXT, True), CLIP.hard_row(TEXT, True)) == (700, 0)
    assert (CLIP.reach(TEXT, True), CLIP.reach(TEXT, False)) == (768, 768)
    assert CLIP.reach(dataclasses.replace(TEXT, anchor=False, positive=False, hard=None), True) == 512
    assert (CLIP.row(AUDIO, True), CLIP.hard_row(AUDIO, True), CLIP.hard_row(TEXT, False)) == (660, 660, 660)
    assert CLIP.row(VIDEO, True) == 660 and CLIP.row(dataclasses.replace(VIDEO, layout=(VIDEO.prompts,)), True) == 1952


def test_prompts_of_a_clip_share_one_row_where_attention_is_cheap():
    """At 7B: 700 + 660 + 448 tokens in one row, where three rows would have 2,100."""
    assert laid(TEXT, [CLIP]).rows == (TEXT.prompts,)


def test_rows_stay_apart_where_attention_is_dear_or_they_are_full():
    assert laid(TEXT, [CLIP], attention=3e-3).rows == TEXT.rows
    full = dataclasses.replace(CLIP, audio=20, video=20, hard=0, positive=60, caption=60, alone=60, filler=22)
    assert full.loads(TEXT, True) == {"anchor": 104, "positive": 104, "text": 60, "audio": 44}
    assert laid(TEXT, [full]) == TEXT


def test_the_choice_is_the_cheapest_of_all():
    clips = [CLIP, dataclasses.replace(CLIP, caption=200, alone=200), dataclasses.replace(CLIP, audio=100)]
    for attention in (0.0, 1e-4, 5e-4, 2e-3):
        got = laid(VIDEO, clips, multiple=16, attention=attention)

        def cost(rows, attention=attention):
            longest = max(sum(clip.loads(VIDEO, True)[name] for name in names) for clip in clips for names in rows)
            size = -(-longest // 16) * 16
            return len(rows) * size * (1 + attention * size)

        assert cost(got.rows) == min(cost(rows) for rows in partitions(VIDEO.prompts))
