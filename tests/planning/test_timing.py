"""Seconds from estimated cycles: loops, branches, transfers and what has no estimate, each against a count by hand."""

from __future__ import annotations

import dataclasses

import pytest

from omni_jax.config import ConfigError
from omni_jax.planning import timing
from omni_jax.planning.chips import CHIPS, Chip
from omni_jax.planning.timing import KERNEL_SHARE, KERNELS, REST, WAITS, read_timing

CLOCK = 1e6
# A million cycles a second; 1 GB/s to memory, 4 GB/s to other chips over four links; 2 x 100^2 x 1e6 operations a second.
CHIP = Chip("test", "test", 2, 2 * 100**2 * 1e-6, 1.0, 1.0, 4.0, 0.5, mxus=(1, 100))


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def timed(body: str, *computations: str, chip: Chip = CHIP, **options: object) -> timing.Timing:
    """Reads a module of these instructions, and of these computations beside them."""
    text = "\n".join([*computations, "ENTRY %main (x: f32[8]) -> f32[8] {", "  %x = f32[8]{0} parameter(0)", body, "}"])
    found = read_timing(text, chip, **options)
    assert found is not None
    return found


def computation(name: str, body: str) -> str:
    return f"%{name} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{body}\n}}"


def test_the_clock_follows_from_the_peak():
    assert CHIP.clock == pytest.approx(CLOCK)
    # 4 x 128^2 multiply-adds: 197e12 / (4 x 16384 x 2); v4 and v5p have 8, v6e and each half of v7x 4 of 256^2.
    clocks = {name: chip.clock / 1e9 for name, chip in CHIPS.items()}
    assert clocks == pytest.approx({"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "v7x": 2.2}, rel=3e-3)


def test_a_chip_whose_clock_is_not_known_is_refused_by_name():
    unknown = dataclasses.replace(CHIP, name="v9", mxus=None)
    with pytest.raises(ConfigError, match="chip v9: its clock is not known"):
        timed(f"  ROOT %y = f32[8]{{0}} add(%x, %x), {cycles(5)}", chip=unknown)


def test_a_program_without_estimates_has_no_time():
    assert read_timing("ENTRY %main (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}", CHIP) is None


def test_loops_calls_and_the_dearest_branch_are_counted():
    inner = computation("inner", f"  ROOT %a = f32[8]{{0}} add(%p, %p), {cycles(100)}")
    outer = computation(
        "outer",
        "  %l = f32[8]{0} while(%p), condition=%never, body=%inner, "
        'backend_config={"known_trip_count":{"n":"5"}}\n'
        f"  ROOT %b = f32[8]{{0}} multiply(%l, %l), {cycles(7)}",
    )
    dear = computation("dear", f"  ROOT %c = f32[8]{{0}} exponential(%p), {cycles(1000)}")
    found = timed(
        '  %l = f32[8]{0} while(%x), condition=%never, body=%outer, backend_config={"known_trip_count":{"n":"3"}}\n'
        "  %c = f32[8]{0} conditional(%x, %l, %l), branch_computations={%inner, %dear}\n"
        "  ROOT %d = f32[8]{0} call(%c), to_apply=%inner",
        inner,
        outer,
        dear,
    )
    by_name = {one.source: one.seconds * CLOCK for one in found.operations}
    assert by_name == pytest.approx({"add": 3 * 5 * 100 + 100, "multiply": 3 * 7, "exponential": 1000})
    assert found.predicted == pytest.approx(2621 / CLOCK) == found.estimated and not any(found.added.values())


SPLIT = "replica_groups={{0,1,2,3}}, dimensions={0}"


@pytest.mark.parametrize(("between", "waits"), [(0, 3000), (1000, 2000), (5000, 0)])
def test_of_a_transfer_what_no_work_hides_is_added(between: int, waits: int):
    """12 MB arrive from three others at 4 GB/s: 3,000 cycles."""
    work = f"  %w = f32[8]{{0}} add(%x, %x), {cycles(between)}\n" if between else ""
    found = timed(
        f"  %s = (f32[1000000]{{0}}, f32[4000000]{{0}}) all-gather-start(%x), channel_id=1, {SPLIT}\n{work}"
        f"  %d = f32[4000000]{{0}} all-gather-done(%s)\n  ROOT %r = f32[8]{{0}} add(%x, %x), {cycles(10)}"
    )
    assert found.added.get(WAITS, 0) * CLOCK == pytest.approx(waits)
    assert found.predicted * CLOCK == pytest.approx(between + waits + 10)


def test_all_waits_for_a_collective_that_does_not_start_and_end():
    found = timed(f"  %g = f32[4000000]{{0}} all-gather(%x), channel_id=1, {SPLIT}\n  ROOT %r = f32[8]{{0}} add(%x, %x), {cycles(10)}")
    assert found.added == pytest.approx({WAITS: 3000 / CLOCK}) and found.operations[0].bound == "interconnect"


def test_a_permute_has_one_link():
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    found = timed(
        f"  %g = f32[1000000]{{0}} collective-permute(%x), channel_id=1, {pairs}\n  ROOT %r = f32[8]{{0}} add(%x, %x), {cycles(1)}"
    )
    assert found.added[WAITS] * CLOCK == pytest.approx(4000)


def test_a_transfer_fused_into_products_ends_where_the_last_of_them_takes_it():
    gather = f"  %g = f32[4000000]{{0}} all-gather(%p), channel_id=1, {SPLIT}\n"
    start = computation(
        "begin", gather + '  ROOT %s = (f32[8]{0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    )
    step = computation("step", gather + "  ROOT %t = (f32[8]{0}, u32[]{:S(2)}) tuple(%p, %p)")
    done = computation("end", gather + '  ROOT %e = f32[8]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"')
    found = timed(
        "  %a = (f32[8]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%begin\n"
        "  %a0 = f32[8]{0} get-tuple-element(%a), index=0\n"
        f"  %b = (f32[8]{{0}}, u32[]{{:S(2)}}) fusion(%a0, %x), kind=kOutput, calls=%step, {cycles(1200)}\n"
        "  %b0 = f32[8]{0} get-tuple-element(%b), index=0\n"
        "  ROOT %c = f32[8]{0} fusion(%b0), kind=kCustom, calls=%end",
        start,
        step,
        done,
    )
    assert found.estimated * CLOCK == pytest.approx(1200) and found.added[WAITS] * CLOCK == pytest.approx(1800)


def test_what_has_no_estimate_is_taken_from_its_bytes_and_named():
    """A reshape that reads and writes 4 MB at 1 GB/s; small ones are free, and what lies beside the cores moves nothing."""
    found = timed(
        "  %a = f32[1000000]{0} broadcast(%x)\n"
        f"  %b = f32[1000000]{{0}} fusion(%a), kind=kLoop, calls=%nothing, {cycles(10)}\n"
        "  %c = f32[1000,1000]{1,0} reshape(%b)\n"
        "  %d = f32[1000000]{0:S(1)} reshape(%x)\n  ROOT %e = f32[8]{0} add(%x, %x)"
    )
    assert found.added[REST] * CLOCK == pytest.approx(4000 + 8000, rel=1e-3)
    (estimated,) = [one for one in found.operations if one.estimated]
    # 8 MB would take 8 ms and it takes 10 us: the bound is named and never above the whole.
    assert (estimated.bound, estimated.reached, estimated.seconds * CLOCK) == ("HBM", 1.0, pytest.approx(10))


@pytest.mark.parametrize(("name", "count"), [("fwd_segmented_residuals", 2), ("dq_segmented", 3), ("dkv_segmented", 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_kernels_are_counted_from_their_shapes(name: str, count: int, causal: bool):
    """Four rows, two groups of three heads, 512 queries in four blocks, keys twice: 10 of 16 blocks of each copy are seen."""
    body = (
        "  %q = bf16[4,2,3,512,64]{4,3,2,1,0} broadcast(%x)\n  %k = bf16[4,2,1024,64]{3,2,1,0} broadcast(%x)\n"
        f'  %splash_mqa_{name}.3 = f32[8]{{0}} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={"xprof_metadata":"{\\"block_q\\": 128}"}}\n'
        f"  ROOT %e = f32[8]{{0}} add(%x, %x), {cycles(1)}"
    )
    found = timed(body, causal=causal)
    pairs = 512 * 1024 * (10 / 16 if causal else 1)
    operations = 2 * count * 64 * pairs * 4 * 2 * 3
    assert found.multiplied == pytest.approx(operations)
    assert found.added[KERNELS] == pytest.approx(operations / (CHIP.teraflops * 1e12) / KERNEL_SHARE)
    (kernel,) = [one for one in found.operations if one.source == f"splash_mqa_{name}"]
    assert (kernel.bound, kernel.reached) == ("MXU", pytest.approx(KERNEL_SHARE))


def test_a_known_reach_leaves_blocks_of_a_kernel_out():
    """Four blocks of 128 queries, with keys from the block before theirs on; the first block again for a second branch."""
    body = (
        "  %q = bf16[1,1,512,64]{3,2,1,0} broadcast(%x)\n  %k = bf16[1,1,640,64]{3,2,1,0} broadcast(%x)\n"
        '  %splash_mqa_fwd.3 = f32[8]{0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={"xprof_metadata":"{\\"block_q\\": 128}"}}\n'
        f"  ROOT %e = f32[8]{{0}} add(%x, %x), {cycles(1)}"
    )
    assert timed(body, reach=128).multiplied == pytest.approx(2 * 2 * 64 * (4 + 3 + 1) * 128**2)


TABLES = """FileNames
1 "/somewhere/model/layers.py"
2 "/somewhere/model/decoder.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=49 end_line=49 column=1 end_column=9}
2 {file_name_id=1 function_name_id=1 line=150 end_line=150 column=1 end_column=9}
3 {file_name_id=1 function_name_id=1 line=106 end_line=106 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("jit(f)/while/body/dot_general", "dot_general"),
        ("jit(f)/transpose(jvp())/checkpoint/dot_general", "dot_general backward"),
        ("jit(f)/transpose(jvp())/checkpoint/rematted_computation/mul", "mul again"),
    ],
)
def test_sources_are_lines_from_a_caller_in_another_file_in_and_the_pass(path: str, expected: str):
    metadata = f'metadata={{op_name="{path}" stack_frame_id=3}}'
    text = f"HloModule m\n\n{TABLES}ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n"
    found = read_timing(f"{text}  ROOT %y = f32[8]{{0}} fusion(%x), calls=%f, {metadata}, {cycles(9)}\n}}", CHIP)
    assert found is not None and [one.source for one in found.operations] == [f"decoder.py:49 > layers.py:150 > layers.py:106 {expected}"]


@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "count"),
    [
        # A plain product, as TPU writes it: (4, 32) x (32, 8).
        ("[4,32]", "[32,8]", "[4,8]", "dim_labels=bf_io->bf", 2 * 4 * 32 * 8),
        # Batched: the batch is a window of 3 whose taps fall into gaps but for one.
        ("[3,4,32]", "[3,32,8]", "[3,4,8]", "window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0io->0bf", 2 * 3 * 4 * 32 * 8),
        # Over time, one frame of padding on both sides: 3 taps of 5 outputs, two of them on padding.
        ("[2,5,16]", "[3,16,8]", "[2,5,8]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 2 * 13 * 16 * 8),
        ("[2,9,16]", "[3,16,8]", "[2,4,8]", "window={size=3 stride=2 pad=0_0}, dim_labels=b0f_0io->b0f", 2 * 2 * 12 * 16 * 8),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_products_are_counted_by_what_they_multiply(left: str, right: str, out: str, rest: str, count: int, fused: bool):
    made = (
        f"  %a = f32{left}{{0}} broadcast(%p)\n  %b = f32{right}{{0}} broadcast(%p)\n  ROOT %c = f32{out}{{0}} convolution(%a, %b), {rest}"
    )
    if fused:
        found = timed(f"  ROOT %y = f32{out}{{0}} fusion(%x), kind=kOutput, calls=%inner, {cycles(9)}", computation("inner", made))
    else:
        found = timed(f"{made.replace('%p', '%x')}, {cycles(9)}")
    assert found.multiplied == count


def test_higher_precision_takes_passes_of_the_matrix_units():
    """Of 2e6 operations, at 2e10 a second 100 us: six passes of them take 600 of the 1,000 us."""
    product = "  %a = f32[100,100]{1,0} broadcast(%x)\n  ROOT %c = f32[100,100]{1,0} dot(%a, %a), lhs_contracting_dims={1}"
    found = timed(f"{product}, operand_precision={{highest,highest}}, {cycles(1000)}")
    (one,) = [one for one in found.operations if one.estimated]
    assert found.multiplied == 2e6 and (one.bound, one.reached) == ("MXU", pytest.approx(0.6))


def test_an_array_that_is_cut_or_written_into_moves_the_part():
    """A slice of 1 MB of 27, written into another stack: 2 MB."""
    stack = "f32[27,250000]{1,0}"
    inner = (
        f"%f (p: f32[8]) -> f32[8] {{\n  %s = {stack} parameter(0)\n  %t = {stack} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  %cut = f32[1,250000]{1,0} dynamic-slice(%s, %i, %i)\n"
        f"  ROOT %u = {stack} dynamic-update-slice(%t, %cut, %i, %i)\n}}"
    )
    body = f"  %s = {stack} parameter(1)\n  %t = {stack} parameter(2)\n  %i = s32[] constant(1)\n"
    found = timed(f"{body}  ROOT %y = {stack} fusion(%s, %t, %i), kind=kLoop, calls=%f, {cycles(4000)}", inner)
    (one,) = found.operations
    assert one.bound == "HBM" and one.reached == pytest.approx(2000 / 4000, rel=1e-3)
