"""Ctrl-C and SIGTERM, whatever comes up while they end the work."""

from __future__ import annotations

import pytest

from omni_jax.cli.stopping import Terminated, interrupts_noted, second_ctrl_c_leaves, sigterm_raises
from omni_jax.types import InputError

GUARDS = [sigterm_raises, second_ctrl_c_leaves, interrupts_noted]


def _fail_after(stop: BaseException, error: Exception) -> None:
    try:
        try:
            raise stop
        finally:
            raise ValueError("a library could not close what had not begun")
    except ValueError:
        raise error from None


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Terminated()])
def test_an_unexpected_error_while_a_stop_unwinds_does_not_hide_the_stop(guard, stop):
    with pytest.raises(type(stop)), guard():
        _fail_after(stop, RuntimeError("cannot join thread before it is started"))


@pytest.mark.parametrize("error", [InputError("out.npz: cannot be written"), OSError(28, "No space left on device")])
def test_what_could_not_be_saved_is_said_after_a_stop_too(error):
    with pytest.raises(type(error)), second_ctrl_c_leaves():
        _fail_after(KeyboardInterrupt(), error)


@pytest.mark.parametrize("guard", GUARDS)
def test_an_error_without_a_stop_stays_what_it_is(guard):
    with pytest.raises(RuntimeError, match="a fault"), guard():
        _fail_after(ValueError(), RuntimeError("a fault"))
