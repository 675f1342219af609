"""From clips as people have them to a trained model: other sizes, rates, containers and languages, and every tenth clip broken."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.data import synthetic_media
from omni_jax.data.synthetic import combination
from tests.train.tiny_run import CONFIG, command, environment, finish

pytestmark = [pytest.mark.jit, pytest.mark.slow]

CLIPS, KINDS = 220, 10
SOUNDS = (
    "dröhnt|hums low|低沉|يهمس",
    "singt|sings|歌唱|يغني",
    "summt|buzzes on|嗡嗡作响|يطن",
    "pfeift|whistles|吹口哨|يصفر",
    "klirrt|rattles|叮当响|يقعقع",
)
SHAPES = ("Scheibe|disc|圆盘|قرص", "Ring|ring|圆环|حلقة", "Kreuz|cross|十字|صليب", "Brett|plank|木板|لوح", "Säule|pillar|柱子|عمود")
FORMS = (
    "Eine Aufnahme: {} {}",
    "A phone video. {}, {}; people talk somewhere behind the camera, and the wind blows now and then",
    "{}{}",
    "{} {} 🎬",
)
CONTAINERS = ("mp4", "mov", "mkv", "mp4")


def caption(number: int, values: tuple[int, int, int, int]) -> str:
    language = number % 4
    shape, sound = (words[value].split("|")[language] for words, value in zip((SHAPES, SOUNDS), values[:2], strict=True))
    return f"{FORMS[language].format(shape, sound)} ({number})"


def record(path: Path, number: int, values: tuple[int, int, int, int], audio: bool = True) -> None:
    """Writes a drawn picture of any shape, and sound as a phone records it: another rate, echo, mains hum, too loud at times."""
    rng = np.random.default_rng(number)
    side, rate = (56, 64, 96)[number % 3], (44_100, 48_000, 16_000)[number % 3]
    frames = synthetic_media.picture(values, rng, 8, side)[:, : side - 8 * (number % 2)]
    dry = synthetic_media.sound((values[1], values[0], values[2], values[3]), rng, 1.0)
    room = np.exp(-np.arange(1600) / 300) * rng.standard_normal(1600) * 0.05
    wet = np.convolve(dry, np.concatenate([[1.0], room]))[: len(dry)] + 0.01 * np.sin(2 * np.pi * 50 * np.arange(len(dry)) / 16_000)
    samples = np.interp(np.arange(rate) / rate, np.arange(len(wet)) / 16_000, np.clip(rng.uniform(0.5, 4) * wet, -0.95, 0.95))
    with av.open(path, "w") as container:
        video: Any = container.add_stream("libx264", rate=Fraction((8, 15, 25)[number % 3]))
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.options = {"threads": "1", "preset": "ultrafast"}
        stream: Any = container.add_stream("aac", rate=rate, layout="stereo") if audio else None
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode(None))
        if audio:
            block = av.AudioFrame.from_ndarray(np.stack([samples, 0.8 * samples]).astype(np.float32), format="fltp", layout="stereo")
            block.sample_rate, block.pts = rate, 0
            container.mux(stream.encode(block))
            container.mux(stream.encode(None))


def collect(folder: Path) -> tuple[Path, set[str], set[str]]:
    """Writes clips and their manifest; returns it with the ids of broken and of silent clips."""
    broken, silent, lines = set(), set(), []
    for number in range(CLIPS):
        values = combination(number * 7 % 625)
        name = f"clip-{number}"
        path = folder / f"{name}.{CONTAINERS[number % 4]}"
        fault = number // KINDS % KINDS if number % KINDS == 3 else None
        row: dict[str, Any] = {"id": name, "text": caption(number, values), "video": path.name, "audio": path.name}
        record(path, number, values, audio=fault != 0)
        data = path.read_bytes()
        if fault == 0:
            silent.add(name)
        elif fault is not None:
            broken.add(name)
        if fault in (1, 2):
            path.write_bytes(data[: len(data) * fault // 3])  # a download that broke off
        elif fault == 3:
            path.write_bytes(b"<!DOCTYPE html><title>404</title>")  # what a downloader keeps of a page that is gone
        elif fault == 4:
            path.write_bytes(b"")
        elif fault == 5:
            path.unlink()
        elif fault == 6:
            row["text"] = "  "
        elif fault == 7:
            row["timestamps"] = [60, 70]
        elif fault == 8:
            del row["video"]
        elif fault == 9:
            row["text"] = [row["text"], "a second caption"]
        lines.append(json.dumps(row, ensure_ascii=number % 2 == 0))
    lines.insert(5, '{"id": "half a line", "text": ')
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.jsonl", broken, silent


def test_own_clips_train_and_the_broken_ones_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, broken, silent = collect(tmp_path)
    assert len(broken) == 19 and len(silent) == 3
    fields = ["--set", "frames=2", "--set", "pixels=3136", "--set", "audio_seconds=1"]
    assert main(["prepare", "--manifest", str(manifest), "--out", str(tmp_path / "shards"), *fields, "--workers", "2"]) == 1
    said = capsys.readouterr()
    errors = [json.loads(line) for line in (tmp_path / "shards" / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["id"] for row in errors} == {*broken, None} and len(errors) == len(broken) + 1
    assert all(row["reason"] and "\n" not in row["reason"] for row in errors)
    assert f"{CLIPS - len(broken)} clips, {len(silent)} of them with silence" in said.out

    config = tmp_path / "own.py"
    config.write_text(CONFIG.format(shards=tmp_path / "shards", held_out=""))
    changes = {
        "steps": 30,
        "batch__micro_batch": 16,
        "optimizer__learning_rate": 5e-3,
        "checkpoint__every": 30,
        "data__distinct": "caption",
        "trainable__freeze": "()",
    }
    one_program = {"losses__hn_audio_only": True}  # instead of three, which would take most of the test's time to compile
    finish(command(config, tmp_path / "run", **changes, **one_program), environment(tmp_path / "cache"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 30 and np.isfinite(losses).all()
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])
