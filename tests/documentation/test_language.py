"""The phrases that docs/development/style.md bans, and the messages that docs/troubleshooting.md explains."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator

from omni_jax.cli import main as cli
from tests import repository
from tools.documentation import pages

STYLE = repository.ROOT / "docs/development/style.md"


def banned() -> list[str]:
    """Returns the phrases of the table under "Phrases to avoid"."""
    section = STYLE.read_text(encoding="utf-8").split("## Phrases to avoid\n")[1].split("\n## ")[0]
    return [phrase for phrase in re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE) if phrase not in ("avoid", "---")]


def found(text: str, phrases: list[str]) -> list[str]:
    """Returns the phrases that stand in a text, whatever its line breaks and letters."""
    flat = " ".join(text.lower().split())
    return [phrase for phrase in phrases if re.search(rf"\b{re.escape(phrase)}\b", flat)]


def read_by_people() -> Iterator[tuple[str, str]]:
    """Yields name and text of all that a user reads."""
    for path in (repository.ROOT / "README.md", repository.ROOT / "launch/README.md", *sorted((repository.ROOT / "docs").rglob("*.md"))):
        if path != STYLE:
            yield str(path.relative_to(repository.ROOT)), path.read_text(encoding="utf-8")
    yield "CHANGELOG.md", (repository.ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1]
    for name in cli.COMMANDS:
        yield from _help(f"omni-jax {name}", pages.subparsers(cli.build_parser(name))[name])


def _help(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    yield f"{name} --help", parser.format_help()
    for inner, below in pages.subparsers(parser).items():
        yield from _help(f"{name} {inner}", below)


def test_nothing_that_a_user_reads_has_a_banned_phrase() -> None:
    phrases, texts = banned(), dict(read_by_people())
    assert len(phrases) >= 8 and {"README.md", "CHANGELOG.md", "omni-jax convert to-jax --help", "docs/index.md"} <= texts.keys()
    wrong = [f"{name}: {phrase!r}" for name, text in texts.items() for phrase in found(text, phrases)]
    assert not wrong, "\n".join([*wrong, "docs/development/style.md says what to write"])


def test_a_banned_phrase_is_found_across_a_line_break() -> None:
    assert found("A run is Gone on\n  with when it is started.", ["gone on with", "the mend"]) == ["gone on with"]
    assert found("the amendment", ["the mend", "mend"]) == []


def test_every_message_that_troubleshooting_explains_is_one_of_the_code() -> None:
    page = (repository.ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    said = "\n".join(
        node.value
        for file in repository.sources(*repository.PRODUCT)
        for node in repository.nodes(file)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert len(explained) > 20
    assert not [message for message in explained if message not in said]
