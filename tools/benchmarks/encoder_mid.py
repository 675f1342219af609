"""Speed of the encoder on two CPU threads beside the torch thinker of the `transformers` package: same clips, weights and work.

Both sides compute the whole encoder of WAVE (towers, BEATs, bridge, interleaved prompts, decoder, all-layer fusion head, no `lm_head`) on
the same features; the thinker has no BEATs, so a plain torch one is added. Making prompts and batches from the features is within
the time on both sides. The first figures are one prompt a clip (table tva), batch 1 and batch 8; the others all seven tables of a clip,
where omni_jax runs each tower once and shares media prefixes, beside torch encoding every table on its own and torch keeping the towers'
outputs.

Run alone: python -m tools.benchmarks --only encoder_mid
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.config import TABLE_MODALITIES, TABLES, ModelConfig
from omni_jax.towers.work import FlopCount
from omni_jax.types import Features
from tools.benchmarks import mid_size
from tools.benchmarks.timing import PAIRS, Pairs, clock, interleave, product_rates

THREADS = 2
BATCH = 8
ALONE = 4  # clips of the case with batch 1
TABLE_CLIPS = 2  # clips of the cases with seven tables
LARGEST_DIFFERENCE = 1e-4  # of the largest entry: both sides are float32


class Theirs:
    """The torch thinker."""

    def __init__(self, encoder: Any):
        from tools.benchmarks.thinker import Thinker

        self.config: ModelConfig = encoder.config
        self.thinker = Thinker(self.config, mid_size.checkpoint_weights(encoder))

    def embed(self, clips: Sequence[Features], tables: Sequence[str], *, keep_towers: bool = False) -> dict[str, np.ndarray]:
        """Returns table -> (N, D); the towers run for every table, or once where their outputs are kept."""
        prompts = mid_size.sequences(clips, tables, self.config)
        kept = self.thinker.media(clips) if keep_towers else None
        made = {}
        for table in tables:
            modalities = TABLE_MODALITIES[table]
            media = kept or self.thinker.media(clips, video="v" in modalities, audio="a" in modalities)
            made[table] = self.thinker.embed([p[table] for p in prompts], media)
        return made


def run(pairs: int = PAIRS, config: ModelConfig | None = None, batch: int = BATCH, **shapes: Any) -> dict[str, Any]:
    """Returns ratios (torch's time over ours), seconds, operations and rates, and prints them.

    Args:
      config: the mid-size settings unless told otherwise; `shapes` go to `mid_size.synthetic_clips`.

    Raises:
      AssertionError: where the two sides' embeddings differ, for then their work is not equal.
    """
    import torch

    torch.set_num_threads(THREADS)
    config = config or mid_size.mid_config()
    encoder = mid_size.random_encoder(config)
    features = mid_size.synthetic_clips(config, batch, **shapes)
    ours, theirs = mid_size.Ours(encoder), Theirs(encoder)
    # Case: tables, clips, batch size.
    cases: dict[str, tuple[Sequence[str], int, int]] = {
        "tva_batch_1": (("tva",), min(ALONE, batch), 1),
        f"tva_batch_{batch}": (("tva",), batch, batch),
        "seven_tables": (TABLES, min(TABLE_CLIPS, batch), TABLE_CLIPS),
        "seven_tables_towers_kept": (TABLES, min(TABLE_CLIPS, batch), TABLE_CLIPS),
    }
    results: dict[str, Any] = {"parameters": mid_size.parameter_count(encoder), "threads": THREADS}
    print(f"{results['parameters'] / 1e6:.0f} M parameters, float32, {THREADS} threads; towers, BEATs, bridge, decoder, fusion head")

    def parts(clips: int, size: int) -> list[list[Features]]:
        return [features[i : min(i + size, clips)] for i in range(0, clips, size)]

    results["first_calls_seconds"] = clock(lambda: [ours.embed(p, tables) for tables, n, size in cases.values() for p in parts(n, size)])
    print(f"first calls, compiling {len(ours.runner.programs)} programs: {results['first_calls_seconds']:.1f} s, not counted below")
    few = features[: min(TABLE_CLIPS, batch)]
    results["difference"] = _difference(ours.embed(few, TABLES), theirs.embed(few, TABLES))
    print(f"largest difference between the embeddings of the two sides: {results['difference']:.1e} of the largest entry")
    results["matrix_product_gflops"] = product_rates()
    print("matrix product: " + ", ".join(f"{side} {rate:.0f} GFLOP/s" for side, rate in results["matrix_product_gflops"].items()))
    for name, (tables, clips, size) in cases.items():
        kept = name.endswith("kept")
        work = sum((ours.work(part, tables) for part in parts(clips, size)), FlopCount())
        timed = interleave(
            lambda: [ours.embed(part, tables) for part in parts(clips, size)],  # noqa: B023 (called before the next case)
            lambda: [theirs.embed(part, tables, keep_towers=kept) for part in parts(clips, size)],  # noqa: B023
            pairs,
        )
        results[name] = _report(name, timed, work, clips)
    return results


def _difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    worst = max(float(np.abs(ours[t] - theirs[t]).max() / np.abs(theirs[t]).max()) for t in ours)
    if not worst <= LARGEST_DIFFERENCE:
        raise AssertionError(f"the two sides differ by {worst:.1e} of the largest entry; they do not do the same work")
    return worst


def _report(label: str, timed: Pairs, work: FlopCount, clips: int) -> dict[str, float]:
    """One case as figures and as a line. Both rates divide the operations that the prompts need, so that padding earns nothing."""
    ours, theirs = timed.seconds
    figures = {
        "ratio": timed.ratio,
        "ours_seconds_per_clip": ours / clips,
        "torch_seconds_per_clip": theirs / clips,
        "gflop_needed_per_clip": work.needed / clips / 1e9,
        "padding": work.padding,
        "ours_gflops": work.needed / ours / 1e9,
        "torch_gflops": work.needed / theirs / 1e9,
    }
    print(
        f"{label}: {figures['ratio']:.2f}x torch; a clip takes {ours / clips:.2f} s and {theirs / clips:.2f} s and needs "
        f"{work.needed / clips / 1e9:.0f} GFLOP (padding is {100 * work.padding:.1f} % of what we compute); "
        f"{figures['ours_gflops']:.0f} and {figures['torch_gflops']:.0f} GFLOP/s",
        flush=True,
    )
    return figures
