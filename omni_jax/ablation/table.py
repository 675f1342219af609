"""The result of an ablation as JSON, text, Markdown and HTML."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from omni_jax.ablation.arms import Arm
from omni_jax.ablation.intervals import paired
from omni_jax.ablation.runs import Ablation, Outcome
from omni_jax.data.synthetic_parts import ceilings, draw_factors
from omni_jax.retrieval.directions import DIRECTIONS, averages
from omni_jax.retrieval.report import environment
from omni_jax.retrieval.table import aligned

FORMAT = "omni_jax.ablation/1"
METHOD: tuple[str, ...] = (
    "R@1 in percent on held-out clips: mean over seeds, and in brackets the 95 % interval of the paired difference to the first arm "
    "(Student's t over seeds; a seed has the same first weights and order of clips in all arms).",
    "A star marks an interval that leaves out 0. Each interval is for one row: of 20 rows without any difference one has a star by "
    "chance, and the directions of an arm are not independent. Judge arms by the averages first.",
    "The intervals speak of other seeds on these clips, not of other clips.",
)


def result_of(ablation: Ablation, arms: Sequence[Arm], outcome: Outcome, command: str) -> dict[str, Any]:
    """Returns everything that is known of a table, ready for JSON."""
    scores, first = outcome.scores, arms[0].name
    # Dimensions that one arm alone is scored at cannot be compared.
    figures = [name for name in scores[first][0] if all(name in found[0] for found in scores.values())]
    value: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "start": ablation.start,
        "equal": ablation.equal,
        "seeds": ablation.seeds,
        "ceilings": None,
        "warm_losses": ablation.warm_losses,
        "warm_margin": ablation.warm_margin,
        "warm": [dict(row) for row in outcome.warm],
        "arms": [],
    }
    if ablation.synthetic:
        best = ceilings(draw_factors(ablation.parts)["test"], DIRECTIONS)
        value["ceilings"] = best | averages(best)
        value["gallery"] = ablation.parts.test
    for arm in arms:
        rates = {name: [row[name] for row in scores[arm.name]] for name in figures}
        value["arms"].append(
            {
                "name": arm.name,
                "changes": list(arm.changes),
                "steps": outcome.steps[arm.name],
                "clips": outcome.steps[arm.name] * ablation.arms[arm.name].batch.clips,
                "cpu_seconds_per_step": outcome.seconds_per_step[arm.name],
                "cpu_seconds": outcome.steps[arm.name] * outcome.seconds_per_step[arm.name],
                "R@1": {name: {"mean": statistics.fmean(found), "seeds": found} for name, found in rates.items()},
                "difference": None
                if arm.name == first
                else {name: paired([row[name] for row in scores[first]], found).row() for name, found in rates.items()},
            }
        )
    return value


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells of the table: a heading, the directions, the averages, then what each arm took."""
    arms, best = result["arms"], result["ceilings"]
    rows = [["R@1", *(["ceiling"] if best else []), *(arm["name"] for arm in arms)]]
    for name in arms[0]["R@1"]:
        # Fewer dimensions can tell no more apart, so AVG-all@N has the ceiling of AVG-all.
        rows.append([name, *([f"{best[name.partition('@')[0]]:.1f}"] if best else []), *(_cell(arm, name) for arm in arms)])
    for title, key, form in (("steps", "steps", "d"), ("clips seen", "clips", "d"), ("CPU s", "cpu_seconds", ".1f")):
        rows.append([title, *([""] if best else []), *(format(arm[key], form) for arm in arms)])
    return rows


def _cell(arm: Mapping[str, Any], name: str) -> str:
    mean = f"{arm['R@1'][name]['mean']:.1f}"
    if arm["difference"] is None:
        return mean
    low, high = arm["difference"][name]["interval"]
    star = "*" if low > 0 or high < 0 else " "
    return f"{mean} [{low:+.1f}, {high:+.1f}]{star}"


def _rules(result: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the rows that a rule stands before: the first direction, the first average, what the arms took."""
    return 1, 1 + len(DIRECTIONS), 1 + len(result["arms"][0]["R@1"])


def title_of(result: Mapping[str, Any]) -> str:
    """Returns a heading."""
    equal = {"steps": "equal steps", "cpu_time": "equal CPU time"}[result["equal"]]
    return f"{result['start'].capitalize()} start, {equal}, {result['seeds']} seeds"


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Returns the sentences that belong under the table."""
    notes: list[str] = list(METHOD)
    if result["ceilings"]:
        size = result["gallery"]
        notes.append(
            f"Ceiling: what the best possible ranking of this gallery of {size} scores, counted from the factors of which its clips were "
            f"made. Chance is {100 / size:.1f}."
        )
    if any("@" in name for name in result["arms"][0]["R@1"]):
        notes.append("AVG-all@N: the same of the first N dimensions alone, scaled to length 1 again.")
    if result["warm"]:
        steps = ", ".join(f"{row['steps']:.0f}" for row in result["warm"])
        notes.append(
            f"Warm start: a model trained with {result['warm_losses']} until, on validation clips, some two modalities together found the "
            f"third, and were found by it, better by {result['warm_margin']:g} points than the better of the two alone: after {steps} "
            "steps, by seed."
        )
    if result["equal"] == "cpu_time":
        notes.append("Equal CPU time: each arm makes as many steps as take the CPU time of the first arm's, by the cost of a step.")
    notes.append("CPU s: steps times the CPU time of a step, measured once for each arm over 30 steps, compilation left out.")
    return notes


def as_text(result: Mapping[str, Any]) -> str:
    """Returns the table as plain text."""
    rows = rows_of(result)
    lines = aligned(rows, rule_before=_rules(result))
    return "\n".join([title_of(result), "", *lines, "", *notes_of(result)])


def as_markdown(result: Mapping[str, Any]) -> str:
    """Returns the table as a section of a page, with the command that made it."""
    lines = aligned(rows_of(result), rule_before=_rules(result))
    arms = [f"- `{arm['name']}`: `{' '.join(arm['changes'])}`" for arm in result["arms"]]
    notes = [f"- {note}" for note in notes_of(result)]
    head = [f"## {title_of(result)}", "", "```sh", result["command"], "```", ""]
    return "\n".join([*head, "```text", *lines, "```", "", *notes, "", "Arms:", "", *arms, ""])


def as_page(result: Mapping[str, Any]) -> str:
    """Returns the table as one self-contained HTML page."""
    marks = set(_rules(result)[1:])
    page = environment().get_template("ablation.html.j2")
    return page.render(title=title_of(result), rows=rows_of(result), marks=marks, notes=notes_of(result), result=result)
