"""`omni-jax smoke`: the devices, the mesh, one step of a small config and one checkpoint, before hours are spent on them."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from omni_jax.cli.config_file import add_config_arguments, read_config
from omni_jax.cli.status import DONE
from omni_jax.cli.train import add_process_arguments, join
from omni_jax.io import lock
from omni_jax.io.messages import as_input_error
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.data.synthetic import SyntheticConfig

EXAMPLE = "omni-jax smoke --workdir gs://bucket/runs/omni7b --coordinator auto"
CONFIG = "tiny"
FOLDER = "smoke"  # in the workdir; removed again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, default=CONFIG)
    parser.add_argument(
        "--workdir", type=epath.Path, required=True, metavar="DIR", help="workdir of the planned run, on storage that all hosts share"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices the devices are in (default: 1)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="local folder for a few synthetic clips (default: a temporary one)")
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Makes one step and one checkpoint in a folder of the workdir, says what was seen, removes the folder, and returns 0."""
    began = time.monotonic()
    join(args)

    import jax

    from omni_jax.api.training import TrainCallbacks, run_training
    from omni_jax.data.synthetic import write_set
    from omni_jax.parallel import any_process, barrier, run_on_process_0
    from omni_jax.train.checkpoint import list_steps
    from omni_jax.train.workdir import CHECKPOINTS

    here, processes, devices = jax.process_index(), jax.process_count(), len(jax.devices())
    kind = jax.devices()[0].device_kind
    print(f"process {here} of {processes} on {socket.gethostname()}: {jax.local_device_count()} of {devices} devices, {kind}", flush=True)
    sizes = batch_sizes(devices, processes)
    with _alone(args.scratch or Path(tempfile.gettempdir()) / f"omni_jax_smoke-{os.getuid()}") as scratch:
        folder = scratch / f"clips-{sizes['micro_batch']}"
        made = write_set(folder, clips_for(sizes["micro_batch"]), workers=min(8, os.cpu_count() or 1))
    changes = {
        **{f"batch.{name}": value for name, value in sizes.items()},
        **{f"mesh.{name}": value for name, value in mesh_sizes(devices, jax.local_device_count(), args.slices).items()},
        "data.train": made.train,
        "data.workers": 0,
        "evaluation.manifest": "",
        "evaluation.every": 0,
        "steps": 1,
        "checkpoint.every": 1,
    }
    config = read_config(args.config, [*(f"{name}={value}" for name, value in changes.items()), *args.overrides])
    workdir = args.workdir / FOLDER
    losses: list[float] = []

    def log(line: str) -> None:
        if here == 0:
            print(line, file=sys.stderr)

    def remove() -> None:
        workdir.rmtree(missing_ok=True)

    _together(run_on_process_0(remove))
    run_training(config, workdir, TrainCallbacks(log, lambda *_: None, lambda _, row: losses.append(row["loss"]), lambda: False))
    blind = list_steps(workdir / CHECKPOINTS) != [1]
    if any_process(blind):
        who = f"process {here} on {socket.gethostname()} does not see" if blind else "another process does not see"
        raise InputError(f"{args.workdir}: {who} the checkpoint that was written there; name a folder on storage that every host shares")
    if any_process(not all(map(math.isfinite, losses))):
        raise InputError(f"the step gave a loss of {losses}: the devices do not compute as they should")
    barrier("smoke")
    _together(run_on_process_0(remove))
    if here == 0:
        mesh = " x ".join(f"{name}={size}" for name, size in config.mesh.__dict__.items())
        print(f"smoke: passed: {processes} processes, {devices} devices, mesh {mesh}; one step, loss {losses[0]:.3f}; ", end="")
        print(f"a checkpoint that every process sees in {args.workdir}; {time.monotonic() - began:.0f} s")
    return DONE


def batch_sizes(devices: int, processes: int) -> dict[str, int]:
    """Returns the config's batch section: at least two clips of every process, a block each, and a whole number on every device."""
    clips = devices if devices >= 2 * processes else 2 * devices
    return {"micro_batch": max(clips, 2), "micro_batches": 1, "blocks": processes}


def mesh_sizes(devices: int, local: int, slices: int) -> dict[str, int]:
    """Returns the config's mesh section: parameters split over the devices of a process, clips over all.

    Raises:
      InputError: when the devices are not `slices` equal parts.
    """
    if slices < 1 or devices % slices or (devices // slices) % math.gcd(local, devices // slices):
        raise InputError(f"--slices {slices}: {devices} devices are not so many equal slices")
    fsdp = math.gcd(local, devices // slices)
    return {"slices": slices, "data": devices // slices // fsdp, "fsdp": fsdp, "tensor": 1}


def clips_for(micro_batch: int) -> SyntheticConfig:
    """Returns a set of clips that fills a micro-batch with different captions."""
    from omni_jax.data.synthetic import COMBINATIONS, SyntheticConfig

    if micro_batch >= COMBINATIONS:
        raise InputError(f"{micro_batch} devices or more: the synthetic clips make batches of at most {COMBINATIONS - 1}")
    return SyntheticConfig(clips=1, held_out=1, combinations=micro_batch + 1)


def _together(error: Exception | None) -> None:
    if error is not None:
        raise InputError(str(error))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Makes a local folder and holds it against other processes of this machine."""
    with as_input_error(f"{folder}: cannot be written", "name another --scratch"):
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / "lock", wait=True)
    with held or contextlib.nullcontext():
        yield folder
