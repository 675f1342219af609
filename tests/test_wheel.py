"""What a user installs: the wheel made of the sdist, in an environment that holds what pip would install with it and nothing more."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.repository import ROOT
from tests.tolerances import TOLERANCES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
pytestmark = [pytest.mark.slow, pytest.mark.jit]


def closure(requirements: list[str]) -> set[str]:
    """Returns the distributions that pip would install, from what those of this environment say they need."""
    found: set[str] = set()
    wanted = [Requirement(line) for line in requirements]
    while wanted:
        one = wanted.pop()
        known = f"{one.name.lower().replace('_', '-')}[{','.join(sorted(one.extras))}]"
        if known in found:
            continue
        found.add(known)
        for line in importlib.metadata.requires(one.name) or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                wanted.append(need)
    return {name.partition("[")[0] for name in found}


def link(name: str, site: Path) -> None:
    """Shows a distribution of this environment in another one."""
    for file in importlib.metadata.files(name) or ():
        first = file.parts[0]
        if first not in ("..", "__pycache__") and not (site / first).exists():
            (site / first).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate())


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel of the sdist of these sources."""
    (made,) = built.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it needs without extras; returns its folder of programs."""
    place = tmp_path_factory.mktemp("core")
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    for name in closure(PROJECT["dependencies"]):
        link(name, site)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return place / "bin"


def said(*command: str | Path, cwd: Path, status: int = 0) -> str:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)})
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"omni_jax", f"{wheel.name.split('-py3')[0]}.dist-info"}
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "omni_jax").rglob("*.py")}
    sources |= {
        f"omni_jax/{file.relative_to(ROOT).as_posix()}" for part in ("conversion", "configs") for file in (ROOT / part).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    assert {"omni_jax/py.typed", "omni_jax/retrieval/templates/report.css", "omni_jax/cli/wave_tiny/checkpoint/BEATs.pt"} <= names


def test_an_install_brings_one_importable_name_and_every_command(core: Path, tmp_path: Path) -> None:
    (tmp_path / "conversion.py").write_text("raise RuntimeError('a file of the user')\n")
    (tmp_path / "configs").mkdir()
    code = (
        "import importlib.metadata as m, importlib.resources as r, omni_jax.conversion\n"
        "print(sorted({f.parts[0] for f in m.files('omni-jax') if f.parts[0] != '..' and 'dist-info' not in f.parts[0]}))\n"
        "print(sorted(p.name for p in r.files('omni_jax.configs').iterdir() if p.name == 'tiny.py'), m.metadata('omni-jax')['Name'])"
    )
    assert said(core / "python", "-c", code, cwd=tmp_path).splitlines() == ["['omni_jax']", "['tiny.py'] omni-jax"]
    listed = said(core / "python", "-m", "omni_jax", "--help", cwd=tmp_path)
    commands = [line.split()[0] for line in listed.partition("commands:\n")[2].partition("\n\n")[0].splitlines()]
    assert len(commands) >= 12
    for name in commands:
        assert f"usage: omni-jax {name}" in said(core / "omni-jax", name, "--help", cwd=tmp_path)
    assert "omniretriever_7b" in said(core / "omni-jax", "train", "--list-configs", cwd=tmp_path)


def test_a_golden_demo_shows_parity_without_the_extras_and_says_what_training_needs(core: Path, tmp_path: Path) -> None:
    shown = said(core / "omni-jax", "demo", cwd=tmp_path)
    (cosine,) = re.findall(r"^Largest difference from the PyTorch reference: .*smallest cosine ([\d.]+)\)", shown, re.MULTILINE)
    assert float(cosine) >= TOLERANCES["file_to_embedding_cosine"][1]
    (left_out,) = [line for line in shown.splitlines() if line.startswith("The second part, which trains, is left out: ")]
    assert left_out.endswith("run pip install 'omni-jax[train]'")
    refused = said(core / "omni-jax", "train", "--config", "tiny", "--workdir", "run", cwd=tmp_path, status=2)
    assert refused.count("\n") == 1 and "run pip install 'omni-jax[train]'" in refused
