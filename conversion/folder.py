"""The converted folder: its layout, and a way to write a folder so that it appears whole or not at all.

config.json, tokenizer, ...   every side file of the source
omni_jax.json                 this page's `Manifest`
weights/                      base weights (see store.py)
adapter/                      LoRA and modules saved whole, kept apart from the base; absent without an adapter
adapter/files/                side files of the adapter, adapter_config.json included
extra/                        tensors of the source that no embedding needs, for the way back; absent where it has none
modules.json, config_sentence_transformers.json   by which sentence-transformers loads the folder, unless the source has its own
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from omni_jax.config import PREFIXES, ConfigError, ModelConfig
from omni_jax.io.messages import as_input_error
from omni_jax.io.remote import absolute, check_holds_weights
from omni_jax.types import InputError

MANIFEST = "omni_jax.json"
WEIGHTS = "weights"
ADAPTER = "adapter"
EXTRA = "extra"
ADAPTER_FILES = f"{ADAPTER}/files"
MODULES, MODULES_CONFIG = "modules.json", "config_sentence_transformers.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """One file of the source, so that an export is split and ordered as the source was.

    Attributes:
      file: its name.
      metadata: safetensors metadata.
      tensors: [name, dtype, shape] in the order of the data; dtype is the safetensors name of the type in the source.
    """

    file: str
    metadata: dict[str, str]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `omni_jax.json` says.

    Attributes:
      model: the resolved configuration, `lora` included where there is an adapter.
      dtype: "keep", or the type every weight was cast to.
      base_digest, adapter_digest: of the stored weights, names and types included: equal digests mean equal weights.
      shards: the base checkpoint's weight files.
      index: `metadata` of the source's index file; None where it had none.
      side_files: relative names of the base's side files.
      adapter: the adapter's weight file; None without one.
      adapter_config: `adapter_config.json`, parsed.
      adapter_files: relative names of the adapter's side files.
      merged: an adapter was folded into the base: only a merged base can be exported.
      names: name in the source -> name in the rules, where they differ.
      beats_file: the BEATs file that gave weights and settings, or settings alone: its name, SHA-256 and what it gave; None where none did.
      fresh: modules that the source lacks and that were given random weights ("classify_linear"); an export leaves them out of the base.
      extra_digest: of the tensors that an export alone has again; None without any.
      index_text: the source's index file as it was; None where it had none or the weights changed.
    """

    model: ModelConfig
    dtype: str
    base_digest: str
    adapter_digest: str | None
    shards: tuple[TensorFile, ...]
    index: dict[str, Any] | None
    side_files: tuple[str, ...]
    adapter: TensorFile | None = None
    adapter_config: dict[str, Any] | None = None
    adapter_files: tuple[str, ...] = ()
    merged: bool = False
    index_text: str | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    beats_file: dict[str, str] | None = None
    fresh: tuple[str, ...] = ()
    extra_digest: str | None = None

    def write(self, folder: epath.Path) -> None:
        """Writes `omni_jax.json` into a folder, as `read_manifest` reads it, and what sentence-transformers reads."""
        value = dataclasses.asdict(self) | {"format": FORMAT, "model": self.model.to_json()}
        (folder / MANIFEST).write_text(json.dumps(value, indent=1) + "\n")
        write_modules(folder, self.model)


def write_modules(folder: epath.Path, model: ModelConfig) -> None:
    """Writes the files by which sentence-transformers loads a converted folder; files of these names that the checkpoint has stay."""
    if (folder / MODULES).exists():
        return
    modules = [{"idx": 0, "name": "0", "path": "", "type": "omni_jax.api.sentence_transformers.OmniRetrieverModule"}]
    prompts = dict(zip(("document", "query"), (f"{name}: " for name in PREFIXES), strict=True)) if model.prompt == "chat" else {}
    config = {"model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (folder / MODULES).write_text(json.dumps(modules, indent=1) + "\n")
    if not (folder / MODULES_CONFIG).exists():
        (folder / MODULES_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def read_manifest(folder: epath.PathLike) -> Manifest:
    """Returns the manifest of a converted folder.

    Raises:
      InputError: not a converted folder, or written by a newer version.
    """
    folder = epath.Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        what = "no such folder" if not folder.exists() else f"not a converted folder ({MANIFEST} is missing)"
        raise InputError(f"{folder}: {what}; make one with omni-jax convert to-jax")
    try:
        value = json.loads(path.read_text())
        version = value.pop("format")
        if version == FORMAT:
            fields: dict[str, Any] = {name: tuple(field) if isinstance(field, list) else field for name, field in value.items()}
            fields["model"] = ModelConfig.from_json(value["model"])
            fields["shards"] = tuple(_tensor_file(file) for file in value["shards"])
            fields["adapter"] = _tensor_file(value["adapter"]) if value["adapter"] else None
            if prefix := fields.pop("prefix", ""):  # of an earlier version
                fields["names"] = {name: name.removeprefix(prefix) for shard in fields["shards"] for name, _, _ in shard.tensors}
            if not isinstance(fields.get("names", {}), dict):
                raise TypeError(f"names is {repr(fields['names'])[:80]}, expected an object")
            manifest = Manifest(**fields)
            _refuse_outside(path, manifest)
            return manifest
    except ConfigError as e:
        raise InputError(f"{folder}: {e}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read ({type(e).__name__}: {e}); convert the checkpoint again") from None
    raise InputError(f"{path}: format {version}, this version reads {FORMAT}; update omni_jax or convert the checkpoint again")


def _refuse_outside(path: epath.Path, manifest: Manifest) -> None:
    """Raises InputError for a name that leads out of the folder: an export reads and writes files under these names."""
    weights = [file.file for file in (*manifest.shards, *([manifest.adapter] if manifest.adapter else []))]
    bad = [name for name in weights if not _stays_inside(name) or "/" in name]
    bad += [name for name in (*manifest.side_files, *manifest.adapter_files) if not _stays_inside(name)]
    if bad:
        raise InputError(f"{path}: names a file outside its folder ({bad[0]!r}); do not use this folder, convert the checkpoint again")


def _stays_inside(name: object) -> bool:
    parts = name.split("/") if isinstance(name, str) else [""]
    return "\\" not in str(name) and "\0" not in str(name) and not {"", ".", ".."} & set(parts)


def _tensor_file(value: dict[str, Any]) -> TensorFile:
    return TensorFile(value["file"], value["metadata"], tuple((name, dtype, tuple(shape)) for name, dtype, shape in value["tensors"]))


@contextlib.contextmanager
def new_folder(out: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary folder that takes the name `out` when the block ends, and is removed when it fails.

    What processes that were killed left beside a local `out` is removed first.

    Raises:
      InputError: `out` exists and is not an empty folder, or cannot be created.
    """
    check_holds_weights(out)
    out = absolute(out)
    if out.exists() and (not out.is_dir() or any(True for _ in out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; choose another name or remove it first")
    temporary = out.parent / f".{out.name}.incomplete-{os.getpid()}"
    _sweep(out)
    with as_input_error(f"{out}: cannot be created", "choose another place"):
        temporary.mkdir(parents=True, exist_ok=True)
    settle = 0
    try:
        yield temporary
        if out.exists():
            # epath's rmdir looks and then removes the whole tree: what another process wrote there in between too.
            os.rmdir(out) if "://" not in str(out) else out.rmdir()
        temporary.rename(out)
    except OSError as e:
        raise InputError(f"{out}: not written ({e}); free some space or choose another place") from e
    except BaseException as e:
        if not isinstance(e, Exception):  # Ctrl-C or SIGTERM, perhaps in the midst of a save
            settle = 5
        raise
    finally:
        _remove(temporary, settle)


def _remove(folder: epath.Path, settle: int) -> None:
    """Removes a folder into which threads that an interruption left behind may be writing still: until it stays away `settle` looks long.

    After ten seconds it gives up; the next conversion to the same name sweeps what is left.
    """
    absent = 0
    for _ in range(100):
        absent = 0 if folder.exists() else absent + 1
        with contextlib.suppress(OSError):  # "Directory not empty": written to meanwhile
            folder.rmtree(missing_ok=True)
            if absent >= settle:
                return
        time.sleep(0.1)


def _sweep(out: epath.Path) -> None:
    """Removes temporary folders of `out` whose process is gone. Elsewhere than on a local disk a process number says nothing."""
    if "://" in str(out) or not out.parent.is_dir():
        return
    prefix = f".{out.name}.incomplete-"
    for item in list(out.parent.iterdir()):
        number = item.name.removeprefix(prefix)
        if item.name.startswith(prefix) and number.isdecimal() and not _lives(int(number)):
            item.rmtree(missing_ok=True)


def _lives(process: int) -> bool:
    if process == os.getpid():
        return False  # this process has not begun; the number is that of an earlier one, as happens in containers
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return True


def copy_files(source: epath.Path, names: tuple[str, ...], target: epath.Path) -> None:
    """Copies files by relative name, making folders as needed."""
    for name in names:
        to = target / name
        if to.exists():
            raise InputError(f"{source / name}: its name is taken in the converted folder; rename or remove the file")
        to.parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as reader, to.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
