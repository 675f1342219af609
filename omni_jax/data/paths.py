"""Paths of media files, as people write them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from omni_jax.io.remote import is_remote
from omni_jax.types import InputError


def media_path(text: str, root: Any) -> Any:
    """Returns the file that a path names: a `pathlib.Path`, or an `epath.Path` of an object store.

    `file:///PATH` is a file of this machine, percent-decoded. Where no file is called as it is written, `~` is the home folder, and a
    backslash separates folders if a file is there then. In an object store it always does.

    Args:
      root: folder that relative paths start from.

    Raises:
      InputError: for a URL of another machine, or of a store that is not known, and for a text that no file can be called.
    """
    try:
        unusable = b"\0" in os.fsencode(text)
    except UnicodeEncodeError:
        unusable = True
    if unusable:
        raise InputError(f"{text[:80]!a}: holds a zero character or half of a surrogate pair, which no name of a file has; write it again")
    if text[:6].lower() == "file:/":
        host, _, path = text[5:].removeprefix("//").partition("/")
        path = unquote(path)
        if host.lower() not in ("", "localhost") or "\0" in path:
            raise InputError(f"{text[:80]}: names no file of this machine; write file:///PATH, with the path from the root of the disk")
        return Path("/" + path.lstrip("/"))
    if is_remote(text):
        return absolute(text)
    if is_remote(root):
        return root / text.replace("\\", "/")
    path = root / text
    if (text[:1] == "~" or "\\" in text) and not os.path.exists(path):
        path, other = (root / os.path.expanduser(one) for one in (text, text.replace("\\", "/")))
        return other if os.path.exists(other) else path
    return path


def absolute(path: os.PathLike[str] | str) -> Any:
    """Returns an absolute pathlib.Path, or an epath.Path for an object store."""
    if is_remote(path):
        from etils import epath  # reading gs:// alone needs it

        try:
            return epath.Path(os.fspath(path))
        except KeyError:
            raise InputError(f"{path}: not a kind of storage that is known; use a local path or gs://") from None
    return Path(os.path.abspath(path))


def is_inside(path: Any, root: Any) -> bool:
    """Whether a path, its links followed, is under a folder. An object store has no links, and ".." there is a plain name or refused."""
    if is_remote(path) or is_remote(root):
        text = os.fspath(path)
        return text.startswith(os.fspath(root).rstrip("/") + "/") and ".." not in text.split("/")
    folder, name = os.path.split(path)
    real = os.path.join(_real(folder), name)
    if os.path.islink(real) or name in ("", ".", ".."):
        real = os.path.realpath(real)
    return real.startswith(_real(os.fspath(root)).rstrip("/") + "/")


@functools.lru_cache(maxsize=4096)  # a folder holds many clips
def _real(folder: str) -> str:
    return os.path.realpath(folder)
