"""What of each decoder layer is kept, as a config says it."""

import jax
import pytest

from omni_jax.config import ConfigError
from omni_jax.train import remat


def test_one_policy_is_that_of_all_layers():
    assert remat.names("dots", 3) == ("dots",) * 3
    assert remat.policies("none", 2) == (None, None)


def test_policies_take_layers_in_their_order():
    assert remat.names("layer:2, attention:1,dots", 5) == ("layer", "layer", "attention", "dots", "dots")
    assert remat.policies("layer:1,none", 3) == (jax.checkpoint_policies.nothing_saveable, None, None)


@pytest.mark.parametrize(
    "text", ["layer:22", "layer,dots", "layer:0,dots", "layer:x,dots", "layer:-1,dots", "layer:,dots", "dots:2,layer:3"]
)
def test_all_policies_but_the_last_say_how_many_layers(text: str):
    with pytest.raises(ConfigError, match=f"remat '{text}': every policy but the last needs a number of layers, as in layer:22,dots"):
        remat.read(text)


@pytest.mark.parametrize("text", ["more", "layer:2,more", "", "layer:2,"])
def test_an_unknown_policy_is_refused_by_name(text: str):
    with pytest.raises(ConfigError, match=f"remat '{text}': choose one of none, layer, dots, attention, offload"):
        remat.read(text)


@pytest.mark.parametrize("layers", [1, 22])
def test_the_last_policy_has_a_layer(layers: int):
    with pytest.raises(ConfigError, match=f"the decoder has {layers} layers, and the last policy has one at least"):
        remat.names("layer:22,dots", layers)


def test_what_only_a_plan_finds_is_no_policy():
    with pytest.raises(ConfigError, match="remat 'auto': omni-jax compile --topology CHIP:GRID finds it and prints the flags"):
        remat.policies("auto", 28)
