"""Schedule programs: the tree a schedule lowers to, its bytes (csrc/core/program.h), and their evaluation.

The nodes below are the evaluator's vocabulary, written down as data; the words people use are in
`fused_sched.schedules`. `pack` turns a tree into bytes, `unpack` reads them back, `describe` prints them.
"""

from __future__ import annotations

import importlib
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import inf
from types import ModuleType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

#: Tags of FS_CURVES and FS_NODE_KINDS in csrc/core/program.h; they are in checkpoints and never renumbered.
CURVES = {
    "constant": 0,
    "power": 1,
    "cosine": 2,
    "exponential": 3,
    "logarithm": 4,
    "tanh": 5,
    "table": 6,
    "levels": 7,
}
NODE_KINDS = {"curve": 0, "join": 1, "product": 2, "sum": 3, "repeat": 4, "clock": 5, "clamp": 6}

MAX_DEPTH = 32
_MAGIC = 0x48435346
_VERSION = 1
_HEADER = struct.Struct("<IIiiq")  # magic, version, num_nodes, table_length, total_bytes
#: kind, curve, num_children, end, table_begin, table_length, complement, reserved; parameters
_NODE = struct.Struct("<8i12d")


@dataclass(frozen=True)
class Curve:
    """`clamp(offset + scale * s(u), low, high)` with `u = min(t - origin, limit) / divisor`.

    With `stairs`, u is floored to that many stairs per divisor; with `repeats`, it runs through that many saw
    teeth per divisor; then it is raised to `exponent`, and subtracted from 1 if `complement`. A negative
    divisor makes a clock that counts down. The shapes s(u):

    constant 1 | power u^p | cosine (0.5 (1 + cos(pi p u)))^q | exponential p^u | logarithm p ln u |
    tanh 0.5 (1 - tanh(p + (q-p) u)) | table: the entry floor(u), or the nearest there is |
    levels: value i while u < end i, of a table with the n-1 ends and then the n values
    """

    curve: str
    origin: float = 0.0
    limit: float = inf
    divisor: float = 1.0
    stairs: float = 0.0
    repeats: float = 0.0
    exponent: float = 1.0
    p: float = 1.0
    q: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    low: float = -inf
    high: float = inf
    complement: bool = False
    table: tuple[float, ...] = ()


@dataclass(frozen=True)
class Join:
    """Child i while t < ends[i], on the clock t - origins[i]; the last child has no end."""

    children: tuple[Tree, ...]
    ends: tuple[float, ...]
    origins: tuple[float, ...]


@dataclass(frozen=True)
class Product:
    """The product of the children, left to right."""

    children: tuple[Tree, ...]


@dataclass(frozen=True)
class Sum:
    """The sum of the children, left to right."""

    children: tuple[Tree, ...]


@dataclass(frozen=True)
class Repeat:
    """The child over and over: cycle c lasts period * growth^c steps and is multiplied by gain^c.

    The child's clock runs from 0 to period in every cycle. After `times` cycles (0: endless) the last one
    stays at its end.
    """

    child: Tree
    period: float
    growth: float = 1.0
    gain: float = 1.0
    times: float = 0.0


@dataclass(frozen=True)
class Clock:
    """The child on the clock `max(0, multiplier * t + addend)`, in whole units of `every` if that is set."""

    child: Tree
    multiplier: float = 1.0
    addend: float = 0.0
    every: float = 0.0


@dataclass(frozen=True)
class Clamp:
    """`clamp(offset + scale * child, low, high)`."""

    child: Tree
    offset: float = 0.0
    scale: float = 1.0
    low: float = -inf
    high: float = inf


Tree: TypeAlias = Curve | Join | Product | Sum | Repeat | Clock | Clamp

#: The doubles of each kind's C++ parameter struct, in its order.
_PARAMETERS: dict[type, tuple[str, ...]] = {
    Curve: tuple(f.name for f in fields(Curve))[1:13],
    Join: (),
    Product: (),
    Sum: (),
    Repeat: ("period", "growth", "gain", "times"),
    Clock: ("multiplier", "addend", "every"),
    Clamp: ("offset", "scale", "low", "high"),
}
_KINDS: dict[int, type] = {NODE_KINDS[cls.__name__.lower()]: cls for cls in _PARAMETERS}
_CURVE_NAMES = {tag: name for name, tag in CURVES.items()}


def pack(tree: Tree) -> bytes:
    """The program of a tree: header, nodes in preorder, table.

    Raises ValueError if the tree is more than MAX_DEPTH levels deep.

    >>> len(pack(Curve("constant")))
    152
    """
    nodes: list[bytes] = []
    table: list[float] = []
    _pack_node(tree, nodes, table, 1)
    total = _HEADER.size + len(nodes) * _NODE.size + 8 * len(table)
    header = _HEADER.pack(_MAGIC, _VERSION, len(nodes), len(table), total)
    return b"".join((header, *nodes, struct.pack(f"<{len(table)}d", *table)))


def _pack_node(node: Tree, nodes: list[bytes], table: list[float], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(
            f"a schedule may be nested {MAX_DEPTH} levels deep, got more; "
            "tabulate a part of it with from_callable(schedule, num_steps)"
        )
    index, begin = len(nodes), len(table)
    nodes.append(b"")  # its place in preorder
    if isinstance(node, Curve):
        table.extend(node.table)
    elif isinstance(node, Join):
        table.extend(node.ends + node.origins)
    length = len(table) - begin
    children = _children(node)
    for child in children:
        _pack_node(child, nodes, table, depth + 1)
    kind = NODE_KINDS[type(node).__name__.lower()]
    curve, complement = (CURVES[node.curve], node.complement) if isinstance(node, Curve) else (0, False)
    parameters = [getattr(node, name) for name in _PARAMETERS[type(node)]]
    parameters += [0.0] * (12 - len(parameters))
    nodes[index] = _NODE.pack(
        kind, curve, len(children), len(nodes), begin if length else 0, length, complement, 0, *parameters
    )


def _children(node: Tree) -> tuple[Tree, ...]:
    if isinstance(node, Join | Product | Sum):
        return node.children
    return () if isinstance(node, Curve) else (node.child,)


def unpack(program: bytes) -> Tree:
    """The tree of a program, `pack`'s inverse.

    Raises ValueError for bytes that are no program. The compiled evaluator checks more than this: every
    parameter's range (validate_program in csrc/core/program.h).
    """
    if len(program) < _HEADER.size:
        raise ValueError("invalid schedule program: it is shorter than its header")
    magic, version, num_nodes, table_length, total = _HEADER.unpack_from(program)
    if magic != _MAGIC or version != _VERSION:
        raise ValueError(f"invalid schedule program: expected version {_VERSION}, got other bytes")
    expected = _HEADER.size + num_nodes * _NODE.size + 8 * table_length
    if num_nodes < 1 or table_length < 0 or not total == expected == len(program):
        raise ValueError("invalid schedule program: it has another size than its header says")
    table = struct.unpack_from(f"<{table_length}d", program, expected - 8 * table_length)
    records = list(_NODE.iter_unpack(program[_HEADER.size : _HEADER.size + num_nodes * _NODE.size]))
    tree, end = _unpack_node(records, table, 0, 1)
    if end != num_nodes or pack(tree) != program:
        raise ValueError("invalid schedule program: it is not as pack writes one")
    return tree


def _unpack_node(records: list[tuple[int, ...]], table: tuple[float, ...], index: int, depth: int) -> tuple[Tree, int]:
    if index >= len(records) or depth > MAX_DEPTH:
        raise ValueError("invalid schedule program: its tree is too deep or misses a node")
    kind, curve, num_children, end, begin, length, complement, _, *values = records[index]
    node_type = _KINDS.get(kind)
    if node_type is None or curve not in _CURVE_NAMES:
        raise ValueError("invalid schedule program: it has an unknown curve or kind of node")
    own = table[begin : begin + length] if min(begin, length) >= 0 else ()
    arity_is_right = {Curve: num_children == 0, Join: len(own) == 2 * num_children - 1}.get(
        node_type, num_children == 1 or (num_children > 1 and node_type in (Product, Sum))
    )
    if not arity_is_right or len(own) != length:
        raise ValueError("invalid schedule program: a node has the wrong number of children or table values")
    children = []
    after = index + 1
    for _ in range(num_children):
        child, after = _unpack_node(records, table, after, depth + 1)
        children.append(child)
    if after != end:
        raise ValueError("invalid schedule program: a subtree ends elsewhere than its node says")
    parameters = dict(zip(_PARAMETERS[node_type], values, strict=False))
    if node_type is Curve:
        return Curve(_CURVE_NAMES[curve], **parameters, complement=bool(complement), table=own), after
    if node_type is Join:
        return Join(tuple(children), own[: num_children - 1], own[num_children - 1 :]), after
    if node_type in (Product, Sum):
        return node_type(tuple(children)), after
    return node_type(children[0], **parameters), after


def describe(program: bytes) -> str:
    """A listing of a program, one node a line; parameters at their defaults are left out.

    >>> print(describe(pack(Curve("power", limit=10.0, divisor=10.0))))
    program version 1: 1 node, 0 table values, 152 bytes
    0 power limit=10 divisor=10
    """
    tree = unpack(program)
    _, version, num_nodes, table_length, total = _HEADER.unpack_from(program)
    lines = [
        f"program version {version}: {num_nodes} node{'s' if num_nodes != 1 else ''}, "
        f"{table_length} table values, {total} bytes"
    ]
    lines += [f"{index} {'  ' * depth}{text}" for index, (depth, text) in enumerate(_listing(tree, 0))]
    return "\n".join(lines)


def _listing(node: Tree, depth: int) -> Iterator[tuple[int, str]]:
    name = node.curve if isinstance(node, Curve) else type(node).__name__.lower()
    words = [name]
    for field in fields(node):
        value = getattr(node, field.name)
        if field.name in ("curve", "child", "children") or value == field.default:
            continue
        if field.name == "table" and len(value) > 8:
            words.append(f"table=({len(value)} values)")
        elif isinstance(value, tuple):
            words.append(f"{field.name}=({', '.join(f'{v:g}' for v in value)})")
        else:
            words.append(f"{field.name}={value:g}")
    yield depth, " ".join(words)
    for child in _children(node):
        yield from _listing(child, depth + 1)


def evaluate(program: bytes, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A program's values at the given times, by the compiled evaluator or, without one, in Python.

    program: bytes of `pack`. steps: times, 0-based updates, any shape. Returns float64 of the same shape.
    Raises ValueError for an invalid program.

    >>> evaluate(pack(Curve("exponential", p=0.5)), [0, 1, 2]).tolist()
    [1.0, 0.5, 0.25]
    """
    times = np.ascontiguousarray(steps, dtype=np.float64)
    if times.ndim == 0 or np.ndim(steps) == 0:
        times = times.reshape(())
    values = np.empty_like(times)
    if _cpu is not None:
        _cpu.evaluate(program, times.ctypes.data, values.ctypes.data, times.size)
        return values
    from . import reference_schedule

    reference_schedule.evaluate(program, times.reshape(-1), values.reshape(-1))
    return values


def evaluate_at(program: bytes, t: float) -> float:
    """A program's value at one time; a tenth of `evaluate`'s overhead, for code that runs every step."""
    if _cpu is None:
        return float(evaluate(program, t))
    time_and_value = array("d", (t, 0.0))
    address, _ = time_and_value.buffer_info()
    _cpu.evaluate(program, address, address + 8, 1)
    return time_and_value[1]


def _load_compiled() -> ModuleType | None:
    try:
        module = importlib.import_module("fused_sched._cpu")
    except ImportError:  # fused_sched.backends keeps the reason, for `python -m fused_sched`
        return None
    for table, expected in (("CURVES", CURVES), ("NODE_KINDS", NODE_KINDS)):
        built = dict(getattr(module, table))
        if built != expected:
            raise ImportError(
                f"fused_sched._cpu and fused_sched/program.py disagree on {table}: built {built}, expected "
                f"{expected}; add the missing row (a new curve needs its formula in csrc/core/schedule.h and "
                "in fused_sched/reference_schedule.py), then rebuild the package"
            )
    return module


_cpu = _load_compiled()
