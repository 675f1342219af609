"""The licences of every pinned package, from what the packages say of themselves: python -m tools.licences [--check].

Writes docs/reports/licences.md from requirements.lock and what is installed here; packages of the other lock files are listed by name,
since their environments are laid over this one. `--check` writes nothing and fails where the page differs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reports/licences.md"
LOCK = "requirements.lock"
HEAD = """# Licences of the dependencies

`python -m tools.licences` writes this page from the metadata of each package of `requirements.lock` (its licence expression, else its
licence field, else its classifiers). None of them is part of this repository; `pip` installs them. The optional environments
add the packages of
`requirements-reference.lock` (parity tests, benchmarks, object stores), `requirements-tpu.lock` (compiling for TPU) and
`requirements-docs.lock` (this site), which no user needs.

Some wheels contain libraries with licences of their own: `av` has FFmpeg and its encoders (LGPL and GPL), `soundfile` has libsndfile and
libmpg123 (LGPL), `faiss-cpu` and `numpy` have OpenBLAS (BSD). If you redistribute the wheels, comply with these licences as well.

| package | version | licence |
|---|---|---|
"""
# Short names for licences whose packages give their whole text, or an old spelling.
SPELLINGS = (
    (r"apache", "Apache-2.0"),
    (r"\bMIT\b|permission is hereby granted, free of charge", "MIT"),
    (r"\bMPL\b|mozilla public", "MPL-2.0"),
    (r"\bISC\b", "ISC"),
    (r"python software foundation|\bPSF\b", "PSF-2.0"),
    (r"LGPL", "LGPL"),
    (r"\bGPL", "GPL"),
    (r"BSD.3|3.clause|neither the name", "BSD-3-Clause"),
    (r"BSD", "BSD"),
)


def pins(name: str = LOCK) -> dict[str, str]:
    """Returns package -> version of a lock file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Za-z0-9_.\-]+)==([A-Za-z0-9_.\-+]+)", text, re.M))


@functools.cache
def licence(package: str) -> str:
    """Returns the licence of an installed package in one line; "not stated" where it says nothing.

    Raises:
      importlib.metadata.PackageNotFoundError: for a package that is not installed.
    """
    found = importlib.metadata.metadata(package)
    expression = (found.get_all("License-Expression") or [""])[0]
    if expression:
        return expression
    classified = [c.rsplit(" :: ", 1)[1] for c in found.get_all("Classifier") or () if c.startswith("License ::")]
    stated = (found.get_all("License") or [""])[0]
    for text in (stated, *classified):
        if len(text) <= 40 and text and "License" not in text and text != "UNKNOWN":
            return _short(text)
    for text in (*classified, stated):
        if text and text != "UNKNOWN":
            return _short(text)
    return "not stated"


def page() -> str:
    """Returns docs/reports/licences.md."""
    return HEAD + "".join(
        f"| {name} | {version} | {licence(name)} |\n" for name, version in sorted(pins().items(), key=lambda p: p[0].lower())
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    if re.fullmatch(r"[A-Za-z0-9.+\-]+(?: (?:AND|OR|WITH) [A-Za-z0-9.+\-]+)*", line):
        return line
    return next((name for pattern, name in SPELLINGS if re.search(pattern, line, re.I)), line[:60].replace("|", "/"))


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.licences", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    chosen = parser.parse_args(arguments)
    text = page()
    if chosen.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is up to date" if same else f"{PAGE.name} differs; run python -m tools.licences", file=sys.stderr)
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
