import json
import struct

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors import numpy as reference

from omni_jax.io.safetensors_io import Writer, read_header
from omni_jax.types import InputError
from tests.tolerances import assert_close

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1.5, np.nan], np.float64),
    "half": np.array([[0.1]], np.float16),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3, np.int64),
    "none": np.zeros((0, 4), np.float32),
}


def test_reads_what_the_package_writes(tmp_path):
    reference.save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    infos, metadata = read_header(epath.Path(tmp_path / "x.safetensors"))
    assert metadata == {"format": "pt"}
    assert infos.keys() == TENSORS.keys()
    for name, info in infos.items():
        assert_close(info.read(), TENSORS[name], "round_trip")
    assert_close(infos["b"].rows(1, 2), TENSORS["b"][1:2], "round_trip")


def test_the_package_reads_what_is_written_in_any_order(tmp_path):
    path = epath.Path(tmp_path / "x.safetensors")
    tensors = {name: value for name, value in TENSORS.items() if name != "brain"}
    names = {"f4": "F32", "f8": "F64", "f2": "F16", "i8": "I64"}
    with Writer(path, [(name, names[value.dtype.str[1:]], value.shape) for name, value in tensors.items()], {"format": "pt"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    found = reference.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert_close(found[name], value, "round_trip")


def test_writer_refuses_what_was_not_announced(tmp_path):
    path = epath.Path(tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="never written"), Writer(path, [("a", "F32", (2,))]):
        pass
    with pytest.raises(ValueError, match="announced"), Writer(path, [("a", "F32", (2,))]) as writer:
        writer.write("a", np.zeros(3, np.float32))


def _file(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD = {
    "empty": (b"", "is empty"),
    "other file": (b"\x89PNG\r\n\x1a\n" + b"\xff" * 64, "not a safetensors file"),
    "header cut": (struct.pack("<Q", 500) + b"{}", "truncated"),
    "not JSON": (struct.pack("<Q", 8) + b"nonsense", "header cannot be read"),
    "data cut": (_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 9), "truncated"),
    "data too long": (_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 9), "damaged"),
    "overlap": (
        _file({n: {"dtype": "F32", "shape": [2], "data_offsets": [s, s + 8]} for n, s in (("a", 0), ("b", 4))}, b"\0" * 12),
        "tensor b starts",
    ),
    "shape and bytes": (_file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 8), "cannot have 8 bytes"),
    "negative shape": (_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4), "has shape"),
    "unknown type": (_file({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4), "F8_E4M3"),
    "deep": (struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995, "header cannot be read"),
    "overflowing shape": (_file({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, b"\0" * 4), "cannot have 4"),
    "a list": (struct.pack("<Q", 2) + b"[]", "header cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_line(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        read_header(epath.Path(tmp_path / "x.safetensors"))
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
