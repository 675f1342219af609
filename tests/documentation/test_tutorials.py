"""The commands of the tutorials and the README, executed as they stand, in order, on tiny clips and the golden checkpoint."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from omni_jax.cli.main import main
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED
from omni_jax.config.presets import PRESETS, Preset
from tests import house
from tests.golden_set import GoldenSet
from tests.media_samples import write_clip

TUTORIALS = house.ROOT / "docs/tutorials"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLIPS, HELD_OUT = 16, 6

# What keeps a run of the published recipe small enough for eight simulated devices.
SMALL = (
    *("model.dtype=float32", "model.lora.rank=4", "model.lora.alpha=8.0", "data.workers=0", "batch.micro_batch=8", "batch.micro_batches=1"),
    *("batch.blocks=1", "losses.hn_audio_only=True", "steps=2", "epochs=0.0", "remat=none", "checkpoint.keep=1"),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns (language, text) of the code blocks of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command of a shell block."""
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def folder(golden: GoldenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the names that the tutorials use: released weights, clips, manifests and annotations. Clips are small."""
    made = tmp_path / "tutorials"
    made.mkdir()
    (made / "WAVE-7B").symlink_to(golden.checkpoint)
    (made / "OmniRetriever-7B").symlink_to(golden.adapter_dir)
    (made / "BEATs.pt").symlink_to(golden.checkpoint / "BEATs.pt")
    (made / "configs").symlink_to(house.ROOT / "configs")
    (made / "media").mkdir()
    for number in range(CLIPS + HELD_OUT):
        write_clip(made / f"media/clip{number}.mp4", seconds=1.0, seed=number)
    rows = [
        {"id": f"clip{n}", "text": f"caption number {n}", "video": f"media/clip{n}.mp4", "audio": f"media/clip{n}.mp4"}
        for n in range(CLIPS + HELD_OUT)
    ]
    for name, part in (("clips.jsonl", rows[:CLIPS]), ("held_out.jsonl", rows[CLIPS:])):
        (made / name).write_text("".join(f"{json.dumps(row)}\n" for row in part))
    with (made / "bench.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "url", "start", "end", "caption"])
        table.writerows([f"clip{n}", f"https://example.com/{n}", 0, 1, f"caption number {n}"] for n in range(HELD_OUT))
    monkeypatch.chdir(made)
    small = {"frames": golden.preset.frames, "audio_seconds": 1.0, "pixels": 3136}
    monkeypatch.setitem(PRESETS, "training", Preset(**small))
    return made


def execute(page: Path) -> int:
    """Executes the blocks of a tutorial and returns how many commands and scripts it has."""
    count = 0
    for language, text in blocks(page):
        if language == "sh":
            for words in commands(text):
                run(words)
                count += 1
        elif language == "python":
            exec(compile(text, page.name, "exec"), {"__name__": page.stem})
            count += 1
        elif language == "json":
            assert all(json.loads(line)["id"] for line in text.splitlines())
    return count


def run(words: list[str]) -> None:
    """Runs one command in this process; a training run is a small one."""
    assert words[0] == "omni-jax", f"{words[0]} is no command of this project; mark its block as text"
    small = [f"--config.{change}" for change in SMALL if "--config.model.lora=None" not in words or "lora" not in change]
    status = main([*words[1:], *(small if words[1] == "train" else [])])
    assert status in (DONE, DONE_WITH_SKIPPED), f"{shlex.join(words)} ended with {status}"


@pytest.mark.slow
@pytest.mark.jit
def test_the_tutorials_run_as_they_stand_on_the_golden_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(TUTORIALS / "embed_and_search.md") == 8
    assert "text in table av of 16 records, by cosine:" in capsys.readouterr().out
    assert (folder / "vectors/av.npy").exists() and (folder / "clips-int8.npz").exists()

    assert execute(TUTORIALS / "finetune_adapter.md") == 6
    assert (folder / "OmniRetriever-mine/adapter_config.json").exists()
    assert json.loads((folder / "held_out.json").read_text())["n"] == HELD_OUT

    capsys.readouterr()
    assert execute(TUTORIALS / "evaluate_a_benchmark.md") == 10
    assert "AVG-all" in capsys.readouterr().out and (folder / "fetch.tsv").exists()
    assert (folder / "bench.html").read_text().lower().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.jit
def test_the_way_from_a_bucket_to_an_adapter_runs_as_it_stands_on_the_golden_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(100 << 20))
    assert execute(TUTORIALS / "bucket_to_adapter.md") == 8
    assert (folder / "bucket-adapter/adapter_config.json").exists()
    assert json.loads((folder / "bucket.json").read_text())["n"] == HELD_OUT


@pytest.mark.slow
@pytest.mark.jit
def test_the_commands_of_the_readme_run_on_the_golden_checkpoint(folder: Path) -> None:
    """All but those that install or test the project, or download; with int8 weights, too, as for one small chip.

    Its Python is that of docs/guides/python.md, which tests run.
    """
    shown = [words for language, text in blocks(house.ROOT / "README.md") if language == "sh" for words in commands(text)]
    own = [words for words in shown if words[0] not in ("pip", "make", "hf")]
    assert {"convert", "embed", "search", "eval", "prepare", "train"} <= {words[1] for words in own}
    for words in own:
        run(words)
    assert (folder / "clips.html").exists() and (folder / "my-adapter/adapter_config.json").exists()
    for words in own[:3]:
        names = {"omni7b": "omni7b-int8", "clips.npz": "clips-of-int8.npz"}
        run([names.get(word, word) for word in words] + (["--weights", "int8"] if words[1] == "convert" else []))
    tested = [text for language, text in blocks(house.ROOT / "docs/guides/python.md") if language == "python"]
    assert [text for language, text in blocks(house.ROOT / "README.md") if language == "python"] == tested[:1]


def test_every_tutorial_is_executed_or_compiled() -> None:
    """The pod's commands need a cloud; `omni-jax compile` is lowered by tests/planning/test_documented.py."""
    executed = {"bucket_to_adapter.md", "embed_and_search.md", "finetune_adapter.md", "evaluate_a_benchmark.md"}
    assert {path.name for path in TUTORIALS.glob("*.md")} == executed | {"tpu_pod.md"}
    assert {words[1] for language, text in blocks(TUTORIALS / "tpu_pod.md") if language == "sh" for words in commands(text)} == {"compile"}
