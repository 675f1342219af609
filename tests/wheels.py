"""The wheel of these sources, as a release makes it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

from omni_jax.io import lock
from tests.repository import ROOT


def build_wheel(place: Path) -> Path:
    """Returns the wheel of the sdist of these sources, built in an empty folder."""
    place.mkdir(exist_ok=True)
    hidden = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "*_out")
    shutil.copytree(ROOT, place / "sources", symlinks=True, ignore=hidden)

    def build(what: str, folder: Path) -> Path:
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(place)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
        (made,) = place.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[what])
        return made

    shutil.unpack_archive(build("sdist", place / "sources"), place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    assert not [file for file in unpacked.rglob("*") if file.is_symlink()]
    assert not (unpacked / "tests").exists() and (unpacked / "omni_jax" / "conversion" / "rules.py").is_file()
    return build("wheel", unpacked)


def made_once(place: Path) -> Path:
    """Returns a folder with the wheel, and in `installed` what pip installs of it: made by the first process of a run that asks.

    First on PYTHONPATH, `installed` hides the checkout; what the wheel needs is not in it.
    """
    with lock(place.with_suffix(".lock"), wait=True) or contextlib.nullcontext():
        if not (place / "installed").is_dir():
            shutil.rmtree(place, ignore_errors=True)
            _install(build_wheel(place), place / "installed")
    return place


def _install(wheel: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
