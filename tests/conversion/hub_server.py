"""A Hub on loopback: repositories in memory, with what the Hub's library asks of one."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LARGE = 20_000  # bytes from which a file is stored as the Hub stores large ones, under its SHA-256


@dataclasses.dataclass
class Repository:
    """Files at one commit, and how the server behaves about them.

    Attributes:
      private: whether only requests with a token see it.
      gated: whether only people who accepted its terms may read files.
      cut: file -> places where the connection is closed, one for each time that the file is asked for.
      served: file -> bytes sent in place of its own.
      stall: file -> bytes after which nothing more comes, though the connection stays.
    """

    files: dict[str, bytes]
    commit: str = "1" * 40
    private: bool = False
    gated: bool = False
    cut: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    served: dict[str, bytes] = dataclasses.field(default_factory=dict)
    stall: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Hub:
    """The server's address, repositories, and the requests it had: method, path, Range header or ""."""

    url: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        """Returns the paths of the files that were asked for by GET."""
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


def files_of(*folders: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def hub_on_loopback(repositories: dict[str, Repository]) -> Iterator[Hub]:
    hub = Hub("", repositories)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_POST(self) -> None:
            """A repository made, and files committed to it, small ones as the library sends them."""
            path = urllib.parse.urlsplit(self.path).path
            hub.requests.append((self.command, path, ""))
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "Authorization" not in self.headers:
                return self._refuse(401, "Unauthorized")
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                asked = json.loads(sent)
                name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                hub.repositories.setdefault(name, Repository({}, private=bool(asked.get("private"))))
                return self._send(json.dumps({"url": f"{hub.url}/{name}"}).encode(), {}, True)
            if path == "/api/validate-yaml":
                return self._send(b'{"errors": [], "warnings": []}', {}, True)
            if parts[4:5] == ["preupload"]:
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]]
                return self._send(json.dumps({"files": files}).encode(), {}, True)
            name = "/".join(parts[2:4])
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    hub.repositories[name].files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            made = {"commitUrl": f"{hub.url}/{name}/commit/{'4' * 40}", "commitOid": "4" * 40, "success": True}
            self._send(json.dumps(made).encode(), {}, True)

        def _answer(self, body: bool) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            owner, name, kind, revision, *rest = [*(parts[2:] if api else parts), *[""] * 4]
            repository = hub.repositories.get(f"{owner}/{name}")
            if repository is None or (repository.private and "Authorization" not in self.headers):
                return self._refuse(401 if repository is None else 404, "RepoNotFound")
            if revision not in ("main", "v1", repository.commit):
                return self._refuse(404, "RevisionNotFound")
            if api:
                entries = [_entry(file, data) for file, data in repository.files.items()]
                if kind == "tree":
                    return self._send(json.dumps([e["tree"] for e in entries]).encode(), {}, body)
                value = {"id": f"{owner}/{name}", "sha": repository.commit, "siblings": [e["info"] for e in entries], "tags": []}
                return self._send(json.dumps(value).encode(), {}, body)
            if repository.gated:
                return self._refuse(403, "GatedRepo")
            file = "/".join(part for part in rest if part)
            if file not in repository.files:
                return self._refuse(404, "EntryNotFound")
            digest, data = _etag(repository.files[file]), repository.served.get(file, repository.files[file])
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
            cuts = repository.cut.get(file) if body else None
            stalled = repository.stall.get(file)
            return self._send(data, headers, body, cuts.pop(0) if cuts else stalled, stalled is not None)

        def _send(self, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None, stay: bool = False) -> None:
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if "Range" in self.headers else 200)
            for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                self.send_header(key, value)
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if body:
                self.wfile.write(data[start:cut])
                if cut is not None:
                    self.wfile.flush()
                    if stay:
                        hub.ended.wait(120)
                    self.close_connection = True

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def around(hub: Hub, folder: Path) -> dict[str, str]:
    """Returns an environment in which the Hub is the one on loopback, and the caches lie in `folder`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "OMNI_JAX_CACHE": str(folder / "cache")}


@contextlib.contextmanager
def asking(hub: Hub, folder: Path, **variables: str) -> Iterator[pytest.MonkeyPatch]:
    """Puts this process into the environment of `around`; yields what patches it further.

    The Hub's library reads the environment when it is imported, so it is imported again, as in a fresh process.
    """
    before = _library()
    with pytest.MonkeyPatch.context() as patch:
        environment = around(hub, folder) | variables
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in before:
            del sys.modules[name]
        try:
            yield patch
        finally:
            if made := _library():
                made["huggingface_hub"].close_session()
            for name in made:
                del sys.modules[name]
            sys.modules.update(before)


def _library() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "huggingface_hub"}


def _etag(data: bytes) -> str:
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, Any]:
    digest, size = _etag(data), len(data)
    info: dict[str, Any] = {"rfilename": file, "size": size, "blobId": digest[:40]}
    tree: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": digest[:40]}
    if size >= LARGE:
        info["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
        tree["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
    return {"info": info, "tree": tree}
