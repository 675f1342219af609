"""Folders in object stores (gs://, s3:// and whatever else fsspec knows), by the names of their files. What fails is tried again."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from omni_jax.io.messages import line_of
from omni_jax.types import InputError

if TYPE_CHECKING:
    from etils import epath

TRIES = 6
PAUSE_S = 0.2  # before the second try, doubled before each further one: some 6 s in all
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}  # protocol -> the extra that brings its client
CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")  # packages whose errors are those of a store
NO_RIGHTS = ("credential", "permission", "forbidden", "accessdenied", "unauthorized", "anonymouscaller")

Done = TypeVar("Done")


def is_remote(location: os.PathLike[str] | str) -> bool:
    """Returns whether a location is in an object store."""
    return "://" in os.fspath(location)


def absolute(location: os.PathLike[str] | str) -> epath.Path:
    """Returns the path from the root of the disk; a URL as it is, which epath would take for the name of a local folder."""
    from etils import epath  # slow to import

    path = epath.Path(location)
    return path if is_remote(path) else path.absolute()


class StoreError(InputError):
    """What an object store refuses, in one line that begins with its address."""


@contextlib.contextmanager
def reaching(location: os.PathLike[str] | str) -> Iterator[None]:
    """Makes a StoreError of what a store's client raises in the block, which reads or writes the location; others pass."""
    try:
        yield
    except Exception as error:
        if not is_remote(location) or not (isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENTS):
            raise
        raise _refused(os.fspath(location), error) from None


def check_holds_weights(location: os.PathLike[str] | str) -> None:
    """Raises InputError for a place where weights cannot be kept: Orbax would write them into a local folder of its name."""
    if is_remote(location) and not os.fspath(location).startswith("gs://"):
        raise InputError(f"{os.fspath(location)}: weights can be kept on a disk or at gs:// alone; choose another place")


class RemoteFolder:
    """A folder of an object store. A file appears in it whole or not at all.

    Attributes:
      location: its URL.
    """

    def __init__(self, location: str) -> None:
        """Connects to the store. Raises InputError when its client is not installed, or there are no credentials."""
        import fsspec  # slow to import

        self.location = location.rstrip("/")
        protocol = location.partition("://")[0]
        try:
            # An own instance: those that fsspec keeps do not survive a fork.
            self._fs, self._root = fsspec.core.url_to_fs(self.location, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            fix = f"run pip install 'omni-jax[{extra}]'" if extra else "install it"
            raise InputError(f"{location}: needs a package that is not installed ({line_of(error)}); {fix}") from None
        except ValueError as error:
            raise InputError(f"{location}: no known kind of address ({line_of(error)}); use gs://, s3:// or a local folder") from None
        except Exception as error:  # clients look for credentials at once, and have errors of their own
            raise _refused(self.location, error) from None

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Returns a file, or its bytes [start, stop).

        Raises:
          FileNotFoundError: when it does not exist, and a whole file is asked for.
          InputError: when it cannot be read however often it is tried.
        """

        def action() -> bytes:
            data = self._fs.cat_file(self._path(name), start=start, end=stop)
            if start is not None and stop is not None and len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
            return data

        # Of a file that was there when the run began, "not found" may pass; of one that is looked for it is an answer.
        return self._again(name, action, answers=() if start is not None else (FileNotFoundError,))

    def fetch(self, name: str, target: os.PathLike[str] | str) -> None:
        """Copies a file to the local disk. Raises as `read`."""
        self._again(name, lambda: self._fs.get_file(self._path(name), os.fspath(target)), answers=(FileNotFoundError,))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file. Raises InputError when it cannot be written however often it is tried."""
        self._again(name, lambda: self._fs.pipe_file(self._path(name), data))

    def put(self, source: os.PathLike[str] | str, name: str) -> None:
        """Copies a local file to this name. Raises InputError when it cannot be written however often it is tried."""
        self._again(name, lambda: self._fs.put_file(os.fspath(source), self._path(name)))

    def remove(self, name: str) -> None:
        """Removes a file that may not exist. Raises InputError when it cannot be removed however often it is tried."""
        with contextlib.suppress(FileNotFoundError):
            self._again(name, lambda: self._fs.rm_file(self._path(name)), answers=(FileNotFoundError,))

    def sizes(self, under: str = "") -> dict[str, int]:
        """Returns bytes by name of the files that lie in the folder, or in one of its folders.

        Raises:
          InputError: when it cannot be listed however often it is tried.
        """
        try:
            found = self._again(under, lambda: self._fs.ls(self._path(under), detail=True), answers=(FileNotFoundError,))
        except FileNotFoundError:
            return {}
        return {row["name"].rpartition("/")[2]: int(row["size"] or 0) for row in found if row["type"] == "file"}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _again(self, name: str, action: Callable[[], Done], answers: tuple[type[Exception], ...] = ()) -> Done:
        for attempt in range(TRIES):
            try:
                return action()
            except answers:
                raise
            except Exception as error:  # every client has its own
                if attempt == TRIES - 1 or _is_refusal(error):
                    raise _refused(f"{self.location}/{name}".rstrip("/"), error, attempt + 1) from None
            time.sleep(PAUSE_S * 2**attempt * random.uniform(0.5, 1))
        raise AssertionError


def _refused(where: str, error: Exception, tries: int = 1) -> StoreError:
    again = f" after {tries} tries" if tries > 1 else ""
    if _is_refusal(error):
        return StoreError(f"{where}: no access ({line_of(error)}); give this machine credentials for the bucket")
    if isinstance(error, FileNotFoundError):  # of which one client says the bucket's name, another an address of its own
        bucket = where.partition("://")[2].partition("/")[0]
        return StoreError(f"{where}: not found{again}; check that the bucket {bucket} and what is named in it are there, and start again")
    return StoreError(f"{where}: cannot be reached{again} ({line_of(error)}); check the address and start again to resume")


def _is_refusal(error: Exception) -> bool:
    said = f"{type(error).__name__} {error}".replace(" ", "").lower()
    return isinstance(error, PermissionError) or any(word in said for word in NO_RIGHTS)
