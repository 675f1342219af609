"""mteb's own sampler of frames, from its installed source, against ours: the package needs others that parity does not, so one function of
it is run alone."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from omni_jax.config import PRESETS
from omni_jax.media.sampling import sample_indices

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def frame_indices() -> Callable[[int, int], list[int]]:
    """mteb.models.modality_collators.frame_indices: (frames of the clip, frames wanted) -> places."""
    path = next(file for file in importlib.metadata.files("mteb") or () if str(file) == "mteb/models/modality_collators.py").locate()
    tree = ast.parse(Path(str(path)).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "frame_indices"]
    space: dict[str, Any] = {"np": np}
    exec(compile(tree, str(path), "exec"), space)
    return space["frame_indices"]


@given(count=st.integers(1, 20_000))
@example(count=7)
@example(count=8)
@example(count=9)
def test_the_mteb_presets_take_mtebs_frames(frame_indices: Callable[[int, int], list[int]], count: int) -> None:
    wrapper = PRESETS["mteb"]
    assert sample_indices(count, 25.0, wrapper)[0].tolist() == frame_indices(count, 8)
    rule = PRESETS["nemotron_mteb"]
    wanted = min(max(1, int(count / 25.0 * 2.0)), 64, count)
    assert sample_indices(count, 25.0, rule)[0].tolist() == frame_indices(count, wanted)
