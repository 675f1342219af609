"""The per-step schedule: the pairs of L_A (with the students of L_D) and the hard negative of L_T. Both cycles have period 3."""

from __future__ import annotations

PAIRS = (("text", "audio"), ("text", "video"), ("audio", "video"))
"""The three pairs, in the order the release rotates them (SPEC section 6)."""

JOINT = (("text", "av"), ("video", "at"), ("audio", "tv"))
"""Each modality with the two others together: the pairs of L_J, in the order in which the cycle of PAIRS embeds the first of each."""

HARD_NEGATIVES = ("text", "audio", "video")
"""What the hard negative tuple exchanges, in order: another sample's caption, shuffled audio, shuffled video."""

PERIOD = 3


def active_pairs(step: int, pairs: str = "cycle") -> tuple[tuple[str, str], ...]:
    """Returns the pairs of L_A at `step`: one under "cycle" (as released), all three under "all" (as the paper states).

    Raises:
      ValueError: for another schedule.
    """
    if pairs == "all":
        return PAIRS
    if pairs == "cycle":
        return (PAIRS[step % PERIOD],)
    raise ValueError(f"pairs {pairs!r}: choose 'cycle' or 'all'")


def active_duals(step: int, pairs: str = "cycle") -> tuple[str, ...]:
    """Returns the tables of two modalities that L_J embeds at `step`: one under "cycle", all three under "all"."""
    return (JOINT[step % PERIOD][1],) if pairs == "cycle" else tuple(dual for _, dual in JOINT)


def active_students(step: int, pairs: str = "cycle") -> tuple[str, ...]:
    """Returns the modalities that L_D teaches at `step`: those of the active pairs, text before audio before video."""
    playing = {name for pair in active_pairs(step, pairs) for name in pair}
    return tuple(name for name in HARD_NEGATIVES if name in playing)


def active_hard_negative(step: int, audio_only: bool = False) -> str:
    """Returns the modality exchanged in the hard negative at `step`; `audio_only` (`hn_audio_only`) fixes it to "audio"."""
    return "audio" if audio_only else HARD_NEGATIVES[step % PERIOD]
