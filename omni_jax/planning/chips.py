"""Published figures of TPU chips. All are per chip; nothing here was measured by this project.

Sources: the system-architecture pages of Cloud TPU (v4, v5e, v5p, v6e, TPU7x), November 2025: peak bfloat16 operations, HBM bandwidth, and
bidirectional inter-chip bandwidth, of which half goes each way. Pod NICs: v5e 6.4 Tbit/s a pod of 256 chips; the others' hosts are taken to
have 200 Gbit/s for four chips. `limit_gib` is what the compiler of libtpu 0.0.42 itself gives as the program's memory.
Matrix units: the count and side that the same compiler's estimates of large products come near to and never pass.
"""

from __future__ import annotations

import dataclasses
import math

from omni_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      name: as in a topology ("v5e:4x4").
      platform: libtpu's spelling.
      dimensions: of the torus.
      teraflops: peak bfloat16, 10**12 operations a second.
      limit_gib: memory of one device that a program can use, GiB.
      hbm_gbs, ici_gbs, dcn_gbs: 10**9 bytes a second to memory, to other chips (one way, all links together), to other slices.
      devices: JAX devices of a chip.
      options: further arguments of the topology.
      largest: chips of the largest slice.
      host: chips of one host of a slice of several.
      compiler: options without which libtpu 0.0.42 aborts on this chip.
      mxus: (count, side) of the matrix units of one device; None where they are not known.
    """

    name: str
    platform: str
    dimensions: int
    teraflops: float
    limit_gib: float
    hbm_gbs: float
    ici_gbs: float
    dcn_gbs: float
    devices: int = 1
    options: tuple[tuple[str, str], ...] = ()
    largest: int = 256
    host: int = 4
    compiler: tuple[tuple[str, bool], ...] = ()
    mxus: tuple[int, int] | None = None

    @property
    def clock(self) -> float:
        """Cycles a second: the peak over what the matrix units multiply and add in a cycle.

        Raises:
          ConfigError: where the units are not known.
        """
        if self.mxus is None:
            raise ConfigError(f"chip {self.name}: its clock is not known, so cycles cannot be turned into time; plan without --full-effort")
        count, side = self.mxus
        return self.teraflops * 1e12 / self.devices / (count * side**2 * 2)


# Sums and gathers that libtpu 0.0.42 hands to the sparse cores of TPU7x end its compiler: "Check failed: std::abs(inc) < core_count()" and
# "Not enough space for TILESPMEM spill".
_NO_SPARSE_CORES = (
    ("xla_tpu_enable_sparse_core_collective_offload_all_reduce", False),
    ("xla_tpu_offload_gather_to_sparsecore", False),
)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4", 3, 275, 30.75, 1228, 300, 6.25, options=(("chip_config_name", "megacore"),), largest=4096, mxus=(8, 128)),
        Chip("v5e", "v5e", 2, 197, 15.75, 819, 200, 3.125, mxus=(4, 128)),
        Chip("v5p", "v5p", 3, 459, 95.74, 2765, 600, 6.25, largest=6144, mxus=(8, 128)),
        Chip("v6e", "v6e", 2, 918, 31.25, 1638, 400, 6.25, mxus=(4, 256)),
        Chip("v7x", "tpu7x", 3, 2307, 94.75, 7380, 600, 6.25, devices=2, largest=9216, compiler=_NO_SPARSE_CORES, mxus=(4, 256)),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a grid, one or several slices of it."""

    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.grid)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        return self.slices * max(1, self.chips // self.slices // self.chip.host)

    def __str__(self) -> str:
        grid = f"{self.chip.name}:{'x'.join(map(str, self.grid))}"
        return grid if self.slices == 1 else f"{self.slices} x {grid}"


def read_topology(text: str, slices: int = 1) -> Topology:
    """Returns the topology that "v5e:4x4" or "v5p:4x4x4" names; "tpu7x" is v7x, and a plain count ("v5e:16") takes its usual grid.

    Raises:
      ConfigError: for an unknown chip, a grid of the wrong form, more chips than a slice has, no slices.
    """
    name, _, grid = text.partition(":")
    chip = next((c for c in CHIPS.values() if name in (c.name, c.platform)), None)
    if chip is None:
        raise ConfigError(f"topology {text!r}: unknown chip {name!r}; choose one of {', '.join(CHIPS)}, as in v5e:4x4")
    form = "x".join(["4"] * chip.dimensions)
    parts = grid.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"topology {text!r}: write the grid of chips after a colon, as in {chip.name}:{form}")
    sizes = tuple(int(part) for part in parts)
    if len(sizes) == 1:
        sizes = usual_grid(chip, sizes[0])
    if len(sizes) != chip.dimensions:
        raise ConfigError(f"topology {text!r}: {chip.name} grids have {chip.dimensions} dimensions, as in {chip.name}:{form}")
    if slices < 1:
        raise ConfigError(f"slices {slices}: must be at least 1")
    topology = Topology(chip, sizes, slices)
    if topology.chips // slices > chip.largest:
        raise ConfigError(f"topology {text!r} has {topology.chips // slices} chips; a slice of {chip.name} has {chip.largest} at most")
    return topology


def usual_grid(chip: Chip, chips: int) -> tuple[int, ...]:
    """Returns the grid of so many chips, as even as powers of two go, the larger sides last.

    Raises:
      ConfigError: where the count is no power of two.
    """
    if chips & (chips - 1):
        raise ConfigError(f"{chips} chips of {chip.name}: give the grid, as in {chip.name}:{'x'.join(['4'] * chip.dimensions)}")
    power, sides = chips.bit_length() - 1, chip.dimensions
    sizes = sorted(1 << (power // sides + (i < power % sides)) for i in range(sides))
    return tuple(sizes)
