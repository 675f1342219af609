"""The pages of the documentation that are made from the code, and the hand-written ones that must agree with it."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from omni_jax.cli import main as cli
from omni_jax.cli import status
from omni_jax.config import LoraConfig, Preset
from omni_jax.conversion.folder import Manifest
from omni_jax.data import clip_index, entries, prepare
from omni_jax.retrieval.directions import AVERAGES
from omni_jax.retrieval.metrics import NDCG_AT, RECALL_AT
from omni_jax.train.run_config import SECTIONS, RunConfig
from omni_jax.train.workdir import WorkdirConfig
from tests import repository
from tools import pods_table
from tools.documentation import notebooks, pages, spec

DOCS = repository.ROOT / "docs"
VARIABLE = re.compile(r"\bOMNI_[A-Z_]+\b")


def _page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    text = pages.commands_page()
    for name in cli.COMMANDS:
        assert f"\n## omni-jax {name}\n" in text
    assert "\n### omni-jax convert to-jax\n" in text and "| `--manifest SOURCE` | yes |" in text
    assert "omni-jax embed --model omni7b --manifest clips.jsonl" in text


def test_every_field_of_a_run_has_type_default_and_meaning() -> None:
    text = pages.config_page()
    rows = dict(re.findall(r"^\| `([a-z_0-9.]+)` \| (.+) \|$", text, re.MULTILINE))
    assert {"steps", "data.train", "losses.temperature", "optimizer.b1", "model.lora.rank", "data.augment.text"} <= rows.keys()
    assert {f.name for f in dataclasses.fields(RunConfig)} == {name for name in rows if "." not in name} | set(SECTIONS) | {"optimizer"}
    assert rows["data.train"].startswith("text | required | ") and rows["checkpoint.keep"].startswith("whole number | `3` | ")
    assert "optimizer.total_steps" not in rows
    for name, row in rows.items():
        assert len(row.split(" | ")) == 3 and row.split(" | ")[2].strip(), f"{name} has no meaning"


def test_a_field_without_a_meaning_is_found() -> None:
    @dataclasses.dataclass
    class Section:
        """A section.

        Attributes:
          one, two: the first
            and the second.
        """

        one: int = 1
        two: int = 2
        three: int = 3

    assert pages.meanings(Section) == {"one": "the first and the second.", "two": "the first and the second."}
    with pytest.raises(KeyError, match="three"):
        list(pages._fields(Section))


def test_every_preset_field_and_value_is_on_the_page_of_presets() -> None:
    text = pages.presets_page()
    for field in dataclasses.fields(Preset):
        assert len(re.findall(rf"^\| `{field.name}` \|", text, re.MULTILINE)) == 2
    assert "| `text_head` | `'last'` | `'fused'` |" in text
    assert pages.meanings(LoraConfig).keys() == {f.name for f in dataclasses.fields(LoraConfig)}


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", _page("reference/exit_codes.md"), re.MULTILINE)}
    assert documented == {value for name, value in vars(status).items() if name.isupper()}


def test_the_environment_variables_are_those_that_the_code_reads() -> None:
    places = [*repository.sources(*repository.PRODUCT), *(repository.ROOT / "launch").glob("*.sh")]
    places += [repository.ROOT / "tests" / name for name in ("conftest.py", "golden_set.py")]
    read = {name for path in places for name in VARIABLE.findall(path.read_text(encoding="utf-8"))}
    assert read and read == set(VARIABLE.findall(_page("reference/environment.md")))


def test_the_file_formats_name_every_field_and_file() -> None:
    text = _page("reference/file_formats.md")
    names = {field.name for record in (Manifest, WorkdirConfig) for field in dataclasses.fields(record)}
    names |= {*entries.PLAIN, *entries.OFFICIAL}
    names |= {*clip_index.COLUMNS, clip_index.INDEX, prepare.STATE, prepare.ERRORS}
    assert not {name for name in names if f"`{name}`" not in text and f"`{name}/`" not in text}


def test_the_costs_of_the_recipes_follow_from_the_table_of_pods() -> None:
    hours = [round(pods_table.hours_per_million(chip)) for chip in pods_table.RECOMMENDED]
    for page in (_page("guides/recipes.md"), (repository.ROOT / "README.md").read_text(encoding="utf-8")):
        for chip, million in zip(pods_table.RECOMMENDED, hours, strict=True):
            assert f"{million} on {chip}" in " ".join(page.split())
    rows = re.findall(
        r"^\| \w[\w-]+ \| [^|]+ \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", _page("guides/recipes.md"), re.MULTILINE
    )
    assert len(rows) == 4
    for records, *shown in rows:
        assert shown == [f"{int(records.replace(',', '')) * per_million / 1e6:.1f}" for per_million in hours]


def test_the_metrics_of_an_evaluation_are_explained() -> None:
    text = _page("reference/metrics.md")
    for name in (*(f"R@{k}" for k in RECALL_AT), f"NDCG@{NDCG_AT}", "MRR", "median_rank", "mean_rank", "ties", *AVERAGES):
        assert f"`{name}`" in text, name


def test_every_cited_section_of_the_specification_exists() -> None:
    sections = set(spec.anchors())
    cited = {path: spec.cited(path.read_text(encoding="utf-8")) for path in repository.sources(*repository.PRODUCT, "tests")}
    assert len([path for path, numbers in cited.items() if numbers]) > 30
    assert not {str(path): numbers - sections for path, numbers in cited.items() if numbers - sections}
    assert sections == set(range(1, len(sections) + 1))


def test_citations_are_read_in_every_form() -> None:
    assert spec.cited("(SPEC section 4)") == {4}
    assert spec.cited("SPEC sections 1 and 10; SPEC sections 3, 5 and 6. Section 7") == {1, 3, 5, 6, 10}


def test_the_python_api_page_names_what_exists() -> None:
    for name in re.findall(r"^::: ([\w.]+)$", _page("reference/api.md"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_navigation_names_every_page_once() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (repository.ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    made = {
        *pages.made(),
        *(f"notebooks/{path.stem}.md" for path in (DOCS / "notebooks").glob("*.ipynb")),
        "changelog.md",
        "guides/launch.md",
    }
    assert sorted(listed) == sorted(written | made)


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path: Path) -> None:
    path = tmp_path / "probe.ipynb"
    path.write_text(
        '{"cells": [{"cell_type": "markdown", "source": ["# Title\\n"]}, {"cell_type": "code", "source": ["1 + 1"], "outputs": ['
        '{"data": {"text/plain": ["2"]}}, {"data": {"image/png": "AA\\nBB"}}, {"name": "stdout", "text": ["a\\n"]}]}]}'
    )
    text = notebooks.page(path)
    assert text.startswith("# Title\n\n```python\n1 + 1\n```\n\n```text\n2\n```")
    assert 'src="data:image/png;base64,AABB"' in text and "```text\na\n```" in text
