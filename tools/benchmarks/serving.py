"""A server under many clients: requests answered, seconds of a request and growth of memory, with batches across clients and without.

Clients are connections of this process to a server of its own on loopback. Each sends the next caption when the last is answered. Then 500
uploads that are no media: each must be refused, and the server must live.

Run alone: python -m tools.benchmarks.serving
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.golden_set import find

CLIENTS, SECONDS, BATCH, HOSTILE = 200, 60.0, 16, 500


def run() -> dict[str, object]:
    """Returns the figures of both servers, and prints them."""
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_index(Path(folder))
        for size in (1, BATCH):
            with server(Path(folder), size) as (port, process):
                asyncio.run(load(port, process, 16, 5.0))  # compiles
                row = asyncio.run(load(port, process, CLIENTS, SECONDS))
                if size == BATCH:
                    row["hostile_refused"] = asyncio.run(hostile(port))
                found[f"batch {size}"] = row
                print(f"batch {size}: {json.dumps(row)}", flush=True)
    alone, together = (found[f"batch {size}"]["answered"] for size in (1, BATCH))  # type: ignore[index]
    found["throughput_ratio"] = together / alone
    print(f"answered with batches of {BATCH}, over one by one: {together / alone:.2f}")
    return found


def make_index(folder: Path) -> None:
    """Writes the golden model, and an index of random vectors of its width."""
    from omni_jax import conversion
    from omni_jax.conversion.folder import read_manifest
    from omni_jax.retrieval.embedding_file import write_embeddings
    from omni_jax.types import EmbeddingTable

    golden = find("OMNI_GOLDEN", "wave_tiny")
    conversion.to_jax(golden.checkpoint, folder / "model", adapter=golden.adapter_dir)
    width = read_manifest(folder / "model").model.decoder.hidden_size
    rows = np.random.default_rng(0).standard_normal((1000, width)).astype(np.float32)
    write_embeddings(folder / "clips.npz", EmbeddingTable(tuple(f"clip {n}" for n in range(len(rows))), {"av": rows}))


@contextlib.contextmanager
def server(folder: Path, batch: int) -> Iterator[tuple[int, int]]:
    """Yields port and process id of a server."""
    command = [sys.executable, "-m", "omni_jax", "serve", "--model", folder / "model", "--index", folder / "clips.npz", "--port", "0"]
    command += ["--batch-size", str(batch), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}) as process:
        try:
            assert process.stdout is not None
            address = re.search(r":(\d+)/", process.stdout.readline())
            assert address, "the server did not start"
            yield int(address[1]), process.pid
        finally:
            process.kill()


async def load(port: int, process: int, clients: int, seconds: float) -> dict[str, float]:
    """Returns requests answered and failed, median and 99th percentile in seconds, growth of memory from the first quarter."""
    times: list[float] = []
    failed = 0
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for turn in range(1_000_000):
                if time.monotonic() > end:
                    return
                begun = time.perf_counter()
                body = json.dumps({"input": f"a sound of client {number} in turn {turn % 100}", "encoding_format": "base64"}).encode()
                status, _ = await ask(reader, writer, port, "/v1/embeddings", body, "application/json")
                times.append(time.perf_counter() - begun)
                failed += status != 200
        finally:
            writer.close()

    async def memory() -> int:
        await asyncio.sleep(seconds / 4)
        return resident(process)

    measured = asyncio.create_task(memory())
    await asyncio.gather(*(client(number) for number in range(clients)))
    early = await measured
    low, high = np.percentile(times, [50, 99])
    growth = resident(process) / early - 1
    return {"answered": len(times), "failed": failed, "p50": round(low, 3), "p99": round(high, 3), "memory_growth": round(growth, 4)}


async def hostile(port: int) -> int:
    """Returns how many of the uploads that are no media were refused; the server must answer after them."""
    seed, refused = random.Random(0), 0
    whole = find("OMNI_GOLDEN", "wave_tiny").records[0].video.read_bytes()  # type: ignore[union-attr]
    heads = [b"", b"#EXTM3U\nfile:///etc/passwd\n", b"RIFF", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"OggS", b"PK\x03\x04", whole[:200]]
    for number in range(HOSTILE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        content = seed.choice(heads) + seed.randbytes(seed.choice((0, 9, 600)) + number % 3)
        part = (
            f'--x\r\ncontent-disposition: form-data; name="{seed.choice(("file", "video", "audio", "image"))}"; filename="../../a"\r\n\r\n'
        )
        status, _ = await ask(
            reader, writer, port, "/v1/search", part.encode() + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"
        )
        refused += 400 <= status < 500
        writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    status, _ = await ask(reader, writer, port, "/v1/search", b'{"input": "a tone"}', "application/json")
    assert status == 200, "the server did not survive"
    return refused


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, path: str, body: bytes, kind: str
) -> tuple[int, bytes]:
    """Returns status and body of one request of a connection."""
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
    return int(answer.split(b" ", 2)[1]), await reader.readexactly(int(length[1]) if length else 0)


def resident(process: int) -> int:
    """Returns the memory of a process, bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    run()
