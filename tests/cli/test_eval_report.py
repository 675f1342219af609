"""`omni-jax eval` with a report, and with another file beside it: from files to a page and to p-values."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omni_jax.cli.main import main
from omni_jax.retrieval import write_embeddings
from omni_jax.types import EmbeddingTable, InputError
from tests.media_samples import write_clip, write_sound
from tests.retrieval.pages import Page
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

N = 8
IDS = tuple(f"clip{i}" for i in range(N))


def embeddings(path: Path, seed: int, ids: tuple[str, ...] = IDS) -> Path:
    shared = np.random.default_rng(1).normal(size=(len(ids), 6))
    rng = np.random.default_rng(seed)
    tables = {
        name: (shared + 0.6 * rng.normal(size=shared.shape)).astype(np.float32) for name in ("text", "video", "audio", "av", "tv", "at")
    }
    write_embeddings(path, EmbeddingTable(ids, tables))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return embeddings(tmp_path / "ours.npz", 2)


def manifest(folder: Path, broken: str | None = None) -> Path:
    (folder / "media").mkdir()
    lines = []
    for i, name in enumerate(IDS):
        clip = write_clip(folder / "media" / f"{name}.mp4", seconds=0.5, seed=i)
        if name == broken:
            clip.write_bytes(b"not a film")
        lines.append({"id": name, "text": f"<b>caption</b> of {name}", "video": f"media/{name}.mp4", "audio": f"media/{name}.mp4"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_html_alone_shows_ids(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert main(["eval", str(file), "--html", str(out), "--json", str(tmp_path / "out.json")]) == 0
    page = Page(out.read_text())
    assert page.faults == [] and "clip3" in page.all("main")[0].text
    assert json.loads(page.all("script", type_="application/json")[0].text) == {}
    assert f"{json.loads((tmp_path / 'out.json').read_text())['AVG-all']:.2f}" in page.all("header")[0].text
    assert "34.84" in page.all("main")[0].text, "published rows stand beside it"


def test_html_with_manifest_and_media(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listing, out = manifest(tmp_path, broken="clip5"), tmp_path / "out.html"
    assert main(["eval", str(file), "--html", str(out), "--manifest", str(listing), "--media", str(tmp_path)]) == 0
    page = Page(out.read_text())
    assert "<b>caption</b> of clip2" in page.all("main")[0].text and page.faults == []
    media = json.loads(page.all("script", type_="application/json")[0].text)
    names = {e.attributes["data-name"]: media[e.attributes["data-clip"]] for e in page.elements if "data-clip" in e.attributes}
    assert set(names) == set(IDS) - {"clip5"}
    image = base64.b64decode(names["clip2"]["image"].partition(",")[2])
    assert Image.open(io.BytesIO(image)).size == (3 * 96, 64)
    assert names["clip2"]["sound"].startswith("data:audio/mpeg;base64,")
    assert "Media of 1 of the 8 records shown could not be read: clip5." in page.all("footer")[0].text
    assert str(tmp_path) not in out.read_text()


def test_a_fault_of_our_own_in_previews_loses_neither_table_nor_page(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, out = manifest(tmp_path), tmp_path / "out.html"
    monkeypatch.setattr("omni_jax.media.preview.record_preview", functools.partial(sorted, no_such_argument=1))
    assert main(["eval", str(file), "--html", str(out), "--manifest", str(listing), "--media", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "AVG-all" in printed.out and "pictures and sounds are left out of the report: the first 5 records failed alike" in printed.err
    page = Page(out.read_text())
    assert "of clip2" in page.all("main")[0].text and "Pictures and sounds are left out" in page.all("footer")[0].text


def test_an_output_that_cannot_be_written_loses_no_table(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_jax.cli.report.page", lambda *args, **kwargs: (_ for _ in ()).throw(InputError("no page")))
    assert main(["eval", str(file), "--html", str(tmp_path / "out.html")]) == 2
    assert "AVG-all" in capsys.readouterr().out


def test_media_without_a_manifest_are_found_by_name(file: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "clips", tmp_path / "out.html"
    folder.mkdir()
    write_clip(folder / "clip1.mp4", seconds=0.5)
    write_sound(folder / "clip4.wav", seconds=0.5)
    (folder / "clip2.txt").write_text("no medium")
    assert main(["eval", str(file), "--html", str(out), "--media", str(folder)]) == 0
    page = Page(out.read_text())
    media = json.loads(page.all("script", type_="application/json")[0].text)
    names = {e.attributes["data-name"]: media[e.attributes["data-clip"]] for e in page.elements if "data-clip" in e.attributes}
    assert set(names) == {"clip1", "clip4"} and "image" not in names["clip4"] and "sound" in names["clip1"]


def test_manifest_alone_gives_captions_and_reads_no_media(file: Path, tmp_path: Path) -> None:
    listing, out = manifest(tmp_path), tmp_path / "out.html"
    for clip in (tmp_path / "media").iterdir():
        clip.unlink()
    assert main(["eval", str(file), "--html", str(out), "--manifest", str(listing)]) == 0
    page = Page(out.read_text())
    assert "of clip2" in page.all("main")[0].text and not page.all("footer")[0].text.count("could not be read")


def test_another_file_is_tested_record_by_record(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = embeddings(tmp_path / "theirs.npz", 3)
    out = tmp_path / "out.json"
    assert main(["eval", str(file), "--compare", str(other), "--json", str(out), "--html", str(tmp_path / "out.html")]) == 0
    text = capsys.readouterr().out
    assert "ours.npz less theirs.npz, percentage points:" in text and "p (Holm)" in text
    result = json.loads(out.read_text())
    assert main(["eval", str(other), "--json", str(tmp_path / "theirs.json")]) == 0
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    found = result["comparisons"]["theirs.npz"]
    assert len(found) == 15
    assert_close(found["AVG-all"]["difference"], result["AVG-all"] - theirs["AVG-all"], "metric")
    assert 0 < found["AVG-all"]["p"] <= 1 and found["AVG-all"]["p_holm"] is None and 0 < found["t2v"]["p_holm"] <= 1
    assert "theirs.npz" in Page((tmp_path / "out.html").read_text()).all("section", id="comparison")[0].text


def test_files_of_other_records_are_compared_without_a_test(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = embeddings(tmp_path / "theirs.npz", 3, IDS[:-1])
    assert main(["eval", str(file), "--compare", str(other)]) == 0
    assert "No paired test with theirs.npz: a paired test needs the same records on both sides: 8 and 7 records" in capsys.readouterr().out


def test_report_arguments_are_refused_in_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.html")
    cases = {
        ("--media", str(tmp_path)): "--html",
        ("--manifest", "m.jsonl"): "--html",
        ("--html", out, "--media", str(tmp_path / "none")): "no such folder",
        ("--html", out, "--manifest", str(tmp_path / "none.jsonl")): "none.jsonl",
        ("--html", str(tmp_path / "none" / "out.html")): "does not exist",
    }
    for arguments, words in cases.items():
        assert main(["eval", str(file), *arguments]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not Path(out).exists()


def test_several_captions_stand_under_their_clip(tmp_path: Path) -> None:
    clips, captions = tmp_path / "clips.jsonl", tmp_path / "clips.captions.jsonl"
    rng = np.random.default_rng(0)
    names = [f"clip{i}#{k}" for i in range(4) for k in range(2)]
    write_embeddings(tmp_path / "clips.npz", EmbeddingTable(IDS[:4], {"audio": rng.normal(size=(4, 5)).astype(np.float32)}))
    write_embeddings(tmp_path / "captions.npz", EmbeddingTable(tuple(names), {"text": rng.normal(size=(8, 5)).astype(np.float32)}))
    clips.write_text("".join(json.dumps({"id": name, "audio": f"{name}.wav"}) + "\n" for name in IDS[:4]))
    captions.write_text("".join(json.dumps({"id": name, "text": f"words of {name}"}) + "\n" for name in names))
    out = tmp_path / "out.html"
    files = [
        str(tmp_path / "clips.npz"),
        "--captions",
        str(tmp_path / "captions.npz"),
        "--manifest",
        str(clips),
        "--manifest",
        str(captions),
    ]
    assert main(["eval", *files, "--html", str(out)]) == 0
    page = Page(out.read_text())
    assert page.faults == [] and "words of clip2#0 / words of clip2#1" in page.all("main")[0].text
