"""What `mkdocs build` (make docs) does besides reading docs/: it adds the pages made from the code and links "SPEC section N"."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from tools.documentation import notebooks, pages
from tools.documentation.spec import PAGE, REFERENCE, anchors

LAUNCH = "guides/launch.md"
EXTERNAL = re.compile(r"<(?:script|img|link rel=\"stylesheet\")[^>]* (?:src|href)=\"(https?://[^\"]+)\"")
ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages made from the code, the notebooks, the changelog and the page of launch/."""
    made = {
        **pages.made(),
        **{f"notebooks/{path.stem}.md": notebooks.page(path) for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))},
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        LAUNCH: (ROOT / "launch/README.md").read_text(encoding="utf-8").replace("](../docs/guides/", "]("),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Returns the page with links to launch/README.md, as the repository shows them, to the page made of it."""
    target = files.get_file_from_path(LAUNCH)
    return markdown.replace("](../../launch/README.md", f"]({posixpath.relpath(target.src_uri, posixpath.dirname(page.file.src_uri))}")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Returns the page with each mention of a section of the specification as a link to it."""
    if page.file.src_uri == PAGE:
        return html
    target = files.get_file_from_path(PAGE).url_relative_to(page.file)
    known = anchors()
    return re.sub(REFERENCE, lambda found: _linked(found, target, known), html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Returns the page as it is.

    Raises:
      PluginError: where it would load something from another host.
    """
    if found := EXTERNAL.search(output):
        raise PluginError(f"{page.file.src_uri}: loads {found[1]} from the network; put the file into docs/")
    return output


def _linked(found: re.Match[str], target: str, known: dict[int, str]) -> str:
    return re.sub(r"\d+", lambda number: f'<a href="{target}#{known[int(number[0])]}">{number[0]}</a>', found[0])
