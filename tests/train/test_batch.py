"""The training batch: rows, branches, shuffles, refusals."""

import dataclasses

import jax
import numpy as np
import pytest

from omni_jax.parallel import make_mesh
from omni_jax.towers import of_modalities
from omni_jax.train import LossConfig, fit_shapes, kinds_of_update, pack_micro_batch, place_batch, stack_micro_batches, step_kind
from omni_jax.train.batch import check_shuffle
from omni_jax.types import InputError
from tests.train.golden_batches import next_sample
from tests.train.random_batches import MODEL, batch, example

LOSSES = LossConfig()
TEXT, AUDIO, VIDEO = (step_kind(i, LOSSES) for i in range(3))


def packed(examples, kind, shuffle=None, share_prefix=True, **sizes):
    shapes = dataclasses.replace(fit_shapes(examples, kind, share_prefix), **sizes)
    return pack_micro_batch(examples, kind, shapes, MODEL, next_sample(len(examples)) if shuffle is None else shuffle, share_prefix)


def test_the_cycle_plays_one_pair_and_one_hard_negative():
    assert [(k.hard, k.singles) for k in (TEXT, AUDIO, VIDEO)] == [
        ("text", ("text", "audio")),
        ("audio", ("text", "video")),
        ("video", ("audio", "video")),
    ]
    assert step_kind(3, LOSSES) == TEXT
    every = step_kind(1, LossConfig(pairs="all", hn_audio_only=True))
    assert every.singles == ("text", "audio", "video") and len(every.pairs) == 3 and every.hard == "audio"


def test_cycles_count_micro_batches_or_updates():
    released, pooled = LossConfig(), LossConfig(negatives="global")
    assert kinds_of_update(1, 4, released) == (AUDIO, VIDEO, TEXT, AUDIO)
    assert kinds_of_update(1, 4, pooled) == (AUDIO,) * 4


def test_losses_without_weight_play_no_streams():
    pairs = step_kind(0, LossConfig({"pairwise": 1}))
    assert pairs.rows == (("text", "audio"),) and pairs.hard is None and of_modalities(pairs.media) == ("audio", "beats")
    teacher = step_kind(0, LossConfig({"distillation": 1, "pairwise": 1}))
    assert teacher.rows == (("anchor",), ("text", "audio")) and of_modalities(teacher.media) == ("vision", "audio", "beats")
    tuples = step_kind(0, LossConfig({"tuple": 1}))
    assert tuples.rows == (("anchor",), ("positive",))
    joint = step_kind(0, LossConfig({"joint": 1}, pairs="all"))
    assert joint.rows == (("text", "audio", "video"), ("av", "at", "tv")) and joint.media == ("video", "audio")
    assert step_kind(1, LossConfig({"joint": 1})).rows == (("text", "video"), ("at",))  # video against the two others
    assert step_kind(0, LossConfig({"joint": 1})).media == ("video", "audio")


def test_singles_stand_in_one_row_apart_from_each_other():
    clip = example(0)
    rows = packed([clip, example(1)], TEXT).rows
    text, audio = (len(clip.prompts[name].ids) for name in TEXT.singles)
    segment = rows.segment[0, 0, 2]
    assert (segment[:text] == 1).all() and (segment[text : text + audio] == 2).all() and not segment[text + audio :].any()
    assert list(rows.pool[0, 0, 2, :2]) == [text - 1, text + audio - 1]
    # Text alone reads no media; audio alone reads Whisper and BEATs in turn.
    assert (rows.media_index[0, 0, 2, :text] == -1).all()
    heard = rows.media_index[0, 0, 2, text + 1 : text + 5]
    assert list(heard[::2]) == [24 // 4 * 2, 24 // 4 * 2 + 1] and list(heard[1::2] - heard[::2]) == [14, 14]


def test_another_caption_is_a_branch_of_the_anchors_row():
    clip = example(0)
    anchor, hard = clip.prompts["anchor"], clip.prompts["hard"]
    made = packed([clip, example(1)], TEXT)
    assert made.hard is None
    branch, pool = made.rows.branch[0, 0, 0], made.rows.pool[0, 0, 0]
    end = len(anchor.ids) + len(hard.ids) - hard.prefix
    assert not branch[: anchor.prefix].any()
    assert (branch[anchor.prefix : len(anchor.ids)] == 1).all() and (branch[len(anchor.ids) : end] == 2).all()
    assert list(pool) == [len(anchor.ids) - 1, end - 1]
    assert np.array_equal(made.rows.ids[0, 0, 0, len(anchor.ids) : end], hard.ids[hard.prefix :])


def test_a_branch_follows_its_anchor_among_other_prompts_of_its_row():
    clip, kind = example(0), dataclasses.replace(TEXT, layout=(("positive", "anchor", "audio"), ("text",)))
    assert kind.pooled(share_prefix=True) == (("positive", "anchor", "hard", "audio"), ("text",))
    anchor, hard, positive, audio = (clip.prompts[name] for name in ("anchor", "hard", "positive", "audio"))
    made = packed([clip, example(1)], kind).rows
    branch, segment, pool = (getattr(made, name)[0, 0, 0] for name in ("branch", "segment", "pool"))
    first, end = len(positive.ids), len(positive.ids) + len(anchor.ids)
    behind = end + len(hard.ids) - hard.prefix
    last = behind + len(audio.ids)
    assert list(pool) == [first - 1, end - 1, behind - 1, last - 1]
    assert not branch[: first + anchor.prefix].any() and (branch[first + anchor.prefix : end] == 1).all()
    assert (branch[end:behind] == 2).all() and not branch[behind:last].any()
    assert (segment[first:behind] == 2).all() and (segment[behind:last] == 3).all()
    assert np.array_equal(made.ids[0, 0, 0, end:behind], hard.ids[hard.prefix :])
    alone = packed([clip, example(1)], TEXT).rows
    for name in ("ids", "media_index"):  # the positive reads its copy in any layout
        assert np.array_equal(getattr(made, name)[0, 0, 0, :first], getattr(alone, name)[0, 0, 1, :first])


def test_a_prompt_that_is_longer_than_its_kind_reaches_is_refused():
    clip = example(0)
    size = len(clip.prompts["anchor"].ids) + len(clip.prompts["hard"].ids) - clip.prompts["hard"].prefix
    packed([clip, example(0)], dataclasses.replace(TEXT, reach=size))
    with pytest.raises(ValueError, match=rf"clip 0: a prompt of {size} tokens, more than the {size - 1} that its step kind reaches"):
        packed([clip, example(0)], dataclasses.replace(TEXT, reach=size - 1))
    behind = dataclasses.replace(TEXT, layout=(("positive", "anchor", "audio"), ("text",)), reach=1024)
    with pytest.raises(ValueError, match="an anchor with a branch begins its row"):
        packed([clip, example(1)], behind)


def test_exchanged_media_need_a_row_of_their_own():
    clips = [example(i, hard="audio") for i in range(2)]
    made = packed(clips, AUDIO)
    assert made.hard is not None and made.hard.ids.shape[2] == 1 and made.rows.pool.shape[-1] == 2
    assert made.hard.ids.shape[3] == max(len(clip.prompts["hard"].ids) for clip in clips)


def test_the_augmented_copy_stands_behind_the_clip():
    clip = example(0)
    made = packed([clip, example(1)], TEXT)
    anchor, positive = (made.rows.media_index[0, 0, r] for r in (0, 1))
    size = 2 * 24 // 4 + 2 * 14
    n = len(clip.prompts["positive"].ids)
    seen = positive[:n] >= 0
    assert np.array_equal(positive[:n][seen], anchor[:n][seen] + size)
    assert clip.augmented is not None and np.array_equal(made.clips.audio.mel[0, 0, 1], clip.augmented.audio.mel)


def test_frames_of_other_sizes_share_a_batch():
    # 4x4 patches have 4 tokens a step, 4x6 have 6: the second step starts where the larger ends.
    made = packed([example(0, grid=(4, 4)), example(1)], TEXT)
    small = made.rows.media_index[0, 0, 0]
    assert sorted(set(small[(small >= 0) & (small < 12)])) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert (made.clips.vision.window[0, 0, 0, :, 16:] == -1).all()


def test_exchanged_video_of_another_size_is_refused_unless_the_prompt_fits_it():
    clips = [example(0, grid=(4, 4), hard="video"), example(1, hard="video")]
    with pytest.raises(ValueError, match="tokens of a medium"):
        packed(clips, VIDEO)


@pytest.mark.parametrize(
    ("shuffle", "message"),
    [
        ([[0, 2, 1]], "in its place"),
        ([[1, 2, 3]], "0 .. 2"),
        ([[0], [0], [0]], "at least 2 clips"),
    ],
)
def test_a_shuffle_that_is_none_is_refused(shuffle, message):
    with pytest.raises(InputError, match=message):
        check_shuffle(np.array(shuffle))
    with pytest.raises(InputError, match=message):
        packed([example(i, hard="audio") for i in range(3)], AUDIO, shuffle=np.array(shuffle))


def test_a_micro_batch_of_one_needs_no_shuffle_for_another_caption():
    assert packed([example(0)], TEXT, shuffle=np.array([[0]])).clips_per_micro == 1


def test_prompts_longer_than_the_row_are_refused():
    with pytest.raises(ValueError, match="do not fit a row of 20"):
        packed([example(0), example(1)], TEXT, row_tokens=20)


def test_micro_batches_of_an_update_have_equal_shapes():
    one = packed([example(0), example(1)], TEXT, row_tokens=64)
    other = packed([example(0), example(1)], TEXT, row_tokens=72)
    assert stack_micro_batches([one, one]).micro_batches == 2
    with pytest.raises(ValueError, match="same shapes"):
        stack_micro_batches([one, other])
    with pytest.raises(ValueError, match="leave different kinds apart"):
        stack_micro_batches([one, packed([example(i, hard="audio") for i in range(2)], AUDIO, row_tokens=64)])


def test_clips_that_do_not_divide_over_the_mesh_are_refused():
    mesh = make_mesh(1, 8, 1)
    with pytest.raises(InputError, match="micro-batch of 6 clips does not divide over 8"):
        place_batch(batch(LOSSES, clips=6), mesh)
    placed = place_batch(batch(LOSSES, clips=8), mesh)
    assert all(x.sharding.shard_shape(x.shape)[1] == 1 for x in jax.tree.leaves(placed.clips))
