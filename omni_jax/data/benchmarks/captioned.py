"""Benchmarks of clips with one or more captions, each read from the file its authors publish.

clotho      clotho_captions_evaluation.csv, of version 1 or 2: file_name, caption_1 .. caption_5
audiocaps   test.csv: audiocap_id, youtube_id, start_time, caption; a row a caption
sounddescs  descriptions.pkl, or JSON of the same: captions by clip id
msrvtt      MSRVTT_JSFUSION_test.csv (1k-A): video_id, sentence
msvd        raw-captions.pkl (captions as lists of words, by clip id), JSON of the same, or AllVideoDescriptions.txt
didemo      test_data.json: moments of a video, whose descriptions in their order are its one paragraph
vatex       vatex_*.json: videoID, enCap
youcook2    youcookii_annotations_trainval.json: segment, id and sentence of each step of a recipe; youcook2_train: its other subset
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from omni_jax.data.benchmarks.items import Annotations, Item, PathLike, columns_for, read_captions, read_csv, read_json, read_text
from omni_jax.io.messages import lines_of_text
from omni_jax.types import InputError

YOUTUBE = "https://www.youtube.com/watch?v="
AUDIOCAPS_SECONDS = 10.0  # of AudioSet's clips
_CUT = re.compile(r"(?P<source>[\w-]{11})_(?P<start>\d+)_(?P<end>\d+)")


def clotho(path: PathLike) -> Annotations:
    """Returns the clips of a Clotho caption file, of version 1 or 2: five captions each in columns of their own, or one a row."""
    table = read_csv(path)
    numbered = [name for name in table.columns if re.fullmatch(r"caption_?\d+", name.lower())]
    captions = numbered or [name for name in table.columns if name.lower() in ("caption", "text")][:1]
    if "file_name" not in table.columns or not captions:
        raise InputError(f"{path}: no column file_name, or none of caption_1 to caption_5; its columns are {', '.join(table.columns)}")
    rows = ((place, row["file_name"], [row[c] for c in captions]) for place, row in table.rows)
    return _gathered(path, rows, table.problems, several=not numbered)


def audiocaps(path: PathLike) -> Annotations:
    """Returns the ten-second clips of an AudioCaps file, five captions each in the test set.

    Files of the cut clip may be called YOUTUBE_START_END in seconds or milliseconds, YYOUTUBE, or after the number of a caption; one called
    after the YouTube id is the whole recording.
    """
    table = read_csv(path)
    absent = [name for name in ("youtube_id", "start_time", "caption") if name not in table.columns]
    if absent:
        raise InputError(f"{path}: no column {absent[0]}; its columns are {', '.join(table.columns)}")
    starts: dict[str, tuple[str, float]] = {}
    numbers: dict[str, list[str]] = {}
    rows, problems = [], list(table.problems)
    for place, row in table.rows:
        try:
            start = float(row["start_time"])
            if not (row["youtube_id"] and 0 <= start < float("inf")):
                raise ValueError
        except ValueError:
            problems.append(f"{path}: {place}: youtube_id {row['youtube_id']!r} and start_time {row['start_time']!r} name no clip")
            continue
        name = f"{row['youtube_id']}_{start:g}_{start + AUDIOCAPS_SECONDS:g}"
        starts[name] = row["youtube_id"], start
        numbers.setdefault(name, []).extend(filter(None, [row.get("audiocap_id")]))
        rows.append((place, name, [row["caption"]]))
    found = _gathered(path, rows, problems, several=True)

    def item(given: Item) -> Item:
        source, start = starts[given.id]
        milliseconds = f"{source}_{round(start * 1000)}_{round((start + AUDIOCAPS_SECONDS) * 1000)}"
        files = (given.id, milliseconds, f"Y{given.id}", f"Y{source}", *numbers[given.id])
        return Item(given.id, given.captions, files, (source,), (start, start + AUDIOCAPS_SECONDS), YOUTUBE + source)

    return dataclasses.replace(found, items=tuple(map(item, found.items)))


def sounddescs(path: PathLike) -> Annotations:
    """Returns the recordings of SoundDescs; a description given in several pieces is one caption."""
    found = read_captions(path)
    return _gathered(path, ((f"entry {name!r}", name, [" ".join(c for c in captions if c)]) for name, captions in found.items()))


def msrvtt(path: PathLike) -> Annotations:
    """Returns the 1,000 clips of the 1k-A test set, one caption each."""
    table = read_csv(path)
    roles = columns_for(path, table.columns, {"video": ("video_id", "video"), "caption": ("sentence", "caption")}, {})
    absent = {"video", "caption"} - roles.keys()
    if absent:
        raise InputError(f"{path}: no column for the {' and the '.join(sorted(absent))}; its columns are {', '.join(table.columns)}")
    return _gathered(path, ((place, row[roles["video"]], [row[roles["caption"]]]) for place, row in table.rows), table.problems)


def msvd(path: PathLike) -> Annotations:
    """Returns the clips of MSVD with all their captions (about forty)."""
    if str(path).endswith(".txt"):
        lines = [line.strip() for line in lines_of_text(read_text(path).encode())]
        pairs = [(number, *line.partition(" ")[::2]) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
        entries = [(f"line {number}", name, [caption]) for number, name, caption in pairs]
    else:
        entries = [(f"entry {name!r}", name, captions) for name, captions in read_captions(path).items()]
    return _gathered(path, entries, several=True)


def didemo(path: PathLike) -> Annotations:
    """Returns the videos of DiDeMo, all descriptions of a video joined into one paragraph."""
    rows = _records(path, read_json(path), "video", "description")
    links = {row["video"]: row["dl_link"] for _, row in rows if isinstance(row.get("dl_link"), str)}
    found = _gathered(path, ((f"entry {n}", row["video"], [row["description"]]) for n, row in rows), several=True)
    items = tuple(Item(i.id, (" ".join(i.captions),), i.files, url=links.get(i.id)) for i in found.items)
    return dataclasses.replace(found, items=items)


def vatex(path: PathLike) -> Annotations:
    """Returns the clips of VATEX with their ten English captions."""
    rows = _records(path, read_json(path), "videoID", "enCap")
    return _gathered(path, ((f"entry {n}", row["videoID"], row["enCap"]) for n, row in rows))


def youcook2(path: PathLike) -> Annotations:
    """Returns the clips of YouCook2's validation subset: a step of a recipe each, with one caption, VIDEO_NUMBER by name."""
    return _youcook2(path, "validation")


def youcook2_train(path: PathLike) -> Annotations:
    """Returns the clips of YouCook2's training subset, as `youcook2` those of the other."""
    return _youcook2(path, "training")


def _youcook2(path: PathLike, subset: str) -> Annotations:
    content = read_json(path)
    videos = content.get("database") if isinstance(content, dict) else None
    if not isinstance(videos, dict) or not videos:
        raise InputError(f"{path}: expected an object with database; is this youcookii_annotations_trainval.json?")
    items: list[Item] = []
    problems: list[str] = []
    for video, found in videos.items():
        steps = found.get("annotations") if isinstance(found, dict) else None
        if not isinstance(steps, list):
            problems.append(f"{path}: video {video!r} has no annotations")
            continue
        if found.get("subset") != subset:
            continue
        for number, step in enumerate(steps):
            try:
                start, end = map(float, step["segment"])
                text, number = " ".join(step["sentence"].split()), int(step.get("id", number))
            except (AttributeError, KeyError, TypeError, ValueError):
                problems.append(f"{path}: video {video!r}: step {number} has no segment and sentence")
                continue
            if not text or not 0 <= start < end:
                problems.append(f"{path}: video {video!r}: step {number} has an empty sentence or segment")
                continue
            name = f"{video}_{number}"
            items.append(Item(name, (text,), (name,), (video,), (start, end), YOUTUBE + video))
    if not items:
        raise InputError(f"{path}: holds no clip of the subset {subset!r}" + (f"; {problems[0]}" if problems else ""))
    return Annotations(tuple(items), tuple(problems))


def _records(path: PathLike, content: Any, *keys: str) -> list[tuple[int, dict[str, Any]]]:
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: expected a list of records with {' and '.join(keys)}")
    bad = [n for n, row in enumerate(content, 1) if not isinstance(row, dict) or any(key not in row for key in keys)]
    if bad:
        raise InputError(f"{path}: entry {bad[0]} has no {' or no '.join(keys)}; is this the published file?")
    return list(enumerate(content, 1))


def _gathered(path: PathLike, entries: Iterable[tuple[str, Any, Any]], known: Iterable[str] = (), several: bool = False) -> Annotations:
    """Makes items of (place in the file, clip name, captions).

    Args:
      known: problems found before.
      several: whether entries of one name are captions of one clip; otherwise the second one is a problem.
    """
    captions: dict[str, list[str]] = {}
    problems, empty = list(known), 0
    for place, name, texts in entries:
        good = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        given = [" ".join(text.split()) for text in texts] if good else []
        texts = [text for text in given if text]
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{path}: {place}: names no clip")
        elif not texts:
            problems.append(f"{path}: {place}: clip {name!r} has no caption")
        elif name.strip() in captions and not several:
            problems.append(f"{path}: {place}: clip {name!r} was given already")
        else:
            captions.setdefault(name.strip(), []).extend(texts)
            empty += len(given) - len(texts)
    if not captions:
        raise InputError(f"{path}: holds no clip that can be used; {problems[0] if problems else 'it is empty'}")
    return Annotations(tuple(_item(name, texts) for name, texts in captions.items()), tuple(problems), empty)


def _item(name: str, captions: Iterable[str]) -> Item:
    cut = _CUT.fullmatch(name)  # MSVD and VATEX call a clip YOUTUBE_START_END
    if cut is None:
        return Item(name, tuple(captions), (name,))
    interval = (float(cut["start"]), float(cut["end"]))
    whole = interval[0] < interval[1]
    return Item(name, tuple(captions), (name,), (cut["source"],) if whole else (), interval if whole else None, YOUTUBE + cut["source"])
