"""The frame of the command line: statuses, one-line errors, help. Commands here are small modules made by the tests."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from omni_jax import __version__
from omni_jax.cli import main as cli
from omni_jax.config import ConfigError
from omni_jax.types import ClipError, InputError
from tests.repository import ROOT

REAL = sorted(cli.COMMANDS)

PROBE = """
EXAMPLE = "omni-jax probe --status 0"

def add_arguments(parser):
    parser.add_argument("--status", type=int, default=0)

def run(args):
    return args.status
"""


def test_what_others_wrote_is_shown_and_never_obeyed(probe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Escape sequences in a file's name or a caption could clear the screen, retitle the window or type commands."""
    hostile = "\x1b]0;owned\x07 \x1b[2J\x9b31m \u202egpj\ud83d\r\n\x00 caf\u00e9 \u96e8"

    def run(args: object) -> int:
        raise InputError(f"{hostile}: no such file")

    monkeypatch.setattr(probe, "run", run)
    assert cli.main(["probe"]) == 2
    shown = capsys.readouterr().err.removesuffix("\n")
    assert shown.isprintable() and "caf\u00e9 \u96e8: no such file" in shown and "\\x1b[2J\\x9b31m \\u202egpj\\ud83d \\x00" in shown


CTRL_C = """
import hashlib, sys, time
from omni_jax.cli import main as cli

def run(args):
    print("running", flush=True)
    if sys.argv[1] == "patient":
        time.sleep(60)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 28)  # minutes in C, in which no Python handler runs: as in compiling

cli._load = lambda name: type("Probe", (), {"run": staticmethod(run), "add_arguments": staticmethod(lambda parser: None)})
cli.COMMANDS = {"probe": "does what the test says"}
sys.exit(cli.main(["probe"]))
"""


@pytest.mark.costly
@pytest.mark.parametrize(("mode", "presses"), [("patient", 1), ("busy", 2)])
def test_ctrl_c_once_stops_and_twice_leaves_at_once_even_inside_a_c_call(mode: str, presses: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", CTRL_C, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        for _ in range(100 if presses > 1 else 0):  # a busy machine may deliver two signals as one
            time.sleep(0.3)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert shown.strip() == ("omni-jax: interrupted" if presses == 1 else "omni-jax: left at once")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command named probe, whose `run` a test may replace."""
    module = ModuleType("omni_jax.cli.probe")
    exec(PROBE, module.__dict__)
    monkeypatch.setitem(sys.modules, "omni_jax.cli.probe", module)
    monkeypatch.setattr(cli, "COMMANDS", {"probe": "does what the test says"})
    return module


def _raises(module: ModuleType, error: BaseException) -> None:
    def run(args: object) -> int:
        raise error

    module.__dict__["run"] = run


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_status_of_the_command_is_returned(probe: ModuleType, status: int) -> None:
    assert cli.main(["probe", "--status", str(status)]) == status


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("clips.jsonl line 3: not JSON; mend the line"), "clips.jsonl line 3: not JSON; mend the line"),
        (ClipError("a.mp4: no frames"), "a.mp4: no frames"),
        (ConfigError("unknown preset 'x'"), "unknown preset 'x'"),
        (FileNotFoundError(2, "No such file or directory", "clips.jsonl"), "clips.jsonl: No such file or directory"),
        (IsADirectoryError(21, "Is a directory", "clips"), "clips: Is a directory"),
        (InputError("two\n lines"), "two lines"),
    ],
)
def test_errors_of_a_user_are_one_line(probe: ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, line: str) -> None:
    _raises(probe, error)
    assert cli.main(["probe"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"omni-jax: {line}\n" and captured.out == ""


def test_what_the_library_logs_is_shown_as_it_is(probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("omni_jax")

    def run(args: object) -> int:
        library.getChild("data").warning("clip %s is made again", "100%")
        library.info("not shown")
        return 0

    probe.__dict__["run"] = run
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr().err == "clip 100% is made again\n"
    assert library.propagate and not library.handlers


def test_unexpected_error_names_its_type_and_the_way_to_a_traceback(probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _raises(probe, ZeroDivisionError("division by zero"))
    assert cli.main(["probe"]) == 2
    assert (
        capsys.readouterr().err == "omni-jax: unexpected ZeroDivisionError: division by zero (run again with --debug for the traceback)\n"
    )


@pytest.mark.parametrize("arguments", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback(probe: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    _raises(probe, InputError("bad"))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("omni-jax: bad\n")


def test_interrupt_is_130_and_quiet(probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _raises(probe, KeyboardInterrupt())
    assert cli.main(["probe", "--debug"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.costly
@pytest.mark.parametrize(("status", "ends"), [(130, 130), (75, 75), (0, -signal.SIGABRT), (2, -signal.SIGABRT)])
def test_an_interrupted_command_does_not_wait_for_the_interpreters_end(status: int, ends: int) -> None:
    """What crashes there stands for threads of XLA that are still at work; other commands end as Python does, and would show it."""
    crash = "import atexit, os; from omni_jax.cli import main; atexit.register(os.abort)"
    code = f"{crash}; main.main = lambda: print('said') or {status}; main.entry()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == ends
    assert status not in (75, 130) or ended.stdout == "said\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["probe", "--nonsense"], ["probe", "--status", "x"], ["probe", "--stat", "1"]])
def test_bad_usage_is_2_and_one_line(probe: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("omni-jax: ") and error.count("\n") == 1 and " --help" in error


def test_no_command_shows_the_help(probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: omni-jax" in capsys.readouterr().err


def test_broken_pipe_to_a_worker_is_reported(probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    _raises(probe, BrokenPipeError(32, "Broken pipe"))
    assert cli.main(["probe"]) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_reader_that_leaves_is_met_quietly() -> None:
    code = (
        "import sys, types; from omni_jax.cli import main as m\n"
        "mod = types.ModuleType('omni_jax.cli.probe'); mod.add_arguments = lambda p: None\n"
        "mod.run = lambda a: [print('x' * 1000) for _ in range(10000)] and 0\n"
        "sys.modules['omni_jax.cli.probe'] = mod; m.COMMANDS = {'probe': 'does what the test says'}\n"
        "sys.exit(m.main(['probe']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"omni-jax {__version__}\n"


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in REAL:
        assert re.search(rf"^  {name} +\S", out, re.M), f"{name} has no line"


def test_every_module_with_a_command_is_listed() -> None:
    folder = Path(cli.__file__).parent
    found = {file.stem.replace("_", "-") for file in folder.glob("*.py") if "\ndef run(" in file.read_text() and file.stem != "main"}
    assert found == set(cli.COMMANDS), "give a new command its place in COMMANDS"


@pytest.mark.parametrize("name", REAL)
def test_help_of_every_command_ends_with_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([name, "--help"]) == 0
    last = capsys.readouterr().out.rstrip().split("example:\n")[-1]
    assert re.match(rf"  omni-jax {name}\b", last), f"{name}: set EXAMPLE to a line that starts with omni-jax {name}"


def test_top_level_help_and_package_import_load_no_library() -> None:
    code = (
        "import sys, omni_jax; from omni_jax.cli.main import main; main(['--help'])\n"
        "print(sorted({'jax', 'numpy', 'flax', 'transformers', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [
        (["embed", "--model", "owner/name"], True),
        (["search", "--model=owner/name"], True),
        (["embed", "--model", "m", "--adapter", "owner/name"], True),
        (["push", "--repo", "owner/name"], True),
        (["embed", "--model", "omni7b", "--manifest", "owner/name"], False),
        (["eval", "owner/name"], False),
    ],
)
def test_the_hub_may_be_asked_where_a_name_on_it_is_given(monkeypatch: pytest.MonkeyPatch, arguments: list[str], asks: bool) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")  # restored afterwards
        monkeypatch.delenv(name)
    cli._stay_offline(arguments, arguments[0])
    assert ("HF_HUB_OFFLINE" not in os.environ) == asks
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cli._stay_offline(arguments, arguments[0])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
