"""Figures of the hardware study, as inline SVG like those of plots.py."""

import math

from matplotlib.ticker import FuncFormatter, NullLocator

from .plots import INK, LOOKUP, MUTED, PAPER, SERIES, drawing, spread_labels

MARKERS = "osD^vP*"  # colour is never the only difference


def lines(name, about, series, *, x_label, y_label, one=False):
    """A line for each of `{label: [(x, y), ...]}`, both axes logarithmic; with `one` a straight one at y = 1."""
    series = {label: points for label, points in series.items() if points}
    with drawing(name, about, 700, 340, (52, 150, 14, 46)) as on:
        axes = on.axes
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        labels = []
        for n, (label, points) in enumerate(series.items()):
            colour = SERIES[n % len(SERIES)]
            look = {"color": colour, "marker": MARKERS[n % len(MARKERS)], "markerfacecolor": PAPER if n % 2 else colour}
            axes.plot(*zip(*points, strict=True), **look, clip_on=False, zorder=3)
            labels.append((points[-1][1], label, colour))
        if one:
            axes.axhline(1, color=INK, linewidth=1)
        xs = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(xs, [f"{x:,g}" for x in xs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _few_ticks(axes)
        axes.tick_params(length=0, which="both")
        axes.grid(axis="y")
        spread_labels(on, labels)
    return on.svg


def _few_ticks(axes):
    """Ticks at 1, 2, 5 of each power of ten, and between them where the range is small."""
    low, high = axes.get_ylim()
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axes.set_yticks([step * 10**power for power in powers for step in steps if low <= step * 10**power <= high])
    axes.yaxis.set_minor_locator(NullLocator())


def ranges(name, about, rows, *, x_label):
    """A bar for each `(label, value, least, most)`, with a thin line from the least to the most."""
    height = 26 * len(rows) + 52
    with drawing(name, about, 700, height, (290, 40, 6, 42)) as on:
        axes = on.axes
        for y, (_, value, least, most) in enumerate(reversed(rows)):
            axes.barh(y, value - 1, left=1, height=0.55, facecolor=LOOKUP, edgecolor=LOOKUP)
            axes.plot([least, most], [y, y], color=INK, linewidth=1.2, marker="|", markersize=7)
        axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
        axes.set(xlim=(0.97, None), ylim=(-0.6, len(rows) - 0.4), xlabel=x_label)
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="x")
    return on.svg


def scatter(name, about, points, *, band):
    """Predicted against measured microseconds, `(measured, predicted)`, with the line of equals and a band."""
    low = min(min(pair) for pair in points) / 1.3
    high = max(max(pair) for pair in points) * 1.3
    with drawing(name, about, 460, 420, (56, 16, 12, 46)) as on:
        axes = on.axes
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set(xlabel="measured µs a token", ylabel="predicted")
        axes.plot([low, high], [low, high], color=INK, linewidth=1)
        for factor in (1 + band, 1 - band):
            axes.plot([low, high], [low * factor, high * factor], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.plot(*zip(*points, strict=True), "o", color=LOOKUP, markerfacecolor=PAPER, zorder=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(length=0, which="both")
        axes.grid()
    return on.svg
