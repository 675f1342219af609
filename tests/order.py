"""The order of the tests: as they stand in their files, or shuffled, to see that none depends on another one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


def add_options(parser: pytest.Parser) -> None:
    """Adds `--order`."""
    group = parser.getgroup("order", "the order of the tests (tests/order.py)")
    group.addoption("--order", type=int, metavar="SEED", help="Shuffle the files, and the tests within each file; a seed, an order.")


def shuffle(items: list[pytest.Item], seed: int) -> None:
    """Shuffles the files and the tests within each: a file stays together, since its fixtures are made once. All workers get one order."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    draw = random.Random(seed)
    groups = [draw.sample(group, len(group)) for group in files.values()]
    draw.shuffle(groups)
    items[:] = [item for group in groups for item in group]
