"""The `omni-jax compile` commands that the README, the docs and the command's own help show."""

from __future__ import annotations

import shlex

from omni_jax.cli import compile as command
from tests.repository import ROOT

PAGES = ("README.md", "launch/README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
CALL = ["omni-jax", "compile"]


def commands() -> list[tuple[str, list[str]]]:
    """Returns (where it stands, its arguments after `compile`) of each command in a code block, and of the example of `--help`."""
    found = [("compile --help", shlex.split(command.EXAMPLE)[2:])]
    for page in PAGES:
        blocks = (ROOT / page).read_text().split("```")[1::2]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines if line.lstrip().startswith("omni-jax compile ")]
        found += [(page, line[2:]) for line in words if line[:2] == CALL]
    return found


def small(arguments: list[str]) -> list[str]:
    """Returns the arguments with a model of two layers in the place of the 7B, the rest as it stands."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "output_size": 128}
    patches = {"embed_dim": 64, "conv_pos": 16, "conv_pos_groups": 4, "num_buckets": 32, "max_distance": 128}
    decoder = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    architecture = {
        "decoder": decoder | {"mrope_sections": (4, 6, 6)},
        "vision": tower | {"full_attention_layers": (1,)},
        "audio": tower,
        "beats": {name: size for name, size in tower.items() if name != "output_size"} | patches,
    }
    return [*arguments, "--config.model.base=", f"--config.model.architecture={architecture}"]
