"""Whether a program became slower, by more than noise can explain.

A program is measured in several processes, because the placement of memory can favour one process. The lower
quartile of each process's times counts, because disturbances only add time. For each pair of a new and an old
process, the ratio of their times is taken. The program is called slower if the median ratio is above
`TOLERANCE` and at least `SHARE` of the ratios are above 1. Faster is defined likewise. A program whose median
ratio is above `SUSPECT`, or below its inverse, is measured again before it is judged.

If both versions are measured in turns, the processes that took turns are pairs, and both measurements count.
If the old numbers come from a file, each new process is paired with each old one. All ratios are then divided
by the change of the machine's speed: the median ratio of the `plain` implementations, which belong to the
benchmarks and do not change with the library. This only finds suspects: they are then measured in turns with
the revision that the file names, and only that counts. If the file names none that can be measured, both
measurements against the file count.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE, SHARE, SUSPECT = 1.12, 5 / 6, 1.06

Times = Mapping[str, Sequence[float]]  # name of a program -> typical time of each process


class Verdict(NamedTuple):
    """New time divided by old time, pair by pair."""

    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median ratio."""
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
        """Whether to measure again."""
        return not 1 / SUSPECT <= self.ratio <= SUSPECT


def in_turns(new: Times, old: Times) -> dict[str, Verdict]:
    """Verdicts for processes that took turns, in their order.

    Example:
      >>> found = in_turns({"a": [1.3, 1.2, 1.4], "b": [1.3, 0.9, 1.4]}, {"a": [1.0] * 3, "b": [1.0] * 3})
      >>> {name: verdict.word for name, verdict in found.items()}
      {'a': 'slower', 'b': 'same'}
    """
    return {name: Verdict(tuple(one / other for one, other in zip(new[name], old[name], strict=True)))
            for name in new if name in old}


def against(new: Times, old: Times) -> dict[str, Verdict]:
    """Verdicts for new processes against those of another time.

    Raises:
      ValueError: programs are in both, but no `plain` one, so the machine may be another or slower.
    """
    common = [name for name in new if name in old]
    still = [np.median(new[name]) / np.median(old[name]) for name in common if "/plain/" in name]
    if common and not still:
        raise ValueError(f"only {', '.join(common)} ran both times, expected a `plain` program among them: "
                         "it tells the speed of the machine")
    drift = float(np.median(still)) if common else 1.0
    return {name: Verdict(tuple(one / other / drift
                                for one, other in itertools.product(new[name], old[name])))
            for name in common}


def settled(
    first: Mapping[str, Verdict], again: Callable[[list[str]], Mapping[str, Verdict]], *, both: bool = True,
) -> dict[str, Verdict]:
    """Measures suspects again.

    Args:
      first: verdicts by program name.
      again: program names -> verdicts of a second measurement of these programs, if it can measure them.
      both: whether suspects are judged by both measurements; otherwise only by the second.
    """
    suspects = [name for name, found in first.items() if found.suspect]
    second = again(suspects) if suspects else {}
    return dict(first) | {
        name: Verdict(first[name].ratios * both + second[name].ratios) for name in suspects if name in second}
