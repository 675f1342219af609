"""What is searched: the tables of an embedding file, and the captions and media of their records."""

from __future__ import annotations

import collections
import dataclasses
import stat
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.media.preview import record_preview
from omni_jax.media.workers import Guarded
from omni_jax.retrieval.embedding_file import read_embeddings
from omni_jax.retrieval.search import Index, target_table
from omni_jax.types import ClipError, FilePart, MediaFile, Record

TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".m4a": "audio/mp4",
}
"""Suffix -> type of the files that are served whole: what a browser plays, and never a page or a script."""

PREVIEW_LIMIT_S = 30.0
KEPT_BYTES = 128 << 20  # of previews in memory


class Library:
    """Tables checked once, and records by number.

    Attributes:
      ids: of all records.
      sizes: table -> its rows.
      threads: where `preview` is to be called, so that media which take long to decode keep no search waiting.
    """

    def __init__(self, indexes: Mapping[str, Index], records: Mapping[str, Record], media: Path | None, workers: int = 1) -> None:
        """Takes opened tables, records by id for captions and paths, the folder that media are given out from (None: no media), and the
        number of processes that decode previews."""
        self._indexes = indexes
        self._rows = {name: tuple(index.ids or ()) for name, index in indexes.items()}
        self.ids = tuple(dict.fromkeys(record for ids in self._rows.values() for record in ids))
        self.sizes = {name: len(ids) for name, ids in self._rows.items()}
        self._numbers = {record: number for number, record in enumerate(self.ids)}
        self._records, self._media = records, media.resolve() if media is not None else None
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="preview")
        self._preview = Guarded(record_preview, PREVIEW_LIMIT_S)
        self._kept: collections.OrderedDict[tuple[int, str], bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def table_for(self, query: str, chosen: str | None) -> str:
        """Returns the table to search in, as `omni-jax search` chooses it. Raises InputError where it is not there."""
        return target_table(query, self.sizes, chosen)

    def search(self, table: str, vector: np.ndarray, k: int) -> list[dict[str, Any]]:
        """Returns the k records nearest to a vector (D,), nearest first: number, id, score, caption, what can be seen and heard.

        Raises:
          InputError: for a vector of another width, or k below 1.
        """
        return self.searches([(table, vector, k)])[0]

    def searches(self, asked: Sequence[tuple[str, np.ndarray, int]]) -> list[list[dict[str, Any]]]:
        """Returns what `search` does for each of these, which are of one table: its rows are read once for all."""
        table, most = asked[0][0], max(k for _, _, k in asked)
        scores, rows = self._indexes[table].search(np.stack([vector for _, vector, _ in asked]), most)
        return [
            [self._result(self._rows[table][row], score) for row, score in zip(of[:k].tolist(), their[:k].tolist(), strict=True)]
            for (_, _, k), of, their in zip(asked, rows, scores, strict=True)
        ]

    def _result(self, name: str, score: float) -> dict[str, Any]:
        return {"number": self._numbers[name], "id": name, "score": score, **self._shown(name)}

    def _shown(self, name: str) -> dict[str, Any]:
        record = self._records.get(name)
        if record is None:
            return {"caption": None, "image": False, "sound": False, "file": None}
        video, audio = (self._confined(path) for path in (record.video, record.audio))
        playable = next((path for path in (video, audio) if isinstance(path, Path) and path.suffix.lower() in TYPES), None)
        kind = TYPES[playable.suffix.lower()].partition("/")[0] if playable is not None else None
        return {"caption": record.text, "image": video is not None, "sound": audio is not None, "file": kind}

    def file(self, number: int) -> tuple[Path, str] | None:
        """Returns a record's media file and its type; None where it has none that is given out."""
        record = self._record(number)
        for path in (record.video, record.audio) if record is not None else ():
            found = self._confined(path)
            if isinstance(found, Path) and (kind := TYPES.get(found.suffix.lower())) is not None:
                return found, kind
        return None

    def preview(self, number: int, kind: str) -> bytes | None:
        """Returns a record's pictures (JPEG; kind "image") or sound (MP3; "sound"), None where there is nothing to show.

        They are decoded in a process that can be ended.
        """
        record = self._record(number)
        file = self._confined(record.video if kind == "image" else record.audio) if record is not None else None
        if record is None or file is None:
            return None
        with self._lock:
            if (known := self._kept.get((number, kind))) is not None:
                self._kept.move_to_end((number, kind))
                return known or None
        video, audio = (file, None) if kind == "image" else (None, file)
        try:
            found = self._preview(Record(record.id, None, video, audio, record.timestamps), record.id)
            content = found.image or found.sound or b""
        except ClipError:
            content = b""
        with self._lock:
            self._kept[number, kind] = content
            while sum(len(one) + 256 for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return content or None

    def close(self) -> None:
        """Ends the processes that decode previews, and their threads."""
        self._preview.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _record(self, number: int) -> Record | None:
        return self._records.get(self.ids[number]) if 0 <= number < len(self.ids) else None

    def _confined(self, path: MediaFile | None) -> MediaFile | None:
        """The file itself, links followed, if it is a regular file in the folder of media; for a part, if its file is."""
        if path is None or self._media is None:
            return None
        if isinstance(path, FilePart):
            file = self._confined(path.file)
            return dataclasses.replace(path, file=file) if isinstance(file, Path) else None
        try:
            found = path.resolve(strict=True)
            inside = found.is_relative_to(self._media) and stat.S_ISREG(found.stat().st_mode)
        except (OSError, ValueError, RuntimeError):
            return None
        return found if inside else None


def open_indexes(files: Sequence[str]) -> dict[str, Index]:
    """Returns every table of an embedding file, or of the parts of one set, mapped into memory where that is possible.

    Raises:
      InputError: for a file that cannot be read, or holds no records or rows that have no direction.
    """
    names: list[str] = []

    def first(found: Collection[str]) -> str:
        names[:] = names or found  # asked again of the table alone
        return names[0]

    read_embeddings(files, first)
    return {name: Index.open(files, name) for name in names}
