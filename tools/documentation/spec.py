"""The model specification that comments and docstrings cite as "SPEC section N"."""

from __future__ import annotations

import re
from pathlib import Path

from markdown.extensions.toc import slugify

ROOT = Path(__file__).resolve().parents[2]
PAGE = "development/model_spec.md"
REFERENCE = re.compile(r"\bSPEC sections? \d+(?:(?:, | and |-)\d+)*")


def anchors() -> dict[int, str]:
    """Returns number of a section -> anchor of its heading on the page."""
    headings = re.findall(r"^## ((\d+)\. .+)$", (ROOT / "docs" / PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    return {int(number): slugify(text, "-") for text, number in headings}


def cited(text: str) -> set[int]:
    """Returns the sections that a text cites."""
    return {int(number) for found in REFERENCE.findall(text) for number in re.findall(r"\d+", found)}
