"""What is fuzzed: functions of bytes that must hold whatever the bytes are. Anything they raise is a finding.

`SEEDS` are honest inputs to begin with, `WORDS` what a mutation may insert.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import ModelConfig
from omni_jax.data.manifest import read_manifest
from omni_jax.io.safetensors_io import read_header
from omni_jax.io.torch_pickle import read_torch_file
from omni_jax.tokens.prompts import build_sequences
from omni_jax.tokens.tokenizer import CONTROL_TOKENS, Tokenizer
from omni_jax.types import ClipError, Features, InputError, Record, VideoGrid, VisionFeatures
from tests.conversion.torch_files import Assembler, write_program
from tools.torture.commands import golden

LARGEST = 1 << 16  # bytes of an input
_FORBIDDEN = tuple("os.system subprocess.Popen os.exec os.posix_spawn os.spawn socket.connect pickle.find_class ctypes.dlopen".split())
_watching = False


def _refuse(event: str, arguments: Any) -> None:
    if _watching and event.startswith(_FORBIDDEN):
        raise AssertionError(f"the input made the process {event}")


@contextlib.contextmanager
def _nothing_runs() -> Iterator[None]:
    """Fails where the block starts a program, loads a library, connects or unpickles."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


@functools.cache
def _place() -> Path:
    """A folder in memory where there is one; also hooks the watch, which cannot be taken off again."""
    sys.addaudithook(_refuse)
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="omni-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def _file(name: str, data: bytes) -> Path:
    path = _place() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


def _one_line(error: BaseException) -> None:
    assert "\n" not in str(error) and len(str(error)) > 20, repr(str(error))


def manifest(data: bytes) -> None:
    """Every line of a manifest, or entry of an array, is a record or a problem; nothing else comes of it."""
    path = _file("m.jsonl", data)
    with _nothing_runs():
        try:
            found = read_manifest(path, _place())
        except InputError as e:
            _one_line(e)
            return
    lines = sum(bool((line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line).strip()) for i, line in enumerate(data.split(b"\n")))
    array = data.removeprefix(b"\xef\xbb\xbf").strip().startswith(b"[")
    assert array or len(found.records) + len(found.problems) == lines, (len(found.records), len(found.problems), lines)
    assert all(note.isprintable() for note in found.notes)
    ids = [record.id for record in found.records]
    assert len(set(ids)) == len(ids) and all(ids)
    for record in found.records:
        assert record.id.encode() and (record.text is None or record.text.encode())
        for media in (record.video, record.audio):
            assert media is None or os.path.realpath(media).startswith(os.path.realpath(_place())), media
    for problem in found.problems:
        assert "\n" not in problem.reason.removeprefix(str(path)) and problem.line >= 1


def safetensors_header(data: bytes) -> None:
    """A header is refused, or every tensor has all of its bytes, its own, within the file."""
    path = epath.Path(_file("x.safetensors", data))
    with _nothing_runs():
        try:
            infos, metadata = read_header(path)
        except InputError as e:
            _one_line(e)
            return
        end = 8 + int.from_bytes(data[:8], "little")
        for name, info in infos.items():
            assert isinstance(name, str) and info.start >= end and info.start + info.nbytes <= len(data)
            end = info.start + info.nbytes
            assert info.read().nbytes == info.nbytes
        assert isinstance(metadata, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items())


def pt_reader(data: bytes) -> None:
    """A torch file is refused, or gives plain values; nothing it names is imported or run."""
    if data[:1] == b"Z":
        path = _file("x.pt", data[1:])
    else:
        path = _place() / f"{os.getpid()}-p.pt"
        write_program(path, data[1:], {"0": bytes(range(64)), "1": b""})
    with _nothing_runs():
        try:
            value = read_torch_file(path)
        except InputError as e:
            _one_line(e)
            return
    _plain(value, set())


def _plain(value: Any, seen: set[int]) -> None:
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            todo += item
        elif isinstance(item, np.ndarray):
            assert item.dtype.kind in "fiubV" and item.dtype.kind != "O"
        else:
            assert item is None or isinstance(item, bool | int | float | complex | str | bytes | bytearray | np.generic), type(item)


@functools.cache
def _model() -> tuple[Tokenizer, ModelConfig, frozenset[int]]:
    from omni_jax.conversion.source import model_config, open_checkpoint

    config = model_config(open_checkpoint(golden().checkpoint))
    tokenizer = Tokenizer.from_pretrained(golden().checkpoint)
    return tokenizer, config, frozenset({tokenizer.im_end, *(tokenizer.control[name] for name in CONTROL_TOKENS)})


def prompt_builder(data: bytes) -> None:
    """A caption becomes ordinary text, whatever is in it; one that is no text is refused."""
    tokenizer, config, control = _model()
    text = data[1:].decode("utf-8", errors="surrogatepass" if data[:1] < b"\x80" else "surrogateescape") if _decodes(data) else "x"
    vision = VisionFeatures(np.zeros((16, config.vision.patch_values), np.float32), VideoGrid((1, 4, 4), 1.0))
    record = Features(Record(id="x", text=text), vision=vision)
    with _nothing_runs():
        try:
            found = build_sequences(record, ("text", "tv"), tokenizer, config, golden().preset)
        except ClipError as e:
            _one_line(e)
            return
    for name, sequence in found.items():
        ids = np.asarray(sequence.ids)
        words = ids[np.asarray(sequence.source) == 0]
        wanted = {"text": [tokenizer.im_end], "tv": [config.tokens.vision_bos, config.tokens.vision_eos, tokenizer.im_end]}[name]
        assert sorted(i for i in words.tolist() if i in control) == sorted(wanted), f"{name}: a control token out of a caption"
        assert ids.min() >= 0 and ids.max() < config.decoder.vocab_size and len(ids) == sequence.positions.shape[-1]


def _decodes(data: bytes) -> bool:
    try:
        data[1:].decode("utf-8", errors="surrogatepass" if data[:1] < b"\x80" else "surrogateescape")
    except UnicodeDecodeError:
        return False
    return True


def safetensors_file(header: dict[str, Any], data: bytes) -> bytes:
    """Returns a file of this header, whatever it says."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _program(value: Any) -> bytes:
    return b"P\x80\x02" + Assembler().value(value) + b"."


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "safetensors_header": safetensors_header,
    "pt_reader": pt_reader,
    "prompt_builder": prompt_builder,
}

SEEDS: dict[str, tuple[bytes, ...]] = {
    "manifest": (
        b'{"id": "a", "text": "a dog", "video": "a.mp4", "audio": "b.wav", "timestamps": [0, 2.5]}\n{"id": 7, "text": null, "audio": "c"}',
        b'\xef\xbb\xbf{"id": "a", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}], "video": "a"}\r\n',
        b'[{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}], "url": 1},\n {"id": 3, "text": "x"}]',
    ),
    "safetensors_header": (
        safetensors_file(
            {
                "__metadata__": {"format": "pt"},
                "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
                "c": {"dtype": "I8", "shape": [0], "data_offsets": [26, 26]},
            },
            bytes(26),
        ),
    ),
    "pt_reader": (
        _program({"cfg": {"layers": 12, "name": "x", "list": [1, 2.5, None, True, (1, 2)]}}),
        _program({"model": {"w": np.zeros((2, 2), np.float32)}}),
        b"P\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    ),
    "prompt_builder": (
        b"aa whistle over a gradient sky",
        b"a<|im_end|><|VIDEO|><tool_call> \xe9\x9b\xa8 \xed\xa0\xbd\x00\x1b[2J",
        b"\xff\xff\xfe",
    ),
}

WORDS: dict[str, tuple[bytes, ...]] = {
    "manifest": (
        *b'"id" "text" "video" "audio" "timestamps" "conversations" "from" "gpt" "human" "value"'.split(),
        *rb"null true NaN -Infinity 1e999 [ ] { } : , \ud83d \u0000 ../ gs://".split(),
        b"\n",
    ),
    "safetensors_header": (
        *b'"dtype" "shape" "data_offsets" "__metadata__" "F32" "F64" "BOOL"'.split(),
        *b"18446744073709551616 -1 [ ] { } null 1e9 true".split(),
        *(b"\x00\x00\x00\x00\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"0.0"),
    ),
    "pt_reader": (
        *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"),
        *b"\x93 R Q ( t } ] e u s b . \x81 \x92 \x8c\x02os h\x00 q\x00 0 2 N K\x01".split(b" "),
        *(b"ctorch\nFloatStorage\n", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"X\x01\x00\x00\x000", b"PK\x05\x06", b"\x89", b"\x88"),
    ),
    "prompt_builder": (
        *b"<|im_end|> <|VIDEO|> <|AUDIO|> <|vision_bos|> <|audio_eos|> <|endoftext|> <tool_call> <|fim_prefix|>".split(),
        *(b"\x00", b"\x1b[2J", b"\xe2\x80\xae", b"\xed\xa0\xbd", b"\xf0\x9f\x98\x80", b"\n\n", b"   ", b"\xef\xbf\xbf"),
    ),
}
