"""The optimizer against its formulas, written out in NumPy."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import ConfigError
from omni_jax.model import abstract_params
from omni_jax.train.optimizer import OptimizerConfig, clip_by_global_norm, decays, make_optimizer, schedule
from tests.model.builders import SEVEN_B
from tests.tolerances import assert_close


@pytest.mark.jit
def test_the_schedule_rises_from_zero_and_falls_to_zero():
    config = OptimizerConfig(total_steps=110, learning_rate=2.0)
    assert config.warmup == 4  # ceil(3.3)
    rate = schedule(config)
    expected = [2 * u / 4 if u < 4 else 1 + math.cos(math.pi * (u - 4) / 106) for u in range(111)]
    assert_close(rate(np.arange(111)), np.array(expected), "optimizer")
    assert float(rate(0)) == 0.0 and float(rate(4)) == 2.0
    assert abs(float(rate(110))) < 1e-6 and abs(float(rate(500))) < 1e-6


@pytest.mark.jit
def test_the_schedule_without_warmup_and_with_a_floor():
    rate = schedule(OptimizerConfig(total_steps=10, learning_rate=1.0, warmup_steps=0, final_fraction=0.1))
    assert_close(rate(np.array([0, 5, 10])), np.array([1.0, 0.55, 0.1]), "optimizer")


@pytest.mark.jit
def test_clipping_divides_by_the_norm_and_torch_s_epsilon():
    def update(gradients) -> Any:
        return clip_by_global_norm(1.0).update(gradients, (), None)[0]

    big = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    assert_close(update(big)["b"], np.array([4.0 / (5.0 + 1e-6)], np.float32), "optimizer")
    small = {"a": jnp.array([3e-3])}
    assert_close(update(small)["a"], np.array([3e-3], np.float32), "optimizer")
    # torch's epsilon shows where the norm is the limit itself: the gradient shrinks by a millionth.
    assert float(update({"a": jnp.array([1.0])})["a"][0]) < 1.0


@pytest.mark.jit
def test_updates_follow_adamw():
    config = OptimizerConfig(total_steps=8, learning_rate=0.1, warmup_steps=1, weight_decay=0.3, clip_norm=2.0)
    rng = np.random.default_rng(0)
    names = {"decoder/layers/attn/q/lora_a": (2, 3), "head/fc1/kernel": (3, 2), "head/fc1/bias": (2,), "bridge/norm/scale": (4,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
    expected = {name: p.astype(np.float64) for name, p in params.items()}
    m, v = ({name: np.zeros(shape) for name, shape in names.items()} for _ in range(2))
    optimizer = make_optimizer(config)
    values: Any = {name: jnp.asarray(p) for name, p in params.items()}
    state = optimizer.init(values)
    rate = schedule(config)
    for u in range(5):
        gradients = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}
        updates: Any
        updates, state = optimizer.update({n: jnp.asarray(g) for n, g in gradients.items()}, state, values)
        values = {name: values[name] + updates[name] for name in names}
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        factor = min(1.0, 2.0 / (norm + 1e-6))
        for name in names:
            g = gradients[name] * factor
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            step = (m[name] / (1 - 0.9 ** (u + 1))) / (np.sqrt(v[name] / (1 - 0.999 ** (u + 1))) + 1e-8)
            decay = 0.3 * expected[name] if name.endswith(("lora_a", "kernel")) else 0.0
            expected[name] = expected[name] - float(rate(u)) * (step + decay)
        for name in names:
            # Torch's AdamW in float32 is this far from float64 as well: five updates of 0.1 each.
            assert_close(values[name], expected[name], "invariance")


def test_every_parameter_of_the_7b_tree_has_a_decay_rule():
    by_kind = {}
    for path in abstract_params(SEVEN_B):
        by_kind.setdefault(path[-1], decays("/".join(path)))
    assert {kind for kind, yes in by_kind.items() if yes} == {"kernel", "lora_a", "lora_b", "embedding", "v"}
    assert {kind for kind, yes in by_kind.items() if not yes} == {"bias", "scale", "g", "gate_scale"}


def test_an_unknown_kind_of_parameter_is_refused():
    with pytest.raises(ConfigError, match="decoder/new/thing"):
        decays("decoder/new/thing")


@pytest.mark.parametrize(
    "bad", [{"total_steps": 0}, {"learning_rate": math.nan}, {"clip_norm": 0.0}, {"warmup_ratio": 2.0}, {"weight_decay": -1.0}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OptimizerConfig(**{"total_steps": 10, **bad})
