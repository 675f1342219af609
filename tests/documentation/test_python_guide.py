"""The Python of docs/guides/python.md as it stands, with an installed wheel, an empty folder and a local Hub with a tiny checkpoint."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax import OmniRetriever
from omni_jax.cli import parity
from tests import repository
from tests.conversion.hub_server import Repository, around, files_of, hub_on_loopback
from tests.golden_set import GoldenSet
from tests.programs import QUICK
from tests.tolerances import assert_close

NAMES = ("tsinghua-ee/WAVE-7B", "YunzeLiu/OmniRetriever-7B")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_table_of_arguments_holds_each_of_encode_with_its_default():
    page = (repository.ROOT / "docs/guides/python.md").read_text(encoding="utf-8").partition("## Arguments of sentence-transformers")[2]
    ours = [line.split("|")[2] for line in page.partition("\n## ")[0].splitlines() if line.startswith("|")][2:]
    told = dict(re.findall(r"`(\w+)(?:=([^`]+))?`", " ".join(ours)))
    parameters = dict(list(inspect.signature(OmniRetriever.encode).parameters.items())[1:])
    assert told.keys() - {"float16", "int8", "binary"} == parameters.keys()
    for name, default in told.items():
        assert not default or ast.literal_eval(default) == parameters[name].default, name


@pytest.mark.jit
def test_golden_a_newcomers_lines_and_the_page_run_as_they_stand(golden: GoldenSet, tmp_path: Path, built: Path):
    first, *rest = BLOCK.findall((repository.ROOT / "docs/guides/python.md").read_text(encoding="utf-8"))
    assert len(first.strip().splitlines()) <= 8
    assert first in (repository.ROOT / "README.md").read_text(encoding="utf-8")
    chosen = [i for i, r in enumerate(golden.records) if r.timestamps is None and len(r.modalities) == 3][:2]
    (tmp_path / "clips").mkdir()
    for name, number in zip(("a.mp4", "b.mp4"), chosen, strict=True):
        assert golden.records[number].video == golden.records[number].audio
        for folder in (tmp_path, tmp_path / "clips"):
            shutil.copy(golden.records[number].video, folder / name)
    package = built / "installed"
    script = [first, "import numpy; numpy.save('index.npy', index)\n", *rest, "import omni_jax.conversion\n"]
    script.append(f"from runner import strangers\nassert not strangers(Path({str(package)!r}))\n")
    shutil.copy(repository.ROOT / "tests/documentation/runner.py", tmp_path)
    (tmp_path / "page.py").write_text("".join(script))
    repositories = {NAMES[0]: Repository(files_of(golden.checkpoint)), NAMES[1]: Repository(files_of(golden.adapter_dir))}
    with hub_on_loopback(repositories) as hub:
        environment = around(hub, tmp_path) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONPATH": str(package)}
        done = subprocess.run([sys.executable, "page.py"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"clips/[ab]\.mp4\n", done.stdout)
    assert "fetched and converted once, which takes" in done.stderr
    expected = np.stack([golden.adapter[f"{i}/embed/{parity.REFERENCE['av']}"] for i in chosen])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_close(np.load(tmp_path / "index.npy"), expected, "file_to_embedding_cosine")
