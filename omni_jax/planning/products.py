"""Operations of the products in a program's text: TPU writes each as a convolution, batched ones with windows that mostly miss."""

from __future__ import annotations

import math
import re

import numpy as np

from omni_jax.planning.hlo import Computation, Instruction, all_called

PASSES = {"highest": 6, "high": 3}
"""Products in bfloat16 that one of float32 at a higher precision takes."""

INTEGERS = 0.5
"""Passes of a product of int8: its rate is twice that of bfloat16."""

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


def of(computations: dict[str, Computation], computation: Computation, item: Instruction) -> tuple[float, float]:
    """Returns the operations of an instruction's products, those it calls among them; and how many the MXU makes, passes counted."""
    if item.op in ("convolution", "dot"):
        count = _convolution(computation, item) if item.op == "convolution" else _dot(computation, item)
        precision = re.search(r"operand_precision=\{(\w+)", item.rest)
        small = all(name in computation and computation[name].shape.startswith(("s8", "u8")) for name in item.operands[:2])
        return count, count * (INTEGERS if small else PASSES.get(precision[1] if precision else "", 1))
    count = passes = 0.0
    for name in all_called(item):
        inner = computations.get(name, {})
        for one in inner.values():
            if one.op in ("convolution", "dot", "fusion", "call"):
                found = of(computations, inner, one)
                count, passes = count + found[0], passes + found[1]
    return count, passes


def dimensions(shape: str) -> list[int]:
    """Returns the sizes of an array as HLO writes its shape, of a tuple its first; [] for a scalar."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _dot(computation: Computation, item: Instruction) -> float:
    left = dimensions(computation[item.operands[0]].shape) if item.operands[0] in computation else []
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.rest)
    over = [left[int(n)] for n in contracted[1].split(",") if n] if contracted and left else []
    return 2.0 * math.prod(dimensions(item.shape)) * math.prod(over)


def _convolution(computation: Computation, item: Instruction) -> float:
    """Twice the pairs that are multiplied: taps of the window that fall on the input, on no padding and in no gap."""
    names, labels = item.operands, _LABELS.search(item.rest)
    if labels is None or any(name not in computation for name in names[:2]):
        return 0.0
    left, right, out = (dimensions(shape) for shape in (computation[names[0]].shape, computation[names[1]].shape, item.shape))
    inputs, kernel, outputs = labels.groups()
    window = dict(part.split("=") for part in found[1].split()) if (found := _WINDOW.search(item.rest)) else {}
    total = 2.0 * right[kernel.index("i")] * out[outputs.index("b")] * out[outputs.index("f")]
    for place in range(len(inputs) - 2):
        size, made = left[inputs.index(str(place))], out[outputs.index(str(place))]
        total *= _taps(size, right[kernel.index(str(place))], made, window, place)
    return total


def _taps(size: int, taps: int, made: int, window: dict[str, str], place: int) -> int:
    """Pairs of an output and a tap along one dimension that meet a value of the input."""

    def setting(name: str, default: int) -> int:
        return int(window[name].split("x")[place]) if name in window else default

    low = int(window["pad"].split("x")[place].split("_")[0]) if "pad" in window else 0
    gap = setting("lhs_dilate", 1)
    where = np.arange(made)[:, None] * setting("stride", 1) + np.arange(taps)[None] * setting("rhs_dilate", 1) - low
    return int(((where >= 0) & (where <= (size - 1) * gap) & (where % gap == 0)).sum())
