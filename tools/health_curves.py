"""Writes the curves of docs/guides/training_health.md: a good run and three bad ones of configs/ablation.py, all losses, 300 steps each.

python -m tools.health_curves OUT    OUT keeps the runs; those that are finished there are not made again
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from omni_jax.ablation.runs import SYNTHETIC
from omni_jax.api.shared import Shared
from omni_jax.api.training import TrainCallbacks, run_training
from omni_jax.cli.config_file import read_config
from omni_jax.config import Preset
from omni_jax.data.clip_index import INDEX, write_index, write_rows
from omni_jax.data.shards import ShardWriter, encode_clip, extents, index_row, shard_name, write_dataset_info
from omni_jax.data.sources import open_source
from omni_jax.data.synthetic_parts import PartsConfig, write_parts
from tests.house import ROOT

PAGE = ROOT / "docs/guides/training_health.md"
BEGIN, END = "<!-- curves -->", "<!-- end of the curves -->"
STEPS, WINDOW, AT = 300, 10, (10, 50, 100, 200, 300)  # a figure is the mean of the WINDOW steps before it
RUNS = {
    "good": (),
    "temperature 0.002": ("losses.temperature=0.002",),
    "learning rate 1": ("optimizer.learning_rate=1.0",),
    "leaking captions": (),
}
CLIPS = PartsConfig(train=2048)
METRICS = (
    *("loss", "L_A", "L_D", "L_T", "grad_norm", "alignment_text", "alignment_video", "uniformity_text", "uniformity_video"),
    *("effective_rank_text", "effective_rank_video", "gap_text_video", "hard_share_video", "hard_share_text"),
    *("teacher_margin_text", "teacher_margin_video"),
)


def leaking(folder: Path, clean: Path, preset: Preset) -> Path:
    """Writes the clips of a prepared folder with captions that end in the clip's own number, as a file name would; returns the folder."""
    if not (folder / INDEX).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source, file = open_source(clean, preset), folder / shard_name(0, 1)
        writer, rows = ShardWriter(file), []
        try:
            for number in range(len(source)):
                clip = source.load(number)
                clip = dataclasses.replace(clip, record=dataclasses.replace(clip.record, text=f"{clip.record.text} clip{number}"))
                writer.write(encode_clip(clip))
                rows.append(index_row(clip))
            writer.finish()
        finally:
            writer.discard()
        write_dataset_info(folder, [len(rows)], [file.stat().st_size])
        write_index(folder, preset, write_rows(folder, [(rows, extents(file))]))
    return folder


def curves(out: Path) -> dict[str, list[dict[str, float]]]:
    """Returns run -> the metrics of its steps."""
    found, shared = {}, Shared(keep_features=True)
    for name, changes in RUNS.items():
        run = read_config("ablation", [f"steps={STEPS}", "seed=0", *changes])
        assert run.data.train == SYNTHETIC
        preset = run.data.resolved_preset()
        clips = write_parts(out / "clips", CLIPS, preset)["train"]
        if name == "leaking captions":
            clips = leaking(out / "leaking", clips, preset)
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=str(clips.absolute())))
        callbacks = TrainCallbacks(log=lambda line: None, begin=lambda *at: None, update=lambda *at: None, stopping=lambda: False)
        run_training(run, out / name.replace(" ", "-"), callbacks, shared)
        lines = (out / name.replace(" ", "-") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [row for row in map(json.loads, lines) if "loss" in row]
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Returns a table a run: a line a metric, a column a step."""
    parts = []
    for name, rows in found.items():
        lines = [f"**{name.capitalize()}**", "", f"| step | {' | '.join(map(str, AT))} |", "|---" * (len(AT) + 1) + "|"]
        for metric in METRICS:
            # A step has the metrics of the modalities that it exchanges or embeds.
            cells = []
            for at in AT:
                seen = [row[metric] for row in rows if at - WINDOW < row["step"] <= at and metric in row]
                cells.append(f"{sum(seen) / len(seen):.2f}" if seen else "")
            lines.append(f"| `{metric}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    made = table(curves(parser.parse_args().out))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
