"""A server under many clients: requests answered, seconds of a request and growth of memory, with batches across clients and without.

Clients are connections of this process to a server of its own on loopback. Each sends the next caption when the last is answered. The model
has one decoder layer of the 7B's width, so that a batch is real work, and the index 100,000 vectors of that width: what a search in them
takes is printed first. Last, 500 uploads that are no media: each must be refused, and the server must live.

Run alone: python -m tools.benchmarks.serving [--clients N] [--seconds S]
"""

from __future__ import annotations

import argparse
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

BATCH, HOSTILE, RECORDS = 16, 500, 100_000
WIDTH, INNER = 3584, 18944


def run(clients: int = 200, seconds: float = 60.0) -> dict[str, object]:
    """Returns the figures of both servers, and prints them."""
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_index(Path(folder))
        for size in (1, BATCH):
            with server(Path(folder), size) as (port, process):
                asyncio.run(load(port, process, 16, 5.0))  # compiles
                if size == 1:
                    found["search"] = asyncio.run(searches(port))
                    print(f"search in {RECORDS:,} x {WIDTH}: {json.dumps(found['search'])}", flush=True)
                row = asyncio.run(load(port, process, clients, seconds))
                if size == BATCH:
                    row["hostile_refused"] = asyncio.run(hostile(port))
                found[f"batch {size}"] = row
                print(f"batch {size}: {json.dumps(row)}", flush=True)
    alone, together = (found[f"batch {size}"]["answered"] for size in (1, BATCH))  # type: ignore[index]
    found["throughput_ratio"] = together / alone
    print(f"answered with batches of {BATCH}, over one by one: {together / alone:.2f}")
    return found


def make_index(folder: Path) -> None:
    """Writes a model with random weights, and an index of random vectors of its width."""
    from omni_jax.conversion.fresh import write_fresh
    from omni_jax.retrieval.embedding_file import write_embeddings
    from omni_jax.types import EmbeddingTable

    tower = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 1, "num_heads": 2}
    decoder = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_layers": 1, "num_heads": 28, "num_kv_heads": 4}
    parts = {
        "decoder": {**decoder, "mrope_sections": (16, 24, 24)},
        "vision": {**tower, "full_attention_layers": (0,)},
        "audio": tower,
        "beats": None,
    }
    write_fresh(folder / "model", parts, captions=["a sound of client 0 in turn 0", "a tone"])
    rows = np.random.default_rng(0).standard_normal((RECORDS, WIDTH), np.float32)
    write_embeddings(folder / "clips.npz", EmbeddingTable(tuple(f"clip {n}" for n in range(len(rows))), {"av": rows}))


async def searches(port: int, count: int = 20) -> dict[str, float]:
    """Returns medians of one client's searches: seconds of embedding, of the search alone, and of the whole request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    rows = []
    for number in range(count + 1):
        begun = time.perf_counter()
        body = json.dumps({"input": f"a sound of client 0 in turn {number}", "k": 10}).encode()
        status, answer = await ask(reader, writer, port, "/v1/search", body, "application/json")
        assert status == 200, answer
        rows.append([*json.loads(answer)["seconds"].values(), time.perf_counter() - begun])
    writer.close()
    medians = np.median(rows[1:], axis=0)  # the first reads the file
    return {"first": rows[0][1], **dict(zip(("embed", "search", "request"), (round(float(x), 4) for x in medians), strict=True))}


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
    parser = argparse.ArgumentParser(description="omni-jax serve under many clients")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    run(**vars(parser.parse_args()))
