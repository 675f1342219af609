"""`omni-jax embed`, `presets`, `demo` and the Python face, from media files to embeddings. All read the golden checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import omni_jax
from omni_jax.cli import embedding, parity, presets
from omni_jax.cli.main import main
from omni_jax.config import TABLES, presets_for
from omni_jax.retrieval import read_embeddings
from omni_jax.retrieval.embedding_pass import Part
from omni_jax.retrieval.journal import Journal
from omni_jax.types import InputError
from tests.golden_set import GoldenSet
from tests.media_samples import write_clip
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit


@pytest.fixture(scope="session")
def embedded(golden: GoldenSet, converted: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden clip embedded into all seven tables by the command line."""
    out = tmp_path_factory.mktemp("embedded") / "all.npz"
    arguments = ["embed", "--model", str(converted), "--manifest", str(golden.manifest), "--out", str(out)]
    assert main([*arguments, "--tables", ",".join(TABLES), *settings]) == 0
    return out


def _reference(golden: GoldenSet, table: str) -> np.ndarray:
    rows = np.stack([golden.adapter[f"{i}/embed/{parity.REFERENCE[table]}"] for i in range(golden.clips)])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("table", TABLES)
def test_golden_rows_from_media_files_through_the_command_line(golden: GoldenSet, embedded: Path, table: str):
    found = read_embeddings(embedded)
    assert found.ids == tuple(record.id for record in golden.records)
    assert_close(found.tables[table], _reference(golden, table), "file_to_embedding_cosine")


@pytest.mark.parametrize("name", ["clips.tar", "clips.parquet"])
def test_golden_vectors_of_clips_in_one_file_are_those_of_loose_files_bit_for_bit(
    golden: GoldenSet, embedded: Path, converted: Path, settings: list[str], tmp_path: Path, name: str
):
    rows = [{"id": r.id, "text": r.text, "video": {"bytes": Path(str(r.video)).read_bytes(), "path": None}} for r in golden.records]
    if name.endswith(".parquet"):
        columns = "audio=video,video=video"
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=4)
    else:
        columns = "audio=mp4"
        with tarfile.open(tmp_path / name, "w") as tar:
            for row, record in zip(rows, golden.records, strict=True):
                tar.add(str(record.video), f"{row['id']}.mp4")
                (tmp_path / "text").write_text(row["text"])
                tar.add(tmp_path / "text", f"{row['id']}.txt")
    arguments = ["--manifest", str(tmp_path / name), "--columns", columns, "--out", str(tmp_path / "o.npz"), "--tables", ",".join(TABLES)]
    assert main(["embed", "--model", str(converted), *arguments, *settings]) == 0
    found, expected = read_embeddings(tmp_path / "o.npz"), read_embeddings(embedded)
    assert found.ids == expected.ids
    for table in TABLES:
        assert np.array_equal(found.tables[table], expected.tables[table])


def test_golden_run_leaves_no_lists_where_nothing_went_wrong(embedded: Path):
    assert {p.name for p in embedded.parent.iterdir()} - {"all.warnings.jsonl"} == {"all.npz"}


def test_golden_vectors_keep_their_length_when_asked(golden: GoldenSet, converted: Path, settings: list[str], tmp_path: Path):
    out = tmp_path / "raw.npz"
    arguments = ["--manifest", str(golden.manifest), "--out", str(out), "--tables", "text", "--no-normalize", "--official-keys"]
    assert main(["embed", "--model", str(converted), *arguments, *settings]) == 0
    with np.load(out, allow_pickle=False) as file:
        for i, record in enumerate(golden.records):
            assert_close(file[f"{record.id}__text"].ravel(), golden.adapter[f"{i}/embed/label"], "embed")


@pytest.fixture
def rough(golden: GoldenSet, tmp_path: Path) -> Path:
    """A manifest with one good record between every kind of bad one."""
    folder = tmp_path / "rough"
    folder.mkdir()
    shutil.copy(str(golden.records[0].video), folder / "good.mp4")
    whole = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    write_clip(folder / "silent.mp4", seconds=1.0, fps=8, width=96, height=64, audio=False, seed=3)
    broken = ("cut", "empty", "folder", "gone")
    lines = [json.dumps({"id": name, "text": name, "video": f"{name}.mp4", "audio": f"{name}.mp4"}) for name in broken]
    lines += [
        json.dumps({"id": "good", "text": "a whole clip", "video": "good.mp4", "audio": "good.mp4"}),
        "{not json",
        json.dumps({"id": "good", "text": "the id again", "video": "good.mp4", "audio": "good.mp4"}),
        json.dumps({"id": "odd", "text": "x", "picture": "good.mp4"}),
        json.dumps({"id": "words", "text": "no media"}),
        json.dumps({"id": "silent", "text": "x " * 3000, "video": "silent.mp4", "audio": "silent.mp4"}),
    ]
    data = ("\n".join(lines) + "\n").encode() + b'{"id": "bytes", "text": "\xff\xfe"}\n'
    (folder / "rough.jsonl").write_bytes(data)
    return folder / "rough.jsonl"


def test_golden_bad_records_are_listed_and_the_good_ones_embedded(rough: Path, converted: Path, capsys: pytest.CaptureFixture[str]):
    out = rough.parent / "rough.npz"
    assert main(["embed", "--model", str(converted), "--manifest", str(rough), "--out", str(out), "--batch-size", "2"]) == 1
    found = read_embeddings(out)
    assert found.ids == ("good", "words", "silent")
    assert set(found.tables) == set(TABLES)
    assert found.own == {name: ("good", "silent") for name in TABLES if name != "text"}

    errors = [json.loads(line) for line in (rough.parent / "rough.errors.jsonl").read_text().splitlines()]
    assert [e["line"] for e in errors] == [1, 2, 3, 4, 6, 7, 8, 11]
    assert [e["id"] for e in errors] == ["cut", "empty", "folder", "gone", None, "good", "odd", None]
    for error in errors:
        assert "\n" not in error["reason"] and len(error["reason"]) > 20
    for error in errors[:4]:
        assert f"{error['id']}.mp4" in error["reason"]
    assert "line 5" in errors[5]["reason"] or ":7" in errors[5]["reason"]
    assert "picture" in errors[6]["reason"]

    warnings = [json.loads(line) for line in (rough.parent / "rough.warnings.jsonl").read_text().splitlines()]
    assert [w["id"] for w in warnings] == ["silent"] and "silence" in warnings[0]["reason"]
    shown = capsys.readouterr().err
    assert (
        "skipped records: 8, listed in" in shown
        and "repaired records: 1, listed in" in shown
        and "captions cut to max_text_tokens: 1" in shown
    )
    assert not list(rough.parent.glob(".*")), "something half-written was left"


def test_golden_run_with_nothing_usable_says_so_and_writes_no_embeddings(converted: Path, tmp_path: Path, capsys):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "text": "x", "video": "gone.mp4"}\n')
    assert main(["embed", "--model", str(converted), "--manifest", str(manifest), "--out", str(tmp_path / "o.npz")]) == 2
    assert "o.errors.jsonl says why" in capsys.readouterr().err
    assert not (tmp_path / "o.npz").exists() and (tmp_path / "o.errors.jsonl").exists()


class TestGoingOn:
    """A run that ends half-way is resumed, and gives what an uninterrupted one gives."""

    @pytest.fixture
    def arguments(self, golden: GoldenSet, converted: Path, settings: list[str], tmp_path: Path) -> list[str]:
        usual = ["--model", str(converted), "--manifest", str(golden.manifest), "--out", str(tmp_path / "o.npz")]
        return ["embed", *usual, "--tables", "text", "--batch-size", "1", *settings]

    def test_golden_what_was_finished_is_not_done_again(self, golden, embedded, arguments, tmp_path, monkeypatch, capsys):
        done: list[str] = []

        def crash(self: Journal, part: Part) -> None:
            if len(done) == golden.clips - 1:
                raise OSError(28, "No space left on device", "part")
            done.extend(part.ids)
            original(self, part)

        original = Journal.add
        monkeypatch.setattr(Journal, "add", crash)
        assert main(arguments) == 2
        assert "No space left" in capsys.readouterr().err
        assert not (tmp_path / "o.npz").exists()
        monkeypatch.setattr(Journal, "add", original)
        (tmp_path / ".o.npz.0123abcd.unfinished").touch()  # of a kill while the table was written
        assert main([*arguments, "--no-normalize"]) == 2
        assert "other settings" in capsys.readouterr().err
        assert main(arguments) == 0
        assert f"embed: {golden.clips}/{golden.clips}" in capsys.readouterr().err
        found = read_embeddings(tmp_path / "o.npz")
        assert found.ids == read_embeddings(embedded).ids and done == list(found.ids[:-1])
        assert_close(found.tables["text"], read_embeddings(embedded).tables["text"], "invariance")
        assert [p.name for p in tmp_path.iterdir()] == ["o.npz"]

    @pytest.mark.slow
    @pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
    def test_golden_a_stopped_process_goes_on_where_it_was(self, golden, embedded, arguments, tmp_path, sign):
        command = [sys.executable, "-m", "omni_jax.cli.main", *arguments, "--workers", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        parts = tmp_path / ".o.unfinished"
        deadline = time.monotonic() + 300
        while not list(parts.glob("part-*.npz")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(sign)
        _, shown = process.communicate(timeout=300)
        kept = len(list(parts.glob("part-*.npz")))
        if sign == signal.SIGTERM:
            assert process.returncode == 75, shown
            assert "run it again to resume" in shown
        else:
            assert process.returncode == -signal.SIGKILL, shown
        assert 1 <= kept < golden.clips, "the run was over before the signal came"
        again = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0, again.stderr
        found = read_embeddings(tmp_path / "o.npz")
        assert found.ids == read_embeddings(embedded).ids
        assert_close(found.tables["text"], read_embeddings(embedded).tables["text"], "invariance")
        assert [p.name for p in tmp_path.iterdir()] == ["o.npz"]

    def test_golden_a_large_output_is_several_files_and_resumes_at_the_one_it_was_at(self, golden, embedded, arguments, tmp_path, capsys):
        def refuse(self: Journal, part: Part) -> None:
            if part.ids[0] == golden.records[1].id:
                raise OSError(28, "No space left on device", "part")
            original(self, part)

        original, clips = Journal.add, golden.clips
        several = [*arguments, "--file-size", "1e-9"]
        names = [f"o-{index:05}-of-{clips:05}.npz" for index in range(clips)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "add", refuse)
            assert main(several) == 2
        assert [p.name for p in tmp_path.glob("*.npz")] == names[:1]
        kept = (tmp_path / names[0]).stat().st_mtime_ns
        assert main(several) == 0
        assert f"{clips} records in {clips} files, which this name lists" in capsys.readouterr().out
        assert sorted(p.name for p in tmp_path.iterdir()) == names and (tmp_path / names[0]).stat().st_mtime_ns == kept
        found, whole = read_embeddings(tmp_path / "o.npz"), read_embeddings(embedded)
        assert found.ids == whole.ids
        assert_close(found.tables["text"], whole.tables["text"], "invariance")
        assert main([*several, "--no-normalize"]) == 0, "a file of other settings is written again"
        assert (tmp_path / names[0]).stat().st_mtime_ns != kept

    def test_golden_parts_of_several_hosts_are_read_together(self, golden, embedded, arguments, tmp_path, capsys):
        for index in range(2):
            assert main([*arguments, "--part", f"{index}/2"]) == 0
        parts = [str(tmp_path / f"o-{index:05}-of-00002.npz") for index in range(2)]
        found = read_embeddings(parts)
        whole = read_embeddings(embedded)
        assert sorted(found.ids) == sorted(whole.ids)
        order = [found.ids.index(i) for i in whole.ids]
        assert_close(found.tables["text"][order], whole.tables["text"], "invariance")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tables", "video,smell"], ["smell", "tva"]),
        (["--preset", "imagined"], ["imagined", "release"]),
        (["--set", "frames=7"], ["frames=7", "even"]),
        (["--set", "colour=red"], ["colour=red", "pixels"]),
        (["--model", "nowhere"], ["nowhere", "convert"]),
        (["--manifest", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--out", "no/such/folder/o.npz"], ["no/such/folder"]),
        (["--out", "o.txt"], ["o.txt", ".npz"]),
        (["--part", "2/2"], ["2/2", "I/N"]),
        (["--batch-size", "0"], ["--batch-size", "'0'"]),
        (["--workers", "0", "--timeout", "3"], ["--timeout 3", "--workers 0"]),
    ],
)
def test_golden_bad_arguments_are_one_line(golden, converted, settings, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    usual = ["--model", str(converted), "--manifest", str(golden.manifest), "--out", "o.npz", *settings]
    assert main(["embed", *usual, *arguments]) == 2
    shown = capsys.readouterr().err.strip()
    assert len(shown.splitlines()) == 1 and shown.startswith("omni-jax: ")
    for word in words:
        assert word in shown
    assert list(tmp_path.iterdir()) == []


def test_golden_presets_are_scored_side_by_side(golden: GoldenSet, converted: Path, tmp_path: Path, capsys):
    arguments = ["--model", str(converted), "--manifest", str(golden.manifest), "--out", str(tmp_path), "--tables", "text,video"]
    assert main(["presets", *arguments, "--set", "audio_seconds=2", "--set", "pixels=12544"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["R@1", *presets_for("plain")]
    tables = {name: read_embeddings(tmp_path / f"{name}.npz").tables for name in presets_for("plain")}
    assert np.abs(tables["training"]["text"] - tables["mteb"]["text"]).max() > 1e-3, "the two heads gave the same vectors"
    assert np.abs(tables["release"]["video"] - tables["mteb"]["video"]).max() > 1e-3, "the crop changed nothing"


def test_golden_presets_where_an_override_has_no_effect_are_left_out_and_told(golden, converted, monkeypatch, capsys):
    """`wave` keeps whole tracks, of which there is no centre."""
    arguments = ["presets", "--model", str(converted), "--manifest", str(golden.manifest), "--set", "audio_crop=center"]
    taken = []

    def pass_over(args: object, model: object, records: object, tables: object, name: str) -> list[Part]:
        taken.append(name)
        raise InputError("no further")

    monkeypatch.setattr(presets, "load_model", lambda args, source, preset: argparse.Namespace(preset=preset))
    monkeypatch.setattr(embedding, "embed", pass_over)
    assert main(arguments) == 2
    assert taken == ["training"]
    assert "preset wave is left out: preset field audio_crop='center' has no effect" in capsys.readouterr().err
    assert main([*arguments, "--presets", "training,wave"]) == 2
    assert "preset wave: preset field audio_crop='center' has no effect" in capsys.readouterr().err


def test_golden_presets_that_the_backbone_has_not_are_refused(golden, converted, capsys):
    assert main(["presets", "--model", str(converted), "--manifest", str(golden.manifest), "--presets", "mteb,nemotron"]) == 2
    assert "'nemotron' is not a preset of this backbone; choose among training, release, mteb" in capsys.readouterr().err


def test_golden_demo_prints_the_table_and_the_difference(golden: GoldenSet, tmp_path: Path):
    """In a process of its own, as a newcomer runs it: no test settings."""
    run = subprocess.run(
        [sys.executable, "-m", "omni_jax.cli.main", "demo", "--parity", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert "AVG-all" in run.stdout
    assert "Largest difference from the PyTorch reference" in run.stdout.splitlines()[-1]
    assert run.stdout.splitlines()[-2].endswith(f": {tmp_path / 'out' / 'demo.html'}") and (tmp_path / "out" / "demo.html").is_file()
    difference, cosine = parity.compare(read_embeddings(tmp_path / "out" / "demo.npz").tables, golden.dir)
    assert f"{difference:.1e}" in run.stdout.splitlines()[-1]
    assert cosine >= 0.9999


@pytest.fixture(scope="module")
def model(golden: GoldenSet, converted: Path) -> omni_jax.OmniRetriever:
    return omni_jax.OmniRetriever.from_pretrained(converted, preset=golden.preset)


class TestPythonFace:
    def test_golden_rows_of_each_mix(self, golden: GoldenSet, model: omni_jax.OmniRetriever):
        # `encode` takes whole files; sets with intervals keep them in the manifest.
        chosen = [i for i, r in enumerate(golden.records) if r.timestamps is None and len(r.modalities) == 3][:2]
        if not chosen:
            pytest.fail("the golden set has no whole clip with text, video and audio")
        texts, videos, audios = ([str(getattr(golden.records[i], name)) for i in chosen] for name in ("text", "video", "audio"))
        found = {
            "text": model.encode(texts=texts),
            "av": model.encode(videos=videos, audios=audios),
            "tva": model.encode(texts=texts, videos=videos, audios=audios, batch_size=1),
        }
        for table, rows in found.items():
            assert_close(rows, _reference(golden, table)[chosen], "file_to_embedding_cosine")
        raw = model.encode(texts=texts, normalize=False)
        assert_close(raw, np.stack([golden.adapter[f"{i}/embed/label"] for i in chosen]), "embed")

    def test_golden_empty_list_gives_no_rows(self, model: omni_jax.OmniRetriever):
        assert model.encode(texts=[]).shape == (0, model.config.decoder.hidden_size)

    def test_golden_misuse_is_explained(self, model: omni_jax.OmniRetriever):
        with pytest.raises(InputError, match="same length"):
            model.encode(texts=["a"], videos=[])
        with pytest.raises(InputError, match="at least one"):
            model.encode()
        with pytest.raises(InputError, match=r"1 of the first 1 items .*gone\.mp4"):
            model.encode(videos=["gone.mp4"])
