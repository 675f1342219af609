"""From operations, bytes and collectives to seconds: arithmetic at published rates, nothing measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from omni_jax.config import ModelConfig
from omni_jax.model import abstract_params
from omni_jax.planning.chips import Topology
from omni_jax.planning.hlo import Collective

UTILISATION = 0.4
"""Share of the peak that the expected figures assume: what dense training commonly reaches on TPU. An assumption, not a measurement."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, each as if the others took none.

    Attributes:
      arithmetic: operations at the chips' peak.
      memory: bytes to and from HBM at its bandwidth.
      interconnect: collectives within a slice.
      network: collectives across slices.
    """

    arithmetic: float
    memory: float
    interconnect: float = 0.0
    network: float = 0.0

    @property
    def bound(self) -> str:
        """The largest of them."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    @property
    def least(self) -> float:
        """Seconds if everything overlapped at full rate: no step is faster."""
        return max(dataclasses.astuple(self))

    def expected(self, utilisation: float = UTILISATION) -> float:
        """Seconds if arithmetic reached that share of the peak and the rest hid behind it, or else was the bound."""
        return max(self.arithmetic / utilisation, self.memory, self.interconnect, self.network)


def memory_bytes(
    config: ModelConfig, operations: Mapping[str, float], passes: Mapping[str, float], topology: Topology, tensor: int, trained: int
) -> float:
    """Returns the bytes one device moves to and from HBM in a step, analytically.

    Each pass of a part streams its bfloat16 matrices once: gathered, so written and read. Each product reads and writes its activations
    once; the optimizer reads and writes four float32 arrays of its share. Norms and softmax are taken to ride along.

    Args:
      operations: part -> operations of the step on all devices.
      passes: part -> how often its matrices are read in a step.
      trained: values that train.
    """
    values: dict[str, int] = {}
    edges: dict[str, int] = {}
    for path, leaf in abstract_params(config).items():
        if path[-1] in ("kernel", "lora_a", "lora_b"):
            rows, columns = leaf.shape[-2:]
            layers = math.prod(leaf.shape[:-2])
            values[path[0]] = values.get(path[0], 0) + layers * rows * columns
            edges[path[0]] = edges.get(path[0], 0) + layers * (rows + columns)
    total = 0.0
    for part, count in operations.items():
        total += 2 * 2 * values.get(part, 0) / tensor * passes.get(part, 0)
        total += count / topology.devices * edges.get(part, 0) / max(values.get(part, 1), 1)
    return total + 8 * 4 * trained / topology.devices


def times(operations: float, moved_to_memory: float, collectives: Sequence[Collective], topology: Topology) -> Times:
    """Returns the seconds of a step that needs so many operations on all devices, and so many bytes of each device's memory."""
    chip = topology.chip
    within = sum(c.moved for c in collectives if not c.across) * chip.devices
    across = sum(c.moved for c in collectives if c.across) * chip.devices
    return Times(
        arithmetic=operations / topology.chips / (chip.teraflops * 1e12),
        memory=moved_to_memory * chip.devices / (chip.hbm_gbs * 1e9),
        interconnect=within / (chip.ici_gbs * 1e9),
        network=across / (chip.dcn_gbs * 1e9),
    )


def cost(clips: int, seconds: float, chips: int) -> dict[str, float]:
    """Returns clips a second and chip-hours of a million triples, for a step of so many clips."""
    rate = clips / seconds
    return {"clips_per_second": rate, "chip_hours_per_million_triples": chips * 1e6 / rate / 3600}
