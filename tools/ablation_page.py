"""Writes tables of `omni-jax ablate` into docs/reports/ablation.md, each in place of the one with its heading, or at the end.

python -m tools.ablation_page Losses=losses/warm-steps.json Temperature=temperature/random-steps.json ...
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


def section(table: str) -> tuple[str, str]:
    """Returns heading and text of HEADING=FILE.json."""
    heading, _, path = table.partition("=")
    _, _, text = as_markdown(json.loads(Path(path).read_text(encoding="utf-8"))).partition("## ")
    title, _, rest = text.partition("\n")
    return f"{heading}: {title[0].lower()}{title[1:]}", rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="HEADING=FILE.json", help="tables that omni-jax ablate wrote")
    parser.add_argument("--note", help="how they were made, such as the machine, in place of the page's own note")
    args = parser.parse_args()
    before, *kept = PAGE.read_text(encoding="utf-8").rstrip("\n").split("\n## ")
    sections = dict((text.split("\n", 1)) for text in kept) | dict(section(table) for table in args.tables)
    note = args.note or before.rstrip("\n").rsplit("\n\n", 1)[-1]
    made = [HEAD.rstrip("\n"), note, *(f"## {title}\n{text.rstrip()}" for title, text in sections.items())]
    PAGE.write_text("\n\n".join(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
