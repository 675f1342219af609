"""Writes docs/reports/pods_table.json and .md: the 7B programs compiled for the topologies in docs/guides/pods.md (make pods-table).

At full effort, which predicts time: some hours on two cores. `make pods-table PODS_ARGS="v5p tpu7x"` compiles those whose arguments contain
one of the words anew and leaves the others.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

from etils import epath

from omni_jax.planning import table
from omni_jax.planning.chips import read_topology
from tests.repository import ROOT

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
      captions: longest caption, in tokens; the published recipe's have about 40.
      timed: whether it is compiled at full effort, which predicts time.
      data: devices of a slice that hold copies of the weights.
    """

    topology: str
    clips: int = 256
    micro_batches: int = 1
    slices: int = 1
    kinds: str = "0,1,2"
    programs: str = "train"
    remat: str = "layer"
    captions: int = 40
    timed: bool = True
    data: int = 1

    @property
    def arguments(self) -> list[str]:
        fields = {
            "losses.negatives": "global",
            "remat": self.remat,
            "batch.micro_batch": self.clips,
            "batch.micro_batches": self.micro_batches,
            "batch.blocks": max(self.clips // BLOCK, read_topology(self.topology, self.slices).hosts),
            **({"mesh.data": self.data} if self.data > 1 else {}),
        }
        given = ["--topology", self.topology, "--slices", str(self.slices), "--programs", self.programs, "--kinds", self.kinds]
        return [
            "--config",
            "configs/omniretriever_7b.py",
            *given,
            "--caption-tokens",
            str(self.captions),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(["--full-effort"] if self.timed else []),
        ]

    def made(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of the table is what this call wrote."""
        parts = f"--programs {self.programs} --kinds {self.kinds} --caption-tokens {self.captions} "
        batch = self.clips, self.micro_batches, self.remat
        return (
            entry["topology"] == str(read_topology(self.topology, self.slices))
            and parts in entry["command"]
            and (entry["micro_batch"], entry["micro_batches"], entry["remat"]) == batch
            and entry["mesh"]["data"] == self.data
            and entry["command"].endswith(table.FULL_EFFORT) == self.timed
        )


QUICK = functools.partial(Case, captions=128, timed=False)
"""Compiled quickly, for its memory; an expected time assumes a share of the peak."""

RECOMMENDED = {
    "v5e": tuple(Case("v5e:4x4", kinds=kind) for kind in "012"),  # one by one: each takes many minutes
    "v5p": (QUICK("v5p:4x4x4"),),
    "v6e": (Case("v6e:8x8", 1024, kinds="0"),),
}
"""The training step by chip: all kinds, on v6e the first."""

GROWTH = (
    Case("v5e:8x8", 1024, kinds="0"),
    Case("v5e:16x16", 4096, kinds="0"),
    Case("v5e:16x16", 4096, kinds="0", data=4),
    Case("v5e:16x16", 8192, slices=2, kinds="0"),
)
"""The step with hard negative text on more v5e chips, 16 clips a chip."""

OTHERS = (
    QUICK("v4:4x4x4"),
    QUICK("v6e:8x8"),
    QUICK("v5e:16x16"),
    QUICK("v5e:16x16", 512, slices=2),
    QUICK("tpu7x:2x2x4", 128, 2),
)

EMBED = tuple(Case(topology, programs="embed", kinds="0", captions=128) for topology in ("v5e:2x2", "v6e:1x1"))
"""The embedding pass: 16 clips with all six tables."""

REFUSED = QUICK("v5e:4x4", remat="none", kinds="1")


def cases() -> tuple[Case, ...]:
    """Returns everything in the table."""
    return (*itertools.chain(*RECOMMENDED.values()), *GROWTH, *OTHERS, *EMBED, REFUSED)


def hours_per_million(chip: str) -> float:
    """Returns the chip-hours of a million triples on a chip of RECOMMENDED, as the table has them: the mean over the kinds of step."""
    programs = (program for case in RECOMMENDED[chip] for program in _entry(case)["programs"])
    rates = (program.get("predicted") or program["expected"] for program in programs)
    return statistics.fmean(rate["chip_hours_per_million_triples"] for rate in rates)


def rows(case: Case) -> list[str]:
    """Returns what the pages say of a case that is timed: a row for each kind of step."""
    entry = _entry(case)
    found = []
    for program in entry["programs"]:
        share = f"{program['share_of_peak']:.0%}".replace("%", " %")
        hours = f"{program['predicted']['chip_hours_per_million_triples']:.0f}"
        cells = [f"{entry['micro_batch']:,}", program["kind"]["hard"], f"{program['predicted_seconds']:.2f}", share, hours]
        place = entry["topology"] + (f", mesh.data={case.data}" if case.data > 1 else "")
        found.append(f"| {' | '.join([place, str(entry['chips']), *cells])} |")
    return found


def embedding_row(case: Case) -> str:
    """Returns what the pages say of an embedding pass that is timed."""
    found = {program["program"].removeprefix("embed/"): program for program in _entry(case)["programs"]}
    times = [f"{1e3 * found[part]['predicted_seconds']:.1f}" for part in ("vision", "audio", "beats", "rows")]
    return f"| {case.topology} | {' | '.join(times)} | {found['rows']['share_of_peak']:.0%} |".replace("%", " %")


def _entry(case: Case) -> dict[str, Any]:
    (entry,) = filter(case.made, table.read(epath.Path(TABLE)))
    return entry


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
