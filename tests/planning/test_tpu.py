"""With libtpu and no TPU: the real programs compile for every kind of chip, and the compiler's word is read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.cli.config_file import planned_model, read_config
from omni_jax.cli.main import main
from omni_jax.planning import plan
from omni_jax.planning.chips import CHIPS, read_topology
from omni_jax.planning.devices import planning_mesh
from omni_jax.planning.timing import KERNELS, read_timing
from tests.repository import ROOT

pytestmark = pytest.mark.tpu

TINY = str(ROOT / "configs/tiny.py")
# What trains at 7B, in the types it trains in: less to compile than a whole model from scratch.
ADAPTER = ("trainable.recipe=adapter", "losses.pairs=cycle", "model.dtype=bfloat16", "remat=layer", "batch.micro_batch=8")


def planned(topology: str, *changes: str, programs: tuple[str, ...] = ("train",), count: int = 1, slices: int = 1) -> dict[str, Any]:
    run = read_config(TINY, [*ADAPTER, *changes])
    model, _ = planned_model(run.model)
    return plan.make(plan.Request(run, model, topology, slices), programs, (count,))


@pytest.mark.parametrize(
    ("topology", "remat"),
    [("v4:2x2x1", "layer"), ("v5e:2x2", "layer"), ("v5p:2x2x1", "attention"), ("v6e:2x2", "offload"), ("tpu7x:2x2x1", "layer")],
)
def test_a_step_compiles_for_every_kind_of_chip(topology: str, remat: str):
    made = planned(topology, f"remat={remat}")
    (step,) = made["programs"]
    assert step["status"] == "fits" and made["attention"] == "splash"
    memory = step["memory_gib"]
    assert 0 < memory["arguments"] < memory["peak"] < memory["limit"]
    assert (memory["host"] > 0) == (remat == "offload")  # the layers' inputs wait there
    found = step["collectives"]
    assert {c["kind"] for c in found} >= {"all-gather", "all-to-all"} and {c["group"] for c in found} <= set(range(2, 9))
    assert not any(c["across"] for c in found)
    assert step["seconds"]["network"] == 0 < step["seconds"]["interconnect"]
    notes = [note for note in made["notes"] if not note.startswith("compiled quickly")]
    assert bool(notes) == topology.startswith("tpu7x")  # says with which options


def test_gradients_cross_slices_and_weights_do_not():
    made = planned("v5e:2x2", "batch.micro_batches=2", "batch.blocks=2", slices=2, count=0)
    (step,) = made["programs"]
    across = [c for c in step["collectives"] if c["across"]]
    assert made["chips"] == 8 and step["status"] == "fits"
    assert {c["group"] for c in across} == {2} and any(c["kind"] in ("all-reduce", "reduce-scatter") for c in across)
    assert sum(c["moved"] for c in across) < 0.2 * sum(c["moved"] for c in step["collectives"])
    assert step["seconds"]["network"] > 0


def test_the_embedding_pass_and_the_evaluator_compile():
    made = planned("v5e:2x2", programs=("embed", "evaluate"))
    names = {p["program"]: p["status"] for p in made["programs"]}
    assert {"embed/vision", "embed/audio", "embed/beats", "embed/rows"} < names.keys() and any(n.startswith("evaluate/") for n in names)
    assert set(names.values()) == {"fits"}


def test_the_7b_embeds_on_one_chip_of_16_gb_in_int8(tmp_path: Path):
    """With the weights of all programs resident, and two GiB to spare."""
    out = tmp_path / "plan.json"
    given = ["--config", str(ROOT / "configs/omniretriever_7b.py"), "--topology", "v5e:1x1", "--programs", "embed", "--weights", "int8"]
    assert main(["compile", *given, "--json", str(out)]) == 0
    made = json.loads(out.read_text())
    assert made["held"] == "int8" and 8.5 * 2**30 < made["weights"]["bytes"] < 9 * 2**30
    peaks = {program["program"]: program["memory_gib"]["peak"] for program in made["programs"]}
    assert peaks.keys() == {"embed/vision", "embed/audio", "embed/beats", "embed/rows"}
    assert min(peaks.values()) > 8.7 and max(peaks.values()) < 15.75 - 2


def test_a_step_over_int8_gathers_int8():
    whole, held = (planned("v5e:2x2", *changes)["programs"][0] for changes in ((), ("model.weights=int8",)))
    assert held["status"] == "fits" and held["memory_gib"]["arguments"] < whole["memory_gib"]["arguments"]
    gathered = {c["shape"].split("[")[0]: c["moved"] for c in held["collectives"] if c["kind"] == "all-gather"}
    assert gathered["s8"] > 0
    moved = [sum(c["moved"] for c in one["collectives"] if c["kind"] == "all-gather") for one in (whole, held)]
    assert moved[1] < 0.7 * moved[0]


def test_the_command_compiles_a_part_of_a_host_as_a_run_would_and_keeps_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table, out = tmp_path / "table.json", tmp_path / "sub/plan.json"
    given = ["--config", TINY, "--topology", "v5e:1x1", "--programs", "train", "--kinds", "1", "--table", str(table), "--json", str(out)]
    changes = [f"--config.{change}" for change in (*ADAPTER, "batch.micro_batch=2")]
    assert main(["compile", "--full-effort", *given, *changes]) == 0
    said = capsys.readouterr().out
    assert "of 15.75 GiB a device at the peak (compiler estimate)" in said and "libtpu is not installed" not in said
    (step,) = json.loads(out.read_text())["programs"]
    assert step["collectives"] == []
    assert 0 < step["share_of_peak"] < 1 and step["ideal_seconds"] / step["predicted_seconds"] == pytest.approx(step["share_of_peak"])
    assert len(step["by_source"]) == 20 and sum(one["share"] for one in step["by_source"]) < 1
    # Rows of the model, by file and line; attention from its operations.
    assert any(one["source"].startswith(("decoder.py:", "layers.py:")) for one in step["by_source"])
    assert step["without_estimate"][KERNELS] > 0
    assert "by the compiler's estimates" in said and "assumed" not in said and "predicted by the compiler" in said
    (entry,) = json.loads(table.read_text())
    assert entry["programs"][0]["status"] == "fits" and "| v5e:1x1 | 1 |" in table.with_suffix(".md").read_text()


def test_a_sweep_recommends_what_was_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sweep.json"
    given = ["--config", TINY, "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--kinds", "1", "--json", str(out)]
    assert main(["compile", "--sweep", *given, *(f"--config.{change}" for change in ADAPTER)]) == 0
    said = capsys.readouterr()
    records = json.loads(out.read_text())["sweep"]
    assert {r["choice"]["remat"] for r in records} == {"layer", "attention", "dots"}
    # Quickly for memory, and once more for time.
    assert said.err.count(" not timed\n") == 3 == said.err.count(" of peak\n")
    seconds = [record["predicted_seconds"] for record in records]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for record in records:
        assert record["status"] == "fits" and (record["choice"]["micro_batch"], record["choice"]["micro_batches"]) == (8, 1)
    peaks = {r["choice"]["remat"]: r["memory_gib"]["peak"] for r in records}
    assert peaks["layer"] < peaks["dots"]
    last = said.out.splitlines()[-1]
    assert last.startswith("recommended: --config.mesh.data=1") and f"--config.remat={records[0]['choice']['remat']} " in last


def test_what_does_not_fit_says_what_to_change(capsys: pytest.CaptureFixture[str]):
    """The 7B step that keeps every residual: refused before any time is spent on it."""
    given = ["--config", str(ROOT / "configs/omniretriever_7b.py"), "--topology", "v5e:4x4", "--programs", "train", "--kinds", "1"]
    changes = {"losses.negatives": "global", "remat": "none", "batch.micro_batch": 256, "batch.micro_batches": 1, "batch.blocks": 32}
    assert main(["compile", *given, *(f"--config.{name}={value}" for name, value in changes.items())]) == 2
    said = capsys.readouterr().out
    assert "hard negative audio, alone text+video: out of memory" in said and "GiB where 15.75 are (compiler estimate)" in said
    assert "change        remat 'none' keeps residuals of every decoder layer: set remat='layer'" in said


def test_a_grid_that_the_compiler_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["compile", "--config", TINY, "--topology", "v5e:3x5", "--programs", "train"]) == 2
    assert "topology v5e:3x5: libtpu refuses it" in capsys.readouterr().err


def test_a_product_comes_near_the_peak_of_every_chip_and_never_passes_it():
    """The clock and the matrix units of each, against the compiler's own estimate."""
    for chip in CHIPS.values():
        topology = read_topology(f"{chip.name}:{'x'.join(['2', '2', '1'][: chip.dimensions])}")
        mesh = planning_mesh(topology, {"data": 1, "fsdp": topology.devices, "tensor": 1}, compiled=True)
        places = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
        sizes = (4096 * topology.devices, 4096), (4096, 4096)
        given = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=place) for size, place in zip(sizes, places, strict=True)]
        compiled = jax.jit(jnp.matmul, out_shardings=places[0]).lower(*given).compile(compiler_options=dict(chip.compiler))
        timing = read_timing(compiled.as_text() or "", chip)
        assert timing is not None and timing.multiplied == 2 * 4096**3
        ideal = timing.multiplied / (chip.teraflops * 1e12 / chip.devices)
        assert 0.8 < ideal / timing.estimated <= 1, chip.name  # what is prefetched before the product hides behind nothing here


def test_ctrl_c_leaves_a_compilation_at_once():
    words = ["--config", "configs/omniretriever_7b.py", "--topology", "v5e:4x4", "--programs", "train", "--kinds", "1", "--full-effort"]
    run = subprocess.Popen([sys.executable, "-m", "omni_jax.cli.main", "compile", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    line = run.stderr.readline()  # a progress line: the compiler is at work, for minutes
    assert line.startswith("compile: 0 programs") and "train" in line
    start = time.monotonic()
    run.send_signal(signal.SIGINT)
    rest = run.stderr.read()
    assert run.wait() == 130 and rest.endswith("omni-jax: interrupted\n") and time.monotonic() - start < 10
