"""The notebooks: one is executed with Jupyter in the documentation's environment, the one for a TPU is read."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests import repository
from tests.programs import QUICK
from tools.documentation import notebooks

FOLDER = repository.ROOT / "docs/notebooks"


@pytest.mark.docs
def test_the_quickstart_notebook_runs_from_the_first_cell_to_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name, value in {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(repository.ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    executed = tmp_path / "quickstart.ipynb"
    nbformat.write(notebook, executed)
    text = notebooks.page(executed)
    assert "AVG-all" in text and text.count('<img alt="plot"') == 1


@pytest.mark.docs
def test_the_build_refuses_a_link_and_an_anchor_that_lead_nowhere(tmp_path: Path) -> None:
    """With the settings of mkdocs.yml, on two pages of their own."""
    import yaml
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    text = (repository.ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = {key: value for key, value in yaml.safe_load(text).items() if key in ("site_name", "strict", "validation")}
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**settings, "plugins": []}))
    page = tmp_path / "docs/index.md"

    def made(body: str) -> None:
        page.write_text(f"# Page\n\n{body}\n")
        build(load_config(str(tmp_path / "mkdocs.yml")))

    made("[here](index.md#page)")
    for broken in ("[nowhere](absent.md)", "[nowhere](index.md#absent)"):
        with pytest.raises(Abort):
            made(broken)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_valid_cells(path: Path) -> None:
    """Outputs are made when it is run; commands of IPython stand in lines of their own."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and cells[0]["cell_type"] == "markdown"
    for cell in code:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse("\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))))


def test_the_notebook_for_a_tpu_says_what_each_step_needs() -> None:
    cells = json.loads((FOLDER / "colab_tpu.ipynb").read_text(encoding="utf-8"))["cells"]
    steps = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"][1:]
    assert len(steps) == 7
    assert all("Needs" in step or "needs" in step or "takes" in step for step in steps)


def test_the_packages_of_the_documentation_are_pinned_with_hashes_beside_the_others() -> None:
    pins = {
        name: dict(re.findall(r"^([\w.-]+)==[\w.-]+((?: --hash=sha256:[0-9a-f]{64})*)$", text.replace(" \\\n   ", ""), re.MULTILINE))
        for name in ("requirements.lock", "requirements-docs.lock")
        for text in [(repository.ROOT / name).read_text(encoding="utf-8")]
    }
    own = pins["requirements-docs.lock"]
    assert {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python", "nbclient", "ipykernel", "matplotlib"} <= own.keys()
    assert all(own.values()), f"without a hash: {[name for name, hashes in own.items() if not hashes]}"
    assert not {canonicalize_name(name) for name in own} & {canonicalize_name(name) for name in pins["requirements.lock"]}
