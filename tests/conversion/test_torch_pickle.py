"""The reader of `.pt` files: values and tensors come out, nothing is ever run."""

import gc
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from omni_jax.conversion.torch_writer import TorchWriter
from omni_jax.io.torch_pickle import open_torch_weights, read_torch_file
from omni_jax.types import InputError
from tests.conversion.torch_files import Assembler, write_legacy_file, write_program, write_torch_file
from tests.tolerances import assert_close


def read_program(tmp_path, program, storages=None, **more):
    write_program(tmp_path / "file.pt", program, storages, **more)
    return read_torch_file(tmp_path / "file.pt")


def test_plain_values_and_tensors_come_back(tmp_path):
    value = {
        "cfg": {"layers": 12, "rate": 0.5, "name": "é", "on": True, "off": False, "none": None, "list": [1, -2, [3]], "big": 2**70},
        "model": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([[1.5]], np.float16), "scalar": np.array(7, np.int64)},
    }
    write_torch_file(tmp_path / "file.pt", value)
    found = read_torch_file(tmp_path / "file.pt")
    assert found["cfg"] == value["cfg"]
    assert found["model"].keys() == value["model"].keys()
    for name, array in value["model"].items():
        assert_close(found["model"][name], array, "round_trip")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_plain_values(tmp_path, protocol):
    value = {"a": [1, 2.5, "text", b"bytes", (1, 2, 3, 4), {"x"}, frozenset([3])], "b": list(range(300))}
    assert read_program(tmp_path, pickle.dumps(value, protocol=protocol)) == value if protocol > 3 else True
    value["a"] = value["a"][:3]  # protocols 2 and 3 write bytes and sets as calls, which are refused below
    assert read_program(tmp_path, pickle.dumps(value, protocol=protocol)) == value


def test_golden_beats_file_holds_its_settings_and_weights(golden, tmp_path):
    from tests.conversion.checkpoints import read_folder

    weights = read_folder(golden.checkpoint)
    name = golden.config["audio_config"].get("beats_path") or "BEATs.pt"
    path = golden.checkpoint / name.replace("\\", "/").rsplit("/", 1)[-1]  # as published it is a path of the training machine
    if not path.exists():  # a set without the file: one made of its weights
        path = tmp_path / "BEATs.pt"
        ours = {name.removeprefix("beats."): value.astype(np.float32) for name, value in weights.items() if name.startswith("beats.")}
        write_torch_file(path, {"cfg": {}, "model": ours})
    content = read_torch_file(path)
    assert {"cfg", "model"} <= content.keys()
    shared = [name for name in content["model"] if f"beats.{name}" in weights]
    assert len(shared) > 10
    for name in shared:
        assert content["model"][name].shape == weights[f"beats.{name}"].shape, name
        assert np.isfinite(content["model"][name]).all(), name


def test_strides_offsets_and_shared_storages(tmp_path):
    flat = np.arange(12, dtype=np.float32)
    made = Assembler()
    views = [
        made.tensor("0", "FloatStorage", 12, 0, (3, 4), (4, 1)),
        made.tensor("0", "FloatStorage", 12, 0, (4, 3), (1, 4)),  # the transpose, same storage
        made.tensor("0", "FloatStorage", 12, 5, (2, 2), (3, 1)),
        made.tensor("0", "FloatStorage", 12, 11, (), ()),
        made.tensor("0", "FloatStorage", 12, 0, (0, 3), (3, 1)),
    ]
    whole, turned, inner, scalar, empty = read_program(tmp_path, b"\x80\x02(" + b"".join(views) + b"t.", {"0": flat.tobytes()})
    assert_close(whole, flat.reshape(3, 4), "round_trip")
    assert_close(turned, flat.reshape(3, 4).T, "round_trip")
    assert_close(inner, np.array([[5, 6], [8, 9]], np.float32), "round_trip")
    assert (scalar.shape, float(scalar), empty.shape) == ((), 11.0, (0, 3))
    assert np.shares_memory(whole, turned)
    with pytest.raises(ValueError, match="read-only"):
        whole[0, 0] = 1


def views():
    """Tensors of one storage beside one of their own: a whole, its transpose, an inner part, and other types."""
    flat = np.arange(12, dtype=np.float32)
    whole = flat.reshape(3, 4)
    own = {"half": np.array([[1.5, -2]], np.float16), "long": np.array(7, np.int64), "brain": np.ones((2, 3), ml_dtypes.bfloat16)}
    return {"whole": whole, "turned": whole.T, "inner": whole[1:, 1:3], "flat": flat[5:], **own}


@pytest.mark.parametrize("write", [write_torch_file, write_legacy_file])
def test_both_formats_are_read_whole_and_placed(tmp_path, write):
    write(tmp_path / "file.bin", views())
    found, placed = read_torch_file(tmp_path / "file.bin"), open_torch_weights(epath.Path(tmp_path / "file.bin"))
    assert list(found) == list(placed) == list(views())
    for name, expected in views().items():
        np.testing.assert_array_equal(found[name], expected, strict=True)
        np.testing.assert_array_equal(placed[name].read(), expected, strict=True)
        assert (placed[name].stride is None) == expected.flags.c_contiguous
    assert np.shares_memory(found["whole"], found["inner"])
    np.testing.assert_array_equal(placed["whole"].rows(1, 3), views()["whole"][1:])


def test_a_part_of_a_storage_that_begins_where_the_whole_does(tmp_path):
    flat = np.arange(1, 13, dtype=np.float32)
    write_legacy_file(tmp_path / "file.bin", {"part": flat[:2], "whole": flat})
    view = Assembler().value(("0", 0, 2))  # key, first value, number of values: the sixth part of a storage's id
    data = (tmp_path / "file.bin").read_bytes()
    (tmp_path / "file.bin").write_bytes(data.replace(b"NtQ", view + b"tQ", 1))
    for found in (
        read_torch_file(tmp_path / "file.bin"),
        {name: info.read() for name, info in open_torch_weights(epath.Path(tmp_path / "file.bin")).items()},
    ):
        np.testing.assert_array_equal(found["part"], flat[:2], strict=True)
        np.testing.assert_array_equal(found["whole"], flat, strict=True)


@pytest.mark.parametrize("write", [write_torch_file, write_legacy_file])
def test_a_storage_that_is_cut_is_refused(tmp_path, write):
    write(tmp_path / "file.bin", views())
    data = (tmp_path / "file.bin").read_bytes()
    (tmp_path / "file.bin").write_bytes(data[:-3])
    for read in (read_torch_file, open_torch_weights):
        with pytest.raises(InputError, match=r"truncated|damaged"):
            read(tmp_path / "file.bin")


def test_a_changed_bit_is_found_by_the_sum_in_the_archive(tmp_path):
    write_torch_file(tmp_path / "file.bin", {"a": np.arange(100, dtype=np.float32)})
    data = bytearray((tmp_path / "file.bin").read_bytes())
    data[data.index(np.float32(50).tobytes()) + 1] ^= 4
    (tmp_path / "file.bin").write_bytes(bytes(data))
    info = open_torch_weights(tmp_path / "file.bin")["a"]
    for read in (info.read, lambda: info.rows(0, 3), lambda: read_torch_file(tmp_path / "file.bin")):
        with pytest.raises(InputError, match="Bad CRC-32 of storage 0"):
            read()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"weights": {"a": np.ones(2, np.float32)}, "epoch": 3}, "does not hold a dict of tensors"),
        ([np.ones(2, np.float32)], "does not hold a dict of tensors"),
        ({"a": np.ones(2, np.float32), "step": 4}, "does not hold a dict of tensors"),
        ({}, "does not hold a dict of tensors"),
    ],
)
def test_a_file_of_other_things_than_weights_is_refused(tmp_path, content, expected):
    write_torch_file(tmp_path / "file.bin", content)
    with pytest.raises(InputError, match=expected):
        open_torch_weights(tmp_path / "file.bin")


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, -1, (2,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (10**12,), (0,)),  # a small file must not become a large array
        (4, 0, (2, 2), (1,)),
        (4, 2**62, (1,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, numel, offset, size, stride):
    program = b"\x80\x02" + Assembler().tensor("0", "FloatStorage", numel, offset, size, stride) + b"."
    with pytest.raises(InputError, match="a tensor of size"):
        read_program(tmp_path, program, {"0": b"\0" * 16})


def test_a_view_that_negates_what_is_stored_is_refused(tmp_path):
    """The imaginary part of a conjugate, which torch saves with a mark beside the values of the other sign."""
    made = Assembler()
    whole = made.tensor("0", "FloatStorage", 4, 0, (4,), (1,))
    assert whole.endswith(b")RtR")
    for mark, read in (({"neg": True}, False), ({}, True)):
        write_program(
            tmp_path / "x.bin", b"\x80\x02}" + made.value("w") + whole[:-2] + made.value(mark) + b"tRs.", {"0": np.ones(4, "f4").tobytes()}
        )
        if read:
            assert open_torch_weights(tmp_path / "x.bin")["w"].shape == (4,)
            continue
        with pytest.raises(InputError, match=r"a tensor that is not as stored \(\{'neg': True\}\); write it with .resolve_neg"):
            open_torch_weights(tmp_path / "x.bin")


def test_a_storage_that_claims_another_length_is_refused(tmp_path):
    made = Assembler()
    honest, lying = made.tensor("0", "FloatStorage", 4, 0, (4,), (1,)), made.tensor("0", "FloatStorage", 400, 0, (400,), (1,))
    for tensors in (lying, honest + lying):  # alone, and once the storage has been read with its true length
        with pytest.raises(InputError, match="storage 0 has 16 bytes, 1600 expected"):
            read_program(tmp_path, b"\x80\x02(" + tensors + b"t.", {"0": b"\0" * 16})


# ---------------------------------------------------------------------------------------------------------------- attacks


class _Evil:
    """Pickles as a call of os.mkdir(path): a harmless stand-in for os.system whose effect can be seen."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"cfg": {}, "model": {"w": e}}, lambda e: [1, [2, (e,)]]])
def test_a_pickled_call_is_refused_by_name_and_not_run(tmp_path, protocol, wrap):
    mark = tmp_path / "was-run"
    with pytest.raises(InputError, match=r"(posix|nt|os)\.mkdir"):
        read_program(tmp_path, pickle.dumps(wrap(_Evil(mark)), protocol=protocol))
    assert not mark.exists()


ATTACKS = {
    "GLOBAL os.system": (b"cos\nsystem\n(Vecho\ntR.", r"os\.system"),
    "GLOBAL eval": (b"cbuiltins\neval\n(V1\ntR.", r"builtins\.eval"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x04echot\x85R.", r"os\.system"),
    "STACK_GLOBAL of parts": (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", r"builtins\.getattr"),
    "INST": (b"(Vecho\nios\nsystem\n.", "INST"),
    "OBJ": (b"(ccollections\nOrderedDict\nVx\no.", "OBJ"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "PERSID": (b"Pstorage\n.", "PERSID"),
    "BUILD on a list": (b"\x80\x02]}b.", "state of a list"),
    "BUILD of a tuple state": (b"\x80\x02}(}}tb.", "state of a dict"),
    "call of a string": (b"\x80\x02" + _text("os.system") + b"(tR.", "its pickle calls"),
    "call of a storage type": (b"\x80\x02ctorch\nFloatStorage\n(tR.", "torch.FloatStorage"),
    "torch.load inside": (b"\x80\x02ctorch\nload\n(tR.", r"torch\.load"),
    "dotted name": (b"\x80\x04\x8c\x05torch\x8c\x11FloatStorage.load\x93.", "FloatStorage.load"),
    "numpy object arrays": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.", "_reconstruct"),
    "persistent id of a list": (b"\x80\x02]Q.", "not a storage"),
    "storage of a call": (
        b"\x80\x02(" + _text("storage") + b"ccollections\nOrderedDict\n" + _text("0") + _text("cpu") + b"K\x01tQ.",
        "OrderedDict",
    ),
    "stack underflow": (b"\x80\x02R.", "malformed"),
    "no mark": (b"\x80\x02t.", "malformed"),
    "unhashable key": (b"\x80\x02}]K\x01s.", "malformed"),
    "memo that was never set": (b"\x80\x02h\x05.", "malformed"),
    "no STOP": (b"\x80\x02}", "malformed"),
    "garbage": (b"\xff\xfe\xfd", "malformed"),
    "two values": (b"\x80\x02}}.", "malformed"),
    "empty": (b"", "malformed"),
    "mark as a value": (b"\x80\x02}(X\x05\x00\x00\x00m/de\x01s.", "a part of one"),
    "mark in a tuple": (b"\x80\x02N(\x86.", "a part of one"),
    "name as a value": (b"\x80\x02](ctorch\nFloatStorage\ne.", "a part of one"),
    "storage as a value": (b"\x80\x02" + Assembler().storage("0", "FloatStorage", 4) + b".", "a part of one|storage 0|no such"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_one_line_that_names_it(tmp_path, name):
    program, expected = ATTACKS[name]
    with pytest.raises(InputError, match=expected) as caught:
        read_program(tmp_path, program)
    assert "\n" not in str(caught.value)
    assert "file.pt" in str(caught.value)


def test_a_value_that_repeats_itself_does_not_expand(tmp_path):
    # Each level holds the one below twice: 2**64 leaves when written out, 64 lists in memory.
    levels = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) + b"0" for i in range(64))
    program = b"\x80\x02]q\x000" + levels + b"h\x40"
    found = read_program(tmp_path, program + b".")
    assert found[0] is found[1]
    with pytest.raises(InputError, match="not a storage"):  # nor in an error message
        read_program(tmp_path, program + b"Q.")


# -------------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "malformed"),  # the first pickle of the format before torch 1.6, alone
        (b"\x80\x02K\x01." * 4, "not a torch file"),
        (b"hello", "not a torch file"),
        (b"PK\x03\x04" + b"\0" * 50, "damaged or truncated"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path, content, expected):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_torch_file(tmp_path / "file.pt")


def test_missing_file_folder_and_truncated_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_torch_file(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is a folder"):
        read_torch_file(tmp_path)
    write_torch_file(tmp_path / "file.pt", {"a": np.zeros(1000, np.float32)})
    whole = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged or truncated"):
        read_torch_file(tmp_path / "file.pt")


def test_odd_archives(tmp_path):
    program = b"\x80\x02" + Assembler().tensor("0", "FloatStorage", 4, 0, (4,), (1,)) + b"."
    with pytest.raises(InputError, match="data/0 is missing"):
        read_program(tmp_path, program)
    with pytest.raises(InputError, match="TorchScript"):
        read_program(tmp_path, program, {"0": b"\0" * 16}, extra={"constants.pkl": b""})
    unknown = program.replace(b"FloatStorage", b"QInt8Storage")
    with pytest.raises(InputError, match=r"torch\.QInt8Storage"):
        read_program(tmp_path, unknown, {"0": b"\0" * 16})
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "nothing here")
    with pytest.raises(InputError, match=r"0 data\.pkl"):
        read_torch_file(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", program)
    with pytest.raises(InputError, match="compressed"):
        read_torch_file(tmp_path / "small.pt")
    write_program(tmp_path / "locked.pt", program, {"0": b"\0" * 16})
    data = (tmp_path / "locked.pt").read_bytes()
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of the first member, in its header and in the directory
        at = data.index(mark) + flags
        data = data[:at] + b"\x01" + data[at + 1 :]
    (tmp_path / "locked.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"data\.pkl is encrypted"):
        read_torch_file(tmp_path / "locked.pt")


def test_a_file_that_cannot_be_written_whole_ends_with_its_own_error_alone(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr("sys.unraisablehook", heard.append)
    with pytest.raises(OSError, match="disk full"), TorchWriter(epath.Path(tmp_path / "file.bin"), [("a", "F32", (2,))]):
        raise OSError("disk full")
    gc.collect()
    assert not heard
