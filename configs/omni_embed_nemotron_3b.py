"""The paper's replication: the recipe of OmniRetriever-7B on Omni-Embed-Nemotron-3B. LoRA alone trains, as this backbone has no heads.

    omni-jax train --config omni_embed_nemotron_3b --workdir runs/nemotron3b \\
        --config.model.base=omni_embed_nemotron_3b --config.data.train=shards --config.evaluation.manifest=held_out.jsonl

`omni_embed_nemotron_3b` is what `omni-jax convert to-jax` wrote (docs/guides/backbones.md). Clips are cut to 8 s as in the recipe; the
backbone itself was used with whole tracks.
"""

import ml_collections

from omni_jax.configs import omniretriever_7b


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of SPEC section 7 with the prompts of section 10."""
    config = omniretriever_7b.get_config()
    fields = ml_collections.ConfigDict({"audio_seconds": 8.0, "audio_pad": True})
    config.update({"model": {"base": "omni_embed_nemotron_3b"}, "data": {"preset": "nemotron", "preset_fields": fields}})
    return config
