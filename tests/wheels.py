"""The wheel of these sources, as a release makes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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


def installed(place: Path) -> Path:
    """Returns a folder that holds what pip installs of the wheel, without what it needs. First on PYTHONPATH, it hides the checkout."""
    wheel = build_wheel(place)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(place / "installed"), str(wheel)], check=True, capture_output=True)
    return place / "installed"
