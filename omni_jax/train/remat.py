"""What the backward pass finds of each decoder layer, and what it computes again."""

from __future__ import annotations

import jax

from omni_jax.config import ConfigError
from omni_jax.model.layers import Policy

AUTO = "auto"

REMAT: dict[str, Policy] = {
    "none": None,  # keep every residual
    "layer": jax.checkpoint_policies.nothing_saveable,  # keep the layer's input, compute the layer again
    "dots": jax.checkpoint_policies.save_only_these_names("attention", "linear"),  # keep the outputs of linear maps and of attention
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # as "layer", but attention is not computed again
    # As "layer", with the layers' inputs in the host's memory between the passes.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"], offload_src="device", offload_dst="pinned_host"
    ),
}
"""Checkpoint policies of a decoder layer by name."""


def read(text: str) -> list[tuple[int | None, str]]:
    """Returns the (layers, policy) that "layer:22,dots" lists, in the order of the layers; the last, without a number, has the rest.

    Raises:
      ConfigError: for an unknown policy, or numbers of layers that are none.
    """
    found: list[tuple[int | None, str]] = []
    parts = text.split(",")
    for part in parts:
        name, colon, count = part.strip().partition(":")
        if name not in REMAT:
            raise ConfigError(f"remat {text!r}: choose one of {', '.join(REMAT)}, or layers with each, as in layer:22,dots")
        last = len(found) == len(parts) - 1
        if bool(colon) == last or (colon and not (count.isdecimal() and int(count))):
            raise ConfigError(f"remat {text!r}: every policy but the last needs a number of layers, as in layer:22,dots")
        found.append((int(count) if colon else None, name))
    return found


def names(text: str, layers: int) -> tuple[str, ...]:
    """Returns the policy's name of each layer.

    Raises:
      ConfigError: as `read`; where the numbers leave nothing of so many layers for the last policy; for "auto", which only a plan finds.
    """
    if text == AUTO:
        raise ConfigError("remat 'auto': omni-jax compile --topology CHIP:GRID finds it and prints the flags to run with; give those here")
    made: list[str] = []
    for count, name in read(text):
        made += [name] * (layers - len(made) if count is None else count)
    if len(made) > layers or read(text)[-1][1] != made[-1]:
        raise ConfigError(f"remat {text!r}: the decoder has {layers} layers, and the last policy has one at least")
    return tuple(made)


def policies(text: str, layers: int) -> tuple[Policy, ...]:
    """Returns the checkpoint policy of each layer; raises as `names`."""
    return tuple(REMAT[name] for name in names(text, layers))
