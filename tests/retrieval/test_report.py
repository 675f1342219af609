"""The page as a document: well-formed, closed to the network and to markup in captions, readable without eyes, small."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from omni_jax.retrieval import compare, figures, report, score
from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.retrieval.published import OMNIRETRIEVER_BENCH
from omni_jax.retrieval.report import Clip, Other, build_report, render
from omni_jax.types import EmbeddingTable
from tests.retrieval.pages import Page

pytestmark = pytest.mark.jit

TABLES = ("text", "video", "audio", "av", "tv", "at")
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '" onmouseover="alert(4)" x="',
    "' autofocus onfocus='alert(5)",
    "{{ 7 * 7 }} {% raw %} ${8 * 8}",
    "</style><style>body { display: none }</style>",
    "<!-- never closed",
    "]]> &lt;b&gt; &amp;amp; \u2028 \u0000 \u0007",
    "طائر أحمر يغني فوق الجدار \u202e reversed",
    "javascript:alert(6)",
    "half a pair \ud83d and a whole one \U0001f600",
]


def random_tables(n: int, width: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    shared = np.random.default_rng(99).normal(size=(n, width))
    rng = np.random.default_rng(seed)
    return {name: (shared + rng.normal(size=shared.shape)).astype(np.float32) for name in TABLES}


def page_of(n: int = 40, seed: int = 0, ids: list[str] | None = None, others: bool = True, **kwargs: Any) -> str:
    names = tuple(ids or (f"clip{i}" for i in range(n)))
    tables = random_tables(n, seed=seed)
    scores = score(EmbeddingTable(names, tables))
    beside: list[Other] = []
    if others:
        theirs = score(EmbeddingTable(names, random_tables(n, seed=seed + 1)))
        beside = [Other(f"{name} (published)", row | {"n": 3782}, True) for name, row in OMNIRETRIEVER_BENCH.items()]
        beside.append(Other("theirs.npz", theirs.result, differences=compare(scores.hit_counts, theirs.hit_counts)))
    return render(build_report("ours.npz", tables, scores, beside), **kwargs)


@pytest.fixture(scope="module")
def html() -> str:
    clips = {f"clip{i}": Clip(b"\xff\xd8 picture %d" % i, b"sound %d" % i) for i in range(40)}
    captions = {f"clip{i}": f"a caption of clip {i}" for i in range(40)}
    return page_of(captions=captions, clips=clips, notes=["one note"], version="9.9")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_is_well_formed(page: Page) -> None:
    assert page.faults == []
    assert [e.text for e in page.all("title") if e.parent is not None and e.parent.tag == "head"] == ["ours.npz: 12-direction retrieval"]
    for tag in ("html", "head", "body", "main", "h1"):
        assert len(page.all(tag)) == 1, tag
    assert page.all("html")[0].attributes["lang"] == "en"


def test_nothing_refers_to_the_network(html: str, page: Page) -> None:
    assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", html.replace("\\/", "/"))
    for element in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = element.attributes.get(name, "#")
            assert value.startswith("#"), (element.tag, name, value[:60])
    assert not page.all("link") and not page.all("base") and not page.all("iframe") and "@import" not in html and "url(" not in html


def test_policy_admits_the_one_script_and_data(page: Page) -> None:
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    scripts = [e for e in page.all("script") if "type" not in e.attributes]
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_every_reference_within_the_page_leads_somewhere(page: Page) -> None:
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            for target in element.attributes.get(name, "").split():
                assert target in ids, (element.tag, name, target)
        if element.attributes.get("href", "").startswith("#"):
            assert element.attributes["href"][1:] in ids
    script = next(e.text for e in page.all("script") if "type" not in e.attributes)
    assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= set(ids)


def test_page_is_usable_without_eyes_or_mouse(page: Page) -> None:
    for landmark in ("header", "nav", "main", "footer"):
        assert page.all(landmark), landmark
    assert page.all("a", class_="skip")[0].attributes["href"] == "#main"
    assert [e.parent for e in page.all("caption")] == page.all("table")
    assert all(e.attributes.get("scope") in ("row", "col") for e in page.all("th"))
    for drawing in page.all("svg"):
        named = drawing.attributes.get("role") == "img" and drawing.attributes.get("aria-label")
        assert named or drawing.attributes.get("aria-hidden") == "true"
    for field in [*page.all("select"), *page.all("input")]:
        assert field.within("label")
    assert page.all("output")[0].attributes["aria-live"] == "polite"
    assert all(e.attributes.get("aria-label") for e in page.elements if e.attributes.get("role") == "region")
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_style_knows_light_dark_and_focus(html: str) -> None:
    style = html.split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style and ":focus-visible" in style and "color-scheme: light dark" in style
    defined = set(re.findall(r"(--[\w-]+):", style)) | {"--strength"}
    assert set(re.findall(r"var\((--[\w-]+)", style)) <= defined


def test_every_figure_of_the_result_is_in_the_page(page: Page) -> None:
    tables = random_tables(40)
    result = score(EmbeddingTable(tuple(f"clip{i}" for i in range(40)), tables)).result
    text = {e.attributes["aria-label"] for e in page.all("a") if "data-show" in e.attributes}
    assert len(text) == 12 and any(label == f"text to video: {result['directions']['t2v']['R@1']:.2f} percent" for label in text)
    cells = [e.text for e in page.all("td")]
    for name in DIRECTIONS:
        for metric in ("R@1", "R@5", "R@10", "NDCG@10", "MRR"):
            assert f"{result['directions'][name][metric]:.2f}" in cells
    main = page.all("body")[0].text
    for name in AVERAGES:
        low, high = result["intervals"][name]
        assert f"{result[name]:.2f}" in main and f"{low:.1f}–{high:.1f}" in main
    for row in OMNIRETRIEVER_BENCH.values():
        assert all(f"{row[name]:.2f}" in cells for name in AVERAGES)
    assert "one note" in main and "omni-jax 9.9" in main


def test_gallery_holds_every_direction_and_its_media(page: Page) -> None:
    groups = page.all("section", class_="group")
    assert [g.attributes["data-direction"] for g in groups] == list(DIRECTIONS)
    kinds = [e.attributes["data-kind"] for e in page.all("li") if "data-kind" in e.attributes]
    assert kinds.count("best") == kinds.count("worst") == 12 * 8
    media = json.loads(page.all("script", type_="application/json")[0].text)
    shown = {e.attributes["data-clip"] for e in page.elements if "data-clip" in e.attributes}
    assert shown == set(media) and len(media) > 8
    for place in (e for e in page.elements if "data-clip" in e.attributes):
        number = place.attributes["data-name"].removeprefix("clip")
        head, _, body = media[place.attributes["data-clip"]]["image"].partition(",")
        assert head == "data:image/jpeg;base64" and base64.b64decode(body) == f"\u00ff\u00d8 picture {number}".encode("latin-1")
        assert media[place.attributes["data-clip"]]["sound"].startswith("data:audio/mpeg;base64,")


@pytest.mark.parametrize("where", ["captions", "ids", "name"])
def test_markup_in_what_people_wrote_is_text(where: str) -> None:
    n = 40
    words = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(n)]
    plain = page_of(n, captions={f"clip{i}": "x" for i in range(n)})
    if where == "captions":
        html = page_of(n, captions={f"clip{i}": text for i, text in enumerate(words)})
    elif where == "ids":
        html = page_of(n, ids=words, captions=dict.fromkeys(words, "x"), notes=words)
    else:
        tables = random_tables(n)
        scores = score(EmbeddingTable(tuple(map(str, range(n))), tables))
        html = render(build_report(HOSTILE[1] + HOSTILE[3], tables, scores, [Other(text, scores.result) for text in HOSTILE]))
    page, bare = Page(html), Page(plain)
    html.encode("utf-8")
    assert page.faults == []
    assert {e.tag for e in page.elements} <= {e.tag for e in bare.elements} | {"ul"}
    assert len(page.all("script")) == 2 and len(page.all("style")) == 1 and not page.all("img")
    allowed = {name for e in bare.elements for name in e.attributes}
    assert {name for e in page.elements for name in e.attributes} <= allowed and not any(name.startswith("on") for name in allowed)
    assert "\x00" not in html
    shown = HOSTILE[:7] if where != "name" else HOSTILE[1:2]
    assert all(any(text in e.text for e in page.elements if e.tag in ("p", "span", "bdi")) for text in shown)
    people = [e for e in page.elements if "caption" in e.attributes.get("class", "").split()]
    assert all(e.attributes.get("dir") == "auto" for e in people)


def test_long_captions_are_cut_and_media_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = {f"clip{i}": Clip(bytes(3000), None) for i in range(40)}
    monkeypatch.setattr(report, "MEDIA_BYTES", 50_000)
    html = page_of(captions={f"clip{i}": "<" * 100_000 for i in range(40)}, clips=clips)
    media = json.loads(Page(html).all("script", type_="application/json")[0].text)
    assert len(media) == 12 and "clips are not in the page, to keep its media under" in html
    assert len(html) < 3_000_000


def test_page_of_the_benchmark_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "STUDIED", 500)  # the page shows as much of a sample
    names = tuple(f"record-{i:06d}" for i in range(3782))
    tables = random_tables(3782, width=8)
    scores = score(EmbeddingTable(names, tables), resamples=50)
    captions = dict.fromkeys(names, "a dog barks twice, then a door closes & somebody laughs " * 4)
    html = render(build_report("bench.npz", tables, scores), captions)
    assert len(html.encode()) < 5_000_000
    assert Page(html).faults == []


def test_some_directions_ties_and_one_record() -> None:
    constant = np.ones((5, 3), np.float32)
    scores = score({"text": constant, "video": constant})
    html = render(build_report("constant.npz", {"text": constant, "video": constant}, scores))
    page = Page(html)
    assert page.faults == [] and "AVG-all has no value" in html and "10 of 10 queries are decided by a tie" in page.all("body")[0].text
    one = np.ones((1, 1), np.float32)
    for tables in ({"text": one, "video": one}, random_tables(2, width=2)):
        assert Page(render(build_report("few.npz", tables, score(tables)))).faults == []


def test_same_input_gives_the_same_page(html: str) -> None:
    assert page_of(seed=3) == page_of(seed=3)
