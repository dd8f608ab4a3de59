"""A comparison of feed-forward layers for people: one row a recipe and horizon, as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lookupffn.files import atomic_replace, make_folder


def summarise(records: Sequence[dict]) -> list[dict]:
    """One row for each recipe and number of tokens: means over seeds, their spread, and the difference to ``dense``.

    ``spread`` is the standard deviation over seeds (None for one seed); ``difference`` the mean over the seeds that
    both have of log perplexity less that of the recipe called ``dense`` at the same tokens (None without one).
    """
    groups: dict[tuple[int, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["tokens"], record["recipe"]), []).append(record)
    rows = []
    for (tokens, recipe), group in sorted(groups.items(), key=lambda item: item[0][0]):
        values = [record["log_perplexity"] for record in group]
        dense = {record["seed"]: record["log_perplexity"] for record in groups.get((tokens, "dense"), [])}
        paired = [r["log_perplexity"] - dense[r["seed"]] for r in group if r["seed"] in dense]
        int8 = [r["log_perplexity_int8"] - r["log_perplexity"] for r in group if r["log_perplexity_int8"] is not None]
        deployed = [r["log_perplexity_deployed"] for r in group if r.get("log_perplexity_deployed") is not None]
        macs = [r["ffn_macs_per_token"] for r in groups.get((tokens, "dense"), [])]
        own = group[0]["ffn_macs_per_token"]  # 0 without a feed-forward layer
        same = (
            "parameters",
            "ffn_macs_per_token",
            "ffn_bytes_per_token",
            "ffn_us_per_token",
            "ffn_engine",
            "ffn_dtype",
        )
        rows.append(
            {
                "recipe": recipe,
                "tokens": tokens,
                "million_tokens": tokens / 1e6,
                "seeds": len(group),
                "log_perplexity": statistics.mean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "difference": statistics.mean(paired) if paired and recipe != "dense" else None,
                "int8_difference": statistics.mean(int8) if int8 else None,
                "deployed_difference": statistics.mean(deployed) - statistics.mean(values) if deployed else None,
                "deployed_bytes": group[0].get("deployed_bytes"),
                "deployed_mb": group[0]["deployed_bytes"] / 1e6 if group[0].get("deployed_bytes") else None,
                "macs_ratio": macs[0] / group[0]["ffn_macs_per_token"] if macs and macs[0] and own else None,
                "training_tokens_per_second": statistics.mean(r["training_tokens_per_second"] for r in group),
                **{name: group[0][name] for name in same},
            }
        )
    return rows


# Heading, form, and whether the terminal has room for it; the Markdown table has all.
_COLUMNS = (
    ("recipe", "{recipe}", True),
    ("M tokens", "{million_tokens:,.4g}", True),
    ("seeds", "{seeds}", True),
    ("log perplexity", "{log_perplexity:.4f}", True),
    ("spread", "{spread:.4f}", True),
    ("- dense", "{difference:+.4f}", True),
    ("int8 - float32", "{int8_difference:+.5f}", False),
    ("deployed - float32", "{deployed_difference:+.4f}", False),
    ("deployed MB", "{deployed_mb:.2f}", False),
    ("FFN multiply-adds", "{ffn_macs_per_token:,}", False),
    ("dense / it", "{macs_ratio:.1f}", True),
    ("FFN bytes a token", "{ffn_bytes_per_token:,}", False),
    ("parameters", "{parameters:,}", False),
    ("trained tokens/s", "{training_tokens_per_second:,.0f}", False),
    ("FFN µs", "{ffn_us_per_token:.3f}", True),
    ("engine", "{ffn_engine} {ffn_dtype}", False),
)


def _cell(row: dict, form: str) -> str:
    return "-" if any(value is None and f"{{{name}:" in form for name, value in row.items()) else form.format(**row)


def markdown(records: Sequence[dict]) -> str:
    """The table of :func:`summarise` in Markdown."""
    lines = [[heading for heading, _, _ in _COLUMNS], ["---", *["---:"] * (len(_COLUMNS) - 2), "---"]]
    lines += [[_cell(row, form) for _, form, _ in _COLUMNS] for row in summarise(records)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(records: Sequence[dict], console: Console) -> None:
    """Prints what matters most of the table of :func:`summarise`."""
    columns = [(heading, form) for heading, form, has_room in _COLUMNS if has_room]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption="log perplexity in nats, spread over seeds; µs a token")
    for heading, _ in columns:
        table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=heading == "recipe")
    for row in summarise(records):
        table.add_row(*(_cell(row, form) for _, form in columns))
    console.print(table)


def _tick(value: float, digits: str) -> str:
    """A tick of a logarithmic axis as a plain number, empty where its first digit is none of ``digits``."""
    return f"{value:,.10g}" if f"{value:e}"[0] in digits else ""


def _name(ax, marks: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names beside marks ``(x, y, name, colour)``, each as far up as it must be to be clear of the others."""
    size, taken = 8, []  # of letters; rectangles (left, right, middle), all in points
    ax.figure.canvas.draw()  # places the axes
    for x, y, name, colour in sorted(marks, key=lambda mark: mark[1]):
        across, up = ax.transData.transform((x, y)) * 72 / ax.figure.dpi
        width, above = 0.62 * size * len(name), 3
        fits = across + width < ax.bbox.x1 * 72 / ax.figure.dpi
        left = across + 6 if fits else across - 6 - width
        while any(
            left < end and left + width > begin and abs(up + above - middle) < 1.15 * size
            for begin, end, middle in taken
        ):
            above += 1
        taken.append((left, left + width, up + above))
        place = {"xytext": (6 if fits else -6, above), "ha": "left" if fits else "right", "va": "center"}
        text = ax.annotate(name, (x, y), textcoords="offset points", fontsize=size, color=colour, **place)
        text.set_in_layout(False)


_AXES = {
    "ffn_macs_per_token": "FFN multiply-adds a token",
    "deployed_bytes": "bytes of the whole model, int8 linears and int4 rows",
    "ffn_us_per_token": "FFN µs a token here, fastest form at hand",
}


def plot(records: Sequence[dict], path: Path) -> None:
    """Log perplexity against multiply-adds, bytes as deployed and measured time: a point a recipe, a row a horizon.

    As deployed is with linears in int8 and rows in int4; a recipe that the runtime does not have is not there.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = summarise(records)
    horizons = sorted({row["tokens"] for row in rows})
    figure = Figure(figsize=(16, 4.2 * len(horizons)), layout="constrained")
    axes = figure.subplots(len(horizons), 3, squeeze=False)
    for tokens, panels in zip(horizons, axes, strict=True):
        for ax, (key, label) in zip(panels, _AXES.items(), strict=True):
            here = [row for row in rows if row["tokens"] == tokens and row[key] is not None]
            ax.set(xlabel=label, ylabel="log perplexity, nats", title=f"{tokens:,} tokens")
            if not here:
                continue
            marks = []
            for row in here:
                filled = "none" if row["recipe"] == "dense" else None
                mark = ax.errorbar(
                    row[key], row["log_perplexity"], yerr=row["spread"], fmt="o", capsize=3, markerfacecolor=filled
                )
                marks.append((row[key], row["log_perplexity"], row["recipe"], mark[0].get_color()))
            best, front = float("inf"), []
            for row in sorted(here, key=lambda row: row[key]):
                if row["log_perplexity"] < best:
                    best = row["log_perplexity"]
                    front.append((row[key], best))
            ax.step(*zip(*front, strict=True), where="post", color="0.7", zorder=0, linewidth=1)
            least = min((row[key] for row in here if row[key]), default=1)
            if all(row[key] for row in here):
                ax.set_xscale("log")
            else:  # no feed-forward layer
                ax.set_xscale("symlog", linthresh=least)
            digits = "1" if max(row[key] for row in here) > 100 * least else "125"
            for set_formatter in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
                set_formatter(FuncFormatter(lambda value, _, digits=digits: _tick(value, digits)))
            ax.grid(color="0.92")
            ax.margins(0.15, 0.2)  # room for the names
            _name(ax, marks)
    make_folder(path.parent)
    with atomic_replace(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=130)
