"""Programs as bytes: packing, listing, and refusing everything that is not one."""

from __future__ import annotations

import re
import struct
import subprocess
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from core_library import CSRC, build, compiler, core
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_sched import program, reference_schedule
from fused_sched.program import (
    Clamp,
    Clock,
    Curve,
    Join,
    Product,
    Repeat,
    Sum,
    Tree,
    describe,
    evaluate,
    evaluate_at,
    pack,
    unpack,
)

numbers = st.floats(-1e6, 1e6)
positive = st.floats(0.01, 1e6)
TABLED = ("table", "levels")


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    name = draw(st.sampled_from(sorted(program.CURVES)))
    levels = draw(st.integers(1, 4)) if name == "levels" else 0
    ends = sorted(draw(st.lists(numbers, min_size=levels - 1, max_size=levels - 1))) if levels else []
    entries = draw(st.lists(numbers, min_size=levels or 1, max_size=levels or 5)) if name in TABLED else []
    low, high = sorted([draw(numbers | st.just(-inf)), draw(numbers | st.just(inf))])
    return Curve(
        name,
        origin=draw(st.floats(-100, 0)),
        limit=draw(positive | st.just(inf)),
        divisor=draw(st.floats(1, 1e6)),
        stairs=float(draw(st.integers(0, 20))),
        repeats=draw(st.floats(0, 20)),
        exponent=draw(st.sampled_from([1.0, 0.5, 2.0])),
        p=draw(st.floats(0.1, 2)),
        q=draw(st.sampled_from([1.0, 0.5, 3.0])),
        offset=draw(numbers),
        scale=draw(numbers),
        low=low,
        high=high,
        complement=draw(st.booleans()) and name != "power",
        table=(*ends, *entries),
    )


def _inner(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    several = st.lists(children, min_size=1, max_size=3).map(tuple)
    steps = st.floats(0, 1000)

    def joined(nodes: tuple[Tree, ...]) -> st.SearchStrategy[Tree]:
        ends = st.lists(steps, min_size=len(nodes) - 1, max_size=len(nodes) - 1).map(sorted).map(tuple)
        origins = st.lists(steps, min_size=len(nodes), max_size=len(nodes)).map(tuple)
        return st.builds(Join, st.just(nodes), ends, origins)

    return st.one_of(
        several.flatmap(joined),
        st.builds(Product, several),
        st.builds(Sum, several),
        st.builds(
            Repeat,
            children,
            period=st.floats(1, 100),
            growth=st.sampled_from([1.0, 1.5, 2.0]),
            gain=st.floats(-1, 1),
            times=st.integers(0, 5).map(float),
        ),
        st.builds(
            Clock,
            children,
            multiplier=st.floats(0.1, 10),
            addend=st.floats(-99, 99),
            every=st.integers(0, 5).map(float),
        ),
        st.builds(Clamp, children, offset=numbers, scale=numbers, low=st.just(-1.0), high=st.just(1.0)),
    )


trees = st.recursive(curves(), _inner, max_leaves=6)


@settings(deadline=None)  # the first call compiles
@given(trees)
def test_unpack_is_the_inverse_of_pack(tree: Tree) -> None:
    assert unpack(pack(tree)) == tree
    assert core().validate(pack(tree)) == ""


@settings(deadline=None)  # the first call compiles
@given(trees)
def test_a_listing_has_one_line_per_node(tree: Tree) -> None:
    nodes = struct.unpack_from("<i", pack(tree), 8)[0]
    assert len(describe(pack(tree)).splitlines()) == nodes + 1


@settings(deadline=None)  # the first call compiles
@given(trees, st.lists(st.floats(0, 2000), min_size=1, max_size=8))
def test_the_evaluators_agree(tree: Tree, times: list[float]) -> None:
    """The same branches, children and cycles. Not the last bits: a cosine of u^2 turns an ulp of u^2 ~ 1e7 into
    1e-9, and a stair turns any ulp into a jump, so trees with stairs are left to the other tests."""
    knobs = [node for node in _nodes(tree) if isinstance(node, Curve)]
    if any(c.stairs or c.repeats or c.curve in TABLED for c in knobs):
        return
    compiled = core().evaluate(pack(tree), times)
    plain = np.array([reference_schedule.value(tree, t) for t in times])
    finite = np.isfinite(compiled)
    assert (np.isfinite(plain) == finite).all()
    entered = np.prod([max(1.0, _largest(node)) for node in _nodes(tree)])
    np.testing.assert_allclose(compiled[finite], plain[finite], rtol=1e-7, atol=1e-7 * entered)


def _nodes(tree: Tree) -> list[Tree]:
    return [tree, *(inner for child in program._children(tree) for inner in _nodes(child))]


def _largest(node: Tree) -> float:
    return max(abs(getattr(node, name, 0.0)) for name in ("offset", "scale"))


def test_the_tags_are_those_of_the_c_source() -> None:
    source = (CSRC / "core" / "program.h").read_text()
    rows = re.findall(r"X\(k(Curve|Node)\w+, (\d+), \"(\w+)\"", source)
    tables = {kind: {name: int(tag) for k, tag, name in rows if k == kind} for kind in ("Curve", "Node")}
    assert tables == {"Curve": program.CURVES, "Node": program.NODE_KINDS}
    assert int(re.findall(r"kMaxDepth = (\d+)", source)[0]) == program.MAX_DEPTH


def test_a_curve_that_only_one_side_knows_stops_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(CURVES={**program.CURVES, "spiral": 7}, NODE_KINDS=program.NODE_KINDS)
    monkeypatch.setattr(program.importlib, "import_module", lambda name: built)
    with pytest.raises(ImportError, match=r"disagree on CURVES.*spiral.*rebuild"):
        program._load_compiled()


def test_a_table_row_without_its_formula_does_not_compile(tmp_path: Path) -> None:
    header = (CSRC / "core" / "program.h").read_text()
    row = '  X(kCurveLevels, 7, "levels", LevelsCurve)'
    assert row in header
    with_row = header.replace(row, f'{row} \\\n  X(kCurveSpiral, 7, "spiral", SpiralCurve)')
    core_folder = tmp_path / "core"
    core_folder.mkdir()
    for file in ("platform.h", "mathlib.h", "schedule.h"):
        (core_folder / file).write_text((CSRC / "core" / file).read_text())
    source = tmp_path / "source.cpp"
    source.write_text('#include "core/schedule.h"\n')
    results = []
    for text in (header, with_row):
        (core_folder / "program.h").write_text(text)
        command = [compiler(), "-std=c++17", "-fsyntax-only", f"-I{tmp_path}", str(source)]
        results.append(subprocess.run(command, check=False, capture_output=True, text=True))
    assert results[0].returncode == 0, results[0].stderr
    assert results[1].returncode != 0
    assert "SpiralCurve" in results[1].stderr


def test_depth_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(levels: int) -> Tree:
        tree: Tree = Curve("constant")
        for _ in range(levels - 1):
            tree = Clamp(tree, scale=2.0)
        return tree

    deepest = pack(nested(program.MAX_DEPTH))
    assert core().evaluate(deepest, [0.0])[0] == 2.0 ** (program.MAX_DEPTH - 1)
    with pytest.raises(ValueError, match=r"32 levels deep.*from_callable"):
        pack(nested(program.MAX_DEPTH + 1))
    monkeypatch.setattr(program, "MAX_DEPTH", 40)
    assert core().validate(pack(nested(33))) == "the tree is too deep"


# What is changed in an otherwise good program, and a word of the reason it is refused for.
LINE = Curve("power", limit=10.0, divisor=10.0)
TWO = Join((LINE, LINE), ends=(5.0,), origins=(0.0, 5.0))
BAD_TREES = [
    (Curve("power", divisor=0.0), "divisor"),
    (Curve("power", divisor=nan), "divisor"),
    (Curve("power", p=inf), "not finite"),
    (Curve("power", offset=nan), "not finite"),
    (Curve("power", origin=inf), "not finite"),
    (Curve("power", limit=nan), "limit"),
    (Curve("power", limit=-inf), "limit"),
    (Curve("power", stairs=-1.0), "stairs"),
    (Curve("power", repeats=inf), "repeats"),
    (Curve("power", low=2.0, high=1.0), "bounds"),
    (Curve("power", low=nan), "bounds"),
    (Curve("power", low=inf), "bounds"),
    (Curve("power", table=(1.0,)), "not a table"),
    (Curve("table"), "no table"),
    (Curve("table", table=(1.0, nan)), "not finite"),
    (Curve("levels"), "one end fewer"),
    (Curve("levels", table=(1.0, 2.0)), "one end fewer"),
    (Curve("levels", table=(2.0, 1.0, 0.5, 0.25, 0.125)), "in order"),
    (Join((LINE, LINE), ends=(), origins=(0.0, 5.0)), "one end fewer"),
    (Join((LINE, LINE, LINE), ends=(5.0, 4.0), origins=(0.0, 0.0, 0.0)), "in order"),
    (Join((), ends=(), origins=()), "empty"),
    (Product(()), "empty"),
    (Sum(()), "empty"),
    (Repeat(LINE, period=0.0), "period"),
    (Repeat(LINE, period=1.0, growth=0.0), "growth"),
    (Repeat(LINE, period=1.0, growth=1.001), "too many"),
    (Repeat(LINE, period=1.0, growth=0.5), "too many"),
    (Repeat(LINE, period=1.0, growth=0.5, times=5000.0), "too many"),
    (Repeat(LINE, period=1.0, gain=nan), "gain"),
    (Repeat(LINE, period=1.0, times=1.5), "count"),
    (Clock(LINE, multiplier=inf), "clock"),
    (Clock(LINE, every=-1.0), "every"),
    (Clamp(LINE, scale=nan), "clamp"),
    (Clamp(LINE, low=1.0, high=0.0), "bounds"),
]


@pytest.mark.parametrize(("tree", "reason"), BAD_TREES, ids=lambda value: str(value)[:60])
def test_bad_parameters_are_refused(tree: Tree, reason: str) -> None:
    assert reason in core().validate(pack(tree))


def _edited(tree: Tree, at: int, value: int, size: str = "<i") -> bytes:
    edited = bytearray(pack(tree))
    struct.pack_into(size, edited, at, value)
    return bytes(edited)


BAD_BYTES = [
    (b"", "shorter than its header"),
    (pack(LINE)[:23], "shorter than its header"),
    (pack(LINE)[:-1], "another size"),
    (pack(LINE) + b"\0" * 8, "another size"),
    (_edited(LINE, 0, 7), "not a schedule program"),
    (_edited(LINE, 4, 9), "another version"),
    (_edited(LINE, 8, 0), "number of nodes"),
    (_edited(LINE, 8, 2**30), "number of nodes"),
    (_edited(LINE, 8, 2), "another size"),
    (_edited(LINE, 12, -1), "table length"),
    (_edited(Product((LINE,)), 24, 99), "unknown kind"),
    (_edited(LINE, 28, 99), "unknown curve"),
    (_edited(LINE, 32, 1), "has children"),
    (_edited(TWO, 32, 2**31 - 1), "number of children"),
    (_edited(TWO, 32, -1), "number of children"),
    (_edited(LINE, 36, 2), "ends outside"),
    (_edited(LINE, 40, 1), "outside the program's"),
    (_edited(LINE, 40, -1), "outside the program's"),
    (_edited(LINE, 48, 2), "complement"),
    (_edited(LINE, 52, 1), "reserved"),
    (_edited(Product((LINE,)), 32, 2), "fewer children"),
    (_edited(Product((LINE, LINE)), 32, 1), "more children"),
    (_edited(Product((LINE, LINE)), 36, 2), "fewer children"),
    (_edited(Product((LINE, LINE)), 152 + 12, 3), "children"),
    (_edited(Product((LINE, LINE)), 152 + 12, 1), "ends outside"),
    (_edited(TWO, 40, 1), "outside the program's"),
]


@pytest.mark.parametrize(("program_bytes", "reason"), BAD_BYTES)
def test_bad_bytes_are_refused(program_bytes: bytes, reason: str) -> None:
    assert reason in core().validate(program_bytes)
    with pytest.raises(ValueError, match="invalid schedule program"):
        evaluate(program_bytes, [0])


@pytest.mark.parametrize(("program_bytes", "reason"), BAD_BYTES)
def test_bad_bytes_are_refused_without_an_extension(
    program_bytes: bytes,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,  # reason: the compiled check's
) -> None:
    monkeypatch.setattr(program, "_cpu", None)
    with pytest.raises(ValueError, match="invalid schedule program"):
        evaluate(program_bytes, [0])


def test_accepted_mutants_stay_inside_their_memory(tmp_path: Path) -> None:
    base = [
        LINE,
        Curve("table", table=(1.0, 2.0, 3.0), repeats=2.0),
        Curve("table", table=(1.0, 2.0, 3.0), repeats=2.0, divisor=1e-300),  # an index that is not a number
        Product((TWO, Sum((Repeat(LINE, period=10.0, growth=2.0, gain=0.5), Clamp(LINE, high=3.0))))),
        Clock(
            Join((Curve("cosine", q=2.0), Curve("tanh"), Curve("logarithm")), (5.0, 9.0), (0.0, 1.0, 2.0)), every=2.0
        ),
    ]
    paths = []
    for i, tree in enumerate(base):
        paths.append(tmp_path / f"{i}.bin")
        paths[-1].write_bytes(pack(tree))
    # Values may overflow or be NaN on mutated parameters; addresses and conversions may not.
    sanitizers = "-fsanitize=address,undefined,float-cast-overflow"
    fuzzer = build("fuzz_program.cpp", "fuzz", sanitizers, "-fno-sanitize-recover=all", "-g")
    result = subprocess.run([fuzzer, "1", "20000", *paths], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    accepted = int(result.stdout)
    assert 1000 < accepted < 20000 * len(base)


def both(tree: Tree, times: list[float]) -> list[float]:
    """The values, which the compiled evaluator and the Python one agree on to the bit."""
    compiled = core().evaluate(pack(tree), times).tolist()
    assert compiled == [reference_schedule.value(tree, t) for t in times]
    return compiled


def test_a_table_index_that_is_not_a_number_reads_the_first_entry() -> None:
    overflowing = Curve("table", divisor=1e-300, repeats=2.0, table=(1.0, 2.0, 3.0))  # u is inf - inf
    assert both(overflowing, [0.0, 1e9]) == [1.0, 1.0]
    assert both(Curve("table", origin=5.0, table=(1.0, 2.0, 3.0)), [0.0, 6.0, 99.0]) == [1.0, 2.0, 3.0]


def test_levels_begin_at_their_ends_and_repeat_where_ends_do() -> None:
    levels = Curve("levels", table=(0.0, 10.0, 10.0, 1.0, 0.5, 9.0, 0.25))
    assert both(levels, [-1.0, 0.0, 9.0, 10.0, 11.0, 1e18]) == [1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert both(Curve("levels", table=(3.0,)), [0.0, 5.0]) == [3.0, 3.0]
    # As many milestones as anybody has: the search visits ten of a thousand.
    many = Curve("levels", table=(*map(float, range(1, 1001)), *map(float, range(1001))))
    assert both(many, [0.0, 1.0, 499.5, 1000.0, 1001.0]) == [0.0, 1.0, 499.0, 1000.0, 1000.0]
    overflowing = Curve("levels", divisor=1e-300, repeats=2.0, table=(1.0, 5.0, 7.0))  # u is inf - inf
    assert both(overflowing, [1e9]) == [7.0]


def test_stairs_of_several_per_divisor_are_those_of_integers() -> None:
    # At x = 15, 15 / 11 * 11 is less than 15.
    for divisor in (11, 13, 19, 49, 103, 107):
        for stairs in (3, 7, 11, 13, 19):
            curve = Curve("power", divisor=float(divisor), stairs=float(stairs))
            times = [float(t) for t in range(5 * divisor)]
            assert both(curve, times) == [(int(t) * stairs // divisor) / stairs for t in times]


def test_growing_cycles_end_where_the_last_one_does() -> None:
    cycles = Repeat(Curve("power"), period=2.0, growth=2.0, times=3.0)  # 2 + 4 + 8 steps
    assert both(cycles, [0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 13.0, 14.0, 99.0]) == [0, 1, 0, 1, 1.5, 0, 1.75, 2, 2]
    shrinking = Repeat(Curve("power"), period=4.0, growth=0.5, gain=10.0, times=2.0)
    assert both(shrinking, [0.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == [0, 3, 0, 20, 40, 40]


def test_a_fractional_period_never_leaves_its_cycle() -> None:
    """Just before a multiple of 0.1, t / 0.1 may be rounded up to a whole number: the time would be negative."""
    period = 0.1
    times = [float(np.nextafter(k * period, 0.0)) for k in range(1, 3000)]
    assert any(np.floor(t / period) * period > t for t in times)
    assert all(0.0 <= x <= period for x in both(Repeat(Curve("power"), period=period), times))


def test_evaluate_keeps_shapes_and_needs_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    line = pack(LINE)
    times = np.arange(12).reshape(3, 4)
    compiled = evaluate(line, times)
    assert compiled.shape == (3, 4)
    assert evaluate(line, 5).shape == ()
    assert evaluate_at(line, 5.0) == 0.5
    assert evaluate(line, []).shape == (0,)
    monkeypatch.setattr(program, "_cpu", None)
    assert evaluate(line, times).tolist() == compiled.tolist()
    assert evaluate(line, times[:, ::2]).tolist() == compiled[:, ::2].tolist()
    assert float(evaluate(line, 5)) == evaluate_at(line, 5.0) == 0.5


def test_the_binding_evaluates_as_the_core_does() -> None:
    if program._cpu is None:
        pytest.skip("fused_sched._cpu is not built")
    tree = pack(Product((TWO, Curve("cosine", divisor=7.0), Curve("exponential", p=0.99))))
    times = np.arange(200.0)
    assert evaluate(tree, times).tobytes() == core().evaluate(tree, times).tobytes()
