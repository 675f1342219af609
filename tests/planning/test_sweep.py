"""What a sweep tries and recommends. A stand-in says what fits: as many clips a device as the remat policy leaves room for."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from omni_jax.cli.config_file import read_config
from omni_jax.cli.main import main
from omni_jax.config import ConfigError
from omni_jax.parallel import batch_shards
from omni_jax.planning import plan, sweep
from omni_jax.planning.abstract import planned_batch
from omni_jax.planning.advice import OutOfMemory
from omni_jax.planning.chips import read_topology
from omni_jax.planning.programs import Memory, Program, Setting
from omni_jax.planning.timing import Timing
from omni_jax.train import step_kind
from tests.planning.test_programs import setting
from tests.repository import ROOT

CONFIG = str(ROOT / "configs/omniretriever_7b.py")
ROOM = {"layer": 8, "attention": 4, "dots": 1}  # clips a device
LIMIT = 15.75


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for libtpu: `room` says what fits. Returns what can be changed."""
    room: dict[str, Any] = {"clips": dict(ROOM), "refuses": True}

    def program(given: Setting, mesh: Any, count: int) -> Program:
        kind, shapes = planned_batch(given.config, given.preset, step_kind(count, given.recipe.losses))
        need = LIMIT * given.clips / batch_shards(mesh) / room["clips"][given.recipe.remat]
        if need > LIMIT and room["refuses"]:
            return Program("train", kind, shapes, refusal=OutOfMemory(need, LIMIT, (), "change something"))
        # Compiled as a run would be, what keeps the most is predicted to be the slowest.
        predicted = Timing(10.0 + sweep.REMATS.index(given.recipe.remat), 10.0, {}, 1e12, ()) if given.timed else None
        return Program("train", kind, shapes, memory=Memory(need, LIMIT, 1.0, 1.0), found=(), timing=predicted)

    monkeypatch.setattr(sweep, "train_program", program)
    monkeypatch.setattr(sweep, "planning_mesh", lambda topology, sizes, compiled: MESH(topology, sizes, compiled=False))
    monkeypatch.setattr(plan, "has_compiler", lambda: True)
    return room


MESH = sweep.planning_mesh


def small(**changes: Any) -> Setting:
    """Returns 256 clips a step as one pool on 16 chips, in blocks of 8."""
    given = setting("v5e:4x4", sizes=(1, 16, 1), clips=64, micro_batches=4, blocks=8)
    return dataclasses.replace(given, **changes)


def micro(given: Setting) -> Setting:
    return dataclasses.replace(
        given, recipe=dataclasses.replace(given.recipe, losses=dataclasses.replace(given.recipe.losses, negatives="micro"))
    )


def tried(given: Setting) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    return sweep.sweep(given, 1, said.append), said


def test_meshes_use_every_device_and_split_heads_evenly():
    for topology, sizes in [
        ("v5e:4x4", [(1, 16, 1), (1, 8, 2), (2, 8, 1)]),
        ("tpu7x:2x2x1", [(1, 8, 1), (1, 4, 2), (2, 4, 1)]),
        ("v5e:1x2", [(1, 2, 1), (1, 1, 2)]),
        ("v5e:1x1", [(1, 1, 1)]),
    ]:
        given = dataclasses.replace(small(), topology=read_topology(topology))
        assert [tuple(mesh.values()) for mesh in sweep.meshes(given)] == sizes
    decoder = dataclasses.replace(small().config.decoder, num_heads=7, num_kv_heads=7, hidden_size=7 * 128)
    odd = dataclasses.replace(small(), config=dataclasses.replace(small().config, decoder=decoder))
    assert [mesh["tensor"] for mesh in sweep.meshes(odd)] == [1, 1]
    two_slices = sweep.meshes(dataclasses.replace(small(), topology=read_topology("v5e:4x4", 2)))
    assert tuple(two_slices[0].values()) == (1, 16, 1)


def test_batches_keep_the_clips_of_an_update():
    assert list(sweep.batches(small(), 16)) == [(256, 1), (128, 2), (64, 4), (32, 8), (16, 16)]
    assert list(sweep.batches(small(clips=40, micro_batches=3), 8)) == [(120, 1), (40, 3), (24, 5), (8, 15)]
    assert list(sweep.batches(small(clips=4, micro_batches=1), 1)) == [(4, 1), (2, 2)]  # a clip alone has no other to exchange with


def test_pools_of_their_own_stay_as_they_are():
    assert list(sweep.batches(micro(small()), 16)) == [(64, 4)]
    assert list(sweep.batches(micro(small(clips=40)), 16)) == []


@pytest.mark.parametrize(
    ("topology", "clips", "blocks"),
    [("v5e:4x4", 256, 32), ("v5e:4x4", 64, 8), ("v5e:4x4", 48, 12), ("v5e:4x4", 16, 4), ("v5e:16x16", 256, 64), ("v5e:1x1", 3, 1)],
)
def test_blocks_are_as_large_as_given_and_whole_on_a_host(topology: str, clips: int, blocks: int):
    given = small(topology=read_topology(topology))
    made = sweep.whole_blocks(given, clips)
    assert made == blocks and clips % made == 0 and made % given.topology.hosts == 0 and clips // made > 1


def test_the_largest_micro_batch_that_fits_of_every_mesh_and_policy(compiler: dict[str, Any]):
    records, said = tried(small())
    fitting = [record for record in records if record["status"] == "fits"]
    assert len(said) == len(records) + sweep.FEW and records[: len(fitting)] == fitting
    shards = {(1, 16, 1): 16, (1, 8, 2): 8, (2, 8, 1): 16}
    best = {(tuple(r["choice"]["mesh"].values()), r["choice"]["remat"]): r["choice"]["micro_batch"] for r in fitting}
    assert best == {(mesh, remat): ways * ROOM[remat] for mesh, ways in shards.items() for remat in sweep.REMATS}
    # Larger ones were tried before, and none smaller.
    for record in records[len(fitting) :]:
        choice = record["choice"]
        assert choice["micro_batch"] > best[tuple(choice["mesh"].values()), choice["remat"]]
    assert all(r["choice"]["micro_batch"] * r["choice"]["micro_batches"] == 256 for r in records)


def test_the_best_few_are_compiled_as_a_run_and_ranked_by_predicted_time(compiler: dict[str, Any]):
    compiler["clips"] = {"layer": 16, "attention": 4, "dots": 8}
    records, _ = tried(small())
    fitting = [record for record in records if record["status"] == "fits"]
    seconds = [record["predicted_seconds"] for record in fitting[: sweep.FEW]]
    assert seconds == sorted(seconds) and not any("predicted_seconds" in record for record in fitting[sweep.FEW :])
    # Those that analysis takes for the fastest, of which the slowest to keep is none.
    others = [record["seconds"]["expected"] for record in fitting[sweep.FEW :]]
    assert others == sorted(others) and max(r["seconds"]["expected"] for r in fitting[: sweep.FEW]) <= others[0]
    # One micro-batch makes no second forward: that saves more than what "dots" keeps.
    assert (records[0]["choice"]["remat"], records[0]["choice"]["micro_batches"]) == ("layer", 1)
    compiler["clips"] = {"layer": 8, "attention": 8, "dots": 8}
    assert {record["choice"]["remat"] for record in tried(small())[0][: sweep.FEW]} == {"dots"}


def test_the_share_of_the_peak_is_the_one_asked_for(compiler: dict[str, Any]):
    half, whole = (sweep.sweep(small(), 1, lambda line: None, share)[sweep.FEW] for share in (0.5, 1.0))
    assert half["expected"]["utilisation"] == 0.5
    assert half["seconds"]["expected"] == pytest.approx(2 * whole["seconds"]["expected"])


def test_a_mesh_that_was_asked_for_is_the_only_one_tried(compiler: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert sweep_command("--mesh", "tensor=4") == 0
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("data=1,fsdp=4,tensor=4 ") for line in said[:-2]) and len(said) > 5
    assert "--config.mesh.tensor=4" in said[-1]


def test_clips_that_divide_over_no_mesh_are_refused(compiler: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"--sweep: 3 x 5 clips a step \(negatives=global\) divide over no mesh of v5e:4x4"):
        tried(small(clips=5, micro_batches=3, blocks=1))


def sweep_command(*words: str) -> int:
    batch = [
        "--config.losses.negatives=global",
        "--config.batch.micro_batch=64",
        "--config.batch.micro_batches=4",
        "--config.batch.blocks=8",
    ]
    return main(["compile", "--config", CONFIG, "--topology", "v5e:4x4", "--sweep", *batch, *words])


def test_the_command_recommends_flags_that_a_run_takes(compiler: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sweep.json"
    assert sweep_command("--json", str(out)) == 0
    said = capsys.readouterr()
    records = json.loads(out.read_text())["sweep"]
    assert said.err.count("\n") == len(records) + sweep.FEW and said.out.count(" clips/s predicted") == sweep.FEW
    line = said.out.splitlines()[-1]
    assert line.startswith("recommended: --config.")
    run = read_config(CONFIG, [word.removeprefix("--config.") for word in shlex.split(line)[1:]])
    choice = records[0]["choice"]
    assert {name: getattr(run.mesh, name) for name in choice["mesh"]} == choice["mesh"] and run.remat == choice["remat"]
    assert {name: getattr(run.batch, name) for name in ("micro_batch", "micro_batches", "blocks")} == {
        name: choice[name] for name in ("micro_batch", "micro_batches", "blocks")
    }


@pytest.mark.parametrize(("refuses", "change"), [(True, "change something"), (False, "or a chip with more memory")])
def test_where_nothing_fits_the_command_says_what_to_change(
    refuses: bool, change: str, compiler: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    compiler.update(clips={"layer": 0.5, "attention": 0.25, "dots": 0.125}, refuses=refuses)
    assert sweep_command() == 2
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("nothing fits: ") and said[-1].endswith(change)
    assert all("out of memory" in line and "needs" in line for line in said[:-2])
    needs = [float(line.split("needs ")[1].split()[0]) for line in said[:-2]]
    assert needs == sorted(needs) and needs[0] == 2 * LIMIT and "remat=layer" in said[0]  # the nearest to fitting
