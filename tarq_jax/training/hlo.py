"""Collectives of a compiled program, read from its text: which data moves between devices, and how much.

    collectives(jax.jit(step).lower(state, batch).compile().as_text())
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")
BITS = {"pred": 8, "token": 0, "opaque": 0}  # of types whose name does not contain the number of bits

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)\s.*\{\s*$")
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?)\s({'|'.join(KINDS)})(-start)?\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DEVICES = re.compile(r"(?:num_partitions|replica_count)=(\d+)")
_LISTED_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


class Array(NamedTuple):
    """An operand or result of a collective."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the array in bytes, rounded up."""
        named = re.findall(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(named[0])
        return -(-math.prod(self.shape) * bits // 8)


class Collective(NamedTuple):
    """One collective instruction, as one device sees it."""

    kind: str  # one of `KINDS`
    arrays: tuple[Array, ...]  # results
    group: int  # devices that take part
    times: int  # runs per call; loops of known length are multiplied out, every branch counts

    @property
    def moved(self) -> int:
        """Bytes that a device sends per call, with the ring algorithm.

        With n devices and a result of b bytes: all-gather and all-to-all (n - 1) / n b, reduce-scatter
        (n - 1) b, all-reduce 2 (n - 1) / n b, a permutation b.
        """
        size = sum(array.num_bytes for array in self.arrays)
        others = max(self.group - 1, 0)
        share = others / max(self.group, 1)
        factor = {"all-reduce": 2 * share, "reduce-scatter": others, "collective-permute": 1.0}
        return round(self.times * factor.get(self.kind, share) * size)


def collectives(text: str) -> list[Collective]:
    """Every collective that runs in an HLO module, `compiled.as_text()`, in the order of the text."""
    bodies = _computations(text)
    times = _times(bodies)
    devices = math.prod(map(int, _DEVICES.findall(text.partition("\n")[0])))
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _INSTRUCTION.search(_COMMENT.sub("", line))
            if times[name] and match:
                arrays = _results(match[1], asynchronous=bool(match[3]), kind=match[2])
                found.append(Collective(match[2], arrays, _group_size(line) or devices, times[name]))
    return found


def bytes_by_kind(found: Sequence[Collective]) -> dict[str, int]:
    """Bytes that a device sends per call, by kind of collective; kinds that do not occur are left out."""
    total: dict[str, int] = defaultdict(int)
    for collective in found:
        total[collective.kind] += collective.moved
    return {kind: total[kind] for kind in KINDS if total[kind]}


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of every computation by name; the name of the entry computation is empty."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("HloModule"):
            continue
        if not line.startswith((" ", "}")) and (match := _COMPUTATION.match(line)):
            lines = bodies.setdefault("" if line.startswith("ENTRY") else match[1], [])
        else:
            lines.append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often every computation runs per call; a loop of unknown length counts as one round."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for line in bodies.get(name, ()):
            trips = _TRIPS.search(line)
            for called in _called(line):
                visit(called, runs * (int(trips[1]) if trips and f"body=%{called}" in line else 1))

    visit("", 1)
    return times


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from re.findall(r"[\w.\-]+", branches)


def _results(text: str, *, asynchronous: bool, kind: str) -> tuple[Array, ...]:
    """Result arrays in the type of an instruction; asynchronous starts list their operands first."""
    arrays = tuple(Array(dtype, tuple(map(int, filter(None, dims.split(",")))))
                   for dtype, dims in _ARRAY.findall(text))
    if asynchronous and kind == "collective-permute":
        return arrays[1:2]  # operand, result, contexts
    return arrays[len(arrays) // 2:] if asynchronous and kind != "all-reduce" else arrays


def _group_size(line: str) -> int:
    """Devices in a group, given as a list, as a size, or as axes of a mesh; 0 if groups are not given."""
    if listed := _LISTED_GROUP.search(line):
        return len(listed[1].split(","))
    if mesh := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # part of an axis: 'a':(before)size
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    iota = _IOTA_GROUPS.search(line)
    return int(iota[1]) if iota else 0
