"""Part `numbers`: what bfloat16 changes, temperatures and rows at the edge, and counts beyond what float32 can hold.

Ranking agreement is measured on the tiny golden checkpoint and clips made here; its weights are random, so that neighbours are closer
than a trained model's would be and the figures are a lower bound of sorts.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.objectives import distillation_loss, info_nce, pairwise_loss, tuple_loss
from omni_jax.retrieval import evaluate, read_embeddings
from omni_jax.retrieval.directions import possible
from omni_jax.retrieval.metrics import direction_metrics
from omni_jax.retrieval.ranks import Ranks, prepare, rank_pair
from omni_jax.types import EmbeddingTable, InputError
from tests.media_samples import write_clip
from tools.torture import commands
from tools.torture.outcome import Outcome, begun

TAU = 0.01
CLIPS = 48
ROWS = 1_000_000
WIDTH = 8
BEYOND_FLOAT32 = (1 << 24) + 3  # float32 counts to 2^24 and stands still


def run(seed: int, minutes: float, *, clips: int = CLIPS, rows: int = ROWS, draws: int = 200) -> Outcome:
    """Returns what was tried and lost; `clips` 0 leaves the comparison of types out."""
    with begun("numbers", seed, minutes) as (outcome, clock, folder):
        near_duplicates(outcome, seed, draws)
        zero_vectors(outcome, seed)
        counts(outcome, seed, rows)
        if clips and clock.left > 0:
            agreement(outcome, folder, clips)
    return outcome


def near_duplicates(outcome: Outcome, seed: int, draws: int) -> None:
    """Losses and gradients at temperature 0.01 where rows are equal or almost so: finite, in float32 and bfloat16."""

    def losses(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return (
            info_nce(a, b, c, temperature=TAU)
            + tuple_loss(a, b, c, temperature=TAU)
            + distillation_loss(a, [b, c], temperature=TAU)
            + pairwise_loss({"text": a, "video": b, "audio": c}, (("text", "video"), ("text", "audio")), temperature=TAU)
        )

    step = jax.jit(jax.value_and_grad(losses, argnums=(0, 1, 2)))
    rng = np.random.default_rng(seed)
    bad = 0
    for number in range(draws):
        base = rng.normal(size=(1, 16)) * 10.0 ** rng.integers(-12, 13)
        noise = [0.0, 1e-7, 1e-4, 1e-2][number % 4] * np.abs(base).max()
        arrays = [jnp.asarray(base + noise * rng.normal(size=(12, 16)), jnp.bfloat16 if number % 3 == 0 else jnp.float32) for _ in range(3)]
        value, gradients = step(*arrays)
        bad += not (np.isfinite(value) and all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients))
    outcome.expect(not bad, f"{bad} of {draws} batches of near-duplicates gave a loss or gradient that is not finite")
    outcome.tried.append((f"batches of equal or nearly equal rows at temperature {TAU}", draws))


def zero_vectors(outcome: Outcome, seed: int) -> None:
    """Zero rows: in a loss a cosine of 0 and a finite gradient; in an evaluation refused, by row; never NaN."""
    rng = np.random.default_rng(seed)
    tried = 0
    for zeros in ([0], [0, 3], list(range(6))):
        a = rng.normal(size=(6, 8)).astype(np.float32)
        a[zeros] = 0
        b = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
        value, gradient = jax.value_and_grad(lambda x, b=b: info_nce(x, b, temperature=TAU))(jnp.asarray(a))
        outcome.expect(bool(np.isfinite(value)) and bool(np.isfinite(gradient).all()), f"zero rows {zeros}: loss {value}")
        if len(zeros) == 6:  # every cosine is 0: both cross-entropies are log 6
            outcome.expect(abs(float(value) - np.log(6)) < 1e-5, f"a batch of zero rows has the loss {value}")
        try:
            evaluate({"text": a, "video": np.asarray(b)}, resamples=0)
            outcome.lost.append(f"zero rows {zeros} were scored")
        except InputError as e:
            outcome.expect("only zeros" in str(e) and str(zeros[0]) in str(e), f"zero rows: {e}")
        tried += 2
    outcome.tried.append(("batches and tables with zero rows", tried))


def counts(outcome: Outcome, seed: int, rows: int) -> None:
    """Places in a gallery of a million rows, against exact counts; and figures from counts that float32 cannot hold."""
    rng = np.random.default_rng(seed)
    # Entries of +-1 make every product a whole number: integer arithmetic says the exact counts, thousands of ties among them.
    gallery = rng.choice(np.array([-1, 1], np.int8), size=(rows, WIDTH))
    queries = rng.choice(np.array([-1, 1], np.int8), size=(24, WIDTH))
    labels = (list(range(24)), [i * (rows // 24) for i in range(24)])
    where = np.full(rows, -1)
    where[labels[1]] = labels[0]
    forward, backward = rank_pair(prepare(queries.astype(np.float32)), prepare(gallery.astype(np.float32)), (labels[0], where.tolist()))
    products = queries.astype(np.int64) @ gallery.T.astype(np.int64)
    own = products[np.arange(24), labels[1]][:, None]
    better, level = (products > own).sum(axis=1), (products == own).sum(axis=1) - 1
    outcome.expect(forward.better.tolist() == better.tolist(), f"{rows:,} rows: other counts of better candidates")
    outcome.expect(forward.equal.tolist() == level.tolist(), f"{rows:,} rows: other counts of ties")
    outcome.expect((backward.queries, len(backward.better)) == (rows, 24), "the other direction lost queries")
    outcome.tried.append((f"places counted in a gallery of {rows:,} rows, up to {int((better + level).max()):,} candidates ahead", 24))
    big = np.array([BEYOND_FLOAT32, BEYOND_FLOAT32 + 1, BEYOND_FLOAT32 + 2])
    found = direction_metrics(Ranks(3, BEYOND_FLOAT32 + 9, np.arange(3), np.arange(3), big, np.zeros(3, np.int64)))
    outcome.expect(found["median_rank"] == BEYOND_FLOAT32 + 2 and found["mean_rank"] == BEYOND_FLOAT32 + 2, f"ranks past 2^24: {found}")
    many = np.zeros(rows, np.int64)
    found = direction_metrics(Ranks(rows, rows, np.arange(rows), np.arange(rows), np.where(np.arange(rows) == 1, 1, many), many))
    outcome.expect(found["R@1"] == 100 * (rows - 1) / rows, f"one miss in {rows:,} queries: R@1 {found['R@1']!r}")
    outcome.tried.append((f"figures of {rows:,} queries with one miss, and of ranks past 2^24", 2))


def agreement(outcome: Outcome, folder: Path, clips: int) -> None:
    """The same clips embedded in float32 and bfloat16: how many queries keep their nearest candidate, by direction."""
    model = commands.convert(folder)
    records = []
    for n in range(clips):
        write_clip(folder / f"{n}.mp4", 1.0 + 0.1 * (n % 7), fps=8, seed=n, width=96 + 16 * (n % 3), height=64 + 16 * (n % 2))
        records.append({"id": str(n), "text": f"clip {n} with a disc of colour {n * 7919 % 97}", "video": f"{n}.mp4", "audio": f"{n}.mp4"})
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    tables: dict[str, EmbeddingTable] = {}
    for dtype in ("float32", "bfloat16"):
        out = folder / f"{dtype}.npz"
        usual = ["--model", str(model), "--manifest", str(manifest), "--out", str(out), "--tables", "text,video,audio,av,tv,at"]
        done = commands.command(["embed", *usual, "--dtype", dtype, *commands.settings()])
        outcome.expect(done.status == 0, f"embed --dtype {dtype}: {done.err[-300:]}")
        tables[dtype] = read_embeddings(out)
    wide, narrow = (tables[dtype].tables for dtype in ("float32", "bfloat16"))
    cosines = [float((wide[name] * narrow[name]).sum(axis=1).min()) for name in wide]
    outcome.notes.append(f"bfloat16 against float32, {clips} clips, random weights: smallest cosine {min(cosines):.5f}")
    line = []
    for name, (query, gallery) in possible(wide).items():
        orders = [np.argsort(-(t[query] @ t[gallery].T), axis=1, kind="stable") for t in (wide, narrow)]
        top = 100 * float((orders[0][:, 0] == orders[1][:, 0]).mean())
        shared = [len(set(a[:10]) & set(b[:10])) / 10 for a, b in zip(*orders, strict=True)]
        line.append(f"{name} {top:.0f}/{100 * float(np.mean(shared)):.0f}")
    outcome.notes.append("queries that keep their nearest candidate, and share of the ten nearest kept, percent: " + ", ".join(line))
    outcome.tried.append(("directions compared between bfloat16 and float32", len(line)))
    outcome.expect(min(cosines) > 0.99, f"bfloat16 turned an embedding: cosine {min(cosines):.4f}")
