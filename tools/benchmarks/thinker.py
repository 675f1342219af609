"""The torch side of the mid-size benchmark: the thinker of the `transformers` package, as its users run it.

Its audio tower, vision tower and text model compute as they come (sdpa attention, its own rotary positions). What it lacks are small torch
modules: BEATs with its bridge, and the fusion head. Prompts are padded on the left and the last position is pooled, as in the release.

Letters: N clips, S tokens, L layers, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration

from omni_jax.config import ModelConfig
from omni_jax.types import SOURCE_AUDIO, SOURCE_VIDEO, AudioSegment, Features, TokenSequence, VisionFeatures
from tools.benchmarks.torch_encoder import AudioBridge, fusion_head, load

MediaTokens = tuple[Tensor | None, Tensor | None]
"""A clip's video tokens (tokens, D) and its doubled audio tokens (2k, D)."""


def thinker_config(config: ModelConfig) -> Qwen2_5OmniThinkerConfig:
    """Returns the same settings in the words of the `transformers` package."""
    text, vision, audio, tokens = config.decoder, config.vision, config.audio, config.tokens
    made = Qwen2_5OmniThinkerConfig(
        text_config={
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "vocab_size": text.vocab_size,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": list(text.mrope_sections)},
        },
        vision_config={
            "depth": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "out_hidden_size": vision.output_size,
            "fullatt_block_indexes": list(vision.full_attention_layers),
        },
        audio_config={
            "d_model": audio.hidden_size,
            "encoder_layers": audio.num_layers,
            "encoder_attention_heads": audio.num_heads,
            "encoder_ffn_dim": audio.intermediate_size,
            "output_dim": audio.output_size,
            "n_window": audio.n_window,
        },
        audio_token_index=tokens.audio,
        video_token_index=tokens.video,
    )
    made._attn_implementation = "sdpa"
    return made


class Thinker:
    """Embeds clips with the torch model, on CPU in float32."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray]):
        model: Any = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(config)).eval()
        self.audio, self.vision, self.text = model.model.audio_tower, model.model.visual, model.model.language_model
        self.bridge = AudioBridge(config).eval()
        self.head = fusion_head(config).eval()
        for module, prefix in (
            (self.audio, "audio_tower."),
            (self.vision, "visual."),
            (self.text, "model."),
            (self.head, "classify_linear."),
        ):
            load(module, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        load(self.bridge, dict(weights))

    @torch.inference_mode()
    def media(self, clips: Sequence[Features], *, video: bool = True, audio: bool = True) -> list[MediaTokens]:
        """Returns each clip's media tokens, the towers running once for all clips."""
        return self.media_tokens(clips, video=video, audio=audio)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[TokenSequence], media: Sequence[MediaTokens]) -> np.ndarray:
        """Returns embeddings (N, D) of prompts, each with its clip's media tokens, through the fusion head."""
        return self.head(torch.cat(self.last_states(prompts, media), dim=-1)).numpy()

    def media_tokens(self, clips: Sequence[Features], *, video: bool = True, audio: bool = True) -> list[MediaTokens]:
        """`media` with gradients, where parameters ask for them."""
        seen = self._video([c.vision for c in clips if c.vision]) if video else [None] * len(clips)
        heard = self._audio([s for c in clips for s in c.audio or ()]) if audio else [None] * len(clips)
        return list(zip(seen, heard, strict=True))

    def last_states(self, prompts: Sequence[TokenSequence], media: Sequence[MediaTokens]) -> list[Tensor]:
        """Returns the last token of every layer, L times (N, D), the last one after the final norm."""
        states, mask, positions = self._pad(prompts, media)
        kept = self.text(
            inputs_embeds=states, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True
        ).hidden_states
        return [h[:, -1] for h in kept[1:]]

    def _video(self, features: Sequence[VisionFeatures]) -> list[Tensor]:
        grids = torch.tensor([f.grid.thw for f in features])
        tokens = self.vision(torch.from_numpy(np.concatenate([f.patches for f in features])), grid_thw=grids).pooler_output
        return list(tokens.split((grids.prod(-1) // 4).tolist()))

    def _audio(self, segments: Sequence[AudioSegment]) -> list[Tensor]:
        mel = torch.from_numpy(np.concatenate([s.log_mel for s in segments], axis=1))
        frames = torch.tensor([s.log_mel.shape[1] for s in segments])
        whisper = self.audio(mel, feature_lens=frames, aftercnn_lens=(frames - 1) // 2 + 1).last_hidden_state
        fbank = torch.from_numpy(np.stack([s.fbank[: len(s.fbank) // 16 * 16] for s in segments]))
        beats = self.bridge.beats_tokens(fbank, segments[0].tokens)
        pairs = zip(whisper.split([s.tokens for s in segments]), beats, strict=True)
        return [torch.stack([a, b], dim=1).flatten(0, 1) for a, b in pairs]

    def _pad(self, prompts: Sequence[TokenSequence], media: Sequence[MediaTokens]) -> tuple[Tensor, Tensor | None, Tensor]:
        longest = max(len(p.ids) for p in prompts)
        states, positions = [], torch.zeros(3, len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for n, (prompt, (video, audio)) in enumerate(zip(prompts, media, strict=True)):
            start = longest - len(prompt.ids)
            x = self.text.embed_tokens(torch.from_numpy(prompt.ids).long())
            source = torch.from_numpy(prompt.source)
            for kind, tokens in ((SOURCE_VIDEO, video), (SOURCE_AUDIO, audio)):
                place = (source == kind).nonzero().squeeze(1)
                if len(place) and tokens is not None:
                    x[place] = tokens[torch.from_numpy(prompt.source_index).long()[place]]
            states.append(torch.nn.functional.pad(x, (0, 0, start, 0)))
            positions[:, n, start:] = torch.from_numpy(prompt.positions)
            mask[n, start:] = 1
        # One prompt needs no mask, and sdpa is fastest without one.
        return torch.stack(states), mask if len(prompts) > 1 else None, positions
