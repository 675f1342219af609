"""Part `media`: hundreds of broken, lying and odd media files through `embed`, with whole ones between them.

Nothing crashes or hangs, memory is bounded, every record is either embedded or listed once with a reason, and the records that could be
embedded get the same bits when the others are not there (the same groups of clips, and so the same batch shapes); the whole files, alone,
the same embedding within the tolerance for other batch shapes.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from omni_jax.data.sources import open_source
from omni_jax.retrieval import read_embeddings
from omni_jax.types import Clip, EmbeddingTable
from tools.torture import commands
from tools.torture.commands import Done
from tools.torture.media_corpus import Case, make_corpus
from tools.torture.outcome import Outcome, begun

MUTATED = 320
FULL = {"mutated": MUTATED}
TIMEOUT_S = 30.0  # of one clip
HUNG_S = 1200.0  # of a command, whatever the time given: it would be a hang
MEMORY = 4 << 30  # bytes, of the command with its decoding processes
INVARIANCE = 1e-5  # tests/tolerances.py: the same embedding in other batch shapes

Embed = Callable[[list[str]], Done]


def run(
    seed: int, minutes: float, *, mutated: int = MUTATED, tables: str = "av", model: Path | None = None, embed: Embed | None = None
) -> Outcome:
    """Returns what was tried and lost. `embed` runs the command in another way; the whole files are not run alone then."""
    with begun("media", seed, minutes) as (outcome, clock, folder):
        media = folder / "media"
        media.mkdir()
        model = model or commands.convert(folder)
        cases = make_corpus(media, commands.golden(), seed, mutated)
        run_embed = embed or (lambda arguments: commands.command(arguments, max(HUNG_S, clock.left)))

        def through(name: str, chosen: Sequence[Case]) -> tuple[Done, EmbeddingTable, list[dict[str, str]]]:
            manifest, out = folder / f"{name}.jsonl", folder / f"{name}.npz"
            manifest.write_text("".join(json.dumps(_record(case)) + "\n" for case in chosen))
            usual = ["--model", str(model), "--manifest", str(manifest), "--media-root", str(media), "--out", str(out), "--tables", tables]
            done = run_embed(["embed", *usual, "--batch-size", "8", "--timeout", str(TIMEOUT_S), "--workers", "1", *commands.settings()])
            errors = folder / f"{name}.errors.jsonl"
            listed = [json.loads(line) for line in errors.read_text().splitlines()] if errors.exists() else []
            return done, read_embeddings(out), listed

        done, found, listed = through("hostile", cases)
        embedded, failed = set(found.ids), [row["id"] for row in listed]
        outcome.tried.append(("files through embed", len(cases)))
        outcome.tried += sorted(collections.Counter(f"  {_kind(case)}" for case in cases).items())
        odd = sorted(case.id.removeprefix("odd-") for case in cases if _kind(case) == "odd")
        outcome.notes += [f"odd: {', '.join(odd)}"] if odd else []
        outcome.expect(done.status == 1, f"embed ended with status {done.status}, not 1: {done.err[-300:]}")
        outcome.expect("unexpected" not in done.err and "Traceback" not in done.err, f"embed showed {done.err[-300:]}")
        twice = [name for name, count in collections.Counter(failed).items() if count > 1]
        outcome.expect(not twice, f"listed more than once: {twice}")
        outcome.expect(not embedded & set(failed), f"both embedded and listed: {sorted(embedded & set(failed))}")
        silent = {case.id for case in cases} - embedded - set(failed)
        outcome.expect(not silent, f"neither embedded nor listed: {sorted(silent)}")
        lost = [case.id for case in cases if case.good and case.id not in embedded]
        outcome.expect(not lost, f"whole files that were not embedded: {lost}")
        bare = [row["id"] for row in listed if len(row["reason"]) < 20 or not row["reason"].isprintable()]
        outcome.expect(not bare, f"listed without one line of reason: {bare}")
        slow = [row["id"] for row in listed if any(words in row["reason"] for words in ("took longer than", "decoding process"))]
        outcome.expect(done.peak <= MEMORY, f"{done.peak / 1e9:.1f} GB of memory at the peak")
        outcome.notes.append(f"{len(embedded)} embedded, {len(failed)} listed, of these {len(slow)} by the time limit or a dead decoder")

        again = [case for case in cases if case.id in embedded]
        clean, same, _ = through("clean", again)
        outcome.tried.append(("embeddings compared bit for bit without the bad files", len(again)))
        outcome.expect(clean.status == 0 and same.ids == found.ids, f"the clean run ended with status {clean.status}")
        for name, rows in same.tables.items() if same.ids == found.ids else ():
            differ = np.flatnonzero((rows.view(np.uint32) != found.tables[name].view(np.uint32)).any(axis=1))
            outcome.expect(not len(differ), f"table {name}: other bits in {[same.ids[i] for i in differ]}")

        if embed is None:
            whole = [case for case in cases if case.good]
            outcome.tried.append(("whole files compared with a run of their own", len(whole)))
            for name, rows in through("alone", whole)[1].tables.items():
                beside = np.stack([found.tables[name][found.ids.index(case.id)] for case in whole if case.id in embedded])
                apart = float(np.abs(rows - beside).max()) if beside.shape == rows.shape else np.inf
                outcome.expect(apart <= INVARIANCE, f"table {name}: whole files differ by {apart:.1e} from a run of their own")
            _limits(outcome, folder, media, [case for case in cases if case.good], model)
        _prepare(outcome, folder, media, cases, run_embed)
        if done.peak:
            outcome.notes.append(f"memory at the peak {done.peak / 1e9:.2f} GB, {clean.peak / 1e9:.2f} GB without the bad files")
    return outcome


def _limits(outcome: Outcome, folder: Path, media: Path, whole: Sequence[Case], model: Path) -> None:
    """A limit that no file can keep: each is listed with it, and the command ends."""
    manifest, out = folder / "limit.jsonl", folder / "limit.npz"
    manifest.write_text("".join(json.dumps(_record(case)) + "\n" for case in whole))
    usual = ["--model", str(model), "--manifest", str(manifest), "--media-root", str(media), "--out", str(out), "--tables", "av"]
    done = commands.command(["embed", *usual, "--timeout", "0.001", "--workers", "1", *commands.settings()], HUNG_S)
    listed = [json.loads(line) for line in (folder / "limit.errors.jsonl").read_text().splitlines()]
    right = [row for row in listed if "took longer than 0.001 s" in row["reason"]]
    outcome.expect(len(right) == len(whole) and done.status == 2, f"a limit of 1 ms: {len(right)} listed, status {done.status}")
    outcome.tried.append(("files under a limit of 1 ms, each ended by it", len(whole)))


def _prepare(outcome: Outcome, folder: Path, media: Path, cases: Sequence[Case], run_command: Embed) -> None:
    """The same files through `prepare`: each in the shards or listed once; those in the shards are the same bits without the others."""
    preset = commands.golden().preset

    def through(name: str, chosen: Sequence[Case]) -> tuple[Done, dict[str, Clip], list[dict[str, str]]]:
        manifest, out = folder / f"prepare-{name}.jsonl", folder / f"shards-{name}"
        manifest.write_text("".join(json.dumps(_record(case)) + "\n" for case in chosen))
        usual = ["--manifest", str(manifest), "--media-root", str(media), "--out", str(out), "--timeout", str(TIMEOUT_S), "--workers", "1"]
        done = run_command(["prepare", *usual, *commands.settings()])
        errors = out / "errors.jsonl"
        listed = [json.loads(line) for line in errors.read_text().splitlines()] if errors.exists() else []
        source = open_source(out, preset)
        return done, {source.ids[i]: source.load(i) for i in range(len(source))}, listed

    done, clips, listed = through("hostile", cases)
    failed = [row["id"] for row in listed]
    outcome.tried.append(("the same files through prepare", len(cases)))
    outcome.expect(done.status == 1 and "Traceback" not in done.err, f"prepare ended with status {done.status}: {done.err[-300:]}")
    outcome.expect(sorted([*clips, *failed]) == sorted(case.id for case in cases), "prepare: a record is in neither place, or in both")
    outcome.expect(all(case.id in clips for case in cases if case.good), "prepare: a whole file was not taken")
    outcome.expect(done.peak <= MEMORY, f"prepare: {done.peak / 1e9:.1f} GB of memory at the peak")
    clean, again, _ = through("clean", [case for case in cases if case.id in clips])
    outcome.expect(clean.status == 0 and again.keys() == clips.keys(), f"the clean prepare ended with status {clean.status}")
    differ = [name for name, clip in again.items() if name in clips and not _equal(clip, clips[name])]
    outcome.expect(not differ, f"prepare: other bits in {differ}")
    outcome.tried.append(("prepared clips compared bit for bit without the bad files", len(again)))


def _equal(a: Clip, b: Clip) -> bool:
    assert a.video is not None and b.video is not None and a.waveform is not None and b.waveform is not None
    return np.array_equal(a.video.frames, b.video.frames) and np.array_equal(a.waveform.view(np.uint32), b.waveform.view(np.uint32))


def _record(case: Case) -> dict[str, str]:
    fields = {"id": case.id, "text": "a clip", "video": "good-clip.mp4", "audio": "good-clip.mp4"}
    return fields | dict.fromkeys(case.fields, case.file)


def _kind(case: Case) -> str:
    return case.id.split("-")[0] if case.good or case.id.startswith("odd") else case.id.rsplit("-", 1)[0]
