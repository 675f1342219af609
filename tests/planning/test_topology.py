"""Topologies and meshes as text: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from omni_jax.config import ConfigError
from omni_jax.planning.chips import CHIPS, read_topology, usual_grid
from omni_jax.planning.devices import planning_mesh, read_mesh

HEADS = (28, 4)


@pytest.mark.parametrize(
    ("text", "slices", "chips", "devices", "hosts"),
    [
        ("v5e:4x4", 1, 16, 16, 4),
        ("v5e:16x16", 2, 512, 512, 128),
        ("v5p:64", 1, 64, 64, 16),
        ("tpu7x:2x2x4", 1, 16, 32, 4),
        ("v5e:1x1", 1, 1, 1, 1),
    ],
)
def test_sizes(text: str, slices: int, chips: int, devices: int, hosts: int):
    topology = read_topology(text, slices)
    assert (topology.chips, topology.devices, topology.hosts) == (chips, devices, hosts)


def test_a_count_takes_its_usual_grid():
    assert usual_grid(CHIPS["v5e"], 16) == (4, 4)
    assert usual_grid(CHIPS["v5e"], 32) == (4, 8)
    assert usual_grid(CHIPS["v5p"], 128) == (4, 4, 8)
    assert str(read_topology("v6e:64")) == "v6e:8x8"


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v3:4x4", 1, "unknown chip 'v3'; choose one of v4, v5e, v5p, v6e, v7x"),
        ("v5e", 1, "write the grid of chips after a colon, as in v5e:4x4"),
        ("v5e:4xa", 1, "write the grid of chips"),
        ("v5e:4x4x4", 1, "v5e grids have 2 dimensions"),
        ("v5p:4x4", 1, "v5p grids have 3 dimensions, as in v5p:4x4x4"),
        ("v5e:32x16", 1, "has 512 chips; a slice of v5e has 256 at most"),
        ("v5e:24", 1, "give the grid, as in v5e:4x4"),
        ("v5e:4x4", 0, "slices 0: must be at least 1"),
    ],
)
def test_unknown_topologies_are_refused(text: str, slices: int, message: str):
    with pytest.raises(ConfigError, match=message):
        read_topology(text, slices)


def test_fsdp_takes_what_the_other_axes_leave():
    topology = read_topology("v5e:4x4")
    assert read_mesh(None, topology, HEADS) == {"data": 1, "fsdp": 16, "tensor": 1}
    assert read_mesh("data=2,tensor=2", topology, HEADS) == {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3,fsdp=5", "mesh data=3 x fsdp=5 x tensor=1 makes 15 devices, but v5e:4x4 has 16"),
        ("tensor=8", r"tensor=8 does not divide the decoder's 28 heads and 4 KV heads; use one of 1, 2, 4"),
        ("pipe=2", "mesh 'pipe=2': write axes as data=1,fsdp=16,tensor=1"),
        ("fsdp=0", "mesh 'fsdp=0'"),
        ("fsdp", "mesh 'fsdp'"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read_mesh(text, read_topology("v5e:4x4"), HEADS)


def test_an_abstract_mesh_has_the_slices_first():
    mesh = planning_mesh(read_topology("v5e:16x16", 2), {"data": 1, "fsdp": 256, "tensor": 1}, compiled=False)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 256, "tensor": 1}
