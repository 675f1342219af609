"""`omni-jax demo`: parity with PyTorch on a tiny checkpoint, then a small model that learns from clips made on the spot."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "compare a tiny checkpoint with PyTorch, then train a small model on synthetic clips and score clips it never saw"
EXAMPLE = "omni-jax demo --out demo_out"

DEVICES = 2  # simulated, where there is no accelerator: one for each of two cores
PATIENCE_S = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="folder for the results (default: %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--parity", action="store_true", help="the comparison with PyTorch alone")
    only.add_argument("--ablation", action="store_true", help="train with L_A, with L_A + L_D and with all three losses, and compare")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit status.

    Raises:
      InputError: when the demo's data are not at hand, or --out holds something else.
    """
    # Before jax is imported. NumPy's threads would fight with the step for the cores: features are small and many.
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(DEVICES))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A simulated device that gets no core for 40 s would otherwise end the process.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_collective_call_terminate_timeout_seconds={PATIENCE_S} {os.environ.get('XLA_FLAGS', '')}".strip()
    from omni_jax.cli import learning, parity

    if args.ablation:
        return learning.ablate(args.out, learning.DEMO)
    status = parity.compare_with_reference(args.out)
    return status if status or args.parity else learning.learn(args.out, learning.DEMO)
