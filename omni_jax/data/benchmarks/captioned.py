"""Benchmarks of clips with one or more captions, each read from the file its authors publish.

clotho      clotho_captions_evaluation.csv: file_name, caption_1 .. caption_5
sounddescs  descriptions.pkl, or JSON of the same: captions by clip id
msrvtt      MSRVTT_JSFUSION_test.csv (1k-A): video_id, sentence
msvd        raw-captions.pkl (captions as lists of words, by clip id), JSON of the same, or AllVideoDescriptions.txt
didemo      test_data.json: moments of a video, whose descriptions in their order are its one paragraph
vatex       vatex_*.json: videoID, enCap
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from omni_jax.data.benchmarks.items import (
    Annotations,
    Item,
    PathLike,
    ReadPickle,
    columns_for,
    read_captions,
    read_csv,
    read_json,
    read_text,
)
from omni_jax.types import InputError

YOUTUBE = "https://www.youtube.com/watch?v="
_CUT = re.compile(r"(?P<source>[\w-]{11})_(?P<start>\d+)_(?P<end>\d+)")


def clotho(path: PathLike, read_pickle: ReadPickle | None = None) -> Annotations:
    """Returns the clips of a Clotho caption file, five captions each."""
    columns, rows = read_csv(path)
    captions = [name for name in columns if re.fullmatch(r"caption_?\d+", name.lower())]
    if "file_name" not in columns or not captions:
        raise InputError(f"{path}: no column file_name, or none of caption_1 to caption_5; its columns are {', '.join(columns)}")
    return _gathered(path, ((f"line {line}", row.get("file_name", ""), [row.get(c, "") for c in captions]) for line, row in rows))


def sounddescs(path: PathLike, read_pickle: ReadPickle | None = None) -> Annotations:
    """Returns the recordings of SoundDescs; a description given in several pieces is one caption."""
    found = read_captions(path, read_pickle)
    return _gathered(path, ((f"entry {name!r}", name, [" ".join(c for c in captions if c)]) for name, captions in found.items()))


def msrvtt(path: PathLike, read_pickle: ReadPickle | None = None) -> Annotations:
    """Returns the 1,000 clips of the 1k-A test set, one caption each."""
    columns, rows = read_csv(path)
    roles = columns_for(path, columns, {"video": ("video_id", "video"), "caption": ("sentence", "caption")}, {})
    absent = {"video", "caption"} - roles.keys()
    if absent:
        raise InputError(f"{path}: no column for the {' and the '.join(sorted(absent))}; its columns are {', '.join(columns)}")
    return _gathered(path, ((f"line {line}", row.get(roles["video"], ""), [row.get(roles["caption"], "")]) for line, row in rows))


def msvd(path: PathLike, read_pickle: ReadPickle | None = None) -> Annotations:
    """Returns the clips of MSVD with all their captions (about forty)."""
    if str(path).endswith(".txt"):
        lines = [line.strip() for line in read_text(path).splitlines()]
        pairs = [(number, *line.partition(" ")[::2]) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
        entries = [(f"line {number}", name, [caption]) for number, name, caption in pairs]
    else:
        entries = [(f"entry {name!r}", name, captions) for name, captions in read_captions(path, read_pickle).items()]
    return _gathered(path, entries, several=True)


def didemo(path: PathLike, read_pickle: ReadPickle | None = None) -> Annotations:
    """Returns the videos of DiDeMo, all descriptions of a video joined into one paragraph."""
    rows = _records(path, read_json(path), "video", "description")
    links = {row["video"]: row["dl_link"] for _, row in rows if isinstance(row.get("dl_link"), str)}
    found = _gathered(path, ((f"entry {n}", row["video"], [row["description"]]) for n, row in rows), several=True)
    return Annotations(
        tuple(Item(i.id, (" ".join(i.captions),), i.files, url=links.get(i.id)) for i in found.items),
        found.problems,
    )


def vatex(path: PathLike, read_pickle: ReadPickle | None = None) -> Annotations:
    """Returns the clips of VATEX with their ten English captions."""
    rows = _records(path, read_json(path), "videoID", "enCap")
    return _gathered(path, ((f"entry {n}", row["videoID"], row["enCap"]) for n, row in rows))


def _records(path: PathLike, content: Any, *keys: str) -> list[tuple[int, dict[str, Any]]]:
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: expected a list of records with {' and '.join(keys)}")
    bad = [n for n, row in enumerate(content, 1) if not isinstance(row, dict) or any(key not in row for key in keys)]
    if bad:
        raise InputError(f"{path}: entry {bad[0]} has no {' or no '.join(keys)}; is this the published file?")
    return list(enumerate(content, 1))


def _gathered(path: PathLike, entries: Iterable[tuple[str, Any, Any]], several: bool = False) -> Annotations:
    """Makes items of (place in the file, clip name, captions).

    Args:
      several: whether entries of one name are captions of one clip; otherwise the second one is a problem.
    """
    captions: dict[str, list[str]] = {}
    problems = []
    for place, name, texts in entries:
        good = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        texts = [" ".join(text.split()) for text in texts if text.strip()] if good else []
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{path}: {place}: names no clip")
        elif not texts:
            problems.append(f"{path}: {place}: clip {name!r} has no caption")
        elif name.strip() in captions and not several:
            problems.append(f"{path}: {place}: clip {name!r} was given already")
        else:
            captions.setdefault(name.strip(), []).extend(texts)
    if not captions:
        raise InputError(f"{path}: holds no clip that can be used; {problems[0] if problems else 'it is empty'}")
    return Annotations(tuple(_item(name, texts) for name, texts in captions.items()), tuple(problems))


def _item(name: str, captions: Iterable[str]) -> Item:
    cut = _CUT.fullmatch(name)  # MSVD and VATEX call a clip YOUTUBE_START_END
    if cut is None:
        return Item(name, tuple(captions), (name,))
    interval = (float(cut["start"]), float(cut["end"]))
    whole = interval[0] < interval[1]
    return Item(name, tuple(captions), (name,), (cut["source"],) if whole else (), interval if whole else None, YOUTUBE + cut["source"])
