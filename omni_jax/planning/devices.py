"""Devices of a topology that is not attached: the TPU compiler's, or an abstract mesh where libtpu is missing."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from omni_jax.config import ConfigError
from omni_jax.config.libtpu import NO_TPU
from omni_jax.parallel import make_mesh
from omni_jax.planning.chips import Topology

ENVIRONMENT = {**NO_TPU, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""Lets libtpu compile on a machine without a TPU."""

QUICK = {"exec_time_optimization_effort": -1.0}
"""Compiler options: layouts and collectives as always, less search for the fastest schedule; a tenth of the time."""

MISSING = (
    "libtpu is not installed, so nothing was compiled: peak memory, collectives and the compiler's out-of-memory check are missing "
    "(pip install 'omni-jax[tpu]'; no TPU is needed)"
)


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def prepare_environment() -> None:
    """Sets what libtpu reads when it is loaded, where the user set nothing."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def topology_devices(topology: Topology) -> list[Any]:
    """Returns the devices to compile for. Raises ConfigError where the compiler does not know the topology."""
    prepare_environment()
    options: dict[str, Any] = dict(topology.chip.options)
    if topology.chip.dimensions == 3 and topology.chips // topology.slices >= 64:
        options["wrap"] = [True] * 3
    if any(length % 2 for length in topology.grid[:2]) and math.prod(topology.grid) <= topology.chip.host:
        # Part of one host: libtpu takes a host to be 2 x 2 by default.
        options["chips_per_host_bounds"] = [*topology.grid, 1][:3]
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.platform}:{'x'.join(map(str, topology.grid))}"
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # whatever libtpu raises: it checks the grid
        raise ConfigError(f"topology {topology}: libtpu refuses it: {str(error).splitlines()[0]}") from None
    if len(devices) != topology.devices:
        raise ConfigError(f"topology {topology}: libtpu has {len(devices)} devices for it, {topology.devices} were expected")
    return devices


def planning_mesh(topology: Topology, sizes: dict[str, int], compiled: bool) -> Mesh | AbstractMesh:
    """Returns the mesh of a topology: of the compiler's devices, or an abstract one that can only be lowered for."""
    if compiled:
        return make_mesh(**sizes, devices=topology_devices(topology), slices=topology.slices)
    names = ("slice", "data", "fsdp", "tensor")[topology.slices == 1 :]
    lengths = (topology.slices, sizes["data"], sizes["fsdp"], sizes["tensor"])[topology.slices == 1 :]
    return AbstractMesh(lengths, names, axis_types=(AxisType.Auto,) * len(names))


def read_mesh(text: str | None, topology: Topology, heads: tuple[int, int]) -> dict[str, int]:
    """Returns the axis sizes that "data=1,fsdp=16,tensor=1" gives within a slice; fsdp takes what the others leave.

    Args:
      heads: query and KV heads of the decoder, which tensor must divide.

    Raises:
      ConfigError: for an unknown axis, sizes that do not multiply to the devices, a tensor axis that does not divide the heads.
    """
    sizes: dict[str, int] = {}
    for item in (text or "").split(",") if text else ():
        name, _, value = item.strip().partition("=")
        if name not in ("data", "fsdp", "tensor") or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"mesh {item!r}: write axes as data=1,fsdp=16,tensor=1")
        if name in sizes:
            raise ConfigError(f"mesh {text}: {name} appears twice")
        sizes[name] = int(value)
    each = topology.devices // topology.slices
    data, tensor = sizes.get("data", 1), sizes.get("tensor", 1)
    fsdp = sizes.get("fsdp", max(1, each // (data * tensor)))
    check_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, topology, heads)
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def check_mesh(sizes: dict[str, int], topology: Topology, heads: tuple[int, int]) -> None:
    """Raises ConfigError as `read_mesh`."""
    uneven = [f"{count} {what}" for count, what in zip(heads, ("heads", "KV heads"), strict=True) if count % sizes["tensor"]]
    if uneven:
        even = [str(n) for n in range(1, min(heads) + 1) if not any(count % n for count in heads)]
        raise ConfigError(
            f"mesh tensor={sizes['tensor']} does not divide the decoder's {' and '.join(uneven)}; use one of {', '.join(even)}"
        )
    each = topology.devices // topology.slices
    product = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    if product != each:
        text = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(f"mesh {text} makes {product} devices, but {topology} has {each}{' a slice' if topology.slices > 1 else ''}")
