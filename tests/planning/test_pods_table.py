"""The committed table of 7B programs compiled for pods: complete, within memory, and the one that the pages show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.house import ROOT
from tools import pods_table

WANTED = {  # (chip, chips, slices) of a training step
    ("v5e", 16, 1),
    ("v5e", 256, 1),
    ("v6e", 64, 1),
    ("v5p", 64, 1),
    ("v5p", 128, 1),
    ("v4", 64, 1),
    ("v5e", 512, 2),
    ("v7x", 16, 1),
}
LARGEST = 150e6  # bytes of a collective outside the gathers of a layer's weights
HARD = {"text", "audio", "video"}


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return json.loads(pods_table.TABLE.read_text())


def trained(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [program for program in entry["programs"] if program["program"] == "train"]


def fits(entry: dict[str, Any]) -> bool:
    return all(program["status"] == "fits" for program in entry["programs"])


def test_every_chip_count_has_all_step_kinds_within_memory(table: list[dict[str, Any]]) -> None:
    found = set()
    for entry in table:
        if trained(entry) and fits(entry):
            assert {program["kind"]["hard"] for program in trained(entry)} == HARD
            found.add((entry["topology"].split()[-1].split(":")[0], entry["chips"], entry["slices"]))
        for program in entry["programs"]:
            if program["status"] == "fits":
                assert 0 < program["memory_gib"]["peak"] < program["memory_gib"]["limit"]
    assert found >= WANTED


def test_no_large_collective_but_those_of_a_layers_weights(table: list[dict[str, Any]]) -> None:
    for entry in filter(fits, table):
        for program in entry["programs"]:
            assert 0 < program["largest_collective_bytes"] <= LARGEST and program["large_outside_layers"] == []


def test_every_host_has_whole_blocks(table: list[dict[str, Any]]) -> None:
    for entry in table:
        blocks = int(entry["command"].split("batch.blocks=")[1].split()[0])
        assert blocks % entry["hosts"] == 0 and entry["micro_batch"] % blocks == 0, entry["command"]


def test_the_page_says_what_an_epoch_costs(table: list[dict[str, Any]]) -> None:
    (entry,) = [e for e in table if e["topology"] == "v5e:4x4" and fits(e)]
    million = sum(program["expected"]["chip_hours_per_million_triples"] for program in trained(entry)) / 3
    page = (ROOT / "docs/guides/pods.md").read_text()
    assert f"an epoch of 100,000 triples on 16 v5e chips is {million / 10:.0f} chip-hours, or {million / 160:.1f} hours" in page
    peak = max(program["memory_gib"]["peak"] for program in trained(entry))
    assert f"with gradient caching: {peak:.1f} of 15.75 GiB" in page


def test_256_clips_as_one_pool_fit_16_v5e(table: list[dict[str, Any]]) -> None:
    (entry,) = [e for e in table if e["topology"] == "v5e:4x4" and fits(e)]
    assert entry["micro_batch"] * entry["micro_batches"] == 256 and entry["negatives"] == "global" and entry["model"] == "7B"


def test_what_runs_out_of_memory_says_so(table: list[dict[str, Any]]) -> None:
    refused = [program for entry in table for program in entry["programs"] if program["status"] == "out of memory"]
    assert refused
    for program in refused:
        said = program["out_of_memory"]
        assert said["used_gib"] > said["limit_gib"] and said["change"], said


def test_the_embedding_pass_fits_4_v5e(table: list[dict[str, Any]]) -> None:
    (entry,) = [e for e in table if e["chips"] == 4]
    assert {program["program"] for program in entry["programs"]} == {f"embed/{part}" for part in ("vision", "audio", "beats", "rows")}
    assert fits(entry)


def test_the_page_shows_the_table() -> None:
    shown = (ROOT / "docs/guides/pods.md").read_text().split("<!-- pods_table.md -->\n")[1].split("\n<!-- end -->")[0]
    written = pods_table.TABLE.with_suffix(".md").read_text().strip()
    assert shown == written
    entries = json.loads(pods_table.TABLE.read_text())
    assert written.count("\n| ") == sum(len(entry["programs"]) for entry in entries) + 1
