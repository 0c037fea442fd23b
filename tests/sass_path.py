"""The way most threads take through an update kernel, found in its machine code: whole, aligned vectors of ordinary
numbers. Of all ways that load and store as many bytes in wide accesses, and take as many roots, it is the shortest.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

#: Pipes of an SM by operation: one at half the rate of the other. What is in neither is loads, stores, roots, branches
#: and what is computed once for a warp.
INTEGER = re.compile(r"LOP3|SHF|PRMT|IADD3?|VIADD|[IF]SETP?|FMNMX|VIMNMX|F?SEL|PLOP3|LEA|MOV|P2R|R2P|SGXT|BMSK|VABS")
FLOAT = re.compile(r"FFMA|FMUL|FADD|HADD2|HFMA2|IMAD")


class Instruction(NamedTuple):
    """One of a kernel's, as cuobjdump prints it."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def is_conditional(self) -> bool:
        return bool(self.predicate) or bool(re.match(r"!?U?P\d", self.operands))


#: Between where a thread gives up and the end of the loop over tiles lie its stores and the loop over single elements:
#: a target nearer to the end than this is the loop's own.
BYTES_AT_THE_END = 512

Passed = tuple[int, int, int]  # roots, bytes loaded, bytes stored


class _Way(NamedTuple):
    length: int
    last: int
    before: _Way | None


def usual_way(kernel: list[Instruction], wanted: Passed, access_bytes: Callable[[str], int]) -> Counter[str] | None:
    """Instructions by pipe ("integer", "float", "other") of one thread's elements; None if no way is as wanted.

    wanted: roots, bytes loaded, bytes stored. access_bytes: of a load or store of that name that counts.
    """
    index = {instruction.address: i for i, instruction in enumerate(kernel)}
    loops = [
        (i.address - i.target, i.target, i.address) for i in kernel if i.target is not None and i.target < i.address
    ]
    _, head, end = max(loops)  # over tiles
    gives_up = _gives_up(kernel, wanted[0], end)
    ways: dict[int, dict[Passed, _Way]] = defaultdict(dict)
    ways[index[head]][0, 0, 0] = _Way(0, -1, None)
    for i in range(index[head], index[end] + 1):
        instruction = kernel[i]
        for (roots, loaded, stored), way in ways[i].items():
            loads, stores = instruction.name.startswith("LDG"), instruction.name.startswith("STG")
            moved = access_bytes(instruction.name) if loads or stores else 0
            passed = (roots + instruction.name.startswith("MUFU.RSQ"), loaded + loads * moved, stored + stores * moved)
            if any(p > w for p, w in zip(passed, wanted, strict=True)):
                continue
            following = [] if instruction.target is not None and not instruction.is_conditional else [i + 1]
            if instruction.target is not None and instruction.address < instruction.target not in gives_up:
                following.append(index[instruction.target])
            for j in following:
                if passed not in ways[j] or ways[j][passed].length > way.length + 1:
                    ways[j][passed] = _Way(way.length + 1, i, way)
    return _pipes(kernel, ways[index[end]].get(wanted))


def _gives_up(kernel: list[Instruction], num_roots: int, end: int) -> set[int]:
    """Where a thread goes that has found a number that is not ordinary, before the roots or after them."""
    roots = [instruction.address for instruction in kernel if instruction.name.startswith("MUFU.RSQ")]
    first, last = roots[0], roots[num_roots - 1]
    branches = [
        (i.address, i.target) for i in kernel if i.target is not None and last < i.target < end - BYTES_AT_THE_END
    ]
    return {t for a, t in branches if a < first} & {t for a, t in branches if last <= a < t}


def _pipes(kernel: list[Instruction], way: _Way | None) -> Counter[str] | None:
    if way is None:
        return None
    pipes: Counter[str] = Counter()
    while way is not None and way.last >= 0:
        name = kernel[way.last].name.split(".")[0]
        pipes["integer" if INTEGER.fullmatch(name) else "float" if FLOAT.fullmatch(name) else "other"] += 1
        way = way.before
    return pipes
