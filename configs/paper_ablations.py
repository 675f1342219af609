"""The paper's ablation of the losses: the 7B recipe with L_A alone, L_A + L_D, or all three, everything else equal.

    omni-jax train --config paper_ablations:L_A --workdir runs/L_A \
        --config.model.base=wave7b --config.data.train=shards

`L_A`, `L_A+L_D` or `all` follows the colon.
"""

import ml_collections

from omni_jax.config import ConfigError
from omni_jax.configs import omniretriever_7b

WEIGHTS = {
    "L_A": {"tuple": 0.0, "distillation": 0.0, "pairwise": 1.0},
    "L_A+L_D": {"tuple": 0.0, "distillation": 1.0, "pairwise": 1.0},
    "all": {"tuple": 1.0, "distillation": 1.0, "pairwise": 1.0},
}


def get_config(losses: str = "all") -> ml_collections.ConfigDict:
    """Returns the recipe with the named losses active."""
    if losses not in WEIGHTS:
        raise ConfigError(f"paper_ablations:{losses}: choose one of {', '.join(WEIGHTS)}")
    config = omniretriever_7b.get_config()
    config.losses.weights.update(WEIGHTS[losses])
    return config
