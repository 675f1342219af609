"""One prompt: media, text, end token. Source: SPEC section 3.

Letters: S tokens, M media tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.config import TABLE_MODALITIES, ConfigError, ModelConfig, Preset
from omni_jax.tokens.interleave import interleave
from omni_jax.tokens.positions import line, media_positions
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import SOURCE_TEXT, SOURCE_VIDEO, ClipError, Features, InputError, Record, TokenizedClip, TokenSequence, VideoGrid


@dataclasses.dataclass(frozen=True)
class MediaBlock:
    """Media tokens with their bos and eos. Fields as in `types.TokenSequence`; `next` is the position of the text after the block."""

    ids: np.ndarray
    positions: np.ndarray
    source: np.ndarray
    source_index: np.ndarray
    next: int


@functools.lru_cache(maxsize=1024)
def media_block(config: ModelConfig, video: VideoGrid | None, audio_tokens: int | None, *, start: int = 0) -> MediaBlock:
    """Returns the tokens of a prompt's media, bos and eos included: arrays to read only, since clips of one shape share them.

    Args:
      video: the video's grid, None for a prompt without video.
      audio_tokens: tokens k of the audio tower, None for a prompt without audio.
      start: position of the block's first token.
    """
    tokens = config.tokens
    order = interleave(config, video, audio_tokens)
    positions, after = media_positions(config, order, video, start)
    bos = [tokens.vision_bos] * (video is not None) + [tokens.audio_bos] * (audio_tokens is not None)
    eos = [tokens.audio_eos] * (audio_tokens is not None) + [tokens.vision_eos] * (video is not None)
    media = np.where(order.source == SOURCE_VIDEO, tokens.video, tokens.audio)
    edges = (len(bos), len(eos))
    block = MediaBlock(
        ids=np.concatenate([bos, media, eos]).astype(np.int32),
        positions=positions,
        source=np.pad(order.source, edges, constant_values=SOURCE_TEXT),
        source_index=np.pad(order.index, edges),
        next=after,
    )
    for array in (block.ids, block.positions, block.source, block.source_index):
        array.setflags(write=False)
    return block


SYSTEM = "system\nYou are a helpful assistant."
USER = "user\n"


def prompt_head(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the indices of what precedes a prompt's media and text: nothing, or the chat template up to the words "user\\n".

    Raises:
      InputError: for a tokenizer without `<|im_start|>`.
    """
    if prompt == "plain":
        return []
    start = tokenizer.im_start
    if start is None:
        raise InputError("the tokenizer lacks <|im_start|>, which the chat template needs; use the tokenizer files of the same checkpoint")
    return [start, *tokenizer.encode_text(SYSTEM), tokenizer.im_end, *tokenizer.encode_text("\n"), start]


def prompt_text(
    tokenizer: Tokenizer, config: ModelConfig, preset: Preset, table: str, caption: str | None, prefix: str | None = None
) -> tuple[list[int], int]:
    """Returns the indices of a prompt's text, end included, and how many caption tokens were cut.

    Args:
      prefix: what the caption is, where its record says so: a name in `config.PREFIXES`, "" for no prefix; None takes the preset's.

    Raises:
      ClipError: for a table with text and no caption, a caption that is not valid Unicode, or a prefix for a backbone without prefixes.
    """
    modalities = TABLE_MODALITIES[table]
    chosen = preset.prefix if prefix is None else prefix
    if chosen and config.prompt == "plain":
        raise ClipError(f"prefix {chosen!r}: this backbone was trained without prefixes; remove the field, the flag or the preset")
    chat = config.prompt == "chat"
    # With no media between them, the last words of the template and the caption are one text to the tokenizer.
    lead = USER if chat and not modalities & frozenset("va") else ""
    cut = 0
    if "t" in modalities:
        if caption is None:
            raise ClipError(f"table {table} needs a caption, and the record has none; add its text or leave the table out")
        # Quirk of the release's processor: a prompt that is text alone loses leading whitespace on its way to the fused head.
        alone = not chat and modalities == frozenset("t") and preset.text_head == "fused"
        lead += f"{chosen}: " if chosen else ""
        ids = tokenizer.encode_text(lead + (caption.lstrip() if alone else caption))
        most = preset.max_text_tokens + (len(tokenizer.encode_text(lead)) if lead else 0)
        cut = max(0, len(ids) - most)
        ids = ids[:most]
    else:
        ids = tokenizer.encode_text(preset.filler_of(table))
    if preset.end_token:
        ids = [*ids, tokenizer.im_end, *(tokenizer.encode_text("\n") if chat else ())]
    return ids, cut


def text_tokens(tokenizer: Tokenizer, config: ModelConfig, preset: Preset, table: str, caption: str | None) -> int:
    """Returns the tokens of a prompt that are not its media with their begin and end: template, prefix, caption and end token."""
    head = prompt_head(tokenizer, config.prompt)
    if head and TABLE_MODALITIES[table] & frozenset("va"):
        head += tokenizer.encode_text(USER)
    return len(head) + len(prompt_text(tokenizer, config, preset, table, caption)[0])


def build_sequence(
    tokenizer: Tokenizer,
    config: ModelConfig,
    preset: Preset,
    table: str,
    caption: str | None,
    video: VideoGrid | None,
    audio_tokens: int | None,
    *,
    prefix: str | None = None,
) -> TokenSequence:
    """Returns the prompt of one clip for one table.

    Args:
      table: a name in `config.TABLES`.
      caption: used where the table has text.
      video: used where the table has video.
      audio_tokens: tokens k of the audio tower, used where the table has audio.
      prefix: the record's own prefix of its caption, None for the preset's.

    Raises:
      ConfigError: for an unknown table.
      ClipError: where the clip lacks what the table needs, the caption is not valid Unicode, or nothing is left to embed.
    """
    if table not in TABLE_MODALITIES:
        raise ConfigError(f"unknown table {table!r}; choose among {', '.join(TABLE_MODALITIES)}")
    modalities = TABLE_MODALITIES[table]
    if "v" in modalities and video is None:
        raise ClipError(f"table {table} needs video, and the record has none; add its video or leave the table out")
    if "a" in modalities and not audio_tokens:
        raise ClipError(f"table {table} needs audio, and the record has none; add its audio or leave the table out")
    head = prompt_head(tokenizer, config.prompt)
    text, cut = prompt_text(tokenizer, config, preset, table, caption, prefix)
    if not modalities & frozenset("va"):
        if not text:
            raise ClipError("the caption is empty and the preset adds no end token, so that nothing is left to embed; give a caption")
        return _text_only([*head, *text], cut)
    if head:
        head += tokenizer.encode_text(USER)
    block = media_block(config, video if "v" in modalities else None, audio_tokens if "a" in modalities else None, start=len(head))
    count = (len(head), len(text))
    return TokenSequence(
        ids=np.concatenate([np.asarray(head, np.int32), block.ids, np.asarray(text, np.int32)]),
        positions=np.concatenate([line(0, len(head)), block.positions, line(block.next, len(text))], axis=1),
        source=np.pad(block.source, count, constant_values=SOURCE_TEXT),
        source_index=np.pad(block.source_index, count),
        prefix=len(head) + len(block.ids),
        truncated=cut,
    )


def _text_only(ids: list[int], cut: int) -> TokenSequence:
    return TokenSequence(
        ids=np.asarray(ids, np.int32),
        positions=line(0, len(ids)),
        source=np.full(len(ids), SOURCE_TEXT, np.int8),
        source_index=np.zeros(len(ids), np.int32),
        truncated=cut,
    )


def build_sequences(
    features: Features, tables: Sequence[str], tokenizer: Tokenizer, config: ModelConfig, preset: Preset
) -> Mapping[str, TokenSequence]:
    """Returns the prompts of one clip, one for each table whose modalities the clip has.

    Raises:
      ClipError: where a prompt cannot be built.
    """
    video = features.vision.grid if features.vision else None
    has = {"t": features.record.text is not None, "v": video is not None, "a": features.audio is not None}
    found = {
        table: build_sequence(
            tokenizer, config, preset, table, features.record.text, video, features.audio_tokens, prefix=features.record.prefix
        )
        for table in tables
        if all(has[m] for m in TABLE_MODALITIES[table])
    }
    for table, sequence in found.items():
        if len(sequence.ids) > config.decoder.max_positions:
            raise ClipError(
                f"its {table} prompt has {len(sequence.ids)} tokens, the model takes {config.decoder.max_positions}; "
                f"lower the preset's audio_seconds, pixels or frames"
            )
    return found


def tokenized_clip(
    features: Features, tables: Sequence[str], tokenizer: Tokenizer, config: ModelConfig, preset: Preset
) -> TokenizedClip | ClipError:
    """Returns a clip with the prompts of `build_sequences`, or why there are none, with the record's name."""
    try:
        return TokenizedClip(features, build_sequences(features, tables, tokenizer, config, preset))
    except ClipError as e:
        return ClipError(f"{who(features.record)}: {e}")


def who(record: Record) -> str:
    """Returns what to call a record in a message."""
    return f"record {record.id!r}" + (f" (line {record.line} of the manifest)" if record.line else "")


def able_records(records: Sequence[Record], tables: Sequence[str]) -> tuple[list[Record], tuple[tuple[str, str], ...]]:
    """Returns the records that have what some table needs, and (record id, reason) of the others."""
    fits = [any(TABLE_MODALITIES[name] <= r.modalities for name in tables) for r in records]
    unable = tuple((r.id, _missing(r, tables)) for r, fit in zip(records, fits, strict=True) if not fit)
    return [r for r, fit in zip(records, fits, strict=True) if fit], unable


def _missing(record: Record, tables: Sequence[str]) -> str:
    names = {"t": "text", "v": "video", "a": "audio"}
    # Of the table that needs least besides what is there.
    lacks = min((TABLE_MODALITIES[name] - record.modalities for name in tables), key=len)
    lacking = [names[m] for m in "tva" if m in lacks]
    return f"{who(record)}: has no {' and no '.join(lacking)}, which the requested tables need; add the field or choose other --tables"
