"""The released adapter, trained on: its LoRA matrices and heads on your own clips, three epochs, all clips of a step as negatives.

    omni-jax train --config continue_adapter --workdir runs/mine \
        --config.model.base=omni7b --config.data.train=shards --config.evaluation.manifest=held_out.jsonl

`omni7b` is what `omni-jax convert to-jax --adapter` wrote, `shards` what `omni-jax prepare` wrote. The recipe is that of
`omniretriever_7b` but for three things: no new LoRA matrices, three epochs, and one pool of 256 negatives. Several captions of a clip
(ids CLIP-NUMBER) are kept out of one step.
"""

import ml_collections

from omni_jax.configs import omniretriever_7b


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe."""
    config = omniretriever_7b.get_config()
    config.model.base = "omni7b"
    config.model.lora = None
    config.data.distinct = "id_prefix"
    config.losses.negatives = "global"
    config.epochs = 3.0
    return config
