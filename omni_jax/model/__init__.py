"""The encoder in Flax NNX."""

from omni_jax.model.encoder import (
    Encoder,
    abstract_encoder,
    abstract_params,
    carried_shapes,
    param_axes,
    param_shardings,
    rounded_maps,
    with_params,
)
