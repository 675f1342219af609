"""Fingerprints: the same for every split and on host and device, another for every change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.parallel import make_mesh
from omni_jax.train import fingerprint
from omni_jax.train.fingerprint import fingerprints

KINDS = (np.float32, ml_dtypes.bfloat16, np.int32, np.uint32, np.int8)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {np.dtype(kind).name: (100 * rng.standard_normal((16, 3, 5))).astype(kind) for kind in KINDS}
    made["bool"] = made["float32"] > 0
    return made | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}


@pytest.mark.jit
def test_host_and_devices_agree_under_every_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 7)
    wanted = fingerprints(arrays())
    place = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp"))
    split = {name: jax.device_put(x, place) if x.shape == (16, 3, 5) else jnp.asarray(x) for name, x in arrays().items()}
    assert fingerprints(split) == wanted  # gathered on the host of a CPU
    program = fingerprint._program(NamedSharding(place.mesh, PartitionSpec()))
    sums = program({name: x for name, x in split.items() if x.sharding == place})
    assert {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in sums.items()} == {name: wanted[name] for name in sums}
    assert all(len(digits) == 16 for digits in wanted.values()) and len(set(wanted.values())) == len(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_bit_and_every_exchange_of_values_changes_it(kind: type) -> None:
    values = arrays()[np.dtype(kind).name].reshape(-1)[:20]
    wanted = fingerprints({"x": values})["x"]
    bits = values.view(f"u{values.itemsize}")
    for at in range(values.size):
        for bit in range(8 * values.itemsize):
            other = bits.copy()
            other[at] ^= other.dtype.type(1 << bit)
            assert fingerprints({"x": other.view(kind)})["x"] != wanted
        swapped = values.copy()
        swapped[[at, at - 1]] = swapped[[at - 1, at]]
        assert fingerprints({"x": swapped})["x"] != wanted or values[at] == values[at - 1]
