"""Two processes score as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax.retrieval import evaluate, write_embeddings
from omni_jax.types import EmbeddingTable

PROCESSES = 2
CASES = 220  # random ones, against the naive ranker; float32 cannot decide a few, which are left out
LIMIT = 420  # seconds; a process whose peer is lost must not wait for the test's own limit

SCRIPT = """
import json, sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from jax.sharding import Mesh
from omni_jax.retrieval import evaluate, read_embeddings
tables = read_embeddings(sys.argv[4])
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("rows",))
result = evaluate(tables, ties="average", chunk=16, mesh=mesh)
from omni_jax.retrieval.ranks import prepare, rank_pair
from tests.retrieval import naive
from tests.retrieval.random_cases import as_dict, random_case
checked = 0
for seed in range(int(sys.argv[5])):
    rng = np.random.default_rng(seed)
    n, m = (int(x) for x in rng.integers(1, 21, size=2))
    case = random_case(rng, n, m, ("gaussian", "signs")[seed % 2], seed % 3 == 0)
    if case is None:
        continue
    forward, backward = rank_pair(prepare(case.a), prepare(case.b), case.relevance, chunk=(4, 8)[seed % 2], mesh=mesh)
    assert as_dict(forward) == naive.ranks(case.scores, case.left, case.right), seed
    assert as_dict(backward) == naive.ranks(case.scores.T, case.right, case.left), seed
    checked += 1
result["cases"] = checked
print(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_device_and_the_naive_ranker(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(203, 24))
    tables = {name: (shared + rng.normal(size=shared.shape)).astype(np.float32) for name in ("text", "video", "audio", "av", "tv", "at")}
    tables["video"][40:60] = tables["video"][7]
    write_embeddings(tmp_path / "tables.npz", EmbeddingTable(tuple(map(str, range(203))), tables))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", SCRIPT, port, str(PROCESSES)]
    root = str(Path(__file__).parents[2])
    running = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path / "tables.npz"), str(CASES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
        )
        for i in range(PROCESSES)
    ]
    try:
        outcomes = [process.communicate(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    want = json.loads(json.dumps(evaluate(tables, ties="average", chunk=16)))
    for process, (out, err) in zip(running, outcomes, strict=True):
        assert process.returncode == 0, err
        found = json.loads(out.splitlines()[-1])
        assert found.pop("cases") >= 200
        assert found == want  # gloo prints lines of its own before
