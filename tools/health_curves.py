"""Writes the curves of docs/guides/training_health.md: a good run and three bad ones of configs/ablation.py, all losses, 400 steps each.

python -m tools.health_curves OUT    OUT keeps the runs; those that are finished there are not made again
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from omni_jax.api.shared import Shared
from omni_jax.api.training import TrainCallbacks, run_training
from omni_jax.api.training_curves import read_rows
from omni_jax.cli.config_file import read_config
from omni_jax.data.synthetic_parts import PartsConfig, write_parts
from tests.repository import ROOT

PAGE = ROOT / "docs/guides/training_health.md"
BEGIN, END = "<!-- curves -->", "<!-- end of the curves -->"
STEPS, WINDOW, AT = 400, 10, (10, 50, 100, 400)  # a figure is the mean of the WINDOW steps before it
RUNS: dict[str, tuple[tuple[str, ...], PartsConfig]] = {
    "good": ((), PartsConfig()),
    "temperature 0.002": (("losses.temperature=0.002",), PartsConfig()),
    "learning rate 0.3": (("optimizer.learning_rate=0.3",), PartsConfig()),
    "leaking captions": ((), PartsConfig(leak=True)),
}
METRICS = (
    *("L_A", "L_D", "L_T", "grad_norm", "alignment_text", "alignment_video", "uniformity_text", "uniformity_video"),
    *("effective_rank_text", "effective_rank_video", "gap_text_video", "hard_share_video", "teacher_margin_text", "teacher_margin_video"),
)


def curves(out: Path) -> dict[str, list[dict[str, float]]]:
    """Returns run -> the metrics of its steps."""
    found, shared = {}, Shared(keep_features=True)
    for name, (changes, parts) in RUNS.items():
        run = read_config("ablation", [f"steps={STEPS}", "seed=0", *changes])
        clips = write_parts(out / ("leaking-clips" if parts.leak else "clips"), parts, run.data.resolved_preset())["train"]
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=str(clips.absolute())))
        callbacks = TrainCallbacks(log=lambda line: None, begin=lambda *at: None, update=lambda *at: None, stopping=lambda: False)
        workdir = out / name.replace(" ", "-")
        run_training(run, workdir, callbacks, shared)
        found[name] = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Returns a line a metric, and a column a run with the values at the steps AT."""
    lines = [f"| metric | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for metric in METRICS:
        cells = []
        for rows in found.values():
            seen = [[row[metric] for row in rows if at - WINDOW < row["step"] <= at and metric in row] for at in AT]
            cells.append(", ".join(f"{sum(values) / len(values):.2f}" for values in seen))
        lines.append(f"| `{metric}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    made = table(curves(parser.parse_args().out))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
