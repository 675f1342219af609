"""Vectors from anywhere: two arrays, one `.npy` a table, captions apart from their clips; what does not fit is explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax.retrieval import evaluate, write_embeddings
from omni_jax.retrieval.inputs import captions_left_out, read_inputs, with_captions
from omni_jax.types import EmbeddingTable, InputError
from tests.conversion.torch_files import write_torch_file
from tests.tolerances import assert_close

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 4, 6)).astype(np.float32)


def npy(path: Path, rows: np.ndarray) -> str:
    np.save(path, rows)
    return str(path)


def test_two_arrays_from_npz_and_from_a_torch_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", text_embeds=A, mllm_embeds=B)
    write_torch_file(tmp_path / "s.bin", {"text_embeds": A, "mllm_embeds": B.astype(np.float16)})
    for name, want in (("s.npz", B), ("s.bin", B.astype(np.float16).astype(np.float32))):
        got = read_inputs([str(tmp_path / name)])
        assert got.ids == ("0", "1", "2", "3") and list(got.tables) == ["text", "av"]
        assert_close(got.tables["text"], A, "round_trip")
        assert_close(got.tables["av"], want, "round_trip")
        assert list(read_inputs([f"video={tmp_path / name}"]).tables) == ["text", "video"]
    np.savez(tmp_path / "named.npz", text_embeds=A, mllm_embeds=B, ids=np.array(list("wxyz")))
    assert read_inputs([str(tmp_path / "named.npz")]).ids == ("w", "x", "y", "z")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"text_embeds": A}, "has no 'mllm_embeds'"),
        ({"text_embeds": A, "mllm_embeds": B[:3]}, r"'text_embeds' is 4 x 6 and 'mllm_embeds' 3 x 6"),
        ({"text_embeds": A, "mllm_embeds": B[:, :5]}, r"4 x 6 and 'mllm_embeds' 4 x 5"),
        ({"text_embeds": A, "mllm_embeds": B[0]}, r"'mllm_embeds' is \(6,\)"),
        ({"text_embeds": A, "mllm_embeds": "x"}, "'mllm_embeds' is str"),
        ([A, B], "holds a list"),
    ],
)
def test_torch_files_of_another_form_are_refused(tmp_path: Path, content: object, words: str) -> None:
    write_torch_file(tmp_path / "s.bin", content)
    with pytest.raises(InputError, match=rf"s\.bin.*{words}"):
        read_inputs([str(tmp_path / "s.bin")])


def test_one_npy_a_table_named_by_hand_or_by_its_file(tmp_path: Path) -> None:
    text, video = npy(tmp_path / "mine.npy", A), npy(tmp_path / "gemini-video.npy", B.astype(np.float64))
    got = read_inputs([f"text={text}", video])
    assert got.ids == ("0", "1", "2", "3") and list(got.tables) == ["text", "video"] and got.tables["video"].dtype == np.float32
    with pytest.raises(InputError, match=r"mine\.npy: which table is it\? write text="):
        read_inputs([text, video])
    with pytest.raises(InputError, match="table 'video' was given already"):
        read_inputs([f"video={text}", video])
    (tmp_path / "names.txt").write_text("w\nx\ny\nz\n")
    assert read_inputs([f"text={text}", video, f"ids={tmp_path / 'names.txt'}"]).ids == ("w", "x", "y", "z")
    (tmp_path / "ids.txt").write_text("z\ny\nx\nw\n")  # found by itself
    assert read_inputs([f"text={text}", video]).ids == ("z", "y", "x", "w")


def test_tables_of_several_files_are_brought_into_one_order(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "a.npz", EmbeddingTable(tuple("wxyz"), {"text": A, "video": A}))
    write_embeddings(tmp_path / "b.npz", EmbeddingTable(tuple("zxyw"), {"video": B}))
    got = read_inputs([f"text={tmp_path / 'a.npz'}", f"video={tmp_path / 'b.npz'}"])
    assert got.ids == tuple("wxyz")
    assert_close(got.tables["video"], B[[3, 1, 2, 0]], "round_trip")
    whole = read_inputs([str(tmp_path / "a.npz"), f"audio={npy(tmp_path / 'x.npy', B)}"])
    assert list(whole.tables) == ["text", "video", "audio"] and whole.ids == tuple("wxyz")


def test_what_does_not_fit_is_explained(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "a.npz", EmbeddingTable(tuple("wxyz"), {"text": A}))
    write_embeddings(tmp_path / "b.npz", EmbeddingTable(("x", "y", "z", "q"), {"video": B}))
    first = f"text={tmp_path / 'a.npz'}"
    with pytest.raises(InputError, match=r"b\.npz: its ids are not those of .*a\.npz: it lacks 1 \(w\) and adds 1 \(q\)"):
        read_inputs([first, f"video={tmp_path / 'b.npz'}"])
    with pytest.raises(InputError, match=r"b\.npz: has no table 'audio'; it holds video"):
        read_inputs([first, f"audio={tmp_path / 'b.npz'}"])
    with pytest.raises(InputError, match=r"table 'video' has 3 rows, .*a\.npz has 4"):
        read_inputs([first, f"video={npy(tmp_path / 'v.npy', B[:3])}"])
    with pytest.raises(InputError, match=r"v\.npy: table 'video' is 5 wide, but 6 in .*a\.npz"):
        read_inputs([first, f"video={npy(tmp_path / 'v.npy', B[:, :5])}"])
    (tmp_path / "few.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"has 4 rows, .*few\.txt has 2"):
        read_inputs([f"text={npy(tmp_path / 'v.npy', A)}", f"ids={tmp_path / 'few.txt'}"])
    (tmp_path / "few.txt").write_text("a\na\n")
    with pytest.raises(InputError, match="1 ids appear more than once"):
        read_inputs([f"text={tmp_path / 'v.npy'}", f"ids={tmp_path / 'few.txt'}"])


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "cannot be read as an array"), (b"\x93NUMPY\x01\x00", "cannot be read"), (b"PK", "cannot be read"), (None, "no such file")],
)
def test_bad_npy_files_are_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "text.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"text\.npy: .*{words}"):
        read_inputs([str(path)])


def test_pickled_truncated_and_flat_npy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.npy"
    np.save(path, np.array([None, "x"], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="never loaded"):
        read_inputs([str(path)])
    np.save(path, A)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="ends early"):
        read_inputs([str(path)])
    with pytest.raises(InputError, match=r"has shape \(6,\)"):
        read_inputs([npy(path, A[0])])
    with pytest.raises(InputError, match="table 'text' holds int64"):
        read_inputs([npy(path, np.ones((4, 6), np.int64))])


def test_rows_by_column_are_read_as_they_stand(tmp_path: Path) -> None:
    got = read_inputs([npy(tmp_path / "text.npy", np.asfortranarray(A))]).tables["text"]
    assert_close(got, A, "round_trip")
    assert got.flags.c_contiguous


@pytest.mark.jit
def test_captions_apart_from_clips_are_scored_many_to_many() -> None:
    audio = np.array([[1, 0.02], [0.02, 1]], np.float32)
    text = np.array([[1, 0], [2, 0.1], [0.1, 1], [0, 1], [1, 1]], np.float32)
    clips = EmbeddingTable(("x#y", "z"), {"text": audio, "audio": audio})  # this text table gives way to the captions
    captions = EmbeddingTable(("x#y#0", "x#y#1", "x#y#2", "z#0", "gone#0"), {"text": text})
    tables, relevance = with_captions(clips, captions)
    assert relevance == {"text": ["x#y", "x#y", "x#y", "z"], "audio": ["x#y", "z"]} and len(tables["text"]) == 4
    found = evaluate(tables, relevance=relevance)["directions"]
    assert (found["t2a"]["R@1"], found["t2a"]["queries"], found["t2a"]["gallery"]) == (75.0, 4, 2)
    assert (found["a2t"]["R@1"], found["a2t"]["queries"], found["a2t"]["gallery"]) == (100.0, 2, 4)


def test_records_without_a_caption_move_no_other_captions_row() -> None:
    clips = EmbeddingTable(("a", "b"), {"video": np.eye(2, 4, dtype=np.float32)})
    rows = {"text": np.eye(2, 4, dtype=np.float32), "video": np.eye(3, 4, dtype=np.float32)}
    for ids, own, owner in ((("a#1", "b#0", "z"), ("b#0", "z"), "b"), (("z", "y", "a#0"), ("z", "a#0"), "a")):
        captions = EmbeddingTable(ids, rows, own={"text": own})
        tables, relevance = with_captions(clips, captions)
        assert relevance["text"] == [owner]
        np.testing.assert_array_equal(tables["text"], rows["text"][[own.index(f"{owner}#0")]])
        assert captions_left_out(clips, captions) == {"captions": ["z"], "clips": ["ab".replace(owner, "")]}


def test_captions_without_clips_are_explained() -> None:
    clips = EmbeddingTable(("x",), {"audio": A[:1]})
    with pytest.raises(InputError, match=r"caption 'y#0' is of clip 'y', the first clip is 'x'"):
        with_captions(clips, EmbeddingTable(("y#0",), {"text": A[:1]}))
    with pytest.raises(InputError, match="holds audio, but no text table"):
        with_captions(clips, EmbeddingTable(("x#0",), {"audio": A[:1]}))
