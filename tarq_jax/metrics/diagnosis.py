"""What is wrong with a codebook, in words, and which setting helps: a table of rules on measurements."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Level(NamedTuple):
    """Measurements of one level, on an evaluation set, and of the run as a whole."""

    level: int  # from 1
    size: int  # K
    utilisation: float  # share of codewords in use
    perplexity: float
    dead: int
    quantization_error: float  # share of the latents' energy left after this level
    error_before: float  # the same before this level; 1 for the first
    items: int  # of the data
    items_seen: int  # how many of them were looked at
    distinct_latents: int  # different latents of these items
    init: str  # config.codebook.init
    revive_every: int  # config.codebook.revive_every
    learning: str  # config.codebook.learning
    dead_by: str  # config.codebook.dead
    assign: str  # config.model.assign
    weight_decay: float  # config.optimizer.weight_decay


def _left(measured: Level) -> float:
    """Share of the incoming energy that the level leaves, to 0.1%; 0 if next to nothing came in."""
    incoming = measured.error_before
    return round(measured.quantization_error / incoming, 3) if incoming > 1e-4 else 0.0


def _any_of(*remedies: str) -> str:
    """The remedies that are not empty."""
    return ", or ".join(filter(None, remedies))


def _by_ema(measured: Level) -> str:
    return "" if measured.learning == "ema" else "set config.codebook.learning=ema"


def _by_nearest(measured: Level) -> str:
    return "" if measured.assign == "nearest" else "set config.model.assign=nearest"


def _by_less_decay(measured: Level) -> str:
    return "lower config.optimizer.weight_decay" if measured.weight_decay else ""


def _by_earlier_revival(measured: Level) -> str:
    more_often = "lower config.codebook.revive_every" if measured.revive_every > 1 else ""
    if measured.dead_by == "age":
        return _any_of(more_often, "lower config.codebook.max_age")
    return _any_of(more_often, "lower config.codebook.decay", "raise config.codebook.min_usage")


def _by_a_better_start(measured: Level) -> str:
    return ("raise config.codebook.init_latents" if measured.init == "kmeans" else
            "set config.codebook.init=kmeans")


class Rule(NamedTuple):
    """A condition on a level, the finding if it holds, and what helps that is not in force already."""

    holds: Callable[[Level], bool]
    finding: str
    remedy: Callable[[Level], str]


LEVEL_RULES = (
    Rule(lambda m: m.distinct_latents <= 1 < m.items_seen,
         "all latents are the same: the encoder or the query tower has collapsed, not the codebook",
         lambda m: _any_of(
             _by_less_decay(m), "see whether target attention helps on this data at all")),
    Rule(lambda m: m.items < m.size,
         "the data have {items} items for {size} codewords",
         lambda m: "lower config.model.num_codewords"),
    Rule(lambda m: m.items_seen < m.size <= m.items,
         "{items_seen} of {items} items were looked at, too few to judge {size} codewords",
         lambda m: "raise --requests, or take a --split that has more"),
    Rule(lambda m: 1 < m.distinct_latents < m.size <= m.items_seen,
         "only {distinct_latents} different latents for {size} codewords",
         lambda m: "lower config.model.num_codewords"),
    Rule(lambda m: m.utilisation < 0.98 and m.init == "random" and m.distinct_latents >= m.size,
         "{dead} of {size} codewords are never used, and the level began at random",
         lambda m: "set config.codebook.init=kmeans with config.codebook.start after a warm-up"),
    Rule(lambda m: m.utilisation < 0.98 and not m.revive_every and m.distinct_latents >= m.size,
         "{dead} of {size} codewords are never used, and none is revived",
         lambda m: "set config.codebook.revive_every, to 20 say"),
    Rule(lambda m: (m.utilisation < 0.98 and m.init != "random" and m.revive_every > 0
                    and m.distinct_latents >= m.size),
         "{dead} of {size} codewords are never used in spite of revival",
         _by_earlier_revival),
    Rule(lambda m: m.utilisation >= 0.98 and m.perplexity < 0.5 * m.size,
         "every codeword is used, but so unevenly that {perplexity:.0f} would do the work of {size}",
         lambda m: _any_of(_by_a_better_start(m), "lower config.model.num_codewords")),
    Rule(lambda m: m.level > 1 and 0.95 < _left(m) <= 1,
         "the level leaves {quantization_error:.1%} of the energy where {error_before:.1%} came in",
         lambda m: _any_of("lower config.model.num_levels", _by_ema(m))),
    Rule(lambda m: m.level == 1 and 0.95 < _left(m) <= 1,
         "the level leaves {quantization_error:.1%} of the energy: its codewords say next to nothing",
         lambda m: _any_of(_by_ema(m), "raise config.model.num_codewords")),
    Rule(lambda m: _left(m) > 1,
         "the level adds error, it leaves {quantization_error:.1%} of the energy where {error_before:.1%} "
         "came in, more than codewords of zero would",
         lambda m: _any_of(_by_ema(m), _by_nearest(m)) or _any_of(
             "lower config.model.num_levels" if m.level > 1 else "lower config.model.num_codewords",
             "train on more data")),
)


def diagnose_level(measured: Level) -> list[str]:
    """A sentence for each rule that holds; if none does, one that says the level is healthy.

    Example:
      >>> level = Level(1, 64, 0.25, 9.0, 48, 0.5, 1.0, 900, 900, 900,
      ...               "random", 0, "ema", "count", "nearest", 0.0)
      >>> for sentence in diagnose_level(level): print(sentence)
      Level 1: 48 of 64 codewords are never used, and the level began at random. What helps: set
      config.codebook.init=kmeans with config.codebook.start after a warm-up.
      Level 1: 48 of 64 codewords are never used, and none is revived. What helps: set
      config.codebook.revive_every, to 20 say.
    """
    values = measured._asdict()
    found = [f"Level {measured.level}: {rule.finding.format(**values)}. What helps: {rule.remedy(measured)}."
             for rule in LEVEL_RULES if rule.holds(measured)]
    return found or [
        f"Level {measured.level} is healthy: {measured.utilisation:.0%} of {measured.size} codewords in use, "
        f"perplexity {measured.perplexity:.0f}, {measured.quantization_error:.1%} of the energy left."]


def diagnose_attention(error: float, errors_by_length: Mapping[str, float], order: int) -> list[str]:
    """Sentences on the attention output's relative error, over all and by history length.

    Args:
      error: relative error over all requests whose history is not empty; NaN if there are none.
      errors_by_length: from the name of a bucket of lengths to its error, short histories first; NaN if it
        has only empty histories.
      order: order of the student's codebooks.
    """
    if math.isnan(error):
        return ["No history has an event, so that there is no attention to compare."]
    sentences = [f"The attention output is {error:.1%} off that of full attention."]
    if error > 0.25:
        sentences.append("That is far: set config.model.order=1." if order == 0 else
                         "That is far: raise config.model.num_codewords.")
    known = [value for value in errors_by_length.values() if not math.isnan(value)]
    if len(known) > 1 and known[-1] > 1.5 * known[0]:
        sentences.append(
            f"It grows with the history, from {known[0]:.1%} to {known[-1]:.1%}: long histories make "
            "attention sharper, which takes more codewords.")
    return sentences
