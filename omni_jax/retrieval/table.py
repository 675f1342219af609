"""Results as plain text: the 12-direction table of one result, and several results side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.retrieval.statistics import Difference

INTERVAL = "R@1_interval"
COLUMNS = {
    "R@1": ("R@1", ".2f"),
    INTERVAL: ("95 %", ".1f"),
    "R@5": ("R@5", ".2f"),
    "R@10": ("R@10", ".2f"),
    "NDCG@10": ("NDCG@10", ".2f"),
    "MRR": ("MRR", ".2f"),
    "median_rank": ("median", ".1f"),
    "mean_rank": ("mean", ".1f"),
    "ties": ("ties", "d"),
}
"""Metric -> (heading, format)."""

POLICY = {
    "optimistic": "ties count in the query's favour (optimistic, as in the published scorer)",
    "average": "a relevant item is in the middle of the candidates level with it (average)",
    "worst": "a candidate level with the relevant one counts as better (worst)",
}
ABSENT = "-"


def format_table(result: Mapping[str, Any]) -> str:
    """Returns the 12 directions of one result (the dict of `evaluate`) with their metrics, the averages, and a note on ties."""
    directions: Mapping[str, Mapping[str, Any]] = result["directions"]
    shown = [key for key in COLUMNS if any(key in metrics for metrics in directions.values())]
    rows = [["direction", *(COLUMNS[key][0] for key in shown)]]
    for name in (d for d in DIRECTIONS if d in directions):
        rows.append([name, *(_cell(directions[name].get(key), COLUMNS[key][1]) for key in shown)])
    spread = result.get("intervals", {})
    for name in AVERAGES:
        value = result.get(name)
        rows.append([name, _cell(value, ".2f"), *([_cell(spread.get(name), ".1f")] if INTERVAL in shown and value is not None else [])])
    lines = aligned(rows, rule_before=(1, len(rows) - len(AVERAGES)))
    lines += ["", f"{result['n']} records; rates, NDCG and MRR in percent; averages are means of R@1."]
    if spread or INTERVAL in shown:
        drawn = result["bootstrap"]
        lines.append(f"95 %: bootstrap interval of R@1 over the records ({drawn['resamples']} resamples, seed {drawn['seed']}).")
    reasons: Mapping[str, str] = result.get("missing", {})
    lines += [f"{name}: no value, {reason}." for name, reason in reasons.items()]
    sizes = [f"{name} {row['queries']} in {row['gallery']}" for name, row in directions.items() if "gallery" in row]
    if sizes:
        lines.append(f"Queries in galleries: {', '.join(sizes)}.")
    policy = result.get("tie_policy", "optimistic")
    queries = sum(int(metrics.get("queries", result["n"])) for metrics in directions.values())
    tied = sum(int(metrics.get("ties", 0)) for metrics in directions.values())
    share = f"{tied} of {queries} queries are decided by a tie ({100 * tied / max(queries, 1):.1f} %)"
    sentence = POLICY[policy]
    lines.append(f"Ties: {share}. {sentence[0].upper()}{sentence[1:]}." if policy == "optimistic" else f"Ties: {share}; {sentence}.")
    if tied and policy == "optimistic":
        lines.append("      The numbers above are the best case; --ties worst shows the other end.")
    return "\n".join(lines)


def format_left_out(left_out: Mapping[str, Sequence[str]], captions: int, clips: int) -> str:
    """Returns lines on what `captions_left_out` found, given how many captions were asked for and how many clips there are."""
    lost, bare = left_out["captions"], left_out["clips"]
    lines = []
    if lost:
        lines.append(f"Captions: {len(lost)} of {len(lost) + captions} belong to no clip here and were left out, the first {lost[0]!r}.")
    if bare:
        lines.append(f"Clips: {len(bare)} of {clips} have no caption: no query asks for them; the first {bare[0]!r}.")
    return "\n".join(lines)


def format_comparison(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns R@1 of several results side by side: rows are directions and averages, columns are results in the order given.

    A result may hold some directions only, as the published ones do. Results over different numbers of records, or scored under
    different tie policies, are pointed out below the table.
    """
    rows = [["R@1", *results]]
    for name in DIRECTIONS:
        values = [result["directions"].get(name, {}).get("R@1") for result in results.values()]
        if any(value is not None for value in values):
            rows.append([name, *(_cell(value, COLUMNS["R@1"][1]) for value in values)])
    rows += [[name, *(_cell(result.get(name), ".2f") for result in results.values())] for name in AVERAGES]
    lines = aligned(rows, rule_before=(1, len(rows) - len(AVERAGES)))
    sizes = {name: result["n"] for name, result in results.items() if "n" in result}
    if len(set(sizes.values())) > 1:
        lines += ["", "Note: galleries differ in size, so these columns are not comparable: " + _listed(sizes) + "."]
    policies = {name: result["tie_policy"] for name, result in results.items() if "tie_policy" in result}
    if len(set(policies.values())) > 1:
        lines += ["", "Note: tie policies differ: " + _listed(policies) + "."]
    return "\n".join(lines)


def format_differences(name: str, other: str, differences: Mapping[str, Difference]) -> str:
    """Returns the differences in R@1 between two results over the same records, with their intervals and p-values."""
    rows = [["R@1", "difference", "95 %", "p", "p (Holm)"]]
    directions = [d for d in DIRECTIONS if d in differences]
    for key in (*directions, *(a for a in AVERAGES if a in differences)):
        found = differences[key]
        low, high = (format(end, "+.2f") for end in found.interval)
        rows.append([key, format(found.difference, "+.2f"), f"{low} to {high}", chance(found.p), chance(found.p_holm)])
    lines = [f"{name} less {other}, percentage points:", *aligned(rows, rule_before=(1, 1 + len(directions)))]
    return "\n".join(
        [*lines, "", f"p: sign-flip test, record by record; Holm: corrected for the number of directions ({len(directions)})."]
    )


def chance(p: float | None) -> str:
    """Returns a p-value as people write it."""
    return ABSENT if p is None else "<0.001" if p < 0.001 else format(p, ".3f")


def _cell(value: Any, spec: str) -> str:
    if isinstance(value, Sequence):
        return "-".join(format(end, spec) for end in value)
    return ABSENT if value is None else format(value, spec)


def aligned(rows: Sequence[Sequence[str]], rule_before: Sequence[int]) -> list[str]:
    """Returns rows of cells as lines, the first column to the left and the others to the right; rules are drawn above some rows."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for number, row in enumerate(rows):
        if number in rule_before:
            lines.append("  ".join("-" * width for width in widths))
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
