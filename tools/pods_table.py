"""Writes docs/reports/pods_table.json and .md: the 7B programs compiled for the topologies in docs/guides/pods.md (make pods-table).

At full effort, which predicts time: some hours on two cores. `make pods-table PODS_ARGS="v5p tpu7x"` compiles those whose arguments contain
one of the words anew and leaves the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import NamedTuple

from omni_jax.planning.chips import read_topology
from tests.house import ROOT

TABLE = ROOT / "docs/reports/pods_table.json"
BLOCK = 8  # clips of a block, as released; fewer where a host has fewer


class Case(NamedTuple):
    """One call of `omni-jax compile`.

    Attributes:
      topology, slices: as on the command line.
      clips, micro_batches: of a micro-batch, and of a step.
      kinds: places in the cycle of step kinds.
      programs: as on the command line.
      remat: of the decoder's layers.
    """

    topology: str
    clips: int = 256
    micro_batches: int = 1
    slices: int = 1
    kinds: str = "0,1,2"
    programs: str = "train"
    remat: str = "layer"

    @property
    def arguments(self) -> list[str]:
        fields = {
            "losses.negatives": "global",
            "remat": self.remat,
            "batch.micro_batch": self.clips,
            "batch.micro_batches": self.micro_batches,
            "batch.blocks": max(self.clips // BLOCK, read_topology(self.topology, self.slices).hosts),
        }
        given = ["--topology", self.topology, "--slices", str(self.slices), "--programs", self.programs, "--kinds", self.kinds]
        return [
            "--config",
            "configs/omniretriever_7b.py",
            *given,
            *(f"--config.{name}={value}" for name, value in fields.items()),
            "--full-effort",
        ]


STEPS = (
    Case("v5e:4x4", 64, 4),  # 256 clips as one pool on 16 chips
    Case("v5e:16x16"),
    Case("v6e:8x8"),
    Case("v5p:4x4x4"),
    Case("v5p:4x4x8"),
    Case("v4:4x4x4"),
    Case("v5e:16x16", 512, slices=2),
    Case("tpu7x:2x2x4", 128, 2),
)
"""The training step, all kinds."""

EMBED = Case("v5e:2x2", 4, programs="embed", kinds="0")
REFUSED = Case("v5e:4x4", remat="none", kinds="1")


def cases() -> tuple[Case, ...]:
    """Returns everything in the table."""
    return (*STEPS, EMBED, REFUSED)


def main() -> int:
    """Returns 0 when every case was compiled or refused for its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="compile only cases whose arguments contain one of these, into the table as it is")
    words = parser.parse_args().words
    if not words:
        TABLE.unlink(missing_ok=True)
    failed = 0
    for case in cases():
        line = " ".join(case.arguments)
        if words and not any(word in line for word in words):
            continue
        print(f"omni-jax compile {line}", flush=True)
        command = [sys.executable, "-m", "omni_jax.cli.main", "compile", *case.arguments, "--table", str(TABLE)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        failed += status not in (0, 2)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
