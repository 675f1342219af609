"""The model of configs/tiny.py in the manner of the second backbone: bidirectional attention, mean pooling, no BEATs, chat template.

    omni-jax train --config tiny_nemotron --workdir runs/tiny_nemotron \\
        --config.data.train=demo_out/shards --config.evaluation.manifest=demo_out/clips/held_out.jsonl
"""

import ml_collections

from omni_jax.configs import tiny


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe."""
    values = tiny.get_config().to_dict()
    values["model"]["architecture"] |= {"beats": None, "attention": "bidirectional", "pooling": "mean", "prompt": "chat"}
    values["data"] |= {"preset": "nemotron", "preset_fields": values["data"]["preset_fields"] | {"audio_pad": True}}
    return ml_collections.ConfigDict(values)
