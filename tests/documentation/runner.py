"""Executes the code blocks of pages, in order and in one process, with the package that an installed wheel holds.

    python runner.py PACKAGE PRESET PAGE...

PACKAGE is the folder on PYTHONPATH that holds omni_jax, PRESET the fields of a small training preset as JSON. Prints what the commands
print, and at the end the number of commands and scripts of each page. This file imports nothing of the checkout.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What keeps a run of the published recipe small.
SMALL = (
    *("model.dtype=float32", "model.lora.rank=4", "model.lora.alpha=8.0", "data.workers=0", "batch.micro_batch=8", "batch.micro_batches=1"),
    *("batch.blocks=1", "losses.hn_audio_only=True", "steps=1", "epochs=0.0", "remat=none", "checkpoint.keep=1"),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns (language, text) of the code blocks of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command of a shell block."""
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def execute(page: Path) -> int:
    """Executes the blocks of a page and returns how many commands and scripts it has."""
    count = 0
    for language, text in blocks(page):
        if language == "sh":
            for words in commands(text):
                run(words)
                count += 1
        elif language == "python":
            exec(compile(text, page.name, "exec"), {"__name__": page.stem})
            count += 1
        elif language == "json":
            assert all(json.loads(line)["id"] for line in text.splitlines())
    return count


def run(words: list[str]) -> None:
    """Runs one command in this process; a training run is a small one."""
    from omni_jax.cli.main import main
    from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED

    assert words[0] == "omni-jax", f"{words[0]} is no command of this project; mark its block as text"
    small = [f"--config.{change}" for change in SMALL if "--config.model.lora=None" not in words or "lora" not in change]
    status = main([*words[1:], *(small if words[1] == "train" else [])])
    assert status in (DONE, DONE_WITH_SKIPPED), f"{shlex.join(words)} ended with {status}"


def mount() -> None:
    """Makes the folder `bucket` of the current one gs://BUCKET for what reads through fsspec, as where the bucket is mounted there."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(str(path).replace("gs://BUCKET", str(Path("bucket").absolute()), 1))

    fsspec.register_implementation("gs", Bucket, clobber=True)


def strangers(package: Path) -> list[str]:
    """Returns the modules of omni_jax that were not loaded from the package's folder."""
    own = [(name, getattr(module, "__file__", None)) for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "omni_jax"]
    return [f"{name}: {file}" for name, file in own if file and not Path(file).is_relative_to(package)]


def _main() -> None:
    import jax

    from omni_jax.config.presets import PRESETS, Preset

    package, preset, *pages = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 8)
    PRESETS["training"] = Preset(**json.loads(preset))
    mount()
    for page in pages:
        print(f"{Path(page).name} has {execute(Path(page))} commands")
    assert not (found := strangers(Path(package))), found


if __name__ == "__main__":
    _main()
