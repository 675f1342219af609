"""Packages that only some uses need: what pip installs them with."""

from __future__ import annotations

import importlib.util

TRAIN = ("absl", "array_record", "clu", "fsspec", "grain", "ml_collections", "optax", "pyarrow", "tensorboard", "tensorflow_datasets")
"""Modules of the extra `train`."""


def lacking() -> str | None:
    """Returns one line that says how to install what training needs, None where all of it is there."""
    return next((advice(name) for name in TRAIN if importlib.util.find_spec(name) is None), None)


def advice(module: str | None) -> str | None:
    """Returns one line that says how to install a missing module, None for a module that no extra brings."""
    package = (module or "").partition(".")[0]
    if package == "ray":
        return "ray is not installed; --ray needs it: run pip install 'omni-jax[ray]'"
    if package not in TRAIN:
        return None
    return f"{package} is not installed; training, prepared clips and configs need it: run pip install 'omni-jax[train]'"
