"""What embedding files say of themselves besides vectors: whose ids, which parts, made with what; files that differ are not mixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.config import Preset
from omni_jax.config.made_with import differences, made_otherwise, recorded_preset
from omni_jax.retrieval import read_embeddings, write_embeddings
from omni_jax.retrieval.export import export_faiss, export_int8, export_npy
from omni_jax.retrieval.inputs import read_inputs
from omni_jax.retrieval.npz import load_arrays
from omni_jax.types import EmbeddingTable, InputError
from tests.tolerances import assert_close

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 6)).astype(np.float32)
NUMERIC = tuple(map(str, range(40)))
BY_NAME = tuple(sorted(NUMERIC))  # "0", "1", "10", "11", ...
MADE: dict[str, Any] = {
    "weights": {"base": "ab" * 16, "adapter": None, "trained": None},
    "model": {"decoder": {"rope_theta": 1e6}},
    "tokenizer": "cd" * 16,
    "preset": dataclasses.asdict(Preset()),
    "normalize": True,
    "dtype": "keep",
    "precision": "default",
    "code": "0.1.0",
}


def remade(head: str, value: Any) -> dict[str, Any]:
    """The record with one leaf changed."""
    made = json.loads(json.dumps(MADE))
    *path, leaf = head.split(".")
    inner = made
    for name in path:
        inner = inner[name]
    inner[leaf] = value
    return made


def r1(names: list[str], out: Path) -> float:
    assert main(["eval", *names, "--json", str(out)]) == 0
    return json.loads(out.read_text())["directions"]["t2v"]["R@1"]


@pytest.mark.jit
@pytest.mark.parametrize("order", [NUMERIC, BY_NAME, NUMERIC[::-1]])
def test_ids_that_look_like_row_numbers_are_ids(tmp_path: Path, order: tuple[str, ...]) -> None:
    write_embeddings(tmp_path / "a.npz", EmbeddingTable(NUMERIC, {"text": ROWS}))
    write_embeddings(tmp_path / "b.npz", EmbeddingTable(order, {"video": ROWS[[int(i) for i in order]]}))
    np.savez(tmp_path / "numbers.npz", ids=np.array([int(i) for i in order]), video=ROWS[[int(i) for i in order]])
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "video.npy", ROWS[[int(i) for i in order]])
    (tmp_path / "npy" / "ids.txt").write_text("\n".join(order))
    for other in (f"video={tmp_path / 'b.npz'}", f"video={tmp_path / 'numbers.npz'}", str(tmp_path / "npy" / "video.npy")):
        assert r1([f"text={tmp_path / 'a.npz'}", other], tmp_path / "r.json") == 100
        assert r1([other, f"text={tmp_path / 'a.npz'}"], tmp_path / "r.json") == 100


@pytest.mark.jit
def test_a_file_without_ids_is_not_held_against_ids_that_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "two.npz", text_embeds=ROWS, mllm_embeds=ROWS)
    shuffled = ROWS[[int(i) for i in BY_NAME]]
    write_embeddings(tmp_path / "named.npz", EmbeddingTable(BY_NAME, {"text": shuffled, "video": shuffled}))
    assert main(["eval", f"video={tmp_path / 'two.npz'}", "--compare", str(tmp_path / "named.npz")]) == 0
    assert "No paired test with named.npz" in capsys.readouterr().out
    assert main(["eval", f"video={tmp_path / 'two.npz'}", "--compare", f"video={tmp_path / 'two.npz'}"]) == 0
    assert "No paired test" not in capsys.readouterr().out


@pytest.mark.jit
def test_a_file_without_ids_takes_no_captions_from_ids_that_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "two.npz", text_embeds=ROWS, mllm_embeds=ROWS)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"id": name, "text": f"caption {name}"}) + "\n" for name in BY_NAME))
    command = ["eval", str(tmp_path / "two.npz"), "--html", str(tmp_path / "r.html"), "--manifest", str(tmp_path / "m.jsonl")]
    assert main(command) == 2
    assert "two.npz: has no ids, by which --manifest and --media find its records" in capsys.readouterr().err


def test_row_numbers_stay_row_numbers_through_an_export(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", text_embeds=ROWS, mllm_embeds=ROWS)
    table = read_inputs([str(tmp_path / "two.npz")])
    assert not table.named
    export_int8(table, tmp_path / "small.npz")
    assert not read_inputs([str(tmp_path / "small.npz")]).named
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ids.txt").write_text("of another export\n")
    assert export_npy(table, tmp_path / "out") == ["text.npy", "av.npy"]
    assert not read_inputs([str(tmp_path / "out" / "text.npy")]).named


@pytest.mark.parametrize("count", [90, 100, 121])
def test_ids_of_another_number_than_rows_are_refused_where_they_are_read(tmp_path: Path, count: int) -> None:
    rows = RNG.normal(size=(120, 4)).astype(np.float32)
    np.save(tmp_path / "video.npy", rows)
    ids = [f"c{i}" for i in range(count)]
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in ids))
    names = tuple(f"c{i}" for i in reversed(range(120)))
    write_embeddings(tmp_path / "text.npz", EmbeddingTable(names, {"text": rows}))
    for files in ([f"text={tmp_path / 'text.npz'}", str(tmp_path / "video.npy")], [str(tmp_path / "video.npy")]):
        with pytest.raises(InputError, match=rf"video\.npy: table 'video' has 120 rows, .*ids\.txt has {count} ids"):
            read_inputs(files)


def parts(folder: Path, count: int, **fields: Any) -> list[str]:
    """A set of 40 records in `count` parts, as `embed --part` writes them."""
    made = []
    for index in range(count):
        place = folder / f"clips-{index:05}-of-{count:05}.npz"
        tables = {"text": ROWS[index::count], "video": ROWS[index::count]}
        write_embeddings(place, EmbeddingTable(NUMERIC[index::count], tables, **fields, parts=(index,), of=count))
        made.append(str(place))
    return made


@pytest.mark.jit
@pytest.mark.parametrize("kind", ["recorded", "renamed", "by name"])
def test_some_parts_of_a_set_are_not_scored_as_if_they_were_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    files = parts(tmp_path, 4)
    if kind == "renamed":
        files = [str(Path(f).rename(tmp_path / f"{i}.npz")) for i, f in enumerate(files)]
    if kind == "by name":  # as an older version wrote them
        for file in files:
            with np.load(file) as arrays:
                np.savez(file, **{name: arrays[name] for name in ("ids", "text", "video")})
    for few in (files[:1], files[1:]):
        assert main(["eval", *few]) == 2
        error = capsys.readouterr().err
        assert f"is {len(few)} of 4 parts of a set" in error and len(error.splitlines()) == 1
        assert main(["eval", *few, "--incomplete"]) == 0
        assert f"is {len(few)} of 4 parts of a set" in capsys.readouterr().err
    write_embeddings(tmp_path / "whole.npz", EmbeddingTable(NUMERIC, {"text": ROWS, "video": ROWS}))
    assert main(["eval", str(tmp_path / "whole.npz"), "--compare", files[0]]) == 2
    assert main(["eval", *files]) == 0
    assert "40 records" in capsys.readouterr().out


def test_parts_of_different_sets_are_refused(tmp_path: Path) -> None:
    first, second = parts(tmp_path, 4), parts(tmp_path, 3)
    with pytest.raises(InputError, match=r"is of a set of 3 parts, .* of a set of 4"):
        read_embeddings([first[0], second[1]])


@pytest.mark.parametrize("official", [False, True])
def test_what_a_file_was_made_with_is_read_back(tmp_path: Path, official: bool) -> None:
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(NUMERIC, {"text": ROWS}, made_with=MADE), official_keys=official)
    found = read_embeddings(tmp_path / "e.npz")
    assert found.made_with == MADE and (found.parts, found.of) == ((0,), 1)
    with np.load(tmp_path / "e.npz", allow_pickle=False) as arrays:
        assert ("made_with" in arrays.files) != official
    export_int8(found, tmp_path / "small.npz")
    assert read_embeddings(tmp_path / "small.npz").made_with == MADE


def test_plain_exports_say_what_they_were_made_with(tmp_path: Path) -> None:
    found = EmbeddingTable(NUMERIC, {"text": ROWS, "video": ROWS}, made_with=MADE)
    for export in (export_npy, export_faiss):
        folder = tmp_path / export.__name__
        assert "made_with.json" in export(found, folder)
        assert json.loads((folder / "made_with.json").read_text()) == MADE
        assert "made_with.json" not in export(dataclasses.replace(found, made_with=None), folder)
        assert not (folder / "made_with.json").exists()
    export_npy(found, tmp_path / "again")
    assert read_inputs([str(tmp_path / "again" / "text.npy")]).made_with == MADE
    write_embeddings(tmp_path / "other.npz", EmbeddingTable(NUMERIC, {"audio": ROWS}, made_with=remade("weights.base", "ef" * 16)))
    with pytest.raises(InputError, match=r"weights\.base differs"):
        read_inputs([str(tmp_path / "again" / "text.npy"), f"audio={tmp_path / 'other.npz'}"])
    (tmp_path / "again" / "made_with.json").write_text("[")
    with pytest.raises(InputError, match=r"made_with\.json: cannot be read .*; export the tables again"):
        read_inputs([str(tmp_path / "again" / "text.npy")])


def test_a_digest_of_weights_is_named_once() -> None:
    there, here = ({"weights": {"base weights": digest * 16, "trained": None}} for digest in ("ab", "cd"))
    assert differences(there, here) == ["weights.base differs"]


@pytest.mark.parametrize(
    ("head", "value", "words"),
    [
        ("weights.adapter", "ef" * 16, "weights.adapter differs"),
        ("model.decoder.rope_theta", 1e4, r"model\.decoder\.rope_theta is 1000000\.0 there, 10000\.0 here"),
        ("tokenizer", "ef" * 16, "tokenizer differs"),
        ("preset.text_head", "fused", "preset.text_head is 'last' there, 'fused' here"),
        ("normalize", False, "normalize is True there, False here"),
    ],
)
def test_parts_made_otherwise_are_refused(tmp_path: Path, head: str, value: Any, words: str) -> None:
    write_embeddings(tmp_path / "a.npz", EmbeddingTable(("a",), {"text": ROWS[:1]}, made_with=MADE))
    write_embeddings(tmp_path / "b.npz", EmbeddingTable(("b",), {"text": ROWS[1:2]}, made_with=remade(head, value)))
    with pytest.raises(InputError, match=rf"b\.npz: was made otherwise than .*a\.npz: {words}"):
        read_embeddings([tmp_path / "a.npz", tmp_path / "b.npz"])


def test_a_first_file_of_unknown_origin_hides_no_difference_of_the_others(tmp_path: Path) -> None:
    made = {"a": None, "b": MADE, "c": remade("weights.base", "ef" * 16)}
    for name, rows in (("a", ROWS[:1]), ("b", ROWS[1:2]), ("c", ROWS[2:3])):
        write_embeddings(tmp_path / f"{name}.npz", EmbeddingTable((name,), {"text": rows}, made_with=made[name]))
    assert read_embeddings([tmp_path / "a.npz", tmp_path / "b.npz"]).made_with is None
    with pytest.raises(InputError, match=r"c\.npz: was made otherwise than .*b\.npz: weights\.base differs"):
        read_embeddings([tmp_path / f"{name}.npz" for name in "abc"])
    for name, table in (("a", "text"), ("b", "video"), ("c", "audio")):
        write_embeddings(tmp_path / f"{name}.npz", EmbeddingTable(("x",), {table: ROWS[:1]}, made_with=made[name]))
    with pytest.raises(InputError, match=r"c\.npz: was made otherwise than .*b\.npz: weights\.base differs"):
        read_inputs([f"{table}={tmp_path / name}.npz" for name, table in (("a", "text"), ("b", "video"), ("c", "audio"))])


@pytest.mark.parametrize(("head", "value"), [("code", "0.2.0"), ("dtype", "float32"), ("precision", "highest")])
def test_parts_that_differ_by_rounding_are_read_together(tmp_path: Path, head: str, value: str) -> None:
    write_embeddings(tmp_path / "a.npz", EmbeddingTable(("a",), {"text": ROWS[:1]}, made_with=MADE))
    write_embeddings(tmp_path / "b.npz", EmbeddingTable(("b",), {"text": ROWS[1:2]}, made_with=remade(head, value)))
    assert read_embeddings([tmp_path / "a.npz", tmp_path / "b.npz"]).made_with == MADE


def test_tables_of_two_models_are_not_joined(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "a.npz", EmbeddingTable(NUMERIC, {"text": ROWS}, made_with=MADE))
    for made, joined in ((remade("weights.base", "ef" * 16), False), (remade("preset.frames", 4), True), (None, True)):
        write_embeddings(tmp_path / "b.npz", EmbeddingTable(NUMERIC, {"video": ROWS}, made_with=made))
        files = [f"text={tmp_path / 'a.npz'}", f"video={tmp_path / 'b.npz'}"]
        if joined:
            assert read_inputs(files).made_with is None  # no one record holds for both
        else:
            with pytest.raises(InputError, match=r"was made otherwise .*weights\.base differs"):
                read_inputs(files)


@pytest.mark.jit
def test_a_comparison_says_what_the_other_was_made_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"text": ROWS, "video": ROWS}
    for name, made in (("a", MADE), ("b", remade("preset.frames", 4)), ("old", None)):
        write_embeddings(tmp_path / f"{name}.npz", EmbeddingTable(NUMERIC, tables, made_with=made))
    assert main(["eval", str(tmp_path / "b.npz"), "--json", str(tmp_path / "b.json")]) == 0
    capsys.readouterr()
    for other in ("b.npz", "b.json"):
        assert main(["eval", str(tmp_path / "a.npz"), "--compare", str(tmp_path / other)]) == 0
        assert f"Made otherwise: {other} there, a.npz here: preset.frames is 4 there, 8 here." in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "a.npz"), "--compare", str(tmp_path / "old.npz")]) == 0
    assert "What old.npz was made with is not recorded" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["nothing", "[1]", '{"vectors": 3}', '{"parts": [4], "of": 4}', '{"parts": [], "of": 4}', '{"of": "x"}'])
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    np.savez(tmp_path / "e.npz", ids=np.array(["a"]), text=ROWS[:1], made_with=np.array(text))
    with pytest.raises(InputError, match=r"e\.npz: what it was made with cannot be read"):
        read_embeddings(tmp_path / "e.npz")


def test_fields_of_later_versions_count_as_usual_before_them() -> None:
    older = remade("preset.text_head", "last")
    del older["preset"]["frames"], older["preset"]["prefix"]
    assert made_otherwise(older, MADE) == [] and recorded_preset(older) == Preset()
    assert made_otherwise(older, remade("preset.frames", 4)) == ["preset.frames is 8 there, 4 here"]
    assert differences({"a": {"b": (1, 2)}, "c": 1}, {"a": {"b": [1, 2]}, "c": 2}, free=("c",)) == []


def test_one_table_is_mapped_and_others_are_not_read(tmp_path: Path) -> None:
    table = EmbeddingTable(NUMERIC, {"text": ROWS, "video": ROWS + 1})
    write_embeddings(tmp_path / "e.npz", table)
    arrays, _ = load_arrays(tmp_path / "e.npz", mapped=True)
    for name, rows in table.tables.items():
        assert isinstance(arrays[name], np.memmap) and arrays[name].ctypes.data % 64 == 0
        assert_close(arrays[name], rows, "round_trip")
    broken = bytearray((tmp_path / "e.npz").read_bytes())
    broken[broken.index(ROWS[3].tobytes())] ^= 0xFF  # a table that is not asked for may be damaged
    (tmp_path / "e.npz").write_bytes(broken)
    got = read_inputs([str(tmp_path / "e.npz")], choose=lambda names: next(name for name in names if name == "video"))
    assert list(got.tables) == ["video"] and got.ids == NUMERIC
    assert_close(got.tables["video"], ROWS + 1, "round_trip")
    with pytest.raises(InputError, match="CRC"):
        read_embeddings(tmp_path / "e.npz")


@pytest.mark.parametrize("form", ["savez", "compressed", "by column", "int8", "official", "float16"])
def test_files_of_every_form_give_the_chosen_table(tmp_path: Path, form: str) -> None:
    path = tmp_path / "e.npz"
    table = EmbeddingTable(NUMERIC, {"text": ROWS, "video": ROWS})
    if form == "int8":
        export_int8(table, path)
    elif form == "official":
        write_embeddings(path, table, official_keys=True)
    else:
        kind = {"by column": np.asfortranarray(ROWS), "float16": ROWS.astype(np.float16)}.get(form, ROWS)
        (np.savez_compressed if form == "compressed" else np.savez)(path, ids=np.array(NUMERIC), text=kind, video=ROWS)
    whole = read_embeddings(path).tables["text"]
    assert_close(read_embeddings(path, choose=lambda _: "text").tables["text"], whole, "round_trip")
