"""A loaded model written to a folder of its own, which needs neither the cache nor the workdir that it came from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from omni_jax.api.weights import ModelSource
from omni_jax.conversion import folder


def save_model(source: ModelSource, out: str | os.PathLike[str]) -> None:
    """Writes a converted folder that loads as the model does; it appears under its name only when complete.

    A converted folder is copied. What a run trained goes the way of an export, through PyTorch's folders beside `out`, which takes the
    model's size three times while it lasts.

    Raises:
      InputError: `out` exists, or cannot be written.
    """
    target = Path(out).absolute()
    if source.step is None:
        home = Path(source.folder)
        names = tuple(str(item.relative_to(home)) for item in sorted(home.rglob("*")) if item.is_file())
        with folder.new_folder(target) as temporary:
            folder.copy_files(source.folder, names, temporary)
            folder.write_modules(temporary, source.config)  # which folders of earlier versions lack
        return
    from omni_jax.conversion import to_jax  # late: who embeds does not need it

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
        base, adapter = Path(place) / "base", Path(place) / "adapter" if source.config.lora is not None else None
        source.to_torch(base_out=base, adapter_out=adapter, base_model=str(source.folder))
        to_jax(base, target, adapter=adapter)
