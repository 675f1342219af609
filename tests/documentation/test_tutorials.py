"""The commands of the quickstart, the tutorials and the README, executed as they stand, in order, on tiny clips and the golden checkpoint.

An installed wheel executes them, in a process of its own for each test (runner.py).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import repository
from tests.documentation.runner import blocks, commands
from tests.golden_set import GoldenSet
from tests.media_samples import write_clip

TUTORIALS = repository.ROOT / "docs/tutorials"
CLIPS, HELD_OUT = 16, 6


@pytest.fixture
def folder(golden: GoldenSet, tmp_path: Path) -> Path:
    """A folder with the names that the tutorials use: released weights, clips, manifests and annotations. Clips are small."""
    made = tmp_path / "tutorials"
    made.mkdir()
    (made / "WAVE-7B").symlink_to(golden.checkpoint)
    (made / "OmniRetriever-7B").symlink_to(golden.adapter_dir)
    (made / "BEATs.pt").symlink_to(golden.checkpoint / "BEATs.pt")
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
    return made


@pytest.fixture
def executed(golden: GoldenSet, folder: Path, built: Path) -> Callable[..., str]:
    """Executes pages in `folder` with the wheel's package, and returns what was printed."""
    package = built / "installed"
    small = json.dumps({"frames": golden.preset.frames, "audio_seconds": 1.0, "pixels": 3136})

    def execute(*pages: Path) -> str:
        command = [sys.executable, "-P", str(repository.ROOT / "tests/documentation/runner.py"), str(package), small, *map(str, pages)]
        done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return execute


@pytest.mark.slow
@pytest.mark.jit
def test_the_quickstart_runs_as_it_stands_on_the_golden_checkpoint(executed: Callable[..., str]) -> None:
    shown = executed(repository.ROOT / "docs/quickstart.md")
    assert "quickstart.md has 4 commands" in shown and re.search(r"^media/clip\d+\.mp4$", shown, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.jit
def test_the_tutorials_run_as_they_stand_on_the_golden_checkpoint(folder: Path, executed: Callable[..., str]) -> None:
    names = ("embed_and_search.md", "finetune_adapter.md", "evaluate_a_benchmark.md")
    shown = executed(*(TUTORIALS / name for name in names))
    assert re.findall(r"^(\S+\.md) has (\d+) commands$", shown, re.MULTILINE) == list(zip(names, ("8", "6", "10"), strict=True))
    assert "text in table av of 16 records, by cosine:" in shown and "AVG-all" in shown
    assert (folder / "vectors/av.npy").exists() and (folder / "clips-int8.npz").exists()
    assert (folder / "OmniRetriever-mine/adapter_config.json").exists()
    assert json.loads((folder / "held_out.json").read_text())["n"] == HELD_OUT
    assert (folder / "fetch.tsv").exists() and (folder / "bench.html").read_text().lower().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.jit
def test_the_way_from_a_bucket_to_an_adapter_runs_as_it_stands_on_the_golden_checkpoint(
    folder: Path, executed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(100 << 20))
    monkeypatch.setenv("OMNI_JAX_CACHE", str(folder / "cache"))
    assert "bucket_to_adapter.md has 8 commands" in executed(TUTORIALS / "bucket_to_adapter.md")
    assert list((folder / "cache/clips").glob("*/*")), "training read from gs://BUCKET through the cache"
    assert (folder / "bucket-adapter/adapter_config.json").exists()
    assert json.loads((folder / "bucket.json").read_text())["n"] == HELD_OUT


@pytest.mark.slow
@pytest.mark.jit
def test_the_commands_of_the_readme_run_on_the_golden_checkpoint(folder: Path, executed: Callable[..., str]) -> None:
    """All but those that install or test the project, or download; with int8 weights, too, as for one small chip.

    Its Python is that of docs/guides/python.md, which tests run.
    """
    shown = [words for language, text in blocks(repository.ROOT / "README.md") if language == "sh" for words in commands(text)]
    own = [words for words in shown if words[0] not in ("pip", "make", "hf")]
    assert {"convert", "embed", "search", "eval", "prepare", "train"} <= {words[1] for words in own}
    names = {"omni7b": "omni7b-int8", "clips.npz": "clips-of-int8.npz"}
    int8 = [[names.get(word, word) for word in words] + (["--weights", "int8"] if words[1] == "convert" else []) for words in own[:3]]
    (folder / "readme.md").write_text("```sh\n" + "".join(f"{shlex.join(words)}\n" for words in [*own, *int8]) + "```\n")
    assert f"readme.md has {len(own) + 3} commands" in executed(folder / "readme.md")
    assert (folder / "clips.html").exists() and (folder / "my-adapter/adapter_config.json").exists()
    tested = [text for language, text in blocks(repository.ROOT / "docs/guides/python.md") if language == "python"]
    assert [text for language, text in blocks(repository.ROOT / "README.md") if language == "python"] == tested[:1]


def test_every_tutorial_is_executed_or_compiled() -> None:
    """The pod's commands need a cloud; `omni-jax compile` is lowered by tests/planning/test_documented.py."""
    executed = {"bucket_to_adapter.md", "embed_and_search.md", "finetune_adapter.md", "evaluate_a_benchmark.md"}
    assert {path.name for path in TUTORIALS.glob("*.md")} == executed | {"tpu_pod.md"}
    assert {words[1] for language, text in blocks(TUTORIALS / "tpu_pod.md") if language == "sh" for words in commands(text)} == {"compile"}
