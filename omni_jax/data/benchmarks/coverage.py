"""Which clips of a benchmark are at hand: manifests of those that are, fetch lists of those that are not.

Clips with one caption each make one manifest. Where any clip has several, the captions get a manifest of their own, with ids CLIP#NUMBER,
so that `embed` runs once per clip and once per caption; `eval --captions` joins them again.
"""

from __future__ import annotations

import dataclasses
import filecmp
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.data.benchmarks.items import Item
from omni_jax.data.formats.entry import media_kind
from omni_jax.types import InputError

CAPTION_MARK = "#"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which clips have a file.

    Attributes:
      found: (clip, file, whether the file is the whole source) in the order of the benchmark.
      missing: clips without a file, or with several that differ.
      reasons: by clip id, why each of these is missing.
      empty: files of no bytes, and links to files that are not there; their clips are among the missing.
      doubtful: names that several files of the same content share; the first in alphabetical order was taken.
      unused: media files that belong to no clip.
    """

    found: tuple[tuple[Item, Path, bool], ...]
    missing: tuple[Item, ...]
    reasons: Mapping[str, str]
    empty: tuple[Path, ...]
    doubtful: tuple[str, ...]
    unused: int

    @property
    def whole(self) -> int:
        """Clips to be cut out of their source by their interval."""
        return sum(whole for _, _, whole in self.found)


def match_media(items: Sequence[Item], folder: str | os.PathLike[str], media: Sequence[str]) -> Coverage:
    """Returns which of the clips have a file in a folder or below it.

    Args:
      media: fields the file will fill: sound files count only where "video" is not among them.

    Raises:
      InputError: when the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; name the one that holds the media")
    kinds = ("video",) if "video" in media else ("video", "audio")
    by_name: dict[str, list[Path]] = defaultdict(list)
    files = []
    for parent, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if media_kind(name) in kinds:
                path = Path(parent, name)
                files.append(path)
                for key in {name, path.stem}:
                    by_name[key].append(path)
    # A link without its file, as git-annex leaves it, is as good as an empty file.
    empty = [path for path in files if not path.exists() or path.stat().st_size == 0]
    hollows = set(empty)
    usable = {name: good for name, paths in by_name.items() if (good := sorted(path for path in paths if path not in hollows))}
    found, missing, doubtful, used = [], [], [], set()
    reasons: dict[str, str] = {}
    for item in items:
        candidates = [(name, False) for name in item.files] + [(name, True) for name in item.sources]
        names = {name for name, _ in candidates}
        hit = next(((name, whole) for name, whole in candidates if name in usable), None)
        if hit is None:
            missing.append(item)
            hollow = next((path for path in empty if path.name in names or path.stem in names), None) if empty else None
            if hollow is None:
                reasons[item.id] = f"no file called {(item.files or item.sources)[0]!r} in {folder}"
            else:
                reasons[item.id] = f"{hollow} is {'empty' if hollow.exists() else 'a link to a file that is not there'}"
            continue
        name, whole = hit
        paths = usable[name]
        if len(paths) > 1:
            if not _same(paths):
                used.update(paths)
                missing.append(item)
                reasons[item.id] = f"{len(paths)} different files are called {name!r}: {', '.join(map(str, paths[:3]))}; keep one"
                continue
            doubtful.append(name)
        found.append((item, paths[0], whole))
        used.add(paths[0])
    unused = len(set(files) - used - hollows)
    return Coverage(tuple(found), tuple(missing), reasons, tuple(empty), tuple(dict.fromkeys(doubtful)), unused)


def without_ending(name: str) -> str:
    """Returns a file's name without the ending of a medium."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and media_kind(ending) in ("video", "audio") else name


def _same(paths: Sequence[Path]) -> bool:
    """Whether files hold the same bytes."""
    return all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:])


def manifest_rows(
    coverage: Coverage, media: Sequence[str], folder: str | os.PathLike[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the lines of the clips' manifest and of the captions' manifest; the second is empty where every clip has one caption.

    Args:
      folder: where the manifests will lie; paths are relative to it.
    """
    apart = any(len(item.captions) > 1 for item, _, _ in coverage.found)
    clips, captions = [], []
    for item, path, whole in coverage.found:
        row: dict[str, Any] = {"id": item.id}
        if not apart:
            row["text"] = item.captions[0]
        row |= dict.fromkeys(media, os.path.relpath(path, folder))
        if whole and item.interval is not None:
            row["timestamps"] = list(item.interval)
        clips.append(row)
        if apart:
            captions += [{"id": f"{item.id}{CAPTION_MARK}{number}", "text": text} for number, text in enumerate(item.captions)]
    return clips, captions


def training_rows(coverage: Coverage, folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a manifest to train on: a record a caption, called CLIP-NUMBER, whose file is both video and sound.

    Args:
      folder: as in `manifest_rows`.
    """
    for item, path, whole in coverage.found:
        media = dict.fromkeys(("video", "audio"), os.path.relpath(path, folder))
        times = {"timestamps": list(item.interval)} if whole and item.interval is not None else {}
        yield from ({"id": f"{item.id}-{number}", "text": text, **media, **times} for number, text in enumerate(item.captions))


def fetch_rows(items: Iterable[Item]) -> Iterator[tuple[str, str, str, str]]:
    """Yields (id, URL, start, end) of clips to be fetched, in seconds, empty for a whole recording; clips without a URL are left out."""
    for item in items:
        if item.url is not None:
            start, end = (f"{t:g}" for t in item.interval) if item.interval else ("", "")
            yield item.id, item.url, start, end
