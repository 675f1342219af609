"""`omni-jax serve`: what it refuses before it reads a model, and a server of its own that answers and ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from omni_jax import OmniRetriever
from omni_jax.cli.main import main
from omni_jax.retrieval import read_embeddings, write_embeddings
from tests.golden_set import GoldenSet

BARE = ["serve", "--model", "none", "--index", "none.npz"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: is reached from other machines; give a --token"),
        (["--token", "short"], "--token: give 16 letters and digits or more"),
        (["--token", "with spaces and ; signs"], "--token: give 16 letters and digits"),
        (["--port", "70000"], "--port 70000: is not a port"),
        (["--host", "203.0.113.7", "--token", "a" * 16], "cannot be listened on"),
        (["--media", "nowhere"], "--media nowhere: no such folder"),
        (["--port", "0"], "none.npz: no such file"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main([*BARE, *arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line and "\n" not in line


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*BARE, "--port", str(port)]) == 2
    assert f"--port {port}: is in use on 127.0.0.1; end the other program, or choose another port" in capsys.readouterr().err


@pytest.mark.jit
def test_golden_index_of_another_model_is_one_line_before_weights_are_read(
    folder: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OmniRetriever, "from_source", lambda *_, **__: pytest.fail("nothing may be loaded"))
    found = read_embeddings(index)
    assert found.made_with is not None
    made = {**found.made_with, "weights": {**found.made_with["weights"], "base weights": "0" * 32}}
    write_embeddings(tmp_path / "other.npz", dataclasses.replace(found, made_with=made))
    assert main(["serve", "--model", str(folder), "--index", str(tmp_path / "other.npz"), "--port", "0"]) == 2
    line = capsys.readouterr().err.strip()
    assert "other.npz: was made otherwise than --model" in line and "weights.base differs" in line and "\n" not in line


@pytest.mark.slow
@pytest.mark.jit
def test_golden_server_answers_and_ends_with_its_decoders(golden: GoldenSet, folder: Path, index: Path, model: object) -> None:
    settings = [part for name in ("frames", "audio_seconds", "pixels") for part in ("--set", f"{name}={getattr(golden.preset, name)}")]
    command = [sys.executable, "-m", "omni_jax", "serve", "--model", str(folder), "--index", str(index), "--port", "0"]
    command += ["--manifest", str(golden.manifest), "--media", str(golden.dir), "--workers", "1", *settings]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            assert address, server.stderr.read() if server.stderr else ""
            body = json.dumps({"input": golden.records[0].text, "k": 1}).encode()
            request = urllib.request.Request(f"{address[0]}v1/search", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.headers.get("server") is None
                (found,) = json.load(answer)["results"]
            with urllib.request.urlopen(f"{address[0]}media/{found['number']}/image", timeout=60) as picture:
                assert picture.read(2) == b"\xff\xd8"
            server.send_signal(signal.SIGINT)
            assert server.wait(30) in (0, 130)
        finally:
            server.kill()
