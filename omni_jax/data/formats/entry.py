"""One entry as every format gives it, and what the formats have in common: names of columns and suffixes of files."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from omni_jax.data.entries import BadEntry
from omni_jax.io.messages import some
from omni_jax.types import InputError

ROLES = ("id", "text", "video", "audio", "image", "timestamps", "start", "end", "prefix")
"""What a column may be, as `--columns ROLE=NAME` says it; `start` and `end` are times."""

FILE_NAME = "file_name"
"""The column of a metadata file that names a media file, alone or after a kind (`audio_file_name`)."""

_SUFFIXES = {
    "video": ".3g2 .3gp .asf .avi .dv .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv",
    "audio": ".aac .ac3 .aif .aifc .aiff .amr .ape .au .caf .dsf .eac3 .flac .m4a .m4b .mka .mp2 .mp3 .mpc .oga .ogg .opus .spx .tta .w64 "
    ".wav .wma .wv",
    "image": ".bmp .gif .jpeg .jpg .png .tif .tiff .webp",
}
_KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


class Notes:
    """What a format says of a source besides its entries, each thing once, however many files it is true of.

    Attributes:
      fields: names of the fields, columns and members of what was read, as keys: names that `columns` may have.
    """

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, str]] = {}
        self.fields: dict[str, None] = {}

    def add(self, what: str, first: object, count: int = 1) -> None:
        """Notes a thing, how often it is so, and where first."""
        known, place = self._said.get(what, (0, str(first)))
        self._said[what] = known + count, place

    def lines(self) -> Iterator[str]:
        for what, (count, first) in self._said.items():
            yield f"{what}: {count}, the first: {first}"


class Entry(NamedTuple):
    """One entry of a source.

    Attributes:
      file: the file that it stands in.
      where: its place there, for messages.
      fields: as those of a line of JSON; media may be `FilePart`s. Or what is wrong with it.
      line: its number in the file, from 1.
      id: what to call it where it cannot be read.
      nameless: whether it may have no id, and is called by its file and a digest then.
      numbered: whether its id is the name of its file and its number there.
    """

    file: os.PathLike[str] | str
    where: str
    fields: dict[str, Any] | BadEntry
    line: int
    id: str | None = None
    nameless: bool = False
    numbered: bool = False


def media_kind(name: str) -> str | None:
    """Returns "video", "audio" or "image", going by the suffix of a file, or by a suffix alone; None for any other."""
    return _KINDS.get("." + name.rpartition(".")[2].lower())


def renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | BadEntry:
    """Returns fields under the names of their roles: ROLE=NAME of `columns`, a picture as a video of one frame, start and end together.

    A role whose name is not there keeps its own field.
    """
    taken = {role: fields[name] for role, name in columns.items() if name in fields}
    found = {name: value for name, value in fields.items() if name not in columns.values() or name in taken} | taken
    if "start" in columns or "end" in columns:
        start, end = (found.pop(name, None) for name in ("start", "end"))
        if end is not None:
            found["timestamps"] = [0.0 if start is None else start, end]
        elif start is not None:
            return BadEntry("has a start and no end; name the column of the end with --columns end=NAME")
    picture = found.pop("image", None) if "image" in columns else None
    if picture is not None and found.get("video") is None:
        found["video"] = picture
    return found


def table_fields(cells: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | BadEntry:
    """Returns the fields of a row of a table: an empty cell is absent, and a cell of `file_name` is of the kind of its file."""
    fields = {name: value for name, value in cells.items() if value not in (None, "", []) and not _is_nan(value)}
    found = renamed(fields, columns)
    if isinstance(found, BadEntry):
        return found
    for name in [name for name in found if name == FILE_NAME or name.endswith(f"_{FILE_NAME}")]:
        value = found.pop(name)
        role = name.removesuffix(FILE_NAME).rstrip("_")
        role = role if role in ("video", "audio", "image") else media_kind(str(value))
        if role is None:
            return BadEntry(f"{name} {str(value)!r} has no suffix of a video, a sound or a picture; rename the file")
        found.setdefault("video" if role == "image" else role, value)
    return found


def check_columns(path: os.PathLike[str] | str, names: Sequence[str], columns: Mapping[str, str], media: Sequence[str] = ()) -> None:
    """Raises InputError for a table that lacks a column that is asked for, has two of one name, or none that can be read.

    Args:
      names: its columns.
      media: roles that columns of another name have.
    """
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise InputError(f"{path}: two columns are called {twice[0]!r}; rename one")
    listed = some(names, 20)
    if absent := [name for name in columns.values() if name not in names]:
        raise InputError(f"{path}: has no column {absent[0]!r}, which --columns names; its columns are {listed}")
    known = {"text", "video", "audio", "image", "conversations"}
    if not (
        known & {*(name.lower() for name in names), *columns, *media}
        or any(name == FILE_NAME or name.endswith(f"_{FILE_NAME}") for name in names)
    ):
        raise InputError(
            f"{path}: no column is called text, video, audio or {FILE_NAME}; its columns are {listed}; "
            f"name them, as in --columns text=caption,video=path"
        )


def files_of(folder: Any) -> list[Any]:
    """Returns the files of a folder and of the folders in it, links to folders followed, sorted; and links that lead nowhere.

    What systems and downloads put beside others (`._clip1.mp4`, `.cache`, `__MACOSX`) is left out.

    Raises:
      InputError: a folder cannot be listed.
    """
    found: list[Any] = []
    known, folders = set(), [folder]
    while folders:
        one = folders.pop()
        place = one if "://" in os.fspath(one) else os.path.realpath(one)
        if place in known:
            continue
        known.add(place)
        try:
            for item in one.iterdir():
                if not (item.name.startswith(".") or item.name == "__MACOSX"):
                    (folders if item.is_dir() else found).append(item)
        except OSError as error:
            raise InputError(f"{one}: the folder cannot be read ({error.strerror or error}); check its permissions") from None
    return sorted(found)


@contextlib.contextmanager
def reading(path: os.PathLike[str] | str) -> Iterator[None]:
    """Makes one line of what a missing or unreadable manifest raises."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: manifest not found; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error}); check its permissions") from None
    except ImportError as error:  # the client of an object store
        raise InputError(f"{path}: the manifest cannot be read ({error})") from None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
