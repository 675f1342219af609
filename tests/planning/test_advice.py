"""What the compiler's refusals say, and what is advised."""

from __future__ import annotations

import pytest

from omni_jax.planning.advice import change_for, read_refusal

# libtpu 0.0.42, of the 7B step with 16 clips a chip on v5e:4x4.
SHORT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.99G) exceeds available HBM (15.75G)."
)
# As compilers before it write it, and as its own last stage does.
LONG = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.
Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.75G:
    reserved        256.00M
    program          20.50G
    arguments            0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 20.50G:
    global           272.0K
    HLO temp         20.50G (99.8% utilization: Unpadded (20.40G) Padded (20.44G), 0.3% fragmentation (61.44M))

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(traced)/while/body/decoder/mlp/dot_general" source_file="layers.py" source_line=91
     Shape: bf16[28,1,1024,18944]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 2.00G
     XLA label: fusion.12 = fusion(copy.1, copy.2), kind=kOutput, calls=computation.12
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[8,4096,4096]{2,1,0:T(8,128)}
     Unpadded size: 512.00M
     XLA label: copy.5 = copy(get-tuple-element.9)
     Allocation type: HLO temp
     ==========================

  3. Size: 256.0K
     Operator: op_type="add" op_name="jit(traced)/jvp()/closed_call/add"
     Shape: f32[256,256]{1,0:T(8,128)}
     Unpadded size: 256.0K
     XLA label: add.7 = add(a, b)
     Allocation type: HLO temp
     ==========================
"""
ASKED = {"clips_per_device": 16.0, "micro_batches": 1, "negatives": "global", "remat": "layer"}


def test_the_short_refusal():
    said = read_refusal(SHORT, **ASKED)
    assert said is not None and (said.used_gib, said.limit_gib, said.largest) == (16.99, 15.75, ())
    assert said.change == "16 clips a device at once: take 8 in 2 micro-batches"


def test_the_long_refusal_names_the_largest_allocations():
    said = read_refusal(LONG, **ASKED)
    assert said is not None and (said.used_gib, said.limit_gib) == (20.5, 15.75)
    assert said.largest == (
        (2.0, "bf16[28,1,1024,18944]", "decoder/mlp/dot_general"),
        (0.5, "f32[8,4096,4096]", "copy.5"),
        (256 / 2**20, "f32[256,256]", "jvp()/add"),
    )


@pytest.mark.parametrize(("unit", "gib"), [("G", 1.0), ("M", 2**-10), ("K", 2**-20), ("", 2**-30)])
def test_units(unit: str, gib: float):
    for text in (f"Used 3.00{unit} of 2.50{unit} hbm", f"for HLO temporaries (3.00{unit}) exceeds available HBM (2.50{unit})."):
        said = read_refusal(text, **ASKED)
        assert said is not None and (said.used_gib, said.limit_gib) == (3.0 * gib, 2.5 * gib)


@pytest.mark.parametrize("text", ["", "INTERNAL: Mosaic failed to compile", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."])
def test_other_errors_are_not_about_hbm(text: str):
    assert read_refusal(text, **ASKED) is None


@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_residuals_go_first(remat: str):
    said = change_for([], 16, 1, "global", remat)
    assert said == f"remat '{remat}' keeps residuals of every decoder layer: set remat='layer'"


@pytest.mark.parametrize(
    ("clips", "micro_batches", "change"),
    [(8, 2, "take 4 in 4 micro-batches"), (3, 2, "take 1 in 6 micro-batches"), (15, 1, "take 5 in 3 micro-batches"), (2, 4, "take 1 in 8")],
)
@pytest.mark.parametrize("remat", ["layer", "offload"])
def test_then_fewer_clips_at_once_and_as_many_in_all(clips: int, micro_batches: int, change: str, remat: str):
    said = change_for([], clips, micro_batches, "global", remat)
    assert said.startswith(f"{clips} clips a device at once: {change}") and "pool" not in said
    assert said in change_for([], clips, micro_batches, "micro", remat) != said
    assert "negatives='global' the pool of negatives stays" in change_for([], clips, micro_batches, "micro", remat)


def test_one_clip_is_the_least():
    arguments = [(8.0, "bf16[152064,3584]", "argument"), (4.0, "f32[9]", "params/head")]
    assert change_for(arguments, 1, 1, "global", "layer").startswith("weights and optimizer fill the memory: more devices on fsdp")
    assert change_for([(8.0, "bf16[9]", "decoder/mlp/dot_general")], 1, 1, "global", "layer").startswith("one clip a device is the least")
