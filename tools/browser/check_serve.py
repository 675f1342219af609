"""Opens the page of `omni-jax serve` in a headless Chromium: keyboard, files, broken uploads, contrast, narrow windows, light and dark.

  make serve-check                            # a server of the golden model and its clips
  make serve-check SERVE_ARGS="--out shots"   # with pictures of it

Needs a Chromium on PATH; installs nothing. Exit status: 0 all well, 1 something is wrong, 2 no Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.golden_set import GoldenSet, find
from tools.benchmarks.serving import served
from tools.browser import chromium
from tools.browser.check_report import CONTRAST, SOUNDS

LIMIT_MIB = 4
COMPILING_S = 400.0  # of the first clip, on a busy machine
DONE = "document.getElementById('status').textContent.includes(' of ')"
FAILED = "document.getElementById('status').className.includes('bad')"
STATUS = "document.getElementById('status').textContent"
IDS = "[...document.querySelectorAll('#results h2')].map((e) => e.textContent)"
PICTURES = (
    "Promise.all([...document.querySelectorAll('#results img')].map((i) => { i.loading = 'eager'; "
    "return i.decode().then(() => '', () => i.alt); })).then((all) => all.filter(Boolean))"
)


def check(address: str, golden: GoldenSet, folder: Path, out: Path | None) -> list[str]:
    """Returns what is wrong with the page, in words; writes pictures of it into `out`, and files to upload into `folder`."""
    wrong: list[str] = []

    def expect(fact: Any, words: str) -> None:
        if not fact:
            wrong.append(words)

    clip = golden.records[0]
    assert clip.video is not None and clip.text is not None
    with chromium.tab() as tab:
        for scheme in ("light", "dark"):
            tab.open(address, scheme=scheme)
            _by_keyboard(tab, expect, clip.text)
            poor = tab.run(CONTRAST)
            expect(not poor, f"{scheme}: too little contrast: {'; '.join(poor[:8])}")
            if out:
                tab.picture(out / f"serve-{scheme}.png")
        broken = tab.run(PICTURES)
        expect(not broken, f"pictures that do not decode: {broken[:3]}")
        silent = tab.run(SOUNDS)
        expect(not silent, f"sounds that do not load: {silent[:3]}")
        expect(not tab.nameless(), f"without a name for a screen reader: {tab.nameless()[:5]}")
        _by_file(tab, expect, address, clip.video, clip.id, folder)
        tab.open(address, width=390, height=800)
        _by_keyboard(tab, expect, clip.text)
        expect(tab.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a narrow window")
        if out:
            tab.picture(out / "serve-narrow.png", whole=True)
        # The browser logs a refused upload by itself, and the preview of an empty file, too.
        complaints = [
            line
            for line in tab.complaints
            if not re.search(r"status of (400|413|422)|ERR_(CONNECTION_(RESET|ABORTED)|REQUEST_RANGE)", line)
        ]
        expect(not complaints, f"the browser complains: {complaints[:5]}")
        asked = {url for url in tab.requests if not url.startswith((address, f"blob:{address}", "about:blank"))}
        expect(not asked, f"the page asks for {sorted(asked)[:5]}")
    return wrong


def _by_keyboard(tab: chromium.Tab, expect: Any, text: str) -> None:
    """Searches without a mouse: Enter in the text, then the button by Tab."""
    expect(tab.run("document.activeElement.id") == "text", "the text does not have the focus at first")
    tab.press("Enter")
    expect(tab.run(STATUS) == "Give a text or a file.", f"an empty query says {tab.run(STATUS)!r}")
    tab.type(text)
    tab.press("Enter")
    expect(tab.until(DONE), f"Enter does not search: {tab.run(STATUS)!r}")
    expect(tab.run(IDS), "a search shows no result")
    tab.run("document.getElementById('results').replaceChildren()")
    for _ in range(8):
        tab.press("Tab")
        expect(tab.run("getComputedStyle(document.activeElement).outlineStyle") != "none", "the focus cannot be seen")
        if tab.run("document.activeElement.id") == "go":
            break
    tab.press("Enter")
    expect(tab.until(f"{IDS}.length > 0"), "the button is not reached by Tab, or Enter does not press it")
    tab.run("document.querySelector('.skip').focus()")
    expect(tab.run("document.querySelector('.skip').getBoundingClientRect().left >= 0"), "the skip link cannot be seen")
    tab.run("document.getElementById('text').focus()")


def _by_file(tab: chromium.Tab, expect: Any, address: str, video: Path, record: str, folder: Path) -> None:
    """Searches with a clip, and uploads what is none."""
    tab.open(address)
    tab.run("document.getElementById('table').value = 'av'")
    tab.choose("#file", video)
    expect(tab.until("!document.getElementById('picked').hidden", 5), "a chosen file is not shown")
    tab.run("document.getElementById('go').click()")
    expect(tab.until(DONE, COMPILING_S), f"a clip is not searched with: {tab.run(STATUS)!r}")
    expect((tab.run(IDS) or [""])[0] == record, f"a clip finds {tab.run(IDS)[:1]}, not itself")
    noise = random.Random(0)
    for name, content in (
        ("noise.mp4", noise.randbytes(5000)),
        ("empty.mp4", b""),
        ("cut.mp4", video.read_bytes()[:2000]),
        ("list.m3u8", b"#EXTM3U\nfile:///etc/passwd\n"),
        ("large.mp4", bytes((LIMIT_MIB + 1) << 20)),
    ):
        (folder / name).write_bytes(content)
        tab.choose("#file", folder / name)
        tab.run("document.getElementById('status').className = ''")
        tab.run("document.getElementById('go').click()")
        expect(tab.until(FAILED), f"{name}: is not refused")
        said = tab.run(STATUS)
        expect(said and "\n" not in said and str(folder) not in said, f"{name}: is refused with {said!r}")
    tab.run("document.getElementById('clear').click()")
    tab.run("document.getElementById('text').focus()")
    tab.type("rain")
    tab.press("Enter")
    expect(tab.until(DONE), f"after broken uploads the page does not search: {tab.run(STATUS)!r}")


@contextlib.contextmanager
def server(folder: Path, golden: GoldenSet) -> Iterator[str]:
    """Yields the address of a server of the golden model over its clips."""
    from omni_jax import OmniRetriever, conversion
    from omni_jax.retrieval.embedding_file import write_embeddings
    from omni_jax.types import EmbeddingTable

    conversion.to_jax(golden.checkpoint, folder / "model", adapter=golden.adapter_dir)
    model = OmniRetriever.from_pretrained(folder / "model", preset=golden.preset)
    records = golden.records
    tables = {"text": model.encode([r.text for r in records]), "av": model.encode([r.video for r in records], workers=1)}
    write_embeddings(folder / "clips.npz", EmbeddingTable(tuple(r.id for r in records), tables, made_with=model.made_with()))
    options = ("--manifest", golden.manifest, "--media", golden.dir, "--max-upload", str(LIMIT_MIB))
    with served(folder, *options) as (port, _):
        yield f"http://127.0.0.1:{port}/"


def main() -> int:
    """Checks the page and returns the exit status."""
    parser = argparse.ArgumentParser(description="use the page of omni-jax serve in a headless Chromium")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put screenshots into this folder")
    args = parser.parse_args()
    golden = find("OMNI_GOLDEN", "wave_tiny")

    def found(folder: Path) -> list[str]:
        with server(folder, golden) as address:
            return check(address, golden, folder, args.out)

    return chromium.report("serve-check", args.out, found)


if __name__ == "__main__":
    sys.exit(main())
