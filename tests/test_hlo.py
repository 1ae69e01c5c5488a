"""Reading compiled modules: types, groups of devices, loops, lines that break."""

import pytest

from radit_jax.planning import hlo

HEAD = "HloModule m\n\n"


def module(body):
    return hlo.Module(f"{HEAD}ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("text", "size", "padded", "space"),
    [
        ("f32[]", 4, 4, 0),
        ("bf16[3,5]{1,0}", 30, 30, 0),
        # Tiles of 8 x 128 over the two most minor dimensions.
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30, 8 * 128 * 2, 0),
        ("f32[2,130,8]{1,2,0:T(8,128)S(1)}", 8320, 2 * 8 * 256 * 4, 1),
        ("f32[300]{0:T(128)}", 1200, 384 * 4, 0),
        ("s4[10]{0}", 5, 5, 0),
    ],
)
def test_sizes_of_arrays(text, size, padded, space):
    (found,) = hlo.arrays(text)
    assert (found.bytes, found.padded, found.space) == (size, padded, space)


def test_arrays_of_a_tuple_come_in_order():
    text = "(f32[2]{0}, /*index=1*/(s32[], token[]), pred[7]{0:T(512)})"
    assert [str(a) for a in hlo.arrays(text)] == ["f32[2]", "s32[]", "pred[7]"]
    with pytest.raises(hlo.HloError, match="q7"):
        hlo.arrays("q7[3]")


# Of a mesh of 2 x 4: rows of four, columns of two.
@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_in_every_spelling(spelled, expected):
    line = f"  ROOT %a = f32[4]{{0}} all-reduce(%p), channel_id=1, {spelled}, x=1"
    (found,) = module(line).entry
    assert hlo.groups(found, 8) == expected


LOOP = """
%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {{
  ROOT %b = (s32[], f32[4]{{0}}) parameter(0)
}}

%condition (c: (s32[], f32[4])) -> pred[] {{
  %limit = s32[] constant(7)
  %c = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %{limit}), direction={direction}
}}

ENTRY %main (p: f32[4]) -> (s32[], f32[4]) {{
  %p = f32[4]{{0}} parameter(0)
  %zero = s32[] constant(2)
  %first = s32[] copy(%zero)
  %start = (s32[], f32[4]{{0}}) tuple(%first, %p)
  ROOT %while = (s32[], f32[4]{{0}}) while(%start), condition=%condition, \
body=%body{more}
}}
"""


@pytest.mark.parametrize(
    ("limit", "direction", "more", "expected"),
    [
        ("limit", "LT", "", 5),
        ("limit", "LT", ', backend_config={"known_trip_count":{"n":"9"}}', 9),
        ("limit", "GT", "", None),  # no loop that counts up
    ],
)
def test_trips(limit, direction, more, expected):
    found = hlo.Module(HEAD + LOOP.format(limit=limit, direction=direction, more=more))
    loop = found.entry.by_name["while"]
    assert found.trips(loop, found.entry) == expected


def test_lines_may_break_inside_what_a_kernel_says_of_itself():
    found = module(
        "  %p = f32[4]{0} parameter(0)\n  ROOT %k = f32[4]{0} custom-call(%p), "
        'custom_call_target="x", frontend_attributes={kernel_metadata={\n"a":"b"\n}}, '
        'metadata={op_name="jit(f)/k"}'
    )
    assert [i.name for i in found.entry] == ["p", "k"]
    assert found.entry.root.scope == "jit(f)/k"


def test_what_is_no_module_is_refused():
    with pytest.raises(hlo.HloError, match="no entry"):
        hlo.Module("something else\n")
