"""The layout of the repository as data, and the reading of sources that tests/test_repository.py checks it with."""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BASE = {"omni_jax.config", "omni_jax.types", "omni_jax.io"}
CHAIN = {*BASE, "omni_jax.media", "omni_jax.features", "omni_jax.towers", "omni_jax.tokens"}
PACKAGES = {
    *CHAIN,
    "omni_jax.data",
    "omni_jax.parallel",
    "omni_jax.model",
    "omni_jax.objectives",
    "omni_jax.retrieval",
    "omni_jax.train",
    "omni_jax.planning",
    "omni_jax.api",
}

# Package -> the packages it may import beside itself. docs/development/architecture.md shows the same table to people.
MAY_IMPORT: dict[str, set[str]] = {
    "omni_jax": {"omni_jax.config", "omni_jax.api", "omni_jax.objectives", "omni_jax.retrieval", "omni_jax.train"},  # lazily: public names
    "omni_jax.__main__": {"omni_jax.cli"},
    "omni_jax.config": set(),
    "omni_jax.types": set(),
    "omni_jax.io": {"omni_jax.types"},
    "omni_jax.media": BASE,
    "omni_jax.features": BASE,
    "omni_jax.towers": {"omni_jax.config", "omni_jax.types"},
    "omni_jax.tokens": {*BASE, "omni_jax.towers"},
    "omni_jax.data": CHAIN,
    "omni_jax.parallel": set(),
    "omni_jax.model": {*BASE, "omni_jax.towers", "omni_jax.parallel"},
    "omni_jax.objectives": set(),
    "omni_jax.retrieval": {*BASE, "omni_jax.parallel"},
    "omni_jax.train": {*BASE, "omni_jax.towers", "omni_jax.tokens", "omni_jax.parallel", "omni_jax.model", "omni_jax.objectives"},
    "omni_jax.planning": {
        *BASE,
        "omni_jax.towers",
        "omni_jax.tokens",
        "omni_jax.parallel",
        "omni_jax.model",
        "omni_jax.retrieval",
        "omni_jax.train",
    },
    "omni_jax.api": {*PACKAGES - {"omni_jax.api"}, "omni_jax.conversion"},
    "omni_jax.ablation": {*BASE, "omni_jax.data", "omni_jax.objectives", "omni_jax.retrieval", "omni_jax.train", "omni_jax.api"},
    "omni_jax.serve": {"omni_jax", *BASE, "omni_jax.media", "omni_jax.data", "omni_jax.retrieval", "omni_jax.api"},
    "omni_jax.engines": {
        "omni_jax",
        *CHAIN,
        "omni_jax.data",
        "omni_jax.retrieval",
        "omni_jax.api",
    },
    "omni_jax.cli": {
        "omni_jax",
        *PACKAGES,
        "omni_jax.ablation",
        "omni_jax.engines",
        "omni_jax.serve",
        "omni_jax.conversion",
        "omni_jax.configs",
    },
    "omni_jax.conversion": {*BASE, "omni_jax.model"},
    "omni_jax.configs": {"omni_jax.config"},
    "launch": set(),
}

# Other people's packages that the product does without: other frameworks, and whatever asks the network.
FORBIDDEN_PACKAGES = {
    "torch",
    "torchvision",
    "torchaudio",
    "tensorflow",
    "librosa",
    "requests",
    "httpx",
    "urllib.request",
    "huggingface_hub",
}
ALLOWED = {"conversion/hub.py": {"huggingface_hub"}, "omni_jax/api/sentence_transformers.py": {"torch"}}
"""The one file that asks the network: for a model that a user names there; and the one that hands vectors to a torch program."""
FORBIDDEN_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
PRODUCT = ("omni_jax", "conversion", "configs", "launch")
MAX_LINES = 450
# Folders of the top level that are imported as parts of omni_jax; there a link stands for each.
LINKED = {"conversion", "configs"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module: where it stands and its dotted name."""

    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


@functools.cache
def tracked() -> tuple[Path, ...]:
    """Returns the files of the project: what git tracks, or all but hidden folders where there is no git (a source archive)."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return tuple(ROOT / name for name in listed if name and (ROOT / name).is_file())
    return tuple(p for p in sorted(ROOT.rglob("*")) if p.is_file() and not {"__pycache__", ".venv"} & set(p.parts))


def sources(*folders: str) -> tuple[Path, ...]:
    """Returns the Python files under the folders, tracked or new."""
    return tuple(sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes(), filename=str(file))


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Returns every node of a file's tree: a dozen tests look at each."""
    return tuple(ast.walk(tree(file)))


def module_name(file: Path) -> str:
    """Returns the dotted name: omni_jax/model/__init__.py is omni_jax.model, conversion/rules.py is omni_jax.conversion.rules."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("omni_jax", *parts) if parts[0] in LINKED else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(module: str) -> str:
    """Returns the package a dotted name belongs to: omni_jax.model.layers is in omni_jax.model."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "omni_jax" else 1])


def modules() -> dict[str, Path]:
    return {module_name(file): file for file in sources(*PRODUCT)}


@functools.cache
def imports(file: Path) -> tuple[Import, ...]:
    """Returns every import of a file, inside functions too, resolved to whole modules where the name is one."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[Import]:
    known = _names(ROOT)
    here = module_name(file)
    package = here if file.name == "__init__.py" else here.rpartition(".")[0]
    for node in nodes(file):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(file, node.lineno, full if full in known or full in FORBIDDEN_PACKAGES else base)


@functools.cache
def _names(root: Path) -> frozenset[str]:
    return frozenset(modules())


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Returns the names along one cycle of a directed graph, its first name again at the end, or None."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for following in sorted(graph.get(node, ())):
            if cycle := visit(following):
                return cycle
        path.pop()
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node))), None)
