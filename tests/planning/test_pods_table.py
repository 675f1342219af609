"""The committed table of 7B programs compiled for pods: complete, within memory, and the one that the pages show."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.repository import ROOT
from tools import pods_table

LARGEST = 150e6  # bytes of a collective outside the gathers of a layer's weights
HARD = ("text", "audio", "video")  # of the kinds in their cycle

TIMED = [case for case in pods_table.cases() if case.timed and case.programs == "train"]


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    return json.loads(pods_table.TABLE.read_text())


def trained(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [program for program in entry["programs"] if program["program"] == "train"]


def fits(entry: dict[str, Any]) -> bool:
    return all(program["status"] == "fits" for program in entry["programs"])


def entry(table: list[dict[str, Any]], case: pods_table.Case) -> dict[str, Any]:
    (found,) = filter(case.made, table)
    return found


def test_the_table_holds_what_the_tool_compiles_and_nothing_else(table: list[dict[str, Any]]) -> None:
    for case in pods_table.cases():
        programs = entry(table, case)["programs"]
        if case.programs == "train":
            assert [program["kind"]["hard"] for program in programs] == [HARD[int(place)] for place in case.kinds.split(",")]
        if case != pods_table.REFUSED:
            assert fits(entry(table, case))
            assert all(("share_of_peak" in program) == case.timed for program in programs)
    assert len(table) == len(pods_table.cases())


def test_what_fits_stays_within_memory(table: list[dict[str, Any]]) -> None:
    for program in (program for entry in table for program in entry["programs"] if program["status"] == "fits"):
        assert 0 < program["memory_gib"]["peak"] < program["memory_gib"]["limit"]


def test_no_large_collective_but_those_of_a_layers_weights(table: list[dict[str, Any]]) -> None:
    for entry in filter(fits, table):
        for program in entry["programs"]:
            assert (entry["chips"] > 1) == (program["largest_collective_bytes"] > 0)
            assert program["largest_collective_bytes"] <= LARGEST and program["large_outside_layers"] == []


def test_every_host_has_whole_blocks(table: list[dict[str, Any]]) -> None:
    for entry in table:
        blocks = int(entry["command"].split("batch.blocks=")[1].split()[0])
        assert blocks % entry["hosts"] == 0 and entry["micro_batch"] % blocks == 0, entry["command"]


def test_the_page_says_what_each_chip_and_an_epoch_cost() -> None:
    page = (ROOT / "docs/guides/pods.md").read_text()
    for row in (row for case in TIMED for row in pods_table.rows(case)):
        assert row in page
    million = pods_table.hours_per_million("v5e")
    assert f"an epoch of 100,000 triples on 16 v5e chips is {million / 10:.0f} chip-hours, or {million / 160:.1f} hours" in page


def test_pools_of_256_clips_or_more_fit(table: list[dict[str, Any]]) -> None:
    for case in itertools.chain(*pods_table.RECOMMENDED.values()):
        found = entry(table, case)
        assert found["micro_batch"] * found["micro_batches"] >= 256 and found["negatives"] == "global" and found["model"] == "7B"


def test_what_runs_out_of_memory_says_so(table: list[dict[str, Any]]) -> None:
    refused = [program for entry in table for program in entry["programs"] if program["status"] == "out of memory"]
    assert refused
    for program in refused:
        said = program["out_of_memory"]
        assert said["used_gib"] > said["limit_gib"] and said["change"], said


def test_the_embedding_pass_fits_and_the_page_says_what_it_takes(table: list[dict[str, Any]]) -> None:
    page = (ROOT / "docs/guides/pods.md").read_text()
    for case in pods_table.EMBED:
        parts = {program["program"] for program in entry(table, case)["programs"]}
        assert parts == {f"embed/{part}" for part in ("vision", "audio", "beats", "rows")}
        assert pods_table.embedding_row(case) in page


def test_the_page_shows_the_table() -> None:
    shown = (ROOT / "docs/guides/pods.md").read_text().split("<!-- pods_table.md -->\n")[1].split("\n<!-- end -->")[0]
    written = pods_table.TABLE.with_suffix(".md").read_text().strip()
    assert shown == written
    entries = json.loads(pods_table.TABLE.read_text())
    assert written.count("\n| ") == sum(len(entry["programs"]) for entry in entries) + 1
