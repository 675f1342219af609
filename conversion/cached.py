"""Checkpoints as they are published, a folder or a name on the Hub, converted once into the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_jax.config.compile_cache import VARIABLE, cache_root
from omni_jax.config.hub_name import is_hub_name
from omni_jax.conversion import hub
from omni_jax.conversion.folder import FORMAT, MANIFEST
from omni_jax.io import atomic_write_text
from omni_jax.types import InputError

_log = logging.getLogger(__name__)

MODELS = "models"  # folder of the cache
_PARTS = ("base", "adapter")


@dataclasses.dataclass(frozen=True)
class _Source:
    """A base or an adapter, before it is converted: a folder, or a repository at one commit."""

    name: str
    folder: Path | None = None
    remote: hub.Remote | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What distinguishes it from another of the same name."""
        if self.remote is not None:
            return self.remote.record()
        assert self.folder is not None
        files = sorted(item for item in self.folder.iterdir() if item.is_file())
        stats = [(item.name, found.st_size, found.st_mtime_ns) for item in files for found in (item.stat(),)]
        return {"folder": str(self.folder), "files": hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()}

    @property
    def nbytes(self) -> int:
        if self.remote is not None:
            return self.remote.nbytes
        assert self.folder is not None
        return sum(item.stat().st_size for item in self.folder.iterdir() if item.is_file())


def converted(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | bool | None = None,
    log: Callable[[str], None] = _log.warning,
) -> Path:
    """Returns the converted folder of a published checkpoint and adapter, made in the cache (OMNI_JAX_CACHE) the first time.

    Beside it FOLDER.json says what it was made of: paths, or repository, revision and commit. The same commit, or the same files, are
    converted once; a branch that has moved on makes another folder.

    Args:
      base, adapter: folders of torch's layout, or names on the Hub ("owner/repository").
      revision, adapter_revision: branch, tag or commit of a name on the Hub; None: "main".
      token: of the Hub; None: what `hf auth login` or HF_TOKEN say.
      log: called with a line (by default a warning of the logger) on what is fetched or converted, and the disk space it takes, beforehand.

    Raises:
      InputError: for what is not there or cannot be fetched, converted or kept.
    """
    root = _root()
    try:
        sources = {
            "base": _source(base, revision, token),
            "adapter": None if adapter is None else _source(adapter, adapter_revision, token),
        }
    except hub.Unreachable as error:
        asked = {"base": (base, revision), "adapter": (adapter, adapter_revision)}
        if (place := _made_before(root, asked)) is not None:
            log(f"{error}; {place} is used, as it was converted before")
            return place
        raise
    found = {part: source for part, source in sources.items() if source is not None}
    remote = found["base"].remote
    if remote is not None and MANIFEST in remote.sizes:
        if adapter is not None:
            raise InputError(f"{base}: is converted already, with the adapter it has; omit adapter, or name the checkpoint it was made of")
        check = hub.check_space({hub.hub_cache(): hub.missing_bytes(remote)}, remote.name)
        log(f"{remote.name} at {remote.commit[:12]}: takes {check}")
        return hub.fetch(remote, log, token)
    if remote is not None and "config.json" not in remote.sizes:
        raise InputError(f"{base}: is an adapter; name the checkpoint that it belongs to, and this as adapter")
    record = {part: source.record for part, source in found.items()}
    identity = {part: {k: v for k, v in value.items() if k != "revisions"} for part, value in record.items()} | {"format": FORMAT}
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    place = root / f"{_slug(found)}-{key}"
    _convert(found, place, record, token, log)
    return place


def _convert(
    found: Mapping[str, _Source], place: Path, record: Mapping[str, Any], token: str | bool | None, log: Callable[[str], None]
) -> None:
    """Fetches and converts, unless it was done before."""
    if (place / MANIFEST).exists():
        _write_record(place, record)
        return
    remotes = [source.remote for source in found.values() if source.remote is not None]
    needs = {hub.hub_cache(): sum(map(hub.missing_bytes, remotes))} if remotes else {}
    names = " with ".join(f"{s.name}{f' at {s.remote.commit[:12]}' if s.remote else ''}" for s in found.values())
    space = hub.check_space({**needs, place: sum(source.nbytes for source in found.values())}, names)
    log(f"{names}: {'fetched and ' if remotes else ''}converted once, which takes {space}")
    folders = {part: hub.fetch(s.remote, log, token) if s.remote is not None else s.folder for part, s in found.items()}
    try:
        _to_jax(folders, place, log)
    except InputError:
        if not (place / MANIFEST).exists():  # else another process was first
            raise
    _write_record(place, record)


def _to_jax(folders: Mapping[str, Path | None], place: Path, log: Callable[[str], None]) -> None:
    from tqdm.auto import tqdm

    from omni_jax.conversion.importer import to_jax

    base, adapter = (folders.get(part) for part in _PARTS)
    assert base is not None
    with tqdm(total=None, desc="convert", unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = to_jax(base, place, adapter=adapter, progress=progress)
    for note in summary.notes:
        log(f"note: {note}")
    if summary.fresh:
        log(f"freshly initialised, because {base} has none: {', '.join(summary.fresh)}; embeddings mean nothing until they are trained")


def _write_record(place: Path, record: Mapping[str, Any]) -> None:
    """Writes what a folder was made of; revisions by which it was asked for before stay, and the newest record is that of the last use."""
    target = place.with_name(f"{place.name}.json")
    before = _read_record(target)
    merged = {
        part: {k: sorted({*v, *before.get(part, {}).get(k, ())}) if k == "revisions" else v for k, v in said.items()}
        for part, said in record.items()
    }
    atomic_write_text(target, json.dumps(merged, indent=1) + "\n")


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(said, dict) for said in found.values()) else {}


def _made_before(root: Path, asked: Mapping[str, tuple[Any, str | None]]) -> Path | None:
    """Returns the folder converted from what is asked for, of several the one used last, at whatever commit that was then."""
    wanted = {part: (name, revision) for part, (name, revision) in asked.items() if name is not None}

    def fits(said: Mapping[str, Any], name: Any, revision: str | None) -> bool:
        if not is_hub_name(name):
            return said.get("folder") == os.path.abspath(name)
        return said.get("repository") == str(name) and (revision or hub.DEFAULT) in said.get("revisions", ())

    found = []
    for path in root.glob("*.json"):
        record, place = _read_record(path), path.with_suffix("")
        alike = record.keys() == wanted.keys() and all(fits(record[part], *wanted[part]) for part in wanted)
        if alike and (place / MANIFEST).exists():
            found.append((path.stat().st_mtime_ns, place))
    return max(found)[1] if found else None


def _source(name: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> _Source:
    if is_hub_name(name):
        return _Source(os.fspath(name), remote=hub.look_up(os.fspath(name), revision, token))
    folder = Path(name).absolute()
    if revision is not None:
        raise InputError(f"{name}: is not a name on the Hub, and has no revision {revision!r}; omit it")
    if not folder.is_dir():
        raise InputError(f"{name}: no such folder; name a folder, or a repository on the Hub as owner/name")
    return _Source(os.fspath(name), folder=folder)


def _root() -> Path:
    try:
        root = cache_root()
    except RuntimeError:
        root = None
    if root is None:
        raise InputError(f"there is no folder for converted models; name one by {VARIABLE}, or use omni-jax convert to-jax")
    return root / MODELS


def _slug(found: Mapping[str, _Source]) -> str:
    """What a folder is called, for people."""
    return "+".join(
        re.sub(r"[^A-Za-z0-9_.-]+", "--", s.name if s.remote else os.path.basename(os.path.abspath(s.name)))[:48] for s in found.values()
    )
