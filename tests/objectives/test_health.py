"""Training health: each metric against its formula in NumPy, shards against one device, and what it costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from omni_jax.objectives import HEALTH, Pool, health
from omni_jax.train import LossConfig
from tests.model.builders import SEVEN_B
from tests.tolerances import assert_close
from tools.training_cost import ClipSizes, per_triple, total

CLIPS, WIDTH = 24, 10
SINGLES = ("text", "audio", "video")
NAMES = ("anchor", "positive", "hard", *SINGLES)


def embeddings(seed: int = 0) -> dict[str, jax.Array]:
    """Returns rows that agree a little within a clip, as those of a model in training do."""
    rng = np.random.default_rng(seed)
    clip = rng.standard_normal((CLIPS, WIDTH))
    return {name: jnp.asarray(clip + rng.standard_normal((CLIPS, WIDTH)) + 0.3 * n, jnp.float32) for n, name in enumerate(NAMES)}


def pool(z: dict[str, jax.Array], singles: tuple[str, ...] = SINGLES, axis: Any = None) -> Pool:
    return Pool(z, singles, (), {}, axis)


def by_formula(z: dict[str, jax.Array], singles: tuple[str, ...]) -> dict[str, float]:
    """The definitions, clip by clip in float64."""
    unit = {name: np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True) for name, x in z.items()}
    found: dict[str, float] = {}

    def margin(x: str, y: str) -> float:
        return float(
            np.mean([unit[x][i] @ unit[y][i] - max(unit[x][i] @ unit[y][j] for j in range(CLIPS) if j != i) for i in range(CLIPS)])
        )

    for m in singles:
        x = unit[m]
        found[f"alignment_{m}"] = float(np.mean(np.sum((x - unit["anchor"]) ** 2, axis=1)))
        apart = [np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(CLIPS) for j in range(CLIPS) if i != j]
        found[f"uniformity_{m}"] = float(np.log(np.mean(apart)))
        values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
        found[f"effective_rank_{m}"] = float(values.sum() ** 2 / (values**2).sum())
        found[f"teacher_margin_{m}"] = margin("anchor", m) - float(np.mean([margin(other, m) for other in singles if other != m]))
    for x, y in (("text", "audio"), ("text", "video"), ("audio", "video")):
        if x in singles and y in singles:
            found[f"gap_{x}_{y}"] = float(np.linalg.norm(unit[x].mean(0) - unit[y].mean(0)))
    near = [unit["positive"] @ unit["anchor"][i] for i in range(CLIPS)]
    harder = [unit["anchor"][i] @ unit["hard"][i] > np.delete(near[i], i).max() for i in range(CLIPS)]
    found["hard_share_audio"] = float(np.mean(harder))
    return found


@pytest.mark.jit
@pytest.mark.parametrize("singles", [SINGLES, ("text", "video")])
def test_each_metric_is_its_formula_and_takes_no_gradient(singles: tuple[str, ...]) -> None:
    z = embeddings()
    found = jax.jit(lambda z: health(pool(z, singles), "audio"))(z)
    want = by_formula(z, singles)
    assert found.keys() == want.keys() <= HEALTH.keys() and 0 < want["hard_share_audio"] < 1
    for name, value in want.items():
        assert_close(found[name], value, "loss")
    gradient = jax.jit(jax.grad(lambda z: sum(health(pool(z, singles), "audio").values(), jnp.zeros(()))))(z)
    assert not any(np.asarray(x).any() for x in gradient.values())


@pytest.mark.jit
def test_eight_shards_give_what_one_device_gives() -> None:
    z, mesh = embeddings(1), jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda z: health(pool(z, axis="data"), "audio"), mesh=mesh, in_specs=P("data"), out_specs=P())
    found = jax.jit(split)(z)
    want = jax.jit(lambda z: health(pool(z), "audio"))(z)
    for name, value in want.items():
        assert_close(found[name], value, "loss")


@pytest.mark.jit
def test_a_step_without_a_whole_tuple_aligns_its_modalities_with_each_other_and_one_clip_says_nothing() -> None:
    z = {name: x for name, x in embeddings(2).items() if name in ("text", "audio")}
    found = health(pool(z, ("text", "audio")), None)
    assert set(found) == {*(f"{name}_{m}" for name in ("alignment", "uniformity", "effective_rank") for m in z), "gap_text_audio"}
    assert_close(found["alignment_text"], found["alignment_audio"], "loss")
    assert health(pool({name: x[:1] for name, x in z.items()}, ("text", "audio")), None) == {}


@pytest.mark.jit
def test_health_costs_less_than_a_hundredth_of_a_step_at_7b() -> None:
    """Floating point operations: of health as XLA counts them, of a step's products as the table of training cost does."""
    clips = 32
    shapes = {name: jax.ShapeDtypeStruct((clips, SEVEN_B.decoder.hidden_size), jnp.float32) for name in NAMES}
    cost = jax.jit(lambda z: health(pool(z), "audio")).lower(shapes).compile().cost_analysis()["flops"]
    step = clips * min(map(total, per_triple(SEVEN_B, ClipSizes(), LossConfig())))
    assert 0 < cost < 1e-2 * step
