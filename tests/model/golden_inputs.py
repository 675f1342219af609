"""What the reference fed its model, laid out as this encoder takes it. Nothing here goes through the token or feature packages.

Letters: N temporal steps or chunks, P patches, F frames, S tokens, M media tokens.
"""

from __future__ import annotations

import numpy as np

from omni_jax.config import ModelConfig
from tests.golden_set import GoldenSet
from tests.model import reference_towers

COMBINATIONS = ("t", "v", "a", "tv", "ta", "va", "tva", "label")


def video(golden: GoldenSet, config: ModelConfig, clip: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(patches, coords, window) of a clip's temporal steps, as `types.VisionBatch` has them."""
    t, h, w = (int(n) for n in golden.inputs[f"{clip}/grid_thw"][0])
    window = np.full(h * w, -1)
    for number, members in enumerate(reference_towers.windows(h, w, config.vision)):
        window[members] = number
    coords = np.array(reference_towers.patch_order(h, w, config.vision.merge_size))
    patches = golden.inputs[f"{clip}/pixel_values"].reshape(t, h * w, -1)
    return patches, np.tile(coords, (t, 1, 1)), np.tile(window, (t, 1))


def mel_chunks(golden: GoldenSet, config: ModelConfig, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """(mel, frames) of a clip's chunks, as `types.AudioBatch` has them."""
    size = config.audio.chunk_frames
    mel = golden.inputs[f"{clip}/log_mel"].T[: int(golden.inputs[f"{clip}/mel_frames"])]
    pieces = [mel[n : n + size] for n in range(0, len(mel), size)]
    padded = np.stack([np.pad(p, ((0, size - len(p)), (0, 0))) for p in pieces])
    return padded, np.array([len(p) for p in pieces])


def valid_tokens(tokens: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(N, 50, D) tokens of chunks to the clip's tokens (k, D)."""
    return np.concatenate([chunk[: ((n - 1) // 2 + 1) // 2] for chunk, n in zip(np.asarray(tokens), frames, strict=True)])


def fbank(golden: GoldenSet, config: ModelConfig, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """(fbank, frames) of a clip as a batch of one, as `types.BeatsBatch` has them."""
    array = golden.inputs[f"{clip}/fbank"]
    side = config.beats.patch_size
    return np.pad(array, ((0, -len(array) % side), (0, 0)))[None], np.array([len(array)])


def rows(golden: GoldenSet, config: ModelConfig, clip: int, video_tokens: int) -> dict[str, np.ndarray]:
    """Decoder inputs of all of a clip's prompts, a row each, padded on the right to the longest prompt of the set.

    The media table is expected as: video tokens, Whisper tokens, BEATs tokens.
    """
    inputs, tokens = golden.inputs, config.tokens
    audio_tokens = int(inputs[f"{clip}/audio_tokens"])
    size = max(len(inputs[f"{c}/ids/{m}"]) for c in range(golden.clips) for m in COMBINATIONS)
    count = len(COMBINATIONS)
    out = {
        "ids": np.full((count, size), tokens.pad, np.int32),
        "media_index": np.full((count, size), -1, np.int32),
        "positions": np.zeros((3, count, size), np.int32),
        "segment": np.zeros((count, size), np.int32),
        "branch": np.zeros((count, size), np.int32),
        "pool": np.zeros((count, 1), np.int32),
    }
    for r, combination in enumerate(COMBINATIONS):
        ids = inputs[f"{clip}/ids/{combination}"]
        n = len(ids)
        # The reference kept no positions of the label; without video they count up (SPEC section 4).
        positions = np.arange(n) if combination == "label" else golden.base[f"{clip}/position_ids/{combination}"]
        out["ids"][r, :n], out["positions"][:, r, :n], out["segment"][r, :n], out["pool"][r] = ids, positions, 1, n - 1
        seen, heard = np.flatnonzero(ids == tokens.video), np.flatnonzero(ids == tokens.audio)
        assert len(seen) in (0, video_tokens) and len(heard) in (0, 2 * audio_tokens)
        out["media_index"][r, seen] = np.arange(len(seen))
        # Whisper, BEATs, Whisper, BEATs ...
        out["media_index"][r, heard[::2]] = video_tokens + np.arange(len(heard) // 2)
        out["media_index"][r, heard[1::2]] = video_tokens + audio_tokens + np.arange(len(heard) // 2)
    return out
