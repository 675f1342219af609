"""Ranks against the naive ranker: ties, duplicates, uneven tails, galleries larger than queries, several relevant items."""

from __future__ import annotations

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh

from omni_jax.parallel import make_mesh
from omni_jax.retrieval import ranks as ranks_module
from omni_jax.retrieval.ranks import prepare, rank_pair
from omni_jax.types import InputError
from tests.retrieval import naive
from tests.retrieval.random_cases import DECIDED, WIDTH, as_dict, gaussian, random_case

pytestmark = [pytest.mark.jit, pytest.mark.exact]


@pytest.fixture(params=[1, 8], ids=["1-device", "8-devices"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    return Mesh(np.array(jax.devices()[: request.param]), ("rows",))


@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 20),
    m=st.integers(1, 20),
    chunk=st.sampled_from([4, 8]),  # few shapes: almost all the time of a case is compilation
    kind=st.sampled_from(["gaussian", "signs"]),
    many=st.booleans(),
)
@hypothesis.example(seed=0, n=1, m=1, chunk=512, kind="gaussian", many=False)
@hypothesis.example(seed=0, n=2, m=2, chunk=4, kind="signs", many=False)
@hypothesis.example(seed=0, n=1, m=20, chunk=512, kind="gaussian", many=True)
def test_ranks_are_those_of_the_naive_ranker(mesh: Mesh, seed: int, n: int, m: int, chunk: int, kind: str, many: bool) -> None:
    case = random_case(np.random.default_rng(seed), n, m, kind, many)
    hypothesis.assume(case is not None)
    assert case is not None
    forward, backward = rank_pair(prepare(case.a), prepare(case.b), case.relevance, chunk=chunk, mesh=mesh)
    assert (forward.queries, forward.gallery, backward.queries, backward.gallery) == (n, m, m, n)
    assert as_dict(forward) == naive.ranks(case.scores, case.left, case.right)
    assert as_dict(backward) == naive.ranks(case.scores.T, case.right, case.left)


def test_tables_larger_than_the_chunk_on_a_three_axis_mesh() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(203, 16)).astype(np.float32)
    b = a + rng.normal(size=a.shape).astype(np.float32)
    b[50:60] = b[7]
    scores = naive.cosines(a, b)
    assert naive.smallest_gap(scores) > 1e-9
    forward, backward = rank_pair(prepare(a), prepare(b), chunk=16, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    own = range(203)
    assert as_dict(forward) == naive.ranks(scores, own, own)
    assert as_dict(backward) == naive.ranks(scores.T, own, own)


@pytest.mark.parametrize("shift", [0, 4], ids=["where-it-is-read", "copied"])
def test_tiles_placed_once_are_their_own_wherever_the_table_starts(shift: int) -> None:
    rng = np.random.default_rng(5)

    def placed(rows: np.ndarray) -> np.ndarray:
        """The rows in memory `shift` bytes after a boundary at which a CPU reads an array in place."""
        room = np.empty(rows.nbytes + 2 * ranks_module.ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ranks_module.ALIGNMENT + shift
        room[start : start + rows.nbytes] = np.frombuffer(rows.tobytes(), np.uint8)
        return room[start : start + rows.nbytes].view(np.float32).reshape(rows.shape)

    a = placed(rng.normal(size=(97, 16)).astype(np.float32))
    b = placed(a + rng.normal(size=a.shape).astype(np.float32))
    run = ranks_module._programs(Mesh(np.array(jax.devices()[:1]), ("rows",)))
    assert run.reads_in_place(a) == (shift == 0) and not ranks_module._programs(make_mesh()).reads_in_place(a)
    scores = naive.cosines(a, b)
    forward, backward = rank_pair(prepare(a), prepare(b), chunk=16)  # seven tiles each way, the last one overlaps
    assert as_dict(forward) == naive.ranks(scores, range(97), range(97))
    assert as_dict(backward) == naive.ranks(scores.T, range(97), range(97))


@pytest.mark.parametrize("width", [1, 3, 8, 64, 100, 515])
@pytest.mark.parametrize("rows", [8, 16, 48, 240, 272])
def test_equal_rows_have_equal_products_wherever_they_stand(mesh: Mesh, width: int, rows: int) -> None:
    rng = np.random.default_rng(width)
    run = ranks_module._programs(mesh)
    one = rng.normal(size=(1, width)).astype(np.float32)
    others = rng.normal(size=(rows * mesh.size, width)).astype(np.float32)
    ones = np.ones(rows * mesh.size, np.float32)
    # The same vector in every gallery row: each query sees a single value. The same vector in every query row: so does each candidate.
    by_gallery = np.asarray(run.product(*run.put_rows(others, ones), *run.put(one.repeat(rows, 0), ones[:rows])))
    by_query = np.asarray(run.product(*run.put_rows(one.repeat(rows * mesh.size, 0), ones), *run.put(others[:rows], ones[:rows])))
    assert (by_gallery == by_gallery[:, :1]).all()
    assert (by_query == by_query[:1]).all()


def test_products_do_not_depend_on_the_number_of_devices() -> None:
    rng = np.random.default_rng(0)
    a, b = (prepare(rng.normal(size=(300, 48)).astype(np.float32)) for _ in range(2))
    read = []
    for devices in (1, 8):
        run = ranks_module._programs(Mesh(np.array(jax.devices()[:devices]), ("rows",)))
        tiles = [run.product(*run.put_rows(*rows), *run.put(b.rows[:32], b.scale[:32])) for rows in _tiles(a, 32 * devices)]
        read.append(np.concatenate([np.asarray(tile) for tile in tiles])[:300])
    np.testing.assert_array_equal(*read)


def _tiles(table: ranks_module.Vectors, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = np.pad(table.rows, ((0, -len(table.rows) % size), (0, 0)))
    scale = np.pad(table.scale, (0, -len(table.scale) % size))
    return [(rows[i : i + size], scale[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("found", [True, False], ids=["duplicates-found", "products-alone"])
def test_constant_embeddings_tie_everywhere(mesh: Mesh, found: bool) -> None:
    rows = np.tile(np.random.default_rng(1).normal(size=(1, 37)).astype(np.float32), (75, 1))
    table = prepare(rows)
    if not found:  # the second line of defence by itself
        table = dataclasses.replace(table, same=np.arange(75, dtype=np.int32))
    for ranks in rank_pair(table, table, chunk=16, mesh=mesh):
        assert (ranks.better == 0).all()
        assert (ranks.equal == 74).all()


def test_duplicates_are_found_across_blocks_and_scales() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(1000, 6)).astype(np.float32)
    rows[900] = rows[3]
    rows[700] = 4 * rows[3]
    rows[[1, 999], 2] = 0.0, -0.0
    rows[999] = np.where(rows[1] == 0, -0.0, rows[1])
    same = prepare(rows).same
    expected = np.arange(1000)
    expected[[700, 900, 999]] = 3, 3, 1
    np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (-np.inf, "NaN or infinity")],
)
def test_not_finite_rows_are_refused_by_name(value: float, words: str) -> None:
    rows = np.ones((9, 4), np.float32)
    rows[2, 1] = rows[7, 3] = value
    with pytest.raises(InputError, match=rf"table 'video': 2 rows hold {words}: 2 \(c\), 7 \(h\)"):
        prepare(rows, "video", "abcdefghi")


def test_zero_and_extreme_rows_are_refused() -> None:
    rows = np.ones((300, 4), np.float32)
    rows[[260, 299]] = 0
    with pytest.raises(InputError, match="2 rows hold only zeros: 260, 299"):
        prepare(rows, "text")
    rows[:] = 1e-36
    with pytest.raises(InputError, match=r"300 rows hold vectors whose norm is outside .*: 0, 1, 2, 3, 4, \.\.\."):
        prepare(rows, "text")
    rows[:] = 3e38
    with pytest.raises(InputError, match="norm is outside"):
        prepare(rows, "text")


def test_lengths_from_tiny_to_huge_rank_alike() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 20, 5)).astype(np.float32)
    scales = np.float32(2.0) ** rng.integers(-90, 90, size=(20, 1)).astype(np.float32)
    plain, scaled = rank_pair(prepare(a), prepare(b)), rank_pair(prepare(a * scales), prepare(b * scales[::-1]))
    assert [as_dict(r) for r in plain] == [as_dict(r) for r in scaled]


def test_bfloat16_tables_rank_as_their_rounded_values_do(mesh: Mesh) -> None:
    rng = np.random.default_rng(9)
    pool = rng.normal(size=(30, WIDTH)).astype(np.float32)
    a, b = (gaussian(rng, n, pool).astype(ml_dtypes.bfloat16) for n in (40, 50))
    scores = naive.cosines(a, b)
    assert naive.smallest_gap(scores) > DECIDED
    kept = prepare(a)
    assert kept.rows.dtype == ml_dtypes.bfloat16
    forward, backward = rank_pair(kept, prepare(b), chunk=16, mesh=mesh)
    assert as_dict(forward) == naive.ranks(scores, range(40), range(50))
    assert as_dict(backward) == naive.ranks(scores.T, range(50), range(40))


@pytest.mark.parametrize(("n", "chunk", "side"), [(1, 640, 16), (5, 4, 4), (3782, 640, 544), (640, 640, 640), (641, 640, 336), (20, 8, 8)])
def test_tiles_leave_little_padding(n: int, chunk: int, side: int) -> None:
    assert ranks_module._tile_rows(n, chunk) == side


def test_no_product_is_computed_twice_when_rows_answer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    a, b = (prepare(rng.normal(size=(60, 5)).astype(np.float32)) for _ in range(2))
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    run, calls = ranks_module._programs(mesh), []

    def product(*arguments: jax.Array) -> jax.Array:
        calls.append(arguments[0].shape)
        return run.product(*arguments)

    monkeypatch.setattr(ranks_module, "_programs", lambda mesh: dataclasses.replace(run, product=product))
    rank_pair(a, b, chunk=16, mesh=mesh)
    assert len(calls) == 16


@pytest.mark.parametrize("axis", [0, 1])
def test_counts_of_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    rng = np.random.default_rng(6)
    products = rng.integers(3, size=(12, 10)).astype(np.float32)
    score, item = rng.integers(3, size=(2, 2, products.shape[1 - axis])).astype(np.float32)
    candidates = rng.integers(-1, 3, size=products.shape[axis]).astype(np.int32)
    arrays = [jnp.asarray(x) for x in (products, score, item.astype(np.int32), candidates)]
    packed = ranks_module._along(axis, *arrays)
    monkeypatch.setattr(ranks_module, "PACKED", 1)
    np.testing.assert_array_equal(packed, ranks_module._along(axis, *arrays))
    for r in range(2):
        for i in range(products.shape[1 - axis]):
            line = (products[:, i] if axis == 0 else products[i]).tolist()
            pairs = [(x, c) for x, c in zip(line, candidates.tolist(), strict=True) if c != ranks_module.NO_ROW]
            better = sum(x > score[r, i] and c != item[r, i] for x, c in pairs)
            equal = sum(x == score[r, i] or c == item[r, i] for x, c in pairs)
            assert (packed[0, r, i], packed[1, r, i]) == (better, equal)


def test_shapes_and_labels_that_do_not_fit_are_refused() -> None:
    table = prepare(np.eye(4, dtype=np.float32))
    for rows in (np.ones(4), np.ones((0, 3)), np.ones((3, 0)), np.ones((2, 2, 2))):
        with pytest.raises(InputError, match="has shape"):
            prepare(rows.astype(np.float32))
    with pytest.raises(InputError, match="expected floating point"):
        prepare(np.array([["a", "b"]]))
    with pytest.raises(InputError, match="4 and 3 wide"):
        rank_pair(table, prepare(np.ones((4, 3), np.float32)))
    with pytest.raises(InputError, match="one label per row"):
        rank_pair(table, table, ([0, 1, 2], [0, 1, 2, 3]))
    with pytest.raises(InputError, match="no query has a relevant item"):
        rank_pair(table, table, ([0, 1, 2, 3], [4, 5, 6, 7]))
