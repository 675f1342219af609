"""Plans of several topologies in one table: a JSON file that each `omni-jax compile --table` adds to, and the same as Markdown."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from omni_jax.types import InputError

ASSUMED = ". In parentheses: not compiled at full effort, a share of the peak assumed."
FULL_EFFORT = " --full-effort"
KEPT = """
    program kind status memory_gib out_of_memory clips_per_device largest_collective_bytes large_outside_layers collectives_by_kind seconds
    at_peak expected predicted_seconds ideal_seconds share_of_peak without_estimate predicted
""".split()


def read(file: epath.Path) -> list[dict[str, Any]]:
    """Returns the plans of a table, none where the file is not there yet.

    Raises:
      InputError: for a file that is no table.
      OSError: where it cannot be read.
    """
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text())
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "command" in entry for entry in entries):
        raise InputError(f"{file}: not a table of omni-jax compile; name another file")
    return entries


def add(file: epath.Path, plan: dict[str, Any], command: str) -> None:
    """Adds a plan to the table, in the place of one by the same command at any effort, and writes both files.

    Raises:
      InputError, OSError: as `read`, or where they cannot be written.
    """
    entries = read(file)
    entry = {name: value for name, value in plan.items() if name != "programs"} | {"command": command}
    entry["programs"] = [{name: program[name] for name in KEPT if name in program} for program in plan["programs"]]
    same = command.removesuffix(FULL_EFFORT)
    entries = [old for old in entries if old["command"].removesuffix(FULL_EFFORT) != same] + [entry]
    entries.sort(key=lambda e: (e["topology"].split(" x ")[-1].split(":")[0], e["chips"], e["command"]))
    file.write_text(json.dumps(entries, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(entries))


def markdown(entries: list[dict[str, Any]]) -> str:
    """Returns the table: a row for each program of each plan."""
    lines = [
        "Written by `omni-jax compile --table`. " + (entries[0]["basis"] if entries else "") + ASSUMED,
        "",
        "| topology | chips | mesh | micro-batches x clips | remat | captions | program | status | peak GiB | limit "
        "| largest collective, MB | seconds predicted | share of peak | clips/s | chip-hours per million triples |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        mesh = " ".join(f"{name}={size}" for name, size in entry["mesh"].items() if size > 1)
        batch = f"{entry['micro_batches']} x {entry['micro_batch']}"
        for program in entry["programs"]:
            lines.append(f"| {' | '.join(_row(entry, program, mesh, batch))} |")
    return "\n".join(lines) + "\n"


def _row(entry: dict[str, Any], program: dict[str, Any], mesh: str, batch: str) -> list[str]:
    memory, refusal, kind = program["memory_gib"], program["out_of_memory"], program.get("kind")
    peak = memory["peak"] if memory else refusal["used_gib"] if refusal else float("nan")
    limit = memory["limit"] if memory else refusal["limit_gib"] if refusal else float("nan")
    name = f"train, hard {kind['hard']}" if kind else program["program"]
    rate = hours = "-"
    if rates := program.get("predicted") or program.get("expected"):
        rate, hours = f"{rates['clips_per_second']:.1f}", f"{rates['chip_hours_per_million_triples']:,.0f}"
    if "predicted" not in program and rates:
        rate, hours = f"({rate})", f"({hours})"
    seconds, share = program.get("predicted_seconds"), program.get("share_of_peak")
    timed = (f"{seconds:.3g}", f"{share:.0%}") if seconds and share is not None else ("-", "-")
    captions = str(entry.get("caption_tokens", "-"))
    largest = f"{program.get('largest_collective_bytes', 0) / 1e6:.0f}"
    cells = [entry["topology"], str(entry["chips"]), mesh or "-", batch if kind else "-", entry["remat"], captions, name, program["status"]]
    return [*cells, f"{peak:.2f}", f"{limit:.2f}", largest, *timed, rate, hours]
