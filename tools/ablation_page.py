"""Writes docs/reports/ablation.md from the tables of `omni-jax ablate`.

python -m tools.ablation_page losses/warm-steps.json losses/random-steps.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from omni_jax.ablation.table import as_markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reports" / "ablation.md"
HEAD = """# Ablations

What each loss bought on synthetic clips. [Losses](../guides/losses.md) draws the conclusions and says what
was not shown. Each section is the `.md` file that the command above it wrote; `python -m tools.ablation_page` joined them.

The clips are those of `omni_jax.data.synthetic_parts`: caption, sound and picture each show three of four factors, so that two modalities
tell more than one. The model is `configs/ablation.py`, float32, 135 thousand weights: real towers, decoder and losses, tiny.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="JSON files that omni-jax ablate wrote, in the order of the page")
    parser.add_argument("--note", action="append", default=[], help="a sentence on how they were made, such as the machine")
    args = parser.parse_args()
    sections = [as_markdown(json.loads(table.read_text(encoding="utf-8"))) for table in args.tables]
    PAGE.write_text("\n".join([HEAD, *(f"{note}\n" for note in args.note), *sections]).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
