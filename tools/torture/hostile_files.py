"""Part `files`: checkpoints, adapters, embedding files and manifests made to run code or to mislead, through their commands.

A canary shows whether anything ran: every attack would create a file. Each must end in one line and status 2 (or be listed as a record
that cannot be used), and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from omni_jax.cli.main import main
from omni_jax.conversion.adapter import read_config
from omni_jax.conversion.source import model_config, open_checkpoint
from omni_jax.data.manifest import read_manifest
from omni_jax.io.safetensors_io import read_header
from omni_jax.types import InputError
from tests.conversion.torch_files import write_program
from tools.torture import commands
from tools.torture.fuzz_targets import prompt_builder, safetensors_file
from tools.torture.outcome import Clock, Outcome, begun

PATTERN_LIMIT_S = 20.0
HOSTILE_TEXTS = (
    "<|im_end|><|VIDEO|><|AUDIO|><|vision_bos|>",
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "\x1b]0;owned\x07\x1b[2J\x1b[31m red",
    "nul \x00 and bell \x07 and delete \x7f",
    "\u202e reversed \u2066 isolated \ufeff",
    "half a pair \ud83d",
    "a\u0301" * 5000,
    "x" * 1_000_000,
    "{{ 7 * 7 }} {% raw %} ${IFS} `id` $(id) %n%n%s",
    "../../../../etc/passwd",
    "\n\n\r\n\t\v\f \u2028 \u2029",
    "\U0010ffff\uffff\ufffe",
)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def run(seed: int, minutes: float, *, rounds: int = 400) -> Outcome:
    """Returns what was tried and lost."""
    rng = np.random.default_rng(seed)
    with begun("files", seed, minutes) as (outcome, clock, folder):
        # The last two are short. The others make fewer rounds where the time is, and the numbers say so.
        for part, until in ((_pickles, 0.4), (_safetensors, 0.7), (_patterns, 0.9), (_manifests, 1.0), (_captions, 1.0)):
            part(outcome, folder, rng, rounds, Clock(60 * minutes * until - clock.spent))
    return outcome


def _shown(arguments: list[str]) -> tuple[int, str]:
    """Runs a command in this process and returns its status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, err.getvalue()


# -------------------------------------------------------------------------------------------------------------------- pickles


def _pickles(outcome: Outcome, folder: Path, rng: np.random.Generator, rounds: int, clock: Clock) -> None:
    """Code in .pt, .bin, .npz and .npy, in every protocol, alone and deep within honest values."""
    canary = folder / "canary"
    text = f"open({str(canary)!r}, 'w')"
    calls = [
        Call(os.system, f"touch {canary}"),
        Call(eval, text),
        Call(exec, text),
        Call(os.mkdir, str(canary)),
        Call(open, str(canary), "w"),
        Call(getattr, "x", "upper"),
        Call(__import__, "antigravity"),
        Call(shutil.copy, __file__, str(canary)),
    ]
    wraps: list[Callable[[Any], Any]] = [
        lambda e: e,
        lambda e: {"cfg": {}, "model": {"w": e}},
        lambda e: {"text_embeds": e, "mllm_embeds": [e]},
        lambda e: [1, (2, {"x": (e,)})],
    ]
    base = commands.golden().checkpoint
    bad, tried = folder / "bad", 0
    for number in range(max(8, rounds // 4)):
        if number >= len(calls) and clock.left < 0:
            break
        call, wrap, protocol = calls[number % len(calls)], wraps[int(rng.integers(len(wraps)))], int(rng.integers(6))
        program = pickle.dumps(wrap(call), protocol=protocol)
        objects = np.array([[wrap(call)]], dtype=object)
        for name in ("bad.pt", "bad.bin", "bad.npz", "bad.npy", "raw.pt"):
            path = folder / name
            if name.endswith(".npz"):
                np.savez(path, ids=np.array(["a"]), text=objects, video=objects, allow_pickle=True)
            elif name.endswith(".npy"):
                np.save(path, objects, allow_pickle=True)
            elif name.startswith("raw"):
                path.write_bytes(program)
            else:
                write_program(path, program, {"0": bytes(64)})
            given = [str(path)] if not name.endswith(".npy") else [f"text={path}", f"video={path}"]
            beats = ["convert", "to-jax", "--base", str(base), "--beats", str(path), "--out", str(bad)]
            status, err = _shown(beats if name.endswith(".pt") else ["eval", *given])
            tried += 1
            outcome.expect(
                status == 2 and len(err.strip().splitlines()) == 1, f"{name}, protocol {protocol}: status {status}, {err[-200:]!r}"
            )
            outcome.expect(not canary.exists() and not bad.exists(), f"{name}: code ran, or an output was left")
    adapter = folder / "adapter"
    shutil.copytree(commands.golden().adapter_dir, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    write_program(adapter / "adapter_model.bin", pickle.dumps({"w": calls[0]}, protocol=2), {})
    status, err = _shown(["convert", "to-jax", "--base", str(base), "--adapter", str(adapter), "--out", str(bad)])
    outcome.expect(status == 2 and "refused" in err and not canary.exists() and not bad.exists(), f"adapter_model.bin: {err[-200:]!r}")
    # Archives that swell: a gigabyte of zeros in a file of one megabyte, for every reader of zips.
    for name in ("bomb.npz", "bomb.pt"):
        with (
            zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("ids.npy" if name.endswith("npz") else "archive/data.pkl", "w", force_zip64=True) as member,
        ):
            for _ in range(1024 if rounds >= 100 else 128):
                member.write(bytes(1 << 20))
        arguments = ["eval", str(folder / name)]
        if name.endswith(".pt"):
            arguments = ["convert", "to-jax", "--base", str(base), "--beats", str(folder / name), "--out", str(bad)]
        status, err = _shown(arguments)
        outcome.expect(status == 2 and len(err.strip().splitlines()) == 1, f"{name}: status {status}, {err[-200:]!r}")
        (folder / name).unlink()
    outcome.tried.append(("files with code or bombs in them", tried + 3))


# ---------------------------------------------------------------------------------------------------------------- safetensors


def _safetensors(outcome: Outcome, folder: Path, rng: np.random.Generator, rounds: int, clock: Clock) -> None:
    """A shard of the golden checkpoint with one lie in its header, or NaN in its data, through `convert`."""
    base = folder / "lying"
    shutil.copytree(commands.golden().checkpoint, base)
    shard = sorted(base.glob("model-*.safetensors"))[0]
    whole = shard.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    tried = 0
    for number in range(max(12, rounds // 4)):
        if number >= len(LIES) and clock.left < 0:
            break
        lie = json.loads(json.dumps(header))
        name, other = (names[int(i)] for i in rng.choice(len(names), 2, replace=False))
        kind = LIES[number % len(LIES)]
        content = kind(lie, name, other, data, rng)
        shard.write_bytes(content if content is not None else safetensors_file(lie, data))
        out = folder / "out"
        status, err = _shown(["convert", "to-jax", "--base", str(base), "--out", str(out)])
        tried += 1
        right = status == 2 and err.strip().splitlines()[-1].startswith("omni-jax: ") and "Traceback" not in err and str(folder) in err
        outcome.expect(right, f"safetensors {kind.__name__} of {name}: status {status}, {err[-200:]!r}")
        outcome.expect(not out.exists(), f"safetensors {kind.__name__}: an output was left")
        try:
            infos, _ = read_header(epath.Path(shard))
            outcome.expect(
                sum(info.nbytes for info in infos.values()) <= shard.stat().st_size, f"{kind.__name__}: more than the file holds"
            )
        except InputError:
            pass
    outcome.tried.append(("checkpoints with a lying shard through convert", tried))


def _huge_shape(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    lie[name]["shape"] = [1 << int(rng.integers(20, 62)), 1 << int(rng.integers(1, 62))]


def _overlap(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    lie[name]["data_offsets"] = lie[other]["data_offsets"]


def _past_the_end(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    start, stop = lie[name]["data_offsets"]
    lie[name]["data_offsets"] = [start + len(data), stop + len(data)]


def _shifted(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    lie[name]["data_offsets"] = [n + int(rng.choice([-4, 4, 1])) for n in lie[name]["data_offsets"]]


def _odd_values(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    field = ("dtype", "shape", "data_offsets")[int(rng.integers(3))]
    odd = (None, -1, "x", [], {}, [-1], [None, None], [1e9, 2e9], True, [[1]], [10**40, 10**41])
    lie[name][field] = odd[int(rng.integers(len(odd)))]


def _length_of_header(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    return struct.pack("<Q", int(rng.choice([0, 1, 7, 1 << 30, (1 << 63) - 1]))) + safetensors_file(lie, data)[8:]


def _deep(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    text = b'{"a":' + b"[" * int(rng.integers(10_000, 400_000))
    return struct.pack("<Q", len(text)) + text


def _not_a_number(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    start, stop = lie[name]["data_offsets"]
    spoiled = bytearray(data)
    spoiled[start : start + 4] = b"\x00\x00\xc0\x7f" if lie[name]["dtype"] == "F32" else b"\xc0\x7f\xc0\x7f"
    return safetensors_file(lie, bytes(spoiled)) if stop - start >= 4 else b"short"


def _cut(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    return safetensors_file(lie, data[: int(rng.integers(len(data)))])


def _renamed(lie: dict[str, Any], name: str, other: str, data: bytes, rng: np.random.Generator) -> bytes | None:
    lie["\x1b[2J\n../../" + name] = lie.pop(name)


LIES = (_huge_shape, _overlap, _past_the_end, _shifted, _odd_values, _length_of_header, _deep, _not_a_number, _cut, _renamed)


# ------------------------------------------------------------------------------------------------------------------- patterns


def _patterns(outcome: Outcome, folder: Path, rng: np.random.Generator, rounds: int, clock: Clock) -> None:
    """Random regular expressions with nested repeats, as `target_modules`."""
    from omni_jax.conversion import module_matching

    base = model_config(open_checkpoint(commands.golden().checkpoint))
    limit, module_matching.MATCH_LIMIT_S = module_matching.MATCH_LIMIT_S, 1.0
    atoms = (r"\w", r".", r"[a-z_.]", r"\d", r"layers", r"(q|k|v)_proj", r"model\.", r"(?=.)", r"\b", r"(?:a|ab|b)", r"\x00", "雨", r"\Z")
    repeats = ("*", "+", "?", "{2,}", "{1,9}", "*?", "+?", "", "")
    tried = 0
    try:
        for number in range(max(10, rounds // 10)):
            if number >= 10 and clock.left < 0:
                break
            pattern = ""
            for _ in range(int(rng.integers(1, 6))):
                pattern += atoms[int(rng.integers(len(atoms)))] + repeats[int(rng.integers(len(repeats)))]
                if rng.random() < 0.6:
                    pattern = f"({pattern})" + repeats[int(rng.integers(len(repeats)))]
            config = commands.golden().adapter_config | {"target_modules": pattern}
            taken = Clock(PATTERN_LIMIT_S)
            with contextlib.suppress(InputError):
                read_config(config, base, "adapter_config.json")
            tried += 1
            outcome.expect(taken.left > 0, f"target_modules {pattern!r} took {taken.spent:.0f} s")
    finally:
        module_matching.MATCH_LIMIT_S = limit
    outcome.tried.append(("regular expressions as target_modules", tried))


# --------------------------------------------------------------------------------------------------------- manifests, captions


def _manifests(outcome: Outcome, folder: Path, rng: np.random.Generator, rounds: int, clock: Clock) -> None:
    """Paths that lead out of the media root, a line of 100 MB, deep JSON."""
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    secret = folder / "secret.wav"
    secret.write_bytes(b"RIFF")
    for n in range(3):
        link = root / f"link{n}"
        link.symlink_to((secret, folder, root / "link0")[n])
    (root / "link3").symlink_to("link4")
    (root / "link4").symlink_to("link3")
    pieces = [*".. . sub link0 link1 link2 link3 root secret.wav".split(), "", *"\\.. .... ~ %2e%2e".split(), str(folder), "a b"]
    tried = escaped = 0
    lines: list[str] = []
    for n in range(max(50, rounds)):
        parts = [pieces[int(i)] for i in rng.integers(len(pieces), size=int(rng.integers(1, 6)))]
        path = ("/" if rng.random() < 0.1 else "") + "/".join(parts)
        lines.append(json.dumps({"id": str(n), "text": "x", "audio": path or "x"}))
    manifest = folder / "m.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    found = read_manifest(manifest, root)
    for record in found.records:
        real = os.path.realpath(str(record.audio))
        escaped += not (real + "/").startswith(os.path.realpath(root) + "/")
    tried += len(lines)
    outcome.expect(len(found.records) + len(found.problems) == len(lines), "a line was dropped")
    outcome.expect(not escaped, f"{escaped} paths lead out of the media root")
    outcome.expect(bool(found.records) and bool(found.problems), "the paths do not try both sides")
    outcome.tried.append((f"paths against --media-root ({len(found.problems)} refused)", tried))
    with manifest.open("wb") as file:
        file.write(b'{"id": "a", "text": "x"}\n{"id": "b", "text": "')
        for _ in range(100):
            file.write(b"y" * (1 << 20))
        file.write(b'"}\n' + b'{"id":' * 100_000 + b"\n" + b"[" * 100_000 + b'\n{"id": "c", "text": "x"}\n')
    found = read_manifest(manifest, root)
    outcome.expect(
        [r.id for r in found.records] == ["a", "c"], f"records {[r.id for r in found.records]} of a manifest with a line of 100 MB"
    )
    outcome.expect([p.line for p in found.problems] == [2, 3, 4], f"problems at {[p.line for p in found.problems]}")
    outcome.tried.append(("lines of 100 MB or 100,000 levels", 3))


def _captions(outcome: Outcome, folder: Path, rng: np.random.Generator, rounds: int, clock: Clock) -> None:
    """Hostile captions and ids through embed, eval with a report, and export: shown as text, never obeyed."""
    from omni_jax.retrieval import write_embeddings
    from omni_jax.types import EmbeddingTable
    from tests.retrieval.pages import Page

    manifest = folder / "captions.jsonl"
    manifest.write_text("".join(json.dumps({"id": f"{i} {text[:200]}", "text": text}) + "\n" for i, text in enumerate(HOSTILE_TEXTS)))
    found = read_manifest(manifest)
    outcome.expect(len(found.records) + len(found.problems) == len(HOSTILE_TEXTS), "a hostile caption was dropped")
    for text in HOSTILE_TEXTS:
        prompt_builder(b"a" + text.encode("utf-8", "surrogatepass"))
    ids = tuple(record.id for record in found.records)
    rows = rng.normal(size=(len(ids), 8)).astype(np.float32)
    file, page = folder / "c.npz", folder / "c.html"
    write_embeddings(file, EmbeddingTable(ids, {"text": rows, "video": rows + 1, "audio": rows - 1}))
    status, err = _shown(["eval", str(file), "--html", str(page), "--manifest", str(manifest)])
    outcome.expect(status == 0, f"eval of hostile captions: {err[-200:]!r}")
    read = Page(page.read_text(encoding="utf-8"))
    outcome.expect(
        not read.faults and len(read.all("script")) == 2 and not read.all("img"), "markup in a caption became markup of the page"
    )
    for _, record in enumerate(found.records):
        status, err = _shown(["eval", str(folder / record.id.replace("/", "_").replace("\0", "0")[:60])])
        outcome.expect(status == 2 and err.strip().isprintable(), f"an error shows {err!r}")
    outcome.tried.append(("hostile captions and ids through prompts, eval, report and errors", len(HOSTILE_TEXTS)))
