"""What commands that can work on a Ray cluster share: their arguments, and what those come to."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from omni_jax.cli.argtypes import positive
from omni_jax.config import Preset
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.api.weights import ModelSource
    from omni_jax.engines.ray_embed import RayEmbedding


def add_ray_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster to work on: 'auto' on one of its nodes, HOST:PORT of its head, 'local' for one of --workers CPUs here",
    )


def add_actor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--actors", type=positive(int), metavar="N", help="with --ray: most models to load (default: as many as fit)")
    parser.add_argument(
        "--actor-resources",
        type=_resources,
        default={},
        metavar="NAME=N,...",
        help="with --ray: what a model needs, as TPU=4 or GPU=1 (default: all TPU chips of a host, one GPU, or a node without either)",
    )


def check_ray(args: argparse.Namespace) -> None:
    """Raises InputError where the arguments do not go together or the cluster does not answer; without --ray nothing is looked at."""
    if args.ray is None:
        for option in ("actors", "actor_resources"):
            if getattr(args, option, None):
                raise InputError(f"--{option.replace('_', '-')}: is for models on a cluster; add --ray ADDRESS or leave it out")
        return
    from omni_jax.engines.ray_cluster import LOCAL, check_address

    if args.ray != LOCAL and args.workers is not None:
        raise InputError(f"--workers {args.workers}: a cluster decodes on all CPUs that it has; leave it out, or choose --ray local")
    if args.workers == 0:
        raise InputError("--workers 0: decodes in this process, which Ray does not use; give 1 or more")
    check_address(args.ray)


def local_cpus(args: argparse.Namespace) -> int:
    """Returns the CPUs that a local cluster is given: --workers, or one less than the cores."""
    return args.workers or max(1, len(os.sched_getaffinity(0)) - 1)


def embedding_on_ray(args: argparse.Namespace, source: ModelSource, chosen: Preset) -> RayEmbedding:
    """Returns what `embed` takes in place of a loaded model."""
    from omni_jax.engines.ray_embed import RayEmbedding

    return RayEmbedding(
        address=args.ray,
        local_cpus=local_cpus(args),
        source=source,
        dtype=args.dtype,
        weights=args.weights,
        preset=chosen,
        actors=args.actors,
        resources=args.actor_resources,
    )


def _resources(text: str) -> dict[str, float]:
    found = {}
    for pair in text.split(","):
        name, _, number = pair.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            number = ""
        if not name.strip() or not number or not 0 < found[name.strip()] < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N,... with numbers above 0, as TPU=4")
    return found
