"""What a start costs: which packages it imports, and programs that are kept from one start to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_jax.config.compile_cache import cache_folder

pytestmark = pytest.mark.jit  # commands are started

PROGRAM = """
from omni_jax.config.compile_cache import use_compile_cache
{first}
use_compile_cache()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: x + 1)(1.0)))
"""


def imported(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(run.stdout.splitlines())


def test_the_package_and_the_help_import_no_arrays() -> None:
    assert not {"numpy", "jax", "etils"} & imported("import omni_jax")
    lines = (
        "import contextlib, io",
        "from omni_jax.cli.main import main",
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])",
    )
    helped = "\n".join(lines)
    assert not {"numpy", "jax", "etils", "socket", "multiprocessing"} & imported(helped)


def test_who_embeds_imports_no_exporter_no_checkpoints_and_no_kernels_of_tpus() -> None:
    found = imported("from omni_jax import OmniRetriever")
    unwanted = (
        "orbax",
        "tensorstore",
        "omni_jax.conversion.exporter",
        "omni_jax.conversion.importer",
        "omni_jax.train.step",
        "jax.experimental.pallas",
        "flax",
        "optax",
    )
    assert "jax" in found and not [name for name in found if name.startswith(unwanted)]


def test_what_hears_a_clip_imports_neither_jax_nor_transformers() -> None:
    """Each process that decodes does: what it imports is paid for again and again."""
    found = imported("import numpy\nfrom omni_jax.features import kaldi_fbank, log_mel\nlog_mel(numpy.zeros(800, 'float32'))")
    assert "numpy" in found and not {"jax", "transformers"} & found


def run(home: Path, first: str = "", **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMNI_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"HOME": str(home), **variables}
    command = [sys.executable, "-c", PROGRAM.format(first=first)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    return ended.stdout


def kept(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).parent.parent) for path in folder.rglob("*-cache"))


@pytest.mark.parametrize("first", ["", "import jax"])
def test_programs_are_kept_in_the_home_folder(tmp_path: Path, first: str) -> None:
    assert run(tmp_path, first) == "2.0\n"
    assert kept(tmp_path) == [".cache/omni_jax"]
    assert run(tmp_path, first) == "2.0\n"


def test_a_variable_moves_the_programs_or_keeps_none(tmp_path: Path) -> None:
    for value in ("off", "0", ""):
        assert run(tmp_path, OMNI_JAX_CACHE=value) == "2.0\n"
    assert kept(tmp_path) == []
    assert run(tmp_path, OMNI_JAX_CACHE=str(tmp_path / "here")) == "2.0\n"
    assert kept(tmp_path) == ["here"]


def test_a_folder_that_cannot_be_had_or_holds_rubbish_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path, OMNI_JAX_CACHE=str(tmp_path / "file" / "below")) == "2.0\n"
    assert run(tmp_path, OMNI_JAX_CACHE="/proc/nowhere") == "2.0\n"
    assert run(tmp_path, OMNI_JAX_CACHE=str(tmp_path / "cache")) == "2.0\n"
    (program,) = (tmp_path / "cache").rglob("*-cache")
    program.write_bytes(program.read_bytes()[:50])  # as a full disk leaves it
    assert run(tmp_path, OMNI_JAX_CACHE=str(tmp_path / "cache")) == "2.0\n"
    half = program.with_name("half-cache")
    half.write_bytes(b"")
    os.utime(half, (0, 0))
    assert run(tmp_path, OMNI_JAX_CACHE=str(tmp_path / "cache")) == "2.0\n"
    assert not half.exists()


def test_tests_keep_no_programs() -> None:
    assert cache_folder() is None


STOPPED = """
import os, sys
from omni_jax.cli import main as cli
cli.main(["--version"])
from multiprocessing.shared_memory import SharedMemory
print(SharedMemory(create=True, size=8).name, flush=True)
os._exit(75)
"""


def test_shared_memory_of_a_stopped_run_is_removed_without_a_word() -> None:
    ended = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=120)  # until the tracker has ended, too
    name = ended.stdout.split()[-1]
    assert ended.returncode == 75 and ended.stderr == ""
    assert not Path("/dev/shm", name).exists()
