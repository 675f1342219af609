"""A notebook as a page of the documentation, with the outputs that are stored in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def page(path: Path) -> str:
    """Returns a notebook as Markdown: text as it is, code fenced, outputs below it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [f"{''.join(cell['source']).strip()}" if cell["cell_type"] == "markdown" else _code(cell) for cell in cells]
    return "\n\n".join(part for part in parts if part) + f"\n\nThe notebook itself: `docs/notebooks/{path.name}` in the repository.\n"


def _code(cell: dict[str, Any]) -> str:
    return "\n\n".join([f"```python\n{''.join(cell['source']).strip()}\n```", *filter(None, map(_output, cell.get("outputs", ())))])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{re.sub(r'`{3,}', '``', text)}\n```" if text else ""
