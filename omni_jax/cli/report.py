"""The page that `eval --html` writes: its records' captions from a manifest, their pictures and sounds from media files, and its text."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from omni_jax import __version__
from omni_jax.cli.progress import Progress
from omni_jax.data.formats.entry import media_kind
from omni_jax.io.messages import some
from omni_jax.retrieval.inputs import CAPTION_MARK
from omni_jax.retrieval.metrics import Scores
from omni_jax.retrieval.report import Clip, Other, build_report, render
from omni_jax.types import ClipError, EmbeddingTable, InputError, Record

TIME_LIMIT = 60.0  # seconds one clip may take


def records_of(manifests: Sequence[str], media: str | None) -> dict[str, Record]:
    """Returns records by id: those of the manifests, or those named by the files in folder `media` (clip7.mp4 is clip7).

    Raises:
      InputError: for a manifest that cannot be read, or a folder that is not there.
    """
    if media is not None and not os.path.isdir(media):
        raise InputError(f"--media {media}: no such folder; name the one that holds the clips")
    if manifests:
        from omni_jax.data.manifest import read_manifest

        read = {path: read_manifest(path, media) for path in manifests}
        for path, manifest in read.items():
            if manifest.problems:
                print(f"{path}: {len(manifest.problems)} records cannot be shown{manifest.first_problem}", file=sys.stderr)
        return {record.id: record for manifest in read.values() for record in manifest.records}
    found: dict[str, Record] = {}
    for path in sorted(Path(media).iterdir()) if media is not None else ():
        kind = media_kind(path.name)
        if kind not in ("video", "audio") or not path.is_file():
            continue
        record = found.get(path.stem, Record(path.stem))
        if kind == "video":
            record = dataclasses.replace(record, video=record.video or path, audio=record.audio or path)
        else:
            record = dataclasses.replace(record, audio=path)
        found[path.stem] = record
    return found


def page(
    name: str, embeddings: EmbeddingTable, scores: Scores, others: Sequence[Other], records: Mapping[str, Record], with_media: bool
) -> str:
    """Returns the report of a result, with what is known of the records it shows."""
    report = build_report(name, embeddings.tables, scores, others)
    shown = [records[record] for record in report.records if record in records]
    clips, notes = clips_of(shown) if with_media else ({}, [])
    return render(report, captions_of(records.values()), clips, notes=notes, version=__version__)


def captions_of(records: Iterable[Record]) -> dict[str, str]:
    """Returns captions by record; several of one clip (ids CLIP#NUMBER) are found under the clip's id too, one after the other."""
    captions = {record.id: record.text for record in records if record.text}
    several: dict[str, list[str]] = {}
    for name, text in captions.items():
        clip, mark, number = name.rpartition(CAPTION_MARK)
        if mark and number.isdigit():
            several.setdefault(clip, []).append(text)
    return {clip: " / ".join(texts) for clip, texts in several.items()} | captions


def clips_of(records: Sequence[Record]) -> tuple[dict[str, Clip], list[str]]:
    """Returns pictures and sounds by id, and lines about media that could not be read. Decoding happens in processes that can be ended."""
    from omni_jax.media.preview import record_preview
    from omni_jax.media.workers import run_guarded

    wanted = [record for record in records if record.video is not None or record.audio is not None]
    clips: dict[str, Clip] = {}
    failed: list[str] = []
    if not wanted:
        return clips, []
    workers = min(len(wanted), max(1, (os.cpu_count() or 1) - 1))
    try:
        with Progress(len(wanted), "previews") as progress:
            for record, preview in run_guarded(record_preview, wanted, workers, TIME_LIMIT, name=lambda record: record.id):
                progress.update()
                if isinstance(preview, ClipError) or preview.problems:
                    failed.append(record.id)
                if not isinstance(preview, ClipError):
                    clips[record.id] = Clip(preview.image, preview.sound)
    except InputError as e:  # a fault of our own: the page is of use without them
        print(f"pictures and sounds are left out of the report: {e}", file=sys.stderr)
        return {}, [f"Pictures and sounds are left out: {e}."]
    if not failed:
        return clips, []
    return clips, [f"Media of {len(failed)} of the {len(wanted)} records shown could not be read: {some(failed, 5)}."]
