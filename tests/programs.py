"""How the tests compile: quickly, and each program once for a run.

Tiny programs run for milliseconds and compile for seconds. So XLA leaves out most optimizations, and what it compiled is kept in one folder
that the workers of a run and the commands that tests start share. `--compiler full` does neither: it compiles as a user's machine does, and
nothing that only a fresh compilation shows can hide behind the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from omni_jax.config import simulated

_OWN = pytest.StashKey[Path]()

# Matrix products are library calls anyway. XLA of jax 0.12 has no such emitters any more, and ends at an option that it does not know.
QUICK_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,  # a worker has one core, and each of many pieces would cost
} | ({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 12) else {})
# For what runs longer than it compiles: a training step compiles 4 CPU seconds longer and takes less than half as long.
BALANCED_OPTIONS = QUICK_OPTIONS | {"xla_backend_optimization_level": 1}


def _flags(options: Mapping[str, object]) -> str:
    return " ".join([*(f"--{name}={str(value).lower()}" for name, value in options.items()), *simulated.FLAGS])


QUICK, BALANCED = _flags(QUICK_OPTIONS), _flags(BALANCED_OPTIONS)
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def add_options(parser: pytest.Parser) -> None:
    """Adds `--compiler` and `--programs`."""
    group = parser.getgroup("programs", "how the tests compile (tests/programs.py)")
    group.addoption(
        "--compiler", choices=("quick", "full"), default="quick", help="quick: few optimizations, each program once; full: neither."
    )
    group.addoption("--programs", metavar="FOLDER", help="Keep compiled programs in FOLDER; a second run takes about half the time.")


def set_up(config: pytest.Config) -> None:
    """Sets the compiler for this process and, through the environment, for workers and commands; says where no folder can be written."""
    if "not jit" in config.option.markexpr:
        forbid_compiling()
    full = config.getoption("compiler") == "full"
    flags = " ".join(simulated.FLAGS) if full else QUICK
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '').replace(flags, '')} {flags}".strip()
    if full:
        return
    settings = dict(SETTINGS)
    if not hasattr(config, "workerinput"):
        try:
            settings["jax_compilation_cache_dir"] = str(_folder(config))
        except OSError as error:
            config.issue_config_time_warning(UserWarning(f"compiled programs are not kept: {error}"), 2)
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@contextlib.contextmanager
def programs_kept(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in a folder of one test's, also under `--compiler full`."""
    settings = SETTINGS | {"jax_compilation_cache_dir": str(folder)}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _use(settings)
        yield
    finally:
        _use(before)


def _use(settings: Mapping[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def forbid_compiling() -> None:
    """Makes each compilation from here on an error, where it happens: `make test-fast` promises that no test waits for one."""

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            raise AssertionError("a test of the fast layer compiled a program: mark it with @pytest.mark.jit")

    jax.monitoring.register_event_duration_secs_listener(listen)


def clean_up(config: pytest.Config) -> None:
    """Removes the folder that `set_up` made for this run."""
    if _OWN in config.stash:
        shutil.rmtree(config.stash[_OWN], ignore_errors=True)


def _folder(config: pytest.Config) -> Path:
    if named := config.getoption("programs"):
        folder = Path(named).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
        return folder
    config.stash[_OWN] = folder = Path(tempfile.mkdtemp(prefix="omni_jax_programs_"))
    return folder
