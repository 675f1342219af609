"""Collectives read from a program's text, and those of the real step on eight devices."""

from __future__ import annotations

import pytest

from omni_jax.planning.hlo import Collective, collectives, shape_bytes

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), PAIRS
  %done = bf16[4,8]{1,0:T(8,128)(2,1)} collective-permute-done(%start)
  %kernel = bf16[4,8]{1,0} custom-call(%done), custom_call_target="tpu_custom_call", backend_config={"body": "module {
}}, and so on over several lines"}
  %one = u32[] constant(1)
  %next = u32[]{:T(128)} add(%i, %one)
  %after = u32[]{:T(128)} add(%next, %one)
  ROOT %out = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%after, %kernel)
}

%inner_condition (p: (u32[], bf16[4,8])) -> pred[] {
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %bound = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%outer_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %zero = u32[] constant(0)
  %copied = u32[] copy(%zero)
  %given = (u32[], bf16[4,8]{1,0}) tuple(%copied, %x)
  %loop = (u32[], bf16[4,8]{1,0}) while(%given), condition=%inner_condition, body=%inner_body
  %y = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %all = (f32[6]{0}, f32[2]{0}) all-reduce(%y, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %alone = f32[6]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %y)
}

%outer_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] custom-call(%p), custom_call_target="x"
}

ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %n = s32[] constant(0)
  %given = (s32[], bf16[4,8]{1,0}) tuple(%n, %x)
  %loop = (s32[], bf16[4,8]{1,0}) while(%given), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %y = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %gathered = bf16[16,8]{1,0} all-gather(%y), replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="jit(step)/head/gather"}
}
"""
PAIRS = 'source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(step)/while/body/mlp/dot_general"}'
PROGRAM = PROGRAM.replace("PAIRS", PAIRS)


def test_loops_are_counted_and_groups_of_one_left_out():
    found = {c.kind: c for c in collectives(PROGRAM)}
    assert found == {
        # 8 / 2 rounds, three times.
        "collective-permute": Collective("collective-permute", "bf16[4,8]", 64, 4, 12, True, source="mlp/dot_general"),
        "all-reduce": Collective("all-reduce", "(f32[6], f32[2])", 32, 2, 3, True),
        "all-gather": Collective("all-gather", "bf16[16,8]", 256, 4, 1, False, source="head/gather"),
    }
    assert found["collective-permute"].moved == 64 * 12
    assert found["all-reduce"].moved == 2 * 32 / 2 * 3
    assert found["all-gather"].moved == 256 * 3 / 4


def test_a_gather_that_several_products_carry_is_counted_once():
    """Fused into a chain, it stands in the computation of each part, and says in all but the first that it is under way."""

    def fused(name: str, under_way: bool) -> str:
        flag = '"async_collective_fusion_config":{"flag_start":"%s"}' % (2 if under_way else -1)
        gather = f"all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], dimensions={{0}}, backend_config={{{flag}}}"
        return f"%{name} (p: bf16[4,8]) -> bf16[16,8] {{\n  %p = bf16[4,8]{{1,0}} parameter(0)\n  ROOT %g = bf16[16,8]{{1,0}} {gather}\n}}"

    parts = {"a": False, "b": True, "c": True, "d": False}
    calls = [f"  %{name}.1 = bf16[16,8]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}" for name in parts]
    program = ["ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {", "  %x = bf16[4,8]{1,0} parameter(0)", *calls, "}"]
    (found,) = collectives("\n".join([*(fused(name, under_way) for name, under_way in parts.items()), *program]))
    assert (found.kind, found.runs, found.bytes) == ("all-gather", 2, 256)


def test_collectives_across_slices_are_told_apart():
    across = {c.kind: c.across for c in collectives(PROGRAM, devices_per_slice=2)}
    assert across == {"collective-permute": True, "all-reduce": False, "all-gather": True}


@pytest.mark.parametrize(
    ("groups", "size", "across"),
    [
        ("replica_groups=[2,4]<=[8]", 4, False),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, True),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, False),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, True),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", 4, False),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", 2, True),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'a','b'}", 8, True),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", 2, True),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", 2, False),
        ("replica_groups={{0,4},{1,5}}", 2, True),
        ("replica_groups={{0,1},{3,4}}", 2, True),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, False),
    ],
)
def test_every_way_of_writing_groups(groups: str, size: int, across: bool):
    lines = [
        "ENTRY %main (x: f32[2]) -> f32[2] {",
        "  %x = f32[2]{0} parameter(0)",
        f"  ROOT %r = f32[2]{{0}} all-reduce(%x), {groups}",
        "}",
    ]
    text = "\n".join(lines)
    (found,) = collectives(text, devices_per_slice=4)
    assert (found.group, found.across) == (size, across)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("ALL_REDUCE", "bf16[72,8,128]", Collective("all-reduce", "bf16[72,8,128]", 147456, 2, 1, across=True)),
        ("ALL_GATHER", "f32[2,256,14]", Collective("all-gather", "f32[2,256,14]", 28672, 2, 1, across=True)),
        ("ONE_TO_ONE", "f32[4]", Collective("collective-permute", "f32[4]", 16, 2, 1, across=True)),
    ],
)
def test_transfers_between_slices_are_the_hosts(kind: str, shape: str, expected: Collective):
    """As libtpu 0.0.42 writes them for two slices of v5e: groups within a slice number its own devices, hosts do the rest."""
    said = (
        f'_xla_host_transfer_rendezvous="all-reduce.163_0",_xla_megascale_target="{{1,2}}x{{0:255}}",_xla_megascale_transfer_type="{kind}"'
    )
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    about = f"is_host_transfer=true, frontend_attributes={{{handler},{said}}}"
    lines = [
        "ENTRY %main (x: f32[2]) -> f32[2] {",
        "  %x = f32[2]{0} parameter(0)",
        "  %t = token[] after-all()",
        f"  %send = ({shape}{{2,1,0:T(8,128)(2,1)}}, u32[], token[]) send(%x, %t), channel_id=4, {about}",
        f"  %recv = ({shape}{{2,1,0:T(8,128)(2,1)}}, u32[], token[]) recv(%t), channel_id=3, {about}",
        f"  %done = ({shape}{{2,1,0}}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true",
        "  %host = (f32[9], u32[], token[]) recv(%t), channel_id=9, is_host_transfer=true",
        "  ROOT %r = f32[2]{0} all-reduce(%x), replica_groups={{0,1,2,3}}",
        "}",
    ]
    found = collectives("\n".join(lines), devices_per_slice=4)
    assert [c for c in found if c.across] == [expected]
    assert [c for c in found if not c.across] == [Collective("all-reduce", "f32[2]", 8, 4, 1)]


def test_bytes_of_shapes():
    assert shape_bytes("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert shape_bytes("(f32[], s32[4], pred[8])") == 4 + 16 + 8
