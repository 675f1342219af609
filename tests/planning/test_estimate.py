"""Times, cost, bytes to memory and bytes to load, each against a count by hand."""

from __future__ import annotations

import dataclasses

import pytest

from omni_jax.config import ModelConfig
from omni_jax.config.backbones import WAVE_7B
from omni_jax.planning import host_bytes as load_plan_module
from omni_jax.planning.chips import Topology, read_topology
from omni_jax.planning.devices import planning_mesh
from omni_jax.planning.estimate import Times, cost, memory_bytes, times
from omni_jax.planning.hlo import Collective
from omni_jax.planning.host_bytes import host_bytes
from tests.train.random_batches import MODEL

CHIP = read_topology("v5e:4x4")  # 197 Tflop/s, 819 GB/s, 200 GB/s to other chips, 3.125 GB/s to other slices


def collective(kind: str, size: float, runs: int = 1, group: int = 4, across: bool = False) -> Collective:
    return Collective(kind, "bf16[1]", int(size), group, runs, across=across)


def test_times_by_hand():
    found = [
        collective("all-gather", 40e9, runs=2),  # three quarters come from elsewhere: 60 GB
        collective("all-reduce", 40e9),  # twice three quarters: 60 GB
        collective("collective-permute", 10e9),  # all of it
        collective("all-gather", 5e9, group=2, across=True),  # half: 2.5 GB
    ]
    spent = times(16 * 197e12 * 3, 819e9 * 2, found, CHIP)
    assert dataclasses.astuple(spent) == pytest.approx((3.0, 2.0, 130 / 200, 2.5 / 3.125))
    assert (spent.bound, spent.least) == ("arithmetic", pytest.approx(3.0))
    assert spent.expected(0.4) == pytest.approx(7.5) and spent.expected(1.0) == pytest.approx(3.0)


def test_a_chip_of_two_devices_moves_what_both_do():
    chip = read_topology("tpu7x:2x2x1")
    spent = times(4 * 2307e12, 7380e9 / 2, [collective("collective-permute", 300e9)], chip)
    assert (chip.chips, chip.devices) == (4, 8)
    assert dataclasses.astuple(spent) == pytest.approx((1.0, 1.0, 1.0, 0.0))


@pytest.mark.parametrize("name", ["arithmetic", "memory", "interconnect", "network"])
def test_the_bound_is_the_largest(name: str):
    spent = Times(**({"arithmetic": 1.0, "memory": 2.0, "interconnect": 2.0, "network": 2.0} | {name: 3.0}))
    assert (spent.bound, spent.least) == (name, 3.0)
    assert spent.expected(0.5) == 3.0 if name != "arithmetic" else spent.expected(0.5) == 6.0


def test_cost_by_hand():
    # 256 clips in 32 s on 16 chips: 8 a second, a million in 125,000 s or 34.72 hours.
    assert cost(256, 32.0, 16) == pytest.approx({"clips_per_second": 8.0, "chip_hours_per_million_triples": 16 * 125000 / 3600})


def test_bytes_to_memory_of_a_small_decoder():
    """Two layers of width 64, MLP 48, 8 heads and 4 KV heads of 8, LoRA of rank 3 on q, k, v."""
    maps = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 48), (64, 48), (48, 64)]
    lora = [(64, 3), (3, 64), (64, 3), (3, 32), (64, 3), (3, 32)]
    values = 2 * sum(rows * columns for rows, columns in maps + lora)
    edges = 2 * sum(rows + columns for rows, columns in maps + lora)
    operations, passes, trained, tensor = 1e12, 5, 16000, 2
    weights = 5 * 2 * 2 * values / tensor  # bfloat16, written by the gather and read
    activations = operations / 16 * edges / values  # 2 m (k + n) bytes for 2 m k n operations
    optimizer = 8 * 4 * trained / 16
    got = memory_bytes(MODEL, {"decoder": operations}, {"decoder": passes}, CHIP, tensor, trained)
    assert got == pytest.approx(weights + activations + optimizer)


def test_bytes_to_memory_add_up_over_parts():
    parts = ("vision", "audio", "beats", "bridge", "decoder", "head")
    each = [memory_bytes(MODEL, {part: 1e9}, {part: 2}, CHIP, 1, 0) for part in parts]
    assert all(count > 0 for count in each)
    assert memory_bytes(MODEL, dict.fromkeys(parts, 1e9), dict.fromkeys(parts, 2), CHIP, 1, 0) == pytest.approx(sum(each))


# ------------------------------------------------------------------------------------------------------------------- bytes of a host

LEAVES = {
    ("map", "kernel"): ((8, 12), ("embed", "heads")),  # over fsdp and tensor
    ("table",): ((16, 8), ("vocab", "embed")),  # over tensor and fsdp
    ("norm", "scale"): ((10,), ("norm",)),  # everywhere
    ("odd", "kernel"): ((7, 12), ("embed", "heads")),  # 7 rows do not divide: over tensor alone
}


def planned(monkeypatch: pytest.MonkeyPatch, topology: Topology, data: int, fsdp: int, tensor: int) -> dict:
    class Leaf:
        def __init__(self, shape: tuple[int, ...]):
            self.shape = shape

    monkeypatch.setattr(load_plan_module, "abstract_params", lambda config: {path: Leaf(shape) for path, (shape, _) in LEAVES.items()})
    monkeypatch.setattr(load_plan_module, "param_axes", lambda config: {path: axes for path, (_, axes) in LEAVES.items()})
    mesh = planning_mesh(topology, {"data": data, "fsdp": fsdp, "tensor": tensor}, compiled=False)
    return host_bytes(WAVE_7B, mesh, topology)


WHOLE = 2 * (8 * 12 + 16 * 8 + 10 + 7 * 12)


@pytest.mark.parametrize(
    ("topology", "slices", "sizes", "hosts", "each"),
    [
        # Two hosts of four: fsdp over both, tensor inside; half of what is over fsdp, all of the rest.
        ("v5e:2x4", 1, (1, 4, 2), 2, 2 * (48 + 64 + 10 + 84)),
        ("v5e:2x4", 1, (1, 8, 1), 2, 2 * (48 + 64 + 10 + 84)),
        # Tensor over both hosts: it divides the table's 16 rows and no 12 columns.
        ("v5e:2x4", 1, (1, 1, 8), 2, 2 * (96 + 64 + 10 + 84)),
        # A host is a data replica: it reads all.
        ("v5e:2x4", 1, (2, 2, 2), 2, WHOLE),
        # Two slices of one host: each has its own whole copy.
        ("v5e:2x2", 2, (1, 4, 1), 2, WHOLE),
        # Chips of two devices: a host has eight.
        ("tpu7x:2x2x2", 1, (1, 8, 2), 2, 2 * (48 + 64 + 10 + 84)),
        ("v5e:1x1", 1, (1, 1, 1), 1, WHOLE),
        ("v5e:1x1", 2, (1, 1, 1), 2, WHOLE),
    ],
)
def test_bytes_of_a_host_by_hand(
    topology: str, slices: int, sizes: tuple[int, int, int], hosts: int, each: int, monkeypatch: pytest.MonkeyPatch
):
    found = planned(monkeypatch, read_topology(topology, slices), *sizes)
    assert (found["hosts"], found["bytes"], found["bytes_per_host"], found["bytes_per_host_least"]) == (hosts, WHOLE, each, each)


def test_hosts_that_read_unequally(monkeypatch: pytest.MonkeyPatch):
    """Three hosts of four on fsdp=2 x tensor=6: the middle one holds ends of both halves of fsdp."""
    found = planned(monkeypatch, read_topology("v5e:2x6"), 1, 2, 6)
    # The map: 4 of 12 parts. The table, whose 16 rows six do not divide: a half, or both. The odd map: 4 of 6 columns' parts.
    assert found["bytes_per_host_least"] == 2 * (32 + 64 + 10 + 56) and found["bytes_per_host"] == 2 * (32 + 128 + 10 + 56)
    assert " GiB at most, " in found["text"] and " at least, " in found["text"]


def test_the_7b_checkpoint_is_read_once_by_all_hosts_together_but_for_what_is_whole_everywhere():
    topology = read_topology("v5e:4x4")
    mesh = planning_mesh(topology, {"data": 1, "fsdp": 16, "tensor": 1}, compiled=False)
    found = host_bytes(WAVE_7B, mesh, topology)
    together = found["hosts"] * found["bytes_per_host"]
    assert found["hosts"] == 4 and found["bytes_per_host"] == found["bytes_per_host_least"]
    assert found["bytes"] < together < 1.01 * found["bytes"] and f"{found['bytes'] / 2**30:.2f}" == "16.53"
    assert f"each of 4 hosts reads {found['bytes_per_host'] / 2**30:.2f} GiB" in found["text"]


def test_the_small_model_is_the_one_counted_by_hand():
    """What the counts above take for granted."""
    decoder = MODEL.decoder
    assert isinstance(MODEL, ModelConfig) and MODEL.lora is not None and MODEL.lora.rank == 3
    assert (decoder.num_layers, decoder.hidden_size, decoder.intermediate_size, decoder.num_heads, decoder.num_kv_heads) == (
        2,
        64,
        48,
        8,
        4,
    )
