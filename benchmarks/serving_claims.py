"""Conclusions from the measurements: ratios and their targets, and where target attention is cheaper.

All are pure functions of the medians of parts and of requests, in milliseconds.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.serving_contenders import HEADS, IN_BLOCKS, TWO_TOWER, WHOLE, Sizes, tarq_name

Part = tuple[str, str, int, int]  # model, part, candidates, history


class Medians(NamedTuple):
    """The medians of one run; a point is (candidates, history)."""

    parts: Mapping[Part, float]  # parts of the user side have 0 candidates
    requests: Mapping[tuple[str, int, int], float]
    candidates: tuple[int, ...]  # at which the item side was measured, in rising order
    main: tuple[int, int]

    def codebooks(self, model: str, part: str = "codebooks") -> float:
        """Time of the codebooks at the main history; 0 if a model has none."""
        return self.parts.get((model, part, 0, self.main[1]), 0.0)

    def item_side(self, model: str, candidates: int, part: str = "items") -> float:
        """Time of the item side, or a part of it, at the main history."""
        return self.parts[model, part, candidates, self.main[1]]

    def work(self, model: str, candidates: int) -> float:
        """Time of codebooks, look-ups and head: all that a model does after encoding the history."""
        return self.codebooks(model) + self.item_side(model, candidates)

    def attention(self, model: str, candidates: int) -> float:
        """Time of codebooks and look-ups, or of the attention that replaces them."""
        return self.codebooks(model) + self.item_side(model, candidates, "look_ups")


def verdict(ratio: float, target: float, at_least: bool) -> str:
    """Whether a target is met, in words.

    Example:
      >>> verdict(12.0, 25.0, True), verdict(1.1, 1.3, False)
      ('missed', 'met')
    """
    return "met" if (ratio >= target if at_least else ratio <= target) else "missed"


def against_target_attention(found: Medians, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """How many times faster than each form of target attention, with targets if there are any."""
    zero = {head: tarq_name(0, head, sizes.codewords) for head in HEADS}
    large, small = ({head: tarq_name(1, head, codewords) for head in HEADS}
                    for codewords in (sizes.codewords, sizes.few_codewords))
    targets = {zero["scalar"]: 25.0, zero["mlp"]: 10.0}
    for names in (zero, large, small):
        for name in names.values():
            yield from _speedup(found, name, "codebooks, look-ups and head", found.work, targets.get(name))
    for names, target in ((large, 20.0), (small, 40.0)):
        yield from _speedup(found, names["mlp"], "codebooks and look-ups", found.attention, target)


def _speedup(found: Medians, name: str, what: str, cost: Callable[[str, int], float], target: float | None
             ) -> Iterator[dict[str, Any]]:
    candidates, history = found.main
    for other in (IN_BLOCKS, WHOLE):
        ratio = cost(other, candidates) / cost(name, candidates)
        whole = found.requests[other, candidates, history] / found.requests[name, candidates, history]
        yield {"kind": "ratio", "model": name, "what": what, "against": other, "ratio": ratio,
               "target": None if target is None else f">= {target:g}",
               "verdict": None if target is None else verdict(ratio, target, at_least=True),
               "request_ratio": whole}


def further_ratios(found: Medians, sizes: Sizes, growth: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The scalar head compared with a dot product with the same codebooks, and its growth with candidates."""
    scalar, dot = (tarq_name(0, head, sizes.codewords) for head in ("scalar", "dot"))
    candidates, history = found.main
    least = found.codebooks(dot, "personalized") + found.item_side(TWO_TOWER, candidates)
    ratio = found.work(scalar, candidates) / least
    yield {"kind": "ratio", "model": scalar, "what": "codebooks, look-ups and head",
           "against": "personalised codebooks and a dot product", "ratio": ratio, "target": "<= 1.3",
           "verdict": verdict(ratio, 1.3, at_least=False)}
    few, many = growth
    for what, times in (
        ("codebooks, look-ups and head", [found.work(scalar, size) for size in (many, few)]),
        ("whole request", [found.requests[scalar, size, history] for size in (many, few)]),
    ):
        yield {"kind": "ratio", "model": scalar, "what": f"{what}, {many:,} candidates",
               "against": f"{few:,} candidates", "ratio": times[0] / times[1], "target": "<= 1.2",
               "verdict": verdict(times[0] / times[1], 1.2, at_least=False)}


def crossovers(found: Medians, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The number of candidates below which target attention does less work, for each of its forms."""
    for name in models:
        for other in (IN_BLOCKS, WHOLE):
            measured = [size for size in found.candidates
                        if (other, "items", size, found.main[1]) in found.parts]
            yield {"kind": "crossover", "model": name, "against": other,
                   "candidates": crossover(measured, *(
                       [found.work(model, size) for size in measured] for model in (other, name)),
                       start=found.codebooks(name))}


def crossover(candidates: Sequence[int], rising: list[float], flat: list[float], *, start: float
              ) -> int | None:
    """Where the cost `rising` first exceeds `flat`, interpolated linearly between numbers of candidates.

    With 0 candidates, `rising` is 0 and `flat` is `start`. None if `rising` never exceeds `flat`.

    Example:
      >>> crossover((100, 200), [10.0, 20.0], [14.0, 16.0], start=12.0)
      150
      >>> crossover((100, 200), [10.0, 20.0], [6.0, 6.0], start=5.0)
      56
    """
    differences = [-start, *(more - less for more, less in zip(rising, flat, strict=True))]
    points = (0, *candidates)
    for (left, right), (before, after) in zip(
            itertools.pairwise(points), itertools.pairwise(differences), strict=True):
        if before <= 0 < after:
            return round(left + (right - left) * -before / (after - before))
    return None
