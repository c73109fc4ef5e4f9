"""Whether a program became slower: what noise cannot explain, and nothing else.

A program is measured in several processes, as one process may be lucky with where its memory lies. What
counts is the lower quartile of the times of each, since whatever disturbs only adds to them. It is called
slower if the median over pairs of an old and a new process says so by more than `TOLERANCE`, and `SHARE` of
the pairs say so at all; what looks so is measured again, and counts with both measurements. Likewise faster.
Where both are measured in turns pairs are those of the same turns; where the old numbers are from a file each
new process is paired with each old one, and all are divided by how much faster or slower the machine is than
it was: the median over the `plain` implementations, which live beside the benchmarks and do not change with
the library.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE, SHARE = 1.12, 5 / 6

Times = Mapping[str, Sequence[float]]  # name of a program -> time of each process


class Verdict(NamedTuple):
    """New time over old, pair by pair."""

    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median."""
        return float(np.median(self.ratios))

    @property
    def word(self) -> str:
        """One of slower, faster, same."""
        ratios = np.array(self.ratios)
        if self.ratio > TOLERANCE and np.mean(ratios > 1) >= SHARE:
            return "slower"
        return "faster" if self.ratio < 1 / TOLERANCE and np.mean(ratios < 1) >= SHARE else "same"

    @property
    def suspect(self) -> bool:
        """Whether to look again."""
        return not 1 / TOLERANCE <= self.ratio <= TOLERANCE


def in_turns(new: Times, old: Times) -> dict[str, Verdict]:
    """Of processes that took turns, in their order.

    Example:
      >>> found = in_turns({"a": [1.3, 1.2, 1.4], "b": [1.3, 0.9, 1.4]}, {"a": [1.0] * 3, "b": [1.0] * 3})
      >>> {name: verdict.word for name, verdict in found.items()}
      {'a': 'slower', 'b': 'same'}
    """
    return {name: Verdict(tuple(one / other for one, other in zip(new[name], old[name], strict=True)))
            for name in new if name in old}


def against(new: Times, old: Times) -> dict[str, Verdict]:
    """Of processes of now and of another time."""
    common = [name for name in new if name in old]
    still = [np.median(new[name]) / np.median(old[name]) for name in common if "/plain/" in name]
    drift = float(np.median(still)) if still else 1.0
    return {name: Verdict(tuple(one / other / drift
                                for one, other in itertools.product(new[name], old[name])))
            for name in common}


def settled(
    first: Mapping[str, Verdict], again: Callable[[list[str]], Mapping[str, Verdict]]
) -> dict[str, Verdict]:
    """Verdicts once suspects were measured again, of both measurements.

    Args:
      first: by name.
      again: verdicts of a second measurement of the programs of these names.
    """
    suspects = [name for name, found in first.items() if found.suspect]
    second = again(suspects) if suspects else {}
    return {name: Verdict(found.ratios + second[name].ratios) if name in suspects else found
            for name, found in first.items()}
