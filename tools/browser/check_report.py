"""Opens a report in a headless Chromium and uses it: console, network, filters, media, keyboard, contrast, narrow windows, light and dark.

  make report-check                                  # a page of random vectors with hostile captions
  make report-check REPORT_ARGS="bench.html --out shots"   # any page that `omni-jax eval --html` wrote

Needs a Chromium on PATH; installs nothing. Exit status: 0 all well, 1 something is wrong, 2 no Chromium.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tools.browser import chromium

CONTRAST = """
(() => {
  const parts = (color) => { const n = color.match(/[\\d.]+/g).map(Number); return color.startsWith("color(srgb")
    ? [...n.slice(0, 3).map((v) => 255 * v), n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (c) => { const l = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const backdrop = (e) => { const stack = [];
    for (; e; e = e.parentElement) stack.push(parts(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]); };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility() || e.closest("script, title, .hide, .skip, select, svg [role]")) continue;
    const style = getComputedStyle(e), back = backdrop(e);
    const ink = over(parts(e.namespaceURI.includes("svg") ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 600);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) poor.push(`${ratio.toFixed(2)} ${node.data.trim().slice(0, 30)}`);
  }
  return [...new Set(poor)];
})()
"""

CUT = """
[...document.querySelectorAll("caption, figcaption, .heat td, .heat th")].filter((e) => e.checkVisibility() &&
  (e.getBoundingClientRect().right > e.closest(".panel").getBoundingClientRect().right || e.scrollWidth > e.clientWidth + 1))
  .map((e) => e.textContent.trim().slice(0, 30) || e.className)
"""

SOUNDS = """
Promise.all([...document.querySelectorAll("audio")].filter((s) => s.checkVisibility()).slice(0, 4).map((s) => s.readyState > 0 ? "" :
  new Promise((done) => {
    s.onloadedmetadata = () => done(s.duration > 0 ? "" : "no length");
    s.onerror = () => done("error");
    setTimeout(() => done("nothing"), 8000);
    s.load();
  }))).then((all) => all.filter(Boolean))
"""


def check(page: Path, out: Path | None) -> list[str]:
    """Returns what is wrong with a page, in words; writes pictures of it into `out`."""
    wrong: list[str] = []

    def expect(fact: bool, words: str) -> None:
        if not fact:
            wrong.append(words)

    with chromium.tab() as tab:
        for scheme in ("light", "dark"):
            tab.open(page, scheme=scheme)
            poor = tab.run(CONTRAST)
            expect(not poor, f"{scheme}: too little contrast: {'; '.join(poor[:8])}")
            if out:
                tab.picture(out / f"report-{scheme}.png")
                tab.picture(out / f"report-{scheme}-whole.png", whole=True)
        _use(tab, expect)
        tab.open(page, width=390, height=800)
        expect(tab.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a narrow window")
        cut = tab.run(CUT)
        expect(not cut, f"cut at the edge of a card of a narrow window: {'; '.join(cut[:3])}")
        if out:
            tab.picture(out / "report-narrow.png")
            tab.picture(out / "report-narrow-whole.png", whole=True)
        tab.open(page)
        tab.press("Tab")
        expect(tab.run("document.activeElement.className") == "skip", "the first stop of the keyboard is not the skip link")
        expect(tab.run("getComputedStyle(document.activeElement).outlineStyle") != "none", "the focus cannot be seen")
        nameless = tab.nameless()
        expect(not nameless, f"without a name for a screen reader: {nameless[:5]}")
        expect(not tab.complaints, f"the browser complains: {tab.complaints[:5]}")
        asked = {url for url in tab.requests if url not in (page.resolve().as_uri(), "about:blank")}
        expect(not asked, f"the page asks for {sorted(asked)[:5]}")
    return wrong


def _use(tab: chromium.Tab, expect: Any) -> None:
    """Works the filters, and loads pictures and sounds."""
    visible = "[...document.querySelectorAll('.card')].filter((c) => c.checkVisibility())"

    def choose(direction: str, kind: str, text: str) -> list[tuple[str, str, str]]:
        tab.run(f"document.getElementById('filter-direction').value = {direction!r}")
        tab.run(f"document.querySelector('input[name=kind][value=\"{kind}\"]').checked = true")
        tab.run(
            f"(() => {{ const t = document.getElementById('filter-text'); t.value = {text!r}; "
            "t.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        found = tab.run(
            f"{visible}.map((c) => [c.closest('.group').dataset.direction, c.dataset.kind, c.querySelector('h4 bdi').textContent])"
        )
        count = tab.run("document.getElementById('filter-count').textContent")
        expect(count.startswith(f"{len(found)} of "), f"the count says {count!r}, {len(found)} cards are visible")
        return found

    directions = tab.run("[...document.querySelectorAll('.group')].map((g) => g.dataset.direction)")
    every = choose("", "", "")
    expect({d for d, _, _ in every} == set(directions), "all directions are not all shown")
    for direction in directions:
        found = choose(direction, "worst", "")
        expect(
            bool(found) and all((d, k) == (direction, "worst") for d, k, _ in found), f"the filter for {direction}, worst shows {found[:3]}"
        )
    record = every[0][2]
    expect(any(name == record for _, _, name in choose("", "", record.upper())), f"a search for {record!r} does not find it")
    expect(
        not choose("", "", "no record has these words") and tab.run("document.getElementById('nothing').checkVisibility()"),
        "an empty search shows cards",
    )
    tab.run("document.querySelector('#filter button[type=reset]').click()")
    tab.wait(0.2)
    expect(
        {d for d, _, _ in tab.run(f"{visible}.map((c) => [c.closest('.group').dataset.direction, '', ''])")} == {directions[0]},
        "reset does not reset",
    )
    last = tab.run("(() => { const a = [...document.querySelectorAll('a[data-show]')].at(-1); a.click(); return a.dataset.show; })()")
    tab.wait(0.3)
    shown = set(tab.run(f"{visible}.map((c) => c.closest('.group').dataset.direction)"))
    expect(shown == {last}, f"a cell of the heat map for {last} leads to {shown}")
    expect(tab.run("document.activeElement.id") == "gallery", "a cell of the heat map does not take the focus to the queries")
    broken = tab.run(
        "Promise.all([...document.images].map((i) => i.decode().then(() => '', () => i.alt))).then((all) => all.filter(Boolean))"
    )
    expect(not broken, f"pictures that do not decode: {broken[:3]}")
    silent = tab.run(SOUNDS)
    expect(not silent, f"sounds that do not load: {silent[:3]}")


def hostile_page(folder: Path) -> Path:
    """Writes a report of random vectors whose captions and ids try to run, with pictures and sounds, and returns its path."""
    import numpy as np

    from omni_jax.media.preview import mp3, strip
    from omni_jax.retrieval.report import Clip
    from tests.retrieval.test_report import HOSTILE, page_of

    ids = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(60)]
    frames = np.random.default_rng(0).integers(0, 255, (3, 60, 80, 3)).astype(np.uint8)
    tone = np.sin(np.arange(16_000) / 10).astype(np.float32)
    clips = dict.fromkeys(ids, Clip(strip(frames), mp3(tone)))
    path = folder / "report.html"
    path.write_text(page_of(60, ids=ids, captions=dict(zip(ids, ids[::-1], strict=True)), clips=clips, notes=HOSTILE), encoding="utf-8")
    return path


def main() -> int:
    """Checks the page named on the command line, or one with hostile captions, and returns the exit status."""
    parser = argparse.ArgumentParser(description="use a report in a headless Chromium")
    parser.add_argument("page", nargs="?", type=Path, help="a page that `omni-jax eval --html` wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put screenshots into this folder")
    args = parser.parse_args()
    return chromium.report("report-check", args.out, lambda folder: check(args.page or hostile_page(folder), args.out))


if __name__ == "__main__":
    sys.exit(main())
