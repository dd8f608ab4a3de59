"""Figures as inline SVG strings (marked safe) that take their colours and font from the page.

What differs from plain matplotlib: every colour used is a stand-in that becomes a CSS variable, so one SVG
serves light, dark and print; text stays text; ids carry the figure's name, so that figures can share a page;
axes are placed in points, so a figure shown at its own width has the page's text size. No text from data is
rendered: matplotlib would read its dollar signs as mathematics.
"""

import io
import re
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .words import microseconds

INK, MUTED, RULE, PAPER, DENSE, LOOKUP = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
SERIES = [f"#0707{n:02d}" for n in range(7)]
CSS = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", DENSE: "dense", LOOKUP: "lookup"}
CSS |= {colour: f"s{n}" for n, colour in enumerate(SERIES, start=1)}

# Colour is never the only difference: dense is hollow (and its line dashed), lookup filled (and solid).
LINE = {
    "dense": {"color": DENSE, "linestyle": (0, (5, 3)), "marker": "o", "markerfacecolor": PAPER},
    "lookup": {"color": LOOKUP, "linestyle": "-", "marker": "s", "markerfacecolor": LOOKUP},
}
BAR = {
    "dense": {"facecolor": PAPER, "edgecolor": DENSE},
    "lookup": {"facecolor": LOOKUP, "edgecolor": LOOKUP},
}
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lookupffn",  # matplotlib's ids are random without it
    "font.family": "DejaVu Sans",  # only to measure with; the page's font replaces it
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


class _Drawing:
    """One axes in a figure; sizes and margins (left, right, top, bottom) in points; `svg` once rendered."""

    def __init__(self, name, description, width, height, margins):
        self.name, self.description, self.svg = name, description, ""
        self.figure = Figure(figsize=(width / 72, height / 72))
        left, right, top, bottom = margins
        self.height = height - top - bottom
        box = (left / width, bottom / height, (width - left - right) / width, self.height / height)
        self.axes = self.figure.add_axes(box)

    def render(self):
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue()
        body = svg.split("</defs>", 1)[1]  # what is before holds a <style> that would apply to the whole page
        view_box = re.search(r'viewBox="[^"]*"', svg)[0]
        body = re.sub(r' id="|href="#|url\(#', lambda found: f"{found[0]}{self.name}-", body)
        body = re.sub(r" font-family: [^;\"]*;?", "", body)
        for colour, variable in CSS.items():
            body = body.replace(colour, f"var(--{variable})")
        self.svg = Markup(f'<svg role="img" aria-label="{self.description}" {view_box}>{body}')


@contextmanager
def drawing(name, description, width, height, margins):
    with matplotlib.rc_context(RC):
        made = _Drawing(name, description, width, height, margins)
        yield made
        made.render()


def spread_labels(on, labels):
    """Write `(y, text, colour)` right of the axes at those heights, pushed apart where they overlap, none above."""
    to_pixels, to_fraction = on.axes.transData, on.axes.transAxes.inverted()
    x, line, labels = on.axes.get_xlim()[1], 15 / on.height, sorted(labels)
    heights = [to_fraction.transform(to_pixels.transform((x, y)))[1] for y, _, _ in labels]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + line)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1 - (len(heights) - 1 - i) * line)
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (10, 0), "va": "center"}
        on.axes.annotate(text, (1, height), color=colour, annotation_clip=False, **place)


def _count(value, _=None):
    """500000 as 500 k, 4096000 as 4.1 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{round(value / unit, 1):g}{name}"
    return f"{value:g}"


def curves(report, name, width):
    """Log perplexity against tokens trained, both models; None where no point was measured."""
    points = {
        model: [(p["tokens"], p["log_perplexity"]) for p in report["models"][model]["curve"]]
        for model in ("dense", "lookup")
    }
    points = {model: [p for p in pairs if None not in p] for model, pairs in points.items()}
    points = {model: pairs for model, pairs in points.items() if pairs}
    if not points:
        return None
    about = "Log perplexity of both models against tokens trained, with the unigram entropy"
    with drawing(name, about, width, min(380, width * 0.85), (46, 60, 12, 46)) as on:
        axes = on.axes
        for model, pairs in points.items():
            every = max(1, len(pairs) // 10)  # a marker on every point of a long curve would hide the line
            marked = {"markevery": ((len(pairs) - 1) % every, every), "clip_on": False, "zorder": 3}
            axes.plot(*zip(*pairs, strict=True), **LINE[model], **marked)
        entropy = report["unigram_entropy"]
        if entropy is not None:
            axes.axhline(entropy, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (0, 5)}
            axes.annotate(f"unigram entropy {entropy:.2f}", (1, entropy), color=MUTED, ha="right", **place)
        axes.margins(x=0.0, y=0.08)
        axes.set_xlim(left=0)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
        axes.set_xlabel("tokens trained", labelpad=6)
        axes.set_ylabel("log perplexity (nats)", labelpad=6)
        ends = [(pairs[-1][1], model, LINE[model]["color"]) for model, pairs in points.items()]
        spread_labels(on, ends)
    return on.svg


def time_bars(timings, name):
    """Microseconds per token from `{"dense": timing, "lookup": timing}`; None where neither was timed."""
    timings = {model: t for model, t in timings.items() if t and t["us_per_token"] is not None}
    if not timings:
        return None
    largest = max(max(t["us_per_token"], t["us_per_token_high"] or 0) for t in timings.values())
    with drawing(name, "Microseconds per token, dense and lookup", 340, 132, (52, 14, 6, 42)) as on:
        axes = on.axes
        for y, model in enumerate(("lookup", "dense")):
            if model not in timings:
                axes.text(0, y, " not measured", color=MUTED, va="center")
                continue
            time, low, high = (timings[model][f"us_per_token{end}"] for end in ("", "_low", "_high"))
            axes.barh(y, time, height=0.5, linewidth=1.4, **BAR[model])
            if None not in (low, high):
                axes.plot([low, high], [y, y], color=INK, linewidth=1.2, marker="|", markersize=7)
            place = {"textcoords": "offset points", "xytext": (8, 0), "va": "center"}
            axes.annotate(microseconds(time), (max(time, high or 0), y), annotation_clip=False, **place)
        axes.set(xlim=(0, largest * 1.2 or 1), ylim=(-0.5, 1.5), xlabel="µs per token")
        axes.set_yticks((0, 1), ("lookup", "dense"))
        axes.tick_params(length=0)
        axes.spines["left"].set_color(MUTED)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    return on.svg


def _layers(axes, buckets):
    layers = [b["layer"] for b in buckets]
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.grid(axis="y")


def bucket_use(buckets, name):
    """Buckets used and code entropy of each layer, in percent; None without a measured layer."""
    lines = {"buckets_used": ("used", LOOKUP, "-", "s"), "code_entropy": ("entropy", MUTED, (0, (1, 2)), "D")}
    about = "Share of buckets used and code entropy, by layer"
    labels = []
    with drawing(name, about, 340, 220, (52, 62, 10, 42)) as on:
        for key, (label, colour, style, marker) in lines.items():
            pairs = [(b["layer"], 100 * b[key]) for b in buckets if b[key] is not None]
            if pairs:
                look = {"color": colour, "linestyle": style, "linewidth": 1.2, "clip_on": False}
                on.axes.plot(*zip(*pairs, strict=True), marker=marker, zorder=3, **look)
                labels.append((pairs[-1][1], label, colour))
        on.axes.set(ylim=(0, 100), ylabel="percent")
        _layers(on.axes, buckets)
        spread_labels(on, labels)
    return on.svg if labels else None


def margins(buckets, name):
    """Quantiles of each layer's margins: 5 to 95 % thin, 25 to 75 % thick, median a dot; None without any."""
    keys = ("0.05", "0.25", "0.5", "0.75", "0.95")
    rows = [(b["layer"], [b["margin_quantiles"].get(key) for key in keys]) for b in buckets]
    rows = [(layer, quantiles) for layer, quantiles in rows if None not in quantiles]
    if not rows:
        return None
    with drawing(name, "Quantiles of the margin |z|, by layer", 340, 220, (52, 14, 10, 42)) as on:
        axes = on.axes
        for layer, (low, quarter, median, three_quarters, high) in rows:
            axes.plot([layer, layer], [low, high], color=LOOKUP, linewidth=1.2)
            axes.plot([layer, layer], [quarter, three_quarters], color=LOOKUP, linewidth=7, solid_capstyle="butt")
            axes.plot(layer, median, "o", color=LOOKUP, markerfacecolor=PAPER, markersize=6)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("margin |z|")
        _layers(axes, buckets)
    return on.svg
