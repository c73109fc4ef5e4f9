"""Whether a program became slower, by more than noise can explain.

A program is measured in several processes, because the placement of memory can favour one process. The lower
quartile of each process's times counts, because disturbances only add time. For each pair of a new and an old
process, the ratio of their times is taken. The program is called slower if the median ratio is above
`TOLERANCE` and at least `SHARE` of the ratios are above `LEAST`. Faster is defined likewise.

A program whose median ratio is above `LEAST`, or below its inverse, is measured again, in `AGAIN` times as
many processes. The second measurement alone decides: the first was chosen because it is extreme.

The `plain` implementations are not judged: they belong to the benchmarks and do not change with the library.

If both versions are measured in turns, the processes that took turns are pairs. If the old numbers come from
a file, each new process is paired with each old one. All ratios are then divided by the change of the
machine's speed, the median ratio of the `plain` programs. Suspects are then measured in turns with the
revision that the file names, or against the file again if that cannot be measured.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE, SHARE = 1.14, 5 / 6  # 1.14 is as far from 1 as from 1.3
LEAST, AGAIN = 1.06, 2

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
        if self.ratio > TOLERANCE and np.mean(ratios > LEAST) >= SHARE:
            return "slower"
        return "faster" if self.ratio < 1 / TOLERANCE and np.mean(ratios < 1 / LEAST) >= SHARE else "same"

    @property
    def suspect(self) -> bool:
        """Whether to measure again."""
        return not 1 / LEAST <= self.ratio <= LEAST


def _is_plain(name: str) -> bool:
    return "/plain/" in name


def in_turns(new: Times, old: Times) -> dict[str, Verdict]:
    """Verdicts for processes that took turns, in their order.

    Example:
      >>> found = in_turns({"a": [1.3, 1.2, 1.4], "b": [1.3, 0.9, 1.4]}, {"a": [1.0] * 3, "b": [1.0] * 3})
      >>> {name: verdict.word for name, verdict in found.items()}
      {'a': 'slower', 'b': 'same'}
    """
    return {name: Verdict(tuple(one / other for one, other in zip(new[name], old[name], strict=True)))
            for name in new if name in old and not _is_plain(name)}


def against(new: Times, old: Times) -> dict[str, Verdict]:
    """Verdicts for new processes against those of another time.

    Raises:
      ValueError: programs are in both, but no `plain` one, so the machine may be another or slower.
    """
    common = [name for name in new if name in old]
    still = [np.median(new[name]) / np.median(old[name]) for name in common if _is_plain(name)]
    if common and not still:
        raise ValueError(f"only {', '.join(common)} ran both times, expected a `plain` program among them: "
                         "it tells the speed of the machine")
    drift = float(np.median(still)) if common else 1.0
    return {name: Verdict(tuple(one / other / drift
                                for one, other in itertools.product(new[name], old[name])))
            for name in common if not _is_plain(name)}


def settled(
    first: Mapping[str, Verdict], again: Callable[[list[str]], Mapping[str, Verdict]]
) -> dict[str, Verdict]:
    """Measures suspects again; the second measurement decides where there is one.

    Args:
      first: verdicts by program name.
      again: program names -> verdicts of a second measurement of these programs, and perhaps of others.
    """
    suspects = [name for name, found in first.items() if found.suspect]
    second = again(suspects) if suspects else {}
    return {name: second.get(name, found) if name in suspects else found for name, found in first.items()}
