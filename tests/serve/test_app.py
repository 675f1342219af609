"""The server's answers: those of `encode` and of `search`, media of records alone, and one line for whatever is wrong."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from omni_jax import OmniRetriever
from omni_jax.serve.library import Library
from omni_jax.types import Record
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit
JSON = {"content-type": "application/json"}


def embedded(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], np.float32)


def line_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    line = response.json()["error"]["message"]
    assert line and "\n" not in line and len(line) < 600
    return line


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_golden_embeddings_are_those_of_encode(client: TestClient, model: OmniRetriever, golden: GoldenSet):
    clips = golden.records[:2]
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(picture, "PNG")
    given = [
        clips[0].text,
        {"text": clips[1].text},
        {"video": encoded(clips[0].video)},
        {"audio": encoded(clips[0].audio)},
        {"file": encoded(clips[1].video)},
        {"text": clips[0].text, "audio": f"data:video/mp4;base64,{encoded(clips[1].audio)}"},
        {"image": base64.b64encode(picture.getvalue()).decode()},
    ]
    want = model.encode(
        [
            clips[0].text,
            clips[1].text,
            {"video": clips[0].video},
            {"audio": clips[0].audio},
            clips[1].video,
            {"text": clips[0].text, "audio": clips[1].audio},
            {"image": picture.getvalue()},
        ],
        workers=1,
    )
    response = client.post("/v1/embeddings", json={"model": "any", "input": given})
    assert_close(embedded(response), want, "invariance")
    body = response.json()
    assert (body["object"], body["model"]) == ("list", "tiny") and [item["index"] for item in body["data"]] == list(range(7))
    assert body["usage"]["total_tokens"] == sum(model.count_tokens(text) for text in (clips[0].text, clips[1].text, clips[0].text))

    packed = client.post("/v1/embeddings", json={"input": clips[0].text, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert_close(np.frombuffer(base64.b64decode(packed), "<f4"), want[0], "invariance")
    short = embedded(client.post("/v1/embeddings", json={"input": [clips[0].text], "dimensions": 8}))
    assert_close(short[0], want[0][:8] / np.linalg.norm(want[0][:8]), "invariance")

    with open(clips[0].video, "rb") as file:
        form = client.post("/v1/embeddings", data={"text": clips[0].text}, files={"video": ("../../x.m3u8", file, "text/html")})
    both = model.encode([{"text": clips[0].text, "video": clips[0].video}], workers=1)
    assert_close(embedded(form), both, "invariance")


def test_golden_search_is_that_of_the_index(client: TestClient, library: Library, model: OmniRetriever, golden: GoldenSet):
    clip = golden.records[0]
    response = client.post("/v1/search", json={"input": clip.text, "k": 3})
    found = response.json()
    assert (found["table"], found["records"]) == ("av", len(golden.records)) and set(found["seconds"]) == {"embed", "search"}
    want = library.search("av", model.encode(clip.text), 3)
    assert [row["id"] for row in found["results"]] == [row["id"] for row in want]
    assert_close([row["score"] for row in found["results"]], [row["score"] for row in want], "invariance")
    assert found["results"][0]["caption"] == next(r.text for r in golden.records if r.id == want[0]["id"])

    asked = [("av", model.encode(record.text), k) for k, record in enumerate(golden.records[:4], 1)]
    assert library.searches(asked) == [library.search(*one) for one in asked]  # to the bit, whatever they are asked with

    with open(clip.video, "rb") as file:
        found = client.post("/v1/search", data={"table": "av", "k": "1"}, files={"file": file}).json()
    assert found["results"][0]["id"] == clip.id and found["results"][0]["score"] > 0.9999
    with open(clip.audio, "rb") as file:
        found = client.post("/v1/search", files={"audio": file}).json()
    assert found["table"] == "text" and len(found["results"]) == len(golden.records)


def test_golden_clients_at_once_share_batches_and_get_their_own(client: TestClient, model: OmniRetriever):
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"a sound number {n}" for n in range(24)]
    want = model.encode(texts)
    with ThreadPoolExecutor(12) as threads:
        client.post("/v1/embeddings", json={"input": "warm"})
        before = metric(client, "encoded_batches"), metric(client, "encoded_items")
        found = list(threads.map(lambda text: embedded(client.post("/v1/embeddings", json={"input": text}))[0], texts))
        batches, items = metric(client, "encoded_batches") - before[0], metric(client, "encoded_items") - before[1]
    assert_close(np.stack(found), want, "invariance")
    assert items == 24 and batches < 24


def metric(client: TestClient, name: str) -> float:
    text = client.get("/metrics").text
    return float(re.search(rf"^omni_jax_{name} (\S+)$", text, re.MULTILINE)[1])


def test_golden_page_health_models_and_metrics(client: TestClient):
    page = client.get("/")
    nonce = re.search(r"'nonce-([^']+)'", page.headers["content-security-policy"])[1]
    assert page.text.count(f'nonce="{nonce}"') == 2 and "<script>" not in page.text and "style=" not in page.text
    assert not re.search(r"\son\w+=|https?://", page.text)
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    line_of(client.post("/v1/search", json={"input": ""}), 422)
    assert 'omni_jax_requests_total{route="/v1/search",status="422"}' in client.get("/metrics").text
    line_of(client.get("/nowhere"), 404)
    line_of(client.get("/v1/search"), 405)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'{"inputs": "x"}', 400, 'no "input"'),
        (b'{"input": []}', 400, "0 items"),
        (json.dumps({"input": ["x"] * 200}).encode(), 400, "200 items"),
        (b'{"input": [1, 2, 3]}', 400, "input 0 is a int"),
        (b'{"input": {}}', 400, "nothing to embed"),
        (b'{"input": {"text": "x", "colour": "red"}}', 400, "input 0 has the unknown keys colour; the keys are text, "),
        (b'{"input": {"text": 7}}', 422, "text is of type int"),
        (b'{"input": {"video": "clip0.mp4"}}', 400, "names and URLs are not followed"),
        (b'{"input": {"video": "/etc/passwd"}}', 400, "names and URLs are not followed"),
        (b'{"input": {"audio": "http://127.0.0.1/x.wav"}}', 400, "names and URLs are not followed"),
        (b'{"input": {"audio": {"path": "/etc/passwd"}}}', 400, "is not base64"),
        (b'{"input": {"text": "x", "timestamps": [3, 1]}}', 422, "timestamps"),
        (b'{"input": "x", "k": 0}', 400, "k must be a whole number from 1 to 1000"),
        (b'{"input": "x", "k": "many"}', 400, "k must be a whole number"),
        (b'{"input": "x", "k": true}', 400, "k must be a whole number"),
        (b'{"input": "x", "table": "tva"}', 400, "the index has no table 'tva'"),
        (b'{"input": "x", "k": NaN}', 400, "k must be a whole number"),
        (b'{"input": "x", "table": ["av"]}', 400, "table is no name"),
        (json.dumps({"input": "x", "table": "t" * 5000}).encode(), 400, "table is no name"),
        (b'{"input": "x", "prompt_name": "query"}', 400, "prompt_name"),
        (b'{"input": "x", "prompt_name": {}}', 400, "prompt_name"),
        (b'{"input": ["x", "y"]}', 400, "a search has one"),
        (b'{"input": "\\udce9"}', 422, "not valid Unicode"),
    ],
)
def test_golden_what_cannot_be_used_is_one_line(client: TestClient, body: bytes, status: int, words: str):
    assert words in line_of(client.post("/v1/search", content=body, headers=JSON), status)
    assert client.get("/health").status_code == 200


def test_golden_hostile_uploads_are_refused_and_the_server_lives(client: TestClient, golden: GoldenSet):
    """Damaged clips, playlists that name other files, archives, random bytes: each is refused, and names no file of this machine."""
    seed = random.Random(0)
    whole = Path(golden.records[0].video).read_bytes()
    bad = golden.records[0].video
    playlists = [
        f"#EXTM3U\n#EXTINF:1,\nfile://{bad}\n",
        f"ffconcat version 1.0\nfile {bad}\n",
        f'<?xml version="1.0"?><MPD><BaseURL>{bad}</BaseURL></MPD>',
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video {bad}\n",
        f"\n\n#EXTM3U\n{bad}\n",
        f"\x00\x01#EXTM3U\n{bad}\n",
        "[Script Info]\n",
        "{}",
        "",
    ]
    fields = ["file", "video", "audio", "image"]
    uploads = [text.encode() for text in playlists]
    uploads += [whole[:length] for length in (1, 7, 40, 300, len(whole) // 3)]
    uploads += [b"PK\x03\x04" + bytes(100), b"\x1f\x8b" + seed.randbytes(200), b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a" + b"\xff" * 30]
    uploads += [seed.randbytes(seed.choice((3, 50, 3000))) for _ in range(12)]
    for upload in uploads:
        for field in fields if upload is uploads[0] else [seed.choice(fields)]:
            response = client.post("/v1/search", files={field: ("clip.mp4", upload)})
            assert 400 <= response.status_code < 500, (field, upload[:40], len(upload))
            line = line_of(response, response.status_code)
            assert str(golden.dir) not in line and "/tmp" not in line, line
    assert client.get("/health").status_code == 200
    assert client.post("/v1/search", json={"input": "a tone"}).status_code == 200


def test_golden_forms_that_say_two_things_are_refused(client: TestClient, golden: GoldenSet):
    clip = Path(golden.records[0].video).read_bytes()
    assert "is text; send the file itself" in line_of(client.post("/v1/search", data={"video": "/etc/passwd"}, files={"x": b""}), 400)
    assert "files are video" in line_of(client.post("/v1/search", files={"text": clip}), 400)
    assert "ambiguous" in line_of(client.post("/v1/search", files={"file": clip, "audio": clip}), 400)
    assert "appears twice" in line_of(client.post("/v1/search", files=[("audio", clip), ("audio", clip)]), 400)
    assert line_of(client.post("/v1/search", files=[(f"f{n}", clip[:9]) for n in range(9)]), 400)
    assert "nothing to embed" in line_of(client.post("/v1/search", files={"file": b""}), 400)
    assert "no type" in line_of(client.post("/v1/search", content=b"x"), 415)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert line_of(client.post("/v1/search", content=b"--y\r\n", headers=broken), 400)


def test_golden_upload_over_the_limit_is_refused(serving: Callable[..., TestClient], golden: GoldenSet):
    clip = Path(golden.records[0].video).read_bytes()
    with serving({"max_bytes": len(clip) - 1}) as client:
        assert "--max-upload" in line_of(client.post("/v1/search", files={"video": clip}), 413)
        assert client.post("/v1/search", json={"input": "x"}).status_code == 200


def test_golden_media_of_records_and_nothing_else(client: TestClient, golden: GoldenSet):
    record = golden.records[0]
    image, sound = client.get("/media/0/image"), client.get("/media/0/sound")
    assert (image.headers["content-type"], sound.headers["content-type"]) == ("image/jpeg", "audio/mpeg")
    assert Image.open(io.BytesIO(image.content)).width > 10 and len(sound.content) > 500
    file = client.get("/media/0/file")
    assert file.content == Path(record.video).read_bytes() and file.headers["content-type"] == "video/mp4"
    part = client.get("/media/0/file", headers={"range": "bytes=0-9"})
    assert part.status_code == 206 and part.content == file.content[:10]
    away = "-1/file 0/.. 0/../../../etc/passwd %2e%2e/file 0%2f..%2f1/file 0/file/../../x 0/%2e%2e%2fa 0x0/file /etc/passwd ٣/file"
    for path in ("/..%2f..%2fetc/passwd", "/media/999/image", f"/media/{'9' * 5000}/file", *(f"/media/{name}" for name in away.split())):
        response = client.get(path)
        assert response.status_code == 404, path
        line_of(response, 404)


def test_golden_files_outside_the_folder_of_media_are_not_given_out(tmp_path: Path, golden: GoldenSet):
    inside, outside = tmp_path / "media", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "clip.mp4").write_bytes(Path(golden.records[0].video).read_bytes())
    (inside / "link.mp4").symlink_to(outside / "clip.mp4")
    (inside / "folder").symlink_to(outside)
    (inside / "page.html").write_text("<script>")
    (inside / "pipe.mp4").mkdir()
    places = {
        "good": inside / "clip.mp4",
        "absolute": outside / "clip.mp4",
        "dots": inside / ".." / "outside" / "clip.mp4",
        "link": inside / "link.mp4",
        "linked folder": inside / "folder" / "clip.mp4",
        "page": inside / "page.html",
        "folder": inside / "pipe.mp4",
        "missing": inside / "none.mp4",
        "null": Path("a\0b.mp4"),
    }
    from omni_jax.retrieval.search import Index

    rows = np.eye(len(places), 16, dtype=np.float32)
    index = Index(rows, "av", tuple(places))
    library = Library({"av": index}, {name: Record(name, "a caption", video=path, audio=path) for name, path in places.items()}, inside)
    try:
        given = {name: library.file(number) for number, name in enumerate(places)}
        assert given.pop("good") == (inside / "clip.mp4", "video/mp4")
        assert set(given.values()) == {None}
        for number, name in enumerate(places):
            assert (library.preview(number, "image") is not None) == (name == "good"), name
        shown = {row["id"]: row["image"] for row in library.search("av", rows[0], 20)}
        assert [name for name, there in shown.items() if there] == ["good", "page"]
        assert Library({"av": index}, library._records, None).file(0) is None
    finally:
        library.close()


def _refused() -> None:
    raise BlockingIOError(11, "no room")


def test_golden_busy_server_says_so(model: OmniRetriever, library: Library, golden: GoldenSet, monkeypatch: pytest.MonkeyPatch):
    from omni_jax.media import workers
    from omni_jax.serve.app import make_app
    from omni_jax.serve.embedding import Embedder
    from omni_jax.serve.guards import Rules

    embedder = Embedder(model, batch_size=4, workers=1, timeout_s=20, most_waiting=2)
    with TestClient(make_app(embedder, library, Rules(), "tiny"), base_url="http://localhost") as client:
        response = client.post("/v1/embeddings", json={"input": ["a", "b", "c"]})
        assert "try again" in line_of(response, 503) and response.headers["retry-after"] == "1"
        assert client.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
        monkeypatch.setattr(workers, "START_PAUSES_S", ())
        monkeypatch.setattr(workers, "_Child", _refused)
        response = client.post("/v1/search", files={"video": Path(golden.records[0].video).read_bytes()})
        assert "a decoding process could not start (no room)" in line_of(response, 503)
        assert response.headers["retry-after"] == "1"
        assert 'omni_jax_requests_total{route="/v1/search",status="503"} 1.0' in client.get("/metrics").text
