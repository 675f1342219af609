"""Writes a lock file: what is installed, pinned, with the hashes of the files that pip would fetch on Linux (x86-64, ARM) and macOS (ARM).

`make lock` runs it after an upgrade. pip then refuses any file whose hash is not listed. A package that has no file for one of those
machines is pinned with the hashes of the others.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PLATFORMS = (
    (),  # this machine, sources included
    tuple(f"manylinux{v}_aarch64" for v in ("_2_34", "_2_31", "_2_28", "_2_27", "_2_26", "_2_17", "2014")),
    ("macosx_14_0_arm64", "macosx_12_0_arm64"),
)
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([A-Za-z0-9_.-]+)", re.MULTILINE)


def main(arguments: Sequence[str]) -> int:
    """Rewrites the named lock file from the running environment, or from the packages of one folder of it; its leading comments stay."""
    target = Path(arguments[0])
    frozen = _pip("freeze", "--all", "--exclude=pip", "--exclude-editable", *(f"--path={folder}" for folder in arguments[1:])).stdout
    pins = dict(PIN.findall(frozen))
    hashes: dict[str, set[str]] = {name: set() for name in pins}
    for platform in PLATFORMS:
        for name, digest in _digests(pins, platform):
            hashes[next(pin for pin in pins if _same(pin, name))].add(digest)
    lines = [line for line in target.read_text().splitlines() if line.startswith("#")]
    for name, version in pins.items():
        if not hashes[name]:
            raise SystemExit(f"{name}=={version}: the package index lists no file for it")
        lines.append(" \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in sorted(hashes[name]))]))
    target.write_text("\n".join(lines) + "\n")
    return 0


def _digests(pins: dict[str, str], platform: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (name, sha256) of each file pip would fetch; packages that have none for the platform are left out."""
    wanted = dict(pins)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        for _ in range(len(pins)):
            foreign = ["--target", folder, "--only-binary=:all:", "--python-version", PYTHON] if platform else []
            foreign += [part for tag in platform for part in ("--platform", tag)]
            names = [f"{name}=={version}" for name, version in wanted.items()]
            told = _pip("install", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), *foreign, *names)
            if told.returncode == 0:
                found = json.loads(report.read_text())["install"]
                return [(item["metadata"]["name"], item["download_info"]["archive_info"]["hashes"]["sha256"]) for item in found]
            absent = re.findall(r"No matching distribution found for ([A-Za-z0-9_.-]+?)==", told.stderr)
            if not absent:
                raise SystemExit(told.stderr)
            wanted = {name: version for name, version in wanted.items() if name not in absent}
    raise SystemExit("the package index has none of the packages")


def _same(a: str, b: str) -> bool:
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
