"""A server under many clients: requests answered, seconds of a request and memory, with batches across clients and without.

Clients are connections of this process to a server of its own on loopback. Each sends the next request when the last is answered: captions
to embed and to search with in turn, and every twentieth a clip. Two models are served:

* The golden model, a real one that is tiny, under many clients, and again with captions to embed alone: with clips, decoding on the CPU
  bounds what is answered. Last, 500 uploads that are no media: each must be refused, and the server must live.
* One decoder layer of the 7B's width, so that a batch is real work, under few clients. Its index is 100,000 vectors of that width in a set
  of files as `embed` writes them, with captions and clips: what a search in them takes, and the pictures of its results, is printed first.

Run alone: python -m tools.benchmarks.serving [--clients N] [--seconds S]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tests.golden_set import GoldenSet, find

BATCH, HOSTILE, RECORDS, PARTS = 16, 500, 100_000, 5
WIDTH, INNER, FEW = 3584, 18944, 8
CLIPS, SHOWN = 8, 12  # clips that the records share; results of a search
MEDIA_EVERY = 20


def run(clients: int = 200, seconds: float = 60.0, models: Sequence[str] = ("tiny", "wide")) -> dict[str, object]:
    """Returns the figures of all servers, and prints them."""
    found: dict[str, object] = {}
    golden = find("OMNI_GOLDEN", "wave_tiny")
    clip = golden.records[0].video.read_bytes()  # type: ignore[union-attr]
    for name in models:
        count = clients if name == "tiny" else min(clients, FEW)
        with tempfile.TemporaryDirectory() as made:
            folder, answered, alone = Path(made), {}, {}
            make_tiny(folder, golden) if name == "tiny" else make_wide(folder)
            for size in (1, BATCH):
                with server(folder, size) as (port, process):
                    asyncio.run(load(port, process, 16, 5.0, clip if name == "tiny" else None))  # compiles
                    if name == "wide" and size == 1:
                        found["search"] = asyncio.run(searches(port))
                        print(f"search in {RECORDS:,} x {WIDTH}: {json.dumps(found['search'])}", flush=True)
                    row = asyncio.run(load(port, process, count, seconds, clip if name == "tiny" else None))
                    if name == "tiny":
                        row["captions_alone"] = alone[size] = asyncio.run(load(port, process, count, seconds / 2, None))
                    if name == "tiny" and size == BATCH:
                        row["hostile_refused"] = asyncio.run(hostile(port, clip))
                found[f"{name}, batch {size}"], answered[size] = row, row["answered"]
                print(f"{name}, {count} clients, batch {size}: {json.dumps(row)}", flush=True)
            if alone:
                found["captions_ratio"] = alone[BATCH]["answered"] / alone[1]["answered"]
                print(
                    f"{name}, captions alone: answered with batches of {BATCH}, over one by one: {found['captions_ratio']:.2f}", flush=True
                )
            found[f"{name}_throughput_ratio"] = answered[BATCH] / answered[1]
            print(f"{name}: answered with batches of {BATCH}, over one by one: {answered[BATCH] / answered[1]:.2f}", flush=True)
    return found


def make_tiny(folder: Path, golden: GoldenSet) -> None:
    """Writes the golden model and an index of random vectors of its width."""
    from omni_jax import conversion
    from omni_jax.retrieval.embedding_file import write_embeddings
    from omni_jax.types import EmbeddingTable

    conversion.to_jax(golden.checkpoint, folder / "model", adapter=golden.adapter_dir)
    width = golden.config["text_config"]["hidden_size"]
    rows = np.random.default_rng(0).standard_normal((RECORDS // 10, width), np.float32)
    write_embeddings(folder / "clips.npz", EmbeddingTable(tuple(f"clip {n}" for n in range(len(rows))), {"av": rows}))


def make_wide(folder: Path) -> None:
    """Writes a model with random weights, an index of random vectors of its width as a set of files, and a manifest of its records."""
    from omni_jax.conversion.fresh import write_fresh
    from omni_jax.retrieval.embedding_file import part_path, write_embeddings
    from omni_jax.types import EmbeddingTable
    from tests.media_samples import write_clip

    tower = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 1, "num_heads": 2}
    decoder = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_layers": 1, "num_heads": 28, "num_kv_heads": 4}
    parts = {
        "decoder": {**decoder, "mrope_sections": (16, 24, 24)},
        "vision": {**tower, "full_attention_layers": (0,)},
        "audio": tower,
        "beats": None,
    }
    write_fresh(folder / "model", parts, captions=["a sound of client 0 in turn 0", "a tone"])
    for number in range(CLIPS):
        write_clip(folder / f"{number}.mp4", 8.0, width=1280, height=720, seed=number)
    lines = []
    for part in range(PARTS):
        ids = [f"clip {n}" for n in range(part * RECORDS // PARTS, (part + 1) * RECORDS // PARTS)]
        rows = np.random.default_rng(part).standard_normal((len(ids), WIDTH), np.float32)
        table = EmbeddingTable(tuple(ids), {"av": rows}, parts=(part,), of=PARTS)
        write_embeddings(part_path(epath.Path(folder / "clips.npz"), part, PARTS), table)
        for n, name in enumerate(ids):
            file = f"{n % CLIPS}.mp4"
            lines.append(json.dumps({"id": name, "text": f"what is heard and seen in {name}", "video": file, "audio": file}))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")


async def searches(port: int, count: int = 20) -> dict[str, float]:
    """Returns one client's seconds: the first search; medians of embedding, the search alone, the request, and its pictures."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    others = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]  # as many as a browser opens
    rows = []
    for number in range(count + 1):
        begun = time.perf_counter()
        body = json.dumps({"input": f"a sound of client 0 in turn {number}", "k": SHOWN}).encode()
        status, answer = await ask(reader, writer, port, "/v1/search", body, "application/json")
        assert status == 200, answer
        found, done = json.loads(answer), time.perf_counter()
        wanted = [result["number"] for result in found["results"] if result["image"] and result["caption"]]
        assert len(wanted) == SHOWN, found["results"]

        async def pictures(connection: Any, numbers: list[int]) -> None:
            for number in numbers:
                status, _ = await ask(*connection, port, f"/media/{number}/image")
                assert status == 200, status

        await asyncio.gather(*(pictures(connection, wanted[n :: len(others)]) for n, connection in enumerate(others)))
        rows.append([*found["seconds"].values(), done - begun, time.perf_counter() - done])
    for _, connection in [(reader, writer), *others]:
        connection.close()
    medians = [round(float(x), 4) for x in np.median(rows[1:], axis=0)]
    first = {"first_search": rows[0][1], "first_pictures": round(rows[0][3], 4)}  # which reads the files, and decodes
    return first | dict(zip(("embed", "search", "request", "pictures"), medians, strict=True))


def server(folder: Path, batch: int) -> contextlib.AbstractContextManager[tuple[int, int]]:
    """Gives port and process id of a server with batches of this size."""
    media = ["--manifest", folder / "clips.jsonl", "--media", folder] if (folder / "clips.jsonl").exists() else []
    return served(folder, "--batch-size", str(batch), "--unchecked", *media)


@contextlib.contextmanager
def served(folder: Path, *options: str | Path) -> Iterator[tuple[int, int]]:
    """Yields port and process id of a server of FOLDER/model and FOLDER/clips.npz, with more options of its command."""
    command = [sys.executable, "-m", "omni_jax", "serve", "--model", folder / "model", "--index", folder / "clips.npz", "--port", "0"]
    command += ["--workers", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}) as process:
        try:
            assert process.stdout is not None
            address = re.search(r":(\d+)/", process.stdout.readline())
            assert address, "the server did not start"
            yield int(address[1]), process.pid
        finally:
            process.kill()


async def load(port: int, process: int, clients: int, seconds: float, clip: bytes | None) -> dict[str, Any]:
    """Returns requests answered and failed, medians and 99th percentiles in seconds, memory after each quarter."""
    times: dict[str, list[float]] = {"caption": [], "clip": []}
    failed = 0
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for turn in range(number, 1_000_000):
                if time.monotonic() > end:
                    return
                kind = "clip" if clip is not None and turn % MEDIA_EVERY == 0 else "caption"
                given = {"video": base64.b64encode(clip).decode()} if kind == "clip" and clip is not None else f"a sound of client {turn}"
                body = json.dumps({"input": given, "encoding_format": "base64"}).encode()
                begun = time.perf_counter()
                path = "/v1/search" if turn % 2 and clip is not None else "/v1/embeddings"
                status, _ = await ask(reader, writer, port, path, body, "application/json")
                times[kind].append(time.perf_counter() - begun)
                failed += status != 200
        finally:
            writer.close()

    async def memory() -> list[int]:
        found = []
        for _ in range(4):
            await asyncio.sleep(seconds / 4)
            found.append(resident(process))
        return found

    measured = asyncio.create_task(memory())
    await asyncio.gather(*(client(number) for number in range(clients)))
    taken = {kind: np.percentile(row, [50, 99]).round(3).tolist() for kind, row in times.items() if row}
    return {
        "answered": sum(map(len, times.values())),
        "failed": failed,
        **{f"{kind}_p50_p99": row for kind, row in taken.items()},
        "memory_mib": [size >> 20 for size in await measured],
    }


async def hostile(port: int, whole: bytes) -> int:
    """Returns how many of the uploads that are no media were refused; the server must answer after them."""
    seed, refused = random.Random(0), 0
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
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, path: str, body: bytes = b"", kind: str = ""
) -> tuple[int, bytes]:
    """Returns status and body of one request of a connection, a POST where it has a body."""
    first = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
    head = f"{first}content-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
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
    parser.add_argument("--models", nargs="+", choices=("tiny", "wide"), default=("tiny", "wide"))
    run(**vars(parser.parse_args()))
