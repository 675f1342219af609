"""Names of repositories on the Hub, distinguished from folders without the network."""

from __future__ import annotations

import os
import re

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
"""The form of such a name."""


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether a name is "owner/repository" and no file or folder of this machine: the only one that is ever asked for over the network."""
    text = os.fspath(name)
    return HUB_NAME.fullmatch(text) is not None and not os.path.exists(text)
