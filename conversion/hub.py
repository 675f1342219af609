"""Checkpoints and adapters fetched from the Hub: weights, configuration and tokenizer, never code."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import fnmatch
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_jax.conversion.adapter import PICKLED
from omni_jax.conversion.adapter import WEIGHTS as ADAPTER
from omni_jax.conversion.folder import MANIFEST
from omni_jax.conversion.weight_files import INDEX, SINGLE, TORCH_INDEX, TORCH_SINGLE
from omni_jax.io import lock
from omni_jax.io.messages import line_of
from omni_jax.types import InputError

DEFAULT = "main"
_SIDE = ("*.json", "*.txt", "*.jinja", "*.model", "BEATs*.pt", "beats*.pt")  # of the top folder; the .pt file holds settings of a tower
_BIN = ("pytorch_model*.bin", "model*.bin", "adapter_model*.bin")  # other .bin files, as training_args.bin, hold no weights
_WHOLE_SAFE = (INDEX, SINGLE, ADAPTER)
_WHOLE_BIN = (TORCH_INDEX, TORCH_SINGLE, PICKLED)
_CONVERTED = ("weights/*", "adapter/*")
PART = ".omni_jax-part"  # of a file's name, while only a part of it is there
AT_A_TIME = 4  # files
_CODE = (".py", ".so", ".sh", ".pkl", ".pickle")


class Unreachable(InputError):
    """The Hub could not be asked, or may not be."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
      name: "owner/repository".
      asked: the revision that was asked for, a branch, tag or commit.
      commit: 40 hexadecimal digits.
      sizes: file -> bytes, of the files that are needed.
      digests: file -> SHA-256 of a large file, or the blob's SHA-1 as git counts it.
    """

    name: str
    asked: str
    commit: str
    sizes: Mapping[str, int]
    digests: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def record(self) -> dict[str, Any]:
        """Returns what a converted folder keeps of where it came from."""
        return {"repository": self.name, "revisions": [self.asked], "commit": self.commit}


def look_up(name: str, revision: str | None = None, token: str | bool | None = None) -> Remote:
    """Returns a repository with the files that are needed of it; asks the Hub, and fetches none of them.

    Raises:
      InputError: for a name or revision that is not there, a private or gated repository, one without weights, no network, or where
        HF_HUB_OFFLINE says not to ask.
    """
    from huggingface_hub import HfApi

    asked = revision or DEFAULT
    with _one_line(name, asked):
        info = HfApi(token=token).model_info(name, revision=asked, files_metadata=True)
    found = {file.rfilename: file for file in info.siblings or ()}
    wanted = needed_files(found)
    if not wanted:
        shown = ", ".join(sorted(found)[:5]) or "nothing"
        raise InputError(
            f"{name}: this repository holds no weights that can be read (.safetensors or .bin beside a config.json or an "
            f"adapter_config.json), but {shown}; name a checkpoint or an adapter"
        )
    large = {file: lfs for file in wanted if (lfs := found[file].lfs) is not None}
    digests = {file: large[file].sha256 if file in large else found[file].blob_id for file in wanted}
    sizes = {file: int((large[file].size if file in large else found[file].size) or 0) for file in wanted}
    return Remote(name, asked, str(info.sha), sizes, {file: digest for file, digest in digests.items() if digest})


def needed_files(names: Iterable[str]) -> list[str]:
    """Returns the files of a repository that a conversion reads, of safetensors and .bin files with the same weights the former alone; none
    where there are no weights."""
    known = sorted(name for name in names if not name.endswith(_CODE))
    if MANIFEST in known:
        return [name for name in known if ("/" not in name and _is(name, _SIDE)) or _is(name, _CONVERTED)]
    top = [name for name in known if "/" not in name]
    safe, bins = [name for name in top if name.endswith(".safetensors")], [name for name in top if _is(name, _BIN)]
    # As `open_weights` chooses: by the names that transformers knows, safetensors first, then by the suffix.
    weights = bins if set(_WHOLE_BIN) & set(top) and not set(_WHOLE_SAFE) & set(top) else safe or bins
    if not weights or not {"config.json", "adapter_config.json"} & set(top):
        return []
    other = ".bin.index.json" if weights[0].endswith(".safetensors") else ".safetensors.index.json"
    return sorted(weights + [name for name in top if _is(name, _SIDE) and not name.endswith(other)])


def fetch(remote: Remote, log: Callable[[str], None], token: str | bool | None = None) -> Path:
    """Returns the folder of a repository's files in the Hub's own cache, fetched where they are not there.

    Weights resume within the file, after a connection that drops and after a kill. The Hub's library alone then starts it again, under a
    name of its own each time, for file systems whose locks exclude no process.

    Raises:
      InputError: when a file cannot be fetched or kept, or is not what the Hub says it is.
    """
    from huggingface_hub import snapshot_download

    with _one_line(remote.name, remote.asked):
        large = [file for file, digest in remote.digests.items() if len(digest) == 64 and not _is_cached(remote, file)]
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            for _ in pool.map(lambda file: _fetch_blob(remote, file, token), large):
                pass
        folder = Path(
            snapshot_download(remote.name, revision=remote.commit, allow_patterns=[_literal(f) for f in remote.sizes], token=token)
        )
    log(f"{remote.name}: comparing {len(remote.sizes)} files with their digests")
    for file, digest in remote.digests.items():
        path = folder / file
        if not path.is_file():
            raise InputError(f"{remote.name}: {file} was not fetched; run it again")
        if _digest(path, sha256=len(digest) == 64) != digest:
            for stale in {path.resolve(), path}:
                stale.unlink(missing_ok=True)
            raise InputError(
                f"{remote.name}: {file} differs from the digest that the Hub states ({digest[:12]}...); it was removed; fetch it again"
            )
    return folder


def _fetch_blob(remote: Remote, file: str, token: str | bool | None) -> None:
    """Fetches a file to where the Hub's cache keeps it by its digest; what an earlier process fetched of it is not fetched again."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob, part = _blob(remote, file), _part(remote, file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with lock(part, wait=True) or contextlib.nullcontext() as held:
        assert held is not None
        if not blob.exists():  # else another process was first
            if held.seek(0, os.SEEK_END) > remote.sizes[file]:
                held.truncate(0)
            url = hf_hub_url(remote.name, file, revision=remote.commit)
            size = held.seek(0, os.SEEK_END)
            http_get(url, held, resume_size=size, headers=build_hf_headers(token=token), expected_size=remote.sizes[file])
            held.flush()
            part.rename(blob)
        part.unlink(missing_ok=True)


def _blob(remote: Remote, file: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return hub_cache() / repo_folder_name(repo_id=remote.name, repo_type="model") / "blobs" / remote.digests[file]


def _part(remote: Remote, file: str) -> Path:
    blob = _blob(remote, file)
    return blob.with_name(f"{blob.name}{PART}")


def upload(folder: Path, name: str, *, private: bool = False, token: str | bool | None = None) -> str:
    """Uploads a folder to a repository, made where there is none, in one commit; returns the address of the commit.

    Raises:
      InputError: where the Hub refuses it, or cannot be asked.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _one_line(name, DEFAULT, "log in with 'hf auth login' or set HF_TOKEN to a token that may write there"):
        api.create_repo(name, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an adapter and its model card")
    return str(made.commit_url)


def hub_cache() -> Path:
    """Returns the folder where the Hub's library keeps what it fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def missing_bytes(remote: Remote) -> int:
    """Returns how much of a repository is not in the Hub's cache."""
    missing = {file: size for file, size in remote.sizes.items() if not _is_cached(remote, file)}
    parts = (_part(remote, file) for file in missing if file in remote.digests)
    return max(0, sum(missing.values()) - sum(part.stat().st_size for part in parts if part.is_file()))


def _is_cached(remote: Remote, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(remote.name, file, revision=remote.commit), str)


def check_space(needs: Mapping[Path, int], what: str) -> str:
    """Returns a phrase on the disk space that some folders need. Raises InputError where a file system has less."""
    by_disk: dict[int, tuple[Path, list[str], int]] = {}
    for folder, size in needs.items():
        home = next(parent for parent in (folder, *folder.parents) if parent.exists())
        _, folders, before = by_disk.get(home.stat().st_dev, (home, [], 0))
        by_disk[home.stat().st_dev] = home, [*folders, str(folder)], before + size
    parts = []
    for home, folders, size in by_disk.values():
        free, where = shutil.disk_usage(home).free, " and ".join(folders)
        if size > free:
            raise InputError(
                f"{what}: needs {_size(size)} in {where}, where {_size(free)} are free; free some, or name other folders by HF_HOME and "
                f"OMNI_JAX_CACHE"
            )
        parts.append(f"{_size(size)} in {where} ({_size(free)} free)")
    return " and ".join(parts)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _digest(path: Path, sha256: bool) -> str:
    """SHA-256 of a file, or its SHA-1 as git counts it."""
    digest = hashlib.sha256() if sha256 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _one_line(name: str, revision: str, refused: str = "") -> Iterator[None]:
    """Makes one line with a remedy of whatever the Hub's library raises; `refused`: the remedy where it does not let us."""
    try:
        yield
    except Exception as error:  # its errors differ from version to version; so each is recognised by its name
        reason, answered = _reason(error, revision)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if refused and status in (401, 403, 404):
            reason, answered = f"the Hub does not allow it ({status}); {refused}", True
        elif refused and not answered:
            reason = f"cannot be uploaded ({type(error).__name__}: {line_of(error)}); check the network and run it again"
        raise (InputError if answered else Unreachable)(f"{name}: {reason}") from error


def _reason(error: Any, revision: str) -> tuple[str, bool]:
    """Returns what is wrong and what to do, and whether the Hub, or this machine's disk, said it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms at {constants.ENDPOINT}, then log in with 'hf auth login' or set HF_TOKEN", True
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; name a branch, tag or commit that its page lists", True
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such folder here, and no such repository at {constants.ENDPOINT}, or a private one; correct the name, or log in with "
            f"'hf auth login' or set HF_TOKEN"
        ), True
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "no such folder here, and HF_HUB_OFFLINE says not to ask the Hub; unset it, or name a folder", False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space is left in {hub_cache()}; free some and run it again: what was fetched is kept", True
    said = f"{type(error).__name__}: {line_of(error)}"
    return f"cannot be fetched ({said}); check the network and run it again: what was fetched is kept", False
