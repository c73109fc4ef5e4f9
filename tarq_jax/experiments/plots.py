"""Figures of reports: functions from arrays to a matplotlib figure; no state is kept between calls."""

import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Line = tuple[Sequence[float], Sequence[float]]  # x and y

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def _panels(count: int, width: float = 3.6, height: float = 2.8) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def styles() -> Iterator[dict[str, Any]]:
    """Styles of lines, repeated without end: every colour solid, then dashed, dotted and dash-dotted."""
    return itertools.cycle([{"color": colour, "linestyle": line} for line in ("-", "--", ":", "-.")
                            for colour in COLOURS])


def curves(steps: Sequence[int], by_panel: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel per quantity, one line per level, over training steps."""
    figure, axes = _panels(len(by_panel))
    for axis, (title, lines) in zip(axes, by_panel.items(), strict=True):
        for style, (name, values) in zip(styles(), lines.items(), strict=False):
            axis.plot(steps, values, **style, label=name)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return figure


def usage(counts: Iterable[np.ndarray]) -> Figure:
    """Share of uses of each codeword, the most used first, one panel per level; dashed is even use."""
    counts = list(counts)
    figure, axes = _panels(len(counts))
    for index, (axis, level) in enumerate(zip(axes, counts, strict=True)):
        share = np.sort(level)[::-1] / max(level.sum(), 1)
        axis.bar(np.arange(len(share)), share, width=1.0, color=COLOURS[0])
        axis.axhline(1 / len(share), color="black", linestyle="--", linewidth=1)
        axis.set(title=f"level {index + 1}", xlabel="codeword, by use")
    axes[0].set_ylabel("share of uses")
    return figure


def distances(by_level: Iterable[np.ndarray]) -> Figure:
    """Histogram of the distances between different codewords, one panel per level."""
    by_level = list(by_level)
    figure, axes = _panels(len(by_level))
    for index, (axis, matrix) in enumerate(zip(axes, by_level, strict=True)):
        axis.hist(matrix[np.triu_indices(len(matrix), 1)], bins=30, color=COLOURS[0])
        axis.set(title=f"level {index + 1}", xlabel="distance")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("pairs")
    return figure


def projection(latents: np.ndarray, codewords: np.ndarray, counts: np.ndarray) -> Figure:
    """Codewords [K, D], sized by their use, over latents [M, D], on the latents' two main axes."""
    figure, (axis,) = _panels(1, width=5.5, height=4.5)
    if latents.shape[1] == 1:
        latents, codewords = (np.pad(points, ((0, 0), (0, 1))) for points in (latents, codewords))
    centre = latents.mean(axis=0)
    basis = np.linalg.svd(latents - centre, full_matrices=False)[2][:2].T
    points, placed = (latents - centre) @ basis, (codewords - centre) @ basis
    axis.scatter(points[:, 0], points[:, 1], s=4, color="#bbbbbb", linewidths=0, label="latents")
    sizes = 15 + 200 * counts / max(counts.max(), 1)
    across, up = placed.T
    axis.scatter(across, up, s=sizes, color=COLOURS[0], alpha=0.75, linewidths=0, label="codewords")
    unused = counts == 0
    if unused.any():
        axis.scatter(across[unused], up[unused], s=45, marker="x", color=COLOURS[1], label="never used")
    axis.set(xlabel="first axis", ylabel="second axis")
    axis.legend(frameon=False)
    return figure


def errors_by_size(lines: Mapping[str, Mapping[int, float]]) -> Figure:
    """Relative error over the number of codewords, both on logarithmic axes, one line per name."""
    figure, (axis,) = _panels(1, width=6.0, height=4.0)
    for style, (name, errors) in zip(styles(), lines.items(), strict=False):
        sizes = sorted(errors)
        axis.plot(sizes, [errors[size] for size in sizes], marker="o", **style, label=name)
    axis.set(xscale="log", yscale="log", xlabel="codewords of level 1",
             ylabel="relative error of the attention output")
    sizes = sorted({size for errors in lines.values() for size in errors})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.legend(frameon=False)
    return figure


def bars(by_panel: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """One panel per quantity, groups on the x axis, colours for series: panel -> series -> group -> value."""
    figure, axes = _panels(len(by_panel), width=5.0)
    for axis, (title, series) in zip(axes, by_panel.items(), strict=True):
        groups = list(next(iter(series.values())))
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
            axis.bar(places, [values[group] for group in groups], width, color=COLOURS[index % 6], label=name)
        axis.set_xticks(np.arange(len(groups)), groups)
        axis.set(title=title)
        if len(series) > 1:
            axis.legend(frameon=False)
    return figure


def times_by_size(lines: Mapping[str, Mapping[int, float]], size: str) -> Figure:
    """Milliseconds over a size, both on logarithmic axes, one line per name."""
    figure, (axis,) = _panels(1, width=8.0, height=4.6)
    for style, (name, times) in zip(styles(), lines.items(), strict=False):
        sizes = sorted(times)
        axis.plot(sizes, [times[size] for size in sizes], **style, marker="o", markersize=4, label=name)
    ticks = sorted({size for times in lines.values() for size in times})
    axis.set(xscale="log", yscale="log", xlabel=size, ylabel="ms")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure


def stacked(bars: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """One horizontal bar per name, with its parts end to end.

    A part below 0 counts as 0. A bar that is too long is cut off and labelled with its length.
    """
    figure, (axis,) = _panels(1, width=9.0, height=0.34 * len(bars) + 1.0)
    palette = (*COLOURS, "#F0E442", "#000000", "#bbbbbb")
    ends = np.zeros(len(bars))
    for index, part in enumerate(next(iter(bars.values()))):
        values = np.array([max(parts[part], 0.0) for parts in bars.values()])
        axis.barh(list(bars), values, left=ends, color=palette[index % len(palette)], label=part)
        ends += values
    longest = 3 * float(np.median(ends))
    for place, end in enumerate(ends):
        if end > longest:
            axis.text(longest, place, f"{end:,.0f} ", ha="right", va="center")
    axis.set_xlim(0, min(longest, 1.05 * ends.max()))
    axis.invert_yaxis()
    axis.set(xlabel=unit)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure


def timelines(columns: Mapping[str, Mapping[str, Mapping[str, Line]]],
              marks: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One column per name, one row per quantity, lines over seconds: column -> quantity -> name -> line.

    `marks` has two kinds of moments for each column, column -> kind -> seconds: vertical lines, dotted for
    the first kind and solid for the second.
    """
    quantities = list(next(iter(columns.values())))
    figure = Figure(figsize=(4.6 * len(columns), 2.3 * len(quantities)), layout="constrained")
    grid = figure.subplots(len(quantities), len(columns), squeeze=False, sharex="col")
    for place, (title, by_quantity) in enumerate(columns.items()):
        for axis, (quantity, lines) in zip(grid[:, place], by_quantity.items(), strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            for look, (name, (across, up)) in zip(styles(), lines.items(), strict=False):
                axis.plot(across, up, **look, label=name, linewidth=1)
            for style, moments in zip((":", "-"), marks[title].values(), strict=True):
                for moment in moments:
                    axis.axvline(moment, color="#bbbbbb", linestyle=style, linewidth=0.8, zorder=0)
            axis.set_ylim(bottom=0)
            if place == 0:
                axis.set_ylabel(quantity)
                if len(lines) > 1:
                    axis.legend(frameon=False, fontsize=8)
        grid[0, place].set_title(title)
        grid[-1, place].set_xlabel("seconds")
    return figure


def forest(intervals: Mapping[str, tuple[float, float, float]], label: str) -> Figure:
    """One line per name, from low to high with a mark at the value; dashed is no difference.

    If differences reach far beyond the median width of an interval, the axis is logarithmic beyond it.
    """
    figure, (axis,) = _panels(1, width=7.0, height=0.28 * len(intervals) + 1.0)
    for place, (value, low, high) in enumerate(intervals.values()):
        differs = low > 0 or high < 0
        axis.plot([low, high], [place, place], color=COLOURS[0] if differs else "#888888")
        axis.plot([value], [place], "o", color=COLOURS[0] if differs else "#888888", markersize=5)
    axis.axvline(0.0, color="black", linestyle="--", linewidth=1)
    furthest = max(max(abs(low), abs(high)) for _, low, high in intervals.values())
    usual = float(np.median([high - low for _, low, high in intervals.values()]))
    if 0 < usual < furthest / 20:
        axis.set_xscale("symlog", linthresh=usual)
        axis.grid(axis="x", color="#eeeeee")
    axis.set_yticks(range(len(intervals)), list(intervals))
    axis.invert_yaxis()
    axis.set(xlabel=label)
    return figure


def frontier(points: Mapping[str, tuple[float, float]], best: Sequence[str], quality: str,
             reference: str = "") -> Figure:
    """Quality over milliseconds; the points in `best` are joined by a line.

    Variants of one method have the same latency. Of points with the same latency only the best has a label,
    and the reference if it is one of them.
    """
    figure, (axis,) = _panels(1, width=8.0, height=5.0)
    axis.plot(*zip(*(points[name] for name in best), strict=True), color=COLOURS[0], drawstyle="steps-post",
              linewidth=1)
    highest = {across: max(up for other, up in points.values() if other == across)
               for across, _ in points.values()}
    for name, (across, up) in points.items():
        axis.plot([across], [up], "o", color=COLOURS[0] if name in best else "#888888")
    axis.set(xscale="log", xlabel="ms", ylabel=quality)
    _label(axis, {name: (across, up) for name, (across, up) in points.items()
                  if name == reference or up == highest[across]})
    return figure


def _label(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Labels points from left to right, each at the first free place beside its point, if there is one."""
    taken: list[Bbox] = []
    for name, place in sorted(points.items(), key=lambda item: item[1]):
        for above in (-4, 8, -16, 20, -28, 32):
            label = axis.annotate(name, place, xytext=(6, above), textcoords="offset points", fontsize=8)
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            continue
        taken.append(box)


def lines(by_name: Mapping[str, Line], across: str, up: str) -> Figure:
    """One line per name over one quantity."""
    figure, (axis,) = _panels(1, width=8.0, height=4.6)
    for style, (name, (x, y)) in zip(styles(), by_name.items(), strict=False):
        axis.plot(x, y, **style, label=name)
    axis.set(xlabel=across, ylabel=up)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure
