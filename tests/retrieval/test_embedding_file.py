"""Embedding files: both forms there and back, parts read together, nothing half-written, and every bad file named in one line."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omni_jax.retrieval import embedding_file, read_embeddings, write_embeddings
from omni_jax.types import EmbeddingTable, InputError
from tests.tolerances import assert_close


def table(*ids: str, names: tuple[str, ...] = ("text", "video", "audio", "av"), width: int = 5) -> EmbeddingTable:
    rng = np.random.default_rng(len(ids))
    return EmbeddingTable(ids, {name: rng.normal(size=(len(ids), width)).astype(np.float32) for name in names})


def assert_same(got: EmbeddingTable, want: EmbeddingTable) -> None:
    assert got.ids == want.ids
    assert list(got.tables) == list(want.tables)
    for name, rows in want.tables.items():
        assert_close(got.tables[name], rows, "round_trip")


@pytest.mark.parametrize("official", [False, True])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, official: bool) -> None:
    want = table("clip 0", "a/b__c", "ids", "file", "日本語", "x__text", names=("text", "video", "audio", "av", "tv", "at", "tva"))
    write_embeddings(tmp_path / "e.npz", want, official_keys=official)
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
    assert_same(read_embeddings(tmp_path / "e.npz"), want)
    assert_same(read_embeddings(str(tmp_path / "e.npz")), want)


def test_numpy_reads_both_forms(tmp_path: Path) -> None:
    want = table("a", "b")
    write_embeddings(tmp_path / "ours.npz", want)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        assert set(ours.files) == {"ids", "text", "video", "audio", "av"}
        assert ours["ids"].tolist() == ["a", "b"] and ours["text"].dtype == np.float32
    write_embeddings(tmp_path / "official.npz", want, official_keys=True)
    with np.load(tmp_path / "official.npz", allow_pickle=False) as official:
        assert set(official.files) == {f"{i}__{name}" for i in "ab" for name in ("text", "video", "audio", "av")}
        np.testing.assert_array_equal(official["b__av"], want.tables["av"][1])


def test_official_vectors_may_be_rows_of_half_precision(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", a__text=np.ones((1, 4), np.float16), b__text=np.zeros(4))
    got = read_embeddings(tmp_path / "e.npz")
    assert got.ids == ("a", "b") and got.tables["text"].dtype == np.float32 and got.tables["text"].tolist() == [[1] * 4, [0] * 4]


def test_compressed_files_and_byte_or_number_ids_are_read(tmp_path: Path) -> None:
    for ids, names in ((np.array([b"a", "é".encode()]), ("a", "é")), (np.array([7, 8]), ("7", "8"))):
        np.savez_compressed(tmp_path / "e.npz", ids=ids, text=np.ones((2, 3)))
        assert read_embeddings(tmp_path / "e.npz").ids == names


def test_parts_are_joined_in_the_order_given(tmp_path: Path) -> None:
    first, second = table("a", "b"), table("c", "d", "e")
    write_embeddings(tmp_path / "0.npz", first)
    write_embeddings(tmp_path / "1.npz", second, official_keys=True)
    got = read_embeddings([tmp_path / "1.npz", tmp_path / "0.npz"])
    assert got.ids == ("c", "d", "e", "a", "b")
    assert_close(got.tables["video"], np.concatenate([second.tables["video"], first.tables["video"]]), "round_trip")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (table("c", "b", "a"), r"id 'b' is in .*0\.npz and again in .*1\.npz"),
        (table("c", width=6), r"1\.npz: table 'text' is 6 wide, but 5 in .*0\.npz"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, second: EmbeddingTable, words: str) -> None:
    write_embeddings(tmp_path / "0.npz", table("a", "b"))
    write_embeddings(tmp_path / "1.npz", second)
    with pytest.raises(InputError, match=words):
        read_embeddings([tmp_path / "0.npz", tmp_path / "1.npz"])


@pytest.mark.parametrize("official", [False, True])
def test_a_table_that_a_part_lacks_is_that_of_the_others(tmp_path: Path, official: bool) -> None:
    first, second = table("a", "b"), table("c", names=("text", "audio"))
    third = dataclasses.replace(table("d", "e"), own={"video": ("e",)})
    third.tables["video"] = third.tables["video"][1:]
    for number, part in enumerate((first, second, third)):
        write_embeddings(tmp_path / f"{number}.npz", part, official_keys=official)
    got = read_embeddings([tmp_path / f"{number}.npz" for number in range(3)])
    assert got.ids == tuple("abcde")
    assert {name: got.ids_of(name) for name in got.tables} == {
        "text": tuple("abcde"),
        "video": tuple("abe"),
        "audio": tuple("abcde"),
        "av": tuple("abde"),
    }
    assert_close(got.tables["video"], np.concatenate([first.tables["video"], third.tables["video"]]), "round_trip")
    one = read_embeddings([tmp_path / f"{number}.npz" for number in (1, 0)], lambda names: next(n for n in ("av", "text") if n in names))
    assert one.ids == ("a", "b") and one.tables.keys() == {"av"}


def test_records_of_several_parts_with_the_same_prompt_have_one_row(tmp_path: Path) -> None:
    """Else a few times 1e-7 of rounding would decide what is level by its nature."""
    parts = [table("a", "b"), table("c", "d"), table("e", "f")]
    same: list[dict[str, dict[str, str]]] = [{}, {"text": {"c": "b"}}, {"text": {"e": "b", "f": "gone"}}]
    for number, part in enumerate(parts):
        write_embeddings(tmp_path / f"{number}.npz", dataclasses.replace(part, same=same[number], parts=(number,), of=3))
    got = read_embeddings([tmp_path / f"{number}.npz" for number in range(3)])
    text = dict(zip(got.ids, got.tables["text"], strict=True))
    assert np.array_equal(text["c"], text["b"]) and np.array_equal(text["e"], text["b"])
    own = np.concatenate([part.tables["text"] for part in parts])
    assert_close(np.stack([text[name] for name in "abdf"]), own[[0, 1, 3, 5]], "round_trip")
    assert_close(got.tables["video"], np.concatenate([p.tables["video"] for p in parts]), "round_trip")


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def doubled_member() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            member = io.BytesIO()
            np.save(member, np.ones(3, np.float32))
            archive.writestr("a__text.npy", member.getvalue())
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((3, 4), np.float32))
    return buffer.getvalue()


def flipped() -> bytes:
    good = bytearray(npz(ids=np.array(["a"]), text=np.ones((1, 64), np.float32)))
    place = good.index(np.ones(8, np.float32).tobytes())
    good[place] ^= 0xFF
    return bytes(good)


ROWS = np.ones((2, 3), np.float32)
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "truncated or not an .npz"),
    "text": (lambda: b"id,vector\n", "truncated or not an .npz"),
    "truncated": (lambda: npz(ids=np.array(["a", "b"]), text=ROWS)[:-40], "truncated or not an .npz"),
    "damaged": (flipped, "truncated or not an .npz file .*CRC"),
    "one array": (npy, "truncated or not an .npz"),
    "pickled ids": (lambda: npz(ids=np.array(["a", None], dtype=object), text=ROWS), "pickled content is never loaded"),
    "doubled ids": (lambda: npz(ids=np.array(["a", "a"]), text=ROWS), "1 ids appear more than once: a"),
    "doubled member": (doubled_member, "a__text.npy appears more than once"),
    "empty id": (lambda: npz(ids=np.array(["a", ""]), text=ROWS), "record 1 has an empty id"),
    "ids of another length": (lambda: npz(ids=np.array(["a"]), text=ROWS), r"table 'text' has shape \(2, 3\) for 1 ids"),
    "flat table": (lambda: npz(ids=np.array(["a", "b"]), text=ROWS[:, 0]), r"table 'text' has shape \(2,\)"),
    "words for numbers": (lambda: npz(ids=np.array(["a", "b"]), text=np.array([["x"], ["y"]])), "table 'text' holds <U1"),
    "ids that are no text": (lambda: npz(ids=np.array([b"a", b"\xff"]), text=ROWS), "'ids' is not UTF-8 text"),
    "float ids": (lambda: npz(ids=np.ones(2), text=ROWS), "'ids' is float64"),
    "unknown table": (lambda: npz(ids=np.array(["a", "b"]), txt=ROWS), "unknown table 'txt'; the tables are text, video"),
    "no tables": (lambda: npz(ids=np.array(["a", "b"])), "no tables beside 'ids'"),
    "no arrays": (lambda: npz(), "holds no embeddings"),
    "no ids": (lambda: npz(text=ROWS), "no 'ids' array, and 'text' is not of the form ID__TABLE"),
    "official widths": (lambda: npz(a__text=ROWS[0], b__text=ROWS[0, :2]), r"b__text has shape \(2,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path: Path, name: str) -> None:
    make, words = BAD[name]
    path = tmp_path / "bad.npz"
    path.write_bytes(make())
    with pytest.raises(InputError, match=words) as caught:
        read_embeddings(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_embeddings(tmp_path / "none.npz")
    with pytest.raises(InputError, match="is a folder"):
        read_embeddings(tmp_path)
    with pytest.raises(InputError, match="no embedding file"):
        read_embeddings([])
    with pytest.raises(InputError, match="does not exist"):
        write_embeddings(tmp_path / "none" / "e.npz", table("a"))
    with pytest.raises(InputError, match="is a folder"):
        write_embeddings(tmp_path, table("a"))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "e.npz").write_bytes(npz(ids=np.array(["a"]), text=np.array([[Trap()]], dtype=object)))
    with pytest.raises(InputError, match="never loaded"):
        read_embeddings(tmp_path / "e.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (EmbeddingTable(("a", "a"), {"text": ROWS}), "ids appear more than once: a"),
        (EmbeddingTable(("a",), {"text": ROWS}), "has shape"),
        (EmbeddingTable(("a", "b"), {"words": ROWS}), "unknown table 'words'"),
    ],
)
def test_bad_tables_are_not_written(tmp_path: Path, bad: EmbeddingTable, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_embeddings(tmp_path / "e.npz", bad)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = table("a")
    write_embeddings(tmp_path / "e.npz", old)
    done = []

    def full(*_: object, **__: object) -> None:
        if done:
            raise OSError(28, "No space left on device")
        done.append(True)

    monkeypatch.setattr(embedding_file.np.lib.format, "write_array", full)
    with pytest.raises(InputError, match=r"e\.npz: cannot be written \(No space left on device\); free some space"):
        write_embeddings(tmp_path / "e.npz", table("a", "b"))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
    assert_same(read_embeddings(tmp_path / "e.npz"), old)
