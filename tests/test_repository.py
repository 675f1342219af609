"""The layout: who imports whom, what files are called and how long they are, and that the documents agree with the folders."""

from __future__ import annotations

import ast
import importlib
import math
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import omni_jax
from tests import repository, workers
from tests.golden_set import manifest_7b

_STREAMS = ("sys.stdout", "sys.stderr")
TREE = "docs/development/architecture.md"
ALL_PYTHON = repository.sources(*repository.PRODUCT, "tests", "tools")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".lock", ".yaml", ".yml", ".sh", ".cfg", ".txt", ".html", ".j2", ""}


def test_every_file_belongs_to_a_room() -> None:
    outside = [name for name in repository.modules() if repository.package(name) not in repository.MAY_IMPORT]
    assert not outside, f"no package of the import table holds {outside}"


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = []
    for file in repository.sources(*repository.PRODUCT):
        mine = repository.package(repository.module_name(file))
        for found in repository.imports(file):
            if found.name.split(".")[0] not in repository.PRODUCT:
                continue
            other = repository.package(found.name)
            if other != mine and other not in repository.MAY_IMPORT.get(mine, set()):
                wrong.append(f"{found} (from {mine})")
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_rooms_or_modules() -> None:
    known = repository.modules()
    files: dict[str, set[str]] = {name: set() for name in known}
    packages: dict[str, set[str]] = {}
    for name, file in known.items():
        for found in repository.imports(file):
            # A package's own __init__ shows names of its modules; a module that imports them from there would close a circle.
            if found.name in known and found.name != name:
                files[name].add(found.name)
                if repository.package(found.name) != repository.package(name) and name != "omni_jax":
                    packages.setdefault(repository.package(name), set()).add(repository.package(found.name))
    assert repository.find_cycle(packages) is None
    del files["omni_jax"]  # its names are loaded when first used, after the modules below it
    assert repository.find_cycle(files) is None


def test_cycle_finder_sees_cycles() -> None:
    assert repository.find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert repository.find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_import_reader_resolves_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "omni_jax" / "media"
    package.mkdir(parents=True)
    (tmp_path / "omni_jax" / "types.py").write_text("")
    file = package / "probe.py"
    file.write_text("from ..types import Clip\nfrom omni_jax import types\ndef f():\n    import torch.nn as nn\n    from . import probe\n")
    monkeypatch.setattr(repository, "ROOT", tmp_path)
    found = [(i.line, i.name) for i in repository.imports(file)]
    assert found == [(1, "omni_jax.types"), (2, "omni_jax.types"), (4, "torch.nn"), (5, "omni_jax.media.probe")]


def test_only_commands_print() -> None:
    """The library logs or calls back. Bars of tqdm ask what stderr is; their callers can switch them off."""
    bars = {"omni_jax/api/encoding.py", "omni_jax/api/run.py"}
    library = [file for file in repository.sources(*repository.PRODUCT) if not {"cli", "__main__.py"} & {*file.parts}]
    assert {file.relative_to(repository.ROOT).as_posix() for file in library if _prints(file)} == bars


def _prints(file: Path) -> bool:
    return any(
        (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr") and ast.unparse(node) in _STREAMS)
        for node in repository.nodes(file)
    )


def test_no_other_framework_and_no_network() -> None:
    wrong = [
        str(found)
        for file in repository.sources(*repository.PRODUCT)
        for found in repository.imports(file)
        for allowed in (repository.ALLOWED.get(file.relative_to(repository.ROOT).as_posix(), set()),)
        if any(found.name == p or found.name.startswith(f"{p}.") for p in repository.FORBIDDEN_PACKAGES - allowed)
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_import_torch_inside_functions_only() -> None:
    """Collection of the default tests must work where torch is not installed."""
    wrong = []
    for file in repository.sources("tests"):
        if not file.name.startswith("test_") and file.name != "conftest.py":
            continue
        for node in repository.tree(file).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            place = f"{file.relative_to(repository.ROOT)}:{node.lineno}"
            wrong += [place for n in names if n.split(".")[0] in {"torch", "peft", "tensorflow"}]
    assert not wrong, wrong


def test_tests_that_read_golden_data_say_so() -> None:
    wrong = []
    for file in repository.sources("tests"):
        functions = [n for n in repository.nodes(file) if isinstance(n, ast.FunctionDef)]
        asks = {f.name: {a.arg for a in f.args.args} for f in functions}
        golden = {"golden", "golden_nemotron"}
        while more := {name for name, needs in asks.items() if needs & golden and not name.startswith("test_")} - golden:
            golden |= more
        wrong += [
            f"{file.relative_to(repository.ROOT)}: {name}"
            for name, needs in asks.items()
            if name.startswith("test_") and needs & golden and "golden" not in name
        ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_named_for_what_they_do() -> None:
    wrong = []
    for file in ALL_PYTHON:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > repository.MAX_LINES:
            wrong.append(f"{file.relative_to(repository.ROOT)}: {lines} lines, at most {repository.MAX_LINES}; it is probably two files")
        if file.name in repository.FORBIDDEN_NAMES:
            wrong.append(f"{file.relative_to(repository.ROOT)}: name a file for the one thing it does")
    assert not wrong, "\n".join(wrong)


def test_the_files_that_workers_begin_with_are_there() -> None:
    assert not [name for name in (*workers.PROCESSES, *workers.LONG) if not (repository.ROOT / name).is_file()]


def test_nothing_is_left_to_be_done() -> None:
    leftover = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    wrong = []
    for file in ALL_PYTHON:
        wrong += [
            f"{file.relative_to(repository.ROOT)}:{n}"
            for n, line in enumerate(file.read_text("utf-8").splitlines(), 1)
            if leftover.search(line)
        ]
        for node in repository.nodes(file):
            if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
                wrong.append(f"{file.relative_to(repository.ROOT)}:{node.lineno} raise NotImplementedError")
    assert not wrong, "\n".join(wrong)


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    wrong = []
    for file in repository.sources("tests"):
        for node in repository.nodes(file):
            if isinstance(node, ast.Attribute) and node.attr in {"skip", "skipif", "xfail", "importorskip"}:
                wrong.append(f"{file.relative_to(repository.ROOT)}:{node.lineno} {node.attr}")
    assert not wrong, "\n".join(wrong)


def test_no_machine_paths_in_tracked_files() -> None:
    path = re.compile(r"(?<![\w.\-/])/(?:work|root|home|Users|opt)/[\w.]")
    wrong = []
    for file in repository.tracked():
        if file.suffix in TEXT_SUFFIXES and "golden" not in file.relative_to(repository.ROOT).parts:
            for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if path.search(line):
                    wrong.append(f"{file.relative_to(repository.ROOT)}:{number}: {line.strip()[:80]}")
    assert not wrong, "\n".join(wrong)


def test_every_config_loads() -> None:
    import ml_collections

    for file in repository.sources("configs"):
        if file.name != "__init__.py":
            module = importlib.import_module(repository.module_name(file))
            assert isinstance(module.get_config(), ml_collections.ConfigDict), file.name
            assert "omni-jax" in (module.__doc__ or ""), f"{file.name}: open with the command that runs it"


def test_every_config_field_is_read_somewhere() -> None:
    fields: set[tuple[str, str]] = set()
    for node in [node for file in repository.sources("omni_jax/config") for node in repository.tree(file).body]:
        if isinstance(node, ast.ClassDef):
            fields |= {(node.name, f.target.id) for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
    read: set[str] = set()
    for file in repository.sources("omni_jax", "conversion"):
        read |= {n.attr for n in repository.nodes(file) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    unread = sorted(f"{owner}.{name}" for owner, name in fields if name not in read)
    assert not unread, f"fields that nothing reads: {unread}"


def test_the_file_tree_matches_the_folders() -> None:
    text = (repository.ROOT / TREE).read_text(encoding="utf-8")
    block = re.search(r"<!-- file tree -->\n```text\n(.*?)```", text, re.S)
    assert block, f"{TREE} has no file tree"
    listed: list[str] = []
    folders: list[str] = []
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.strip().split("  ")[0].split(", "):
            full = "/".join([*folders[:depth], name.rstrip("/")])
            listed.append(full)
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]
    missing = [name for name in listed if not (repository.ROOT / name).exists()]
    assert not missing, f"{TREE} names what does not exist: {missing}"
    wanted = set()
    for file in repository.tracked():
        first, *rest = file.relative_to(repository.ROOT).parts
        if not first.startswith(".") and first not in {"README.md", "LICENSE", "NOTICE"}:
            wanted.add(first)
            if first == "omni_jax" and rest != ["__init__.py"]:
                wanted.add(f"{first}/{rest[0]}")
    absent = sorted(name for name in wanted if name not in listed)
    assert not absent, f"the file tree of {TREE} does not show {absent}"


def test_architecture_page_shows_the_import_table() -> None:
    page = (repository.ROOT / "docs/development/architecture.md").read_text(encoding="utf-8")
    cells = [line.strip("| ").split("|") for line in page.splitlines()]
    rows = {row[0].strip(" `"): row[-1] for row in cells if len(row) == 3}
    short = {name: name.removeprefix("omni_jax.") for name in repository.MAY_IMPORT}
    for name, allowed in repository.MAY_IMPORT.items():
        assert short[name] in rows, f"docs/development/architecture.md has no row for {short[name]}"
        shown = set(re.findall(r"`(\w+)`", rows[short[name]]))
        assert shown == {short[other] for other in allowed}, f"docs/development/architecture.md, row {short[name]}"


def test_readme_memory_table_follows_from_the_parameter_counts() -> None:
    """One GiB figure a device: bfloat16 weights; and for training float32 weights, two moments and a gradient of what is trained."""
    carried = ("lm_head.", "audio_tower.audio_bos_eos_token.", "beats.predictor.")
    sizes = {
        name: sum(math.prod(shape) for key, shape in manifest_7b(name).items() if not key.startswith(carried))
        for name in ("wave7b", "adapter7b")
    }
    lora = sum(math.prod(shape) for key, shape in manifest_7b("adapter7b").items() if "lora_" in key)
    weights = 2 * (sizes["wave7b"] + lora) / 2**30
    training = weights + (4 + 8 + 4 - 2) * sizes["adapter7b"] / 2**30
    # In int8 a byte less for every value of the matrices, of which the adapter's own train; scales are a thousandth and left out.
    whole = (*carried, "model.embed_tokens.")
    matrices = sum(math.prod(shape) for key, shape in manifest_7b("wave7b").items() if len(shape) == 2 and not key.startswith(whole))
    heads = sum(math.prod(shape) for key, shape in manifest_7b("adapter7b").items() if len(shape) == 2 and "lora_" not in key)
    needs = (weights, training, weights - matrices / 2**30, training - (matrices - heads) / 2**30)
    text = (repository.ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:TPU|GPU) [^|]+ \| ([\d.]+)" + 4 * r" \| (\d+) \| ([\d.]+)" + r" \|$", text, re.M)
    assert len(rows) >= 5
    for memory, *cells in rows:
        for devices, each, whole, share in zip(cells[::2], cells[1::2], needs, (0.75, 0.5, 0.75, 0.5), strict=True):
            fewest = next(n for n in (1, 2, 4, 8, 16) if whole / n <= share * float(memory))
            assert (int(devices), each) == (fewest, f"{whole / fewest:.1f}")


def test_the_readme_is_short_enough_to_be_read() -> None:
    lines = (repository.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100


def test_public_names_load() -> None:
    for name in omni_jax.__all__:
        assert getattr(omni_jax, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = omni_jax.nonsense


def test_lock_files_hold_pins_that_satisfy_pyproject() -> None:
    pins: dict[str, str] = {}
    for name in ("requirements.lock", "requirements-reference.lock", "requirements-tpu.lock"):
        hashed = name == "requirements.lock"  # builds of torch and libtpu differ from index to index
        for line in (repository.ROOT / name).read_text().replace(" \\\n", " ").splitlines():
            if not line.startswith("#"):
                match = re.fullmatch(r"([A-Za-z0-9_.\-]+)==([A-Za-z0-9_.\-]+)((?: +--hash=sha256:[0-9a-f]{64})*)", line)
                assert match, f"{name}: {line!r} is not a pin"
                assert bool(match[3]) == hashed, f"{name}: {match[1]} has {'no' if hashed else 'a'} hash"
                assert pins.get(canonicalize_name(match[1]), match[2]) == match[2], f"{name}: {match[1]} has two versions"
                pins[canonicalize_name(match[1])] = match[2]
    project = tomllib.loads((repository.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["train"], *extras["reference"], *extras["dev"]]:
        wanted = Requirement(text)
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin and wanted.specifier.contains(pin), f"{text}: the lock files hold {pin}"
