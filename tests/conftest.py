"""Eight CPU devices, no network, the golden sets, and a closing count of what ran.

Devices are set through jax.config and not through XLA_FLAGS, so that commands which tests start as subprocesses see the one device a
user would see.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

from tests import workers

gc.disable()  # until all tests are collected: modules and tests stay to the end, and looking through them takes a third of the time
workers.bound_threads()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["OMNI_JAX_CACHE"] = "off"  # tests write nothing into the home folder

import jax  # noqa: E402 (the environment must be set first)
import pytest  # noqa: E402

from tests import golden_set, order, programs  # noqa: E402
from tests.offline import refuse_network  # noqa: E402
from tests.workers import pytest_xdist_auto_num_workers, pytest_xdist_make_scheduler  # noqa: E402, F401 (hooks)

DEVICES = 8
jax.config.update("jax_num_cpu_devices", DEVICES)
refuse_network()


def pytest_addoption(parser: pytest.Parser) -> None:
    programs.add_options(parser)
    order.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    programs.set_up(config)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # As a shell starts what runs in the background: programs that tests start would ignore Ctrl-C, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    programs.clean_up(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    if not workers.is_controller(session.config) and jax.device_count() < DEVICES:
        raise pytest.UsageError(f"{jax.device_count()} JAX devices, the tests need {DEVICES}: a plugin used JAX before tests/conftest.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is there once the tests are collected is not looked through for garbage."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5000)  # tracing makes objects by the thousand, and JAX is called back each time
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("order")) is not None:
        order.shuffle(items, seed)
    elif hasattr(config, "workerinput"):
        workers.put_long_files_first(items)


@pytest.fixture(scope="session")
def golden() -> golden_set.GoldenSet:
    """The golden set of OMNI_GOLDEN (default wave_tiny)."""
    return golden_set.find("OMNI_GOLDEN", "wave_tiny")


@pytest.fixture(scope="session")
def golden_nemotron() -> golden_set.GoldenSet:
    """The golden set of the second backbone, OMNI_GOLDEN_NEMOTRON (default nemotron_tiny)."""
    return golden_set.find("OMNI_GOLDEN_NEMOTRON", "nemotron_tiny")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of these sources, and with what pip installs of it in `installed`; all processes of a run share it."""
    from tests.wheels import made_once

    place = tmp_path_factory.getbasetemp()
    return made_once((place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "built")


def _count(reporter: pytest.TerminalReporter, *outcomes: str) -> int:
    return sum(len(reporter.stats.get(outcome, [])) for outcome in outcomes)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped test is a failed run: a missing reference or device must not pass unnoticed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and exitstatus == 0 and reporter and _count(reporter, "skipped", "xfailed", "xpassed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("order")
    return None if seed is None else f"order: shuffled, --order {seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed, failed = _count(terminalreporter, "passed"), _count(terminalreporter, "failed", "error")
    skipped = _count(terminalreporter, "skipped", "xfailed", "xpassed")
    terminalreporter.write_line(f"counts: {passed} passed, {failed} failed, {skipped} skipped")
    if skipped and os.environ.get("CI"):
        terminalreporter.write_line("a skipped test fails the run where CI is set", red=True)
