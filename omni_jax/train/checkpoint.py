"""Checkpoints of a run: what trains, the optimizer, the counters and the random key, written while the next step is computed.

    checkpoints/500/trainable/    path -> float32 array, what an adapter is made from
    checkpoints/500/rest/         moments, step, skipped steps, key
    checkpoints/500/digests/      name -> fingerprint of every array of the two: values that storage changed are never resumed from

Arrays are stored by name, so that they can be restored onto another mesh or number of processes. A step appears under its number when it
is whole; what a killed process left has another name and is removed by the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from omni_jax.io.messages import as_input_error
from omni_jax.io.remote import absolute
from omni_jax.parallel import barrier, run_on_process_0
from omni_jax.train.fingerprint import fingerprints
from omni_jax.train.state import TrainState
from omni_jax.train.trainable import Arrays
from omni_jax.types import InputError

_log = logging.getLogger(__name__)

TRAINABLE, REST, DIGESTS = "trainable", "rest", "digests"
COUNTERS = ("step", "skipped", "skipped_in_row", "key")

_MACHINE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Permission denied")
"""What errors of XLA and TensorStore say where not the file is at fault."""


class Checkpoints:
    """The checkpoints of one run, written in the background by all its processes together.

    Attributes:
      notes: lines about checkpoints that were passed over.
    """

    def __init__(self, folder: epath.PathLike, keep: int):
        """Takes the folder, made where it is not there, and how many checkpoints stay. Raises InputError when the folder cannot be made."""
        self._folder = absolute(folder)
        self.notes: list[str] = []
        self._reported = False
        _quieten()
        _quieten_failures()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True)
        with as_input_error(f"{self._folder}: cannot be made", "choose another --workdir"):
            handlers: dict[str, Any] = {name: ocp.PyTreeCheckpointHandler() for name in (TRAINABLE, REST)}
            handlers[DIGESTS] = ocp.JsonCheckpointHandler()
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def newest(self) -> int | None:
        """Returns the steps made at the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts to write a state; the caller may give it away at once. Nothing happens where this step is saved already.

        Raises:
          InputError: when this one or the one before cannot be written.
        """
        step = int(state.step)
        trainable, rest = _named(state)
        if jax.default_backend() == "cpu":
            # On CPU the writer would read the very buffers that the next step is given.
            trainable, rest = jax.tree.map(jnp.copy, (trainable, rest))
        self.wait()
        try:
            if step in self._manager.all_steps():
                return
            if error := run_on_process_0(self._try):
                raise error
            digests = {TRAINABLE: fingerprints(trainable), REST: fingerprints(rest)}
            items: dict[str, Any] = {TRAINABLE: ocp.args.PyTreeSave(trainable), REST: ocp.args.PyTreeSave(rest)}
            args = ocp.args.Composite(**items, **{DIGESTS: ocp.args.JsonSave(digests)})
            self._manager.save(step, args=args, force=True)
        except Exception as e:
            raise self._failure(step, e) from e

    def _try(self) -> None:
        # Where the folder takes no files Orbax waits for minutes before it says so.
        probe = self._folder / "probe"
        probe.write_text("")
        probe.unlink()

    def wait(self) -> None:
        """Waits until everything is written. Raises InputError when something could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failure(None, e) from e

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the newest state that can be read whole, with the places and shapes of `like`; None where there is none.

        A checkpoint that is damaged, or whose values are not those that were saved, is renamed to N.damaged, noted, and passed over.

        Raises:
          InputError: for a checkpoint of another architecture or recipe, when all are damaged, or when storage or memory fail.
        """
        trainable, rest = _named(like)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                metadata = self._manager.item_metadata(step)
                for name, wanted in ((TRAINABLE, trainable), (REST, rest)):
                    self._check(step, name, wanted, metadata[name])
                args = ocp.args.Composite(**{TRAINABLE: _restore_args(trainable), REST: _restore_args(rest)})
                read = self._manager.restore(step, args=args)
                for name in (TRAINABLE, REST):
                    _verify(self._folder / str(step), name, read[name])
            except InputError:
                raise
            except Exception as e:
                if _of_the_machine(e):
                    where, why = self._folder / str(step), one_line(e)
                    raise InputError(
                        f"{where}: could not be read ({why}); it may be intact: check storage and memory, then run it again"
                    ) from e
                damaged[step] = one_line(e)
                continue
            for number, reason in damaged.items():
                self._set_aside(number)
                self.notes.append(f"checkpoint {number} is damaged ({reason}); it is now {number}.damaged, and {step} is used")
            return _state({**read[TRAINABLE], **read[REST]}, like)
        if damaged:
            raise InputError(f"{self._folder}: no checkpoint can be read ({next(iter(damaged.values()))}); start with another --workdir")
        return None

    def kept(self) -> str:
        """Returns which checkpoint a run can resume from, in words."""
        whole = list_steps(self._folder)
        return f"checkpoint {whole[-1]} is whole" if whole else "there is no checkpoint yet"

    def close(self) -> None:
        """Waits and frees the threads. Logs a line where something could not be written that neither `save` nor `wait` has reported."""
        reported = self._reported
        try:
            self.wait()
        except InputError as e:
            if not reported:
                _log.warning("warning: %s", e)
        with contextlib.suppress(Exception):
            self._manager.close()

    def _check(self, step: int, item: str, wanted: Arrays, metadata: Any) -> None:
        tree = getattr(metadata, "tree", metadata)
        found = {name: tuple(at.shape) for name, at in tree.items()}
        shapes = {name: tuple(x.shape) for name, x in wanted.items()}
        if found == shapes:
            return
        odd = next(name for name in sorted({*found, *shapes}) if found.get(name) != shapes.get(name))
        there, here = (sizes.get(odd, "absent") for sizes in (found, shapes))
        raise InputError(
            f"{self._folder / str(step)}: the checkpoint is of another architecture or recipe "
            f"({item} {odd.replace('.', '/')} is {there} there, {here} here); choose another --workdir"
        )

    def _set_aside(self, step: int) -> None:
        barrier(f"damaged {step}")
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder / f"{step}.damaged")
        barrier(f"rename damaged {step}")
        self._manager.reload()

    def _failure(self, step: int | None, error: Exception) -> InputError:
        self._reported = True
        what = "a checkpoint" if step is None else f"checkpoint {step}"
        remedy = "check disk space and permissions" + (", and the messages of the other processes," if jax.process_count() > 1 else "")
        return InputError(f"{self._folder}: {what} could not be written ({one_line(error)}); {self.kept()}; {remedy} and run it again")


def list_steps(folder: epath.PathLike) -> list[int]:
    """Returns the whole checkpoints in a folder of them, oldest first."""
    path = absolute(folder)
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def read_trainable(folder: epath.PathLike, step: int) -> dict[str, np.ndarray]:
    """Returns path -> float32 array of one checkpoint, in memory of the host. Raises InputError when it cannot be read."""
    path = absolute(folder) / str(step) / TRAINABLE
    _quieten()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(path)
            names = getattr(metadata, "item_metadata", metadata)
            names = getattr(names, "tree", names)
            args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            found = reader.restore(path, ocp.args.PyTreeRestore(restore_args=args))
            _verify(path.parent, TRAINABLE, found)
    except Exception as e:
        raise InputError(f"{path}: cannot be read ({one_line(e)}); choose another --step") from e
    return {name.replace(".", "/"): np.asarray(x) for name, x in found.items()}


def trainable_fingerprints(folder: epath.PathLike, step: int) -> dict[str, str] | None:
    """Returns path -> fingerprint of what `read_trainable` gives; None for a checkpoint of an earlier version, which has none.

    Raises:
      InputError: when they cannot be read.
    """
    path = absolute(folder) / str(step)
    with as_input_error(f"{path / DIGESTS}: cannot be read", "choose another --step", OSError, ValueError, KeyError, AttributeError):
        recorded = _recorded(path)
        return None if recorded is None else {name.replace(".", "/"): str(digits) for name, digits in recorded[TRAINABLE].items()}


def _recorded(step: epath.Path) -> dict[str, Any] | None:
    file = step / DIGESTS / "metadata"
    return json.loads(file.read_text()) if file.exists() else None


def _verify(step: epath.Path, item: str, arrays: Mapping[str, Any]) -> None:
    """Raises ValueError where arrays of a checkpoint are not those that were saved. One of an earlier version has no digests to compare."""
    if (digests := _recorded(step)) is None:
        return
    recorded, found = digests[item], fingerprints(arrays)
    wrong = [name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"{item} {wrong[0].replace('.', '/')} holds other values than were saved")


def _named(state: TrainState) -> tuple[Arrays, Arrays]:
    """Returns what trains and the rest of a state, as arrays by name."""
    trainable = {_stored(path): x for path, x in state.trainable.items()}
    return trainable, dict(_rest(state))


def _rest(state: TrainState) -> Iterator[tuple[str, Any]]:
    for name in COUNTERS:
        yield name, getattr(state, name)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]:
        yield "optimizer." + ".".join(_stored(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))) for k in path), leaf


def _state(found: Arrays, like: TrainState) -> TrainState:
    """Returns the state whose leaves `found` holds by name."""
    structure = jax.tree.structure(like.optimizer)
    moments = [found[name] for name, _ in _rest(like) if name.startswith("optimizer.")]
    trainable = {path: found[_stored(path)] for path in like.trainable}
    return TrainState(trainable=trainable, optimizer=jax.tree.unflatten(structure, moments), **{name: found[name] for name in COUNTERS})


def _restore_args(arrays: Arrays) -> ocp.args.PyTreeRestore:
    item = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in arrays.items()}
    return ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))


def _stored(path: str) -> str:
    # A slash would make folders of a name.
    return path.replace("/", ".")


def _of_the_machine(error: Exception) -> bool:
    """Whether an error in reading says nothing of the file: no permission, no memory, storage that does not answer."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return any(code in str(error) for code in _MACHINE)


def one_line(error: BaseException) -> str:
    """Returns what an error of a library says, cut to one line; of TensorStore's the system's reason, which follows long paths."""
    text = " ".join(str(error).split())
    if code := re.search(r"os_error_code='?(\d+)", text):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return text[:200] or type(error).__name__


def _quieten() -> None:
    logging.getLogger("absl").addFilter(_tells)


def _quieten_failures() -> None:
    """Keeps asyncio and TensorStore from logging thousands of lines about a failed write that `Checkpoints` reports in one."""
    logging.getLogger("asyncio").addFilter(_tells_of_others)
    warnings.filterwarnings("ignore", "coroutine '.*([Ss]erialize|Checkpoint).*' was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


def _tells(record: logging.LogRecord) -> bool:
    # Orbax warns at every restore that files could be read with another sharding, which is what is wanted here. Its errors are raised, too.
    return "orbax" not in record.pathname


def _tells_of_others(record: logging.LogRecord) -> bool:
    # The first write that fails raises; asyncio lists those of all others under way, by Orbax's code or the name of its unfinished folder.
    return "exception was never retrieved" not in (said := record.getMessage()) or "orbax" not in said


@dataclasses.dataclass(frozen=True)
class _Unraisable:
    """`sys.unraisablehook` but for one error: when a write fails Orbax closes the loop that TensorStore calls after each other write."""

    other: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        # What Python itself cannot raise names the object it came from; TensorStore's C++ names none.
        if unraisable.object is not None or not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
            self.other(unraisable)
